"""The embedding stage on a Ray cluster: any number of workers, which may come and go.

The captions are received once, by the driver; each worker holds the encoder and takes shard after shard of them from
the store's folder, which all machines must see. A shard that dies with its worker is given to another. The store is the
one that `embed` would have made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from llm2clip.cpu_tuning import keep_freed_memory
from llm2clip.distributed import process_state
from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.store.dedup import PendingCaptions
from llm2clip.store.encode import (
    open_for_writing,
    resolve_precision,
    tokenize_ahead,
    tuned_batch_tokens,
    write_embeddings,
)
from llm2clip.store.store import EmbeddingStore
from llm2clip.store.writer import StoreWriter


class ShardWorker:
    """Encodes shards; Ray makes one for each worker."""

    def __init__(
        self,
        open_encoder: Callable[[], CaptionEncoder],
        writer: StoreWriter,
        came: Path,
        batch_tokens: int | None,
        precision: str,
    ) -> None:
        self.encoder, self.writer, self.incoming = open_encoder(), writer, PendingCaptions(came)
        self.batch_tokens, self.precision = batch_tokens, precision
        keep_freed_memory(self.encoder.device)

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        for number, start, stop in zip(rows["number"], rows["start"], rows["stop"], strict=True):
            captions = self.incoming[int(start) : int(stop)]
            if self.batch_tokens is None:
                self.batch_tokens = tuned_batch_tokens(self.encoder, captions, self.precision, self.writer.folder)
            found = tokenize_ahead(captions, self.encoder)
            vectors = self.encoder.encode(found.tokens, batch_tokens=self.batch_tokens, precision=self.precision)
            write_embeddings(self.writer, int(number), found, vectors.numpy(), print)
        return {"captions": rows["stop"] - rows["start"]}


def embed_with_ray(
    captions: Iterable[str],
    open_encoder: Callable[[], CaptionEncoder],
    folder: str | Path,
    *,
    workers: int = 0,
    shard_size: int = 8192,
    batch_tokens: int | None = None,
    precision: str = "auto",
    dtype: str = "float16",
) -> EmbeddingStore:
    """Fill the store at `folder` on the Ray cluster that RAY_ADDRESS names, else on this machine.

    Args:
        captions, shard_size, batch_tokens, precision, dtype: as in `embed`.
        open_encoder: opens the encoder, here to identify it and in each worker.
        folder: of the store, on a disk that all machines see.
        workers: how many; 0 is one for each GPU of the cluster, or, where there is none, for each two CPUs.

    Raises:
        ModuleNotFoundError: Ray is missing.
        ValueError: this is one of several processes.
        StoreError: the store there was made by another encoder, or another run is filling it.
    """
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("--embed.engine ray needs Ray: pip install 'llm2clip[ray]'") from error
    if process_state().num_processes > 1:
        raise ValueError("--embed.engine ray starts its own workers: run it once, without torchrun")
    encoder = open_encoder()
    precision = resolve_precision(precision, encoder, Path(folder))
    identity, width = encoder.identity(precision), encoder.embed_dim
    del encoder
    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False)
    try:
        with open_for_writing(captions, Path(folder).resolve(), identity, width, dtype, shard_size) as work:
            if work.parts:
                resources = ray.cluster_resources()
                gpus = int(resources.get("GPU", 0))
                workers = min(workers or gpus or max(1, int(resources["CPU"]) // 2), len(work.parts))
                rows = [{"number": n, "start": part.start, "stop": part.stop} for n, part in work.parts]
                settings: tuple[Any, ...] = (open_encoder, work.writer, work.came, batch_tokens, precision)
                ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
                    ShardWorker,
                    fn_constructor_args=settings,
                    batch_size=1,
                    concurrency=workers,
                    num_gpus=1 if gpus else 0,
                ).materialize()
    finally:
        if started:
            ray.shutdown()
    return EmbeddingStore(folder)
