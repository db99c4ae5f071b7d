"""On-disk format of the embedding store: files, shards, manifest, and key index.

    store/
      manifest.json          format version, encoder identity, embedding dimension, dtype, number of captions, and the
                             row range and checksum of each shard
      keys-00000.parquet     key and token count of the caption in each row; the metadata contains the checksum of the
                             embeddings and the same store properties as the manifest
      embeddings-00000.npy   embeddings of shape (rows, embed_dim), float16, int8 or float32, C order
      scales-00000.npy       only for int8: scale factor of each row, of shape (rows,), float32
      index-1a2b3c4d.npy     key index; see `KeyIndex`

Each file in a shard is written under a temporary name, fsynced and renamed. The keys file is written last, so a shard
with a keys file is complete. The manifest and the index only summarise the shards, and are rebuilt from the shards
after an interruption. Embeddings are looked up by caption hash, never by position, so you can reorder, extend or filter
the captions of a dataset. Image features use the same format, keyed by image name (`make_image_keys`).
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, islice
from pathlib import Path
from tokenize import TokenError
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llm2clip.data.image_refs import FileImage, ImageRef
from llm2clip.data.remote import get_remote_version
from llm2clip.data.storage import is_remote
from llm2clip.io_utils import atomic_path, read_jsonl, remove_path, to_valid_unicode
from llm2clip.models.loading import fingerprint
from llm2clip.runs.output_folder import FormatVersionError, check_format_version

T = TypeVar("T")
DTYPES: dict[str, np.dtype[Any]] = {name: np.dtype(name) for name in ("float16", "int8", "float32")}
FORMAT_VERSION = 1
NEW_STORE_ADVICE = "Delete the store and create it again with `llm2clip embed`"
MANIFEST = "manifest.json"
KEY_BYTES = 16
LOOKUP_CHUNK_SIZE = 1 << 18  # maximum number of keys to compute or look up at once
NUM_KEY_PARTS = 16  # keys are sorted in this many parts to limit memory use
# Spec shared by all shards of a store: encoder identity, embedding dimension and dtype.
StoreSpec = tuple[dict[str, Any], int, str]
# Exceptions raised by corrupt JSON, Parquet and .npy files.
READ_ERRORS = (ValueError, KeyError, TypeError, OSError, EOFError, SyntaxError, TokenError, pa.ArrowException)
_stat_cached = lru_cache(maxsize=65536)(os.stat)  # cached because tar files and tables can contain many images


class StoreError(ValueError):
    """Raised when a store is corrupt, was created with a different encoder, or lacks a requested caption."""


@dataclass(frozen=True)
class Shard:
    """Shard of a store. The field names are the keys in the manifest."""

    number: int
    start: int  # row number of the shard's first row within the store
    rows: int
    sha256: str  # see `compute_shard_checksum`


# ---- file names ----------------------------------------------------------------------------------------------------


def get_keys_path(folder: Path, number: int) -> Path:
    return folder / f"keys-{number:05d}.parquet"


def get_embeddings_path(folder: Path, number: int) -> Path:
    return folder / f"embeddings-{number:05d}.npy"


def get_scales_path(folder: Path, number: int) -> Path:
    return folder / f"scales-{number:05d}.npy"


def get_index_path(folder: Path, shards: Sequence[Shard]) -> Path:
    """Return the path of the key index of these shards. The file name contains a hash of the shards' metadata."""
    digest = hashlib.sha256(repr([(s.number, s.rows, s.sha256) for s in shards]).encode()).hexdigest()
    return folder / f"index-{digest[:12]}.npy"


# ---- shards --------------------------------------------------------------------------------------------------------


def list_shard_numbers(folder: Path) -> list[int]:
    """Return the sorted numbers of all complete shards."""
    numbers = []
    for path in folder.iterdir():
        match = re.fullmatch(r"keys-(\d{5,})\.parquet", path.name)
        if match and get_embeddings_path(folder, int(match[1])).is_file():
            numbers.append(int(match[1]))
    return sorted(numbers)


def get_next_shard_number(folder: Path) -> int:
    """Return the largest complete shard number plus 1, or 0 if there are no complete shards."""
    return max(list_shard_numbers(folder), default=-1) + 1


