"""Detection of identical image files, so that copies of an image do not end up in different splits.

Most files are never read, because only files of the same size can be identical. For files of the same size, a short
sample from the middle is compared first, and only files with equal samples are read completely.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from llm2clip.data.image_refs import FileImage, ImageRef, TarImage, resolve_folder

SAMPLE_BYTES = 1024
NUM_THREADS = 16  # many threads help on network file systems, where most of the time is spent waiting
ITEMS_PER_TASK = 32
CHUNK_BYTES = 1 << 20

S = TypeVar("S")
T = TypeVar("T")

Location = tuple[str, int, int]  # path, offset and size of the image


def find_copies(images: Iterable[ImageRef | None]) -> dict[str, str]:
    """Find images that have the same bytes as an earlier image. Symbolic links to an image count as copies.

    Image files and members of tar files are compared. Images in tables do not need this comparison, because their
    `ImageRef.key` is already a hash of their bytes. Missing image files are ignored.

    Returns:
        A dict that maps the key (`ImageRef.key`) of each copy to the key of the first image with the same bytes. The
        copies are in the same order as in `images`.
    """
    refs = {image.key: image for image in images if isinstance(image, FileImage | TarImage)}
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        keys: dict[Location, list[str]] = {}  # links to a file have the same location
        for key, location in zip(refs, map_in_chunks(pool, locate, list(refs.values())), strict=True):
            if location is not None:
                keys.setdefault(location, []).append(key)
        groups = _group_equal(list(keys), lambda location: location[2])
        for compute_digest in (sample_digest, _full_digest):
            candidates = [location for group in groups for location in group]
            digests = dict(zip(candidates, map_in_chunks(pool, compute_digest, candidates), strict=True))
            equal: list[list[Location]] = []
            for group in groups:
                equal += _group_equal([location for location in group if digests[location]], digests.__getitem__)
            groups = equal
    first_locations = {location: group[0] for group in groups for location in group}
    copies: dict[str, str] = {}
    for location, keys_of_location in keys.items():
        first_key = keys[first_locations.get(location, location)][0]
        copies |= dict.fromkeys(keys_of_location, first_key)
    return {key: copies[key] for key in refs if key in copies and copies[key] != key}


def map_in_chunks(pool: ThreadPoolExecutor, function: Callable[[S], T], items: Sequence[S]) -> Iterator[T]:
    """Apply a function to items in several threads, in chunks for speed, and yield the results in order."""
    chunks = [items[start : start + ITEMS_PER_TASK] for start in range(0, len(items), ITEMS_PER_TASK)]
    for results in pool.map(lambda chunk: [function(item) for item in chunk], chunks):
        yield from results


def _group_equal(items: Sequence[Location], value: Callable[[Location], Hashable]) -> list[list[Location]]:
    """Group items with equal values, in order of first appearance. Omit groups with a single item."""
    groups: dict[Hashable, list[Location]] = {}
    for item in items:
        groups.setdefault(value(item), []).append(item)
    return [group for group in groups.values() if len(group) > 1]


def locate(image: FileImage | TarImage) -> Location | None:
    """Return the location of an image, with links resolved. Return None if the image is empty or does not exist."""
    path = resolve_folder(image.path)
    try:
        if os.path.islink(path):
            path = os.path.realpath(path)
        size = image.size if isinstance(image, TarImage) else os.path.getsize(path)
    except (OSError, ValueError):
        return None
    return (path, image.offset if isinstance(image, TarImage) else 0, size) if size else None


def sample_digest(location: Location) -> bytes:
    """Return a hash of a few bytes from the middle of an image, or b"" if they cannot be read."""
    path, offset, size = location
    length = min(SAMPLE_BYTES, size)
    return _digest(path, offset + (size - length) // 2, length)


def _full_digest(location: Location) -> bytes:
    """Return a hash of all bytes of an image, or b"" if they cannot be read."""
    path, offset, size = location
    try:
        modified = os.stat(path).st_mtime_ns
    except OSError:
        return b""
    return _cached_digest(path, offset, size, modified)


@functools.lru_cache(maxsize=1 << 16)
def _cached_digest(path: str, offset: int, size: int, modified: int) -> bytes:
    return _digest(path, offset, size)


def _digest(path: str, start: int, length: int) -> bytes:
    digest = hashlib.sha256()
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            while length > 0:
                data = file.read(min(length, CHUNK_BYTES))
                if not data:
                    return b""
                digest.update(data)
                length -= len(data)
    except OSError:
        return b""
    return digest.digest()
