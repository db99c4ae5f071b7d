"""Text-to-image retrieval by query length, and the choice of prompt templates for short search queries.

Queries are built from the captions of the evaluated images. For queries of up to three words, an image is relevant if
a caption of the image mentions the query. Longer queries are complete captions, and all images with the same caption
are relevant. Metrics are computed from exact ranks, and ties count against the model (see `metrics`).

Images that show what a query names, but whose captions do not mention the query, count as wrong answers. The metrics
therefore usually underestimate models. Use the metrics only to compare models on the same images.

Templates such as "a photo of {}" help models trained on complete captions. Models that were trained on short phrases,
or that use CLIP's embedding space, may not need templates. `fit` therefore compares the templates in `CANDIDATES` on
held-out images.
"""

import random
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from llm2clip.data.noun_phrases import CONNECTIVES, DETERMINERS, FUNCTION_WORDS, NUMBERS, make_word_set
from llm2clip.evaluate.benchmarks.base import Benchmark, BenchmarkResult
from llm2clip.evaluate.comparison import format_metric_difference
from llm2clip.evaluate.embeddings import EmbeddingSource
from llm2clip.evaluate.metrics import (
    compute_average_precision,
    compute_chance_average_precision,
    compute_mean_interval,
    compute_positive_ranks,
)
from llm2clip.evaluate.retrieval import RetrievalRanks, measure_caption_lengths
from llm2clip.models.prompts import NO_TEMPLATES, QueryTemplates, average_prompt_embeddings, build_query_prompts
from llm2clip.reports import Block, Heading, Paragraph, Table, format_with_interval

PHRASE_LENGTHS = (1, 2, 3)  # in words
CAPTION_LENGTHS = {"4–7": range(4, 8), "8+": range(8, 1 << 30)}  # in words
Item = TypeVar("Item", str, tuple[str, ...])
# Letters and digits, optionally joined by apostrophes or hyphens, as in "t-shirt" and "man's".
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
# Spaces before possessive endings in tokenized captions, as in "the dog 's mouth".
_SEPARATE_POSSESSIVE = re.compile(r"\s+(?=['’]s\b)")
_PUNCTUATION = re.compile(r"[^\w\s'’-]+")
# English words that do not name anything visible.
# Stop word lists for document retrieval are not used, because such lists also contain "two", "fire" and "empty".
_OTHER_STOP_WORDS = """
having doing get gets getting appears seems isn't aren't
hers herself himself itself mine myself ours theirs themselves yours whose someone something he's she's there's
about amid among amongst atop besides front per throughout underneath until upon via within
although nor though whether almost still well
"""
STOP_WORDS = (DETERMINERS | CONNECTIVES | FUNCTION_WORDS | make_word_set(_OTHER_STOP_WORDS)) - NUMBERS - {"back"}
# Candidates for `choose_query_templates`: a single template, and an ensemble of four templates.
CANDIDATES = (("a photo of {}",), ("a photo of {}", "a photo of a {}.", "a picture of {}", "there is {}"))
MAX_CANDIDATE_QUERIES = 300  # maximum number of queries per length when candidates are compared
REPORT_NOTE = (
    "One- to three-word queries are words and phrases from the captions. Every image with a caption that mentions the "
    "query is a correct answer. All other images are wrong answers, even if the images match the query. Longer queries "
    "are complete captions. Intervals are 95% bootstrap intervals over queries."
)


@dataclass(frozen=True)
class LabelledQuery:
    """A text query and the indices of its relevant images."""

    text: str
    relevant: tuple[int, ...]


@dataclass(frozen=True)
class QueryLengthResult:
    """Retrieval results for all queries of the same length."""

    words: str  # number of words in the queries, such as "2" or "4–7"
    queries: Sequence[LabelledQuery]
    scores: Tensor  # average precision of each query, between 0 and 1, float64 of shape (Q,)
    chance: float  # expected average precision of a random ranking, averaged over the queries
    mean_relevant: float  # mean number of relevant images per query

    @property
    def mean_ap(self) -> float:
        """Mean average precision (mAP) in percent."""
        return 100 * float(self.scores.mean())

    @cached_property
    def mean_ap_interval(self) -> tuple[float, float]:
        """95% confidence interval of the mAP, cached because the bootstrap is the slowest part of a report."""
        return compute_mean_interval(self.scores)

    def to_dict(self) -> dict[str, Any]:
        """Return an entry for results.json, with metrics in percent."""
        return {
            "words": self.words,
            "queries": len(self.scores),
            "relevant images per query": self.mean_relevant,
            "mAP": self.mean_ap,
            "mAP interval": self.mean_ap_interval,
            "mAP chance": 100 * self.chance,
        }


