"""Choice of the prompt templates with which a model encodes short search queries.

Templates such as "a photo of {}" help a model that was trained on complete captions. A model that was trained on short
phrases, or that uses CLIP's embedding space, may not need them. `fit` therefore compares the candidates on its held-out
images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llm2clip.evaluate.embeddings import EmbeddingSource
from llm2clip.evaluate.retrieval_eval import RetrievalRanks
from llm2clip.evaluate.short_queries import (
    PHRASE_LENGTHS,
    LengthScores,
    build_queries,
    mean_intervals,
    score_queries,
)
from llm2clip.models.prompts import LITERAL, QueryTemplates

MAX_QUERIES = 300  # per query length
# A single template, and an ensemble of four templates.
CANDIDATES = (
    ("a photo of {}",),
    ("a photo of {}", "a photo of a {}.", "a picture of {}", "there is {}"),
)


@dataclass(frozen=True)
class TemplateChoice:
    """The chosen templates, and the results for each query length, without templates (`literal`) and with templates.

    `with_templates` is None if no templates were chosen.
    """

    templates: QueryTemplates
    literal: list[LengthScores]
    with_templates: list[LengthScores] | None

    def summary(self) -> str:
        """Return a line that states which templates were chosen and how much they increase mAP."""
        if self.with_templates is None:
            return "Short queries are encoded as they are: no templates improve them on the held-out images"
        gains = []
        for before, after in zip(self.literal, self.with_templates, strict=True):
            if int(before.words) <= self.templates.max_words:
                literal_map, template_map = (100 * float(length.scores[:, 0].mean()) for length in (before, after))
                gains.append(f"{literal_map:.1f} to {template_map:.1f} for {before.words}-word queries")
        templates = ", ".join(map(repr, self.templates.templates))
        return f"Templates for short queries: {templates}. They increase mAP from {', from '.join(gains)}"

    def to_dict(self) -> dict[str, Any]:
        """Return the choice as a JSON-compatible dict. See `LengthScores.metrics` for the results."""
        with_templates = self.with_templates
        return {
            "templates": list(self.templates.templates),
            "max_words": self.templates.max_words,
            "short queries": [length.metrics() for length in self.literal],
            "short queries with templates": with_templates and [length.metrics() for length in with_templates],
        }


def choose_query_templates(embeddings: EmbeddingSource, ranks: RetrievalRanks) -> TemplateChoice:
    """Choose the templates, and the maximum length in words of the queries to which they are applied.

    A candidate helps at a query length if the 95% bootstrap interval of its gain in mAP is above 0. A candidate's
    maximum length is the largest n such that it helps at all lengths from 1 to n. The candidate with the largest sum of
    gains up to its maximum length is chosen. If no candidate helps with single words, no templates are chosen.

    With I images and Q queries per length, the time is O(Q * I), and the memory is O(Q + I).

    Args:
        ranks: Images, captions and image embeddings of one caption field.

    Raises:
        ValueError: If no short queries can be built from the captions (see `build_queries`).
    """
    all_queries = build_queries([record.captions for record in ranks.records], MAX_QUERIES)
    queries = {words: all_queries[words] for words in map(str, PHRASE_LENGTHS) if words in all_queries}
    if not queries:
        raise ValueError("no word or short phrase occurs in the captions of three or more held-out images")
    candidates = [LITERAL, *(QueryTemplates(templates) for templates in CANDIDATES)]
    literal, *results = score_queries(embeddings, ranks.images, queries, candidates)
    best, best_scores, best_gain = LITERAL, None, 0.0
    for candidate, scores in zip(candidates[1:], results, strict=True):
        max_words, gain = _measure_gain(literal, scores)
        if gain > best_gain:
            best, best_gain = QueryTemplates(candidate.templates, max_words), gain
            best_scores = scores[:max_words] + literal[max_words:]  # longer queries are not inserted into templates
    return TemplateChoice(best, literal, best_scores)


def _measure_gain(literal: Sequence[LengthScores], scores: Sequence[LengthScores]) -> tuple[int, float]:
    """Return the maximum query length at which templates help, and the sum of the gains in mAP up to this length.

    Both are 0 if templates do not help with single words.
    """
    max_words, gain = 0, 0.0
    for words, before, after in zip(PHRASE_LENGTHS, literal, scores, strict=False):
        differences = after.scores - before.scores
        lowest_gain = float(mean_intervals(differences, bounds=(-1.0, 1.0))[0, 0])
        if before.words != str(words) or lowest_gain <= 0:
            break
        max_words, gain = words, gain + float(differences[:, 0].mean())
    return max_words, gain
