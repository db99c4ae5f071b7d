"""Features of images in a store of their own: each image goes through the vision tower once.

It is a store like that of the captions, whose keys are the names of images and whose identity is the tower's. What
trains on it trains in seconds: the heads of a frozen tower (SAIL, arXiv 2412.04616; LiT, arXiv 2111.07991).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import closing, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from llm2clip.cache.embed import filling
from llm2clip.cache.format import keys_of
from llm2clip.cache.incoming import Incoming
from llm2clip.cache.store import EmbeddingStore
from llm2clip.cpu import quick_products, reuse_memory
from llm2clip.data.decoding import in_batches
from llm2clip.data.images import EvalTransform
from llm2clip.data.refs import FileImage, ImageRef
from llm2clip.data.skips import SkipLog
from llm2clip.models.identity import weights_hash
from llm2clip.models.vision import VisionTower
from llm2clip.processes import processes


def image_name(ref: ImageRef) -> str:
    """What an image is called in a store: where it is, and the size and time of change of the file that holds it, so
    that another picture of the same name is another image."""
    name = ref.key
    path = getattr(ref, "path", None) or getattr(ref, "folder", None)
    if path is not None:
        try:
            there = _stat(path) if not isinstance(ref, FileImage) else os.stat(path)
            name = f"{name} {there.st_size} {there.st_mtime_ns}"
        except OSError:
            pass
    return name.encode("utf-8", "backslashreplace").decode()


@lru_cache(maxsize=65536)
def _stat(path: str) -> os.stat_result:
    return os.stat(path)  # of a tar, once and not for each of its images


def image_keys(refs: Iterable[ImageRef]) -> np.ndarray:
    """The keys of images in a store, (N, 16) uint8."""
    return keys_of([image_name(ref) for ref in refs])


def tower_identity(tower: VisionTower, precision: str) -> dict[str, Any]:
    """All that changes a feature: the architecture, the preparation of pictures, the weights, the precision."""
    return {"tower": tower.config, "weights": weights_hash(tower), "precision": precision}


@quick_products()
@torch.no_grad()
def embed_images(
    refs: Sequence[ImageRef],
    tower: VisionTower,
    folder: str | Path,
    log: SkipLog,
    *,
    precision: str = "fp32",
    batch: int = 64,
    workers: int | None = None,
    shard_size: int = 8192,
) -> EmbeddingStore:
    """Fill the store at `folder` with the images' features; what it holds already is kept. All processes take a share.

    Args:
        refs: of the images.
        tower: on its device; left in eval mode.
        folder: of the store.
        log: where images that cannot be decoded are counted and listed; the store goes without them.
        precision: fp32, bf16 or fp16, by autocast.
        batch: images in a forward pass.
        workers: processes that decode images, as of `in_batches`.
        shard_size: images in a shard, the unit of resuming.

    Raises:
        StoreError: the store there is another tower's.
        TooManySkipped: too many images cannot be decoded.
    """
    state, device = processes(), next(tower.parameters()).device
    reuse_memory(device)
    tower.eval()
    by_name = {image_name(ref): ref for ref in refs}
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    identity = tower_identity(tower, precision)
    with filling(by_name, folder, identity, tower.width, "float16", shard_size) as work:
        mine = work.parts[state.process_index :: state.num_processes]
        with closing(Incoming(work.came)) as incoming:
            parts = [(number, list(incoming[part])) for number, part in mine]
        total = sum(len(names) for _, names in parts)
        with tqdm(total=total, desc="features", unit="image", disable=not (state.is_main_process and total)) as bar:
            for number, names in parts:
                refs = [by_name[name] for name in names]
                kept, vectors = [], [torch.empty(0, tower.width)]
                for good, pixels, failures in in_batches(refs, EvalTransform(tower.preprocess), batch, workers):
                    for i, reason in failures.items():
                        log.skip(str(refs[i]), 0, "undecodable image", reason)
                    if good:
                        with torch.autocast(device.type, dtype) if dtype else nullcontext():
                            vectors.append(tower(torch.stack(pixels).to(device)).float().cpu())
                        kept += [names[i] for i in good]
                    bar.update(len(good) + len(failures))
                if kept:
                    work.writer.write(number, kept, [0] * len(kept), torch.cat(vectors).numpy())
        log.check()
    return EmbeddingStore(folder)
