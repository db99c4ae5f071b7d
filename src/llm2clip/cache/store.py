"""The store: every caption of a data set encoded once, by one encoder.

    store/
      manifest.json          identity of the encoder, width, dtype, caption count, shards with row ranges and checksums
      keys-00000.parquet     caption key -> row, and the number of tokens; the shard's own checksum in its metadata
      embeddings-00000.npy   (rows, width) float16, C order

A shard is written to a temporary name, flushed to disk and renamed; its keys come last, so a shard with keys is whole.
The shards are the truth and the manifest is their summary: after a kill it is made again from them. Rows are found by
the hash of the caption's text, never by position, so data may be reordered, extended or filtered under a store.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llm2clip.data.captions import caption_key
from llm2clip.models.text import fingerprint

DTYPE = np.dtype("float16")


class StoreError(ValueError):
    """The store is damaged, is another encoder's, or lacks a caption."""


class EmbeddingStore:
    """Read access to a finished store: `rows` finds captions, `take` reads their vectors."""

    def __init__(self, folder: str | Path) -> None:
        """Open the store at `folder`; its vectors stay on disk and are read as they are asked for.

        Raises:
            StoreError: there is no finished store, or a shard is missing or has the wrong size.
        """
        self.folder = Path(folder)
        manifest = self.folder / "manifest.json"
        if not manifest.is_file():
            raise StoreError(f"{self.folder} is not a store: it has no manifest.json (run `llm2clip embed`)")
        self.manifest: dict[str, Any] = json.loads(manifest.read_text())
        self.width: int = self.manifest["width"]
        self._row: dict[str, int] = {}
        self._arrays: list[np.ndarray] = []
        self._starts: list[int] = []
        self._rows = 0
        for shard in self.manifest["shards"]:
            keys, embeddings = _shard_paths(self.folder, shard["number"])
            if not keys.is_file() or not embeddings.is_file():
                raise StoreError(f"{self.folder}: shard {shard['number']} is missing; run `llm2clip embed` again")
            array = np.load(embeddings, mmap_mode="r", allow_pickle=False)
            if array.shape != (shard["rows"], self.width) or array.dtype != DTYPE:
                raise StoreError(f"{embeddings}: holds {array.dtype} {array.shape}, not what the manifest says")
            names = pq.read_table(keys, columns=["key"])["key"].to_pylist()
            if len(names) != len(array):
                raise StoreError(
                    f"{keys}: {len(names)} keys for {len(array)} rows; delete both and run `llm2clip embed`"
                )
            self._starts.append(self._rows)
            for row, key in enumerate(names, start=self._rows):
                self._row.setdefault(key, row)  # two runs at once may have encoded a caption twice: either will do
            self._rows += len(names)
            self._arrays.append(array)

    def __len__(self) -> int:
        return len(self._row)

    def __contains__(self, caption: str) -> bool:
        return caption_key(caption) in self._row

    def rows(self, captions: Iterable[str]) -> np.ndarray:
        """The rows of captions, int64 (N,).

        Raises:
            StoreError: a caption was never encoded; the message quotes it.
        """
        found = []
        for caption in captions:
            row = self._row.get(caption_key(caption))
            if row is None:
                raise StoreError(f"{self.folder} has no vector for the caption {caption[:120]!r}; run `llm2clip embed`")
            found.append(row)
        return np.asarray(found, dtype=np.int64)

    def take(self, rows: np.ndarray | Sequence[int]) -> np.ndarray:
        """The vectors of some rows, float32 (N, width), in the order asked. Reads each shard in order of position."""
        rows = np.asarray(rows, dtype=np.int64)
        out = np.empty((len(rows), self.width), dtype=np.float32)
        order = np.argsort(rows, kind="stable")
        bounds = np.searchsorted(rows[order], [*self._starts, self._rows])
        for array, start, lo, hi in zip(self._arrays, self._starts, bounds[:-1], bounds[1:], strict=True):
            at = order[lo:hi]
            out[at] = array[rows[at] - start]
        return out

    def verify(self) -> None:
        """Read every shard and compare its checksum.

        Raises:
            StoreError: a shard's bytes are not those that were written.
        """
        for shard in self.manifest["shards"]:
            _, embeddings = _shard_paths(self.folder, shard["number"])
            if _checksum(embeddings) != shard["sha256"]:
                raise StoreError(f"{embeddings} is damaged: delete it and run `llm2clip embed` again")


