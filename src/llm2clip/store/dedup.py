"""Deduplication of captions before encoding, with constant memory use.

`ingest` reads a stream of captions once and writes two files to a folder:

    captions.parquet   the captions, in stream order
    wanted.bytes       one byte per caption: 1 if the caption is not a duplicate and is not in the store yet

Duplicate captions are found by an external sort of the keys; see `key_index`. Any process can then use
`PendingCaptions` to read any slice of the remaining captions. Stream order is preserved, so captions of the same image
stay together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llm2clip.store.key_index import sorted_partitions, write_records
from llm2clip.store.layout import caption_keys, iter_chunks
from llm2clip.store.store import EmbeddingStore

ROW_GROUP_SIZE = 1 << 14  # number of captions per row group, all of which are in memory at the same time
TEXTS, WANTED = "captions.parquet", "wanted.bytes"


def ingest(captions: Iterable[str], folder: Path, store: EmbeddingStore | None) -> None:
    """Write a stream of captions to `folder`, for `PendingCaptions` to read.

    Args:
        captions: Captions. They may contain duplicates.
        folder: Empty folder to write to.
        store: Existing store, or None. Captions in this store are not marked as wanted.
    """
    count = write_records(_write_captions(captions, folder, store), folder / "keys")
    wanted = _wanted(folder, "r+")
    for partition in sorted_partitions(folder / "keys", count):
        repeated = (partition[1:, :2] == partition[:-1, :2]).all(axis=1)
        wanted[partition[1:][repeated, 2].astype(np.int64)] = False


def _write_captions(
    captions: Iterable[str], folder: Path, store: EmbeddingStore | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Write the captions and their flags; yield the keys and positions of the wanted captions.

    Only duplicates within a row group are detected here.
    """
    schema = pa.schema([("text", pa.string())])
    with (
        pq.ParquetWriter(folder / TEXTS, schema, compression="zstd") as writer,
        (folder / WANTED).open("wb") as wanted_file,
    ):
        start = 0
        for texts in iter_chunks(captions, ROW_GROUP_SIZE):
            writer.write_table(pa.table({"text": texts}))
            keys = caption_keys(texts)
            wanted = np.zeros(len(texts), np.bool_)
            first_copies = np.unique(keys.view("V16")[:, 0], return_index=True)[1]
            wanted[first_copies] = True
            if store is not None:
                wanted &= store.find(keys) < 0
            wanted.tofile(wanted_file)
            positions = np.flatnonzero(wanted)
            yield keys[positions], (start + positions).astype(np.uint64)
            start += len(texts)


def _wanted(folder: Path, mode: Literal["r", "r+"]) -> np.ndarray:
    """Memory-map the wanted flags, one bool per caption in the stream."""
    file = folder / WANTED
    if file.stat().st_size == 0:  # an empty file cannot be mapped
        return np.empty(0, np.bool_)
    return np.memmap(file, np.bool_, mode)


class PendingCaptions:
    """Sequence of the wanted captions in a folder written by `ingest`, with support for slicing."""

    def __init__(self, folder: Path) -> None:
        self.texts = pq.ParquetFile(folder / TEXTS)
        self.wanted = _wanted(folder, "r")
        metadata = self.texts.metadata
        sizes = [metadata.row_group(number).num_rows for number in range(self.texts.num_row_groups)]
        self.starts = np.cumsum([0, *sizes])  # stream position of each row group
        counts = [int(self.wanted[lo:hi].sum()) for lo, hi in zip(self.starts[:-1], self.starts[1:], strict=True)]
        self.wanted_before = np.cumsum([0, *counts])  # number of wanted captions before each row group

    def close(self) -> None:
        """Close the files."""
        self.texts.close()
        self.wanted = np.empty(0, np.bool_)

    def __len__(self) -> int:
        return int(self.wanted_before[-1])

    def __getitem__(self, part: slice) -> list[str]:
        """Return a slice of the captions, in stream order."""
        start, stop, _ = part.indices(len(self))
        first_group = int(np.searchsorted(self.wanted_before, start, side="right")) - 1
        captions: list[str] = []
        for group in range(first_group, len(self.starts) - 1):
            if self.wanted_before[group] >= stop:
                break
            texts = self.texts.read_row_group(group)["text"]
            wanted = self.wanted[self.starts[group] : self.starts[group + 1]]
            captions += texts.filter(pa.array(wanted)).to_pylist()
        offset = start - int(self.wanted_before[first_group])
        return captions[offset : offset + stop - start]