def read_shard_metadata(folder: Path, number: int) -> tuple[int, str, StoreSpec]:
    """Read a shard's row count, checksum and spec from the metadata of its keys file.

    Raises:
        StoreError: The file is corrupt.
        FormatVersionError: The shard's format version is not supported.
    """
    path = get_keys_path(folder, number)
    try:
        metadata = pq.read_schema(path).metadata
        check_format_version(path, int(metadata[b"format_version"]), FORMAT_VERSION, NEW_STORE_ADVICE)
        spec = json.loads(metadata[b"identity"]), int(metadata[b"embed_dim"]), metadata[b"dtype"].decode()
        return int(metadata[b"rows"]), metadata[b"sha256"].decode(), spec
    except FormatVersionError:
        raise
    except READ_ERRORS as error:
        raise build_corruption_error(path, error) from error


def read_shards(folder: Path, spec: StoreSpec | None = None) -> list[Shard]:
    """List all complete shards, sorted by number. Only the metadata of the keys files is read.

    Raises:
        StoreError: A keys file cannot be read, or its spec differs from `spec`.
    """
    shards, start = [], 0
    for number in list_shard_numbers(folder):
        rows, sha256, shard_spec = read_shard_metadata(folder, number)
        if spec is not None and shard_spec != spec:
            raise StoreError(
                f"{get_keys_path(folder, number)} differs from the other shards in encoder, dimension or dtype. "
                f"Run `llm2clip store repair {folder}` to delete this shard"
            )
        shards.append(Shard(number, start, rows, sha256))
        start += rows
    return shards


def read_keys(folder: Path, shard: Shard) -> np.ndarray:
    """Read the keys of a shard's N rows as a uint8 array of shape (N, 16). Raise StoreError if the file is corrupt."""
    path = get_keys_path(folder, shard.number)
    try:
        column = pq.read_table(path, columns=["key"], page_checksum_verification=True)["key"].combine_chunks()
    except READ_ERRORS as error:
        raise build_corruption_error(path, error) from error
    if len(column) != shard.rows or column.type != pa.binary(KEY_BYTES):
        reason = f"it has {len(column)} keys of type {column.type} instead of {shard.rows} keys of 16 bytes"
        raise build_corruption_error(path, reason)
    values = np.frombuffer(column.buffers()[1], np.uint8)[column.offset * KEY_BYTES :]
    return values[: shard.rows * KEY_BYTES].reshape(-1, KEY_BYTES)


def read_all_keys(folder: Path, shards: Sequence[Shard]) -> np.ndarray:
    """Read the keys of all N rows of these shards as a uint8 array of shape (N, 16)."""
    keys = np.empty((sum(shard.rows for shard in shards), KEY_BYTES), np.uint8)
    for shard in shards:
        keys[shard.start : shard.start + shard.rows] = read_keys(folder, shard)
    return keys


def compute_shard_checksum(folder: Path, number: int) -> str:
    """Compute the SHA-256 hash of a shard's embeddings. In an int8 store, the hash also includes the scales."""
    combined = hashlib.sha256()
    for path in (get_embeddings_path(folder, number), get_scales_path(folder, number)):
        if path.is_file():
            with path.open("rb") as stream:
                combined.update(hashlib.file_digest(stream, "sha256").digest())
    return combined.hexdigest()


def build_corruption_error(path: Path, reason: object) -> StoreError:
    return StoreError(f"{path} is corrupt ({reason}). Run `llm2clip store repair {path.parent}`")


# ---- manifest ------------------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check a store's manifest.

    Raises:
        StoreError: The manifest is missing, corrupt or inconsistent.
        FormatVersionError: The store's format version is not supported.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise StoreError(f"{folder} is not a store: it has no {MANIFEST}. Create a store with `llm2clip embed`")
    try:
        manifest: dict[str, Any] = dict(json.loads(file.read_text()))
    except READ_ERRORS as error:
        raise build_corruption_error(file, repr(error)) from error
    check_format_version(file, manifest.get("format_version"), FORMAT_VERSION, NEW_STORE_ADVICE)
    try:
        shards = [Shard(**shard) for shard in manifest["shards"]]
        starts = [0, *accumulate(shard.rows for shard in shards)]
        if manifest["fingerprint"] != fingerprint(manifest["identity"]):
            raise ValueError("the fingerprint does not match the identity")
        if [shard.start for shard in shards] != starts[:-1]:
            raise ValueError("the shards' start offsets do not match their row counts")
        int(manifest["embed_dim"]), DTYPES[manifest["dtype"]], int(manifest["captions"])
    except READ_ERRORS as error:
        raise build_corruption_error(file, repr(error)) from error
    return manifest


