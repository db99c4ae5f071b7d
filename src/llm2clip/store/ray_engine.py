"""Caption encoding into a store with Ray. Workers may join or leave the cluster at any time.

The driver reads and deduplicates the captions. Each worker loads the encoder once and then encodes one shard after
another. The store's folder must be accessible from all machines. If a worker dies, Ray assigns its shard to another
worker, at most `MAX_RETRIES` times. The result is the same as with `encode.embed`.
"""

import gc
import os
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

from llm2clip.cpu_tuning import keep_freed_memory
from llm2clip.io_utils import install_command
from llm2clip.models.text.caption_encoder import CaptionEncoder
from llm2clip.runs.ranks import process_state
from llm2clip.store.encode import load_or_tune_batch_tokens, resolve_store_precision, tokenize_shard, write_shard
from llm2clip.store.store import EmbeddingStore
from llm2clip.store.writer import WritePlan, open_for_writing

MAX_RETRIES = 4  # maximum number of retries per worker and per shard; Ray Data's default is unlimited


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

    The environment variable RAY_ADDRESS specifies the cluster. If it is not set, Ray is started on this machine
    and accepts only connections with a random token, which this process passes to its workers.

    Args:
        captions, shard_size, batch_tokens, precision, dtype: See `encode.embed`.
        open_encoder: Function that takes the keyword argument `device` and loads the encoder on this device. It is
            called with device="cpu", once in the driver to compute the encoder's identity and once in each worker.
        folder: Store folder, on a file system shared by all machines.
        workers: Number of workers. 0 means one per GPU in the cluster or, without GPUs, one per two CPU cores.

    Raises:
        ModuleNotFoundError: Ray is not installed.
        ValueError: The command was started with several processes, or RAY_AUTH_MODE disables Ray's authentication.
        ChildProcessError: A worker died more than `MAX_RETRIES` times.
        StoreError: The store was created with a different encoder, or another run is writing to the store.
    """
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"--engine ray requires Ray. Run {install_command('ray')}") from error
    if process_state().num_processes > 1:
        raise ValueError("--engine ray starts its own workers. Run the command without torchrun")
    encoder = open_encoder(device="cpu")  # keep this machine's GPU free for a worker
    precision = resolve_store_precision(precision, encoder, Path(folder), process_state().device)
    identity, embed_dim = encoder.identity(precision), encoder.embed_dim
    del encoder
    gc.collect()  # the encoder contains reference cycles
    torch.cuda.empty_cache()  # free the GPU memory that was used to select the precision
    start_ray = not ray.is_initialized()
    if start_ray:
        _start_ray()
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


def _start_ray() -> None:
    """Connect to the cluster at RAY_ADDRESS, or start Ray with authentication on this machine."""
    import ray

    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False)
        return
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        # Ray listens on all network interfaces, and executes the code that it receives.
        raise ValueError(
            "--engine ray requires token authentication to start Ray on this machine. Unset RAY_AUTH_MODE "
            f"(currently {os.environ['RAY_AUTH_MODE']!r})"
        )
    if not (os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")):
        # If no token is set, Ray stores one in a file that other users of this machine may be able to read.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    ray.init("local", include_dashboard=False, log_to_driver=False)


def _run_workers(
    plan: WritePlan,
    open_encoder: Callable[..., CaptionEncoder],
    workers: int,
    batch_tokens: int | None,
    precision: str,
) -> None:
    """Encode and write all shards of the plan on the cluster."""
    import ray
    import ray.data
    from ray.exceptions import RayActorError

    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    default_workers = gpus or max(1, int(resources["CPU"]) // 2)
    rows = [{"shard": shard} for shard in plan.shards]
    encoded = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        ShardWorker,
        fn_constructor_args=(open_encoder, plan, batch_tokens, precision),
        batch_size=1,
        concurrency=min(workers or default_workers, len(rows)),
        num_gpus=1 if gpus else 0,
        max_restarts=MAX_RETRIES,
        max_task_retries=MAX_RETRIES,
    )
    try:
        encoded.materialize()
    except RayActorError as error:
        raise ChildProcessError(
            f"A Ray worker died {MAX_RETRIES + 1} times. Ray reported the last failure as: {error}\n"
            "The worker may have run out of memory. Lower --ray_workers. Ray's logs are in "
            "/tmp/ray on the worker's machine. Complete shards are saved. Run the same command again to resume"
        ) from error


class ShardWorker:
    """Callable that encodes and writes shards. Ray creates one instance per worker."""

    def __init__(
        self, open_encoder: Callable[..., CaptionEncoder], plan: WritePlan, batch_tokens: int | None, precision: str
    ) -> None:
        self.encoder, self.plan = open_encoder(device="cpu"), plan
        self.batch_tokens, self.precision = batch_tokens, precision
        self.encoder.move_for_encoding(process_state().device, precision)
        keep_freed_memory(self.encoder.device)

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        writer = self.plan.writer
        for number in rows["shard"].tolist():
            captions = self.plan.read_captions(number)
            if self.batch_tokens is None:
                self.batch_tokens = load_or_tune_batch_tokens(self.encoder, captions, self.precision, writer.folder)
            shard = tokenize_shard(captions, self.encoder)
            embeddings = self.encoder.encode(shard.tokens, batch_tokens=self.batch_tokens, precision=self.precision)
            write_shard(writer, number, shard, embeddings.numpy(), print)
        return rows
