"""Resumable encoding of captions, images and texts into stores, shard by shard.

Each distinct input is encoded only once. Inputs without an embedding are split into shards in input order. After an
interruption, only the remaining shards are encoded. With n processes, each process encodes every n-th shard. The result
does not depend on the number of processes or Ray workers.
"""

import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from llm2clip.cpu_tuning import free_memory, keep_freed_memory, use_onednn_matmul
from llm2clip.data.image_refs import ImageRef
from llm2clip.data.images import iter_image_batches
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.transforms import EvalTransform
from llm2clip.io_utils import atomic_write_jsonl, format_count, read_jsonl, require_extra
from llm2clip.models.loading import hash_weights, select_output_entries
from llm2clip.models.precision import Precision, calibrate_precision, resolve_precision
from llm2clip.models.text.caption_encoder import CaptionEncoder
from llm2clip.models.text.packing import MIN_CAPTIONS_TO_TUNE, TokenizedTexts, tune_batch_tokens
from llm2clip.models.vision.vision_tower import VisionTower
from llm2clip.parallel import Prefetcher
from llm2clip.progress import ProgressBar
from llm2clip.runs.ranks import load_or_compute_json, process_state
from llm2clip.store.layout import DTYPES, KEY_BYTES, MANIFEST, make_image_keys, read_manifest
from llm2clip.store.store import EmbeddingStore
from llm2clip.store.writer import StoreWriter, WritePlan, open_store_for_writing

SHARD_SIZE = 8192  # maximum number of items per shard
MAX_SHARD_BYTES = 1 << 30  # maximum size of a shard's embeddings; shards with large patch features have fewer items
MAX_RETRIES = 4  # maximum number of retries per Ray worker and per shard; Ray Data's default is unlimited


def embed(
    captions: Iterable[str],
    encoder: CaptionEncoder,
    folder: str | Path,
    *,
    shard_size: int = SHARD_SIZE,
    precision: str = "auto",
    dtype: str = "float16",
    device: torch.device | None = None,
) -> EmbeddingStore:
    """Encode captions into the store at `folder`, which is created if needed. Return the opened store.

    Captions longer than the encoder's `max_length` are truncated and listed in `folder/truncated-*.jsonl`. Captions
    that the tokenizer cannot encode are skipped and listed in `folder/refused-*.jsonl`.

    Args:
        captions: Captions, possibly with duplicates. Only the main process iterates over them, and only once.
        encoder: Caption encoder with fp32 weights.
        shard_size: Number of captions per shard. Within each shard, captions of similar length are batched together.
        precision: Precision of the encoder; see `CaptionEncoder.encode`. For "auto", see `resolve_store_precision`.
        dtype: Storage dtype: float16, float32 or int8 (with one scale factor per row).
        device: Device on which to encode. If there are captions to encode, the encoder is moved to this device and
            keeps only the weights needed for encoding (see `CaptionEncoder.move_for_encoding`). By default, the encoder
            stays on its current device and keeps all weights.

    Raises:
        TypeError, ValueError: A caption is not a string or is not valid Unicode.
        StoreError: The store was created with a different encoder, or another run is writing to the store.
    """
    keep_freed_memory(device or encoder.device)
    folder = Path(folder)
    precision = resolve_store_precision(precision, encoder, folder, device)
    identity = encoder.identity(precision)
    with open_store_for_writing(
        captions, folder, identity, encoder.embed_dim, dtype=dtype, shard_size=shard_size
    ) as plan:
        if device is not None and plan.shards:
            encoder.move_for_encoding(device, precision)
        if plan.shards:
            batch_tokens = load_or_tune_batch_tokens(encoder, plan.read_captions(plan.shards[0]), precision, folder)
            _encode_local_shards(plan, encoder, batch_tokens, precision)
    return EmbeddingStore(folder)


def resolve_store_precision(
    precision: str, encoder: CaptionEncoder, folder: Path, device: torch.device | None = None
) -> str:
    """Return the precision in which to encode captions for the store at `folder`.

    "auto" selects the precision of the embeddings that are already in the store. For a new store, the main process
    chooses the precision for all processes (see `models/precision.py`). `device` defaults to the encoder's device.
    """
    if precision != "auto":
        return precision
    if (folder / MANIFEST).is_file():
        return str(read_manifest(folder)["identity"]["precision"])

    def resolve_auto_precision() -> str:
        target = device or encoder.device
        return resolve_precision("embed", "auto", target, lambda: calibrate_precision(encoder, target))

    return str(load_or_compute_json(folder / "precision.json", resolve_auto_precision))


