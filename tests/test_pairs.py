"""Which pairs of texts a step of tune sees."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from llm2clip.data.hard_negatives import caption_vectors, grouped_permutation
from llm2clip.data.pairs import EQUAL_MIX, ImageCaptions, Pair, can_pair, draw_pair, pair_batches

IMAGES = [
    *(ImageCaptions(tuple(f"image {i} caption {j}" for j in range(2 + i % 4))) for i in range(40)),
    ImageCaptions(("the same",)),
    ImageCaptions(("twice", "twice")),
]


def of_one_source(images: list[ImageCaptions], batch: int, steps: int, seed: int, alike: int = 1) -> list[list[Pair]]:
    return list(pair_batches([images], [], batch, steps, seed, alike))


def test_a_batch_has_each_image_and_each_text_once() -> None:
    shared = [ImageCaptions(("a dog", f"dog {i}")) for i in range(10)]  # one text in ten images
    images = [*IMAGES, *shared]
    owner = {t: i for i, captions in enumerate(images) for t in captions.texts if t != "a dog"}
    for batch in of_one_source(images, 30, 20, seed=1):
        texts = [t for pair in batch for t in pair.texts]
        assert len(set(texts)) == len(texts) == 60
        owners = [owner.get(p.anchor, owner.get(p.positive)) for p in batch]
        assert len(set(owners)) == 30
        for pair in batch:
            assert any({pair.anchor, pair.positive} <= set(captions.texts) for captions in images)


def test_the_same_seed_gives_the_same_pairs_and_a_pass_sees_every_image() -> None:
    one, two = (of_one_source(IMAGES, 8, 5, seed=3) for _ in range(2))
    assert one == two != of_one_source(IMAGES, 8, 5, seed=4)
    alike = of_one_source(IMAGES, 8, 5, seed=3, alike=4)
    assert alike == of_one_source(IMAGES, 8, 5, seed=3, alike=4) != one
    for batches in (one, alike):  # 5 batches of 8 are one pass
        assert len({p.anchor.split(" caption")[0] for batch in batches for p in batch}) == 40


def test_what_waits_for_its_text_loses_no_turn() -> None:
    """Two of four pairs have a text in common, and so are never in one batch of two: all come equally often."""
    pairs = [Pair("shared", "a"), Pair("b", "shared"), Pair("c", "d"), Pair("e", "f")]
    seen = Counter(pair for batch in pair_batches([pairs], [], 2, 200, seed=0) for pair in batch)
    assert set(seen) == set(pairs) and all(abs(count - 100) <= 2 for count in seen.values())


def test_a_caption_that_many_images_share_costs_nothing_and_starves_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 100 images 30 are also called "image": at most one of them by it in a batch, and batch after batch."""
    items = [ImageCaptions((f"{n} a", "image" if n < 30 else f"{n} b")) for n in range(100)]
    looked = []
    monkeypatch.setattr("llm2clip.data.pairs.draw_pair", lambda *args: looked.append(1) or draw_pair(*args))
    seen: Counter[str] = Counter()
    for batch in pair_batches([items], [], 20, 300, seed=0):
        texts = [text for pair in batch for text in pair.texts]
        assert len(set(texts)) == 40
        seen.update(text for text in texts if text.endswith("a"))
    assert len(looked) < 300 * 60, "what waits is looked at once a batch"
    assert len(seen) == 100 and min(seen[f"{n} a"] for n in range(30, 100)) > 60


def test_too_few_images_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least 41 images with two different captions, but a source has 40"):
        of_one_source(IMAGES, 41, 1, seed=0)
    with pytest.raises(ValueError, match="without a text in common"):
        of_one_source([ImageCaptions(("a", "b")), ImageCaptions(("b", "a")), ImageCaptions(("a", "b"))], 2, 1, seed=0)
    with pytest.raises(ValueError, match="pair_mix must be three weights"):
        next(pair_batches([IMAGES], [], 2, 1, seed=0, pair_mix=(1, 1)))
    with pytest.raises(ValueError, match="a source has no captions or pairs to tune on"):
        next(pair_batches([IMAGES, []], [], 2, 1, seed=0))
    with pytest.raises(ValueError, match="needs at least 2 text pairs, but a source has 1"):
        next(pair_batches([[Pair("a", "b")]], [], 2, 1, seed=0))


def test_a_batch_is_of_one_source_as_often_as_its_weight_says() -> None:
    other = [Pair(f"other {i}", f"other answer {i}", (f"wrong {i}",), "find: ") for i in range(20)]
    sources = [IMAGES, other]
    batches = list(pair_batches(sources, [1, 3], 8, 400, seed=0))
    kinds = [{pair.anchor.startswith("other") for pair in batch} for batch in batches]
    assert all(len(k) == 1 for k in kinds)
    assert sum(k == {True} for k in kinds) == pytest.approx(300, abs=30)
    assert {p for batch in batches for p in batch if p.instruction} == set(other)  # as they were given
    assert batches == list(pair_batches(sources, [1, 3], 8, 400, seed=0))
    by_size = [batch[0].instruction for batch in pair_batches(sources, [], 8, 400, seed=0)]
    assert by_size.count("find: ") == pytest.approx(400 * 20 / 62, abs=30)
    for wrong in ([1], [1, 0]):
        with pytest.raises(ValueError, match="source_weights must be 2 weights"):
            next(pair_batches(sources, wrong, 8, 1, seed=0))


