"""Positive text pairs for tune: reading the sources, drawing batches, and hard negatives."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from format_fixtures import image_row, write_images_and_jsonl, write_jsonl
from llm2clip.config import EvaluateConfig, TuneConfig
from llm2clip.data import pairs as pairs_module
from llm2clip.data.build_table import DataSplits, build_record_table, read_data_splits
from llm2clip.data.pairs import (
    CaptionItems,
    ImageCaptions,
    Pair,
    compute_caption_vectors,
    draw_caption_pair,
    draw_grouped_permutation,
    has_caption_pair,
    iter_pair_batches,
    read_text_pairs,
    read_tuning_sources,
    resolve_pairs_per_step,
)
from llm2clip.data.records import Record
from llm2clip.data.skip_log import SkipLog, TooManySkippedError
from llm2clip.data.table import RecordBatches, RecordTable

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
    monkeypatch.setattr(
        "llm2clip.data.pairs.draw_caption_pair", lambda *args: draws.append(1) or draw_caption_pair(*args)
    )
    counts: Counter[str] = Counter()
    for batch in iter_pair_batches([items], 20, 300, seed=0):
        texts = [text for pair in batch for text in pair.texts]
        assert len(set(texts)) == 40
        counts.update(text for text in texts if text.endswith("a"))
    assert len(draws) < 300 * 60, "a deferred item must be drawn only once per batch"
    assert len(counts) == 100
    assert min(counts[f"{n} a"] for n in range(30, 100)) > 60


def test_pair_batches_raises_for_too_few_items() -> None:
    with pytest.raises(
        ValueError, match="a source has only 40 images with two different captions, but a batch needs 41"
    ):
        batches_of(IMAGES, 41, 1, seed=0)
    with pytest.raises(ValueError, match="fewer than 2 pairs that share no text"):
        batches_of([ImageCaptions(("a", "b")), ImageCaptions(("b", "a")), ImageCaptions(("a", "b"))], 2, 1, seed=0)
    with pytest.raises(ValueError, match="a source has no captions or pairs to tune on"):
        next(iter_pair_batches([IMAGES, []], 2, 1, seed=0))
    with pytest.raises(ValueError, match="a source has only 1 text pair, but a batch needs 2"):
        next(iter_pair_batches([[Pair("a", "b")]], 2, 1, seed=0))


def test_small_sources_reduce_the_number_of_pairs_per_step() -> None:
    def resolve(*sources: list, batch_size: int = 64, ranks: int = 1) -> int:
        return resolve_pairs_per_step(sources, batch_size, ranks)

    text_pairs = [Pair(f"question {n}", f"answer {n}") for n in range(50)]
    assert resolve(IMAGES, batch_size=16, ranks=2) == 32
    assert resolve(IMAGES) == 40 and resolve(IMAGES, ranks=3) == 39
    assert resolve(text_pairs, IMAGES) == 40
    with pytest.raises(ValueError, match=r"a source has only 40 images .* a batch needs 48.* or remove the source"):
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
    blocks = RecordBatches([table.record_batches.batches[0] for table in tables], [[] for _ in tables])
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
    """Draw batches with Python lists of all items, with seed 0. A simple version of `_draw_pair_batches`."""
    usable = [image for image in images if has_caption_pair(image)]
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
            pair = draw_caption_pair(usable[index], rng)
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
    assert list(items) == MIXED_IMAGES
    assert list(items.pairable_items) == [image for image in MIXED_IMAGES if has_caption_pair(image)]
    assert resolve_pairs_per_step([items], 128, 1) == resolve_pairs_per_step([MIXED_IMAGES], 128, 1)
    assert not make_items([]) and not make_items([]).pairable_items


# ---- short and long captions ---------------------------------------------------------------------------------------


def test_draw_caption_pair_draws_each_available_kind_equally_often() -> None:
    rng = np.random.default_rng(0)

    def kinds(captions: ImageCaptions) -> Counter[str]:
        """Count "ss", "ls" and "ll" in 3,000 pairs."""
        pairs = [draw_caption_pair(captions, rng) for _ in range(3000)]
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


def test_draw_caption_pair_of_a_short_and_a_long_caption_has_a_random_order() -> None:
    rng = np.random.default_rng(0)
    anchors = Counter(draw_caption_pair(ImageCaptions(("s",), ("long",)), rng).anchor for _ in range(1000))
    assert anchors["long"] == pytest.approx(500, abs=60)


def test_images_without_two_different_captions_are_not_used() -> None:
    assert has_caption_pair(ImageCaptions(("a",), ("b",)))
    assert not has_caption_pair(ImageCaptions(("a", "a"), ("a",)))
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


# ---- sources ---------------------------------------------------------------------------------------------------------


def splits_of(*sources: str) -> DataSplits:
    return read_data_splits(list(sources), EvaluateConfig(), {}, SkipLog())


def all_held_out(splits: DataSplits) -> list[RecordTable]:
    return list(splits.held_out.values())


def sources_of_fit(splits: DataSplits, config: TuneConfig) -> list:
    """Read the tuning sources as `fit` does, for a batch size of 1."""
    train = None if config.data or config.text_pairs else splits.train
    config = dataclasses.replace(config, batch_size=1)
    sources = read_tuning_sources(train, all_held_out(splits), config, {}, SkipLog())
    return [list(items) for items in sources]


def images_of_tune(sources: list[str], config: TuneConfig) -> list[set[str]]:
    """Read the tuning sources as `llm2clip tune` does; return the image numbers of each source."""
    held_out = all_held_out(splits_of(*sources))
    config = dataclasses.replace(config, batch_size=1)
    items_by_source = read_tuning_sources(None, held_out, config, {}, SkipLog(), training_sources=sources)
    return [{item.texts[0].split()[0] for item in items} for items in items_by_source]


def test_tuning_requires_an_image_with_two_captions(tmp_path: Path) -> None:
    rows = [{**image_row(n), "captions": ["one"]} for n in range(3)]
    splits = splits_of(write_images_and_jsonl(tmp_path / "a.jsonl", *rows))
    with pytest.raises(ValueError, match=r"no image has two different captions.*--tune\.steps 0"):
        sources_of_fit(splits, TuneConfig())


def test_other_sources_lose_the_captions_of_held_out_images(tmp_path: Path) -> None:
    rows = [image_row(1, "train", id="1000001_aa"), image_row(2, "val", id="1000002_bb")]
    splits = splits_of(write_images_and_jsonl(tmp_path / "f8k.jsonl", *rows))
    rows = [{"id": f"100000{n}", "captions": [f"x{n}", f"y{n}"]} for n in (1, 2, 3, 4)]
    texts = str(write_jsonl(tmp_path / "f30k.jsonl", rows))
    excluded = str(write_jsonl(tmp_path / "more.jsonl", [{"id": "1000003_cc", "captions": ["z", "zz"]}]))
    assert sources_of_fit(splits, TuneConfig()) == [[ImageCaptions(("1 a", "1 b"))]]
    allowed = [ImageCaptions(captions) for captions in (("x1", "y1"), ("x3", "y3"), ("x4", "y4"))]
    assert sources_of_fit(splits, TuneConfig(data=[texts])) == [allowed]
    assert sources_of_fit(splits, TuneConfig(data=[texts], exclude=[excluded])) == [[allowed[0], allowed[2]]]
    several = TuneConfig(data=[texts, excluded])
    assert sources_of_fit(splits, several) == [[*allowed, ImageCaptions(("z", "zz"))]], "all are one source"


def test_text_pairs_are_sources_after_those_of_captions(tmp_path: Path) -> None:
    # The ids have a common date, which does not make them the same image.
    rows = [image_row(1, "train", id="20240131_0001"), image_row(2, "val", id="20240131_0002")]
    splits = splits_of(write_images_and_jsonl(tmp_path / "a.jsonl", *rows))
    assert sources_of_fit(splits, TuneConfig()) == [[ImageCaptions(("1 a", "1 b"))]]
    texts = str(write_jsonl(tmp_path / "b.jsonl", [{"id": "1000001", "captions": ["x", "y"]}]))
    pairs = str(write_jsonl(tmp_path / "pairs.jsonl", [{"query": "q", "positive": "p"}]))
    assert sources_of_fit(splits, TuneConfig(text_pairs=[pairs])) == [[Pair("q", "p")]]
    both = TuneConfig(data=[texts], text_pairs=[pairs])
    assert sources_of_fit(splits, both) == [[ImageCaptions(("x", "y"))], [Pair("q", "p")]]


def test_tune_excludes_what_fit_on_the_same_data_holds_out(tmp_path: Path) -> None:
    rows = [image_row(n, "test" if n < 2 else "train" if n < 6 else "odd") for n in range(8)]
    file = write_images_and_jsonl(tmp_path / "a.jsonl", *rows)
    assert images_of_tune([file], TuneConfig()) == [{"2", "3", "4", "5"}]
    # A source with named splits is used as it is; one of the four other training images is held out.
    (images,) = images_of_tune([f"{file}@test", file], TuneConfig())
    assert images > {"0", "1"}
    assert len(images) == 5
    assert images < {"0", "1", "2", "3", "4", "5"}


def test_tune_excludes_the_held_out_tenth_from_all_sources(tmp_path: Path) -> None:
    first = write_images_and_jsonl(tmp_path / "b.jsonl", *(image_row(n) for n in range(20)))
    splits = splits_of(first)
    train = {record.id for record in splits.train}
    assert len(splits.held_out["captions"]) == 2
    assert images_of_tune([first], TuneConfig()) == [train]

    rows = [{**image_row(n), "captions": [f"{n} c", f"{n} d"], "id": f"x{n}"} for n in range(20)]
    second = write_images_and_jsonl(tmp_path / "c.jsonl", *rows)  # the same images with other ids
    train_of_both = {record.id for record in splits_of(first, second).train}
    # All sources are read as one, and an image of both is one item.
    assert images_of_tune([first, second], TuneConfig()) == [train_of_both]
    assert images_of_tune([first], TuneConfig(data=[second])) == [train]


def test_exclude_compares_ids_without_leading_zeros(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """COCO's file names have leading zeros (000000000139), its ids do not (139)."""
    rows = [image_row(8, id="139"), image_row(7, id="391895"), image_row(9, id="COCO_val2014_000000391895")]
    coco = write_images_and_jsonl(tmp_path / "c.jsonl", *rows)
    train = build_record_table([coco], {}, SkipLog())

    def remaining(*excluded: str) -> list[str]:
        rows = [image_row(n, id=name) for n, name in enumerate(excluded)]
        other = write_images_and_jsonl(tmp_path / "b.jsonl", *rows)
        (items,) = read_tuning_sources(train, [], TuneConfig(exclude=[other], batch_size=1), {}, SkipLog())
        return [item.texts[0].split()[0] for item in items]

    assert remaining("000000391895", "000000000139") == ["9"]
    capsys.readouterr()
    assert remaining("000000000140") == ["8", "7", "9"]
    assert "contains none of the excluded images" in capsys.readouterr().out


