"""Image decoding to uint8 RGB tensors of shape (3, H, W), thumbnails, and batches of decoded images for inference."""

import atexit
import multiprocessing
import os
import pickle
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from multiprocessing import AuthenticationError
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import numpy as np
import torch
from PIL import Image, ImageFile
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, encode_jpeg
from torchvision.io import decode_image as torchvision_decode_image
from torchvision.transforms.v2 import functional as F

from llm2clip.data.image_header import (
    MAX_PIXELS,
    DecodingLimitError,
    ImageFormatError,
    check_decoding_cost,
    open_image_header,
)
from llm2clip.data.image_refs import FileImage, ImageRef
from llm2clip.data.remote import prefetch_remote_files
from llm2clip.data.storage import join_path
from llm2clip.io_utils import FatalDataError, describe_error
from llm2clip.parallel import count_cores

T = TypeVar("T")
MIN_IMAGES_FOR_WORKERS = 2048  # decoding fewer images is faster than starting worker processes
PREFETCH_IMAGES = 4096  # number of images after which the next remote files are downloaded in advance
_ORIENTATION = 0x0112  # EXIF tag
_FAST_FORMATS = ("JPEG", "MPO", "WEBP")  # decoded with torchvision, which crashes on corrupt PNG images


class ImageError(ValueError):
    """Raised when an image cannot be read. The message contains the reason and, if known, the file name."""


@runtime_checkable
class ReadableStream(Protocol):
    """Binary file or other object whose `read` method returns bytes."""

    def read(self) -> bytes: ...


ImageLike = str | Path | bytes | Image.Image | Tensor | np.ndarray | ReadableStream


