"""Batched image decoding for inference, in input order. Worker processes are used if there are many images."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import sys
from collections.abc import Callable, Generator, Sequence
from io import BytesIO
from multiprocessing import AuthenticationError
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from llm2clip.data.image_refs import ImageRef
from llm2clip.data.images import ImageError, load_image
from llm2clip.data.remote import is_remote, prefetch
from llm2clip.io_utils import FatalDataError, describe_error

T = TypeVar("T")
MIN_IMAGES_FOR_WORKERS = 2048  # decoding fewer images takes less time than starting the workers
PREFETCH_IMAGES = 4096  # remote files are downloaded ahead each time that this many images have been decoded
# Modules that the first worker imports for all workers.
PRELOADED_MODULES = ["llm2clip.train.sampling"]
_ALIGNMENT = 64  # alignment in bytes of the tensors in a packed batch; valid for any dtype


def decode_or_error(ref: ImageRef, transform: Callable[[Tensor], T]) -> T | str:
    """Decode and transform an image. On failure, including lack of memory, return an error message."""
    try:
        return transform(load_image(ref))
    except (ImageError, OSError) as error:
        return str(error).removeprefix(f"{ref}: ")  # the caller adds the image's name
    except FatalDataError:
        raise
    except Exception as error:  # a single bad image must not stop a run
        return describe_error(error)


def iter_image_batches(
    refs: Sequence[ImageRef], transform: Callable[[Tensor], Any], batch_size: int = 64, workers: int | None = None
) -> Generator[tuple[list[int], list[Any], dict[int, str]]]:
    """Yield decoded and transformed images in order, `batch_size` at a time.

    Args:
        transform: Function applied to each decoded image, a uint8 tensor of shape (3, H, W).
        batch_size: Number of images per batch, including images that cannot be decoded.
        workers: Number of worker processes, which are used only for 2,048 or more images. Default: half the CPU cores,
            but at most 8.

    Yields:
        For each batch, the indices of the decoded images, the transformed images, and a dict {index: error message} for
        the images that could not be decoded.
    """
    if workers is None:
        workers = min(8, len(os.sched_getaffinity(0)) // 2 if hasattr(os, "sched_getaffinity") else 1)
    workers = workers if len(refs) >= MIN_IMAGES_FOR_WORKERS else 0
    loader = DataLoader(
        _DecodedImages(refs, transform),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=pack_batch if workers else list,
        worker_init_fn=skip_finalization,
        multiprocessing_context=choose_start_method(workers),
        generator=torch.Generator(),  # leaves the global random state unchanged
    )
    next_prefetch = num_images = 0
    for batch in loader:
        items = unpack_batch(batch) if workers else batch
        num_images += len(items)
        if num_images >= next_prefetch:
            _prefetch_files(refs, num_images)
            next_prefetch = num_images + PREFETCH_IMAGES
        decoded = {index: value for index, value in items if not isinstance(value, str)}
        failures = {index: value for index, value in items if isinstance(value, str)}
        yield list(decoded), list(decoded.values()), failures


def _prefetch_files(refs: Sequence[ImageRef], start: int) -> None:
    """If the images are remote, download the files that contain those after `start` in the background."""
    if start < len(refs) and is_remote(refs[start].container_path or ""):
        prefetch([ref.container_path or "" for ref in refs[start : start + 4 * PREFETCH_IMAGES]])


class _DecodedImages(Dataset):
    def __init__(self, refs: Sequence[ImageRef], transform: Callable[[Tensor], Any]) -> None:
        self.refs, self.transform = refs, transform

    def __len__(self) -> int:
        return len(self.refs)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, decode_or_error(self.refs[index], self.transform)


def choose_start_method(workers: int) -> str | None:
    """Return the start method of data loader workers, or None if there are none.

    Forking a process that uses a GPU or threads is unsafe. With "forkserver", workers are forked from a process that
    only imports modules, so that the imports take place once instead of once per worker.
    """
    if not workers or "forkserver" not in multiprocessing.get_all_start_methods():
        return "spawn" if workers else None
    multiprocessing.set_forkserver_preload(PRELOADED_MODULES)
    return "forkserver"


def skip_finalization(worker: int) -> None:
    """Make a data loader worker exit without finalizing the interpreter. Used as a `worker_init_fn`.

    If a loader is closed early, a worker thread may still be sending a batch. Finalization would stop this thread
    inside C++ code, which aborts the process ("terminate called without an active exception").
    """
    atexit.register(os._exit, 0)
    sys.excepthook = _report_exception


def _report_exception(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Print an exception, unless it only says that the main process was interrupted while it received a batch."""
    if not issubclass(kind, EOFError | ConnectionError | AuthenticationError):
        sys.__excepthook__(kind, error, traceback)


# ---- sending batches from worker processes ---------------------------------------------------------------------------


def pack_batch(items: list[Any]) -> tuple[bytes, list[tuple[int, int]], Tensor]:
    """Pack a batch so that sending it from a worker process uses only one file descriptor. See `unpack_batch`.

    A data loader sends each tensor as a shared memory file, which the main process keeps open. Batches of 512 images
    sent as separate tensors would therefore exceed the usual limit of 1,024 open files.

    Args:
        items: Picklable values, which may contain tensors of any shape and dtype.

    Returns:
        The pickled items without their tensors, the (start, end) byte range of each tensor, and the bytes of all
        tensors as a uint8 tensor.
    """
    tensors: list[pickle.PickleBuffer] = []
    stream = BytesIO()
    _TensorPickler(stream, pickle.HIGHEST_PROTOCOL, buffer_callback=tensors.append).dump(items)
    ranges, end = [], 0
    for tensor in tensors:
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        end = start + len(tensor.raw())
        ranges.append((start, end))
    buffer = torch.empty(end, dtype=torch.uint8)
    target = buffer.numpy()
    for (start, stop), tensor in zip(ranges, tensors, strict=True):
        target[start:stop] = tensor.raw()
    return stream.getvalue(), ranges, buffer


def unpack_batch(batch: tuple[bytes, list[tuple[int, int]], Tensor]) -> list[Any]:
    """Restore the items packed by `pack_batch`. Their tensors share memory with the packed batch."""
    pickled, ranges, buffer = batch
    data = buffer.numpy()
    items: list[Any] = pickle.loads(pickled, buffers=[data[start:stop] for start, stop in ranges])
    return items


class _TensorPickler(pickle.Pickler):
    """Pickler that passes tensor data to `buffer_callback`."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        data = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        return _restore_tensor, (data, value.dtype, value.shape)


def _restore_tensor(data: np.ndarray, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    return torch.from_numpy(data).view(dtype).view(shape)
