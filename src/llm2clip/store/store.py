"""Read access to an embedding store, which contains an embedding of every caption in a data set.

`EmbeddingStore.find_rows` looks up the row numbers of captions, and `EmbeddingStore.take` reads the embeddings in
these rows. The files in a store are described in `layout`.
"""

from __future__ import annotations

import dataclasses
import filecmp
import os
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llm2clip.data.columns import TEXT_FIELDS
from llm2clip.data.records import Record
from llm2clip.io_utils import read_jsonl
from llm2clip.progress import ProgressBar
from llm2clip.runs.ranks import print_once
from llm2clip.store.key_index import KeyIndex, build_key_index
from llm2clip.store.layout import (
    DTYPES,
    READ_ERRORS,
    Shard,
    StoreError,
    StoreSpec,
    caption_keys,
    index_path,
    iter_chunks,
    read_keys,
    read_manifest,
    read_shard_metadata,
    shard_checksum,
    store_spec,
)
from llm2clip.store.readers import MmapReader, PreadReader, RowReader, available_memory

ReadMode = Literal["auto", "mmap", "pread"]
LOOKUP_CHUNK = 1 << 18  # number of captions to hash and look up at once


class EmbeddingStore:
    """Read access to a complete store.

    Only the folder and the read mode are pickled. Worker processes reopen the store.
    """

    def __init__(self, folder: str | Path, read_mode: ReadMode = "auto") -> None:
        """Open the store at `folder`. Keys and embeddings stay on disk.

        Args:
            folder: Folder of the store.
            read_mode: "mmap" reads embeddings through memory maps, and "pread" uses positional reads. "auto" selects
                "mmap" if the embeddings take less than half of the available memory, and "pread" otherwise.

        Raises:
            StoreError: The folder does not contain a complete store, or a shard is missing or has the wrong size.
        """
        self.folder, self.read_mode = Path(folder), read_mode
        self.manifest: dict[str, Any] = read_manifest(self.folder)
        self.embed_dim: int = self.manifest["embed_dim"]
        self.shards = [Shard(**shard) for shard in self.manifest["shards"]]
        self._total_rows = sum(shard.rows for shard in self.shards)
        dtype = self.manifest["dtype"]
        if read_mode == "auto":
            size = self._total_rows * self.embed_dim * DTYPES[dtype].itemsize
            read_mode = "mmap" if size < available_memory() / 2 else "pread"
        reader_class: type[RowReader] = MmapReader if read_mode == "mmap" else PreadReader
        self._reader = reader_class(self.folder, self.shards, self.embed_dim, dtype)
        self._index = self._open_index()

    def _open_index(self) -> KeyIndex:
        """Open the key index; build it if it is missing or damaged."""
        file = index_path(self.folder, self.shards)
        if file.is_file():
            try:
                index = KeyIndex(file)
                if len(index) == self._total_rows:
                    return index
            except READ_ERRORS:
                pass  # the index is damaged; it is rebuilt below
        build_key_index(file, (read_keys(self.folder, shard) for shard in self.shards))
        return KeyIndex(file)

    def __reduce__(self) -> tuple[type[EmbeddingStore], tuple[Path, ReadMode]]:
        return EmbeddingStore, (self.folder, self.read_mode)

    def __len__(self) -> int:
        """Return the number of distinct captions."""
        return int(self.manifest["captions"])

    def __contains__(self, caption: str) -> bool:
        return bool(self.find_keys(caption_keys([caption]))[0] >= 0)

    def find_keys(self, keys: np.ndarray) -> np.ndarray:
        """Look up keys of shape (N, 16), uint8; return row numbers of shape (N,), int64, with -1 for missing keys."""
        return self._index.find_keys(keys)

    def find_rows(self, captions: Iterable[str]) -> np.ndarray:
        """Look up N captions; return their row numbers, of shape (N,), int64.

        Raises:
            StoreError: A caption is not in the store. The message quotes the caption.
        """
        parts = [np.empty(0, np.int64)]
        for chunk in iter_chunks(captions, LOOKUP_CHUNK):
            rows = self.find_keys(caption_keys(chunk))
            missing = rows < 0
            if missing.any():
                caption = chunk[int(missing.argmax())]
                raise StoreError(
                    f"{self.folder} has no embedding for the caption {caption[:120]!r}. Run `llm2clip embed`"
                )
            parts.append(rows)
        return np.concatenate(parts)

    def take(self, rows: np.ndarray | Sequence[int]) -> np.ndarray:
        """Read the embeddings in N rows; return them in the same order, of shape (N, embed_dim), float32.

        Raises:
            IndexError: A row number is out of range.
        """
        return self._reader.take(np.asarray(rows, dtype=np.int64))

    def verify(self, progress: bool = False) -> None:
        """Verify the checksum of every shard, and compare the index with a rebuilt index.

        Raises:
            StoreError: Shards or the index are damaged. The message names the damaged shards or the index file.
        """
        damaged = find_damaged_shards(self.folder, self.shards, store_spec(self.manifest), progress)
        if damaged:
            numbers = ", ".join(f"{number:05d}" for number in damaged)
            raise StoreError(
                f"{self.folder} has damaged shards: {numbers}. Run `llm2clip store repair {self.folder}` to delete them"
            )
        index = index_path(self.folder, self.shards)
        parent = self.folder if os.access(self.folder, os.W_OK) else None
        with tempfile.TemporaryDirectory(prefix=".index-", dir=parent) as temporary:
            rebuilt = Path(temporary) / index.name
            build_key_index(rebuilt, (read_keys(self.folder, shard) for shard in self.shards))
            if not filecmp.cmp(index, rebuilt, shallow=False):
                raise StoreError(f"{index} is damaged. Run `llm2clip store repair {self.folder}` to rebuild the index")