def load_image(image: ImageLike) -> Tensor:
    """Load an image as a uint8 RGB tensor of shape (3, H, W), with its EXIF orientation applied.

    Arrays must be uint8, of shape (H, W, 3) or (H, W). Tensors must have shape (3, H, W), and be uint8 or float with
    values from 0 to 1.

    Raises:
        ImageError: The image cannot be read, or its type is not supported.
    """
    if isinstance(image, Tensor):
        return _convert_image_tensor(image)
    if isinstance(image, np.ndarray):
        return _convert_image_array(image)
    if isinstance(image, bytes):
        return decode_image(image)
    name = _get_file_name(image)
    try:
        if isinstance(image, Image.Image):
            with _convert_decoder_errors():
                return _decode_with_pillow(image)
        if isinstance(image, str | Path):
            image = FileImage(join_path("", str(image)))  # a URL is treated as a file name
        return decode_image(image.read())
    except (ImageError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ImageError(f"{name}: {reason}" if name else str(reason)) from error


def to_image_list(images: Any) -> list[Any]:
    """Convert a list, a tuple, a batch of shape (N, ...) or a single image to a list of images."""
    is_batch = isinstance(images, Tensor | np.ndarray) and images.ndim == 4
    return list(images) if is_batch or isinstance(images, list | tuple) else [images]


def decode_image(data: bytes) -> Tensor:
    """Decode an image to a uint8 RGB tensor of shape (3, H, W).

    The EXIF orientation is applied, and transparent images are composited over white. Only the first frame of an
    animation is used. JPEG and WebP images are decoded with torchvision, which is twice as fast as Pillow. Colour
    profiles are ignored, as in the pretraining of the vision towers.

    Raises:
        ImageError: The image is unsupported, corrupt, too large or too expensive to decode.
    """
    with _convert_decoder_errors():
        header = open_image_header(BytesIO(data))
        _check_pixel_count(header)
        check_decoding_cost(data, header)
        pixels = _decode_with_torchvision(data, header)
        return _decode_with_pillow(header) if pixels is None else pixels


@contextmanager
def _convert_decoder_errors() -> Iterator[None]:
    """Convert exceptions to `ImageError`. Decoders can raise any type of exception for a corrupt file."""
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # if True, missing pixels of truncated images would be grey
    try:
        yield
    except ImageError:
        raise
    except ImageFormatError as error:
        raise ImageError(str(error)) from error
    except (DecodingLimitError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"unreadable image: {error}") from error
    except Exception as error:
        raise ImageError(f"unreadable image: {describe_error(error)}") from error


def load_thumbnail(image: ImageLike, side: int) -> bytes | None:
    """Load an image and return its thumbnail (see `encode_thumbnail`), or None if the image cannot be read."""
    try:
        return encode_thumbnail(load_image(image), side)
    except (ImageError, OSError):
        return None


def encode_thumbnail(image: Tensor, side: int) -> bytes:
    """Encode a uint8 image of shape (3, H, W) as a JPEG whose longer side has at most `side` pixels."""
    return cast(bytes, encode_jpeg(shrink_image(image, side).contiguous(), quality=80).numpy().tobytes())


def shrink_image(image: Tensor, side: int) -> Tensor:
    """Shrink an image of shape (3, H, W) so that its longer side has at most `side` pixels."""
    height, width = image.shape[-2:]
    scale = side / max(height, width)
    if scale >= 1:
        return image
    return F.resize(image, [max(1, round(height * scale)), max(1, round(width * scale))], antialias=True)


def _get_file_name(image: object) -> object:
    """Return the file name of an image, or "" if unknown. Raise `ImageError` if the image's type is unsupported."""
    if isinstance(image, ImageRef | str | Path):
        return image
    if isinstance(image, Image.Image):
        return getattr(image, "filename", "")
    if isinstance(image, ReadableStream):
        return getattr(image, "name", "")
    raise ImageError(
        f"an image must be a path, bytes, an open file, a PIL image, an array or a tensor (got {type(image).__name__})"
    )


def _convert_image_tensor(image: Tensor) -> Tensor:
    is_float = image.is_floating_point()
    if not (image.dtype == torch.uint8 or is_float) or image.ndim != 3 or image.shape[0] != 3 or not image.numel():
        raise ImageError(
            "an image tensor must have shape (3, H, W) and dtype uint8 or float "
            f"(got {image.dtype} {tuple(image.shape)})"
        )
    if not is_float:
        return image
    if not bool(((image >= 0) & (image <= 1)).all()):  # also False for NaN
        raise ImageError(
            "the values of a float image tensor must be between 0 and 1, before any normalisation "
            f"(got {image.min():.3g} to {image.max():.3g})"
        )
    return (image.float() * 255).round().to(torch.uint8)


def _convert_image_array(image: np.ndarray) -> Tensor:
    is_grey = image.ndim == 2
    if image.dtype != np.uint8 or not (is_grey or (image.ndim == 3 and image.shape[2] == 3)) or not image.size:
        raise ImageError(
            f"an image array must have shape (H, W, 3) or (H, W) and dtype uint8 (got {image.dtype} {image.shape})"
        )
    pixels = torch.from_numpy(np.array(image, order="C"))  # copied, because the array may be read-only
    return pixels.expand(3, -1, -1).contiguous() if is_grey else pixels.permute(2, 0, 1).contiguous()


def _check_pixel_count(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"image too large: {width} x {height} pixels; the limit is {MAX_PIXELS:,} pixels")


def _decode_with_torchvision(data: bytes, header: Image.Image) -> Tensor | None:
    """Decode an image with torchvision. Return None if the image requires Pillow or cannot be decoded."""
    if header.format not in _FAST_FORMATS or "transparency" in header.info:
        return None
    has_alpha = header.mode in ("RGBA", "LA")
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    mode = ImageReadMode.RGB_ALPHA if has_alpha else ImageReadMode.RGB
    try:
        # torchvision applies the EXIF orientation to JPEG images but not to WebP images.
        pixels = torchvision_decode_image(encoded, mode, apply_exif_orientation=True)
    except RuntimeError:
        return None
    if header.format == "WEBP":
        pixels = _apply_orientation(pixels, _read_orientation(header))
    return _composite_over_white(pixels) if has_alpha else pixels


def _decode_with_pillow(image: Image.Image) -> Tensor:
    _check_pixel_count(image)
    image.load()
    _check_pixel_count(image)  # a decoded HEIC image can differ in size from its header
    if image.mode == "F":
        raise ImageError("images with floating-point pixels are not supported, because their range is unknown")
    if image.mode.startswith("I"):  # Pillow's own conversion clips 16-bit values at 255
        grey = torch.from_numpy(np.array(image, np.int32)).clamp_(0, 65535)
        pixels = grey.add_(128).floor_divide_(257).to(torch.uint8).expand(3, -1, -1)
    elif image.has_transparency_data:
        pixels = _composite_over_white(torch.from_numpy(np.array(image.convert("RGBA"))).permute(2, 0, 1))
    else:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    return _apply_orientation(pixels, _read_orientation(image)).contiguous()


def _read_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation (1 to 8), or 1 if the orientation is missing or corrupt."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # corrupt EXIF data can make Pillow raise almost any type of exception
        return 1


def _composite_over_white(pixels: Tensor) -> Tensor:
    """Composite a uint8 RGBA image of shape (4, H, W) over white. Return a uint8 RGB image of shape (3, H, W)."""
    result = torch.empty(3, *pixels.shape[1:], dtype=torch.uint8)
    num_rows = max(1, (1 << 20) // max(1, pixels.shape[-1]))  # small chunks save memory for the int32 copies
    for chunk, out in zip(pixels.split(num_rows, dim=-2), result.split(num_rows, dim=-2), strict=True):
        colour, alpha = chunk[:3].to(torch.int32), chunk[3:].to(torch.int32)
        out.copy_((colour * alpha + 255 * (255 - alpha) + 127) // 255)
    return result


def _apply_orientation(pixels: Tensor, orientation: int) -> Tensor:
    """Rotate and flip an image according to its EXIF orientation (1 to 8). Ignore invalid orientations."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 2)
    flips = {2: [2], 3: [1, 2], 4: [1], 6: [2], 7: [1, 2], 8: [1]}.get(orientation)
    return pixels.flip(flips) if flips else pixels


# ---- batches ---------------------------------------------------------------------------------------------------------


def decode_or_return_error(ref: ImageRef, transform: Callable[[Tensor], T]) -> T | str:
    """Decode and transform an image. Return an error message if decoding fails or memory runs out."""
    try:
        return transform(load_image(ref))
    except (ImageError, OSError) as error:
        return str(error).removeprefix(f"{ref}: ")  # callers add the name of the image
    except FatalDataError:
        raise
    except Exception as error:  # a single bad image must not stop a run
        return describe_error(error)


def iter_image_batches(
    refs: Sequence[ImageRef], transform: Callable[[Tensor], Any], batch_size: int = 64, workers: int | None = None
) -> Generator[tuple[list[int], list[Any], dict[int, str]]]:
    """Yield batches of decoded and transformed images, in order.

    Worker processes are used for 2,048 or more images. The default number of workers is half the number of CPU cores,
    at most 8.

    Yields:
        Indices of the decoded images, the transformed images, and a dict {index: error message} of the images that
        could not be decoded.
    """
    if workers is None:
        workers = min(8, count_cores() // 2)
    workers = workers if len(refs) >= MIN_IMAGES_FOR_WORKERS else 0
    loader = DataLoader(
        _DecodedImageDataset(refs, transform),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=pack_batch if workers else list,
        **build_worker_options(workers, __name__),
        generator=torch.Generator(),  # leaves the global random state unchanged
    )
    next_prefetch = num_images = 0
    for batch in loader:
        items = unpack_batch(batch) if workers else batch
        num_images += len(items)
        if num_images >= next_prefetch:
            prefetch_remote_files(
                [ref.container_path or "" for ref in refs[num_images : num_images + 4 * PREFETCH_IMAGES]]
            )
            next_prefetch = num_images + PREFETCH_IMAGES
        decoded = {index: value for index, value in items if not isinstance(value, str)}
        failures = {index: value for index, value in items if isinstance(value, str)}
        yield list(decoded), list(decoded.values()), failures


class _DecodedImageDataset(Dataset):
    def __init__(self, refs: Sequence[ImageRef], transform: Callable[[Tensor], Any]) -> None:
        self.refs, self.transform = refs, transform

    def __len__(self) -> int:
        return len(self.refs)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, decode_or_return_error(self.refs[index], self.transform)


def build_worker_options(workers: int, *modules: str) -> dict[str, Any]:
    """Return the `DataLoader` arguments that determine how worker processes are started and initialised.

    Forking a process that uses a GPU or threads is unsafe. With "forkserver", all workers are forked from a server
    process that has only imported `modules`.
    """
    if not workers:
        return {}
    start_method = "spawn"
    if "forkserver" in multiprocessing.get_all_start_methods() and sys.platform != "darwin":  # unsafe on macOS
        start_method = "forkserver"
        multiprocessing.set_forkserver_preload(list(modules))
    initialize = partial(_initialize_worker, dict(os.environ))
    return {"worker_init_fn": initialize, "multiprocessing_context": start_method}


def _initialize_worker(environment: dict[str, str], worker: int) -> None:
    """Make a data loader worker exit when its main process exits, without finalising the Python interpreter.

    Finalising the interpreter can abort a worker whose C++ threads are still sending a batch.
    """
    os.environ.update(environment)  # a fork server keeps the environment of the first data loader
    atexit.register(os._exit, 0)
    sys.excepthook = _print_worker_exception
    threading.Thread(target=_exit_with_main_process, daemon=True).start()


def _exit_with_main_process() -> None:
    main_process = multiprocessing.parent_process()
    assert main_process is not None
    main_process.join()
    os._exit(1)


def _print_worker_exception(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Print an exception unless it is a connection error, which occurs when the main process is interrupted."""
    if not issubclass(kind, EOFError | ConnectionError | AuthenticationError):
        sys.__excepthook__(kind, error, traceback)


def pack_batch(items: list[Any]) -> Tensor:
    """Pickle a batch to a uint8 tensor, so that a worker process can send the batch with a single file descriptor.

    Sending 512 images as separate tensors would exceed the usual limit of 1,024 open files.
    """
    stream = BytesIO()
    _TensorPickler(stream, pickle.HIGHEST_PROTOCOL).dump(items)
    return torch.frombuffer(stream.getbuffer(), dtype=torch.uint8)


def unpack_batch(batch: Tensor) -> list[Any]:
    return cast(list[Any], pickle.loads(batch.numpy().data))


class _TensorPickler(pickle.Pickler):
    """Pickler that serialises tensors as NumPy arrays, which is faster than PyTorch's serialisation."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        data = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        return _restore_tensor, (data, value.dtype, value.shape)


def _restore_tensor(data: np.ndarray, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    return torch.from_numpy(data).view(dtype).view(shape)
