"""Which pairs of captions a step of tune sees."""

from __future__ import annotations

import numpy as np
import pytest

from llm2clip.data.alike import grouped_order, points
from llm2clip.data.pairs import caption_pairs, mixed_pairs

IMAGES = [[f"image {i} caption {j}" for j in range(2 + i % 4)] for i in range(40)] + [["the same"], ["twice", "twice"]]


def test_a_batch_has_each_image_and_each_text_once() -> None:
    shared = [["a dog", f"dog {i}"] for i in range(10)]  # one text in ten images
    images = [*IMAGES, *shared]
    owner = {t: i for i, texts in enumerate(images) for t in texts if t != "a dog"}
    for batch in caption_pairs(images, 30, 20, seed=1):
        texts = [t for pair in batch for t in pair]
        assert len(set(texts)) == len(texts) == 60
        owners = [owner.get(a, owner.get(b)) for a, b in batch]
        assert len(set(owners)) == 30
        for a, b in batch:
            assert any(a in captions and b in captions for captions in images)


def test_the_same_seed_gives_the_same_pairs_and_a_pass_sees_every_image() -> None:
    one, two = (list(caption_pairs(IMAGES, 8, 5, seed=3)) for _ in range(2))
    assert one == two != list(caption_pairs(IMAGES, 8, 5, seed=4))
    assert len({a.split(" caption")[0] for batch in one for a, _ in batch}) == 40  # 5 batches of 8 are one pass
    alike = list(caption_pairs(IMAGES, 8, 5, seed=3, alike=4))
    assert alike == list(caption_pairs(IMAGES, 8, 5, seed=3, alike=4)) != one
    assert len({a.split(" caption")[0] for batch in alike for a, _ in batch}) == 40


def test_too_few_images_is_an_error() -> None:
    with pytest.raises(ValueError, match="there are 40"):
        next(caption_pairs(IMAGES, 41, 1, seed=0))
    with pytest.raises(ValueError, match="without a caption in common"):
        next(caption_pairs([["a", "b"], ["b", "a"], ["a", "b"]], 2, 1, seed=0))


def test_a_batch_is_of_one_source_as_often_as_its_weight_says() -> None:
    other = [[f"other {i} {j}" for j in range(3)] for i in range(20)]
    batches = list(mixed_pairs([IMAGES, other], [1, 3], 8, 400, seed=0))
    kinds = [{text.startswith("other") for pair in batch for text in pair} for batch in batches]
    assert all(len(k) == 1 for k in kinds)
    assert sum(k == {True} for k in kinds) == pytest.approx(300, abs=30)
    assert batches == list(mixed_pairs([IMAGES, other], [1, 3], 8, 400, seed=0))
    assert list(mixed_pairs([IMAGES], [], 8, 5, seed=3)) == list(caption_pairs(IMAGES, 8, 5, seed=3))
    for wrong in ([], [1], [1, 0]):
        with pytest.raises(ValueError, match="2 sources need"):
            next(mixed_pairs([IMAGES, other], wrong, 8, 1, seed=0))


TOPICS = (
    ("a brown dog chases a ball on the beach", "wet dogs run through the waves"),
    ("a chef cuts onions in a busy kitchen", "cooks prepare food behind a counter"),
    ("一只黑猫睡在沙发上", "猫躺在沙发上"),
    ("a guitarist sings on a dark stage", "the band plays music for a crowd"),
)


def test_runs_are_of_images_whose_captions_are_alike() -> None:
    topics = np.repeat(np.arange(4), 32)
    rng = np.random.default_rng(0)
    images = [[*rng.permutation(TOPICS[t]), f"number {n}"] for n, t in enumerate(topics)]
    at = points(images)
    assert at.shape[0] == 128 and at.dtype == np.float32
    order = grouped_order(at, 8, rng)
    assert sorted(order) == list(range(128))
    pure = [len(set(topics[order[i : i + 8]])) == 1 for i in range(0, 128, 8)]
    assert np.mean(pure) > 0.6  # at random one in 50,000 would be
    assert not np.array_equal(order, grouped_order(at, 8, rng))  # each pass has groups of its own


def test_groups_that_do_not_divide_and_captions_that_tell_nothing() -> None:
    for images in ([["the same"]] * 7, [["!!!", "?"]], [[f"word{i}"] for i in range(37)]):
        order = grouped_order(points(images), 4, np.random.default_rng(0))
        assert sorted(order) == list(range(len(images)))
    assert np.array_equal(grouped_order(np.empty((9, 0)), 1, np.random.default_rng(5)),
                          np.random.default_rng(5).permutation(9))  # fmt: skip
