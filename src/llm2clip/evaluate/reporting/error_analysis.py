"""Retrieval error analysis: recall curves, recall by caption length, and the images retrieved for example captions."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llm2clip.data.images import load_thumbnail
from llm2clip.evaluate.recall import compute_recall_intervals, recall
from llm2clip.evaluate.reporting import plots
from llm2clip.evaluate.retrieval import RetrievalRanks, measure_caption_lengths
from llm2clip.reports import Block, Example, Examples, Figure, Heading, Paragraph

MAX_K = 50  # maximum k in the recall curves
THUMBNAIL_SIDE = 280  # maximum width and height of thumbnails, in pixels
TOP_IMAGES = 5  # number of top-ranked images shown per query


@dataclass
class ErrorAnalysis:
    """Analysis of a model's retrieval errors for one caption field.

    Args:
        curves: R@1 to R@50 in percent, keyed by direction ("I2T" or "T2I").
        length_unit: "words", or "characters" for languages without spaces.
        length_bins: Minimum and maximum caption length of each bin.
        recall_by_length: T2I R@1 of each bin, as (value, lower bound, upper bound) in percent.
        similarity: Cosine similarities between a few images (columns) and their first captions (rows).
        examples: Images retrieved for captions sampled at regular intervals.
        failures: Images retrieved for the captions whose correct images have the worst ranks.
    """

    curves: dict[str, list[float]]
    length_unit: str
    length_bins: list[tuple[int, int]]
    recall_by_length: list[tuple[float, float, float]]
    similarity: Tensor
    examples: list[Examples] = field(default_factory=list)
    failures: list[Examples] = field(default_factory=list)


def analyze_errors(ranks: RetrievalRanks, num_queries: int = 6, matrix_size: int = 20) -> ErrorAnalysis:
    """Analyse a model's retrieval errors for one caption field.

    Args:
        num_queries: Maximum number of entries in each of `examples` and `failures`.
        matrix_size: Maximum number of images in the similarity matrix.
    """
    captions = ranks.captions
    unit, lengths = measure_caption_lengths(captions)
    bins = make_length_bins(lengths)
    num_images = len(ranks.records)
    image_rows = torch.linspace(0, num_images - 1, min(matrix_size, num_images)).long()
    first_captions = torch.tensor([int((ranks.image_of_text == i).nonzero()[0]) for i in image_rows])
    return ErrorAnalysis(
        curves={"I2T": compute_recall_curve(ranks.image_ranks), "T2I": compute_recall_curve(ranks.text_ranks)},
        length_unit=unit,
        length_bins=bins,
        recall_by_length=compute_recall_by_length(ranks, lengths, bins),
        similarity=ranks.texts[first_captions] @ ranks.images[image_rows].T,
        examples=[retrieve_images(ranks, text) for text in sample_caption_indices(ranks, num_queries)],
        failures=[retrieve_images(ranks, text) for text in find_worst_captions(ranks, num_queries)],
    )


def collect_example_searches(ranks: RetrievalRanks, count: int = 5) -> list[dict[str, Any]]:
    """Return JSON-compatible dicts of sample captions and the retrieved images. See `read_example_searches`."""
    searches = []
    for text in sample_caption_indices(ranks, count):
        search = retrieve_images(ranks, text)
        images = []
        for image in search.images:
            jpeg = image.jpeg and base64.b64encode(image.jpeg).decode()
            images.append({"jpeg": jpeg, "caption": image.caption, "is_correct": image.is_correct})
        searches.append({"query": search.title, "images": images})
    return searches


def read_example_searches(searches: Sequence[Mapping[str, Any]]) -> list[Examples]:
    """Convert the result of `collect_example_searches` to report blocks."""
    blocks = []
    for search in searches:
        images = []
        for image in search["images"]:
            jpeg = image["jpeg"] and base64.b64decode(image["jpeg"])
            images.append(Example(jpeg, image["caption"], image["is_correct"]))
        blocks.append(Examples(images, search["query"]))
    return blocks


def sample_caption_indices(ranks: RetrievalRanks, count: int) -> list[int]:
    """Return the indices of up to `count` captions, sampled at regular intervals."""
    num_captions = len(ranks.captions)
    indices: list[int] = torch.linspace(0, num_captions - 1, min(count, num_captions)).long().tolist()
    return indices


def compute_recall_curve(ranks: Tensor) -> list[float]:
    """Return R@1 to R@50 in percent."""
    return list(recall(ranks, range(1, MAX_K + 1)).values())


def make_length_bins(lengths: Sequence[int], max_bins: int = 6, min_captions: int = 20) -> list[tuple[int, int]]:
    """Divide caption lengths into bins with similar numbers of captions. Return each bin as (minimum, maximum).

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
    """Return the T2I R@1 of each length bin, as (value, lower bound, upper bound) in percent."""
    length = torch.tensor(lengths)
    recalls = []
    for first, last in bins:
        in_bin = (length >= first) & (length <= last)
        bin_ranks = ranks.text_ranks[in_bin]
        low, high = compute_recall_intervals(bin_ranks, ranks.image_of_text[in_bin], (1,))["R@1"]
        recalls.append((100 * float((bin_ranks < 1).double().mean()), low, high))
    return recalls


