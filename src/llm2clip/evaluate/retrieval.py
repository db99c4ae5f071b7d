"""Evaluation of retrieval on captioned images, and analysis of retrieval errors.

Each caption field, such as captions or captions_zh, is evaluated separately.
"""

import base64
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llm2clip.data.images import load_thumbnail
from llm2clip.data.records import Record
from llm2clip.data.skip_log import SkipLog
from llm2clip.evaluate import plots
from llm2clip.evaluate.benchmarks.base import BenchmarkResult, CaptionFields
from llm2clip.evaluate.embeddings import EmbeddingSource, ModelEmbeddings
from llm2clip.evaluate.metrics import (
    compute_recall,
    compute_recall_differences,
    compute_recall_intervals,
    retrieval_metrics,
    two_way_ranks,
)
from llm2clip.models.dual_encoder import DualEncoder, wrap_llm2clip
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.reports import Block, Figure, Heading, Paragraph, ReportImage, ReportImageGroup
from llm2clip.store.store import EmbeddingStore

THUMBNAIL_SIDE = 280  # maximum width and height of a thumbnail in pixels
TOP_IMAGES = 5  # number of top-ranked images shown per query


@dataclass(frozen=True)
class RetrievalRanks:
    """Image-to-text and text-to-image ranks for a caption field, with the ranked records and their embeddings."""

    records: list[Record]  # only records with a caption and a decodable image
    images: Tensor  # image embeddings of shape (I, D)
    texts: Tensor  # caption embeddings of shape (T, D)
    image_of_text: Tensor  # image index of each caption, int64 of shape (T,)
    image_ranks: Tensor  # see `two_way_ranks`
    text_ranks: Tensor

    @property
    def captions(self) -> list[str]:
        return [caption for record in self.records for caption in record.captions]


def evaluate_retrieval(fields: CaptionFields, embeddings: EmbeddingSource) -> BenchmarkResult:
    ranks = compute_field_ranks(embeddings, fields)
    images = [record.image for records in fields.values() for record in records if record.image is not None]
    return BenchmarkResult({"rows": compute_field_metrics(embeddings, ranks)}, images, ranks)


def evaluate_caption_fields(embeddings: EmbeddingSource, fields: CaptionFields) -> list[dict[str, Any]]:
    return compute_field_metrics(embeddings, compute_field_ranks(embeddings, fields))


