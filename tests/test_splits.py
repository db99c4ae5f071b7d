"""Split policy: which images are used for training and which are held out."""

import os
import shutil
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from format_fixtures import image_bytes, image_row, write_images_and_jsonl, write_jsonl
from llm2clip.config import EvaluateConfig
from llm2clip.data.build_table import DataSplits, read_splits
from llm2clip.data.skip_log import SkipLog


def splits_of(*sources: str | Path, held_out: tuple[str | Path, ...] = ()) -> DataSplits:
    config = EvaluateConfig(data=[str(source) for source in held_out])
    return read_splits([str(source) for source in sources], config, {}, SkipLog())


def ids(splits: DataSplits) -> tuple[list[str], list[str]]:
    return [r.id for r in splits.train], [r.id for r in splits.held_out["captions"]]


def test_read_splits_uses_the_split_names(tmp_path: Path) -> None:
    """The names are compared without case, except for those that are selected."""
    rows = [image_row(1, "train"), image_row(2), image_row(3, "none"), image_row(4, "Val"), image_row(5, "test")]
    file = write_images_and_jsonl(tmp_path / "a.jsonl", *rows)
    splits = splits_of(file)
    assert ids(splits) == (["1", "2", "3"], ["4"])
    assert "1 records from other splits (test) not used" in splits.summary
    assert ids(splits_of(f"{file}@train+Val", held_out=(f"{file}@test",))) == (["1", "4"], ["5"])


def test_read_splits_holds_out_a_tenth_without_split_names(tmp_path: Path) -> None:
    rows = [*(image_row(n) for n in range(40)), image_row(40, "extra")]
    file = write_images_and_jsonl(tmp_path / "a.jsonl", *rows)
    splits = splits_of(file)
    assert "1 records from other splits (extra) not used" in splits.summary
    train, held_out = ids(splits)
    assert (len(train), len(held_out)) == (36, 4)
    assert not set(train) & set(held_out)
    assert ids(splits_of(file)) == (train, held_out)


def test_the_held_out_tenth_is_random_if_ids_repeat(tmp_path: Path) -> None:
    rows = []
    for side in ("front", "back"):
        for n in range(20):
            (tmp_path / f"sku{n}").mkdir(exist_ok=True)
            rows.append({"image": f"sku{n}/{side}.png", "captions": [f"{side} of {n}"]})
    splits = splits_of(write_images_and_jsonl(tmp_path / "a.jsonl", *rows))
    assert len({r.captions[0].split()[0] for r in splits.held_out["captions"]}) == 2


def test_rows_of_an_image_in_a_table_are_in_the_same_split(tmp_path: Path) -> None:
    """Hugging Face data sets often repeat the image in a row for each caption."""
    images = [image_bytes(seed) for seed in range(20)]
    rows = [{"image": images[n], "caption": f"{n} {k}"} for n in range(20) for k in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    for source in ("x.parquet", "saved"):
        splits = splits_of(tmp_path / source)
        held_out = splits.held_out["captions"]
        assert (len(splits.train), len(held_out)) == (18, 2)
        assert all(len(r.captions) == 5 for r in [*splits.train, *held_out])


def test_an_image_with_several_spellings_of_its_path_is_in_one_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = write_images_and_jsonl(tmp_path / "a.jsonl", image_row(1, "train"), image_row(2, "val"))
    (tmp_path / "sub").mkdir()
    rows = [{"image": f"../{n}.png", "captions": [f"{n} c"], "split": s} for n, s in ((1, "val"), (2, "train"))]
    b = write_jsonl(tmp_path / "sub/b.jsonl", rows)
    splits = splits_of(a, b)
    assert ids(splits) == (["1"], ["2"])
    assert splits.held_out["captions"][0].captions == ("2 a", "2 b", "2 c")
    monkeypatch.chdir(tmp_path)
    splits = splits_of("a.jsonl@train+val", held_out=("sub/b.jsonl@train",))
    assert [r.id for r in splits.train] == ["1"]
    assert "1 held-out images removed from training" in splits.summary


def test_file_names_that_are_not_utf8_can_be_held_out(tmp_path: Path) -> None:
    for n in range(20):
        stem = os.fsencode(tmp_path) + b"/\xff%d" % n
        Image.new("RGB", (8, 8), (n, 0, 0)).save(tmp_path / "x.png")
        os.rename(tmp_path / "x.png", stem + b".png")
        Path(os.fsdecode(stem + b".txt")).write_text("one\ntwo")
    assert len(splits_of(tmp_path).held_out["captions"]) == 2


def test_read_splits_reads_caption_columns_of_held_out_images(tmp_path: Path) -> None:
    rows = [image_row(1, "train", captions_de=["eins"]), image_row(2, "val", captions_de=["zwei"])]
    rows[1]["long_captions"] = ["two, at length"]
    file = write_images_and_jsonl(tmp_path / "a.jsonl", *rows)
    held_out = read_splits([file], EvaluateConfig(fields=["captions_de"]), {}, SkipLog()).held_out
    captions = {name: [r.captions for r in records] for name, records in held_out.items()}
    assert captions == {
        "captions": [("2 a", "2 b")],
        "long_captions": [("two, at length",)],
        "captions_de": [("zwei",)],
    }


def test_copies_of_held_out_images_are_not_used_for_training(tmp_path: Path) -> None:
    """A copy in the training split of the same source, and one in another source."""
    rows = [image_row(n, "val" if n < 3 else "train") for n in range(6)]
    file = Path(write_images_and_jsonl(tmp_path / "a.jsonl", *rows))
    for n in (0, 3):
        shutil.copy(tmp_path / f"{n}.png", tmp_path / f"copy{n}.png")
    copies = [{"image": f"copy{n}.png", "captions": [f"copy {n}"]} for n in (0, 3)]
    write_jsonl(file, [*rows, {**copies[0], "split": "train"}, {**copies[1], "split": "val"}])
    splits = splits_of(file)
    assert ids(splits) == (["3", "4", "5"], ["0", "1", "2"])
    assert splits.held_out["captions"][0].captions == ("0 a", "0 b", "copy 0")
    write_jsonl(tmp_path / "b.jsonl", copies)
    splits = splits_of(f"{file}@train+val", held_out=(tmp_path / "b.jsonl",))
    assert ids(splits) == (["1", "2", "4", "5"], ["copy0", "copy3"])
    assert "2 held-out images removed from training" in splits.summary
