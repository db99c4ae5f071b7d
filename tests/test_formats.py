"""Readers: every format gives the same records."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from format_fixtures import (
    FORMATS,
    ROWS,
    as_csv_of_rows,
    as_tsv_of_rows,
    image_bytes,
    rows_with_image_bytes,
    write_jsonl,
    write_tar,
)
from llm2clip.config import EvaluateConfig
from llm2clip.data.build_table import read_splits
from llm2clip.data.image_refs import FileImage, MemoryImage, ParquetImage, TarImage, compute_content_digest
from llm2clip.data.records import Source, open_records
from llm2clip.data.skip_log import SkipLog


@pytest.mark.parametrize("write", FORMATS, ids=lambda write: write.__name__)
def test_every_format_gives_the_same_records(folder: Path, write: Callable[[Path], str]) -> None:
    path, log = write(folder), SkipLog(folder / "skipped.jsonl")
    records = list(open_records(path, log))
    assert [(r.id, r.captions, r.split) for r in records] == [(r["id"], tuple(r["captions"]), r["split"]) for r in ROWS]
    for record, row in zip(records, ROWS, strict=True):
        image = pickle.loads(pickle.dumps(record)).image
        assert image == record.image
        assert image.read() == (folder / row["image"]).read_bytes()
        with image.open() as stream:
            assert Image.open(stream).size == Image.open(folder / row["image"]).size
        assert str(folder) in str(image)
        assert not isinstance(image, MemoryImage)  # these formats allow random access: no bytes in memory
    num_rows = sum(len(r["captions"]) for r in ROWS) if write in (as_csv_of_rows, as_tsv_of_rows) else len(ROWS)
    assert (log.rows_seen, log.skipped.total(), log.dropped.total()) == (num_rows, 0, 0)
    assert (folder / "skipped.jsonl").read_text() == ""
    assert [(r.id, r.captions) for r in open_records(path, image_check="ignore")] == [
        (r.id, r.captions) for r in records
    ]


def test_hub_datasets_are_streamed_with_their_splits(folder: Path) -> None:
    pytest.importorskip("datasets")
    (folder / "hub").mkdir()
    for split, rows in (("train", ROWS[:2]), ("test", ROWS[2:])):
        write_jsonl(folder / f"hub/{split}.jsonl", [{"caption": row["captions"][0]} for row in rows])
    records = [(r.split, r.captions) for r in open_records(f"hf:{folder / 'hub'}")]
    assert sorted(records) == [("test", ("one",)), ("train", ('a "dog"',)), ("train", ("a cat",))]
    assert [r.captions for r in open_records(f"hf:{folder / 'hub'}@test")] == [("one",)]


def test_saved_dataset_dict_gives_its_keys_as_splits(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    parts = {name: datasets.Dataset.from_dict({"text": [name], "split": ["mine"]}) for name in ("train", "val")}
    datasets.DatasetDict(parts).save_to_disk(folder / "saved")
    assert [r.split for r in open_records(folder / "saved")] == ["train", "val"]
    assert [r.captions for r in open_records(f"{folder / 'saved'}@val")] == [("val",)]
    with pytest.raises(ValueError, match="no split test; its splits: train, val"):
        list(open_records(f"{folder / 'saved'}@test"))
    mapped = Source(str(folder / "saved"), ("mine",), {"split": "split"})
    assert [r.split for r in open_records(mapped)] == ["mine", "mine"]


@pytest.mark.parametrize(
    "text",
    [
        'image,caption\na.jpg,one, two\nb.png,"say ""hi"", he said"\na.jpg,three\n',
        'a.jpg,one, two\nb.png,"say ""hi"", he said"\na.jpg,three\n',
        'a.jpg#0\tone, two\nb.png#0\tsay "hi", he said\na.jpg#1\tthree\n',
    ],
)
def test_captions_txt_finds_the_image_folder(folder: Path, text: str) -> None:
    (folder / "captions.txt").write_text(text)
    records = list(open_records(folder))
    assert [r.captions for r in records] == [("one, two", "three"), ('say "hi", he said',)]
    assert records[0].image == FileImage(str(folder / "images/a.jpg"))


def test_tar_reads_txt_json_and_other_suffixes(folder: Path) -> None:
    image = image_bytes(1)
    members = [
        ("../../etc/a.jpg", image),  # a malicious path, used only as a key
        ("../../etc/a.txt", b"one\ncaption"),
        ("b.JPEG", image),
        ("b.seg.png", image_bytes(2, "PNG")),
        ("b.json", b'{"caption": null, "long_captions": ["long"]}'),
        ("b.txt", b'["x", "y"]'),
    ]
    path = write_tar(folder / "x.tar", members)
    first, second = open_records(path)
    assert (first.id, first.captions) == ("a", ("one\ncaption",))
    assert (second.id, second.captions, second.long_captions) == ("b", ("x", "y"), ("long",))
    assert second.texts == ("x", "y", "long")
    assert isinstance(second.image, TarImage)
    assert second.image.read() == image
    source = Source(str(path), columns={"image": "seg.png"})
    *_, mapped = open_records(source, SkipLog(max_skipped=1), image_check="exists")
    assert mapped.image is not None and mapped.image.read() == image_bytes(2, "PNG")


def test_parquet_images_are_paths_or_cells_of_any_row_group(folder: Path) -> None:
    rows = rows_with_image_bytes(folder) * 3
    rows[4] = rows[4] | {"image": {"bytes": None, "path": "images/b.png"}}
    rows[5] = rows[5] | {"image": None}
    pq.write_table(pa.Table.from_pylist(rows), folder / "x.parquet", row_group_size=4)
    records = list(open_records(folder / "x.parquet"))
    assert records[4].image == FileImage(str(folder / "images/b.png"))
    assert records[5].image is None
    for number in (8, 0, 3, 7):
        image = records[number].image
        digest = compute_content_digest(rows[number]["image"]["bytes"])
        assert image == ParquetImage(str(folder / "x.parquet"), number, "image", digest)
        assert image.read() == rows[number]["image"]["bytes"]
    raw = pa.table({"image": [row["image"]["bytes"] for row in rows[:3]], "text": ["x", "y", "z"]})
    pq.write_table(raw, folder / "raw.parquet")
    assert [r.image.read() for r in open_records(folder / "raw.parquet") if r.image] == raw["image"].to_pylist()


def test_csv_columns_with_the_same_name_become_a_list(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("id,caption,caption,caption\n1,one,two,\n")
    assert [r.captions for r in open_records(tmp_path / "x.csv")] == [("one", "two")]
    (tmp_path / "y.csv").write_text("id,caption,id\n1,one,2\n")  # two joined tables: the last id is used
    assert [(r.id, r.captions) for r in open_records(tmp_path / "y.csv")] == [("2", ("one",))]


def test_tar_members_with_the_same_name_are_different_images(tmp_path: Path) -> None:
    """Such tars come from joined shards or `tar -r`."""
    members = [("0.png", image_bytes(1, "PNG")), ("0.txt", b"red"), ("1.png", image_bytes(2, "PNG")), ("1.txt", b"x")]
    path = write_tar(tmp_path / "x.tar", [*members, ("0.png", image_bytes(3, "PNG")), ("0.txt", b"blue")])
    first, _, last = open_records(path)
    assert first.image is not None and last.image is not None
    assert first.image.key != last.image.key and str(first.image) == str(last.image)
    log = SkipLog(max_skipped=1)
    # In adjacent samples, it is unknown which text belongs to which image.
    path = write_tar(tmp_path / "y.tar", [*members[:2], *members])
    assert [r.id for r in open_records(path, log)] == ["1"] and log.skipped == {"duplicate name in tar": 1}


def test_parquet_image_of_a_truncated_file_raises_os_error(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [image_bytes(0)], "caption": ["a"]}), tmp_path / "x.parquet")
    (record,) = open_records(tmp_path / "x.parquet")
    (tmp_path / "x.parquet").write_bytes((tmp_path / "x.parquet").read_bytes()[:100])
    assert record.image is not None
    with pytest.raises(OSError, match=r"x\.parquet\[0\]\.image"):
        record.image.read()


@pytest.mark.parametrize("images", ["train2017", "images/train2017", "images", "annotations", ""])
def test_coco_captions_find_their_images(folder: Path, images: str) -> None:
    """The images may be in the usual folders next to the folder of the JSON file."""
    (folder / "annotations").mkdir()
    (folder / images).mkdir(parents=True, exist_ok=True)
    (folder / images / "000000000009.jpg").write_bytes(image_bytes(1))
    coco = {
        "images": [{"id": 9, "file_name": "000000000009.jpg", "coco_url": "http://x.org/train2017/000000000009.jpg"}],
        "annotations": [{"image_id": 9, "caption": "a dog"}, {"image_id": 9, "caption": "it runs"}],
    }
    (folder / "annotations/captions_train2017.json").write_text(json.dumps(coco))
    (record,) = open_records(folder / "annotations/captions_train2017.json")
    assert (record.id, record.captions, record.split) == ("9", ("a dog", "it runs"), None)
    assert record.image == FileImage(os.path.join(folder, images, "000000000009.jpg").replace("//", "/"))


def test_karpathy_splits_are_selected_like_any_other(folder: Path) -> None:
    rows = []
    for n, split in enumerate(("restval", "train", "val", "test")):
        name = f"COCO_val2014_{n:012}.jpg"
        (folder / "val2014").mkdir(exist_ok=True)
        (folder / "val2014" / name).write_bytes(image_bytes(n))
        sentences = [{"raw": f" {split} {k} .", "tokens": [split], "sentid": k} for k in range(5 + n)]
        rows.append(
            {"filepath": "val2014", "filename": name, "cocoid": 390 + n, "split": split, "sentences": sentences}
        )
    file = folder / "dataset_coco.json"
    file.write_text(json.dumps({"dataset": "coco", "images": [*rows, {"filename": "no sentences", "sentences": 3}]}))
    (test,) = open_records(f"{file}@test", SkipLog(max_skipped=0.5))
    assert (test.id, test.split, test.captions) == ("393", "test", tuple(f"test {k} ." for k in range(8)))
    assert test.image == FileImage(str(folder / "val2014/COCO_val2014_000000000003.jpg"))
    splits = read_splits([str(file)], EvaluateConfig(), {}, SkipLog(max_skipped=0.5))
    assert [record.split for record in splits.train] == ["restval", "train"]
    assert [record.split for record in splits.held_out["captions"]] == ["val"]
    for row in rows:
        del row["filepath"], row["cocoid"]  # as for Flickr30k
    (folder / "val2014").rename(folder / "flickr30k-images")
    (folder / "dataset_flickr30k.json").write_text(json.dumps({"images": rows}))
    assert [r.id for r in open_records(f"{folder / 'dataset_flickr30k.json'}@test")] == ["COCO_val2014_000000000003"]
