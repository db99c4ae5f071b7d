"""Captions to store: each text once, shard by shard, by any number of processes, resumable.

The captions that no whole shard holds are cut into shards in the order in which they came; process r of n takes every
n-th of them. Killed at any point and started again, it encodes what is missing and nothing twice. While a shard is
encoded, the one before it is written and the one after it read and split into tokens.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm.auto import tqdm

from llm2clip.cache.format import shard_numbers
from llm2clip.cache.incoming import Incoming, receive
from llm2clip.cache.lock import alone
from llm2clip.cache.store import EmbeddingStore
from llm2clip.cache.writer import StoreWriter
from llm2clip.models.text import CaptionEncoder, Tokens
from llm2clip.processes import processes

T = TypeVar("T")


def embed(
    captions: Iterable[str],
    encoder: CaptionEncoder,
    folder: str | Path,
    *,
    shard_size: int = 8192,
    batch_tokens: int | None = None,
    precision: str = "fp32",
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
        batch_tokens, precision: as in `CaptionEncoder.encode`.
        dtype: float16, or int8 with a scale a row, which halves the store.

    Raises:
        StoreError: the store there was made by another encoder, or another run is filling it.
    """
    state, folder = processes(), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder) if state.is_main_process else nullcontext():
        with state.main_process_first():
            writer = StoreWriter(folder, encoder.identity(precision), encoder.width, dtype)
        came = folder / ".incoming"
        if state.is_main_process:
            shutil.rmtree(came, ignore_errors=True)
            came.mkdir()
            writer.finish()
            store = None
            if shard_numbers(folder):  # what is there is gone on with only if it is as it was written
                store = EmbeddingStore(folder)
                store.verify(progress=True)
            receive(tqdm(captions, "read", unit="caption", leave=False, delay=1), came, store)
        state.wait_for_everyone()
        incoming, first = Incoming(came), max(shard_numbers(folder), default=-1) + 1
        state.wait_for_everyone()  # all have seen the same shards before anyone adds one

        starts = range(0, len(incoming), shard_size)
        mine = list(enumerate(starts, first))[state.process_index :: state.num_processes]
        total = sum(len(range(s, min(s + shard_size, len(incoming)))) for _, s in mine)
        with tqdm(total=total, desc="embed", unit="caption", disable=not state.is_main_process or not mine) as bar:

            def shards() -> Iterator[tuple[int, Reading]]:
                for number, start in mine:
                    yield number, read(incoming[start : start + shard_size], encoder)

            def encoded() -> Iterator[tuple[int, Reading, np.ndarray]]:
                for number, found in ahead(shards()):
                    vectors = encoder.encode(found.tokens, batch_tokens=batch_tokens, precision=precision, progress=bar)
                    yield number, found, vectors.numpy()

            with ThreadPoolExecutor(1) as pool:
                written = None
                for number, found, vectors in encoded():
                    if written is not None:
                        written.result()
                    written = pool.submit(keep, writer, number, found, vectors, bar)
                if written is not None:
                    written.result()
        state.wait_for_everyone()
        if state.is_main_process:
            writer.finish()
            shutil.rmtree(came)
        state.wait_for_everyone()
    return EmbeddingStore(folder)


@dataclass(frozen=True)
class Reading:
    """Captions of a shard and their tokens; those that the tokenizer refused, with why."""

    captions: list[str]
    tokens: Tokens
    refused: list[tuple[str, str]]


def read(captions: Sequence[str], encoder: CaptionEncoder) -> Reading:
    """Captions to tokens. One without any, or that the tokenizer fails on, is refused; the others are kept."""
    try:
        tokens = encoder.tokenize(captions)
        if all(tokens.ids):
            return Reading(list(captions), tokens, [])
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
    return Reading(good, encoder.tokenize(good), refused)


def keep(writer: StoreWriter, number: int, found: Reading, vectors: np.ndarray, bar: tqdm) -> None:
    """Write a shard, and lists of the captions that were cut or refused."""
    tokens = found.tokens
    cut = [{"caption": found.captions[i]} for i in tokens.truncated]
    refused = [{"caption": caption, "why": why} for caption, why in found.refused]
    for name, rows in (("truncated", cut), ("refused", refused)):
        if rows:
            file = writer.folder / f"{name}-{number:05d}.jsonl"
            file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            bar.write(f"{len(rows)} captions {name}: see {file}")
    writer.write(number, found.captions, [len(i) for i in tokens.ids], vectors)


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The items, each worked out while the one before it is used."""
    end: Any = object()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield item