def find_worst_captions(ranks: RetrievalRanks, count: int) -> list[int]:
    """Return the indices of the captions whose correct images have the worst ranks, at most one caption per image.

    Captions whose correct image ranks first are excluded.
    """
    caption_of_image: dict[int, int] = {}
    for text in ranks.text_ranks.argsort(descending=True, stable=True).tolist():
        if len(caption_of_image) == count or ranks.text_ranks[text] == 0:
            break
        caption_of_image.setdefault(int(ranks.image_of_text[text]), text)
    return list(caption_of_image.values())


def retrieve_images(ranks: RetrievalRanks, text: int) -> Examples:
    """Return the `TOP_IMAGES` top-ranked images for a caption, then the correct image if it is not one of them."""
    correct_image, correct_rank = int(ranks.image_of_text[text]), int(ranks.text_ranks[text])
    scores = ranks.images @ ranks.texts[text]
    top_images = scores.topk(min(TOP_IMAGES, len(scores))).indices.tolist()
    positions = list(enumerate(top_images, 1))
    if correct_image not in top_images:
        positions.append((correct_rank + 1, correct_image))
    images = []
    for position, image in positions:
        ref = ranks.records[image].image
        assert ref is not None  # records without an image are not ranked
        caption = f"{position}. cosine {float(scores[image]):.2f}"
        images.append(Example(load_thumbnail(ref, THUMBNAIL_SIDE), caption, is_correct=image == correct_image))
    return Examples(images, ranks.captions[text])


# ---- report section --------------------------------------------------------------------------------------------------


def build_error_analysis_blocks(analyses: Mapping[str, ErrorAnalysis]) -> list[Block]:
    """Return recall plots for all models, and the similarity matrix and examples for the first model."""
    name, first = next(iter(analyses.items()))
    blocks: list[Block] = [_plot_recall_curves(analyses)]
    if len(first.length_bins) > 1:
        blocks.append(_plot_recall_by_length(analyses))
    matrix = plots.plot_matrix(first.similarity, "images", "their first captions")
    blocks.append(Figure(matrix, f"Cosine similarities computed by {name}. Matching pairs are on the diagonal."))
    if first.examples:
        text = f"Captions sampled at regular intervals, with the images retrieved by {name}. Correct images are marked."
        blocks += [Heading("Examples", 3), Paragraph(text), *first.examples]
    if first.failures:
        text = "Captions whose correct images rank lowest."
        blocks += [Heading("Worst failures", 3), Paragraph(text), *first.failures]
    return blocks


def _plot_recall_curves(analyses: Mapping[str, ErrorAnalysis]) -> Figure:
    curves = {}
    for name, analysis in analyses.items():
        for direction, curve in analysis.curves.items():
            curves[f"{name} {direction}"] = curve
    svg = plots.plot_curves(curves, range(1, MAX_K + 1), "k", "R@k, %", log_x=True)
    return Figure(svg, "Recall at k (R@k) for increasing k.")


def _plot_recall_by_length(analyses: Mapping[str, ErrorAnalysis]) -> Figure:
    first = next(iter(analyses.values()))
    curves = {name: analysis.recall_by_length for name, analysis in analyses.items()}
    labels = [f"{low}–{high}" if low < high else str(low) for low, high in first.length_bins]
    svg = plots.plot_interval_curves(curves, labels, f"{first.length_unit} in the caption", "T2I R@1, %")
    return Figure(svg, "Recall by caption length, with 95% confidence intervals.")