def get_store_spec(manifest: dict[str, Any]) -> StoreSpec:
    return manifest["identity"], manifest["embed_dim"], manifest["dtype"]


def check_store_spec(manifest: dict[str, Any], expected: StoreSpec, folder: Path) -> None:
    identity, embed_dim, dtype = expected
    check_identity(manifest["identity"], identity, folder)
    for name, value in (("embed_dim", embed_dim), ("dtype", dtype)):
        if manifest[name] != value:
            raise StoreError(f"{folder} has {name} {manifest[name]}, expected {value}. Use another folder")


def check_identity(stored: dict[str, Any], expected: dict[str, Any], path: Path | str) -> None:
    """Compare encoder identities to check that the embeddings in `path` were created by the expected encoder.

    Raises:
        StoreError: The encoders differ. The message lists the settings that differ, with stored and expected values.
    """
    if fingerprint(stored) == fingerprint(expected):
        return
    names = sorted(name for name in stored.keys() | expected.keys() if stored.get(name) != expected.get(name))
    differences = "; ".join(f"{name}: {stored.get(name)!r}, expected {expected.get(name)!r}" for name in names)
    raise StoreError(
        f"{path} was created with a different encoder ({differences}). Use the same encoder or another folder"
    )


# ---- keys ----------------------------------------------------------------------------------------------------------


def make_caption_keys(captions: Sequence[str]) -> np.ndarray:
    """Return the keys of N captions (the first 16 bytes of their SHA-256 hashes) as a uint8 array of shape (N, 16).

    Raises:
        StoreError: A caption contains a lone surrogate, which cannot be encoded in UTF-8.
    """
    try:
        digests = (hashlib.sha256(caption.encode()).digest()[:KEY_BYTES] for caption in captions)
        return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, KEY_BYTES)
    except UnicodeEncodeError as error:
        raise StoreError(f"caption {error.object[:120]!a} is not valid Unicode text: {error.reason}") from error


def make_image_keys(refs: Iterable[ImageRef]) -> np.ndarray:
    """Return the store keys of N images as a uint8 array of shape (N, 16)."""
    chunks = iter_chunks(map(get_image_name, refs), LOOKUP_CHUNK_SIZE)
    return np.concatenate([np.empty((0, KEY_BYTES), np.uint8), *map(make_caption_keys, chunks)])


def get_image_name(ref: ImageRef) -> str:
    """Return the name that identifies an image in a store: its key, file size and modification time.

    If the image file changes, the name changes, too, and the image is encoded again.
    """
    name, path = ref.key, ref.container_path
    if path is not None and is_remote(path):
        name = f"{name} {get_remote_version(path)}"
    elif path is not None:
        with suppress(OSError):
            stat = os.stat(path) if isinstance(ref, FileImage) else _stat_cached(path)
            name = f"{name} {stat.st_size} {stat.st_mtime_ns}"
    return to_valid_unicode(name)


def iter_chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of `size` items. The last list may be shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


