"""Batches of text pairs for tune: sampling, pair kinds and hard negatives."""

from collections import Counter

import numpy as np
import pytest

from llm2clip.data import pairs as pairs_module
from llm2clip.data.pairs import (
    CaptionItems,
    ImageCaptions,
    Pair,
    can_pair,
    compute_caption_vectors,
    draw_grouped_permutation,
    draw_pair,
    iter_pair_batches,
    resolve_pairs_per_step,
)
from llm2clip.data.records import Record
from llm2clip.data.table import Blocks, RecordTable

IMAGES = [  # 40 that give a pair and two that do not
    *(ImageCaptions(tuple(f"image {i} caption {j}" for j in range(2 + i % 4))) for i in range(40)),
    ImageCaptions(("the same",)),
    ImageCaptions(("twice", "twice")),
]


def batches_of(
    images: list[ImageCaptions], batch_size: int, steps: int, seed: int, group_size: int = 1
) -> list[list[Pair]]:
    return list(iter_pair_batches([images], batch_size, steps, seed, group_size))


# ---- sampling ------------------------------------------------------------------------------------------------------


def test_pair_batches_have_each_image_and_text_once() -> None:
    shared = [ImageCaptions(("a dog", f"dog {i}")) for i in range(10)]  # ten images with a common caption
    images = [*IMAGES, *shared]
    owner = {t: i for i, captions in enumerate(images) for t in captions.texts if t != "a dog"}
    for batch in batches_of(images, 30, 20, seed=1):
        texts = [t for pair in batch for t in pair.texts]
        assert len(set(texts)) == len(texts) == 60
        owners = [owner.get(pair.anchor, owner.get(pair.positive)) for pair in batch]
        assert len(set(owners)) == 30
        for pair in batch:
            assert any({pair.anchor, pair.positive} <= set(captions.texts) for captions in images)


def test_pair_batches_depend_on_the_seed_and_use_every_image_in_a_pass() -> None:
    first = batches_of(IMAGES, 8, 5, seed=3)
    assert batches_of(IMAGES, 8, 5, seed=3) == first != batches_of(IMAGES, 8, 5, seed=4)
    grouped = batches_of(IMAGES, 8, 5, seed=3, group_size=4)
    assert batches_of(IMAGES, 8, 5, seed=3, group_size=4) == grouped != first
    for batches in (first, grouped):  # 5 batches of 8 are one pass
        assert len({pair.anchor.split(" caption")[0] for batch in batches for pair in batch}) == 40


def test_deferred_items_are_sampled_in_the_next_batch() -> None:
    """Two of four pairs share a text and are never in the same batch of two, yet all are sampled equally often."""
    pairs = [Pair("shared", "a"), Pair("b", "shared"), Pair("c", "d"), Pair("e", "f")]
    counts = Counter(pair for batch in iter_pair_batches([pairs], 2, 200, seed=0) for pair in batch)
    assert set(counts) == set(pairs)
    assert all(abs(count - 100) <= 2 for count in counts.values())


def test_a_caption_of_many_images_neither_slows_sampling_nor_excludes_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """30 of 100 images share the caption "image", which may occur only once in each batch."""
    items = [ImageCaptions((f"{n} a", "image" if n < 30 else f"{n} b")) for n in range(100)]
    draws = []
    monkeypatch.setattr("llm2clip.data.pairs.draw_pair", lambda *args: draws.append(1) or draw_pair(*args))
    counts: Counter[str] = Counter()
    for batch in iter_pair_batches([items], 20, 300, seed=0):
        texts = [text for pair in batch for text in pair.texts]
        assert len(set(texts)) == 40
        counts.update(text for text in texts if text.endswith("a"))
    assert len(draws) < 300 * 60, "a deferred item must be drawn only once per batch"
    assert len(counts) == 100
    assert min(counts[f"{n} a"] for n in range(30, 100)) > 60


def test_pair_batches_raises_for_too_few_items() -> None:
    with pytest.raises(ValueError, match="at least 41 images with two different captions, but a source has only 40"):
        batches_of(IMAGES, 41, 1, seed=0)
    with pytest.raises(ValueError, match="fewer than 2 pairs that share no text"):
        batches_of([ImageCaptions(("a", "b")), ImageCaptions(("b", "a")), ImageCaptions(("a", "b"))], 2, 1, seed=0)
    with pytest.raises(ValueError, match="a source has no captions or pairs to tune on"):
        next(iter_pair_batches([IMAGES, []], 2, 1, seed=0))
    with pytest.raises(ValueError, match="at least 2 text pairs, but a source has only 1"):
        next(iter_pair_batches([[Pair("a", "b")]], 2, 1, seed=0))


