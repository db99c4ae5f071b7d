"""Retrieval evaluation on captioned images. Each caption field (captions, captions_zh, ...) is evaluated separately."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llm2clip.data.records import Record
from llm2clip.data.skip_log import SkipLog
from llm2clip.evaluate.benchmarks.base import CaptionFields
from llm2clip.evaluate.embeddings import EmbeddingSource, ModelEmbeddings
from llm2clip.evaluate.recall import compute_recall_differences, recall, retrieval_metrics, two_way_ranks
from llm2clip.models.dual_encoder import DualEncoder, wrap_llm2clip
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.store.store import EmbeddingStore


@dataclass(frozen=True)
class RetrievalRanks:
    """Retrieval ranks for one caption field in both directions, with the ranked records and embeddings.

    Args:
        records: Records that have a caption and a decodable image.
        images: Image embeddings of shape (I, D).
        texts: Embeddings of all captions, of shape (T, D).
        image_of_text: Image index of each caption, int64 of shape (T,).
        image_ranks: Zero-based rank of each image's best caption, int64 of shape (I,).
        text_ranks: Zero-based rank of each caption's image, int64 of shape (T,).
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


def evaluate_caption_fields(embeddings: EmbeddingSource, fields: CaptionFields) -> list[dict[str, Any]]:
    """Rank each caption field and return its metrics. See `rank_caption_fields` and `compute_field_metrics`."""
    return compute_field_metrics(embeddings, rank_caption_fields(embeddings, fields))


def rank_caption_fields(embeddings: EmbeddingSource, fields: CaptionFields) -> dict[str, RetrievalRanks]:
    """Compute retrieval ranks for each non-empty caption field.

    An image that appears in several fields is encoded only once.

    Args:
        embeddings: Source of image and text embeddings. Images that cannot be decoded are excluded and recorded in
            `embeddings.log`.
        fields: Records, keyed by caption field.

    Raises:
        ValueError: If no image has a caption.
    """
    unique_refs = {r.image.key: r.image for records in fields.values() for r in records if r.image is not None}
    refs = list(unique_refs.values())
    image_embeddings, indices = embeddings.encode_images(refs)
    row_of_image = {refs[i].key: row for row, i in enumerate(indices)}
    ranked = {}
    for name, records in fields.items():
        usable, rows = [], []
        for record in records:
            if record.image is not None and record.image.key in row_of_image and record.captions:
                usable.append(record)
                rows.append(row_of_image[record.image.key])
        if not usable:
            continue
        image_of_text = torch.tensor([n for n, record in enumerate(usable) for _ in record.captions])
        images = image_embeddings[torch.tensor(rows)]
        texts = embeddings.encode_texts([caption for record in usable for caption in record.captions])
        image_ranks, text_ranks = two_way_ranks(images, texts, image_of_text)
        ranked[name] = RetrievalRanks(usable, images, texts, image_of_text, image_ranks, text_ranks)
    if not ranked:
        raise ValueError("nothing to evaluate: no decodable image has a caption")
    return ranked


def compute_field_metrics(embeddings: EmbeddingSource, ranked: Mapping[str, RetrievalRanks]) -> list[dict[str, Any]]:
    """Compute retrieval metrics for each caption field from its retrieval ranks.

    Returns:
        One row per caption field, with "captions" (name of the field), the counts "images", "texts" and "truncated"
        (texts that exceed the model's maximum length), and the result of `retrieval_metrics`.
    """
    rows = []
    for name, ranks in ranked.items():
        captions = ranks.captions
        row = {
            "captions": name,
            "images": len(ranks.records),
            "texts": len(captions),
            "truncated": embeddings.count_truncated(captions),
        }
        rows.append(row | retrieval_metrics(ranks.image_ranks, ranks.text_ranks, ranks.image_of_text))
    return rows


def compute_retrieval_difference(first: RetrievalRanks, other: RetrievalRanks) -> dict[str, Any] | None:
    """Return the recall of `first` minus the recall of `other`, with paired 95% bootstrap intervals over images.

    Returns:
        {"I2T": {"R@1": ..., ...}, "I2T interval": {"R@1": (low, high), ...}, "T2I": ..., "T2I interval": ...}, in
        percentage points. None if the models were not evaluated on the same images and captions.
    """
    if [(r.image, r.captions) for r in first.records] != [(r.image, r.captions) for r in other.records]:
        return None
    result: dict[str, Any] = {}
    images = torch.arange(len(first.image_ranks))
    result["I2T"], result["I2T interval"] = compute_recall_differences(first.image_ranks, other.image_ranks, images)
    result["T2I"], result["T2I interval"] = compute_recall_differences(
        first.text_ranks, other.text_ranks, first.image_of_text
    )
    return result


def measure_caption_lengths(captions: Sequence[str]) -> tuple[str, list[int]]:
    """Return the length unit and the length of each caption.

    Lengths are in words, or in characters if most captions have no spaces, as in Chinese or Japanese.
    """
    words = [len(caption.split()) for caption in captions]
    characters = [len(caption) for caption in captions]
    middle = len(captions) // 2
    if sorted(words)[middle] <= 2 < sorted(characters)[middle] / 3:
        return "characters", characters
    return "words", words


def make_validator(
    fields: CaptionFields, log: SkipLog, store: EmbeddingStore
) -> Callable[[LLM2CLIP], dict[str, float]]:
    """Create a function that evaluates a model during training.

    The validator returns R@1 for each caption field in both directions, and "score", the mean of I2T and T2I R@1 for
    the first field. It raises ValueError if no image has a caption.

    Args:
        fields: Records, keyed by caption field.
        store: The caption encoder's embeddings. Must contain all captions in `fields`.
    """

    def validate(model: LLM2CLIP) -> dict[str, float]:
        embeddings = ModelEmbeddings(dual_encoder_from_store(model, store), log, progress=False)
        metrics = {}
        for name, ranks in rank_caption_fields(embeddings, fields).items():
            metrics[f"{name} I2T R@1"] = recall(ranks.image_ranks, (1,))["R@1"]
            metrics[f"{name} T2I R@1"] = recall(ranks.text_ranks, (1,))["R@1"]
        i2t, t2i, *_ = metrics.values()
        return {"score": (i2t + t2i) / 2, **metrics}

    return validate


def dual_encoder_from_store(model: LLM2CLIP, store: EmbeddingStore) -> DualEncoder:
    """Return a dual encoder that reads text embeddings from a store instead of running the caption encoder."""

    def read_texts(texts: Sequence[str], progress: bool) -> Tensor:
        return model.project_text_embeddings(torch.from_numpy(store.take(store.find_rows(texts))))

    return dataclasses.replace(
        wrap_llm2clip(model, "llm2clip"), encode_texts_raw=read_texts, count_truncated=lambda texts: None
    )