@dataclass(frozen=True)
class ShortQueryResult:
    """Prompt templates, and retrieval metrics for each query length without and with the templates.

    Lengths without queries are omitted. `with_templates` is None if there are no templates.
    """

    templates: QueryTemplates
    plain: list[QueryLengthResult]
    with_templates: list[QueryLengthResult] | None = None

    def describe_choice(self) -> str:
        """Describe in one line which templates were chosen and how much the templates increase the mAP."""
        if self.with_templates is None:
            return "Short queries are encoded without templates: no templates improve results on the held-out images"
        gains = []
        for before, after in zip(self.plain, self.with_templates, strict=True):
            if int(before.words) <= self.templates.max_words:
                gains.append(f"{before.mean_ap:.1f} to {after.mean_ap:.1f} for {before.words}-word queries")
        templates = ", ".join(map(repr, self.templates.templates))
        return f"Templates for short queries: {templates}. The templates increase the mAP from {', '.join(gains)}"

    def to_dict(self) -> dict[str, Any]:
        with_templates = self.with_templates
        return {
            "templates": list(self.templates.templates),
            "max_words": self.templates.max_words,
            "short queries": [length.to_dict() for length in self.plain],
            "short queries with templates": with_templates and [length.to_dict() for length in with_templates],
        }


def evaluate_short_queries(
    embeddings: EmbeddingSource, ranks: RetrievalRanks, templates: QueryTemplates = NO_TEMPLATES
) -> ShortQueryResult:
    """Compute retrieval metrics for each query length.

    If there are templates, short queries are also evaluated with the mean embedding of the query and all prompts (see
    `build_query_prompts`).

    Raises:
        ValueError: The source has no embedding for a query, or no queries can be built from the captions.
    """
    queries = build_short_queries([record.captions for record in ranks.records])
    if not queries:
        raise ValueError(
            "cannot build queries: no caption has four or more words, and no phrase of up to three words occurs in the "
            "captions of at least three images but at most a third of all images"
        )
    candidates = [NO_TEMPLATES, templates] if templates.templates else [NO_TEMPLATES]
    return ShortQueryResult(templates, *_evaluate_labelled_queries(embeddings, ranks.images, queries, candidates))


def choose_query_templates(embeddings: EmbeddingSource, ranks: RetrievalRanks) -> ShortQueryResult:
    """Choose prompt templates, and the maximum length of the queries to which the templates are applied.

    A candidate helps at a query length if the 95% bootstrap interval of the mAP gain is above 0. The maximum length of
    a candidate is the largest n for which the candidate helps at all lengths from 1 to n. The candidate with the
    largest total gain at lengths 1 to n is chosen, or no templates if no candidate helps single-word queries.

    Raises:
        ValueError: No short queries can be built from the captions (see `build_short_queries`).
    """
    all_queries = build_short_queries([record.captions for record in ranks.records], MAX_CANDIDATE_QUERIES)
    queries = {words: all_queries[words] for words in map(str, PHRASE_LENGTHS) if words in all_queries}
    if not queries:
        raise ValueError("no word or short phrase occurs in the captions of three or more held-out images")
    candidates = [NO_TEMPLATES, *(QueryTemplates(templates) for templates in CANDIDATES)]
    plain, *results = _evaluate_labelled_queries(embeddings, ranks.images, queries, candidates)
    best, best_scores, best_gain = NO_TEMPLATES, None, 0.0
    for candidate, scores in zip(candidates[1:], results, strict=True):
        max_words, gain = _measure_template_gain(plain, scores)
        if gain > best_gain:
            best, best_gain = QueryTemplates(candidate.templates, max_words), gain
            best_scores = scores[:max_words] + plain[max_words:]  # longer queries do not use templates
    return ShortQueryResult(best, plain, best_scores)


def _measure_template_gain(
    plain: Sequence[QueryLengthResult], scores: Sequence[QueryLengthResult]
) -> tuple[int, float]:
    """Return the maximum query length at which templates help, and the total mAP gain up to the maximum, or (0, 0)."""
    max_words, gain = 0, 0.0
    for words, before, after in zip(PHRASE_LENGTHS, plain, scores, strict=False):
        differences = after.scores - before.scores
        lowest_gain, _ = compute_mean_interval(differences, bounds=(-1.0, 1.0))
        if before.words != str(words) or lowest_gain <= 0:
            break
        max_words, gain = words, gain + float(differences.mean())
    return max_words, gain


