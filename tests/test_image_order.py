"""Order of the images of an epoch."""

import numpy as np
import pytest

from llm2clip.data.image_order import draw_random_order, draw_shard_order, list_upcoming_shards


def test_random_order_is_a_permutation_that_depends_on_seed_and_epoch() -> None:
    first = draw_random_order(100, 0, 1)
    assert first.dtype == np.int32
    assert sorted(first.tolist()) == list(range(100))
    assert draw_random_order(100, 0, 1).tolist() == first.tolist()
    assert draw_random_order(100, 0, 2).tolist() != first.tolist()
    assert draw_random_order(100, 1, 1).tolist() != first.tolist()
    assert draw_random_order(0, 0, 0).tolist() == []


def test_shard_order_keeps_the_images_of_a_window_together() -> None:
    """The shards have different numbers of images, one has none, and their images are not sorted."""
    rng = np.random.default_rng(0)
    shard_of_image = rng.integers(0, 23, 1000, dtype=np.int32)
    shard_of_image[shard_of_image == 7] = 8
    orders = [draw_shard_order(shard_of_image, seed=5, epoch=epoch, window=4) for epoch in (0, 0, 1)]
    assert orders[0].tolist() == orders[1].tolist() != orders[2].tolist()
    windows = []
    for order in orders[1:]:
        assert order.dtype == np.int32 and sorted(order.tolist()) == list(range(1000))
        shards = list_upcoming_shards(order, shard_of_image, 0, max_shards=99)
        assert sorted(shards) == [n for n in range(23) if n != 7]
        start = 0
        for first in range(0, 22, 4):
            window = set(shards[first : first + 4])
            stop = start + int(np.isin(shard_of_image, list(window)).sum())
            assert set(shard_of_image[order[start:stop]]) == window
            start = stop
            windows.append(frozenset(window))
    assert len(set(windows)) == 12, "each epoch has other windows"


def test_shard_order_shuffles_all_images_of_a_window() -> None:
    """With a single window, each image is equally likely at each position (chi-squared, 99.99% quantile for 25: 61)."""
    observed = np.zeros((6, 6))
    for epoch in range(600):
        observed[np.arange(6), draw_shard_order(np.array([0, 0, 0, 1, 1, 2]), 0, epoch)] += 1
    assert ((observed - 100) ** 2 / 100).sum() < 61


def test_shard_order_of_one_shard_per_window_matches_a_hand_computed_case() -> None:
    """The shards and the images of each shard follow NumPy's generator."""
    rng = np.random.default_rng([3, 1])
    images_of_shard = [np.array([1, 4]), np.array([0, 2, 5]), np.array([3])]
    expected = [image for shard in rng.permutation(3) for image in rng.permutation(images_of_shard[shard])]
    order = draw_shard_order(np.array([1, 0, 1, 2, 0, 1]), seed=3, epoch=1, window=1)
    assert order.tolist() == [int(image) for image in expected]


@pytest.mark.parametrize(("start", "expected"), [(0, [2, 0]), (1, [0, 2]), (3, [2, 1]), (4, [1]), (5, [])])
def test_list_upcoming_shards_lists_shards_in_the_order_of_their_first_image(start: int, expected: list[int]) -> None:
    shard_of_image = np.array([0, 0, 1, 2, 2])
    order = np.array([4, 0, 1, 3, 2])  # shards 2, 0, 0, 2, 1
    assert list_upcoming_shards(order, shard_of_image, start, max_shards=2) == expected


def test_list_upcoming_shards_looks_beyond_the_first_chunk() -> None:
    shard_of_image = np.repeat(np.arange(3), 100_000)
    assert list_upcoming_shards(np.arange(300_000), shard_of_image, 0) == [0, 1, 2]
