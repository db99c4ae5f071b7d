"""Shared helpers for evaluating region classification, segmentation and detection."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from accelerate.utils import gather_object
from torch import Tensor

from llm2clip.data.image_loader import iter_image_batches
from llm2clip.data.image_refs import ImageRef
from llm2clip.data.skip_log import SkipLog
from llm2clip.evaluate.embeddings import EmbeddingSource, ModelEmbeddings
from llm2clip.models.dual_encoder import DualEncoder
from llm2clip.progress import ProgressBar
from llm2clip.runs.ranks import print_once, process_state, wait_for_everyone

IMAGES_PER_BATCH = 8  # number of decoded images in memory at a time
LEARNED_SCALE = ", learned scale"  # suffix of a method's name if the method uses the model's learned logit scale
T = TypeVar("T")


def get_model(embeddings: EmbeddingSource) -> DualEncoder:
    """Return the model behind an embedding source.

    Raises:
        ValueError: If the embeddings were precomputed.
    """
    if not isinstance(embeddings, ModelEmbeddings):
        raise ValueError("regions and pixels must be encoded with a model, so precomputed embeddings cannot be used")
    return embeddings.model


def select_variants(model: DualEncoder, variants: Sequence[str], required: bool) -> list[str]:
    """Return the requested dense feature variants that the model supports, and print the other requested variants.

    Raises:
        ValueError: If `required` is True and the model supports none of the variants.
    """
    available = model.dense.variants if model.dense is not None else ()
    supported = [variant for variant in variants if variant in available]
    skipped = ", ".join(variant for variant in variants if variant not in available)
    reason = f"the model supports only {', '.join(available)}" if available else "the model has no dense features"
    if required and not supported:
        raise ValueError(f"{model.name}: the dense variants {skipped} cannot be used: {reason}")
    if skipped:
        print_once(f"{model.name}: the dense variants {skipped} are skipped: {reason}")
    return supported


def get_logit_scales(model: DualEncoder, protocol_scale: float) -> dict[str, float]:
    """Return the logit scales to evaluate: the protocol's scale and, if there is one, the model's learned scale.

    Published protocols use CLIP's scales, which may not suit models that learned a different scale.

    Returns:
        Scales, keyed by method name suffix: "" for the protocol's scale, `LEARNED_SCALE` for the learned scale.
    """
    learned = model.logit_scale()
    return {"": protocol_scale} if learned is None else {"": protocol_scale, LEARNED_SCALE: learned}


def decode_batches(
    refs: Sequence[ImageRef], transform: Callable[[Tensor], T], description: str, failures: dict[int, str]
) -> Iterator[dict[int, T]]:
    """Decode and transform this rank's share of the images in batches. With N ranks, each takes every N-th image.

    Args:
        transform: Picklable function that is applied to each image, a uint8 tensor of shape (3, H, W).
        description: Label of the progress bar.
        failures: Errors of undecodable images, keyed by the image's index in `refs`. Updated in place.

    Yields:
        For each batch, the transformed images, keyed by their index in `refs`.
    """
    state = process_state()
    indices = range(state.process_index, len(refs), state.num_processes)
    with ProgressBar(total=len(indices), desc=description, unit="image", disable=not state.is_main_process) as bar:
        for decoded, items, errors in iter_image_batches([refs[i] for i in indices], transform, IMAGES_PER_BATCH):
            failures |= {indices[i]: reason for i, reason in errors.items()}
            yield {indices[i]: item for i, item in zip(decoded, items, strict=True)}
            bar.update(len(decoded) + len(errors))


def decode_images(
    refs: Sequence[ImageRef], sizes: Sequence[tuple[int, int]], description: str, failures: dict[int, str]
) -> Iterator[dict[int, Tensor]]:
    """Decode this rank's images in batches, as uint8 tensors of shape (3, H, W). See `decode_batches`.

    Args:
        sizes: Expected size of each image as (width, height) in pixels. An image of another size is recorded in
            `failures` and not returned, because its boxes would be wrong.
    """
    for images in decode_batches(refs, _identity, description, failures):
        for index in list(images):
            width, height = sizes[index]
            actual_height, actual_width = images[index].shape[1:]
            if (actual_width, actual_height) != (width, height):
                failures[index] = (
                    f"the image is {actual_width} x {actual_height} pixels, but its boxes are for an image of "
                    f"{width} x {height} pixels"
                )
                del images[index]
        yield images


def _identity(image: Tensor) -> Tensor:
    return image


def gather_results(
    results: dict[int, T], failures: dict[int, str], refs: Sequence[ImageRef], log: SkipLog
) -> dict[int, T]:
    """Return the results of all ranks, sorted by image index, and log the unusable images.

    Args:
        results: This rank's results (any picklable objects), keyed by the image's index in `refs`.
        failures: This rank's errors, keyed by the image's index. Updated in place with the errors of all ranks.

    Raises:
        TooManySkipped: If too many images are unusable.
        ValueError: If there are no images, or no image is usable.
    """
    if process_state().num_processes > 1:
        # Some ranks may finish much later than others, and the collective operation would time out before they do.
        wait_for_everyone()
        for rank_results, rank_failures in gather_object([(results, failures)]):
            results |= rank_results
            failures |= rank_failures
    log.count_at_least(len(refs))
    for index, reason in sorted(failures.items()):
        log.skip(str(refs[index]), 0, "unusable image", reason)
    log.check()
    if not refs:
        raise ValueError("the benchmark contains no images")
    if len(failures) == len(refs):
        raise ValueError(f"none of the {len(refs):,} images can be used; first failure: {refs[0]} ({failures[0]})")
    return dict(sorted(results.items()))
