"""Zip archives of original image files, which are created while they are sent."""

import io
import os
import re
import unicodedata
import zipfile
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from pathlib import PurePosixPath
from typing import BinaryIO

from starlette.concurrency import run_in_threadpool

from llm2clip.data.image_refs import FileImage, TarImage
from llm2clip.search.inference import InferenceService, QueueFull
from llm2clip.search.metadata import to_datetime
from llm2clip.search.middleware import CHUNK_SIZE, ByteAllocation
from llm2clip.search.types import IndexedImage, IndexUnavailableError, NotFound

MAX_ZIP_IMAGES = 200  # maximum number of images in an archive; more ids would make the URL too long for some proxies
MAX_ZIP_BYTES = 4 << 30  # maximum total size of the images in an archive
MAX_SUFFIX_BYTES = 10  # longer suffixes are part of the name
MAX_NAME_BYTES = 200  # file systems limit names to 255 bytes
MISSING_FILE = "not_included.txt"
RESERVED_NAMES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # device names on Windows
FIRST_DATE, LAST_DATE = (1980, 1, 1, 0, 0, 0), (2107, 12, 31, 23, 59, 58)  # range of dates in zip archives


def parse_ids(ids: str) -> list[str]:
    """Return the distinct hit ids in a comma-separated list. Raise ValueError if there are none or too many."""
    hit_ids = list(dict.fromkeys(hit_id for hit_id in ids.split(",") if hit_id))
    if not hit_ids:
        raise ValueError("no images: list the ids of results in the parameter ids, separated by commas")
    if len(hit_ids) > MAX_ZIP_IMAGES:
        raise ValueError(f"too many images in one archive: {len(hit_ids):,}; the limit is {MAX_ZIP_IMAGES}")
    return hit_ids


async def stream_zip(
    service: InferenceService, hit_ids: Sequence[str], allocation: ByteAllocation
) -> AsyncGenerator[bytes, None]:
    """Yield an uncompressed zip archive with the original image files of hits, in chunks.

    Files that cannot be included are listed with the reason in MISSING_FILE. Images from table cells count towards the
    byte budget while they are in memory.

    Raises:
        QueueFull: The first file cannot be included, because the server is busy.
    """
    buffer = _ChunkBuffer()
    names: set[str] = {MISSING_FILE}
    missing: list[str] = []
    total_size = 0
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for hit_id in hit_ids:
            images: tuple[IndexedImage, ...] = ()
            try:
                images = await run_in_threadpool(service.require_index().backend.images, hit_id)
                stream, media_type, size = await _open_original(service, hit_id, allocation)
            except (NotFound, QueueFull, IndexUnavailableError) as error:
                if isinstance(error, QueueFull) and not total_size and not missing:
                    raise  # nothing has been sent yet, so the client receives status 429
                is_private = isinstance(error, IndexUnavailableError)  # its message contains addresses
                reason = "the index is temporarily unavailable" if is_private else str(error)
                missing.append(f"{images[0].name if images else hit_id}: {reason}")
                continue
            try:
                if total_size + size > MAX_ZIP_BYTES:
                    limit = f"the limit of {MAX_ZIP_BYTES:,} bytes per archive"
                    missing.append(f"{images[0].name}: the file is not included because of {limit}")
                    continue
                total_size += size
                name = make_unique(make_valid_file_name(images[0], media_type), names)
                info = zipfile.ZipInfo(name, make_date(images[0]))
                info.external_attr = 0o644 << 16
                info.file_size = size
                with archive.open(info, "w") as entry:
                    yield buffer.take()  # the local header; together with the first chunk, it would exceed CHUNK_SIZE
                    async for chunk in read_chunks(stream, size):
                        entry.write(chunk)
                        yield buffer.take()
            finally:
                stream.close()
                if isinstance(stream, io.BytesIO):
                    allocation.remove(size)
        if missing:
            archive.writestr(MISSING_FILE, "".join(f"{line}\n" for line in missing))
    end = buffer.take()  # MISSING_FILE and the directory of the archive
    for start in range(0, len(end), CHUNK_SIZE):
        yield end[start : start + CHUNK_SIZE]


async def _open_original(
    service: InferenceService, hit_id: str, allocation: ByteAllocation
) -> tuple[BinaryIO, str, int]:
    stream, media_type = await service.open_original(hit_id)
    size = stream.seek(0, os.SEEK_END)
    if isinstance(stream, io.BytesIO):  # the image is stored in a table cell
        try:
            allocation.add(size)
        except QueueFull:
            allocation.remove(size)
            stream.close()
            raise
    return stream, media_type, size


async def read_chunks(stream: BinaryIO, size: int) -> AsyncIterator[bytes]:
    """Yield the first `size` bytes of a stream in chunks."""
    stream.seek(0)
    for start in range(0, size, CHUNK_SIZE):
        yield await run_in_threadpool(stream.read, min(CHUNK_SIZE, size - start))


class _ChunkBuffer(io.RawIOBase):
    def __init__(self) -> None:
        self._data = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self._data += data
        return len(data)

    def take(self) -> bytes:
        data, self._data = bytes(self._data), bytearray()
        return data


def make_valid_file_name(image: IndexedImage, media_type: str) -> str:
    """Convert an image's file name to one that is valid on all systems. Images in tables get a suffix."""
    name = re.split(r"[/\\]", image.file_name)[-1]
    name = re.sub(r'[\x00-\x1f\x7f<>:"|?*]', "_", name)
    name = "".join(c for c in name if unicodedata.category(c) != "Cf").strip(" .")  # Cf: invisible, or reverses text
    suffix = PurePosixPath(name).suffix
    if not isinstance(image.ref, (FileImage, TarImage)) or not 1 < len(suffix.encode()) <= MAX_SUFFIX_BYTES:
        suffix = "." + media_type.removeprefix("image/").partition("+")[0]
        name += suffix
    stem = name.removesuffix(suffix).encode()[: MAX_NAME_BYTES - len(suffix.encode())].decode(errors="ignore")
    name = (stem or "image") + suffix
    return f"_{name}" if RESERVED_NAMES.fullmatch(name) else name


def make_unique(name: str, names: set[str]) -> str:
    """Return a name that differs from all earlier names even if case is ignored, and add it to the names."""
    path, number, unique = PurePosixPath(name), 1, name
    while unique.lower() in names:
        number += 1
        unique = f"{path.stem} ({number}){path.suffix}"
    names.add(unique.lower())
    return unique


def make_date(image: IndexedImage) -> tuple[int, int, int, int, int, int]:
    taken = to_datetime(image.taken)
    return FIRST_DATE if taken is None else max(FIRST_DATE, min(taken.timetuple()[:6], LAST_DATE))
