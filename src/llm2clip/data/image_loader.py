"""Image decoding for inference, in batches and in order. Worker processes are used if there are many images."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from llm2clip.data.image_refs import ImageRef
from llm2clip.data.images import ImageError, load_image

T = TypeVar("T")
MIN_IMAGES_FOR_WORKERS = 2048  # decoding fewer images takes less time than starting the workers


def decode_or_error(ref: ImageRef, transform: Callable[[Tensor], T]) -> T | str:
    """Decode and transform an image. Return an error message if the image cannot be decoded."""
    try:
        return transform(load_image(ref))
    except (ImageError, OSError) as error:
        return str(error).removeprefix(f"{ref}: ")  # the caller adds the image's name


def image_batches(
    refs: Sequence[ImageRef], transform: Callable[[Tensor], Any], batch_size: int = 64, workers: int | None = None
) -> Iterator[tuple[list[int], list[Any], dict[int, str]]]:
    """Yield decoded and transformed images in order, `batch_size` at a time.

    Args:
        refs: References to the images.
        transform: Function applied to each decoded image, uint8 (3, H, W).
        batch_size: Number of images per batch, including images that cannot be decoded.
        workers: Number of worker processes. Workers are used only for 2,048 or more images. Default: half the number
            of CPU cores, but at most 8.

    Yields:
        Three values for each batch: the indices of the images that were decoded, these images after the transform, and
        a dict {index: error message} for the images that could not be decoded.
    """
    if workers is None:
        workers = min(8, len(os.sched_getaffinity(0)) // 2 if hasattr(os, "sched_getaffinity") else 1)
    workers = workers if len(refs) >= MIN_IMAGES_FOR_WORKERS else 0
    loader = DataLoader(
        _DecodedImages(refs, transform),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=list,
        multiprocessing_context="spawn" if workers else None,
        generator=torch.Generator(),  # leaves the global random state unchanged
    )
    for items in loader:
        decoded = {index: value for index, value in items if not isinstance(value, str)}
        failures = {index: value for index, value in items if isinstance(value, str)}
        yield list(decoded), list(decoded.values()), failures


class _DecodedImages(Dataset):
    def __init__(self, refs: Sequence[ImageRef], transform: Callable[[Tensor], Any]) -> None:
        self.refs, self.transform = refs, transform

    def __len__(self) -> int:
        return len(self.refs)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, decode_or_error(self.refs[index], self.transform)
