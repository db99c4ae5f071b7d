"""Preparation of a store before captions are encoded, and finalization afterwards, for any number of processes.

The main process reads the captions once, and writes the captions without an embedding to a folder:

    store/.incoming/
      captions.parquet   all captions, in input order; deleted when all duplicates are known
      keys               keys of the captions, for the external sort that finds duplicates; see `key_index`
      00012.parquet      captions of the missing shard 12

Input order is preserved, so captions of the same image stay together. Apart from the captions of a few shards, memory
holds only one byte per caption.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llm2clip.data.texts import check_texts
from llm2clip.progress import ProgressBar
from llm2clip.runs.output_folder import folder_lock
from llm2clip.runs.ranks import process_state, wait_for_everyone
from llm2clip.store.key_index import repeats_previous_key, sorted_partitions, write_records
from llm2clip.store.layout import caption_keys, iter_chunks, next_shard_number, remove_temp_files, shard_numbers
from llm2clip.store.store import EmbeddingStore, refused_captions
from llm2clip.store.writer import StoreWriter

CHUNK = 1 << 14  # number of captions to hash at once
TEXTS = "captions.parquet"


@dataclass(frozen=True)
class WritePlan:
    """Shards that are missing from a store.

    Attributes:
        writer: Writer that adds shards to the store.
        incoming: Folder with the captions of the missing shards.
        shards: Numbers of the missing shards.
    """

    writer: StoreWriter
    incoming: Path
    shards: list[int]

    def local_shards(self) -> list[int]:
        """List the shards that this process must write: every n-th shard if there are n processes."""
        state = process_state()
        return self.shards[state.process_index :: state.num_processes]

    def read_captions(self, shard: int) -> list[str]:
        """Read the captions of a missing shard."""
        captions: list[str] = pq.read_table(shard_file(self.incoming, shard))["text"].to_pylist()
        return captions

    def progress_bar(self, description: str, unit: str) -> ProgressBar:
        """Create a progress bar for the captions of all local shards. Only the main process shows the bar."""
        total = sum(pq.read_metadata(shard_file(self.incoming, shard)).num_rows for shard in self.local_shards())
        hide = not process_state().is_main_process or not total
        return ProgressBar(total=total, desc=description, unit=unit, disable=hide)


@contextmanager
def open_for_writing(
    captions: Iterable[str],
    folder: str | Path,
    identity: dict[str, Any],
    embed_dim: int,
    *,
    dtype: str,
    shard_size: int,
) -> Iterator[WritePlan]:
    """Read the captions and yield a plan of the missing shards. On success, write the manifest and the index.

    All processes must enter and leave this context together. The main process locks the store, verifies the existing
    shards and deduplicates the captions. Captions that are already in the store, or that the tokenizer could not
    encode, are skipped.

    Args:
        captions: Texts or image names, possibly with duplicates. Only the main process reads them, and only once.
        folder: Folder of the store. It is created if it does not exist.
        identity: Everything about the encoder that affects the embeddings; see `fingerprint`.
        embed_dim: Dimension of the embeddings.
        dtype: dtype of the stored embeddings: float16, float32 or int8.
        shard_size: Number of captions per shard.

    Raises:
        TypeError, ValueError: A caption is not a string or not valid Unicode.
        StoreError: The store is damaged or was created with a different encoder.
        FolderInUseError: Another run is writing to the store.
    """
    state, folder = process_state(), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    incoming = folder / ".incoming"
    with folder_lock(folder) if state.is_main_process else nullcontext():
        with state.main_process_first():
            writer = StoreWriter(folder, identity, embed_dim, dtype)
        if state.is_main_process:
            _prepare_incoming(writer, captions, incoming, shard_size)
        wait_for_everyone()
        shards = sorted(int(path.stem) for path in incoming.glob("[0-9]*.parquet"))
        yield WritePlan(writer, incoming, shards)
        wait_for_everyone()
        if state.is_main_process:
            writer.finish()
            shutil.rmtree(incoming, ignore_errors=True)  # open files may remain on network file systems
        wait_for_everyone()


def _prepare_incoming(writer: StoreWriter, captions: Iterable[str], incoming: Path, shard_size: int) -> None:
    """Clean up after an interrupted run, verify the existing shards, and write the captions of the missing shards."""
    folder = writer.folder
    shutil.rmtree(incoming, ignore_errors=True)
    incoming.mkdir(exist_ok=True)
    remove_temp_files(folder)
    writer.finish()
    store = None
    if shard_numbers(folder):
        store = EmbeddingStore(folder)
        store.verify(progress=True)
    refused = {row["caption"] for row in refused_captions(folder)}
    stream: Iterable[str] = check_texts(ProgressBar(captions, "read", unit="caption", leave=False, delay=1))
    if refused:
        stream = (caption for caption in stream if caption not in refused)
    write_missing_shards(stream, incoming, store, shard_size, next_shard_number(folder))


# ---- deduplication -------------------------------------------------------------------------------------------------


def write_missing_shards(
    captions: Iterable[str], incoming: Path, store: EmbeddingStore | None, shard_size: int, first_shard: int
) -> None:
    """Write the captions that have no embedding yet to one file per shard.

    Args:
        captions: Captions, possibly with duplicates.
        incoming: Empty folder to write to.
        store: Existing store, whose captions are skipped, or None.
        shard_size: Number of captions per shard.
        first_shard: Number of the first missing shard. The following shards are numbered consecutively.
    """
    is_missing: list[np.ndarray] = []  # one boolean mask per chunk of captions
    count = write_records(_write_captions(captions, incoming / TEXTS, store, is_missing), incoming / "keys")
    mask = np.concatenate([np.empty(0, np.bool_), *is_missing])
    for partition in sorted_partitions(incoming / "keys", count):
        mask[partition[repeats_previous_key(partition), 2].astype(np.int64)] = False
    for number, texts in enumerate(iter_chunks(_select_captions(incoming / TEXTS, mask), shard_size), first_shard):
        pq.write_table(pa.table({"text": texts}), shard_file(incoming, number), compression="zstd")
    (incoming / TEXTS).unlink()


def shard_file(incoming: Path, shard: int) -> Path:
    return incoming / f"{shard:05d}.parquet"


def _write_captions(
    captions: Iterable[str], file: Path, store: EmbeddingStore | None, is_missing: list[np.ndarray]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Write all captions to a file; yield the keys and positions of the captions that are missing from the store.

    For each chunk, a boolean mask of the missing captions is appended to `is_missing`. Duplicates are detected only
    within a chunk; `write_missing_shards` finds all others.
    """
    with pq.ParquetWriter(file, pa.schema([("text", pa.string())]), compression="zstd") as writer:
        start = 0
        for texts in iter_chunks(captions, CHUNK):
            writer.write_table(pa.table({"text": texts}))
            keys = caption_keys(texts)
            mask = np.zeros(len(texts), np.bool_)
            mask[np.unique(keys.view("V16")[:, 0], return_index=True)[1]] = True
            if store is not None:
                mask &= store.find_keys(keys) < 0
            is_missing.append(mask)
            positions = np.flatnonzero(mask)
            yield keys[positions], (start + positions).astype(np.uint64)
            start += len(texts)


def _select_captions(file: Path, mask: np.ndarray) -> Iterator[str]:
    """Yield the captions in a Parquet file that a boolean mask selects."""
    start = 0
    with pq.ParquetFile(file) as captions:
        for batch in captions.iter_batches(CHUNK):
            yield from batch["text"].filter(pa.array(mask[start : start + len(batch)])).to_pylist()
            start += len(batch)
