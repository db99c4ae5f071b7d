"""Captions to store: each text once, shard by shard, by any number of processes, resumable.

The captions that no whole shard holds are cut into shards in the order in which they came; process r of n takes every
n-th of them. Killed at any point and started again, it encodes what is missing and nothing twice. While a shard is
encoded, the one before it is written and the one after it read and split into tokens.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm.auto import tqdm

from llm2clip.cpu_tuning import keep_freed_memory
from llm2clip.distributed import cached_json, process_state
from llm2clip.io_utils import atomic_write_jsonl, read_jsonl
from llm2clip.models.batch_size_tuner import MIN_CAPTIONS_TO_TUNE, tune_batch_tokens
from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.models.length_batching import TokenizedTexts, default_batch_tokens
from llm2clip.models.precision import fastest_precision
from llm2clip.store.dedup import PendingCaptions, ingest
from llm2clip.store.layout import MANIFEST, read_manifest, remove_temp_files, shard_numbers
from llm2clip.store.lock import folder_lock
from llm2clip.store.store import EmbeddingStore, refused_captions
from llm2clip.store.writer import StoreWriter

T = TypeVar("T")


def embed(
    captions: Iterable[str],
    encoder: CaptionEncoder,
    folder: str | Path,
    *,
    shard_size: int = 8192,
    batch_tokens: int | None = None,
    precision: str = "auto",
    dtype: str = "float16",
) -> EmbeddingStore:
    """Fill the store at `folder` with the vectors of `captions` and open it.

    Captions longer than the encoder's `max_length` are cut, counted, and listed in `folder/truncated-*.jsonl`; those
    that the tokenizer refuses are left out, counted, and listed in `folder/refused-*.jsonl`.

    Args:
        captions: texts, repeated or not, as a stream that the main process reads once.
        encoder: the frozen caption encoder.
        folder: of the store; what it holds already is kept.
        shard_size: captions in a shard, the unit of resuming and of batching by length.
        batch_tokens: as in `CaptionEncoder.encode`; None tries which is the fastest, where there is a lot to encode.
        precision: the same, or auto: see `settled`.
        dtype: float16, or int8 with a scale a row, which halves the store.

    Raises:
        StoreError: the store there was made by another encoder, or another run is filling it.
    """
    keep_freed_memory(encoder.device)
    state, precision = process_state(), resolve_precision(precision, encoder, Path(folder))
    with open_for_writing(captions, folder, encoder.identity(precision), encoder.embed_dim, dtype, shard_size) as work:
        mine = work.parts[state.process_index :: state.num_processes]
        total = sum(part.stop - part.start for _, part in mine)
        with (
            tqdm(total=total, desc="embed", unit="caption", disable=not state.is_main_process or not mine) as bar,
            closing(PendingCaptions(work.came)) as incoming,
        ):
            if batch_tokens is None and work.parts:
                batch_tokens = tuned_batch_tokens(encoder, incoming[work.parts[0][1]], precision, Path(folder))
            readings = ((number, tokenize_ahead(incoming[part], encoder)) for number, part in mine)
            with closing(prefetch(readings)) as read, ThreadPoolExecutor(1) as pool:
                written: Future[None] | None = None
                for number, found in read:
                    vectors = encoder.encode(found.tokens, batch_tokens=batch_tokens, precision=precision, progress=bar)
                    if written is not None:
                        written.result()
                    written = pool.submit(write_embeddings, work.writer, number, found, vectors.numpy(), bar.write)
                if written is not None:
                    written.result()
    return EmbeddingStore(folder)


def resolve_precision(precision: str, encoder: CaptionEncoder, folder: Path) -> str:
    """A precision in place of auto: that of the store which is there; else what is fastest on this device and keeps
    the encoder's vectors, measured by the main process for all."""
    if precision != "auto":
        return precision
    if (folder / MANIFEST).is_file():
        return str(read_manifest(folder)["identity"]["precision"])
    return str(cached_json(folder / "precision.json", lambda: fastest_precision(encoder)))


def tuned_batch_tokens(encoder: CaptionEncoder, captions: Sequence[str], precision: str, folder: Path) -> int:
    """The fastest token budget for such captions, tried by the main process for all; a run that goes on keeps it, so
    that its vectors are the same to the last bit."""
    if len(captions) < MIN_CAPTIONS_TO_TUNE:
        return default_batch_tokens(encoder.device)
    file = folder / f"batch_tokens-{encoder.device.type}.json"
    return int(
        cached_json(file, lambda: tune_batch_tokens(encoder, tokenize_ahead(captions, encoder).tokens, precision))
    )


