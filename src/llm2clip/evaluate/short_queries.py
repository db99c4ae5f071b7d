"""Text-to-image retrieval by query length, and the choice of prompt templates for short search queries.

Queries are built from the captions of the evaluated images. For queries of one to three words, all images with a
caption that mentions the query are relevant. Longer queries are complete captions, and all images with that caption
are relevant. Ranks are exact, and ties count against the model (see `metrics.py`).

The metrics usually underestimate models, because images that match a query are wrong answers if their captions do not
mention the query. Use the metrics only to compare models on the same images.

Templates such as "a photo of {}" improve the results of models that were trained on complete captions. Models that
were trained on short phrases, or that use CLIP's embedding space, may not need templates. `fit` therefore compares the
templates in `CANDIDATES` on held-out images.
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
from llm2clip.reports import Block, Heading, Paragraph, Table, format_value_with_interval

PHRASE_LENGTHS = (1, 2, 3)  # numbers of words
CAPTION_LENGTHS = {"4–7": range(4, 8), "8+": range(8, 1 << 30)}  # numbers of words
Item = TypeVar("Item", str, tuple[str, ...])
# Letters and digits, optionally joined by apostrophes or hyphens, as in "t-shirt" and "man's".
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
# The space before a possessive ending in tokenized captions, as in "the dog 's mouth".
_SEPARATE_POSSESSIVE = re.compile(r"\s+(?=['’]s\b)")
_PUNCTUATION = re.compile(r"[^\w\s'’-]+")
# English words that do not describe anything visible.
# Standard stop word lists are not used, because they also contain words such as "two", "fire" and "empty".
_OTHER_STOP_WORDS = """
having doing get gets getting appears seems isn't aren't
hers herself himself itself mine myself ours theirs themselves yours whose someone something he's she's there's
about amid among amongst atop besides front per throughout underneath until upon via within
although nor though whether almost still well
"""
STOP_WORDS = (DETERMINERS | CONNECTIVES | FUNCTION_WORDS | make_word_set(_OTHER_STOP_WORDS)) - NUMBERS - {"back"}
# Candidates in `choose_query_templates`: a single template, and an ensemble of four templates.
CANDIDATES = (("a photo of {}",), ("a photo of {}", "a photo of a {}.", "a picture of {}", "there is {}"))
MAX_CANDIDATE_QUERIES = 300  # maximum number of queries per length when templates are compared
REPORT_NOTE = (
    "Queries of one to three words are words and phrases from the captions. Every image with a caption that mentions "
    "the query is a correct answer. All other images are wrong answers, even if they match the query. Longer queries "
    "are complete captions. Intervals are 95% bootstrap confidence intervals over queries."
)


@dataclass(frozen=True)
class LabelledQuery:
    """Text query with the indices of the relevant images."""

    text: str
    relevant: tuple[int, ...]


@dataclass(frozen=True)
class QueryLengthResult:
    """Retrieval results for all queries of a certain length."""

    words: str  # number of words per query, such as "2" or "4–7"
    queries: Sequence[LabelledQuery]
    scores: Tensor  # average precision of each query, from 0 to 1, float64 of shape (Q,)
    chance: float  # expected mAP of a random ranking, from 0 to 1
    mean_relevant: float  # mean number of relevant images per query

    @property
    def mean_ap(self) -> float:
        """Mean average precision (mAP), in percent."""
        return 100 * float(self.scores.mean())

    @cached_property
    def mean_ap_interval(self) -> tuple[float, float]:
        """95% confidence interval of the mAP in percent. Cached, because bootstrapping is slow."""
        return compute_mean_interval(self.scores)

    def to_dict(self) -> dict[str, Any]:
        """Return an entry for results.json. Metrics are in percent."""
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
    """Retrieval results for each query length, without templates (`plain`) and with `templates`, if there are any.

    Query lengths without queries are omitted.
    """

    templates: QueryTemplates
    plain: list[QueryLengthResult]
    with_templates: list[QueryLengthResult] | None = None

    def describe_templates(self) -> str:
        """Describe in one line which templates were chosen, and by how much they increase the mAP."""
        if self.with_templates is None:
            return "Short queries are encoded without templates, because no templates improve mAP on held-out images"
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

    If `templates` are specified, short queries are evaluated twice: with the embedding of the query, and with the mean
    embedding of the query and its prompts (see `build_query_prompts`).

    Raises:
        ValueError: No queries can be built from the captions, or a query has no embedding.
    """
    queries = build_short_queries([record.captions for record in ranks.records])
    if not queries:
        raise ValueError(
            "cannot build queries: captions must have four or more words, or contain phrases of up to three words that "
            "occur in the captions of at least three images, but of at most a third of all images"
        )
    candidates = [NO_TEMPLATES, templates] if templates.templates else [NO_TEMPLATES]
    return ShortQueryResult(templates, *_evaluate_labelled_queries(embeddings, ranks.images, queries, candidates))


