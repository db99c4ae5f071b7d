"""Deduplication of a stream of captions before they are encoded, with memory that does not grow with their number.

`ingest` reads the stream once and writes to a folder:

    captions.parquet   the texts, in the order of the stream
    wanted.bytes       one byte per caption: 1 if it is the first copy of its text and the store does not have it yet

Equal captions are found by an external sort of the keys, see `key_index`. `PendingCaptions` then reads any slice of the
captions that are left, from any process. The order of the stream is kept: captions of the same image stay together.
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

ROW_GROUP_SIZE = 1 << 14  # captions per row group, and in memory
TEXTS, WANTED = "captions.parquet", "wanted.bytes"


def ingest(captions: Iterable[str], folder: Path, store: EmbeddingStore | None) -> None:
    """Read a stream of captions into `folder`, for `PendingCaptions`.

    Args:
        captions: Texts, with or without duplicates.
        folder: An empty folder.
        store: Captions in this store are not wanted again.
    """
    count = write_records(_write_captions(captions, folder, store), folder / "keys")
    wanted = _wanted(folder, "r+")
    for partition in sorted_partitions(folder / "keys", count):
        repeated = (partition[1:, :2] == partition[:-1, :2]).all(axis=1)
        wanted[partition[1:][repeated, 2].astype(np.int64)] = False


def _write_captions(
    captions: Iterable[str], folder: Path, store: EmbeddingStore | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Write the texts, and which are wanted as far as a row group can show; yield keys and positions of the wanted."""
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
    """Map the wanted flags: one bool per caption of the stream."""
    file = folder / WANTED
    if file.stat().st_size == 0:  # an empty file cannot be mapped
        return np.empty(0, np.bool_)
    return np.memmap(file, np.bool_, mode)


class PendingCaptions:
    """The wanted captions in a folder that `ingest` has filled, as a sequence that supports slices."""

    def __init__(self, folder: Path) -> None:
        self.texts = pq.ParquetFile(folder / TEXTS)
        self.wanted = _wanted(folder, "r")
        metadata = self.texts.metadata
        sizes = [metadata.row_group(number).num_rows for number in range(self.texts.num_row_groups)]
        self.starts = np.cumsum([0, *sizes])  # of each row group in the stream
        counts = [int(self.wanted[lo:hi].sum()) for lo, hi in zip(self.starts[:-1], self.starts[1:], strict=True)]
        self.wanted_before = np.cumsum([0, *counts])  # wanted captions before each row group

    def close(self) -> None:
        """Close the files."""
        self.texts.close()
        self.wanted = np.empty(0, np.bool_)

    def __len__(self) -> int:
        return int(self.wanted_before[-1])

    def __getitem__(self, part: slice) -> list[str]:
        """Return a slice of the captions, in the order of the stream."""
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
