"""Images decoded for inference, in order and in batches, by other processes where there are many."""

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
MIN_IMAGES_FOR_WORKERS = 2048  # images that take longer to decode than a process to start


def decode_or_error(ref: ImageRef, transform: Callable[[Tensor], T]) -> T | str:
    """The transformed image, or why it cannot be decoded."""
    try:
        return transform(load_image(ref))
    except (ImageError, OSError) as error:
        return str(error).removeprefix(f"{ref}: ")  # whoever lists it names the image


def image_batches(
    refs: Sequence[ImageRef], transform: Callable[[Tensor], Any], batch_size: int = 64, workers: int | None = None
) -> Iterator[tuple[list[int], list[Any], dict[int, str]]]:
    """Decoded images in their order, `batch` of them at a time.

    Args:
        refs: of the images.
        transform: of the decoded image, uint8 (3, H, W).
        batch_size: images at a time.
        workers: processes that decode, where there are enough images; None is half of the cores, at most 8.

    Yields:
        The indices of those that can be decoded, what `transform` made of them, and why each other cannot, by its
        index.
    """
    if workers is None:
        workers = min(8, len(os.sched_getaffinity(0)) // 2 if hasattr(os, "sched_getaffinity") else 1)
    workers = workers if len(refs) >= MIN_IMAGES_FOR_WORKERS else 0
    loader = DataLoader(
        _Decoded(refs, transform),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=list,
        multiprocessing_context="spawn" if workers else None,
        generator=torch.Generator(),  # and not the process's random state
    )
    for items in loader:
        good = {i: found for i, found in items if not isinstance(found, str)}
        yield list(good), list(good.values()), {i: found for i, found in items if isinstance(found, str)}


class _Decoded(Dataset):
    def __init__(self, refs: Sequence[ImageRef], transform: Callable[[Tensor], Any]) -> None:
        self.refs, self.transform = refs, transform

    def __len__(self) -> int:
        return len(self.refs)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, decode_or_error(self.refs[index], self.transform)
