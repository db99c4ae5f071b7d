"""Sampling of training batches for the `align` stage.

The images, captions and crops of each step depend only on the seed and the step number. A resumed run therefore trains
on the same data as an uninterrupted run, regardless of the number of workers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from llm2clip.config import AlignConfig
from llm2clip.data.counter_random import convert_bits_to_unit_interval, hash_counters, shuffle_row_prefixes
from llm2clip.data.image_order import EpochImageOrders, ImageOrder
from llm2clip.data.images import build_worker_options, decode_or_return_error
from llm2clip.data.records import CAPTION_FIELDS, TEXT_FIELDS
from llm2clip.data.table import IMAGE_COLUMNS, ImageRefList, RecordTable
from llm2clip.data.transforms import PreprocessConfig, TrainTransform
from llm2clip.parallel import count_cores
from llm2clip.store.layout import make_image_keys
from llm2clip.store.store import CaptionRows, CaptionSource, EmbeddingStore, find_caption_rows

HASH_DIGITS = 16
Sample = tuple[int, int]  # (epoch, index of the image's record)
# Hash counters that keep the random numbers for crops, caption kinds and captions independent.
_CROP, _KINDS, _CAPTIONS = 0, 1, 2


@dataclass(frozen=True)
class Batch:
    """One rank's part of a training batch: N images and M captions of these images."""

    images: Tensor
    """Pixels of shape (N, 3, S, S), uint8. If the tower is frozen: features of shape (N, feature_dim), float32 or
    float16."""
    embeddings: Tensor
    """Text embeddings of the captions, of shape (M, text_dim), float32 or float16."""
    caption_rows: Tensor
    """Row number of each caption in the store, of shape (M,), int64. Identical captions have the same row number."""
    image_of_caption: Tensor
    """Index of each caption's image in this batch, of shape (M,), int64, in ascending order."""
    phrases: Tensor | None
    """All phrases of the images, sampled or not, as (image index, store row number) pairs of shape (K, 2), int64,
    sorted by image. None if captions are not mixed with phrases."""
    first_caption: list[int]
    """N + 1 integers. Image n has the captions with indices first_caption[n] to first_caption[n + 1] - 1."""
    all_distinct: bool
    """True if all captions in the step are known to be distinct and `phrases` is None. The loss can then skip comparing
    row numbers, which avoids a GPU synchronisation."""
    image_refs: ImageRefList
    """Reference to each image, for error messages. Image names are read from the record table on demand."""
    failures: dict[str, str]
    """Error message for each image that could not be decoded, keyed by image name. These images are replaced with
    duplicates of other images in the batch."""

    def to(self, device: torch.device) -> Batch:
        """Copy the tensors to a device, and convert float16 tensors to float32 on that device."""
        is_cuda = device.type == "cuda"

        def move_tensor(tensor: Tensor) -> Tensor:
            moved = tensor.to(device, non_blocking=is_cuda)
            return moved.float() if tensor.dtype == torch.float16 else moved

        return self.map_tensors(move_tensor)

    def pin_memory(self) -> Batch:
        """Copy the tensors to pinned memory, from which copies to a GPU are asynchronous."""
        return self.map_tensors(Tensor.pin_memory)

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> Batch:
        tensors: dict[str, Any] = {k: function(v) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)


