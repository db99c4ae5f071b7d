"""Reading data for a run: who trains, who is held out, who must not be tuned on."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import tarfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from format_fixtures import image_bytes
from llm2clip.config import EvaluateConfig, TuneConfig
from llm2clip.data.merged_records import read_merged_records, stream_records
from llm2clip.data.pairs import ImageCaptions, Pair
from llm2clip.data.records import EARLY_CHECK_ROWS, open_records
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.splits import DataSplits, read_splits
from llm2clip.data.tuning_sources import read_tuning_sources
from llm2clip.run_config import ConfigChangedError, save_or_check_config


@pytest.fixture
def write(tmp_path: Path):
    def rows(name: str, *lines: dict) -> str:
        for line in lines:
            if line.get("image"):
                Image.new("RGB", (8, 8)).save(tmp_path / line["image"])
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(tmp_path / name)

    return rows


def row(n: int, split: str | None = None, **more: object) -> dict:
    return {"image": f"{n}.png", "id": str(n), "captions": [f"{n} a", f"{n} b"], "split": split, **more}


def ids(data: DataSplits) -> tuple[list[str], list[str]]:
    return [r.id for r in data.train], [r.id for r in data.held_out["captions"]]


def tuned_on(data: DataSplits, config: TuneConfig) -> list:
    """As `fit` asks for it."""
    train = [] if config.data or config.text_pairs else data.train
    held_out = [r for some in data.held_out.values() for r in some]
    return read_tuning_sources(train, held_out, dataclasses.replace(config, batch_size=1), {}, SkipLog())


def test_splits_by_name(write) -> None:
    file = write("a.jsonl", row(1, "train"), row(2), row(3, "none"), row(4, "val"), row(5, "test"))
    data = read_splits([file], EvaluateConfig(), {}, SkipLog())
    assert ids(data) == (["1", "2", "3"], ["4"])
    assert "1 of other splits (test) unused" in data.summary
    assert ids(read_splits([f"{file}@train+val"], EvaluateConfig(data=[f"{file}@test"]), {}, SkipLog())) == (
        ["1", "4"],
        ["5"],
    )


def test_without_splits_a_tenth_is_held_out_by_id(write) -> None:
    file = write("a.jsonl", *(row(n) for n in range(40)))
    data = read_splits([file], EvaluateConfig(), {}, SkipLog())
    train, held = ids(data)
    assert len(held) == 4 and not set(train) & set(held) and len(train) == 36
    assert ids(read_splits([file], EvaluateConfig(), {}, SkipLog())) == (train, held)


def test_rows_of_one_image_are_one_record(write) -> None:
    """One row a caption: the image must not stand on both sides of the split, nor be its own rival."""
    lines = [{**row(n), "captions": [f"{n} {c}"], "id": f"{n}-{c}"} for n in range(20) for c in "abc"]
    data = read_splits([write("a.jsonl", *lines)], EvaluateConfig(), {}, SkipLog())
    assert len(data.train) == 18 and len(data.held_out["captions"]) == 2
    assert all(len(r.captions) == 3 for r in [*data.train, *data.held_out["captions"]])


def test_an_image_that_is_tested_on_is_not_trained_on(write) -> None:
    train, test = write("a.jsonl", row(1), row(2), row(3)), write("b.jsonl", row(2))
    data = read_splits([train], EvaluateConfig(data=[test]), {}, SkipLog())
    assert ids(data) == (["1", "3"], ["2"])
    assert "1 removed from training" in data.summary


def test_an_image_is_one_record_however_it_is_written(write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sources name it, with other spellings of its path and on both sides of a split: it is in one place, once."""
    a = write("a.jsonl", row(1, "train"), row(2, "val"))
    (tmp_path / "sub").mkdir()
    more = [{"image": f"../{n}.png", "captions": [f"{n} c"], "split": s} for n, s in ((1, "val"), (2, "train"))]
    (tmp_path / "sub/b.jsonl").write_text("".join(json.dumps(m) + "\n" for m in more))
    data = read_splits([a, str(tmp_path / "sub/b.jsonl")], EvaluateConfig(), {}, SkipLog())
    assert ids(data) == (["1"], ["2"])
    assert data.held_out["captions"][0].captions == ("2 a", "2 b", "2 c")
    monkeypatch.chdir(tmp_path)
    tested = read_splits(["a.jsonl@train+val"], EvaluateConfig(data=["sub/b.jsonl@train"]), {}, SkipLog())
    assert [r.id for r in tested.train] == ["1"] and "1 removed from training" in tested.summary