@dataclass(frozen=True)
class WritePlan:
    """What is to be done for a store: the captions that came, in `came`, cut into the shards `parts`."""

    writer: StoreWriter
    came: Path
    parts: list[tuple[int, slice]]


@contextmanager
def open_for_writing(
    captions: Iterable[str], folder: str | Path, identity: dict[str, Any], width: int, dtype: str, shard_size: int
) -> Iterator[WritePlan]:
    """Receive the captions and say which shards are missing; at the end the store is whole. All processes enter it
    together; the main one does the work."""
    state, folder = process_state(), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder) if state.is_main_process else nullcontext():
        with state.main_process_first():
            writer = StoreWriter(folder, identity, width, dtype)
        came = folder / ".incoming"
        if state.is_main_process:
            shutil.rmtree(came, ignore_errors=True)
            came.mkdir(exist_ok=True)
            remove_temp_files(folder)
            writer.finish()
            store = None
            if shard_numbers(folder):  # what is there is gone on with only if it is as it was written
                store = EmbeddingStore(folder)
                store.verify(progress=True)
            refused = refused_captions(folder)
            stream = tqdm(captions, "read", unit="caption", leave=False, delay=1)
            ingest((c for c in stream if c not in refused) if refused else stream, came, store)
        state.wait_for_everyone()
        with closing(PendingCaptions(came)) as incoming:
            first, count = max(shard_numbers(folder), default=-1) + 1, len(incoming)
        state.wait_for_everyone()  # all have seen the same shards before anyone adds one
        cuts = [slice(start, min(start + shard_size, count)) for start in range(0, count, shard_size)]
        yield WritePlan(writer, came, list(enumerate(cuts, first)))
        state.wait_for_everyone()
        if state.is_main_process:
            writer.finish()
            shutil.rmtree(came, ignore_errors=True)  # a file that is open elsewhere may linger on a network's disk
        state.wait_for_everyone()


@dataclass(frozen=True)
class TokenizedShard:
    """Captions of a shard and their tokens; those that the tokenizer refused, with why."""

    captions: list[str]
    tokens: TokenizedTexts
    refused: list[tuple[str, str]]


def tokenize_ahead(captions: Sequence[str], encoder: CaptionEncoder) -> TokenizedShard:
    """Captions to tokens. One without any, or that the tokenizer fails on, is refused; the others are kept."""
    try:
        tokens = encoder.tokenize(captions)
        if all(tokens.ids):
            return TokenizedShard(list(captions), tokens, [])
    except Exception:  # which one it was shows below
        pass
    good, refused = [], []
    for caption in captions:
        try:
            if encoder.tokenize([caption]).ids[0]:
                good.append(caption)
            else:
                refused.append((caption, "no tokens"))
        except Exception as error:
            refused.append((caption, f"{type(error).__name__}: {error}"))
    return TokenizedShard(good, encoder.tokenize(good), refused)


def write_embeddings(
    writer: StoreWriter, number: int, found: TokenizedShard, vectors: np.ndarray, say: Callable[[str], object]
) -> None:
    """Write a shard, and lists of the captions that were cut or refused."""
    tokens = found.tokens
    cut = [{"caption": found.captions[i]} for i in tokens.truncated]
    refused = [{"caption": caption, "why": why} for caption, why in found.refused]
    for name, rows in (("truncated", cut), ("refused", refused)):
        if rows:
            file = writer.folder / f"{name}-{number:05d}.jsonl"
            lines = [row for _, row in read_jsonl(file)] if file.is_file() else []  # a run ended before this shard
            atomic_write_jsonl(file, {row["caption"]: row for row in [*lines, *rows]}.values())
            say(f"{len(rows)} captions {name}: see {file}")
    writer.write(number, found.captions, [len(i) for i in tokens.ids], vectors)


def prefetch(items: Iterator[T]) -> Generator[T, None, None]:
    """The items, each worked out while the one before it is used. Close it: a thread must not end where the garbage
    collector happens to find it."""
    end: Any = object()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield item
