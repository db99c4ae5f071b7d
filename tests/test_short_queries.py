"""Short queries: which queries are built, and metrics compared with scikit-learn and with full sorts."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score

from llm2clip.data.records import Record
from llm2clip.data.skip_log import SkipLog
from llm2clip.evaluate.metrics import (
    QUERY_TILE,
    compute_average_precision,
    compute_chance_average_precision,
    compute_mean_interval,
    compute_positive_ranks,
    draw_bootstrap_counts,
)
from llm2clip.evaluate.retrieval import RetrievalRanks
from llm2clip.evaluate.short_queries import (
    CANDIDATES,
    LabelledQuery,
    QueryLengthResult,
    build_query_length_table,
    build_short_queries,
    choose_query_templates,
    evaluate_short_queries,
    extract_caption_phrases,
    split_words,
)
from llm2clip.models.prompts import NO_TEMPLATES, QueryTemplates

COLORS, ANIMALS = ("red", "blue", "green", "white"), ("dog", "cat", "horse", "deer")


def make_ranks(captions: Sequence[tuple[str, ...]], images: torch.Tensor) -> RetrievalRanks:
    """Return images with captions; short queries do not use the ranks of the captions."""
    records = [Record(str(n), None, texts) for n, texts in enumerate(captions)]
    unused = torch.empty(0)
    return RetrievalRanks(records, images, texts=unused, image_of_text=unused, image_ranks=unused, text_ranks=unused)


def random_vectors(count: int, dimension: int = 6, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed)), dim=-1)


# ---- queries ---------------------------------------------------------------------------------------------------------


def test_split_words_keeps_hyphens_and_apostrophes() -> None:
    assert split_words("A man's T-shirt, 2 cats_dogs — Über-Öl!") == [
        "a", "man's", "t-shirt", "2", "cats", "dogs", "über-öl",
    ]  # fmt: skip
    assert split_words("the dog 's 'red' ball 's") == ["the", "dog's", "red", "ball's"]


def test_caption_phrases_do_not_span_punctuation_or_end_with_stop_words() -> None:
    captions = ["A man in red, two dogs run.", "The dog"]
    assert extract_caption_phrases(captions, 1) == {"man", "red", "two", "dogs", "run", "dog"}
    assert extract_caption_phrases(captions, 2) == {"two dogs", "dogs run"}
    assert extract_caption_phrases(captions, 3) == {"man in red", "two dogs run"}
    assert extract_caption_phrases(["7 of x"], 1) == set(), "digits and single letters are not phrases"


def test_build_short_queries_finds_all_images_that_mention_a_phrase() -> None:
    captions = [
        ["A red dog runs.", "A dog!"],
        ["The red dog sits", "nothing else here"],
        ["red, dog", "A big red dog runs"],
        ["Redbird and hotdog", "a DOG"],
        ["grey wall", "grey"],
        ["grey sky", "Nothing else, here"],
    ]
    queries = build_short_queries(captions, min_images=2, max_share=0.7)
    assert queries["1"] == [
        LabelledQuery("dog", (0, 1, 2, 3)),
        LabelledQuery("else", (1, 5)),
        LabelledQuery("grey", (4, 5)),
        LabelledQuery("nothing", (1, 5)),
        LabelledQuery("red", (0, 1, 2)),
        LabelledQuery("runs", (0, 2)),
    ]
    assert queries["2"] == [
        LabelledQuery("dog runs", (0, 2)),
        LabelledQuery("nothing else", (1, 5)),
        LabelledQuery("red dog", (0, 1, 2)),
    ]
    assert queries["3"] == [LabelledQuery("red dog runs", (0, 2))]
    assert queries["4–7"] == [
        LabelledQuery("A big red dog runs", (2,)),
        LabelledQuery("A red dog runs.", (0,)),
        LabelledQuery("The red dog sits", (1,)),
    ]
    assert "8+" not in queries
    assert [query.text for query in build_short_queries(captions, min_images=3, max_share=0.6)["1"]] == ["red"]


def test_equal_captions_share_their_images_and_samples_are_reproducible() -> None:
    long = "one two three four five six seven eight"
    captions = [[long], [f"{long.title()}!"], *([f"caption number {n} of an image"] for n in range(30))]
    queries = build_short_queries(captions, max_queries=7)
    assert queries["8+"] == [LabelledQuery(long, (0, 1))]
    assert len(queries["4–7"]) == 7 and len({query.text for query in queries["4–7"]}) == 7
    assert queries["4–7"] == build_short_queries(captions, max_queries=7)["4–7"]
    assert queries["4–7"] != build_short_queries(captions, max_queries=7, seed=1)["4–7"]
    for query in queries["4–7"]:
        assert captions[query.relevant[0]] == [query.text] and len(query.relevant) == 1


# ---- metrics ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile_size", [16, 1024])
def test_metrics_match_scikit_learn(tile_size: int) -> None:
    """More queries than one tile, and items that do not fill the last tile. Random scores have no ties."""
    images, queries = random_vectors(75), random_vectors(QUERY_TILE + 5, seed=1)
    generator = torch.Generator().manual_seed(2)
    relevant = [torch.randperm(75, generator=generator)[: 1 + n % 20].tolist() for n in range(len(queries))]
    ranks = compute_positive_ranks(queries, images, relevant, tile_size)
    exact = (queries.double() @ images.double().T).numpy()
    for n, indices in enumerate(relevant):
        truth = np.zeros(75)
        truth[indices] = 1
        order = (-exact[n]).argsort()
        assert ranks[n].tolist() == truth[order].nonzero()[0].tolist()
        expected = average_precision_score(truth, exact[n])
        assert compute_average_precision(ranks[n]) == pytest.approx(expected, abs=1e-12)


def test_wrong_answers_rank_first_among_equal_scores() -> None:
    """Copies of an image have equal scores, wherever they are in the matrix."""
    images = random_vectors(9).repeat(5, 1)[:41]
    queries = random_vectors(3, seed=1)
    relevant = [[0, 9, 4], [40, 13], [8]]
    scores = queries.double() @ images.double().T
    for n, ranks in enumerate(compute_positive_ranks(queries, images, relevant, 16)):
        keys = [(-round(scores[n, i].item(), 9), i in relevant[n]) for i in range(41)]
        order = sorted(range(41), key=keys.__getitem__)
        assert ranks.tolist() == [rank for rank, i in enumerate(order) if i in relevant[n]]
    constant = compute_positive_ranks(torch.ones(1, 2), torch.ones(6, 2), [[0, 3]])
    assert constant[0].tolist() == [4, 5], "a model that returns a constant has the worst ranks"


@pytest.mark.parametrize(("num_relevant", "num_images"), [(1, 1), (1, 5), (2, 6), (6, 6), (3, 12)])
def test_chance_scores_are_the_mean_over_all_rankings(num_relevant: int, num_images: int) -> None:
    subsets = itertools.combinations(range(num_images), num_relevant)
    scores = [compute_average_precision(torch.tensor(subset)) for subset in subsets]
    assert compute_chance_average_precision(num_relevant, num_images) == pytest.approx(np.mean(scores))


def test_mean_interval_resamples_queries() -> None:
    scores = torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    means = [np.average(scores.numpy(), weights=counts.numpy()) for counts in draw_bootstrap_counts(50)]
    np.testing.assert_allclose(compute_mean_interval(scores), 100 * np.quantile(means, [0.025, 0.975]))


def test_models_with_other_queries_have_no_difference() -> None:
    """Images that one model cannot decode, but another has precomputed embeddings for, change the queries."""
    scores = torch.rand(3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    queries = [LabelledQuery(text, (0, 1)) for text in ("dog", "cat", "sofa")]
    lengths = QueryLengthResult("1", queries, scores, 0.0, 2.0)
    other = QueryLengthResult("1", [*queries[:2], LabelledQuery("sofa", (0, 2))], scores - 0.1, 0.0, 2.0)
    fewer = QueryLengthResult("1", queries[:2], scores[:2], 0.0, 2.0)
    same = dataclasses.replace(lengths, scores=scores - 0.1)
    table = build_query_length_table({"a": [lengths], "b": [other], "c": [fewer], "d": [same]}, {})
    assert table.rows[-3:-1] == [["a minus b", None], ["a minus c", None]]
    assert table.rows[-1][0] == "a minus d" and table.rows[-1][1].startswith("+10.0 (")


# ---- evaluation ------------------------------------------------------------------------------------------------------


class FakeEmbeddings:
    """Embeds every word as a random vector, and a text as the sum of its words."""

    log = SkipLog()
    query_templates = NO_TEMPLATES

    def encode_texts(self, texts: list[str]) -> torch.Tensor:
        return torch.stack([F.normalize(sum(self.word(w) for w in split_words(text)), dim=0) for text in texts])

    @staticmethod
    def word(word: str) -> torch.Tensor:
        return random_vectors(1, 8, seed=int.from_bytes(word.encode()[:6], "little"))[0]

    def encode_images(self, refs: list[object]) -> tuple[torch.Tensor, list[int]]:
        raise NotImplementedError

    def count_truncated_texts(self, texts: list[str]) -> int | None:
        return None


def test_evaluate_short_queries_with_and_without_templates() -> None:
    captions = [("a red dog", "the dog runs"), ("a red cat on a big grey wall",), ("a dog", "red dog"), ("blue sky",)]
    embeddings = FakeEmbeddings()
    ranks = make_ranks(captions * 3, random_vectors(12, 8))
    result = evaluate_short_queries(embeddings, ranks, QueryTemplates(("a photo of a {}",)))
    assert [length.words for length in result.plain] == ["1", "2", "3", "8+"]
    queries = build_short_queries([record.captions for record in ranks.records])
    for lengths in (result.plain, result.with_templates):
        for length in lengths:
            assert len(length.scores) == len(queries[length.words])
            for query, scores in zip(queries[length.words], length.scores, strict=True):
                prompts = [query.text]
                if lengths is result.with_templates and length.words in "123":
                    prompts.append(f"a photo of a {query.text}")
                vector = F.normalize(embeddings.encode_texts(prompts).double().mean(0), dim=0)
                truth = np.isin(np.arange(12), query.relevant)
                expected = average_precision_score(truth, (ranks.images.double() @ vector).numpy())
                assert float(scores) == pytest.approx(expected)
    one_word = result.plain[0]
    entry = one_word.to_dict()
    assert entry["queries"] == 7 and entry["words"] == "1"
    assert entry["mAP"] == pytest.approx(100 * float(one_word.scores.mean()))
    chances = [compute_chance_average_precision(len(query.relevant), 12) for query in queries["1"]]
    assert entry["mAP chance"] == pytest.approx(100 * np.mean(chances))
    low, high = entry["mAP interval"]
    assert low <= entry["mAP"] <= high
    assert evaluate_short_queries(embeddings, ranks).with_templates is None


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        (["一只狗在雪地里奔跑", "两个孩子在沙滩上玩耍", "一只猫坐在窗台上"], "no spaces between words"),
        (["red", "blue sky", "green"], "captions must have four or more words.* at most a third of all images"),
    ],
)
def test_captions_without_queries_are_rejected(captions: list[str], message: str) -> None:
    ranks = make_ranks([(text,) for text in captions], random_vectors(3))
    with pytest.raises(ValueError, match=message):
        evaluate_short_queries(FakeEmbeddings(), ranks)


class NoisyEmbeddings(FakeEmbeddings):
    """Adds noise to the embeddings of texts that do not start with `prefix`."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def encode_texts(self, texts: list[str]) -> torch.Tensor:
        vectors = super().encode_texts([text.removeprefix(self.prefix) for text in texts])
        noise = [0 * self.word("") if text.startswith(self.prefix) else self.word(text[::-1]) for text in texts]
        return F.normalize(vectors + 4 * torch.stack(noise), dim=1)


