"""What a model is worth on records: its vectors, and its retrieval figures by the kind of caption."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from llm2clip.cache.store import EmbeddingStore
from llm2clip.data.decoding import in_batches
from llm2clip.data.records import Record
from llm2clip.data.skips import SkipLog
from llm2clip.evaluate.retrieval import retrieval
from llm2clip.models.dual import DualEncoder, of_model
from llm2clip.models.llm2clip import LLM2CLIP


def with_store(model: LLM2CLIP, store: EmbeddingStore) -> DualEncoder:
    """A model that takes its texts' embeddings from a store and does not run its caption encoder."""

    def read(texts: Sequence[str], progress: bool) -> Tensor:
        return model.embeddings_to_text(torch.from_numpy(store.take(store.rows(texts))))

    return dataclasses.replace(of_model(model, "llm2clip"), read=read, cut=lambda texts: None)


def image_vectors(
    model: DualEncoder, records: Sequence[Record], log: SkipLog, batch: int = 64, progress: bool = True
) -> tuple[Tensor, list[int]]:
    """Vectors of the records' images, (N, width) float32, and which records they are of.

    Records without an image are left out; an image that cannot be decoded is counted and listed in `log`.
    """
    pictured = [(i, record.image) for i, record in enumerate(records) if record.image is not None]
    refs = [ref for _, ref in pictured]
    parts, kept = [torch.empty(0, model.width)], []
    with tqdm(total=len(refs), desc="images", unit="image", disable=not progress) as bar:
        for good, pictures, failures in in_batches(refs, model.transform, batch):
            for n, reason in failures.items():
                log.skip(str(refs[n]), 0, "undecodable image", reason)
            if good:
                parts.append(model.encode_pictures(pictures))
                kept += [pictured[n][0] for n in good]
            bar.update(len(good) + len(failures))
    log.check()
    return torch.cat(parts), kept


def evaluate_model(
    model: DualEncoder,
    fields: Mapping[str, Sequence[Record]],
    log: SkipLog,
    batch: int = 64,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Retrieval on each kind of caption.

    Args:
        model: any.
        fields: name of the kind (captions, captions_zh, ...) to records that carry it; an image that stands in
            several kinds is encoded once.
        log: where unreadable images go.
        batch: images in a forward pass.
        progress: show a bar.

    Returns:
        A row a kind: its name, numbers of images and texts, how many texts were cut to the model's window, and what
        `retrieval` returns.

    Raises:
        ValueError: there is nothing to measure.
    """
    pictured = list({r.image.key: r for f in fields.values() for r in f if r.image is not None}.values())
    vectors, kept = image_vectors(model, pictured, log, batch, progress)
    of = {r.image.key: n for n, r in enumerate(pictured[i] for i in kept) if r.image is not None}
    rows = []
    for name, records in fields.items():
        found = [(of[r.image.key], r.captions) for r in records if r.image and r.image.key in of and r.captions]
        if not found:
            continue
        texts = [c for _, captions in found for c in captions]
        image_of_text = [n for n, (_, captions) in enumerate(found) for _ in captions]
        images = vectors[torch.tensor([i for i, _ in found])]
        figures = retrieval(images, model.encode_text(texts, progress), image_of_text)
        rows.append({"captions": name, "images": len(found), "texts": len(texts), "cut": model.cut(texts), **figures})
    if not rows:
        raise ValueError("no held-out image has a caption: there is nothing to measure")
    return rows


def validator(
    fields: Mapping[str, Sequence[Record]], log: SkipLog, store: EmbeddingStore, batch: int = 64
) -> Callable[[LLM2CLIP], dict[str, float]]:
    """What to measure while training: R@1 of each kind of caption both ways and, as `score`, the mean of the first
    kind's two. Arguments as in `evaluate_model`."""

    def measure(model: LLM2CLIP) -> dict[str, float]:
        rows = evaluate_model(with_store(model, store), fields, log, batch, progress=False)
        figures = {f"{row['captions']} {way} R@1": row[way]["R@1"] for row in rows for way in ("I2T", "T2I")}
        return {"score": sum(list(figures.values())[:2]) / 2, **figures}

    return measure