class AlignBatches:
    """Batches of a training run. Iteration can start at any step.

    Images are reshuffled every epoch, and leftover images that do not fill a step are dropped.
    """

    def __init__(
        self,
        records: RecordTable,
        store: CaptionSource,
        preprocess: PreprocessConfig,
        config: AlignConfig,
        ranks: tuple[int, int] = (0, 1),
        features: EmbeddingStore | None = None,
        images_per_step: int | None = None,
        image_order: ImageOrder | None = None,
    ) -> None:
        """
        Args:
            records: Training data. Records without an image or without captions are ignored.
            ranks: Rank of this process and world size.
            features: Store of a frozen tower's image features. If set, batches contain features instead of pixels, and
                images without features are ignored.
            images_per_step: Number of images per step over all ranks. Default: see `resolve_images_per_step`.
            image_order: Order of the images within an epoch. Default: see `choose_image_order`.

        Raises:
            ValueError: There are too few images, or the caption mix is invalid.
            StoreError: A caption is not in the store.
        """
        if not records.has_image.all():
            records = records.select(records.has_image)
        # Phrases with weight 0 are ignored, even for images that have no other kinds of captions.
        fields = TEXT_FIELDS if config.samples_phrases else CAPTION_FIELDS
        hashed_fields = TEXT_FIELDS if config.uses_phrases else CAPTION_FIELDS
        self.caption_hash = records.compute_identity(*hashed_fields)[:HASH_DIGITS]
        captions = find_caption_rows(records, store, fields, self.caption_hash)
        is_usable = np.zeros(len(records), bool)
        for field in captions.keys() & set(CAPTION_FIELDS):
            is_usable |= captions[field].starts[1:] > captions[field].starts[:-1]
        self.features, self.feature_rows = features, np.empty(0, np.int64)
        if features is not None:
            images: Any = records.get_images()
            self.feature_rows = features.find_keys(make_image_keys(images))
            is_usable &= self.feature_rows >= 0
        usable = records if is_usable.all() else records.select(is_usable)
        self.image_hash = usable.compute_identity(*IMAGE_COLUMNS)[:HASH_DIGITS]
        self.image_count = len(usable)
        self.rank, self.world_size = ranks
        self.images_per_step = images_per_step or resolve_images_per_step(self.image_count, config, self.world_size)
        self.steps_per_epoch = self.image_count // self.images_per_step
        self.config, self.store = config, store
        self.orders = EpochImageOrders(records, is_usable, config.seed, image_order, read_images=features is None)
        self.phrases = captions.get("phrases")
        weights = [config.caption_mix.get(kind, 0.0) for kind in captions]
        self.captions = CaptionSampler(list(captions.values()), weights, config)
        self.images = _RandomCropDataset(records.get_images(), TrainTransform(preprocess), config.seed)

    def __len__(self) -> int:
        """Return the number of steps in the run."""
        return max(1, round(self.steps_per_epoch * self.config.epochs))

    def iterate_batches(self, first_step: int) -> Generator[Batch]:
        """Yield this rank's batch for each step, starting at `first_step`.

        Raises:
            ValueError: None of the images in a batch can be decoded.
        """
        if first_step >= len(self):  # the run is complete, so no workers are needed
            return
        if self.features is not None:
            for samples in self.iterate_samples(first_step):
                features = _take_text_rows(self.features, self.feature_rows[[image for _, image in samples]])
                yield self._make_batch(features, samples, failures={})
            return
        workers = resolve_decoding_workers(self.config)
        loader = DataLoader(
            self.images,
            batch_sampler=cast(Any, self.iterate_samples(first_step)),
            num_workers=workers,
            collate_fn=_collate_decoded_images,
            persistent_workers=False,
            **build_worker_options(workers, __name__),
            generator=torch.Generator(),  # without a generator, the DataLoader would change the global random state
        )
        for pixels, samples, failures in loader:
            if pixels is None:
                name, reason = next(iter(failures.items()))
                raise ValueError(f"none of the images in a batch can be decoded. First error: {name}: {reason}")
            yield self._make_batch(pixels, samples, failures)

    def iterate_samples(self, first_step: int) -> Iterator[list[Sample]]:
        for step in range(first_step, len(self)):
            epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
            start = step_in_epoch * self.images_per_step
            images = self.orders.take(epoch, start, start + self.images_per_step)
            yield [(epoch, image) for image in images[self.rank :: self.world_size].tolist()]

    def _make_batch(self, images: Tensor, samples: list[Sample], failures: dict[str, str]) -> Batch:
        epochs, image_numbers = np.array(samples, np.int64).T
        caption_rows, image_of_caption = self.captions.sample_captions(epochs, image_numbers)
        # With several ranks, another rank may have an identical caption.
        all_distinct = self.world_size == 1 and len(np.unique(caption_rows)) == len(caption_rows)
        return Batch(
            images=images,
            embeddings=_take_text_rows(self.store, caption_rows),
            caption_rows=torch.from_numpy(caption_rows),
            image_of_caption=torch.from_numpy(image_of_caption),
            phrases=None if self.phrases is None else torch.from_numpy(_list_caption_rows(self.phrases, image_numbers)),
            first_caption=np.searchsorted(image_of_caption, np.arange(len(images) + 1)).tolist(),
            all_distinct=all_distinct and self.phrases is None,
            image_refs=ImageRefList(self.images.refs.record_batches, self.images.refs.rows[image_numbers]),
            failures=failures,
        )