def test_small_sources_reduce_the_number_of_pairs_per_step() -> None:
    def resolve(*sources: list, batch_size: int = 64, ranks: int = 1) -> int:
        return resolve_pairs_per_step(sources, batch_size, ranks)

    text_pairs = [Pair(f"question {n}", f"answer {n}") for n in range(50)]
    assert resolve(IMAGES, batch_size=16, ranks=2) == 32
    assert resolve(IMAGES) == 40 and resolve(IMAGES, ranks=3) == 39
    assert resolve(text_pairs, IMAGES) == 40
    with pytest.raises(ValueError, match=r"at least 48 images .* a source has only 40.* or remove this source"):
        resolve(text_pairs, IMAGES, batch_size=48)
    for few in (IMAGES[:1], [*IMAGES[:1], *IMAGES[:1]]):
        with pytest.raises(ValueError, match=r"at least 2 pairs that have no text in common.*--tune\.steps 0"):
            resolve(few)


def test_batches_of_a_small_source_can_be_filled_if_images_share_captions() -> None:
    """Each image of a chain shares a caption with the next one, so a batch has at least one image of each chain."""
    images = [ImageCaptions((f"{n // 5} {n}", f"{n // 5} {n + 1}", f"own {n}")) for n in range(50) if n % 5 < 4]
    size = resolve_pairs_per_step([images], 128, 1)
    assert size == 10
    assert [len(batch) for batch in batches_of(images, size, 50, seed=0, group_size=4)] == [size] * 50


def test_pair_batches_are_of_a_single_source_drawn_by_size() -> None:
    text_pairs = [Pair(f"other {i}", f"other answer {i}", (f"wrong {i}",), "find: ") for i in range(20)]
    sources = [IMAGES, text_pairs]
    batches = list(iter_pair_batches(sources, 8, 400, seed=0))
    kinds = [{pair.anchor.startswith("other") for pair in batch} for batch in batches]
    assert all(len(kind) == 1 for kind in kinds)
    assert sum(kind == {True} for kind in kinds) == pytest.approx(400 * 20 / 62, abs=30)
    assert {pair for batch in batches for pair in batch if pair.instruction} == set(text_pairs)  # unchanged
    assert batches == list(iter_pair_batches(sources, 8, 400, seed=0))


# ---- record tables -------------------------------------------------------------------------------------------------


def make_items(images: list[ImageCaptions], rows_per_batch: int = 16) -> CaptionItems:
    """Store images in a table of several batches, in another order than that of the items."""
    positions = np.random.default_rng(0).permutation(len(images))
    records = []
    for n in positions.tolist():
        captions, short, long = images[n].short[:1], images[n].short[1:], images[n].long
        records.append(Record(str(n), None, captions, short, long))
    tables = [RecordTable.from_records(records[n : n + rows_per_batch]) for n in range(0, len(records), rows_per_batch)]
    blocks = Blocks([table.blocks.batches[0] for table in tables], [[] for _ in tables])
    return CaptionItems(RecordTable(blocks, np.argsort(positions).astype(np.int32)))


MIXED_IMAGES = [
    *IMAGES,
    *(ImageCaptions(("a dog", f"dog {n}")) for n in range(10)),
    *(ImageCaptions((), (f"long {n}", "", "a dog")) for n in range(5)),
    ImageCaptions((), ("alone",)),
    ImageCaptions(("again",), ("again", "again")),
    ImageCaptions(("größer",), ("großer",)),
]


def draw_batches_from_list(images: list[ImageCaptions], batch_size: int, steps: int, group_size: int) -> list:
    """Draw batches with Python lists of all items, with seed 0. A simple version of `_draw_batches`."""
    usable = [image for image in images if can_pair(image)]
    vectors = compute_caption_vectors([image.texts for image in usable])
    rng = np.random.default_rng(0)
    order: list[int] = []
    batches = []
    for _ in range(steps):
        batch: list[Pair] = []
        used: set[object] = set()
        deferred: list[int] = []
        while len(batch) < batch_size:
            if not order:
                order = [n for n in draw_grouped_permutation(vectors, group_size, rng).tolist() if n not in deferred]
            if not order:
                order, deferred = deferred, []
            index = order.pop()
            pair = draw_pair(usable[index], rng)
            if used & {index, *pair.texts}:
                deferred.append(index)
            else:
                used |= {index, *pair.texts}
                batch.append(pair)
        order += reversed(deferred)
        batches.append(batch)
    return batches


@pytest.mark.parametrize("group_size", [1, 4])
@pytest.mark.parametrize("batch_size", [10, 41])
def test_batches_of_a_table_equal_those_of_a_list(
    batch_size: int, group_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs_module, "ITEMS_PER_READ", 7)
    expected = draw_batches_from_list(MIXED_IMAGES, batch_size, 30, group_size)
    for items in (MIXED_IMAGES, make_items(MIXED_IMAGES)):
        assert list(iter_pair_batches([items], batch_size, 30, 0, group_size)) == expected