def test_splits_in_capitals_and_of_other_names(write) -> None:
    file = write("a.jsonl", row(1, "Train"), row(2, "Val"), row(3, "extra"))
    data = read_splits([file], EvaluateConfig(), {}, SkipLog())
    assert ids(data) == (["1"], ["2"]) and "1 of other splits (extra) unused" in data.summary
    file = write("b.jsonl", *(row(n) for n in range(20)), row(20, "extra"))
    assert "1 of other splits (extra) unused" in read_splits([file], EvaluateConfig(), {}, SkipLog()).summary


def test_the_held_out_tenth_is_drawn_where_ids_repeat(write, tmp_path: Path) -> None:
    for n in range(20):
        for side in ("front", "back"):
            (tmp_path / f"sku{n}").mkdir(exist_ok=True)
            Image.new("RGB", (8, 8)).save(tmp_path / f"sku{n}/{side}.png")
    sides = [{"image": f"sku{n}/{s}.png", "captions": [f"{s} of {n}"]} for s in ("front", "back") for n in range(20)]
    data = read_splits([write("a.jsonl", *sides)], EvaluateConfig(), {}, SkipLog())
    assert len({r.captions[0].split()[0] for r in data.held_out["captions"]}) == 2


def test_one_caption_an_image_cannot_be_tuned_on(write) -> None:
    data = read_splits(
        [write("a.jsonl", *({**row(n), "captions": ["one"]} for n in range(3)))], EvaluateConfig(), {}, SkipLog()
    )
    with pytest.raises(ValueError, match=r"--tune\.steps 0"):
        tuned_on(data, TuneConfig())


def test_other_sources_lose_the_captions_of_held_out_images(write) -> None:
    photos = write("f8k.jsonl", row(1, "train", id="1000001_aa"), row(2, "val", id="1000002_bb"))
    texts = write("f30k.jsonl", *({"id": f"100000{n}", "captions": [f"x{n}", f"y{n}"]} for n in (1, 2, 3, 4)))
    barred = write("more.jsonl", {"id": "1000003_cc", "captions": ["z", "zz"]})
    data = read_splits([photos], EvaluateConfig(), {}, SkipLog())
    assert tuned_on(data, TuneConfig()) == [[ImageCaptions(("1 a", "1 b"))]]
    rest = [ImageCaptions(c) for c in (("x1", "y1"), ("x3", "y3"), ("x4", "y4"))]
    assert tuned_on(data, TuneConfig(data=[texts])) == [rest]
    left = tuned_on(data, TuneConfig(data=[texts], exclude=[barred]))
    assert left == [[rest[0], rest[2]]]
    weighted = TuneConfig(data=[texts, barred], source_weights=[1, 2])
    assert tuned_on(data, weighted) == [rest, [ImageCaptions(("z", "zz"))]]
    pairs = write("pairs.jsonl", {"query": "q", "positive": "p"})
    assert tuned_on(data, TuneConfig(text_pairs=[pairs])) == [[Pair("q", "p")]]
    both = TuneConfig(data=[texts], text_pairs=[pairs], source_weights=[1, 2])
    assert tuned_on(data, both) == [rest, [Pair("q", "p")]]
    with pytest.raises(ValueError, match=r"one weight for each of the 1 sources.*\(got 2\)"):
        tuned_on(data, TuneConfig(data=[texts], source_weights=[1, 2]))


def test_photos_of_the_same_day_are_not_the_same_photo(write) -> None:
    file = write("a.jsonl", row(1, "train", id="20240131_0001"), row(2, "val", id="20240131_0002"))
    data = read_splits([file], EvaluateConfig(), {}, SkipLog())
    assert tuned_on(data, TuneConfig()) == [[ImageCaptions(("1 a", "1 b"))]]


