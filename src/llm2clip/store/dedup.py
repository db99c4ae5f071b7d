"""Captions on their way into a store: any number of them, each kept once, in memory that does not grow with them.

They come as a stream, once. Their texts go to a file, row group by row group; their keys, with their places in the
stream, into parts by the keys' first bits, so that equal ones meet. What remains is one byte a caption on the disk:
whether it is the first of its text and new to the store. The order of the stream is kept, so that captions of one image
stay neighbours, and any process can read any shard of what remains.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llm2clip.store.key_index import sorted_partitions, write_records
from llm2clip.store.layout import keys_of
from llm2clip.store.store import EmbeddingStore

T = TypeVar("T")
GROUP = 1 << 14  # captions in a row group, and held in memory
TEXTS, WANTED = "captions.parquet", "wanted.bytes"


def ingest(captions: Iterable[str], folder: Path, store: EmbeddingStore | None) -> None:
    """Read a stream of captions into `folder`, for `Incoming`.

    Args:
        captions: texts, repeated or not.
        folder: an empty one.
        store: what it holds already is not wanted again.
    """

    def keys() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        start = 0
        with (
            pq.ParquetWriter(folder / TEXTS, pa.schema([("text", pa.string())]), compression="zstd") as writer,
            (folder / WANTED).open("wb") as wanted,
        ):
            for group in iter_groups(captions, GROUP):
                writer.write_table(pa.table({"text": group}))
                names = keys_of(group)
                new = np.ones(len(group), np.bool_) if store is None else store.find(names) < 0
                first = np.unique(names.view("V16")[:, 0], return_index=True)[1]
                new &= np.bincount(first, minlength=len(group)).astype(np.bool_)
                new.tofile(wanted)
                places = np.flatnonzero(new)
                yield names[places], (start + places).astype(np.uint64)
                start += len(group)

    count = write_records(keys(), folder / "keys")
    wanted = _flags(folder, "r+")
    for part in sorted_partitions(folder / "keys", count):
        repeated = (part[1:, :2] == part[:-1, :2]).all(axis=1)
        wanted[part[1:][repeated, 2].astype(np.int64)] = False


def _flags(folder: Path, mode: Literal["r", "r+"]) -> np.ndarray:
    """A byte for each caption that came: whether it is wanted."""
    file = folder / WANTED
    return np.memmap(file, np.bool_, mode) if file.stat().st_size else np.empty(0, np.bool_)


class PendingCaptions:
    """The captions that are wanted, of a folder that `receive` has filled."""

    def __init__(self, folder: Path) -> None:
        self.texts = pq.ParquetFile(folder / TEXTS)
        self.wanted = _flags(folder, "r")
        sizes = [self.texts.metadata.row_group(n).num_rows for n in range(self.texts.num_row_groups)]
        self.starts = np.cumsum([0, *sizes])
        counts = [int(self.wanted[a:b].sum()) for a, b in zip(self.starts[:-1], self.starts[1:], strict=True)]
        self.before = np.cumsum([0, *counts])

    def close(self) -> None:
        """Let go of the files."""
        self.texts.close()
        self.wanted = np.empty(0, np.bool_)

    def __len__(self) -> int:
        return int(self.before[-1])

    def __getitem__(self, part: slice) -> list[str]:
        """Some of them, in the order in which they came."""
        start, stop, _ = part.indices(len(self))
        first = int(np.searchsorted(self.before, start, side="right")) - 1
        found: list[str] = []
        for n in range(first, len(self.starts) - 1):
            if self.before[n] >= stop:
                break
            texts = self.texts.read_row_group(n)["text"]
            found += texts.filter(pa.array(self.wanted[self.starts[n] : self.starts[n + 1]])).to_pylist()
        return found[start - int(self.before[first]) :][: stop - start]


def iter_groups(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last perhaps shorter."""
    rest = iter(items)
    while group := list(islice(rest, size)):
        yield group
