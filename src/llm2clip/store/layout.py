"""On-disk layout of the embedding store.

    store/
      manifest.json          identity of the encoder, width, dtype, number of captions, shards with row ranges and
                             checksums
      keys-00000.parquet     per row, key of the caption and its number of tokens; in the metadata, the checksum of the
                             embeddings
      embeddings-00000.npy   (rows, width) float16, int8 or float32, C order
      scales-00000.npy       int8 only: factor of each row, (rows,) float32
      index-1a2b3c4d.npy     key index, see `key_index`

Each file of a shard is written to a temporary name, fsynced and renamed. The keys are written last, so a shard with a
keys file is complete. Manifest and index only summarize the shards: both are rebuilt from them after an interrupt.
Rows are found by the hash of the caption, never by position, so the data may be reordered, extended or filtered.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from tokenize import TokenError
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llm2clip.data.hashing import caption_key
from llm2clip.models.fingerprint import fingerprint

T = TypeVar("T")
DTYPES: dict[str, np.dtype[Any]] = {name: np.dtype(name) for name in ("float16", "int8", "float32")}
MANIFEST = "manifest.json"
KEY_BYTES = 16
# All shards of a store share these three: identity of the encoder, embedding dimension ("width" on disk), dtype.
StoreSpec = tuple[dict[str, Any], int, str]
# Exceptions that reading a damaged JSON, Parquet or .npy file may raise.
READ_ERRORS = (ValueError, KeyError, TypeError, OSError, EOFError, SyntaxError, TokenError, pa.ArrowException)


class StoreError(ValueError):
    """A store is damaged, was made by another encoder, is in use, or lacks a caption."""


@dataclass(frozen=True)
class Shard:
    """A shard of a store: its number in file names, first row, number of rows, and checksum of embeddings and scales.

    The field names are keys of the manifest.
    """

    number: int
    start: int
    rows: int
    sha256: str


# ---- file names ----------------------------------------------------------------------------------------------------


def keys_path(folder: Path, number: int) -> Path:
    return folder / f"keys-{number:05d}.parquet"


def embeddings_path(folder: Path, number: int) -> Path:
    return folder / f"embeddings-{number:05d}.npy"


def scales_path(folder: Path, number: int) -> Path:
    return folder / f"scales-{number:05d}.npy"


def index_path(folder: Path, shards: Sequence[Shard]) -> Path:
    """Return the path of the key index of exactly these shards; the name contains a hash of them."""
    digest = hashlib.sha256(repr([(s.number, s.rows, s.sha256) for s in shards]).encode()).hexdigest()
    return folder / f"index-{digest[:12]}.npy"


# ---- shards --------------------------------------------------------------------------------------------------------


def shard_numbers(folder: Path) -> list[int]:
    """Return the sorted numbers of the complete shards."""
    numbers = []
    for path in folder.iterdir():
        match = re.fullmatch(r"keys-(\d{5,})\.parquet", path.name)
        if match and embeddings_path(folder, int(match[1])).is_file():
            numbers.append(int(match[1]))
    return sorted(numbers)


def next_shard_number(folder: Path) -> int:
    """Return the number after that of the last complete shard, or 0."""
    return max(shard_numbers(folder), default=-1) + 1


def read_shard_metadata(folder: Path, number: int) -> tuple[int, str, StoreSpec]:
    """Read the number of rows, the checksum and the spec of a shard from the metadata of its keys file.

    Raises:
        StoreError: the file cannot be read.
    """
    path = keys_path(folder, number)
    try:
        metadata = pq.read_schema(path).metadata
        spec = json.loads(metadata[b"identity"]), int(metadata[b"width"]), metadata[b"dtype"].decode()
        return int(metadata[b"rows"]), metadata[b"sha256"].decode(), spec
    except READ_ERRORS as error:
        raise damage_error(path, error) from error


def read_shards(folder: Path, spec: StoreSpec | None = None) -> list[Shard]:
    """List the complete shards in the order of their numbers, from the metadata of their keys files.

    Raises:
        StoreError: a keys file cannot be read, or its spec is not `spec`.
    """
    shards, start = [], 0
    for number in shard_numbers(folder):
        rows, sha256, shard_spec = read_shard_metadata(folder, number)
        if spec is not None and shard_spec != spec:
            raise StoreError(
                f"{keys_path(folder, number)} was written by another encoder than this store. "
                f"Run `llm2clip store repair {folder}` to delete that shard"
            )
        shards.append(Shard(number, start, rows, sha256))
        start += rows
    return shards


def read_keys(folder: Path, shard: Shard) -> np.ndarray:
    """Read the keys of a shard's rows, (rows, 16) uint8.

    Raises:
        StoreError: the keys cannot be read, or their number differs from the number of rows.
    """
    path = keys_path(folder, shard.number)
    try:
        column = pq.read_table(path, columns=["key"], page_checksum_verification=True)["key"].combine_chunks()
    except READ_ERRORS as error:
        raise damage_error(path, error) from error
    if len(column) != shard.rows or column.type != pa.binary(KEY_BYTES):
        raise damage_error(path, f"{len(column)} keys of type {column.type}, expected {shard.rows} of 16 bytes")
    values = np.frombuffer(column.buffers()[1], np.uint8)[column.offset * KEY_BYTES :]
    return values[: shard.rows * KEY_BYTES].reshape(-1, KEY_BYTES)


def shard_checksum(folder: Path, number: int) -> str:
    """Compute the SHA-256 of a shard's embeddings and, if it has them, scales."""
    combined = hashlib.sha256()
    for path in (embeddings_path(folder, number), scales_path(folder, number)):
        if path.is_file():
            with path.open("rb") as stream:
                combined.update(hashlib.file_digest(stream, "sha256").digest())
    return combined.hexdigest()