def find_damaged_shards(folder: Path, shards: Sequence[Shard], spec: StoreSpec, progress: bool = False) -> list[int]:
    """List the numbers of the shards that are missing, have a wrong checksum, or have a different spec."""

    def is_intact(shard: Shard) -> bool:
        try:
            metadata = read_shard_metadata(folder, shard.number)
            return (
                metadata == (shard.rows, shard.sha256, spec)
                and shard_checksum(folder, shard.number) == shard.sha256
                and len(read_keys(folder, shard)) == shard.rows
            )
        except READ_ERRORS:
            return False

    with ThreadPoolExecutor(4) as pool:
        results = ProgressBar(
            pool.map(is_intact, shards),
            desc="verify",
            total=len(shards),
            unit="shard",
            disable=not progress,
            delay=1,
            leave=False,
        )
        return [shard.number for shard, intact in zip(shards, results, strict=True) if not intact]


# ---- captions without an embedding ---------------------------------------------------------------------------------


def drop_refused_captions(records: Sequence[Record], store: EmbeddingStore) -> list[Record]:
    """Remove captions that have no embedding because the tokenizer could not encode them.

    Records without remaining captions are dropped.
    """
    refused = {row["caption"] for row in refused_captions(store.folder)}
    if not refused:
        return list(records)
    remaining = []
    for record in records:
        captions: dict[str, Any] = {}
        for field in TEXT_FIELDS:
            captions[field] = tuple(caption for caption in getattr(record, field) if caption not in refused)
        record = dataclasses.replace(record, **captions)
        if record.texts:
            remaining.append(record)
    return remaining


def remove_phrases_without_embedding(records: Sequence[Record], store: EmbeddingStore) -> list[Record]:
    """Remove phrases without an embedding. Print a message if the store has no embedding of any phrase.

    A phrase may have no embedding because it occurred in too few images of the data used for the store.
    """
    phrases = sorted({phrase for record in records for phrase in record.phrases})
    is_stored = store.find_keys(caption_keys(phrases)) >= 0
    if phrases and not is_stored.any():
        print_once(
            f"No short phrases are used: {store.folder} has no embeddings of them. To add them, run `llm2clip embed` "
            "with --phrases true"
        )
    missing = {phrase for phrase, stored in zip(phrases, is_stored, strict=True) if not stored}
    if not missing:
        return list(records)
    return [
        dataclasses.replace(record, phrases=tuple(phrase for phrase in record.phrases if phrase not in missing))
        for record in records
    ]


def refused_captions(folder: Path) -> list[dict[str, Any]]:
    """Read the captions that the tokenizer could not encode, as dicts with the keys "caption" and "why"."""
    return [row for file in sorted(folder.glob("refused-*.jsonl")) for _, row in read_jsonl(file)]