def _take_text_rows(source: CaptionSource, rows: np.ndarray) -> Tensor:
    """Return the text inputs or embeddings in the given rows. If there is a GPU, read embeddings into pinned memory.

    float16 embeddings are not converted to float32, because copying float16 to a GPU takes half the time.
    """
    if not isinstance(source, EmbeddingStore):
        return torch.from_numpy(source.take(rows))
    dtype = torch.float16 if source.manifest["dtype"] == "float16" else torch.float32
    embeddings = allocate_pinned_tensor((len(rows), source.embed_dim), dtype)
    source.take(rows, out=embeddings.numpy())
    return embeddings


def allocate_pinned_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    # PyTorch reuses the pinned memory of a freed tensor only after all copies of the tensor to a GPU are complete.
    return torch.empty(shape, dtype=dtype, pin_memory=torch.cuda.is_available())


def _list_caption_rows(captions: CaptionRows, images: np.ndarray) -> np.ndarray:
    """Return a (position in `images`, store row number) pair for each caption of the images, int64 of shape (K, 2)."""
    starts, counts = captions.starts[images], captions.starts[images + 1] - captions.starts[images]
    position = np.repeat(np.arange(len(images)), counts)
    first_caption = np.cumsum(counts) - counts
    offset = np.arange(len(position)) - first_caption[position]
    return np.stack([position, captions.rows[starts[position] + offset]], axis=1).astype(np.int64)


