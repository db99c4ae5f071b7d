"""How a store lies on the disk.

    store/
      manifest.json          identity of the encoder, width, dtype, counts, shards with row ranges and checksums
      keys-00000.parquet     of each row the caption's key and its number of tokens; in the file's metadata the checksum
                             of the vectors
      embeddings-00000.npy   (rows, width) float16, int8 or float32, C order
      scales-00000.npy       of int8: what each row is multiplied by, (rows,) float32
      index-1a2b3c4d.npy     keys to rows, made again from the shards where it is absent

A shard is written to temporary names, flushed to the disk and renamed; its keys come last, so a shard with keys is
whole. The shards are the truth and the rest is their summary, made again from them after a kill. Rows are found by the
hash of the caption's text, never by position, so data may be reordered, extended or filtered under a store.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llm2clip.data.hashing import caption_key
from llm2clip.models.fingerprint import fingerprint

DTYPES: dict[str, np.dtype[Any]] = {name: np.dtype(name) for name in ("float16", "int8", "float32")}
MANIFEST = "manifest.json"
StoreSpec = tuple[dict[str, Any], int, str]  # identity of the encoder, width, dtype: what all shards of a store share
# What reading a file whose bytes are not those that were written may raise.
READ_ERRORS = (ValueError, KeyError, TypeError, OSError, EOFError, SyntaxError, TokenError, pa.ArrowException)


class StoreError(ValueError):
    """The store is damaged, is another encoder's, or lacks a caption."""


@dataclass(frozen=True)
class Shard:
    """One shard of a store: its number in the files' names, its first row, how many, and the checksum of its vectors
    and scales."""

    number: int
    start: int
    rows: int
    sha256: str


def keys_path(folder: Path, number: int) -> Path:
    return folder / f"keys-{number:05d}.parquet"


def embeddings_path(folder: Path, number: int) -> Path:
    return folder / f"embeddings-{number:05d}.npy"


def scales_path(folder: Path, number: int) -> Path:
    return folder / f"scales-{number:05d}.npy"


def shard_numbers(folder: Path) -> list[int]:
    """Numbers of the whole shards, sorted."""
    found = (re.fullmatch(r"keys-(\d{5,})\.parquet", p.name) for p in folder.iterdir())
    return sorted(int(m[1]) for m in found if m and embeddings_path(folder, int(m[1])).is_file())


def read_meta(folder: Path, number: int) -> tuple[int, str, StoreSpec]:
    """What a shard says of itself: rows, checksum, kind.

    Raises:
        StoreError: its keys file cannot be read.
    """
    path = keys_path(folder, number)
    try:
        meta = pq.read_schema(path).metadata
        kind = json.loads(meta[b"identity"]), int(meta[b"width"]), meta[b"dtype"].decode()
        return int(meta[b"rows"]), meta[b"sha256"].decode(), kind
    except READ_ERRORS as error:
        raise StoreError(f"{path} is damaged ({error}); `llm2clip store repair {folder}`") from error


def read_shards(folder: Path, kind: StoreSpec | None = None) -> list[Shard]:
    """The whole shards, in the order of their numbers, by their own metadata.

    Raises:
        StoreError: a keys file cannot be read, or is not of `kind`.
    """
    shards, start = [], 0
    for number in shard_numbers(folder):
        rows, sha256, own = read_meta(folder, number)
        if kind is not None and own != kind:
            raise StoreError(
                f"{keys_path(folder, number)} is not of this store's encoder; `llm2clip store repair {folder}` drops it"
            )
        shards.append(Shard(number, start, rows, sha256))
        start += rows
    return shards


def read_keys(folder: Path, shard: Shard) -> np.ndarray:
    """The keys of a shard's rows, (rows, 16) uint8.

    Raises:
        StoreError: they cannot be read, or are not as many as the rows.
    """
    path = keys_path(folder, shard.number)
    try:
        column = pq.read_table(path, columns=["key"], page_checksum_verification=True)["key"].combine_chunks()
    except READ_ERRORS as error:
        raise StoreError(f"{path} is damaged ({error}); `llm2clip store repair {folder}`") from error
    if len(column) != shard.rows or column.type != pa.binary(16):
        raise StoreError(f"{path}: {len(column)} keys for {shard.rows} rows; `llm2clip store repair {folder}`")
    return np.frombuffer(column.buffers()[1], np.uint8)[column.offset * 16 :][: shard.rows * 16].reshape(-1, 16)