def damage_error(path: Path, reason: object) -> StoreError:
    """Return the error to raise for a damaged file of a store."""
    return StoreError(f"{path} is damaged ({reason}). Run `llm2clip store repair {path.parent}`")


# ---- manifest ------------------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check the manifest of a store.

    Raises:
        StoreError: the manifest is missing, damaged or inconsistent.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise StoreError(f"{folder} is not a store: it has no {MANIFEST}. `llm2clip embed` creates a store")
    try:
        manifest: dict[str, Any] = json.loads(file.read_text())
        shards = [Shard(**shard) for shard in manifest["shards"]]
        starts = [0, *accumulate(shard.rows for shard in shards)]
        if manifest["fingerprint"] != fingerprint(manifest["identity"]):
            raise ValueError("fingerprint and identity contradict each other")
        if [shard.start for shard in shards] != starts[:-1]:
            raise ValueError("the shards' first rows and numbers of rows contradict each other")
        int(manifest["width"]), DTYPES[manifest["dtype"]], int(manifest["captions"])
    except READ_ERRORS as error:
        raise damage_error(file, repr(error)) from error
    return manifest


def store_spec(manifest: dict[str, Any]) -> StoreSpec:
    """Return what all shards of the manifest's store share."""
    return manifest["identity"], manifest["width"], manifest["dtype"]


def check_identity(stored: dict[str, Any], expected: dict[str, Any], path: Path | str) -> None:
    """Check that stored embeddings were made by the expected encoder.

    Args:
        stored: Identity of the encoder that made the embeddings.
        expected: Identity of the expected encoder.
        path: Store or file of the embeddings, for the message.

    Raises:
        StoreError: the encoders differ; the message lists each setting that differs, with both values.
    """
    if fingerprint(stored) == fingerprint(expected):
        return
    names = sorted(name for name in stored.keys() | expected.keys() if stored.get(name) != expected.get(name))
    differences = "; ".join(f"{name}: {stored.get(name)!r}, expected {expected.get(name)!r}" for name in names)
    raise StoreError(f"{path} was made by another encoder ({differences}). Use that encoder, or another folder")


# ---- keys ----------------------------------------------------------------------------------------------------------


def caption_keys(captions: Sequence[str]) -> np.ndarray:
    """Return the keys of captions, (N, 16) uint8: the first 16 bytes of the SHA-256 of the text.

    Raises:
        StoreError: a caption contains a lone surrogate, which UTF-8 cannot encode.
    """
    try:
        return np.frombuffer(b"".join(map(caption_key, captions)), np.uint8).reshape(-1, KEY_BYTES)
    except UnicodeEncodeError as error:
        raise StoreError(f"caption {error.object[:120]!a} is not valid Unicode text: {error.reason}") from error


def iter_chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of `size` items; the last may be shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


# ---- leftovers -----------------------------------------------------------------------------------------------------


def remove_temp_files(folder: Path) -> list[str]:
    """Delete temporary files that killed processes left behind, also those of version 0.1; return their names."""
    leftovers = [path for pattern in (".*.part", ".*.part.*", ".*.tmp", ".index-*") for path in folder.glob(pattern)]
    leftovers = sorted(set(leftovers))
    for path in leftovers:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return [path.name for path in leftovers]