def test_choose_query_templates_compares_the_candidates_on_the_images() -> None:
    captions = [(f"a {color} {animal} runs",) for color in COLORS for animal in ANIMALS for _ in range(3)]
    ranks = make_ranks(captions, FakeEmbeddings().encode_texts([text for (text,) in captions]))
    embeddings = NoisyEmbeddings("a photo of ")
    choice = choose_query_templates(embeddings, ranks)
    results = {}
    for candidate in CANDIDATES:
        result = evaluate_short_queries(embeddings, ranks, QueryTemplates(candidate))
        assert result.with_templates is not None
        pairs = zip(result.plain[:3], result.with_templates[:3], strict=True)
        gains = [after.scores.mean() - before.scores.mean() for before, after in pairs]
        results[candidate] = float(sum(gains)), result.with_templates[:3]
    best = max(CANDIDATES, key=lambda candidate: results[candidate][0])
    assert choice.templates == QueryTemplates(best, 3) and results[best][0] > 0
    assert choice.with_templates is not None
    for length, expected in zip(choice.with_templates, results[best][1], strict=True):
        assert length.words == expected.words and torch.allclose(length.scores, expected.scores)
    assert QueryTemplates.from_dict(choice.to_dict()) == choice.templates
    assert repr(best[0]) in choice.describe_templates()

    bad = choose_query_templates(NoisyEmbeddings(""), ranks)  # no noise: templates only add misleading words
    assert bad.templates == NO_TEMPLATES and bad.with_templates is None
    assert "encoded without templates" in bad.describe_templates()