def test_settings_of_align_can_be_mended_until_it_has_left_something(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    save_or_check_config({"tune": {"lr": 1}, "align": {"batch": 4096}}, file)
    (tmp_path / "tune/encoder").mkdir(parents=True)
    save_or_check_config({"tune": {"lr": 1}, "align": {"batch": 64}}, file)
    with pytest.raises(ConfigChangedError, match=r"tune\.lr"):
        save_or_check_config({"tune": {"lr": 2}, "align": {"batch": 64}}, file)
    (tmp_path / "align/checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigChangedError, match=r"align\.batch: 64 there, 32 now"):
        save_or_check_config({"tune": {"lr": 1}, "align": {"batch": 32}}, file)


def test_a_mistake_can_be_mended_before_anything_was_made(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    save_or_check_config({"data": "typo", "embed": {"batch_tokens": 1}}, file)
    save_or_check_config({"data": "right", "embed": {"batch_tokens": 1}}, file)
    (tmp_path / "store").mkdir()
    save_or_check_config({"data": "right", "embed": {"batch_tokens": 2}}, file)  # how fast, not what
    with pytest.raises(ConfigChangedError, match="data: 'right' there, 'wrong' now"):
        save_or_check_config({"data": "wrong", "embed": {"batch_tokens": 2}}, file)


def test_a_tar_by_another_path_is_the_same_images(write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photo = io.BytesIO()
    Image.new("RGB", (8, 8)).save(photo, "PNG")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for n in range(4):
            for suffix, data in (("png", photo.getvalue()), ("txt", f"{n}".encode())):
                info = tarfile.TarInfo(f"{n}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    monkeypatch.chdir(tmp_path)
    one, other = (next(open_records(path)).image for path in ("x.tar", str(tmp_path / "x.tar")))
    assert one is not None and other is not None and one.key == other.key
    (tmp_path / "link.tar").symlink_to(tmp_path / "x.tar")
    link = next(open_records("link.tar")).image
    assert link is not None and link.key.startswith(str(tmp_path / "link.tar")), "it is found where it was put"


def test_a_second_source_with_a_bad_first_row_is_read(write) -> None:
    good = write("a.jsonl", *(row(n) for n in range(EARLY_CHECK_ROWS + 1)))
    other = write("b.jsonl", *(row(n) for n in range(50)))
    Path(other).write_text("{broken\n" + Path(other).read_text())
    log = SkipLog()
    assert sum(1 for _ in stream_records([good, other], {}, log)) == EARLY_CHECK_ROWS + 51 and log.skipped.total() == 1


def test_a_source_that_is_read_again_counts_once(write) -> None:
    """As fit reads the captions of other languages, and align the features' images."""
    file, log = write("a.jsonl", *(row(n) for n in range(20))), SkipLog()
    Path(file).write_text(Path(file).read_text() + "{broken\n")
    for _ in range(2):
        assert len(list(stream_records([file], {}, log))) == 20
    assert log.summary().startswith("1 of 21 rows")
    list(stream_records([f"{file}@none"], {}, log))
    assert log.summary().startswith("1 of 21 rows")


def test_an_image_in_a_row_for_each_caption_is_one_image(tmp_path: Path) -> None:
    """As Hugging Face's sets often are; else its captions are each other's negatives, and held-out ones trained on."""
    pictures = [image_bytes(seed) for seed in range(20)]
    rows = [{"image": pictures[n], "caption": f"{n} {k}"} for n in range(20) for k in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    for source in ("x.parquet", "saved"):
        data = read_splits([str(tmp_path / source)], EvaluateConfig(), {}, SkipLog())
        held = data.held_out["captions"]
        assert (len(data.train), len(held)) == (18, 2) and all(len(r.captions) == 5 for r in [*data.train, *held])
    texts = [{"image": {"bytes": None, "path": f"{n}.jpg"}, "caption": f"{n} {k}"} for n in range(4) for k in range(2)]
    pq.write_table(pa.Table.from_pylist(texts), tmp_path / "texts.parquet")
    named = [{"image": f"{n}.jpg", "caption": f"{n} {k}"} for n in range(4) for k in range(2)]
    (tmp_path / "named.jsonl").write_text("".join(json.dumps(line) + "\n" for line in named))
    unnamed = [{"id": n, "caption": f"{n} {k}"} for n in range(4) for k in range(2)]
    (tmp_path / "unnamed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in unnamed))
    for source in ("texts.parquet", "named.jsonl", "unnamed.jsonl"):  # without a file there
        found = read_merged_records([str(tmp_path / source)], {}, SkipLog(), "unchecked")
        assert [r.captions for _, r in found] == [(f"{n} 0", f"{n} 1") for n in range(4)]


def test_tuning_leaves_out_what_a_fit_of_the_same_data_holds_out(write, tmp_path: Path) -> None:
    def tuned(sources: list[str], config: TuneConfig) -> list[set[str]]:
        """The numbers of the images whose captions `llm2clip tune` sees, by source."""
        held = [r for some in read_splits(sources, EvaluateConfig(), {}, SkipLog()).held_out.values() for r in some]
        items = read_tuning_sources(
            [], held, dataclasses.replace(config, batch_size=1), {}, SkipLog(), training_sources=sources
        )
        return [{item.texts[0].split()[0] for item in some} for some in items]

    file = write("a.jsonl", *(row(n, "test" if n < 2 else "train" if n < 6 else "odd") for n in range(8)))
    assert tuned([file], TuneConfig()) == [{"2", "3", "4", "5"}]
    named, rest = tuned([f"{file}@test", file], TuneConfig(source_weights=[1, 1]))
    assert named == {"0", "1"} and len(rest) == 3 and rest < {"2", "3", "4", "5"}, (
        "named ones as they are; one is drawn"
    )
    drawn = write("b.jsonl", *(row(n) for n in range(20)))
    train, held = ids(read_splits([drawn], EvaluateConfig(), {}, SkipLog()))
    assert tuned([drawn], TuneConfig()) == [set(train)] and len(held) == 2
    again = write("c.jsonl", *({**row(n), "captions": [f"{n} c", f"{n} d"], "id": f"x{n}"} for n in range(20)))
    both = read_splits([drawn, again], EvaluateConfig(), {}, SkipLog())
    assert tuned([drawn, again], TuneConfig(source_weights=[1, 1])) == [{r.id for r in both.train}] * 2, (
        "of both sources"
    )
    assert tuned([drawn], TuneConfig(data=[again])) == [set(train)], "one source of both, an image of both once"


def test_numbers_are_numbers_however_many_zeros_they_begin_with(write, capsys: pytest.CaptureFixture[str]) -> None:
    """COCO's files are called 000000000139, its ids are 139."""
    coco = write("c.jsonl", row(8, id="139"), row(7, id="391895"), row(9, id="COCO_val2014_000000391895"))
    train = [r for _, r in read_merged_records([coco], {}, SkipLog())]

    def left(*barred: str) -> list[str]:
        other = write("b.jsonl", *(row(n, id=name) for n, name in enumerate(barred)))
        (items,) = read_tuning_sources(train, [], TuneConfig(exclude=[other], batch_size=1), {}, SkipLog())
        return [item.texts[0].split()[0] for item in items]

    assert left("000000391895", "000000000139") == ["9"]
    capsys.readouterr()
    assert left("000000000140") == ["8", "7", "9"]
    assert "none of its images" in capsys.readouterr().out


def test_rows_that_name_nothing_are_each_their_own(tmp_path: Path) -> None:
    for n in range(2):
        (tmp_path / f"data.{n}.jsonl").write_text("".join(json.dumps({"caption": f"{n} {k}"}) + "\n" for k in range(3)))
    (tmp_path / "some").mkdir()
    for n in range(2):
        os.rename(tmp_path / f"data.{n}.jsonl", tmp_path / f"some/data.{n}.jsonl")
    assert len(read_merged_records([str(tmp_path / "some/data.{0..1}.jsonl")], {}, SkipLog(), "unchecked")) == 6
    cells = [{"image": {"bytes": image_bytes(n), "path": "image.png"}, "caption": f"{n}"} for n in range(6)]
    pq.write_table(pa.Table.from_pylist(cells), tmp_path / "x.parquet")
    for images in ("header", "unchecked", "ignore"):
        assert len(read_merged_records([str(tmp_path / "x.parquet")], {}, SkipLog(), images)) == 6  # type: ignore[arg-type]


def test_names_that_are_no_utf8_are_held_out_like_others(tmp_path: Path) -> None:
    for n in range(20):
        stem = os.fsencode(tmp_path) + b"/\xff%d" % n
        Image.new("RGB", (8, 8), (n, 0, 0)).save(tmp_path / "x.png")
        os.rename(tmp_path / "x.png", stem + b".png")
        Path(os.fsdecode(stem + b".txt")).write_text("one\ntwo")
    assert len(read_splits([str(tmp_path)], EvaluateConfig(), {}, SkipLog()).held_out["captions"]) == 2