def keys_of(captions: Sequence[str]) -> np.ndarray:
    """The keys of texts, (N, 16) uint8.

    Raises:
        StoreError: one is not text: it has half of a character (a lone surrogate).
    """
    try:
        return np.frombuffer(b"".join(map(caption_key, captions)), np.uint8).reshape(-1, 16)
    except UnicodeEncodeError as error:
        raise StoreError(f"{error.object[:120]!a} is not a text: {error.reason}") from error


def check_identity(stored: dict[str, Any], ours: dict[str, Any], where: Path | str) -> None:
    """Refuse vectors of another encoder.

    Raises:
        StoreError: naming each setting that differs, with both values.
    """
    if fingerprint(stored) != fingerprint(ours):
        names = sorted(k for k in stored.keys() | ours.keys() if stored.get(k) != ours.get(k))
        differs = "; ".join(f"{k}: {stored.get(k)!r} there, {ours.get(k)!r} here" for k in names)
        raise StoreError(f"{where} was made by another encoder ({differs}). Use that encoder or another folder")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a store.

    Raises:
        StoreError: there is none, or it is not as it was written.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise StoreError(f"{folder} is not a store: it has no {MANIFEST} (run `llm2clip embed`)")
    try:
        manifest: dict[str, Any] = json.loads(file.read_text())
        shards = [Shard(**shard) for shard in manifest["shards"]]
        starts = [0, *accumulate(shard.rows for shard in shards)]
        if manifest["fingerprint"] != fingerprint(manifest["identity"]) or [s.start for s in shards] != starts[:-1]:
            raise ValueError("its parts contradict each other")
        int(manifest["width"]), DTYPES[manifest["dtype"]], int(manifest["captions"])
    except READ_ERRORS as error:
        raise StoreError(f"{file} is damaged ({error!r}); `llm2clip store repair {folder}`") from error
    return manifest


def store_spec(manifest: dict[str, Any]) -> StoreSpec:
    """What all shards of a manifest's store share."""
    return manifest["identity"], manifest["width"], manifest["dtype"]


def index_path(folder: Path, shards: Sequence[Shard]) -> Path:
    """The index of just these shards."""
    named = hashlib.sha256(repr([(s.number, s.rows, s.sha256) for s in shards]).encode())
    return folder / f"index-{named.hexdigest()[:12]}.npy"


def checksum(folder: Path, number: int) -> str:
    """SHA-256 of a shard's vectors and, where it has some, scales."""
    whole = hashlib.sha256()
    for path in (embeddings_path(folder, number), scales_path(folder, number)):
        if path.is_file():
            with path.open("rb") as f:
                whole.update(hashlib.file_digest(f, "sha256").digest())
    return whole.hexdigest()


class atomic_path:
    """`with replacing(path) as tmp`: a temporary sibling that becomes `path` if the block ends well."""

    def __init__(self, path: Path) -> None:
        self.path, self.tmp = path, path.with_name(f".{path.name}.{os.getpid()}.tmp")

    def __enter__(self) -> Path:
        self.tmp.unlink(missing_ok=True)  # of a kill: it may be a link to another store's file
        return self.tmp

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            os.replace(self.tmp, self.path)
        self.tmp.unlink(missing_ok=True)  # it stays where both were names of one file


def fsync_folder(f: IO[Any]) -> None:
    """To the disk, not only to the system."""
    f.flush()
    os.fsync(f.fileno())


def remove_temp_files(folder: Path) -> list[str]:
    """Remove what a kill left half-written; the names."""
    left = [path for pattern in (".*.tmp", ".index-*") for path in folder.glob(pattern)]
    for path in left:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return sorted(path.name for path in left)