def load_or_tune_batch_tokens(encoder: CaptionEncoder, captions: Sequence[str], precision: str, folder: Path) -> int:
    """Return the fastest number of tokens per batch for encoding these captions, as measured by rank 0.

    The result is saved in the store's folder and reused, so that a resumed run computes bit-identical embeddings. For
    fewer than 4,096 captions, the encoder's default is returned.
    """
    if len(captions) < MIN_CAPTIONS_TO_TUNE:
        return encoder.default_batch_tokens

    def measure_batch_tokens() -> int:
        return tune_batch_tokens(encoder, tokenize_shard(captions, encoder).tokens, precision)

    return int(load_or_compute_json(folder / f"batch_tokens-{encoder.device.type}.json", measure_batch_tokens))


def _encode_local_shards(plan: WritePlan, encoder: CaptionEncoder, batch_tokens: int, precision: str) -> None:
    """Encode this process's shards, while threads write the previous shard and tokenize the next shard."""
    tokenized_shards = ((n, tokenize_shard(plan.read_captions(n), encoder)) for n in plan.list_local_shards())
    with (
        plan.create_progress_bar("embed", "caption") as bar,
        closing(Prefetcher(tokenized_shards, depth=1)) as prefetched,
        ThreadPoolExecutor(1) as pool,
    ):
        writing: Future[None] | None = None
        for number, shard in prefetched:
            embeddings = encoder.encode(shard.tokens, batch_tokens=batch_tokens, precision=precision, progress=bar)
            if writing is not None:
                writing.result()
            writing = pool.submit(write_shard, plan.writer, number, shard, embeddings.numpy(), bar.write)
        if writing is not None:
            writing.result()


@dataclass(frozen=True)
class TokenizedShard:
    captions: list[str]  # captions that could be tokenized
    tokens: TokenizedTexts
    refused: list[tuple[str, str]]  # (caption, reason) for each caption that could not be tokenized


def tokenize_shard(captions: Sequence[str], encoder: CaptionEncoder) -> TokenizedShard:
    """Tokenize captions. In the result, `refused` lists captions that yield no tokens or cause a tokenizer error."""
    try:
        tokens = encoder.tokenize(captions)
        if all(tokens.ids):
            return TokenizedShard(list(captions), tokens, [])
    except Exception:  # the loop below finds the invalid captions
        pass
    valid, refused = [], []
    for caption in captions:
        try:
            if encoder.tokenize([caption]).ids[0]:
                valid.append(caption)
            else:
                refused.append((caption, "no tokens"))
        except Exception as error:
            refused.append((caption, f"{type(error).__name__}: {error}"))
    return TokenizedShard(valid, encoder.tokenize(valid), refused)


def write_shard(
    writer: StoreWriter, number: int, shard: TokenizedShard, embeddings: np.ndarray, log: Callable[[str], object]
) -> None:
    """Write a shard. List its truncated and refused captions in JSON Lines files, and log the paths of these files."""
    truncated = [{"caption": shard.captions[i]} for i in shard.tokens.truncated]
    refused = [{"caption": caption, "why": why} for caption, why in shard.refused]
    for name, rows in (("truncated", truncated), ("refused", refused)):
        if rows:
            file = writer.folder / f"{name}-{number:05d}.jsonl"
            # The file already exists if an earlier run was killed before it wrote the shard.
            old_rows = [row for _, row in read_jsonl(file)] if file.is_file() else []
            by_caption = {row["caption"]: row for row in (*old_rows, *rows)}
            atomic_write_jsonl(file, by_caption.values())
            log(f"{format_count(len(rows), 'caption')} {name}: see {file}")
    writer.write(number, shard.captions, [len(ids) for ids in shard.tokens.ids], embeddings)


# ---- images and other texts ------------------------------------------------------------------------------------------


class ImageEncoder(Protocol):
    """Model that encodes images, such as a vision tower or the image encoder of a dual encoder."""

    @property
    def embed_dim(self) -> int: ...

    @property
    def transform(self) -> Callable[[Tensor], Any]: ...

    def encode_images(self, images: list[Any]) -> Tensor:
        """Encode N outputs of `transform`. Return embeddings of shape (N, embed_dim) as a float32 CPU tensor."""