def _evaluate_labelled_queries(
    embeddings: EmbeddingSource,
    images: Tensor,
    queries: Mapping[str, Sequence[LabelledQuery]],
    candidates: Sequence[QueryTemplates],
) -> list[list[QueryLengthResult]]:
    texts = [query.text for length_queries in queries.values() for query in length_queries]
    prompts = list(
        dict.fromkeys(prompt for templates in candidates for prompt in build_query_prompts(texts, templates)[0])
    )
    row_of_prompt = {prompt: row for row, prompt in enumerate(prompts)}
    prompt_vectors = embeddings.encode_texts(prompts)
    results = []
    for templates in candidates:
        scores = []
        for words, length_queries in queries.items():
            length_prompts, counts = build_query_prompts([query.text for query in length_queries], templates)
            rows = [row_of_prompt[prompt] for prompt in length_prompts]
            vectors = torch.from_numpy(average_prompt_embeddings(prompt_vectors[rows].numpy(), counts))
            relevant = [query.relevant for query in length_queries]
            ranks = compute_positive_ranks(vectors, images, relevant)
            precisions = [compute_average_precision(query_ranks) for query_ranks in ranks]
            chances = [compute_chance_average_precision(len(indices), len(images)) for indices in relevant]
            scores.append(
                QueryLengthResult(
                    words=words,
                    queries=length_queries,
                    scores=torch.tensor(precisions, dtype=torch.float64),
                    chance=statistics.fmean(chances),
                    mean_relevant=statistics.fmean(map(len, relevant)),
                )
            )
        results.append(scores)
    return results


# ---- queries ---------------------------------------------------------------------------------------------------------


def build_short_queries(
    captions: Sequence[Sequence[str]],
    max_queries: int = 500,
    min_images: int = 3,
    max_share: float = 1 / 3,
    seed: int = 0,
) -> dict[str, list[LabelledQuery]]:
    """Build queries of different lengths from image captions.

    Queries of one to three words are phrases (see `extract_caption_phrases`) that occur in the captions of at least
    `min_images` images, but at most a fraction `max_share` of all images. Matching ignores case but does not use
    stemming, so "dog" does not match "dogs".

    Longer queries are complete captions of four to seven words, or of eight or more words. All images with the same
    caption, ignoring case and punctuation, are relevant.

    Args:
        max_queries: Maximum number of queries per length. Larger sets of queries are sampled at random.

    Returns:
        Queries keyed by their number of words: "1", "2", "3", "4–7" and "8+". Lengths without queries are omitted.

    Raises:
        ValueError: The captions are in a language without spaces between words.
    """
    if measure_caption_lengths([text for texts in captions for text in texts])[0] != "words":
        raise ValueError("captions without spaces between words cannot be split into phrases")
    queries = {}
    for num_words in PHRASE_LENGTHS:
        counts = Counter(phrase for texts in captions for phrase in extract_caption_phrases(texts, num_words))
        max_images = max_share * len(captions)
        frequent = {phrase for phrase, count in counts.items() if min_images <= count <= max_images}
        del counts  # frees much memory, because most phrases are rare
        selected = _draw_sorted_sample(frequent, max_queries, seed)
        images = defaultdict(list)
        for image, texts in enumerate(captions):
            for phrase in extract_caption_phrases(texts, num_words).intersection(selected):
                images[phrase].append(image)
        queries[str(num_words)] = [LabelledQuery(phrase, tuple(images[phrase])) for phrase in selected]
    for name, lengths in CAPTION_LENGTHS.items():
        texts_of_words: dict[tuple[str, ...], str] = {}
        images_of_words = defaultdict(set)
        for image, texts in enumerate(captions):
            for text in texts:
                words = tuple(split_words(text))
                if len(words) in lengths:
                    texts_of_words.setdefault(words, text)
                    images_of_words[words].add(image)
        selected_words = _draw_sorted_sample(texts_of_words, max_queries, seed)
        queries[name] = [LabelledQuery(texts_of_words[w], tuple(sorted(images_of_words[w]))) for w in selected_words]
    return {name: length_queries for name, length_queries in queries.items() if length_queries}


