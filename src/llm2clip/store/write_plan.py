"""Preparation of a store before captions are encoded, and its finalization afterwards, for any number of processes."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm2clip.data.valid_text import check_texts
from llm2clip.progress import ProgressBar
from llm2clip.runs.lock import folder_lock
from llm2clip.runs.ranks import process_state, wait_for_everyone
from llm2clip.store.dedup import PendingCaptions, ingest
from llm2clip.store.layout import next_shard_number, remove_temp_files, shard_numbers
from llm2clip.store.store import EmbeddingStore, refused_captions
from llm2clip.store.writer import StoreWriter


@dataclass(frozen=True)
class WritePlan:
    """The shards that are missing from a store.

    Attributes:
        writer: Writer that adds shards to the store.
        incoming: Folder with the captions to encode, for `PendingCaptions`.
        shards: A tuple (shard number, slice of the pending captions) for each missing shard.
    """

    writer: StoreWriter
    incoming: Path
    shards: list[tuple[int, slice]]

    def local_shards(self) -> list[tuple[int, slice]]:
        """Return the shards that this process must write: every n-th shard if there are n processes."""
        state = process_state()
        return self.shards[state.process_index :: state.num_processes]


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
        captions: Texts or image names. They may contain duplicates. Only the main process reads them, and only once.
        folder: Folder of the store.
        identity: Identity of the encoder.
        embed_dim: Embedding dimension.
        dtype: Stored dtype.
        shard_size: Number of captions per shard.

    Raises:
        TypeError, ValueError: A caption is not a string or not valid Unicode.
        StoreError: The store is damaged, the store was created with a different encoder, or another run is writing to
            the store.
    """
    state, folder = process_state(), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    incoming = folder / ".incoming"
    with folder_lock(folder) if state.is_main_process else nullcontext():
        with state.main_process_first():
            writer = StoreWriter(folder, identity, embed_dim, dtype)
        if state.is_main_process:
            _prepare(writer, captions, incoming)
        wait_for_everyone()
        shards = _missing_shards(folder, incoming, shard_size)
        wait_for_everyone()  # no process may add shards before all processes have listed the existing ones
        yield WritePlan(writer, incoming, shards)
        wait_for_everyone()
        if state.is_main_process:
            writer.finish()
            shutil.rmtree(incoming, ignore_errors=True)  # open files may remain on network file systems
        wait_for_everyone()


def _prepare(writer: StoreWriter, captions: Iterable[str], incoming: Path) -> None:
    """Clean up after an interrupted run, verify the existing shards, and deduplicate the captions."""
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
    ingest(stream, incoming, store)


def _missing_shards(folder: Path, incoming: Path, shard_size: int) -> list[tuple[int, slice]]:
    """Split the pending captions into shards with new numbers."""
    with closing(PendingCaptions(incoming)) as pending:
        count = len(pending)
    slices = [slice(start, min(start + shard_size, count)) for start in range(0, count, shard_size)]
    return list(enumerate(slices, next_shard_number(folder)))