class TowerEncoder:
    """Image encoder that returns the unprojected features of a frozen vision tower, for caching."""

    def __init__(self, tower: VisionTower, precision: Precision) -> None:
        """Set the tower to eval mode. If `precision` is bf16 or fp16, the tower runs under autocast."""
        self.tower, self.precision, self.embed_dim = tower.eval(), precision, tower.feature_dim
        self.transform: Callable[[Tensor], Any] = EvalTransform(tower.preprocess)
        keep_freed_memory(next(tower.parameters()).device)

    def identity(self) -> dict[str, Any]:
        """Return everything that affects the features: architecture, preprocessing, weights and precision."""
        config = self.tower.config
        if config["library"] == "transformers":
            config = {**config, "architecture": select_output_entries(self.tower.backbone.config)}
        return {"tower": config, "weights": hash_weights(self.tower), "precision": self.precision}

    @torch.no_grad()
    def encode_images(self, images: list[Any]) -> Tensor:
        device = next(self.tower.parameters()).device
        with self.precision.autocast(device):
            return self.tower(torch.stack(images).to(device)).float().cpu()


@use_onednn_matmul()
def store_image_features(
    refs: Sequence[ImageRef],
    encoder: ImageEncoder,
    identity: dict[str, Any],
    folder: str | Path,
    log: SkipLog,
    *,
    dtype: str = "float16",
    batch_size: int = 64,
    workers: int | None = None,
) -> EmbeddingStore:
    """Encode images into the store at `folder`. Return the opened store. Images already in the store are skipped.

    Args:
        identity: All properties of the encoder that affect the features, such as its architecture and weights.
        log: Log of undecodable images, which are not added to the store.
        dtype: Storage dtype: float16, float32 or int8.
        batch_size: Number of images per forward pass.
        workers: Number of processes that decode images; see `iter_image_batches`.

    Raises:
        StoreError: The store was created with a different encoder.
        TooManySkippedError: Too many images cannot be decoded.
    """
    keys = make_image_keys(refs)
    shard_size = max(1, min(SHARD_SIZE, MAX_SHARD_BYTES // (DTYPES[dtype].itemsize * encoder.embed_dim)))
    indices = map(str, range(len(refs)))  # the temporary files contain image numbers instead of names
    with open_store_for_writing(
        indices, folder, identity, encoder.embed_dim, dtype=dtype, shard_size=shard_size, keys=keys
    ) as plan:
        for number, shard_indices, bar in _iterate_local_shards(plan, "features", "image"):
            shard_rows = np.array(shard_indices, np.int64)
            shard_refs = [refs[n] for n in shard_rows.tolist()]
            features, decoded = encode_image_batches(shard_refs, encoder, log, bar, batch_size, workers)
            if decoded:
                names = [str(shard_refs[i]) for i in decoded]
                plan.writer.write(number, names, [0] * len(names), features.numpy(), keys[shard_rows[decoded]])
    store = EmbeddingStore(folder)
    # Check the failure limit only at the end: after an earlier error, the other processes would wait forever.
    # The log already contains this process's failures. Add the images that failed in other processes.
    failed = np.flatnonzero(store.find_keys(keys) < 0)
    first_of_image = np.unique(keys[failed].view(f"V{KEY_BYTES}")[:, 0], return_index=True)[1]
    for n in failed[np.sort(first_of_image)].tolist():
        log.skip(str(refs[n]), 0, "undecodable image", "")
    log.check()
    return store


def store_text_embeddings(
    texts: Iterable[str],
    encode: Callable[[list[str]], Tensor],
    embed_dim: int,
    identity: dict[str, Any],
    folder: str | Path,
    *,
    dtype: str = "float32",
) -> EmbeddingStore:
    """Encode texts, which may contain duplicates, into the store at `folder`. Return the opened store.

    `encode` takes N texts and returns embeddings of shape (N, embed_dim).
    """
    with open_store_for_writing(texts, folder, identity, embed_dim, dtype=dtype, shard_size=SHARD_SIZE) as plan:
        for number, shard_texts, bar in _iterate_local_shards(plan, "texts", "text"):
            plan.writer.write(number, shard_texts, [0] * len(shard_texts), encode(shard_texts).numpy())
            bar.update(len(shard_texts))
    return EmbeddingStore(folder)


def encode_image_batches(
    refs: Sequence[ImageRef],
    encoder: ImageEncoder,
    log: SkipLog,
    bar: ProgressBar,
    batch_size: int = 64,
    workers: int | None = None,
) -> tuple[Tensor, list[int]]:
    """Decode and encode images. Undecodable images are recorded in `log`.

    Returns:
        Float32 embeddings of shape (N, embed_dim), and the indices in `refs` of the N encoded images.
    """
    embeddings, indices = [torch.empty(0, encoder.embed_dim)], []
    for decoded, images, failures in iter_image_batches(refs, encoder.transform, batch_size, workers):
        for i, reason in failures.items():
            log.skip(str(refs[i]), 0, "undecodable image", reason)
        if decoded:
            embeddings.append(encoder.encode_images(images))
            indices += decoded
        bar.update(len(decoded) + len(failures))
    return torch.cat(embeddings), indices


def _iterate_local_shards(plan: WritePlan, description: str, unit: str) -> Iterator[tuple[int, list[str], ProgressBar]]:
    with plan.create_progress_bar(description, unit) as bar:
        for number in plan.list_local_shards():
            yield number, plan.read_captions(number), bar


# ---- Ray -------------------------------------------------------------------------------------------------------------


def embed_with_ray(
    captions: Iterable[str],
    open_encoder: Callable[..., CaptionEncoder],
    folder: str | Path,
    *,
    workers: int = 0,
    shard_size: int = SHARD_SIZE,
    precision: str = "auto",
    dtype: str = "float16",
) -> EmbeddingStore:
    """Encode captions into the store at `folder`, using Ray.

    This process reads and deduplicates the captions. Each worker loads the encoder once and then encodes one shard
    after another. Workers may join or leave the cluster at any time. If a worker dies, Ray assigns its shard to another
    worker, at most `MAX_RETRIES` times.

    The environment variable RAY_ADDRESS specifies the cluster. If it is not set, Ray is started on this machine and
    accepts only connections with a random token, which this process passes to its workers.

    Args:
        captions, shard_size, precision, dtype: See `embed`.
        open_encoder: Function that takes the keyword argument `device` and loads the encoder on this device. It is
            called with device="cpu", once in the driver to compute the encoder's identity and once in each worker.
        folder: Store folder, on a file system shared by all machines.
        workers: Number of workers. 0 means one worker per GPU in the cluster or, if there are no GPUs, one for every
            two CPU cores.

    Raises:
        ModuleNotFoundError: Ray is not installed.
        ValueError: The command was started with several processes, or RAY_AUTH_MODE disables Ray's authentication.
        ChildProcessError: A worker died more than `MAX_RETRIES` times.
        StoreError: The store was created with a different encoder, or another run is writing to the store.
    """
    require_extra("ray", "--engine ray")
    import ray
    import ray.data

    if process_state().num_processes > 1:
        raise ValueError("--engine ray starts its own workers. Run the command without torchrun")
    encoder = open_encoder(device="cpu")  # keep this machine's GPU free for a worker
    precision = resolve_store_precision(precision, encoder, Path(folder), process_state().device)
    identity, embed_dim = encoder.identity(precision), encoder.embed_dim
    del encoder
    free_memory()  # frees the encoder, which contains reference cycles
    torch.cuda.empty_cache()  # frees the GPU memory that was used to select the precision
    start_ray = not ray.is_initialized()
    if start_ray:
        _start_ray()
    try:
        with open_store_for_writing(
            captions, Path(folder).resolve(), identity, embed_dim, dtype=dtype, shard_size=shard_size
        ) as plan:
            if plan.shards:
                _run_ray_workers(plan, open_encoder, workers, precision)
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
        # If no token is set, Ray stores a token in a file that other users of the machine may be able to read.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    ray.init("local", include_dashboard=False, log_to_driver=False)


def _run_ray_workers(
    plan: WritePlan, open_encoder: Callable[..., CaptionEncoder], workers: int, precision: str
) -> None:
    import ray
    import ray.data
    from ray.exceptions import RayActorError

    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    default_workers = gpus or max(1, int(resources["CPU"]) // 2)
    rows = [{"shard": shard} for shard in plan.shards]
    encoded = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        ShardWorker,
        fn_constructor_args=(open_encoder, plan, precision),
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

    def __init__(self, open_encoder: Callable[..., CaptionEncoder], plan: WritePlan, precision: str) -> None:
        self.encoder, self.plan, self.precision = open_encoder(device="cpu"), plan, precision
        self.batch_tokens: int | None = None
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