def _draw_sorted_sample(items: Iterable[Item], count: int, seed: int) -> list[Item]:
    """Return a sorted random sample of up to `count` items, which does not depend on the order of the items."""
    ordered = sorted(items)
    return ordered if len(ordered) <= count else sorted(random.Random(seed).sample(ordered, count))


def split_words(text: str) -> list[str]:
    """Split a text into lower-case words without punctuation."""
    return _WORD.findall(_SEPARATE_POSSESSIVE.sub("", text.lower()))


def extract_caption_phrases(captions: Iterable[str], num_words: int) -> set[str]:
    """Return the phrases of `num_words` words that occur in an image's captions, in lower case.

    A phrase is a sequence of words without punctuation between the words. The first and the last word must have at
    least two characters and at least one letter, and must not be in `STOP_WORDS`.
    """
    return {
        " ".join(phrase)
        for caption in captions
        for clause in map(split_words, _PUNCTUATION.split(caption))
        for phrase in zip(*(clause[offset:] for offset in range(num_words)), strict=False)
        if _is_content_word(phrase[0]) and _is_content_word(phrase[-1])
    }


def _is_content_word(word: str) -> bool:
    return len(word) > 1 and word.replace("’", "'") not in STOP_WORDS and any(map(str.isalpha, word))


# ---- report ----------------------------------------------------------------------------------------------------------

Curves = Mapping[str, Sequence[QueryLengthResult]]
"""Results for each query length, keyed by model name, with the suffix ", with templates" if templates are used."""


def build_short_query_blocks(results: Sequence[tuple[Benchmark, Sequence[BenchmarkResult]]]) -> list[Block]:
    """Return a report section for each caption field, including accuracies on classification benchmarks."""
    accuracies = {b.name: _format_accuracy_cells(r) for b, r in results if b.kind == "classification"}
    blocks: list[Block] = []
    for benchmark, model_results in results:
        for field in dict.fromkeys(name for result in model_results for name in result.short_queries):
            curves = {}
            for result in model_results:
                scores = result.short_queries.get(field)
                if scores is not None:
                    curves[result.model] = scores.plain
                    if scores.with_templates is not None:
                        curves[f"{result.model}, with templates"] = scores.with_templates
            blocks += [
                Heading(f"{benchmark.name}, {field}: retrieval quality by query length"),
                build_query_length_table(curves, accuracies),
                Paragraph(REPORT_NOTE),
            ]
    return blocks


def build_query_length_table(curves: Curves, accuracies: Mapping[str, Mapping[str, str | None]]) -> Table:
    """Return a table of mAP by query length and of `accuracies`, keyed by benchmark name and then by row label.

    The last rows are the differences between the first model and each other model, with paired 95% intervals.
    """
    name, first = next(iter(curves.items()))
    header = ["model", *(f"{length.words} {'word' if length.words == '1' else 'words'}: mAP" for length in first)]
    header += [f"{benchmark}: top-1" for benchmark in accuracies]
    rows: list[list[Any]] = [["chance", *(100 * s.chance for s in first), *([None] * len(accuracies))]]
    for model, lengths in curves.items():
        cells: list[str | None] = [format_with_interval(s.mean_ap, s.mean_ap_interval) for s in lengths]
        rows.append([model, *cells, *(values.get(model) for values in accuracies.values())])
    highlight = frozenset(range(1, len(rows)))
    for other, lengths in list(curves.items())[1:]:
        cells = [_format_mean_ap_difference(a, b) for a, b in zip(first, lengths, strict=True)]
        label = f"{name} minus {other}"
        rows.append([label, *cells, *(values.get(label) for values in accuracies.values())])
    return Table(header, rows, highlight)


def _format_accuracy_cells(results: Sequence[BenchmarkResult]) -> dict[str, str | None]:
    cells: dict[str, str | None] = {}
    for result in results:
        summary = result.summary
        cells[result.model] = format_with_interval(summary["metrics"]["top-1"], summary["intervals"]["top-1"])
        if "difference" in summary:
            cells[f"{results[0].model} minus {result.model}"] = format_metric_difference(summary["difference"], "top-1")
    return cells


def _format_mean_ap_difference(first: QueryLengthResult, other: QueryLengthResult) -> str | None:
    if first.queries != other.queries:
        return None
    differences = first.scores - other.scores
    interval = compute_mean_interval(differences, bounds=(-1.0, 1.0))
    return format_with_interval(100 * float(differences.mean()), interval, "+.1f")