def test_copies_of_held_out_images_are_not_used_for_tuning(tmp_path: Path) -> None:
    rows = [image_row(1, "train"), image_row(2, "val")]
    train = write_images_and_jsonl(tmp_path / "a.jsonl", *rows)
    (tmp_path / "copy.png").write_bytes((tmp_path / "2.png").read_bytes())
    more = {"image": "copy.png", "id": "another", "captions": ["copy", "copy too"]}
    other = str(write_jsonl(tmp_path / "b.jsonl", [more, {"id": "3", "captions": ["3 a", "3 b"]}]))
    assert images_of_tune([train], TuneConfig(data=[other])) == [{"1", "3"}]


# ---- text pairs ------------------------------------------------------------------------------------------------------


def test_read_text_pairs_reads_the_e5_format(tmp_path: Path) -> None:
    rows = [
        {"query": " who? ", "positive": "she", "negatives": ["he", "she", ""], "instruction": "Find who:"},
        {"query": "where?", "positive": ["here", "there"], "negatives": None},
    ]
    file = write_jsonl(tmp_path / "pairs.jsonl", rows)
    assert list(read_text_pairs(str(file))) == [Pair("who?", "she", ("he",), "Find who:\n"), Pair("where?", "here")]


def test_read_text_pairs_accepts_other_column_names_and_formats(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("anchor,document,task\nq,d,T:\n")
    assert list(read_text_pairs(str(tmp_path / "a.csv"))) == [Pair("q", "d", (), "T:\n")]
    table = pa.table({"question": ["a", "c"], "answer": ["b", "d"], "split": ["train", "test"]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert list(read_text_pairs(f"{tmp_path / 'a.parquet'}@train")) == [Pair("a", "b")]
    # Sentence pairs with a score include contradictions.
    (tmp_path / "b.csv").write_text("sentence1,sentence2,score\na,b,0.0\n")
    with pytest.raises(ValueError, match="no query column"):
        list(read_text_pairs(str(tmp_path / "b.csv")))


def test_read_text_pairs_counts_and_lists_bad_rows(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    good = [json.dumps({"query": f"q{n}", "positive": f"p{n}"}) for n in range(97)]
    bad = [json.dumps({"query": "q", "positive": "q"}), json.dumps({"positive": "p"}), "{"]
    file.write_text("\n".join([*good, *bad]))
    log = SkipLog(tmp_path / "skipped.jsonl")
    assert len(list(read_text_pairs(str(file), log))) == 97
    assert log.skipped == {"missing or identical texts": 2, "malformed row": 1}
    with pytest.raises(TooManySkippedError):
        list(read_text_pairs(str(file), SkipLog(max_skipped=0.01)))


def test_read_text_pairs_counts_all_rows_in_an_unclosed_quote(tmp_path: Path) -> None:
    """Also of a row that is not UTF-8."""
    (tmp_path / "a.csv").write_bytes(b'query;positive\nq;"open\nlost;lost\nq;"also lost"\nq;d\nq;caf\xe9\n')
    log = SkipLog(max_skipped=1.0)
    assert list(read_text_pairs(str(tmp_path / "a.csv"), log)) == [Pair("q", "d")]
    assert log.skipped == {"malformed row": 3, "not UTF-8": 1} and log.rows_seen == 5
