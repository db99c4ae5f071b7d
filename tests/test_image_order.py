"""Order of the images of an epoch."""

import numpy as np
import pytest

from llm2clip.data import image_order
from llm2clip.data.image_order import (
    EpochImageOrders,
    choose_image_order,
    compute_shard_indices,
    draw_random_image_order,
    list_upcoming_shards,
    sample_shard_image_order,
)
from llm2clip.data.image_refs import FileImage, TarImage
from llm2clip.data.records import Record
from llm2clip.data.table import RecordBatches, RecordTable


def test_random_order_is_a_permutation_that_depends_on_seed_and_epoch() -> None:
    first = draw_random_image_order(100, 0, 1)
    assert first.dtype == np.int32
    assert sorted(first.tolist()) == list(range(100))
    assert draw_random_image_order(100, 0, 1).tolist() == first.tolist()
    assert draw_random_image_order(100, 0, 2).tolist() != first.tolist()
    assert draw_random_image_order(100, 1, 1).tolist() != first.tolist()
    assert draw_random_image_order(0, 0, 0).tolist() == []


def test_shard_order_keeps_the_images_of_a_window_together() -> None:
    """The shards have different numbers of images, one has none, and their images are not sorted."""
    rng = np.random.default_rng(0)
    shard_of_image = rng.integers(0, 23, 1000, dtype=np.int32)
    shard_of_image[shard_of_image == 7] = 8
    orders = [sample_shard_image_order(shard_of_image, seed=5, epoch=epoch, window=4) for epoch in (0, 0, 1)]
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
        observed[np.arange(6), sample_shard_image_order(np.array([0, 0, 0, 1, 1, 2]), 0, epoch)] += 1
    assert ((observed - 100) ** 2 / 100).sum() < 61


def test_shard_order_of_one_shard_per_window_matches_a_hand_computed_case() -> None:
    """The shards and the images of each shard follow NumPy's generator."""
    rng = np.random.default_rng([3, 1])
    images_of_shard = [np.array([1, 4]), np.array([0, 2, 5]), np.array([3])]
    expected = [image for shard in rng.permutation(3) for image in rng.permutation(images_of_shard[shard])]
    order = sample_shard_image_order(np.array([1, 0, 1, 2, 0, 1]), seed=3, epoch=1, window=1)
    assert order.tolist() == [int(image) for image in expected]


@pytest.mark.parametrize(("start", "expected"), [(0, [2, 0]), (1, [0, 2]), (3, [2, 1]), (4, [1]), (5, [])])
def test_list_upcoming_shards_lists_shards_in_the_order_of_their_first_image(start: int, expected: list[int]) -> None:
    shard_of_image = np.array([0, 0, 1, 2, 2])
    order = np.array([4, 0, 1, 3, 2])  # shards 2, 0, 0, 2, 1
    assert list_upcoming_shards(order, shard_of_image, start, max_shards=2) == expected


def test_list_upcoming_shards_looks_beyond_the_first_chunk() -> None:
    shard_of_image = np.repeat(np.arange(3), 100_000)
    assert list_upcoming_shards(np.arange(300_000), shard_of_image, 0) == [0, 1, 2]


# ---- orders of a table -----------------------------------------------------------------------------------------------


def make_shards(folder: str, num_shards: int, images_per_shard: int = 3) -> RecordTable:
    """Return a table of images in tar files that do not exist."""
    records = []
    for n in range(num_shards * images_per_shard):
        image = TarImage(f"{folder}/{n // images_per_shard:03}.tar", 512 * n, 9, f"{n}.jpg")
        records.append(Record(str(n), image, ("a",)))
    return RecordTable.from_records(records)


def test_number_shards_counts_the_containers_of_all_batches() -> None:
    first, second = make_shards("/a", 2), make_shards("/b", 2)
    batches = [*first.record_batches.batches, *second.record_batches.batches, *first.record_batches.batches]
    containers = [*first.record_batches.containers, *second.record_batches.containers, *first.record_batches.containers]
    table = RecordTable(RecordBatches(batches, containers), np.array([0, 5, 7, 9, 12, 17]))
    numbers, paths = compute_shard_indices(table)
    assert numbers.dtype == np.int32
    assert [paths[n] for n in numbers] == [
        "/a/000.tar",
        "/a/001.tar",
        "/b/000.tar",
        "/b/001.tar",
        "/a/000.tar",
        "/a/001.tar",
    ]


def test_shards_are_read_in_windows_if_they_are_remote(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLM2CLIP_IMAGE_ORDER", raising=False)
    assert choose_image_order(make_shards("/local", 17)) == "random"
    assert choose_image_order(make_shards("s3://bucket", 17)) == "shards"
    assert choose_image_order(make_shards("s3://bucket", 16)) == "random", "one window would contain all shards"
    files = RecordTable.from_records(Record(str(n), FileImage(f"/{n}/a.jpg"), ("a",)) for n in range(20))
    assert choose_image_order(files) == "random"
    monkeypatch.setenv("LLM2CLIP_IMAGE_ORDER", "shards")
    assert choose_image_order(make_shards("/local", 2)) == "shards"
    monkeypatch.setenv("LLM2CLIP_IMAGE_ORDER", "shard")
    with pytest.raises(ValueError, match="must be random or shards"):
        choose_image_order(files)


def test_epoch_orders_use_only_usable_records() -> None:
    table = make_shards("/a", 20)
    is_usable = np.arange(60) % 7 != 0
    expected = np.flatnonzero(is_usable)
    random, shards = (EpochImageOrders(table, is_usable, 3, order) for order in ("random", "shards"))
    assert random.take(2, 0, 60).tolist() == expected[draw_random_image_order(len(expected), 3, 2)].tolist()
    order = shards.take(1, 0, 60)
    assert order.tolist() == expected[sample_shard_image_order(expected // 3, 3, 1)].tolist()
    assert shards.take(1, 20, 30).tolist() == order[20:30].tolist(), "an epoch can be read from any position"
    every = EpochImageOrders(table, np.ones(60, bool), 3, "random")
    assert every.take(0, 0, 60).tolist() == draw_random_image_order(60, 3, 0).tolist()


def test_epoch_orders_download_the_next_shards_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """At each position, the shards of the current and the next window are requested, in the order of their use."""
    requests: list[list[str]] = []
    monkeypatch.setattr(image_order, "prefetch_remote_files", requests.append)
    table = make_shards("s3://bucket", 40)
    orders = EpochImageOrders(table, np.ones(120, bool), 0)
    assert orders.image_order == "shards"
    order = [int(image) for start in range(0, 120, 3) for image in orders.take(0, start, start + 3)]
    needed = list(dict.fromkeys(f"s3://bucket/{image // 3:03}.tar" for image in order))
    assert requests[0] == needed[:32] and len(requests) == 40
    for n, request in enumerate(requests):
        assert request == list(dict.fromkeys(f"s3://bucket/{image // 3:03}.tar" for image in order[3 * n :]))[:32]
    few = EpochImageOrders(make_shards("s3://bucket", 2), np.ones(6, bool), 0)
    few.take(0, 0, 3)
    few.take(0, 3, 6)
    assert few.image_order == "random" and requests[40:] == [["s3://bucket/000.tar", "s3://bucket/001.tar"]]
    EpochImageOrders(make_shards("/local", 40), np.ones(120, bool), 0, "shards").take(0, 0, 3)
    assert len(requests) == 41
    cached = EpochImageOrders(table, np.ones(120, bool), 0, read_images=False)
    assert cached.take(0, 0, 120).tolist() == order and len(requests) == 41, "cached features need no images"
