"""Vectors of images, and of texts of any model, in stores of their own: each goes through a model once.

They are stores like that of the captions; the keys of images are their names. What trains on the features of a frozen
tower trains in seconds (SAIL, arXiv 2412.04616; LiT, arXiv 2111.07991), and what was measured once is measured again in
no time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from llm2clip.cpu_tuning import keep_freed_memory, onednn_matmul
from llm2clip.data.image_loader import image_batches
from llm2clip.data.image_refs import FileImage, ImageRef, printable
from llm2clip.data.images import EvalTransform
from llm2clip.data.skip_log import SkipLog
from llm2clip.distributed import process_state
from llm2clip.models.fingerprint import hash_weights
from llm2clip.models.precision import DTYPES
from llm2clip.models.vision_tower import VisionTower
from llm2clip.store.dedup import PendingCaptions
from llm2clip.store.encode import WritePlan, open_for_writing
from llm2clip.store.layout import keys_of
from llm2clip.store.store import EmbeddingStore


def image_name(ref: ImageRef) -> str:
    """What an image is called in a store: where it is, and the size and time of change of the file that holds it, so
    that another picture of the same name is another image."""
    name = ref.key
    if (path := ref.container_path) is not None:
        try:
            there = _stat(path) if not isinstance(ref, FileImage) else os.stat(path)
            name = f"{name} {there.st_size} {there.st_mtime_ns}"
        except OSError:
            pass
    return printable(name)


@lru_cache(maxsize=65536)
def _stat(path: str) -> os.stat_result:
    return os.stat(path)  # of a tar, once and not for each of its images


def image_keys(refs: Iterable[ImageRef]) -> np.ndarray:
    """The keys of images in a store, (N, 16) uint8."""
    return keys_of([image_name(ref) for ref in refs])


class ImageEncoder(Protocol):
    """What makes vectors of pictures: a tower, or any model."""

    @property
    def embed_dim(self) -> int: ...

    @property
    def transform(self) -> Callable[[Tensor], Any]: ...

    def encode_images(self, pictures: list[Any]) -> Tensor:
        """What `transform` made of decoded images, to (N, width) float32 on the CPU."""
        ...


class TowerFeatures:
    """A vision tower's features, as they go into a projection."""

    def __init__(self, tower: VisionTower, precision: str) -> None:
        """
        Args:
            tower: on its device; put in eval mode.
            precision: fp32, bf16 or fp16, by autocast.
        """
        self.tower, self.precision, self.embed_dim = tower.eval(), precision, tower.feature_dim
        self.transform: Callable[[Tensor], Any] = EvalTransform(tower.preprocess)
        keep_freed_memory(next(tower.parameters()).device)

    def identity(self) -> dict[str, Any]:
        """All that changes a feature: the architecture, the preparation of pictures, the weights, the precision."""
        return {"tower": self.tower.config, "weights": hash_weights(self.tower), "precision": self.precision}

    @torch.no_grad()
    def encode_images(self, pictures: list[Any]) -> Tensor:
        device = next(self.tower.parameters()).device
        low = self.precision != "fp32"
        with torch.autocast(device.type, DTYPES[self.precision]) if low else nullcontext():
            return self.tower(torch.stack(pictures).to(device)).float().cpu()


def encode_image_batches(
    refs: Sequence[ImageRef], side: ImageEncoder, log: SkipLog, bar: tqdm, batch: int = 64, workers: int | None = None
) -> tuple[Tensor, list[int]]:
    """Vectors (N, width) float32 of those images that can be decoded, and which they are; the others are counted and
    listed in `log`, all are in `bar`."""
    parts, kept = [torch.empty(0, side.embed_dim)], []
    for good, pictures, failures in image_batches(refs, side.transform, batch, workers):
        for i, reason in failures.items():
            log.skip(str(refs[i]), 0, "undecodable image", reason)
        if good:
            parts.append(side.encode_images(pictures))
            kept += good
        bar.update(len(good) + len(failures))
    return torch.cat(parts), kept


@onednn_matmul()
def store_image_features(
    refs: Sequence[ImageRef],
    side: ImageEncoder,
    identity: dict[str, Any],
    folder: str | Path,
    log: SkipLog,
    *,
    dtype: str = "float16",
    batch: int = 64,
    workers: int | None = None,
    shard_size: int = 8192,
) -> EmbeddingStore:
    """Fill the store at `folder` with the images' vectors; what it holds already is kept. All processes take a share.

    Args:
        refs: of the images.
        side: what makes the vectors.
        identity: all that changes a vector.
        folder: of the store.
        log: where images that cannot be decoded are counted and listed; the store goes without them.
        dtype: of the store.
        batch: images in a forward pass.
        workers: processes that decode images, as of `in_batches`.
        shard_size: images in a shard, the unit of resuming.

    Raises:
        StoreError: the store there is another model's.
        TooManySkipped: too many images cannot be decoded.
    """
    by_name = {image_name(ref): ref for ref in refs}
    with open_for_writing(by_name, folder, identity, side.embed_dim, dtype, shard_size) as work:
        for number, names, bar in _mine(work, "features", "image"):
            vectors, good = encode_image_batches([by_name[name] for name in names], side, log, bar, batch, workers)
            if good:
                kept = [names[i] for i in good]
                work.writer.write(number, kept, [0] * len(kept), vectors.numpy())
    store = EmbeddingStore(folder)
    # Judged when all are through, and by all alike: a process that gave up alone would leave the others waiting. What
    # this one saw fail is counted already, with the reason.
    for ref, row in zip(by_name.values(), store.find(keys_of(list(by_name))), strict=True):
        if row < 0:
            log.skip(str(ref), 0, "undecodable image", "")
    log.check()
    return store


def store_text_embeddings(
    texts: Sequence[str],
    encode: Callable[[list[str]], Tensor],
    width: int,
    identity: dict[str, Any],
    folder: str | Path,
    *,
    dtype: str = "float32",
    shard_size: int = 8192,
) -> EmbeddingStore:
    """The same of texts, by whatever makes vectors (N, width) of them."""
    with open_for_writing(texts, folder, identity, width, dtype, shard_size) as work:
        for number, some, bar in _mine(work, "texts", "text"):
            work.writer.write(number, some, [0] * len(some), encode(some).numpy())
            bar.update(len(some))
    return EmbeddingStore(folder)


def _mine(work: WritePlan, name: str, unit: str) -> Iterator[tuple[int, list[str], tqdm]]:
    """This process's shards: number, what is in it, and a bar over all."""
    state = process_state()
    mine = work.parts[state.process_index :: state.num_processes]
    with closing(PendingCaptions(work.came)) as incoming:
        parts = [(number, list(incoming[part])) for number, part in mine]
    total = sum(len(some) for _, some in parts)
    with tqdm(total=total, desc=name, unit=unit, disable=not (state.is_main_process and total)) as bar:
        for number, some in parts:
            yield number, some, bar
