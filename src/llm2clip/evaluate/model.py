"""What a model is worth on records: its vectors, and its retrieval figures by the kind of caption."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llm2clip.cache.store import EmbeddingStore
from llm2clip.data.records import Record
from llm2clip.data.skips import SkipLog
from llm2clip.evaluate.retrieval import retrieval
from llm2clip.evaluate.vectors import Vectors
from llm2clip.models.dual import DualEncoder, of_model
from llm2clip.models.llm2clip import LLM2CLIP


def with_store(model: LLM2CLIP, store: EmbeddingStore) -> DualEncoder:
    """A model that takes its texts' embeddings from a store and does not run its caption encoder."""

    def read(texts: Sequence[str], progress: bool) -> Tensor:
        return model.embeddings_to_text(torch.from_numpy(store.take(store.rows(texts))))

    return dataclasses.replace(of_model(model, "llm2clip"), read=read, cut=lambda texts: None)


def evaluate_model(vectors: Vectors, fields: Mapping[str, Sequence[Record]]) -> list[dict[str, Any]]:
    """Retrieval on each kind of caption.

    Args:
        vectors: of any model; images that cannot be decoded are left out, counted and listed in its log.
        fields: name of the kind (captions, captions_zh, ...) to records that carry it; an image that stands in
            several kinds is encoded once.

    Returns:
        A row a kind: its name, numbers of images and texts, how many texts were cut to the model's window, and what
        `retrieval` returns.

    Raises:
        ValueError: there is nothing to measure.
    """
    refs = list({r.image.key: r.image for f in fields.values() for r in f if r.image is not None}.values())
    found, kept = vectors.images(refs)
    of = {refs[i].key: n for n, i in enumerate(kept)}
    rows = []
    for name, records in fields.items():
        seen = [(of[r.image.key], r.captions) for r in records if r.image and r.image.key in of and r.captions]
        if not seen:
            continue
        texts = [c for _, captions in seen for c in captions]
        image_of_text = [n for n, (_, captions) in enumerate(seen) for _ in captions]
        images = found[torch.tensor([i for i, _ in seen])]
        figures = retrieval(images, vectors.texts(texts), image_of_text)
        counts = {"images": len(seen), "texts": len(texts), "cut": vectors.model.cut(texts)}
        rows.append({"captions": name, **counts, **figures})
    if not rows:
        raise ValueError("no held-out image has a caption: there is nothing to measure")
    return rows


def validator(
    fields: Mapping[str, Sequence[Record]], log: SkipLog, store: EmbeddingStore, batch: int = 64
) -> Callable[[LLM2CLIP], dict[str, float]]:
    """What to measure while training: R@1 of each kind of caption both ways and, as `score`, the mean of the first
    kind's two. Arguments as in `evaluate_model`."""

    def measure(model: LLM2CLIP) -> dict[str, float]:
        vectors = Vectors(with_store(model, store), log, batch=batch, progress=False)
        rows = evaluate_model(vectors, fields)
        figures = {f"{row['captions']} {way} R@1": row[way]["R@1"] for row in rows for way in ("I2T", "T2I")}
        return {"score": sum(list(figures.values())[:2]) / 2, **figures}

    return measure
