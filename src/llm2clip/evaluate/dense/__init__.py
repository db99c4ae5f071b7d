"""Evaluation of region classification, segmentation and detection, with shared helpers for models and decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from accelerate.utils import gather_object
from torch import Tensor

from llm2clip.data.image_loader import image_batches
from llm2clip.data.image_refs import ImageRef
from llm2clip.data.skip_log import SkipLog
from llm2clip.evaluate.embeddings import EmbeddingSource, ModelEmbeddings
from llm2clip.models.dual_encoder import DualEncoder
from llm2clip.models.vision.dense import DenseEncoder
from llm2clip.progress import ProgressBar
from llm2clip.runs.ranks import print_once, process_state, wait_for_everyone

IMAGES_PER_BATCH = 8  # decoded images in memory at a time
LEARNED_SCALE = ", learned scale"  # suffix for the name of a method that uses the logit scale learned by the model
T = TypeVar("T")


def get_model(embeddings: EmbeddingSource) -> DualEncoder:
    """Return the model behind an embedding source.

    Raises:
        ValueError: If the embeddings were precomputed.
    """
    if not isinstance(embeddings, ModelEmbeddings):
        raise ValueError("precomputed embeddings cannot be used here: regions and pixels must be encoded with a model")
    return embeddings.model


def get_dense_encoder(model: DualEncoder, variants: Sequence[str]) -> DenseEncoder:
    """Return the dense encoder of a model.

    Raises:
        ValueError: If the model has no dense features, or does not support one of the variants.
    """
    if model.dense is None:
        raise ValueError(f"{model.name} has no dense features")
    unsupported = [variant for variant in variants if variant not in model.dense.variants]
    if unsupported:
        raise ValueError(
            f"{model.name} does not support the dense variant {unsupported[0]}; it supports "
            f"{', '.join(model.dense.variants)}"
        )
    return model.dense


def supported_variants(model: DualEncoder, variants: Sequence[str]) -> list[str]:
    """Return the variants that the model supports, and print the variants that are skipped."""
    available = model.dense.variants if model.dense is not None else ()
    skipped = [variant for variant in variants if variant not in available]
    if skipped:
        reason = f"the model supports only {', '.join(available)}" if available else "the model has no dense features"
        print_once(f"{model.name}: the dense variants {', '.join(skipped)} are skipped: {reason}")
    return [variant for variant in variants if variant in available]


def logit_scales(model: DualEncoder, protocol_scale: float) -> dict[str, float]:
    """Return the logit scales to evaluate: the scale of the protocol, and the scale that the model learned, if any.

    Published protocols use CLIP's scales, which may not fit models that learned a different scale.

    Returns:
        The scales, keyed by the suffix for the name of a method: "" for the protocol's scale.
    """
    learned = model.logit_scale()
    return {"": protocol_scale} if learned is None else {"": protocol_scale, LEARNED_SCALE: learned}


def decode_batches(
    refs: Sequence[ImageRef], transform: Callable[[Tensor], T], description: str, failures: dict[int, str]
) -> Iterator[dict[int, T]]:
    """Decode and transform this rank's images (every N-th image of N ranks) in batches, with a progress bar.

    Args:
        transform: Picklable function that is applied to each uint8 image of shape (3, H, W).
        description: Label of the progress bar.
        failures: Updated with the reason why each undecodable image failed, keyed by the image's index in `refs`.

    Yields:
        Transformed images, keyed by their index in `refs`.
    """
    state = process_state()
    indices = range(state.process_index, len(refs), state.num_processes)
    with ProgressBar(total=len(indices), desc=description, unit="image", disable=not state.is_main_process) as bar:
        for decoded, items, errors in image_batches([refs[i] for i in indices], transform, IMAGES_PER_BATCH):
            failures |= {indices[i]: reason for i, reason in errors.items()}
            yield {indices[i]: item for i, item in zip(decoded, items, strict=True)}
            bar.update(len(decoded) + len(errors))


def decode_images(
    refs: Sequence[ImageRef], sizes: Sequence[tuple[int, int]], description: str, failures: dict[int, str]
) -> Iterator[dict[int, Tensor]]:
    """Decode this rank's images in batches. See `decode_batches`.

    Args:
        refs, description: See `decode_batches`.
        sizes: Width and height of each image in pixels, to which its boxes refer.
        failures: See `decode_batches`. Images with a different size are also recorded.

    Yields:
        uint8 images of shape (3, H, W), keyed by their index in `refs`.
    """
    for images in decode_batches(refs, _identity, description, failures):
        usable = {}
        for index, image in images.items():
            width, height = sizes[index]
            if image.shape[1:] == (height, width):
                usable[index] = image
            else:
                size = f"{image.shape[2]} x {image.shape[1]}"
                failures[index] = f"the image is {size} pixels, but its boxes are for {width} x {height} pixels"
        yield usable


def _identity(image: Tensor) -> Tensor:
    return image


def gather_from_ranks(local: T) -> list[T]:
    """Return the results of all ranks. A result can be any picklable object."""
    if process_state().num_processes == 1:
        return [local]
    # The collective below has a short timeout, but some ranks may finish their images much later than others.
    wait_for_everyone()
    results: list[T] = gather_object([local])
    return results


def record_failures(log: SkipLog, refs: Sequence[ImageRef], failures: dict[int, Any]) -> None:
    """Log the images that could not be used, and raise an error if there are too many.

    Args:
        failures: Reason for each failure, keyed by the image's index. Must be the same on all ranks.

    Raises:
        TooManySkipped: If too many images could not be used.
        ValueError: If there are no images, or no image could be used.
    """
    log.count_at_least(len(refs))
    for index, reason in sorted(failures.items()):
        log.skip(str(refs[index]), 0, "unusable image", reason)
    log.check()
    if not refs:
        raise ValueError("the benchmark contains no images")
    if len(failures) == len(refs):
        raise ValueError(f"none of the {len(refs):,} images can be used; first failure: {refs[0]} ({failures[0]})")