def compute_field_ranks(embeddings: EmbeddingSource, fields: CaptionFields) -> dict[str, RetrievalRanks]:
    """Compute retrieval ranks for each non-empty caption field. Each image is encoded only once.

    Images that cannot be decoded are excluded and recorded in `embeddings.log`.

    Raises:
        ValueError: No image has a caption.
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
        raise ValueError("there is nothing to evaluate: no image that can be decoded has a caption")
    return ranked


def compute_field_metrics(embeddings: EmbeddingSource, ranked: Mapping[str, RetrievalRanks]) -> list[dict[str, Any]]:
    """Compute retrieval metrics for each caption field.

    Returns:
        One row per caption field: "captions" (name of the field), the counts "images", "texts" and "truncated" (texts
        that exceed the model's maximum length), and the result of `retrieval_metrics`.
    """
    rows = []
    for name, ranks in ranked.items():
        captions = ranks.captions
        row = {
            "captions": name,
            "images": len(ranks.records),
            "texts": len(captions),
            "truncated": embeddings.count_truncated_texts(captions),
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
    """Return the length unit ("words" or "characters") and the length of each caption.

    Characters are counted if most captions have no spaces, as in Chinese or Japanese.
    """
    words = [len(caption.split()) for caption in captions]
    characters = [len(caption) for caption in captions]
    middle = len(captions) // 2
    if sorted(words)[middle] <= 2 < sorted(characters)[middle] / 3:
        return "characters", characters
    return "words", words


def create_validation_function(
    fields: CaptionFields, log: SkipLog, store: EmbeddingStore
) -> Callable[[LLM2CLIP], dict[str, float]]:
    """Create a function that computes a model's validation metrics, using caption embeddings from `store`.

    The function returns the I2T and T2I R@1 of each caption field. It raises ValueError if no image has a caption.
    """

    def validate_model(model: LLM2CLIP) -> dict[str, float]:
        embeddings = ModelEmbeddings(build_dual_encoder_from_store(model, store), log, progress=False)
        metrics = {}
        for name, ranks in compute_field_ranks(embeddings, fields).items():
            metrics[f"{name} I2T R@1"] = compute_recall(ranks.image_ranks, (1,))["R@1"]
            metrics[f"{name} T2I R@1"] = compute_recall(ranks.text_ranks, (1,))["R@1"]
        return metrics

    return validate_model


def build_dual_encoder_from_store(model: LLM2CLIP, store: EmbeddingStore) -> DualEncoder:
    """Return a dual encoder that reads caption embeddings from a store instead of running the caption encoder."""

    def read_text_embeddings(texts: Sequence[str], progress: bool) -> Tensor:
        return model.project_text_embeddings(torch.from_numpy(store.take(store.find_rows(texts))))

    return dataclasses.replace(
        wrap_llm2clip(model, "llm2clip"),
        encode_texts_raw=read_text_embeddings,
        count_truncated_texts=lambda texts: None,
    )


# ---- error analysis --------------------------------------------------------------------------------------------------


@dataclass
class ErrorAnalysis:
    """Analysis of a model's text-to-image retrieval errors on a caption field."""

    length_unit: str  # "words" or "characters"
    length_bins: list[tuple[int, int]]  # (minimum, maximum) caption length of each bin
    recall_by_length: list[tuple[float, float, float]]  # see `compute_recall_by_length`
    examples: list[ReportImageGroup]  # evenly spaced captions and their top images
    failures: list[ReportImageGroup]  # captions with the worst ranks and their top images


def analyse_retrieval_errors(ranks: RetrievalRanks, num_queries: int = 6) -> ErrorAnalysis:
    """Analyse a model's errors. Include up to `num_queries` example queries and up to `num_queries` failed queries."""
    unit, lengths = measure_caption_lengths(ranks.captions)
    bins = make_caption_length_bins(lengths)
    return ErrorAnalysis(
        length_unit=unit,
        length_bins=bins,
        recall_by_length=compute_recall_by_length(ranks, lengths, bins),
        examples=[_retrieve_example_images(ranks, text) for text in _sample_caption_indices(ranks, num_queries)],
        failures=[_retrieve_example_images(ranks, text) for text in find_worst_captions(ranks, num_queries)],
    )


def collect_example_searches(ranks: RetrievalRanks, count: int = 5) -> list[dict[str, Any]]:
    """Retrieve images for up to `count` captions. Return a JSON-compatible result for `read_example_searches`."""
    searches = []
    for text in _sample_caption_indices(ranks, count):
        search = _retrieve_example_images(ranks, text)
        images = []
        for image in search.images:
            jpeg = image.jpeg and base64.b64encode(image.jpeg).decode()
            images.append({"jpeg": jpeg, "caption": image.caption, "is_correct": image.is_correct})
        searches.append({"query": search.title, "images": images})
    return searches


def read_example_searches(searches: Sequence[Mapping[str, Any]]) -> list[ReportImageGroup]:
    """Convert the result of `collect_example_searches` to groups of images for a report."""
    blocks = []
    for search in searches:
        images = []
        for image in search["images"]:
            jpeg = image["jpeg"] and base64.b64decode(image["jpeg"])
            images.append(ReportImage(jpeg, image["caption"], image["is_correct"]))
        blocks.append(ReportImageGroup(images, search["query"]))
    return blocks


def _sample_caption_indices(ranks: RetrievalRanks, count: int) -> list[int]:
    num_captions = len(ranks.captions)
    indices: list[int] = torch.linspace(0, num_captions - 1, min(count, num_captions)).long().tolist()
    return indices


def make_caption_length_bins(
    lengths: Sequence[int], max_bins: int = 6, min_captions: int = 20
) -> list[tuple[int, int]]:
    """Divide captions into length bins of similar size. Return the minimum and maximum length of each bin.

    Each bin contains at least `min_captions` captions, unless there are fewer captions in total.
    """
    ordered = torch.tensor(sorted(lengths))
    num_bins = max(1, min(max_bins, len(ordered) // min_captions))
    quantiles = [len(ordered) * n // num_bins for n in range(1, num_bins)]
    edges = sorted({int(ordered[q]) for q in quantiles})
    starts = [int(ordered[0])]
    for edge in edges:
        num_below = int(((ordered >= starts[-1]) & (ordered < edge)).sum())
        num_above = int((ordered >= edge).sum())
        if num_below >= min_captions and num_above >= min_captions:
            starts.append(edge)
    ends = [start - 1 for start in starts[1:]] + [int(ordered[-1])]
    return list(zip(starts, ends, strict=True))


def compute_recall_by_length(
    ranks: RetrievalRanks, lengths: Sequence[int], bins: Sequence[tuple[int, int]]
) -> list[tuple[float, float, float]]:
    """Return the T2I R@1 and its confidence limits in each length bin, as (value, lower, upper) in percent."""
    length = torch.tensor(lengths)
    recalls = []
    for first, last in bins:
        in_bin = (length >= first) & (length <= last)
        bin_ranks = ranks.text_ranks[in_bin]
        low, high = compute_recall_intervals(bin_ranks, ranks.image_of_text[in_bin], (1,))["R@1"]
        recalls.append((compute_recall(bin_ranks, (1,))["R@1"], low, high))
    return recalls


def find_worst_captions(ranks: RetrievalRanks, count: int) -> list[int]:
    """Return the indices of the captions whose correct images rank lowest, with at most one caption per image.

    Captions whose correct images rank first are excluded.
    """
    caption_of_image: dict[int, int] = {}
    for text in ranks.text_ranks.argsort(descending=True, stable=True).tolist():
        if len(caption_of_image) == count or ranks.text_ranks[text] == 0:
            break
        caption_of_image.setdefault(int(ranks.image_of_text[text]), text)
    return list(caption_of_image.values())


def _retrieve_example_images(ranks: RetrievalRanks, text: int) -> ReportImageGroup:
    """Return the top `TOP_IMAGES` images for a caption, followed by the correct image if it ranks lower."""
    correct_image, correct_rank = int(ranks.image_of_text[text]), int(ranks.text_ranks[text])
    scores = ranks.images @ ranks.texts[text]
    top_images = scores.topk(min(TOP_IMAGES, len(scores))).indices.tolist()
    positions = list(enumerate(top_images, 1))
    if correct_image not in top_images:
        positions.append((correct_rank + 1, correct_image))
    images = []
    for position, image in positions:
        ref = ranks.records[image].image
        assert ref is not None  # only records with images are ranked
        caption = f"{position}. cosine {float(scores[image]):.2f}"
        # Other images are not marked as wrong, because the caption may also describe them.
        is_correct = True if image == correct_image else None
        images.append(ReportImage(load_thumbnail(ref, THUMBNAIL_SIDE), caption, is_correct))
    return ReportImageGroup(images, ranks.captions[text])


def build_error_analysis_section(analyses: Mapping[str, ErrorAnalysis]) -> list[Block]:
    """Return a plot of all models' recall by caption length, and example searches with the first model."""
    name, first = next(iter(analyses.items()))
    blocks: list[Block] = []
    if len(first.length_bins) > 1:
        points = {model: analysis.recall_by_length for model, analysis in analyses.items()}
        labels = [f"{low}–{high}" if low < high else str(low) for low, high in first.length_bins]
        svg = plots.plot_curves_with_intervals(points, labels, f"{first.length_unit} in the caption", "T2I R@1, %")
        blocks.append(Figure(svg, "Recall by caption length, with 95% confidence intervals."))
    if first.examples:
        text = f"Evenly spaced captions, with the images retrieved by {name}. Correct images are marked."
        blocks += [Heading("Examples", 3), Paragraph(text), *first.examples]
    if first.failures:
        text = "Captions whose correct images have the worst ranks."
        blocks += [Heading("Worst failures", 3), Paragraph(text), *first.failures]
    return blocks
