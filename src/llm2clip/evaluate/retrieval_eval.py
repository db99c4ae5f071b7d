"""What a model is worth on records: its vectors, and its retrieval figures by the kind of caption."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llm2clip.data.records import Record
from llm2clip.data.skip_log import SkipLog
from llm2clip.evaluate.embeddings import EmbeddingSource, ModelEmbeddings
from llm2clip.evaluate.ranks import two_way_ranks
from llm2clip.evaluate.recall import recall, retrieval_metrics
from llm2clip.models.dual_encoder import DualEncoder, from_llm2clip
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.store.store import EmbeddingStore


def dual_encoder_from_store(model: LLM2CLIP, store: EmbeddingStore) -> DualEncoder:
    """A model that takes its texts' embeddings from a store and does not run its caption encoder."""

    def read(texts: Sequence[str], progress: bool) -> Tensor:
        return model.project_text_embeddings(torch.from_numpy(store.take(store.rows(texts))))

    return dataclasses.replace(
        from_llm2clip(model, "llm2clip"), encode_texts_raw=read, count_truncated=lambda texts: None
    )


@dataclass(frozen=True)
class RetrievalRanks:
    """One kind of caption, ranked both ways.

    Args:
        records: whose images could be decoded, each with a caption.
        images: their vectors, (I, D).
        texts: those of all their captions, (T, D).
        image_of_text: int64 (T,), for each caption the index of its image.
        image_ranks: int64 (I,), rank of the best-placed caption of each image, from 0.
        text_ranks: int64 (T,), rank of the image of each caption.
    """

    records: list[Record]
    images: Tensor
    texts: Tensor
    image_of_text: Tensor
    image_ranks: Tensor
    text_ranks: Tensor

    @property
    def captions(self) -> list[str]:
        return [caption for record in self.records for caption in record.captions]


def rank_caption_fields(vectors: EmbeddingSource, fields: Mapping[str, Sequence[Record]]) -> dict[str, RetrievalRanks]:
    """Rank each kind of caption that has any.

    Args:
        vectors: of any model; images that cannot be decoded are left out, counted and listed in its log.
        fields: name of the kind (captions, captions_zh, ...) to records that carry it; an image that stands in
            several kinds is encoded once.

    Raises:
        ValueError: there is none.
    """
    refs = list({r.image.key: r.image for f in fields.values() for r in f if r.image is not None}.values())
    found, kept = vectors.images(refs)
    of = {refs[i].key: n for n, i in enumerate(kept)}
    ranked = {}
    for name, records in fields.items():
        seen = [r for r in records if r.image is not None and r.image.key in of and r.captions]
        if not seen:
            continue
        image_of_text = torch.tensor([n for n, r in enumerate(seen) for _ in r.captions])
        images = found[torch.tensor([of[r.image.key] for r in seen if r.image is not None])]
        texts = vectors.texts([caption for r in seen for caption in r.captions])
        ranked[name] = RetrievalRanks(seen, images, texts, image_of_text, *two_way_ranks(images, texts, image_of_text))
    if not ranked:
        raise ValueError("no held-out image has a caption: there is nothing to measure")
    return ranked


def evaluate_caption_fields(vectors: EmbeddingSource, fields: Mapping[str, Sequence[Record]]) -> list[dict[str, Any]]:
    """Retrieval on each kind of caption.

    Args:
        vectors, fields: as of `rank`.

    Returns:
        A row a kind: its name, numbers of images and texts, how many texts were cut to the model's window, and what
        `figures` returns.

    Raises:
        ValueError: there is nothing to measure.
    """
    return rows(vectors, rank_caption_fields(vectors, fields))


def rows(vectors: EmbeddingSource, ranked: Mapping[str, RetrievalRanks]) -> list[dict[str, Any]]:
    """What `evaluate_caption_fields` returns, of what `rank` does."""
    found = []
    for name, some in ranked.items():
        captions = some.captions
        counts = {"images": len(some.records), "texts": len(captions), "truncated": vectors.count_truncated(captions)}
        found.append(
            {"captions": name, **counts, **retrieval_metrics(some.image_ranks, some.text_ranks, some.image_of_text)}
        )
    return found


def make_validator(
    fields: Mapping[str, Sequence[Record]], log: SkipLog, store: EmbeddingStore, batch: int = 64
) -> Callable[[LLM2CLIP], dict[str, float]]:
    """What to measure while training: R@1 of each kind of caption both ways and, as `score`, the mean of the first
    kind's two. The function raises ValueError if there is nothing to measure.

    Args:
        fields: as of `rank`.
        log: where images that cannot be decoded are counted and listed.
        store: of the captions' embeddings.
        batch: images in a forward pass.
    """

    def measure(model: LLM2CLIP) -> dict[str, float]:
        vectors = ModelEmbeddings(dual_encoder_from_store(model, store), log, batch=batch, progress=False)
        found = {}
        for name, ranked in rank_caption_fields(vectors, fields).items():
            for way, ranks in (("I2T", ranked.image_ranks), ("T2I", ranked.text_ranks)):
                found[f"{name} {way} R@1"] = recall(ranks, (1,))["R@1"]
        return {"score": sum(list(found.values())[:2]) / 2, **found}

    return measure