def test_lengths_are_as_often_as_their_weights_say() -> None:
    captions = ImageCaptions(("s0", "s1", "s2"), ("long 0", "long 1"))
    rng = np.random.default_rng(0)

    def kinds(captions: ImageCaptions, lengths: tuple[float, ...]) -> Counter[str]:
        pairs = [draw_pair(captions, lengths, rng) for _ in range(3000)]
        assert all(p.anchor != p.positive for p in pairs)
        return Counter("".join(sorted(text[0] for text in p.texts)) for p in pairs)

    drawn = kinds(captions, (1, 2, 3))
    for kind, share in (("ss", 1 / 6), ("ls", 2 / 6), ("ll", 3 / 6)):
        assert drawn[kind] == pytest.approx(3000 * share, abs=100)
    assert set(kinds(captions, (0, 1, 0))) == {"ls"}
    first = Counter(draw_pair(captions, (0, 1, 0), rng).anchor[0] for _ in range(1000))
    assert first["l"] == pytest.approx(500, abs=60)  # a long one is as often the first
    assert kinds(ImageCaptions(("s0", "s1"), ("long",)), (0.5, 0, 1)).keys() == {
        "ss"
    }  # what there is, by what is wanted
    two = kinds(ImageCaptions(("s",), ("long 0", "long 1")), (1, 1, 3))
    assert set(two) == {"ls", "ll"} and two["ll"] == pytest.approx(2250, abs=100)


def test_images_without_a_pair_that_is_wanted_are_left_out() -> None:
    assert can_pair(ImageCaptions(("a",), ("b",)))
    assert not can_pair(ImageCaptions(("a",), ("b",)), (1, 0, 1))
    assert not can_pair(ImageCaptions(("a", "a"), ("a",)), EQUAL_MIX)
    images = [
        *(ImageCaptions((f"short {i}",), (f"long {i}",)) for i in range(9)),
        *(ImageCaptions((f"a{i}", f"b{i}")) for i in range(9)),
    ]
    for lengths, first in (((1, 0, 0), {"a", "b"}), ((0, 1, 0), {"s", "l"})):
        batches = pair_batches([images], [], 9, 5, 0, pair_mix=lengths)  # as many as there are
        assert {text[0] for batch in batches for pair in batch for text in pair.texts} == first


TOPICS = (
    ("a brown dog chases a ball on the beach", "wet dogs run through the waves"),
    ("a chef cuts onions in a busy kitchen", "cooks prepare food behind a counter"),
    ("一只黑猫睡在沙发上", "猫躺在沙发上"),
    ("a guitarist sings on a dark stage", "the band plays music for a crowd"),
)


def test_a_batch_is_of_images_that_are_alike() -> None:
    """Eight images of each topic: batches of four are of fewer topics where alike is four."""
    images = [
        ImageCaptions(tuple(f"{text} n{n}x{i}" for text in topic)) for n, topic in enumerate(TOPICS) for i in range(8)
    ]
    topic_of = {text: n // 8 for n, captions in enumerate(images) for text in captions.texts}

    def topics(alike: int) -> list[int]:
        return [len({topic_of[p.anchor] for p in batch}) for batch in of_one_source(images, 4, 16, 0, alike)]

    assert np.mean(topics(4)) < 0.85 * np.mean(topics(1))


def test_runs_are_of_images_whose_captions_are_alike() -> None:
    topics = np.repeat(np.arange(4), 32)
    rng = np.random.default_rng(0)
    images = [[*rng.permutation(TOPICS[t]), f"number {n}"] for n, t in enumerate(topics)]
    at = caption_vectors(images)
    assert at.shape[0] == 128 and at.dtype == np.float32
    order = grouped_permutation(at, 8, rng)
    assert sorted(order) == list(range(128))
    pure = [len(set(topics[order[i : i + 8]])) == 1 for i in range(0, 128, 8)]
    assert np.mean(pure) > 0.6  # at random one in 50,000 would be
    assert not np.array_equal(order, grouped_permutation(at, 8, rng))  # each pass has groups of its own


def test_groups_that_do_not_divide_and_captions_that_tell_nothing() -> None:
    for images in ([["the same"]] * 7, [["!!!", "?"]], [[f"word{i}"] for i in range(37)]):
        order = grouped_permutation(caption_vectors(images), 4, np.random.default_rng(0))
        assert sorted(order) == list(range(len(images)))
    at, random = np.empty((9, 0)), np.random.default_rng(5).permutation(9)
    assert np.array_equal(grouped_permutation(at, 1, np.random.default_rng(5)), random)