def resolve_images_per_step(num_images: int, config: AlignConfig, world_size: int) -> int:
    """Return the number of images per step over all ranks: `batch_size` per rank, or fewer if there are too few images.

    Raises:
        ValueError: There are too few images, or the caption mix is invalid.
    """
    if unknown := config.caption_mix.keys() - set(TEXT_FIELDS):
        raise ValueError(
            f"--align.caption_mix has unknown kinds of captions: {', '.join(sorted(unknown))}. "
            f"Valid kinds: {', '.join(TEXT_FIELDS)}"
        )
    images_per_step = min(config.batch_size, num_images // world_size) * world_size
    if config.batch_size * world_size < 2:
        raise ValueError("--align.batch_size must be at least 2 (got 1), because each step compares different images")
    if images_per_step < 2:
        processes = "" if world_size == 1 else f" with {world_size} processes"
        raise ValueError(
            f"too few images to train on: a step{processes} needs at least {max(2, world_size)} images that are not "
            f"held out, but the data has {num_images:,}. Add images"
        )
    return images_per_step


def resolve_decoding_workers(config: AlignConfig) -> int:
    """Return the number of image decoding processes for this rank. Default: one per two CPU cores, at most 16."""
    if config.workers is not None:
        return config.workers
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(16, count_cores() // (2 * local_ranks)))


class _RandomCropDataset(Dataset):
    """Dataset of random crops, each of which depends only on the seed, the epoch and the image."""

    def __init__(self, refs: ImageRefList, transform: TrainTransform, seed: int) -> None:
        self.refs, self.transform, self.seed = refs, transform, seed

    def __getitems__(self, samples: list[Sample]) -> list[tuple[str, Tensor | str, Sample]]:
        """Return (image name, pixels or decoding error message, sample) for each sample of a batch."""
        epochs, images = np.array(samples, np.int64).T
        refs, generator = self.refs.take(images), torch.Generator()
        items = []
        seeds = hash_counters(self.seed, epochs, images, _CROP).tolist()
        for sample, ref, seed in zip(samples, refs, seeds, strict=True):
            transform = partial(self.transform, generator=generator.manual_seed(seed))
            items.append((str(ref), decode_or_return_error(ref, transform), sample))
        return items


def _collate_decoded_images(
    items: list[tuple[str, Tensor | str, Sample]],
) -> tuple[Tensor | None, list[Sample], dict[str, str]]:
    """Collate decoded images. Return the pixels, the samples, and the error messages keyed by image name.

    The pixels are stacked in the worker process, because the main process needs one file descriptor for each tensor
    that it receives. If none of the images can be decoded, the pixels are None.
    """
    failures = {name: result for name, result, _ in items if isinstance(result, str)}
    decoded = [(result, sample) for _, result, sample in items if not isinstance(result, str)]
    if not decoded:
        return None, [], failures
    # Undecodable images are replaced with duplicates, which are harmless: identical captions are never negatives.
    decoded += [decoded[n % len(decoded)] for n in range(len(items) - len(decoded))]
    return torch.stack([pixels for pixels, _ in decoded]), [sample for _, sample in decoded], failures


# ---- captions --------------------------------------------------------------------------------------------------------


class CaptionSampler:
    """Vectorised sampler of captions for all images of a batch.

    The kind of each caption, such as short or long, is sampled according to the caption mix. Within a kind, captions
    are sampled without replacement, so an image may receive fewer captions than requested. If an image has only kinds
    with weight 0, these kinds are sampled with equal weights.

    The random numbers are hashes of the seed, the epoch and the image (see `counter_random`).
    """

    def __init__(self, captions_by_kind: Sequence[CaptionRows], weights: Sequence[float], config: AlignConfig) -> None:
        self.captions_by_kind, self.weights = list(captions_by_kind), np.array(weights, np.float64)
        self.seed, self.captions_per_image = config.seed, config.captions_per_image

    def sample_captions(self, epochs: np.ndarray, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sample captions for N images. `epochs` and `images` (image indices) have shape (N,), int64.

        Returns:
            Row number of each caption in the store, and position of each caption's image in `images`, both of shape
            (M,), int64. Positions are in ascending order.
        """
        starts = np.stack([captions.starts[images] for captions in self.captions_by_kind])
        counts = np.stack([captions.starts[images + 1] for captions in self.captions_by_kind]) - starts
        used = (counts > 0) & (self.weights[:, None] > 0)  # (kinds, N)
        used |= (counts > 0) & ~used.any(axis=0)
        counts = np.where(used, counts, 0)

        shuffled = []
        for kind, captions in enumerate(self.captions_by_kind):
            captions_of_image = np.arange(counts[kind].max(initial=0))
            positions = starts[kind, :, None] + captions_of_image
            rows = captions.rows[np.minimum(positions, len(captions.rows) - 1)].astype(np.int64)  # (N, max captions)
            bits = hash_counters(self.seed, epochs[:, None], images[:, None], _CAPTIONS, kind, captions_of_image)
            shuffled.append(shuffle_row_prefixes(rows, counts[kind], bits))
        if self.captions_per_image == 0:
            valid = [np.arange(rows.shape[1]) < counts[kind, :, None] for kind, rows in enumerate(shuffled)]
            image_of_caption, column = np.nonzero(np.concatenate(valid, axis=1))
            return np.concatenate(shuffled, axis=1)[image_of_caption, column], image_of_caption
        draws = np.arange(self.captions_per_image)[:, None]
        numbers = convert_bits_to_unit_interval(hash_counters(self.seed, epochs, images, _KINDS, draws))
        kinds = self._sample_caption_kinds(used, numbers)
        return _take_captions(shuffled, counts, kinds)

    def _sample_caption_kinds(self, used: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Sample the kinds of captions in proportion to their weights. Return kinds of shape (captions_per_image, N).

        `used` is a boolean mask of the kinds that can be sampled for each image, of shape (kinds, N). `numbers`
        contains random numbers in [0, 1) of shape (captions_per_image, N).
        """
        weights = np.where(used, self.weights[:, None], 0.0)
        weights = np.where(weights.any(axis=0), weights, used)
        cumulative = np.cumsum(weights / weights.sum(axis=0), axis=0)  # (kinds, N)
        cumulative /= cumulative[-1]
        kinds: np.ndarray = (cumulative[:, None] <= numbers).sum(axis=0)
        return kinds


def _take_captions(shuffled: list[np.ndarray], counts: np.ndarray, kinds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Take the next caption of each sampled kind, unless no captions of that kind are left for the image.

    Args:
        shuffled: Permuted row numbers of each kind of captions, of shape (N, captions), int64.
        counts: Number of valid row numbers in `shuffled` per kind and image, of shape (kinds, N), int64.
        kinds: Sampled kinds, of shape (captions per image, N), int64.

    Returns:
        The row numbers and image positions of the captions, both of shape (M,), int64, sorted by position.
    """
    images = np.arange(kinds.shape[1])
    taken = np.zeros_like(counts)
    rows, valid = np.zeros_like(kinds), np.zeros(kinds.shape, bool)
    for n, kind_of_image in enumerate(kinds):
        next_row = taken[kind_of_image, images]
        valid[n] = next_row < counts[kind_of_image, images]
        for kind, rows_of_kind in enumerate(shuffled):
            chosen = np.flatnonzero(valid[n] & (kind_of_image == kind))
            rows[n, chosen] = rows_of_kind[chosen, next_row[chosen]]
        taken[kind_of_image, images] += 1
    image_of_caption, caption = np.nonzero(valid.T)
    return rows[caption, image_of_caption], image_of_caption
