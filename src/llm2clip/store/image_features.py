"""Stores for image features and for text embeddings from any model. Each input is encoded only once.

These stores have the same on-disk layout as caption stores. An image's key is a hash of its name; see `get_image_name`.
With cached features, training with a frozen tower (SAIL, arXiv 2412.04616; LiT, arXiv 2111.07991) takes only seconds,
and repeated evaluations do not encode any images or texts again.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from llm2clip.cpu_tuning import keep_freed_memory, onednn_matmul
from llm2clip.data.image_loader import iter_image_batches
from llm2clip.data.image_refs import FileImage, ImageRef, to_valid_unicode
from llm2clip.data.remote import get_remote_version, is_remote
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.transforms import EvalTransform
from llm2clip.models.loading import hash_weights
from llm2clip.models.precision import Precision
from llm2clip.models.vision.vision_tower import VisionTower
from llm2clip.progress import ProgressBar
from llm2clip.store.layout import KEY_BYTES, iter_chunks, make_caption_keys
from llm2clip.store.store import LOOKUP_CHUNK_SIZE, EmbeddingStore
from llm2clip.store.writer import WritePlan, open_for_writing

SHARD_SIZE = 8192  # number of images or texts per shard


class ImageEncoder(Protocol):
    """A model that encodes images, such as a vision tower or the image encoder of a dual encoder."""

    @property
    def embed_dim(self) -> int: ...

    @property
    def transform(self) -> Callable[[Tensor], Any]: ...

    def encode_images(self, images: list[Any]) -> Tensor:
        """Encode N outputs of `transform`. Return embeddings of shape (N, embed_dim) as a float32 CPU tensor."""
        ...


class TowerEncoder:
    """Image encoder that consists of a vision tower without a projection."""

    def __init__(self, tower: VisionTower, precision: Precision) -> None:
        """Set the tower to eval mode. It runs in fp32, or with autocast if `precision` is bf16 or fp16."""
        self.tower, self.precision, self.embed_dim = tower.eval(), precision, tower.feature_dim
        self.transform: Callable[[Tensor], Any] = EvalTransform(tower.preprocess)
        keep_freed_memory(next(tower.parameters()).device)

    def identity(self) -> dict[str, Any]:
        """Return everything that affects the features: architecture, preprocessing, weights and precision."""
        return {"tower": self.tower.config, "weights": hash_weights(self.tower), "precision": self.precision}

    @torch.no_grad()
    def encode_images(self, images: list[Any]) -> Tensor:
        device = next(self.tower.parameters()).device
        with self.precision.autocast(device):
            return self.tower(torch.stack(images).to(device)).float().cpu()


# ---- image keys ----------------------------------------------------------------------------------------------------


def make_image_keys(refs: Iterable[ImageRef]) -> np.ndarray:
    """Return the store keys of N images as a uint8 array of shape (N, 16)."""
    chunks = iter_chunks(map(get_image_name, refs), LOOKUP_CHUNK_SIZE)
    return np.concatenate([np.empty((0, KEY_BYTES), np.uint8), *map(make_caption_keys, chunks)])


def get_image_name(ref: ImageRef) -> str:
    """Return an image's name in a store: its key followed by its file's size and modification time.

    If the file changes, its name changes too, and the image is encoded again.
    """
    name, path = ref.key, ref.container_path
    if path is not None and is_remote(path):
        name = f"{name} {get_remote_version(path)}"
    elif path is not None:
        with suppress(OSError):
            stat = os.stat(path) if isinstance(ref, FileImage) else _stat_cached(path)
            name = f"{name} {stat.st_size} {stat.st_mtime_ns}"
    return to_valid_unicode(name)


@lru_cache(maxsize=65536)
def _stat_cached(path: str) -> os.stat_result:
    """Return the `stat` result of a tar file or table. The result is cached, because a file may contain many images."""
    return os.stat(path)


# ---- writing stores ------------------------------------------------------------------------------------------------


@onednn_matmul()
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
    shard_size: int = SHARD_SIZE,
) -> EmbeddingStore:
    """Encode images into the store at `folder`; return the opened store. The shards are divided among all processes.

    Args:
        refs: Image references. Images already in the store are not encoded again.
        identity: All properties of the encoder that affect the features, such as its architecture and weights.
        folder: Store folder, created if it does not exist.
        log: Records the images that cannot be decoded, which are not added to the store.
        dtype: Storage dtype: float16, float32 or int8.
        batch_size: Number of images per forward pass.
        workers: Number of processes that decode images; see `iter_image_batches`.
        shard_size: Number of images per shard. A resumed run encodes only the remaining shards.

    Raises:
        StoreError: The store was created with a different encoder.
        TooManySkipped: Too many images cannot be decoded.
    """
    keys = make_image_keys(refs)
    indices = map(str, range(len(refs)))  # written to the store's temporary files in place of the images' names
    with open_for_writing(
        indices, folder, identity, encoder.embed_dim, dtype=dtype, shard_size=shard_size, keys=keys
    ) as plan:
        for number, shard_indices, bar in _iter_shards(plan, "features", "image"):
            shard_rows = np.array(shard_indices, np.int64)
            shard_refs = [refs[n] for n in shard_rows.tolist()]
            features, decoded = encode_image_batches(shard_refs, encoder, log, bar, batch_size, workers)
            if decoded:
                names = [str(shard_refs[i]) for i in decoded]
                plan.writer.write_keyed(number, keys[shard_rows[decoded]], [0] * len(names), features.numpy(), names)
    store = EmbeddingStore(folder)
    # All processes check the limit at the end: if one process raised an error earlier, the others would wait forever.
    # This process's failures are already in the log, with reasons. Add the images that failed in other processes.
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
    """Encode texts into the store at `folder`; return the opened store. The texts may contain duplicates.

    `encode` takes N texts and returns embeddings of shape (N, embed_dim). For `identity`, `folder` and `dtype`, see
    `store_image_features`.
    """
    with open_for_writing(texts, folder, identity, embed_dim, dtype=dtype, shard_size=SHARD_SIZE) as plan:
        for number, shard_texts, bar in _iter_shards(plan, "texts", "text"):
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
    """Decode and encode images. Images that cannot be decoded are recorded in `log`.

    Returns:
        Float32 embeddings of shape (N, embed_dim), and the index in `refs` of each of the N encoded images.
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


def _iter_shards(plan: WritePlan, description: str, unit: str) -> Iterator[tuple[int, list[str], ProgressBar]]:
    """Yield (shard number, image indices or texts, progress bar) for each of this process's shards."""
    with plan.create_progress_bar(description, unit) as bar:
        for number in plan.list_local_shards():
            yield number, plan.read_captions(number), bar
