"""Encoding of captions into a store on a Ray cluster. Workers may join or leave the cluster at any time.

The driver reads and deduplicates the captions. Each worker loads the encoder once and then processes one shard after
another from the store's folder, which must be accessible to all machines. If a worker dies, Ray reassigns its shard to
another worker. The resulting store is the same as with `encode.embed`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

from llm2clip.cpu_tuning import keep_freed_memory
from llm2clip.distributed import process_state
from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.store.dedup import PendingCaptions
from llm2clip.store.encode import resolve_precision, tokenize_shard, tuned_batch_tokens, write_shard
from llm2clip.store.store import EmbeddingStore
from llm2clip.store.write_plan import WritePlan, open_for_writing
from llm2clip.store.writer import StoreWriter


def embed_with_ray(
    captions: Iterable[str],
    open_encoder: Callable[..., CaptionEncoder],
    folder: str | Path,
    *,
    workers: int = 0,
    shard_size: int = 8192,
    batch_tokens: int | None = None,
    precision: str = "auto",
    dtype: str = "float16",
) -> EmbeddingStore:
    """Encode captions into the store at `folder`, using Ray.

    The environment variable RAY_ADDRESS specifies the cluster. If it is not set, Ray runs on this machine.

    Args:
        captions, shard_size, batch_tokens, precision, dtype: See `encode.embed`.
        open_encoder: Function that loads the encoder on the device that the keyword argument `device` names. It is
            called once in the driver, to get the encoder's identity, and once in each worker, always with "cpu".
        folder: Folder of the store, on a file system that all machines share.
        workers: Number of workers. 0 means one worker per GPU in the cluster. If the cluster has no GPUs, 0 means one
            worker per two CPUs.

    Raises:
        ModuleNotFoundError: Ray is not installed.
        ValueError: The command was started with several processes.
        StoreError: The store was created with a different encoder, or another run is writing to the store.
    """
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("--engine ray needs Ray: pip install 'llm2clip[ray]'") from error
    if process_state().num_processes > 1:
        raise ValueError("--engine ray starts its own workers: run the command without torchrun")
    encoder = open_encoder(device="cpu")  # a worker may use this machine's GPU
    precision = resolve_precision(precision, encoder, Path(folder), process_state().device)
    identity, embed_dim = encoder.identity(precision), encoder.embed_dim
    del encoder
    gc.collect()  # the encoder contains reference cycles
    torch.cuda.empty_cache()  # free what the choice of the precision used on the GPU
    start_ray = not ray.is_initialized()
    if start_ray:
        ray.init(log_to_driver=False)
    try:
        with open_for_writing(
            captions, Path(folder).resolve(), identity, embed_dim, dtype=dtype, shard_size=shard_size
        ) as plan:
            if plan.shards:
                _run_workers(plan, open_encoder, workers, batch_tokens, precision)
    finally:
        if start_ray:
            ray.shutdown()
    return EmbeddingStore(folder)


def _run_workers(
    plan: WritePlan,
    open_encoder: Callable[..., CaptionEncoder],
    workers: int,
    batch_tokens: int | None,
    precision: str,
) -> None:
    """Encode all missing shards on the cluster."""
    import ray
    import ray.data

    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    default_workers = gpus or max(1, int(resources["CPU"]) // 2)
    rows = [{"number": number, "start": part.start, "stop": part.stop} for number, part in plan.shards]
    ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        ShardWorker,
        fn_constructor_args=(open_encoder, plan.writer, plan.incoming, batch_tokens, precision),
        batch_size=1,
        concurrency=min(workers or default_workers, len(rows)),
        num_gpus=1 if gpus else 0,
    ).materialize()


class ShardWorker:
    """Encodes shards. Ray creates one instance per worker."""

    def __init__(
        self,
        open_encoder: Callable[..., CaptionEncoder],
        writer: StoreWriter,
        incoming: Path,
        batch_tokens: int | None,
        precision: str,
    ) -> None:
        self.encoder, self.writer, self.pending = open_encoder(device="cpu"), writer, PendingCaptions(incoming)
        self.batch_tokens, self.precision = batch_tokens, precision
        self.encoder.move_for_encoding(process_state().device, precision)
        keep_freed_memory(self.encoder.device)

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        for number, start, stop in zip(rows["number"], rows["start"], rows["stop"], strict=True):
            captions = self.pending[int(start) : int(stop)]
            if self.batch_tokens is None:
                self.batch_tokens = tuned_batch_tokens(self.encoder, captions, self.precision, self.writer.folder)
            shard = tokenize_shard(captions, self.encoder)
            embeddings = self.encoder.encode(shard.tokens, batch_tokens=self.batch_tokens, precision=self.precision)
            write_shard(self.writer, int(number), shard, embeddings.numpy(), print)
        return {"captions": rows["stop"] - rows["start"]}
