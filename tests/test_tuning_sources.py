"""Sources of tune: captions without those of held-out images, and general text pairs."""

import dataclasses
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from format_fixtures import image_row, write_images_and_jsonl, write_jsonl
from llm2clip.config import EvaluateConfig, TuneConfig
from llm2clip.data.build_table import DataSplits, open_table, read_splits
from llm2clip.data.pairs import ImageCaptions, Pair, read_text_pairs, read_tuning_sources
from llm2clip.data.skip_log import SkipLog, TooManySkipped
from llm2clip.data.table import RecordTable


def splits_of(*sources: str) -> DataSplits:
    return read_splits(list(sources), EvaluateConfig(), {}, SkipLog())


def all_held_out(splits: DataSplits) -> list[RecordTable]:
    return list(splits.held_out.values())


def sources_of_fit(splits: DataSplits, config: TuneConfig) -> list:
    """Read the tuning sources as `fit` does, for a batch size of 1."""
    train = None if config.data or config.text_pairs else splits.train
    config = dataclasses.replace(config, batch_size=1)
    return read_tuning_sources(train, all_held_out(splits), config, {}, SkipLog())


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
    train = open_table([coco], {}, SkipLog())

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
    with pytest.raises(TooManySkipped):
        list(read_text_pairs(str(file), SkipLog(max_skipped=0.01)))


def test_read_text_pairs_counts_all_rows_in_an_unclosed_quote(tmp_path: Path) -> None:
    """Also of a row that is not UTF-8."""
    (tmp_path / "a.csv").write_bytes(b'query;positive\nq;"open\nlost;lost\nq;"also lost"\nq;d\nq;caf\xe9\n')
    log = SkipLog(max_skipped=1.0)
    assert list(read_text_pairs(str(tmp_path / "a.csv"), log)) == [Pair("q", "d")]
    assert log.skipped == {"malformed row": 3, "not UTF-8": 1} and log.rows_seen == 5