def choose_query_templates(embeddings: EmbeddingSource, ranks: RetrievalRanks) -> ShortQueryResult:
    """Choose prompt templates for short queries, and the maximum length of the queries to which they are applied.

    Templates help at a query length if they increase the mAP and 0 is outside the 95% bootstrap interval of the gain.
    Their maximum length is the largest n such that they help at all lengths from 1 to n. The templates with the largest
    total gain at lengths 1 to n are chosen. If no templates help single-word queries, none are chosen.

    Raises:
        ValueError: No short queries can be built from the captions (see `build_short_queries`).
    """
    all_queries = build_short_queries([record.captions for record in ranks.records], MAX_CANDIDATE_QUERIES)
    queries = {words: all_queries[words] for words in map(str, PHRASE_LENGTHS) if words in all_queries}
    if not queries:
        raise ValueError("no word or short phrase occurs in the captions of at least three held-out images")
    candidates = [NO_TEMPLATES, *(QueryTemplates(templates) for templates in CANDIDATES)]
    plain, *results = _evaluate_labelled_queries(embeddings, ranks.images, queries, candidates)
    best, best_scores, best_gain = NO_TEMPLATES, None, 0.0
    for candidate, scores in zip(candidates[1:], results, strict=True):
        max_words, gain = _measure_template_gain(plain, scores)
        if gain > best_gain:
            best, best_gain = QueryTemplates(candidate.templates, max_words), gain
            best_scores = scores[:max_words] + plain[max_words:]  # templates are not applied to longer queries
    return ShortQueryResult(best, plain, best_scores)


def _measure_template_gain(
    plain: Sequence[QueryLengthResult], scores: Sequence[QueryLengthResult]
) -> tuple[int, float]:
    """Return the maximum query length at which templates help, and the total mAP gain at lengths up to the maximum."""
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
    `min_images` images, but of at most the fraction `max_share` of all images. Matching ignores case but does not use
    stemming: "dog" does not match "dogs".

    Longer queries are complete captions. All images with that caption, ignoring case and punctuation, are relevant.

    Args:
        max_queries: Maximum number of queries per length. If there are more queries, a random sample is used.

    Returns:
        Queries, keyed by number of words: "1", "2", "3", "4–7" and "8+". Lengths without queries are omitted.

    Raises:
        ValueError: The language of the captions does not use spaces between words.
    """
    if measure_caption_lengths([text for texts in captions for text in texts])[0] != "words":
        raise ValueError("cannot build short queries, because the captions have no spaces between words")
    queries = {}
    for num_words in PHRASE_LENGTHS:
        counts = Counter(phrase for texts in captions for phrase in extract_caption_phrases(texts, num_words))
        max_images = max_share * len(captions)
        frequent = {phrase for phrase, count in counts.items() if min_images <= count <= max_images}
        del counts  # free the memory, because most phrases are rare
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
    """Return a sorted random sample of up to `count` items. The order of `items` does not affect the sample."""
    ordered = sorted(items)
    return ordered if len(ordered) <= count else sorted(random.Random(seed).sample(ordered, count))


def split_words(text: str) -> list[str]:
    """Split a text into lower-case words without punctuation."""
    return _WORD.findall(_SEPARATE_POSSESSIVE.sub("", text.lower()))


def extract_caption_phrases(captions: Iterable[str], num_words: int) -> set[str]:
    """Return all phrases of `num_words` words in an image's captions, in lower case.

    A phrase is a sequence of words without punctuation between them. The first word and the last word must each have at
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
"""Results for each query length, keyed by model name. The suffix ", with templates" marks results with templates."""


def build_short_query_sections(results: Sequence[tuple[Benchmark, Sequence[BenchmarkResult]]]) -> list[Block]:
    """Return report sections on short queries, one per caption field, with accuracies on classification benchmarks."""
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
    """Return a table of mAP by query length, and of `accuracies`, keyed by benchmark name and then by row label.

    The last rows show the differences between the first model and each other model, with paired 95% intervals.
    """
    name, first = next(iter(curves.items()))
    header = ["model", *(f"{length.words} {'word' if length.words == '1' else 'words'}: mAP" for length in first)]
    header += [f"{benchmark}: top-1" for benchmark in accuracies]
    rows: list[list[Any]] = [["chance", *(100 * s.chance for s in first), *([None] * len(accuracies))]]
    for model, lengths in curves.items():
        cells: list[str | None] = [format_value_with_interval(s.mean_ap, s.mean_ap_interval) for s in lengths]
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
        cells[result.model] = format_value_with_interval(summary["metrics"]["top-1"], summary["intervals"]["top-1"])
        if "difference" in summary:
            cells[f"{results[0].model} minus {result.model}"] = format_metric_difference(summary["difference"], "top-1")
    return cells


def _format_mean_ap_difference(first: QueryLengthResult, other: QueryLengthResult) -> str | None:
    if first.queries != other.queries:
        return None
    differences = first.scores - other.scores
    interval = compute_mean_interval(differences, bounds=(-1.0, 1.0))
    return format_value_with_interval(100 * float(differences.mean()), interval, "+.1f")