def test_caption_items_read_the_images_of_a_table() -> None:
    items = make_items(MIXED_IMAGES)
    assert items == MIXED_IMAGES and list(items[3:50:4]) == MIXED_IMAGES[3:50:4]
    assert [items[n] for n in range(-len(items), len(items))] == MIXED_IMAGES * 2
    with pytest.raises(IndexError):
        items[len(items)]
    assert list(items.pairable) == [image for image in MIXED_IMAGES if can_pair(image)]
    assert resolve_pairs_per_step([items], 128, 1) == resolve_pairs_per_step([MIXED_IMAGES], 128, 1)
    assert not make_items([]) and not make_items([]).pairable


# ---- short and long captions ---------------------------------------------------------------------------------------


def test_draw_pair_draws_each_available_kind_equally_often() -> None:
    rng = np.random.default_rng(0)

    def kinds(captions: ImageCaptions) -> Counter[str]:
        """Count "ss", "ls" and "ll" in 3,000 pairs."""
        pairs = [draw_pair(captions, rng) for _ in range(3000)]
        assert all(pair.anchor != pair.positive for pair in pairs)
        return Counter("".join(sorted(text[0] for text in pair.texts)) for pair in pairs)

    for captions, available in (
        (ImageCaptions(("s0", "s1", "s2"), ("long 0", "long 1")), ("ss", "ls", "ll")),
        (ImageCaptions(("s0", "s1"), ("long",)), ("ss", "ls")),
        (ImageCaptions(("s",), ("long 0", "long 1")), ("ls", "ll")),
        (ImageCaptions(("s",), ("long",)), ("ls",)),
    ):
        counts = kinds(captions)
        assert set(counts) == set(available)
        assert all(count == pytest.approx(3000 / len(available), abs=100) for count in counts.values())


def test_draw_pair_of_a_short_and_a_long_caption_has_a_random_order() -> None:
    rng = np.random.default_rng(0)
    anchors = Counter(draw_pair(ImageCaptions(("s",), ("long",)), rng).anchor for _ in range(1000))
    assert anchors["long"] == pytest.approx(500, abs=60)


def test_images_without_two_different_captions_are_not_used() -> None:
    assert can_pair(ImageCaptions(("a",), ("b",)))
    assert not can_pair(ImageCaptions(("a", "a"), ("a",)))
    images = [
        *(ImageCaptions((f"short {i}",), (f"long {i}",)) for i in range(9)),
        *(ImageCaptions((f"alone {i}",)) for i in range(9)),
    ]
    batches = iter_pair_batches([images], 9, 5, 0)  # all nine that are usable
    assert {text[0] for batch in batches for pair in batch for text in pair.texts} == {"s", "l"}


# ---- hard negatives ------------------------------------------------------------------------------------------------

TOPICS = (
    ("a brown dog chases a ball on the beach", "wet dogs run through the waves"),
    ("a chef cuts onions in a busy kitchen", "cooks prepare food behind a counter"),
    ("一只黑猫睡在沙发上", "猫躺在沙发上"),
    ("a guitarist sings on a dark stage", "the band plays music for a crowd"),
)


def test_hard_negative_groups_put_fewer_topics_into_a_batch() -> None:
    images = [  # eight of each topic
        ImageCaptions(tuple(f"{text} n{n}x{i}" for text in topic)) for n, topic in enumerate(TOPICS) for i in range(8)
    ]
    topic_of = {text: n // 8 for n, captions in enumerate(images) for text in captions.texts}

    def topics_per_batch(group_size: int) -> list[int]:
        batches = batches_of(images, 4, 16, 0, group_size)
        return [len({topic_of[pair.anchor] for pair in batch}) for batch in batches]

    assert np.mean(topics_per_batch(4)) < 0.85 * np.mean(topics_per_batch(1))


def test_grouped_permutation_makes_groups_of_similar_captions() -> None:
    topics = np.repeat(np.arange(4), 32)
    rng = np.random.default_rng(0)
    images = [[*rng.permutation(TOPICS[t]), f"number {n}"] for n, t in enumerate(topics)]
    vectors = compute_caption_vectors(images)
    assert vectors.shape[0] == 128
    assert vectors.dtype == np.float32
    order = draw_grouped_permutation(vectors, 8, rng)
    assert sorted(order) == list(range(128))
    pure = [len(set(topics[order[i : i + 8]])) == 1 for i in range(0, 128, 8)]
    assert np.mean(pure) > 0.6  # of random groups, one in 50,000 would be pure
    assert not np.array_equal(order, draw_grouped_permutation(vectors, 8, rng))  # every pass forms new groups


def test_grouped_permutation_handles_incomplete_groups_and_uninformative_captions() -> None:
    for images in ([["the same"]] * 7, [["!!!", "?"]], [[f"word{i}"] for i in range(37)]):
        order = draw_grouped_permutation(compute_caption_vectors(images), 4, np.random.default_rng(0))
        assert sorted(order) == list(range(len(images)))
    vectors, expected = np.empty((9, 0)), np.random.default_rng(5).permutation(9)
    assert np.array_equal(draw_grouped_permutation(vectors, 1, np.random.default_rng(5)), expected)