class KeyIndex:
    """Memory-mapped index file of a store, which maps caption keys to row numbers.

    The file contains a uint64 array of shape (3, N), sorted by key. Each 16-byte key is split into two uint64 halves.
    The three rows of the array contain the first halves of the keys, the second halves, and the row numbers in the
    store. The file takes 24 bytes per caption. A lookup reads only a few pages of the file.
    """

    def __init__(self, file: Path) -> None:
        self._array = np.load(file, mmap_mode="r", allow_pickle=False)
        if self._array.ndim != 2 or len(self._array) != 3 or self._array.dtype != np.uint64:
            raise ValueError(f"{file} is not a key index")
        self._high, self._low, self._row = self._array

    def __len__(self) -> int:
        return len(self._high)

    def find_keys(self, keys: np.ndarray) -> np.ndarray:
        """Look up uint8 keys of shape (N, 16). Return int64 row numbers of shape (N,).

        The row number of a missing key is -1. If a key has several rows, the first row is returned.
        """
        high, low = _split_keys_into_halves(keys)
        rows = np.full(len(keys), -1, np.int64)
        pending = np.argsort(high)  # sorted, so that consecutive lookups touch the same pages
        position = np.searchsorted(self._high, high[pending])
        # Each iteration compares one entry per pending key. Only keys with equal first halves need several iterations.
        while len(pending):
            in_range = position < len(self)
            pending, position = pending[in_range], position[in_range]
            same_high = self._high[position] == high[pending]
            pending, position = pending[same_high], position[same_high]
            match = self._low[position] == low[pending]
            rows[pending[match]] = self._row[position[match]].astype(np.int64)
            pending, position = pending[~match], position[~match] + 1
        return rows

    def is_intact_index_of(self, keys: np.ndarray) -> bool:
        """Return True if the file is an intact index of `keys`, the keys of all rows in the store."""
        start = 0
        for records in sort_keys(keys):
            stop = start + records.shape[1]
            if not np.array_equal(self._array[:, start:stop], records):
                return False
            start = stop
        return start == len(self)


def build_key_index(file: Path, keys: np.ndarray) -> int:
    """Write an index of a store's uint8 keys, of shape (N, 16), to a .npy file. Return the number of distinct keys."""
    with atomic_path(file) as temporary:
        index = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint64, shape=(3, len(keys)))
        _allocate_disk_space(temporary)
        start = num_repeated = 0
        for records in sort_keys(keys):
            index[:, start : start + records.shape[1]] = records
            start += records.shape[1]
            num_repeated += int(mask_repeated_keys(records).sum())
        index.flush()
        del index  # close the memory map
    return len(keys) - num_repeated


def sort_keys(keys: np.ndarray) -> Iterator[np.ndarray]:
    """Sort uint8 keys of shape (N, 16). Memory use: 1 byte per key, plus 64 bytes per key in the current part.

    Yields:
        `NUM_KEY_PARTS` uint64 arrays of shape (3, n). The rows of an array contain the first halves of n keys, the
        second halves, and the positions in `keys`. Together, the arrays contain all keys, sorted by key and then by
        position. Equal keys are in the same array.
    """
    part_of_key = keys[:, 0] // np.uint8(256 // NUM_KEY_PARTS)
    for part in range(NUM_KEY_PARTS):
        positions = np.flatnonzero(part_of_key == part)
        high, low = _split_keys_into_halves(keys[positions])
        order = np.lexsort((low, high))  # the sort is stable, so equal keys stay in order of position
        yield np.stack([high[order], low[order], positions[order].astype(np.uint64)])


def mask_repeated_keys(records: np.ndarray) -> np.ndarray:
    """Return a boolean mask, of shape (n,), of the keys in an array from `sort_keys` that equal the previous key."""
    repeats = np.zeros(records.shape[1], np.bool_)
    repeats[1:] = (records[:2, 1:] == records[:2, :-1]).all(axis=0)
    return repeats


def _split_keys_into_halves(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split uint8 keys of shape (N, 16) into two uint64 halves of shape (N,) that preserve the sort order."""
    halves = np.ascontiguousarray(keys).view(">u8").astype(np.uint64)
    return halves[:, 0], halves[:, 1]


def _allocate_disk_space(file: Path) -> None:
    """Allocate disk space for a file, because writing to a memory map on a full disk would cause SIGBUS."""
    if hasattr(os, "posix_fallocate"):
        with file.open("r+b") as stream:
            os.posix_fallocate(stream.fileno(), 0, file.stat().st_size)


# ---- other files ---------------------------------------------------------------------------------------------------


def remove_temp_files(folder: Path) -> list[str]:
    """Delete temporary files left behind by killed processes. Return the file names."""
    leftovers = sorted({*folder.glob(".*.part"), *folder.glob(".*.part.*")})
    for path in leftovers:
        remove_path(path)
    return [path.name for path in leftovers]


def read_refused_captions(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the log entries (keys "caption" and "why") of captions that could not be tokenized, keyed by caption."""
    rows = (row for file in sorted(folder.glob("refused-*.jsonl")) for _, row in read_jsonl(file))
    return {row["caption"]: row for row in rows}