class StoreWriter:
    """Adds shards to a store. Several processes may write shards of different numbers at once; one then finishes."""

    def __init__(self, folder: str | Path, identity: dict[str, Any], width: int) -> None:
        """Create the store at `folder`, or go on with it.

        Raises:
            StoreError: the store there was made by another encoder; the message names what differs.
        """
        self.folder = Path(folder)
        self.identity = identity
        self.width = width
        self.folder.mkdir(parents=True, exist_ok=True)
        manifest = self.folder / "manifest.json"
        if manifest.is_file():
            check_identity(json.loads(manifest.read_text())["identity"], identity, self.folder)
        elif self.numbers():
            raise StoreError(f"{self.folder} has shards but no manifest.json; delete it or choose another folder")
        else:
            self.finish()

    def numbers(self) -> list[int]:
        """Numbers of the whole shards, sorted."""
        found = (re.fullmatch(r"keys-(\d{5,})\.parquet", p.name) for p in self.folder.iterdir())
        return sorted(int(m[1]) for m in found if m and _shard_paths(self.folder, int(m[1]))[1].is_file())

    def keys(self) -> set[str]:
        """Keys of all captions that whole shards hold."""
        tables = (pq.read_table(_shard_paths(self.folder, n)[0], columns=["key"]) for n in self.numbers())
        return {key for table in tables for key in table["key"].to_pylist()}

    def write(self, number: int, captions: Sequence[str], tokens: Sequence[int], embeddings: np.ndarray) -> None:
        """Write one shard, whole or not at all.

        Args:
            number: of the shard; not one that is there.
            captions: N texts.
            tokens: N lengths in tokens, kept for planning and for curves against length.
            embeddings: (N, width) floats; stored in float16.

        Raises:
            StoreError: a value is not finite in float16.
        """
        half = np.ascontiguousarray(embeddings, dtype=DTYPE)
        if not np.isfinite(half).all():
            bad = int(np.flatnonzero(~np.isfinite(half).all(axis=1))[0])
            raise StoreError(f"the vector of {captions[bad][:120]!r} does not fit float16; is the encoder broken?")
        keys_path, embeddings_path = _shard_paths(self.folder, number)
        with _replacing(embeddings_path) as tmp, tmp.open("wb") as f:
            np.save(f, half, allow_pickle=False)
            _sync(f)
        table = pa.table({"key": [caption_key(c) for c in captions], "tokens": pa.array(tokens, pa.int32())})
        meta = {"sha256": _checksum(embeddings_path), "rows": str(len(captions))}
        with _replacing(keys_path) as tmp, tmp.open("wb") as f:
            pq.write_table(table.replace_schema_metadata(meta), f)
            _sync(f)

    def finish(self) -> None:
        """Write the manifest from the shards that are there."""
        shards, start = [], 0
        for number in self.numbers():
            meta = pq.read_schema(_shard_paths(self.folder, number)[0]).metadata
            rows = int(meta[b"rows"])
            shards.append({"number": number, "start": start, "rows": rows, "sha256": meta[b"sha256"].decode()})
            start += rows
        manifest = {
            "fingerprint": fingerprint(self.identity),
            "identity": self.identity,
            "width": self.width,
            "dtype": DTYPE.name,
            "captions": start,
            "shards": shards,
        }
        with _replacing(self.folder / "manifest.json") as tmp, tmp.open("w") as f:
            json.dump(manifest, f, indent=1)
            _sync(f)


def check_identity(stored: dict[str, Any], ours: dict[str, Any], where: Path | str) -> None:
    """Refuse vectors of another encoder.

    Raises:
        StoreError: naming each setting that differs, with both values.
    """
    if fingerprint(stored) != fingerprint(ours):
        names = sorted(k for k in stored.keys() | ours.keys() if stored.get(k) != ours.get(k))
        differs = "; ".join(f"{k}: {stored.get(k)!r} there, {ours.get(k)!r} here" for k in names)
        raise StoreError(f"{where} was made by another encoder ({differs}). Use that encoder or another folder")


class _replacing:
    """`with _replacing(path) as tmp`: a temporary sibling that becomes `path` if the block ends well."""

    def __init__(self, path: Path) -> None:
        self.path, self.tmp = path, path.with_name(f".{path.name}.{os.getpid()}.tmp")

    def __enter__(self) -> Path:
        return self.tmp

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            os.replace(self.tmp, self.path)
        else:
            self.tmp.unlink(missing_ok=True)


def _sync(f: Any) -> None:
    f.flush()
    os.fsync(f.fileno())


def _shard_paths(folder: Path, number: int) -> tuple[Path, Path]:
    return folder / f"keys-{number:05d}.parquet", folder / f"embeddings-{number:05d}.npy"


def _checksum(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
