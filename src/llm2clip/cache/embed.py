"""Captions to store: each text once, shard by shard, by any number of processes, resumable.

The captions that no whole shard holds are cut into shards in a fixed order; process r of n takes every n-th of them.
Killed at any point and started again, it encodes what is missing and nothing twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tqdm.auto import tqdm

from llm2clip.cache.store import EmbeddingStore, StoreWriter
from llm2clip.data.captions import caption_key, unique
from llm2clip.models.text import CaptionEncoder
from llm2clip.processes import processes


def embed(
    captions: Iterable[str],
    encoder: CaptionEncoder,
    folder: str | Path,
    *,
    shard_size: int = 4096,
    batch_tokens: int | None = None,
    precision: str = "fp32",
) -> EmbeddingStore:
    """Fill the store at `folder` with the vectors of `captions` and open it.

    Captions longer than the encoder's `max_length` are cut, counted, and listed in `folder/truncated-*.jsonl`.

    Args:
        captions: texts, repeated or not.
        encoder: the frozen caption encoder.
        folder: of the store; what it holds already is kept.
        shard_size: captions in a shard, the unit of resuming.
        batch_tokens, precision: as in `CaptionEncoder.encode`.

    Raises:
        StoreError: the store there was made by another encoder.
    """
    state = processes()
    wanted = unique(captions)
    identity = encoder.identity(precision)
    with state.main_process_first():
        writer = StoreWriter(folder, identity, encoder.width)
    done = writer.keys()
    first = max(writer.numbers(), default=-1) + 1
    state.wait_for_everyone()  # all have seen the same shards before anyone adds one

    missing = [c for c in wanted if caption_key(c) not in done]
    starts = range(0, len(missing), shard_size)
    mine = list(enumerate(starts))[state.process_index :: state.num_processes]
    with tqdm(
        total=sum(len(missing[s : s + shard_size]) for _, s in mine),
        desc="embed",
        unit="caption",
        disable=not state.is_main_process or not mine,
    ) as bar:
        for n, start in mine:
            chunk = missing[start : start + shard_size]
            tokens = encoder.tokenize(chunk)
            vectors = encoder.encode(tokens, batch_tokens=batch_tokens, precision=precision, progress=bar)
            if tokens.truncated:
                with (Path(folder) / f"truncated-{first + n:05d}.jsonl").open("w") as f:
                    for i in tokens.truncated:
                        f.write(json.dumps({"caption": chunk[i]}, ensure_ascii=False) + "\n")
                bar.write(f"{len(tokens.truncated)} captions cut to {encoder.st.max_seq_length} tokens: see {f.name}")
            writer.write(first + n, chunk, [len(i) for i in tokens.ids], vectors.numpy())
    state.wait_for_everyone()
    if state.is_main_process:
        writer.finish()
    state.wait_for_everyone()
    return EmbeddingStore(folder)
