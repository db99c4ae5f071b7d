"""The store: every caption of a data set encoded once, by one encoder. `format` says how it lies on the disk.

Reading it: `rows` finds captions, `take` gives their vectors, in any order at the speed of the disk.
"""

from __future__ import annotations

import filecmp
import os
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm.auto import tqdm

from llm2clip.io_utils import read_jsonl
from llm2clip.store.key_index import KeyIndex, build_key_index
from llm2clip.store.layout import (
    DTYPES,
    READ_ERRORS,
    Shard,
    StoreError,
    StoreSpec,
    checksum,
    index_path,
    keys_of,
    read_keys,
    read_manifest,
    read_meta,
    store_spec,
)
from llm2clip.store.readers import MmapReader, PreadReader, RowReader, available_memory

Reading = Literal["auto", "map", "positional"]


class EmbeddingStore:
    """Read access to a store that `llm2clip embed` has finished. Workers and other processes open their own: nothing
    is copied to them but the folder's name."""

    def __init__(self, folder: str | Path, reading: Reading = "auto") -> None:
        """Open the store at `folder`; its keys and vectors stay on the disk.

        Args:
            folder: of the store.
            reading: vectors through memory maps, or by positional reads; auto maps what takes less than half of the
                memory that is free.

        Raises:
            StoreError: there is no finished store, or a shard is missing or has the wrong size.
        """
        self.folder, self.reading = Path(folder), reading
        self.manifest: dict[str, Any] = read_manifest(self.folder)
        self.width: int = self.manifest["width"]
        self.shards = [Shard(**shard) for shard in self.manifest["shards"]]
        if reading == "auto":
            size = sum(s.rows for s in self.shards) * self.width * DTYPES[self.manifest["dtype"]].itemsize
            reading = "map" if size < available_memory() / 2 else "positional"
        kind: type[RowReader] = MmapReader if reading == "map" else PreadReader
        self._rows = kind(self.folder, self.shards, self.width, self.manifest["dtype"])
        self._index = self._open_index()

    def _open_index(self) -> KeyIndex:
        file = index_path(self.folder, self.shards)
        if file.is_file():
            try:
                index = KeyIndex(file)
                if len(index) == sum(s.rows for s in self.shards):
                    return index
            except READ_ERRORS:
                pass  # damaged: it is made again
        build_key_index(file, (read_keys(self.folder, shard) for shard in self.shards))
        return KeyIndex(file)

    def __reduce__(self) -> tuple[type[EmbeddingStore], tuple[Path, Reading]]:
        return EmbeddingStore, (self.folder, self.reading)

    def __len__(self) -> int:
        """How many different captions it holds."""
        return int(self.manifest["captions"])

    def __contains__(self, caption: str) -> bool:
        return bool(self.find(keys_of([caption]))[0] >= 0)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The rows of keys, (N, 16) uint8, as int64 (N,); -1 for one that it does not hold."""
        return self._index.find(keys)

    def rows(self, captions: Iterable[str]) -> np.ndarray:
        """The rows of captions, int64 (N,).

        Raises:
            StoreError: a caption was never encoded; the message quotes it.
        """
        captions, found = iter(captions), [np.empty(0, np.int64)]
        while some := list(islice(captions, 1 << 18)):
            rows = self.find(keys_of(some))
            if (rows < 0).any():
                absent = some[int((rows < 0).argmax())]
                raise StoreError(f"{self.folder} has no vector for the caption {absent[:120]!r}; run `llm2clip embed`")
            found.append(rows)
        return np.concatenate(found)

    def take(self, rows: np.ndarray | Sequence[int]) -> np.ndarray:
        """The vectors of some rows, float32 (N, width), in the order asked.

        Raises:
            IndexError: there is no such row.
        """
        return self._rows.take(np.asarray(rows, dtype=np.int64))

    def verify(self, progress: bool = False) -> None:
        """Read every shard and compare its checksum, and make the index again.

        Raises:
            StoreError: naming the shards whose bytes are not those that were written, or the index.
        """
        if damaged := damaged_shards(self.folder, self.shards, store_spec(self.manifest), progress):
            names = ", ".join(f"{n:05d}" for n in damaged)
            raise StoreError(f"{self.folder}: damaged shards {names}; `llm2clip store repair {self.folder}` drops them")
        index = index_path(self.folder, self.shards)
        beside = self.folder if os.access(self.folder, os.W_OK) else None
        with tempfile.TemporaryDirectory(prefix=".index-", dir=beside) as temporary:
            again = Path(temporary) / index.name
            build_key_index(again, (read_keys(self.folder, shard) for shard in self.shards))
            if not filecmp.cmp(index, again, shallow=False):
                raise StoreError(f"{index} is damaged; `llm2clip store repair {self.folder}` makes it again")


def refused_rows(folder: Path) -> list[dict[str, Any]]:
    """The captions that the tokenizer refused when the store was filled, with why: it has no vectors of them."""
    return [row for file in sorted(folder.glob("refused-*.jsonl")) for _, row in read_jsonl(file)]


def refused_captions(folder: Path) -> set[str]:
    """The same without why."""
    return {row["caption"] for row in refused_rows(folder)}


def damaged_shards(folder: Path, shards: Sequence[Shard], kind: StoreSpec, progress: bool = False) -> list[int]:
    """Numbers of the shards whose bytes are not those that were written, that are of another kind, or not there."""

    def sound(shard: Shard) -> bool:
        try:
            rows, sha256, own = read_meta(folder, shard.number)
            said = (rows, sha256, own) == (shard.rows, shard.sha256, kind)
            return said and checksum(folder, shard.number) == sha256 and len(read_keys(folder, shard)) == rows
        except READ_ERRORS:
            return False

    with ThreadPoolExecutor(4) as pool:
        results = tqdm(
            pool.map(sound, shards), "verify", len(shards), unit="shard", disable=not progress, delay=1, leave=False
        )
        return [shard.number for shard, good in zip(shards, results, strict=True) if not good]
