"""Every format gives the same records; what gives none is listed with its file and row."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from llm2clip.data.records import Record, Source, open_records
from llm2clip.data.refs import FileImage, MemoryImage, ParquetImage, TarImage
from llm2clip.data.skips import SkipLog, TooManySkipped

ROWS: list[dict[str, Any]] = [  # ragged on purpose
    {"id": "a", "image": "images/a.jpg", "captions": ["a cat", "一只猫, sitting"], "split": "train"},
    {"id": "b", "image": "images/b.png", "captions": ['a "dog"'], "split": "val"},
    {"id": "c", "image": "images/c.jpg", "captions": ["one", "two", "three"], "split": None},
]


def image_bytes(seed: int, kind: str = "JPEG") -> bytes:
    data = io.BytesIO()
    Image.linear_gradient("L").resize((24 + seed, 32)).convert("RGB").save(data, kind)
    return data.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for seed, row in enumerate(ROWS):
        (tmp_path / row["image"]).write_bytes(image_bytes(seed, "PNG" if row["image"].endswith("png") else "JPEG"))
    return tmp_path


def embedded(folder: Path) -> list[dict[str, Any]]:
    return [
        row | {"image": {"bytes": (folder / row["image"]).read_bytes(), "path": Path(row["image"]).name}}
        for row in ROWS
    ]


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def tar_members(folder: Path, rows: Iterable[dict[str, Any]]) -> Iterable[tuple[str, bytes]]:
    for row in rows:
        suffix = row["image"].rpartition(".")[2]
        yield f"x/{row['id']}.{suffix}", (folder / row["image"]).read_bytes()
        yield f"x/{row['id']}.json", json.dumps({"captions": row["captions"], "split": row["split"]}).encode()


def logged(path: Path) -> list[tuple[str, int, str]]:
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert all(entry.keys() == {"file", "row", "reason", "value"} for entry in entries)
    return [(entry["file"], entry["row"], entry["reason"]) for entry in entries]


def refused(source: Path, log: Path, **options: Any) -> tuple[list[str], list[tuple[str, int, str]]]:
    """The ids that come through with no limit on skips, and the (file name, row, reason) of what does not."""
    ids = [record.id for record in open_records(source, SkipLog(log, limit=1.0), **options)]
    return ids, [(os.path.basename(file), row, reason) for file, row, reason in logged(log)]


# ---- formats -------------------------------------------------------------------------------------------------------


def as_jsonl(folder: Path) -> str:
    return str(write_jsonl(folder / "x.jsonl", ROWS))


def as_jsonl_gz(folder: Path) -> str:
    (folder / "x.jsonl.gz").write_bytes(gzip.compress(write_jsonl(folder / "x.jsonl", ROWS).read_bytes()))
    return str(folder / "x.jsonl.gz")


def as_json(folder: Path) -> str:
    (folder / "x.json").write_text(json.dumps(ROWS))
    return str(folder / "x.json")


def as_csv_of_rows(folder: Path, name: str = "x.csv", delimiter: str = ",") -> str:
    """A row a caption, the first captions of all images before the second ones."""
    with (folder / name).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["id", "filename", "caption", "split"])
        for place in range(3):
            for row in ROWS:
                for caption in row["captions"][place : place + 1]:
                    writer.writerow([row["id"], row["image"], caption, row["split"] or ""])
    return str(folder / name)


def as_tsv_of_rows(folder: Path) -> str:
    return as_csv_of_rows(folder, "x.tsv", "\t")


def as_csv_of_lists(folder: Path) -> str:
    with (folder / "x.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "image", "captions", "split"])
        for place, row in enumerate(ROWS):  # as JSON, and as pandas prints a list
            written = json.dumps(row["captions"]) if place else repr(row["captions"])
            writer.writerow([row["id"], row["image"], written, row["split"] or "none"])
    return str(folder / "x.csv")


def as_parquet_of_paths(folder: Path) -> str:
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "x.parquet")
    return str(folder / "x.parquet")


def as_parquet_of_bytes(folder: Path) -> str:
    pq.write_table(pa.Table.from_pylist(embedded(folder)), folder / "x.parquet", row_group_size=2)
    return str(folder / "x.parquet")


def as_folder_of_parquet(folder: Path) -> str:
    (folder / "tables").mkdir()
    rows = embedded(folder)
    pq.write_table(pa.Table.from_pylist(rows[:2]), folder / "tables/0.parquet")
    pq.write_table(pa.Table.from_pylist(rows[2:]), folder / "tables/1.parquet")
    return str(folder / "tables")


def as_images_with_json(folder: Path) -> str:
    for row in ROWS:
        side = {"captions": row["captions"], "split": row["split"]}
        (folder / row["image"]).with_suffix(".json").write_text(json.dumps(side))
    return str(folder / "images")


def as_folder_with_captions(folder: Path) -> str:
    write_jsonl(folder / "captions.jsonl", ROWS)
    return str(folder)


def as_tar(folder: Path) -> str:
    return str(write_tar(folder / "x.tar", tar_members(folder, ROWS)))


def as_tars_in_braces(folder: Path) -> str:
    for number, row in enumerate(ROWS):
        write_tar(folder / f"shard-{number:03}.tar", tar_members(folder, [row]))
    return str(folder / "shard-{000..002}.tar")


def as_glob_of_tars(folder: Path) -> str:
    as_tars_in_braces(folder)
    return str(folder / "shard-*.tar")


def as_saved_dataset(folder: Path) -> str:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        id=datasets.Value("string"),
        image=datasets.Image(),
        captions=datasets.Sequence(datasets.Value("string")),
        split=datasets.Value("string"),
    )
    datasets.Dataset.from_list(embedded(folder), features=features).save_to_disk(folder / "saved")
    return str(folder / "saved")


FORMATS = [value for name, value in list(globals().items()) if name.startswith("as_")]


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
        assert not isinstance(image, MemoryImage)  # all of these can be read again, so nothing is held
    assert (log.seen, log.skipped.total(), log.dropped.total()) == (3, 0, 0)
    assert (folder / "skipped.jsonl").read_text() == ""
    assert [(r.id, r.captions) for r in open_records(path, images="ignore")] == [(r.id, r.captions) for r in records]


def test_hub_names_are_streamed_with_the_splits_of_the_data_set(folder: Path) -> None:
    pytest.importorskip("datasets")
    (folder / "hub").mkdir()
    for split, rows in (("train", ROWS[:2]), ("test", ROWS[2:])):
        plain = [{"caption": row["captions"][0]} for row in rows]
        write_jsonl(folder / f"hub/{split}.jsonl", plain)
    records = list(open_records(f"hf:{folder / 'hub'}"))
    assert sorted((r.split or "", r.captions) for r in records) == [
        ("test", ("one",)),
        ("train", ('a "dog"',)),
        ("train", ("a cat",)),
    ]
    assert [r.captions for r in open_records(f"hf:{folder / 'hub'}@test")] == [("one",)]


def test_a_saved_dict_gives_its_keys_as_splits(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    parts = {name: datasets.Dataset.from_dict({"text": [name], "split": ["mine"]}) for name in ("train", "val")}
    datasets.DatasetDict(parts).save_to_disk(folder / "saved")
    assert [r.split for r in open_records(folder / "saved")] == ["train", "val"]
    assert [r.captions for r in open_records(f"{folder / 'saved'}@val")] == [("val",)]
    with pytest.raises(ValueError, match="no split test; it has train, val"):
        list(open_records(f"{folder / 'saved'}@test"))
    mapped = Source(str(folder / "saved"), ("mine",), {"split": "split"})
    assert [r.split for r in open_records(mapped)] == ["mine", "mine"]


def test_side_car_texts_have_a_caption_a_line(folder: Path) -> None:
    (folder / "images/a.txt").write_text("first\n\n second \n")
    (folder / "images/b.json").write_text('["a list"]')
    (folder / "images/c.json").write_text('"a string"')
    texts = {r.id: r.captions for r in open_records(folder / "images")}
    assert texts == {"a": ("first", "second"), "b": ("a list",), "c": ("a string",)}


@pytest.mark.parametrize(
    "text",
    [
        'image,caption\na.jpg,one, two\nb.png,"say ""hi"", he said"\na.jpg,three\n',
        'a.jpg,one, two\nb.png,"say ""hi"", he said"\na.jpg,three\n',
        'a.jpg#0\tone, two\nb.png#0\tsay "hi", he said\na.jpg#1\tthree\n',
    ],
)
def test_flickr8k_captions_beside_a_folder_of_images(folder: Path, text: str) -> None:
    (folder / "captions.txt").write_text(text)
    records = list(open_records(folder))
    assert [r.captions for r in records] == [("one, two", "three"), ('say "hi", he said',)]
    assert records[0].image == FileImage(str(folder / "images/a.jpg"))


def test_a_tar_takes_text_files_and_other_names(folder: Path) -> None:
    picture = image_bytes(1)
    members = [
        ("../../etc/a.jpg", picture),  # hostile, and only a key
        ("../../etc/a.txt", b"one\ncaption"),
        ("b.JPEG", picture),
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
    assert second.image.read() == picture
    *_, mapped = open_records(Source(str(path), columns={"image": "seg.png"}), SkipLog(limit=1), images="exists")
    assert mapped.image is not None
    assert mapped.image.read() == image_bytes(2, "PNG")


def test_parquet_cells_may_be_paths_of_files_and_are_found_across_row_groups(folder: Path) -> None:
    rows = embedded(folder) * 3
    rows[4] = rows[4] | {"image": {"bytes": None, "path": "images/b.png"}}
    rows[5] = rows[5] | {"image": None}
    pq.write_table(pa.Table.from_pylist(rows), folder / "x.parquet", row_group_size=4)
    records = list(open_records(folder / "x.parquet"))
    assert records[4].image == FileImage(str(folder / "images/b.png"))
    assert records[5].image is None
    for number in (8, 0, 3, 7):
        image = records[number].image
        assert image == ParquetImage(str(folder / "x.parquet"), number, "image")
        assert image.read() == rows[number]["image"]["bytes"]
    raw = pa.table({"image": [row["image"]["bytes"] for row in rows[:3]], "text": ["x", "y", "z"]})
    pq.write_table(raw, folder / "raw.parquet")
    assert [r.image.read() for r in open_records(folder / "raw.parquet") if r.image] == raw["image"].to_pylist()


# ---- what a row may hold -------------------------------------------------------------------------------------------


def test_captions_are_stripped_kept_whole_and_guessed_in_order(tmp_path: Path) -> None:
    long = "word " * 5000
    rows = [
        {"captions": "  one string \n", "sentences": ["no"]},
        {"captions": [], "caption": "fallback"},
        {"sentences": ["part", "part"], "long_captions": [long]},  # as ADE20K's: the parts of the long one
        {"sentences": ["whole"]},
        {"captions": ["x"], "long_captions": "y", "id": 7},
        {"captions": float("nan"), "text": "after NaN"},
    ]
    records = list(open_records(write_jsonl(tmp_path / "many.jsonl", rows)))
    assert [r.captions for r in records] == [("one string",), ("fallback",), (), ("whole",), ("x",), ("after NaN",)]
    assert [r.long_captions for r in records] == [(), (), (long.strip(),), (), ("y",), ()]
    assert [r.id for r in records] == ["many:1", "many:2", "many:3", "many:4", "7", "many:6"]
    assert all(r.image is None for r in records)


def test_images_are_relative_to_the_file_or_absolute_and_give_an_id(folder: Path) -> None:
    rows = [{"path": "../images/a.jpg", "text": "x"}, {"path": str(folder / "images/b.png"), "text": "y"}]
    (folder / "deep").mkdir()
    records = list(open_records(write_jsonl(folder / "deep/x.jsonl", rows)))
    assert [r.id for r in records] == ["a", "b"]
    assert [r.image.read() for r in records if r.image] == [
        (folder / "images" / name).read_bytes() for name in ("a.jpg", "b.png")
    ]


def test_csv_without_images_is_grouped_by_id_and_by_split(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("id, caption, split\n1, one, a\n2, two, a\n1, uno, a\n1, eins, b\n, x, a\n, y, a\n")
    records = [(r.id, r.captions, r.split) for r in open_records(path)]
    assert records == [
        ("1", ("one", "uno"), "a"),
        ("2", ("two",), "a"),
        ("1", ("eins",), "b"),
        ("x:6", ("x",), "a"),
        ("x:7", ("y",), "a"),
    ]


# ---- sources: splits, columns, paths -------------------------------------------------------------------------------


def test_source_parse(tmp_path: Path) -> None:
    assert Source.parse("photos.csv@train+none") == Source("photos.csv", ("train", "none"))
    assert Source.parse("a@b/photos.csv") == Source("a@b/photos.csv")
    assert Source.parse("hf:org/name:config@test") == Source("hf:org/name:config", ("test",))
    (tmp_path / "x@train").mkdir()
    there = str(tmp_path / "x@train")
    assert Source.parse(there) == Source(there)
    assert Source.parse(f"{there}@val") == Source(there, ("val",))
    assert Source.parse({"path": "x@a", "columns": {"id": "key"}}) == Source("x", ("a",), {"id": "key"})
    assert Source.parse({"path": "x@a", "splits": "b+c"}).splits == ("b", "c")
    assert str(Source.parse(Source("x", ("a", "b")))) == "x@a+b"
    assert pickle.loads(pickle.dumps(Source("x", ("a",), {"id": "k"}))) == Source("x", ("a",), {"id": "k"})
    with pytest.raises(ValueError, match="unknown field 'caption'; ours are id, image, captions"):
        Source("x", columns={"caption": "text"})
    with pytest.raises(ValueError, match=r"path, splits and columns; this has path, split$"):
        Source.parse({"path": "x", "split": "a"})


def test_splits_are_selected_and_a_wrong_one_names_those_there_are(folder: Path) -> None:
    path = as_jsonl(folder)
    assert [r.id for r in open_records(f"{path}@train+none")] == ["a", "c"]
    log = SkipLog()
    assert [r.id for r in open_records(f"{path}@val", log)] == ["b"]
    assert log.seen == 1
    write_jsonl(folder / "y.jsonl", [{"text": "x", "split": "none"}, {"text": "y", "split": "a"}])
    assert [(r.captions, r.split) for r in open_records(f"{folder / 'y.jsonl'}@none")] == [(("x",), None)]
    with pytest.raises(ValueError, match=r"@tarin: no record; its splits: train \(1 rows\), val \(1 rows\), none"):
        list(open_records(f"{path}@tarin"))


def test_columns_are_mapped_and_wrong_names_are_explained(tmp_path: Path) -> None:
    rows = [{"key": 1, "captions": ["en"], "captions_de": ["de"], "part": "a"}, {"key": 2, "captions": ["en"]}]
    path = str(write_jsonl(tmp_path / "x.jsonl", rows))
    mapped = Source(path, ("a",), {"captions": "captions_de", "id": "key", "split": "part"})
    assert list(open_records(mapped)) == [Record("1", None, ("de",), (), "a")]
    (tmp_path / "x.csv").write_text("bild,beschreibung\na.jpg,eins\n")
    csv_path = str(tmp_path / "x.csv")
    with pytest.raises(
        ValueError, match=r"x\.csv: no column of captions; it has bild, beschreibung; map it with columns"
    ):
        list(open_records(csv_path))
    with pytest.raises(ValueError, match=r"no column 'beschreibun' for captions \(did you mean beschreibung\?\)"):
        list(open_records(Source(csv_path, columns={"captions": "beschreibun"})))
    german = Source(csv_path, columns={"captions": "beschreibung"})
    assert [r.captions for r in open_records(german)] == [("eins",)]
    with pytest.raises(ValueError, match="no column 'captions_fr' for captions"):
        list(open_records(Source(path, columns={"captions": "captions_fr"}), SkipLog(limit=1)))
    (tmp_path / "pandas.csv").write_text(",id,caption,split\n0,a,x,val\n")  # to_csv writes its index under no name
    unnamed = Source(str(tmp_path / "pandas.csv"), columns={"split": "", "id": ""})
    assert list(open_records(unnamed)) == [Record("pandas:2", None, ("x",))]
    write_jsonl(tmp_path / "y.jsonl", [{"words": "x"}])
    with pytest.raises(ValueError, match="no column of captions; it has words"):
        list(open_records(tmp_path / "y.jsonl"))
    pq.write_table(pa.table({"words": ["x"]}), tmp_path / "y.parquet")
    with pytest.raises(ValueError, match=r"y\.parquet: no column of captions; it has words"):
        list(open_records(tmp_path / "y.parquet"))


def test_paths_that_are_wrong_fail_at_once_and_say_how(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_jsonl(folder)
    with pytest.raises(FileNotFoundError, match=r"x\.json1: no such file or folder; did you mean .*x\.jsonl\?"):
        open_records(folder / "x.json1")
    with pytest.raises(FileNotFoundError, match=r"imagse/deep: no such file or folder; did you mean .*images"):
        open_records(folder / "imagse/deep")
    (folder / "x.xlsx").touch()
    with pytest.raises(ValueError, match=r"x\.xlsx: unknown format; these can be read: files ending in \.jsonl"):
        open_records(folder / "x.xlsx")
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: a folder without images, tars, parquet or captions"):
        open_records(folder / "empty")
    as_tars_in_braces(folder)
    with pytest.raises(FileNotFoundError, match=r"shard-003\.tar: no such file"):
        open_records(folder / "shard-{000..003}.tar")
    with pytest.raises(ValueError, match="images='all'; it is one of header, exists, ignore"):
        open_records(folder / "x.jsonl", images="all")  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "braceexpand", None)
    with pytest.raises(ImportError, match=r"pip install llm2clip\[tars\]"):
        open_records(folder / "shard-{000..002}.tar")
    (folder / "shard-{9}.tar").write_bytes((folder / "shard-000.tar").read_bytes())
    assert [r.id for r in open_records(folder / "shard-{9}.tar")] == ["a"]  # a name, for it exists


def test_whole_files_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"captions": []}')
    with pytest.raises(ValueError, match="a list of objects, this holds one dict"):
        list(open_records(tmp_path / "x.json"))
    (tmp_path / "y.json").write_text('{"text": "a"}\n{"text": "b"}\n')
    with pytest.raises(ValueError, match=r"y\.json: not JSON .*name it \.jsonl"):
        list(open_records(tmp_path / "y.json"))
    (tmp_path / "x.csv").write_text('id,caption\n1,"fine"\n2,"open\n' + "3,lost\n" * 1000)
    with pytest.raises(ValueError, match="a quote opened in the row at line 3 is not closed"):
        list(open_records(tmp_path / "x.csv"))
    (tmp_path / "z.jsonl").touch()
    with pytest.raises(ValueError, match=r"z\.jsonl: no record"):
        list(open_records(tmp_path / "z.jsonl"))


# ---- what is left out ----------------------------------------------------------------------------------------------


def test_every_row_left_out_of_a_jsonl_is_listed(folder: Path) -> None:
    (folder / "images/torn.jpg").write_bytes(image_bytes(0)[:20])
    huge = bytearray(image_bytes(0, "PNG"))
    huge[16:24] = (20_000).to_bytes(4, "big") * 2  # the size in the header; the check reads no further
    huge[29:33] = zlib.crc32(huge[12:29]).to_bytes(4, "big")
    (folder / "images/huge.png").write_bytes(huge)
    (folder / "images/dir.jpg").mkdir()
    lines = [
        b'{"image": "images/a.jpg", "captions": ["kept", " ", "also"]}',
        b'{"image": "images/none.jpg", "captions": ["x"]}',
        b'{"image": "images/torn.jpg", "captions": ["x"]}',
        b'{"image": "images/huge.png", "captions": ["x"]}',
        b'{"image": "https://example.org/a.jpg", "captions": ["x"]}',
        b'{"image": "images/a.jpg", "captions": []}',
        b'{"image": "images/a.jpg", "captions": ["", null]}',
        b'{"image": "images/a.jpg", "captions": ["x"',
        b'["image", "captions"]',
        b'{"image": 3, "captions": ["x"]}',
        b'{"image": "images/a.jpg", "captions": {"raw": "x"}}',
        b'{"image": "images/a.jpg", "captions": [["x"]]}',
        b'{"image": "images/a.jpg", "captions": ["bad \xff byte"]}',
        b'{"image": "images/a.jpg", "captions": ["bad \\ud800 escape"]}',
        b'{"image": "images/a.jpg", "captions": ["x"], "id": ["y"]}',
        b"",
        b'{"image": null, "captions": ["text only"], "id": "t"}',
        b'{"image": "images/dir.jpg", "captions": ["x"]}',
    ]
    (folder / "x.jsonl").write_bytes(b"\n".join(lines))
    source = Source(str(folder / "x.jsonl"))
    ids, skips = refused(source, folder / "log.jsonl")
    assert ids == ["a", "t"]
    assert skips == [("x.jsonl", row, reason) for row, reason in [
        (1, "empty caption"), (2, "missing image"), (3, "unreadable image"), (4, "image too large"),
        (5, "image is a URL"), (6, "no caption"), (7, "empty caption"), (7, "empty caption"), (7, "no caption"),
        (8, "malformed row"), (9, "malformed row"), (10, "malformed row"), (11, "malformed row"),
        (12, "malformed row"), (13, "malformed row"), (14, "malformed row"), (15, "malformed row"),
        (18, "missing image"),
    ]]  # fmt: skip
    assert refused(source, folder / "log.jsonl") == (ids, skips)  # a second run starts the list anew
    exists = refused(source, folder / "log.jsonl", images="exists")[0]
    assert exists == ["a", "torn", "huge", "t"]
    ignored = list(open_records(source, SkipLog(limit=1.0), images="ignore"))
    assert [r.id for r in ignored] == ["a", "none", "torn", "huge", "a", "t", "dir"]
    there = [None if r.image is None else os.path.basename(str(r.image)) for r in ignored]
    assert there == ["a.jpg", None, "torn.jpg", "huge.png", None, None, None]


def test_rows_left_out_of_a_csv_are_listed_by_line(folder: Path) -> None:
    lines = ["image,caption", "images/a.jpg,one", "images/a.jpg,too,many", "images/a.jpg,", '"images/b.png","two']
    lines += ['lines"', "images/none.jpg,x", "images/none.jpg,y", "images/c.jpg, ", 'images/a.jpg,"bad" quote']
    (folder / "x.csv").write_bytes("\n".join(lines).encode() + b"\nimages/a.jpg,\xff\n")
    log = SkipLog(folder / "log.jsonl", limit=1.0)
    records = list(open_records(folder / "x.csv", log))
    assert [(r.id, r.captions) for r in records] == [("a", ("one",)), ("b", ("two\nlines",))]
    assert sorted((row, reason) for _, row, reason in logged(folder / "log.jsonl")) == [
        (3, "malformed row"),
        (4, "empty caption"),
        (7, "missing image"),
        (9, "empty caption"),
        (9, "no caption"),
        (10, "malformed row"),
        (11, "malformed row"),
    ]
    assert (log.seen, log.skipped.total(), log.dropped.total()) == (7, 5, 2)  # the two captions of none.jpg are one row


def test_damaged_files_keep_what_was_read(folder: Path) -> None:
    whole = Path(as_tar(folder)).read_bytes()
    with tarfile.open(folder / "x.tar") as tar:
        third, text_of_third = tar.getmember("x/c.jpg"), tar.getmember("x/c.json")
    cuts = {  # where the tar ends: which samples are whole before it
        third.offset_data + 100: ["a", "b"],
        third.offset + 100: ["a", "b"],
        text_of_third.offset_data + 5: ["a", "b"],
        text_of_third.offset_data + 512: ["a", "b", "c"],  # all there but for the mark of the end
    }
    log = folder / "log.jsonl"
    for cut, kept in cuts.items():
        (folder / "cut.tar").write_bytes(whole[:cut])
        ids, skips = refused(Source(str(folder / "cut.tar")), log)
        assert (cut, ids, skips) == (cut, kept, [("cut.tar", len(kept) + 1, "truncated tar")])
    (folder / "cut.tar").write_bytes(whole[: third.offset] + b"garbage" * 500)
    assert refused(Source(str(folder / "cut.tar")), log)[1] == [("cut.tar", 3, "truncated tar")]
    (folder / "shard-0.tar").write_bytes(b"no tar")
    (folder / "shard-1.tar").write_bytes(whole)
    ids, skips = refused(Source(str(folder / "shard-{0,1}.tar")), log)
    assert (ids, skips) == (["a", "b", "c"], [("shard-0.tar", 1, "unreadable tar")])

    packed = gzip.compress(b"".join(b'{"text": "%d"}\n' % number**9 for number in range(500)))
    (folder / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    ids, skips = refused(Source(str(folder / "cut.jsonl.gz")), log)
    assert len(ids) > 50
    assert skips == [("cut.jsonl.gz", len(ids) + 1, "truncated file")]

    (folder / "tables").mkdir()
    pq.write_table(pa.table({"text": ["x"]}), folder / "tables/0.parquet")
    (folder / "tables/1.parquet").write_bytes(b"PAR1 no parquet")
    assert refused(Source(str(folder / "tables")), log) == (["0:1"], [("1.parquet", 1, "unreadable file")])


def test_samples_of_a_tar_and_side_cars_are_left_out_one_by_one(folder: Path) -> None:
    picture, log = image_bytes(1), folder / "log.jsonl"
    members = [
        ("a.jpg", picture), ("a.txt", b"x" * (1 << 20 | 1)),
        ("b.jpg", picture), ("b.json", b"{broken"),
        ("c.jpg", picture), ("c.json", b"3"),
        ("d.jpg", picture), ("d.txt", b"\xff\xfe"),
        ("e.jpg", picture), ("f.jpg", picture[:10]), ("f.txt", b"text"),
        ("g.txt", b"no image"), ("h.jpg", picture), ("h.txt", b"fine"),
    ]  # fmt: skip
    ids, skips = refused(Source(str(write_tar(folder / "x.tar", members))), log)
    assert ids == ["g", "h"]
    reasons = [
        "caption file over 1 MB",
        "malformed row",
        "malformed row",
        "malformed row",
        "no caption",
        "unreadable image",
    ]
    assert skips == [("x.tar", row, reason) for row, reason in enumerate(reasons, 1)]
    (folder / "images/a.txt").write_bytes(b"\xff")
    (folder / "images/b.json").write_text("{broken")
    (folder / "images/c.txt").write_text("fine")
    (folder / "images/d.jpg").write_bytes(picture)
    assert refused(Source(str(folder / "images")), log) == (
        ["c"],
        [("a.jpg", 1, "malformed row"), ("b.png", 2, "malformed row"), ("d.jpg", 4, "no caption")],
    )


def test_too_many_skips_end_the_reading(tmp_path: Path) -> None:
    rows = [{"image": f"{n}.jpg" if n % 10 == 0 else None, "captions": ["x", ""]} for n in range(3000)]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    log = SkipLog(tmp_path / "lists/skipped.jsonl")
    with pytest.raises(TooManySkipped) as caught:
        list(open_records(path, log))
    assert log.seen == 1001  # the first skip after a thousand rows
    message = str(caught.value)
    assert "101 of 1,001 rows skipped (missing image: 101)" in message
    assert "over the limit of 5.0%" in message
    assert f"{path}, row 1: missing image: {tmp_path / '0.jpg'}" in message
    assert message.count(": missing image: ") == 3
    assert str(tmp_path / "lists/skipped.jsonl") in message
    assert "--max_skipped" in message
    enough = SkipLog(limit=0.11)
    assert len(list(open_records(path, enough))) == 2700
    assert enough.summary() == (
        "300 of 3,000 rows skipped (missing image: 300); parts of rows dropped (empty caption: 3,000)"
    )
    few = write_jsonl(tmp_path / "few.jsonl", rows[:5])
    with pytest.raises(TooManySkipped, match="1 of 5 rows skipped"):
        list(open_records(few))
    assert len(list(open_records(few, SkipLog(limit=0.2)))) == 4


def test_a_skip_log_writes_short_values_and_any_file_name(tmp_path: Path) -> None:
    log = SkipLog(tmp_path / "log.jsonl")
    log.seen_one()
    log.skip("odd\udcff.jsonl", 3, "no caption", "长" * 500)
    entry = json.loads((tmp_path / "log.jsonl").read_text(encoding="utf-8"))
    assert entry == {"file": "odd\udcff.jsonl", "row": 3, "reason": "no caption", "value": "长" * 200}


def test_rows_are_read_as_they_are_asked_for(folder: Path) -> None:
    write_jsonl(folder / "x.jsonl", ROWS * 10_000)
    log = SkipLog()
    records = open_records(folder / "x.jsonl", log)
    assert next(records).id == "a"
    assert log.seen == 1


def test_reading_records_needs_no_torch() -> None:
    code = "import sys, llm2clip.data.records; sys.exit(bool({'torch', 'datasets', 'webdataset'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- real data -----------------------------------------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.skipif("LLM2CLIP_DATA" not in os.environ, reason="set LLM2CLIP_DATA to the folder of real data")
def test_the_real_sets_are_read_whole() -> None:
    data = Path(os.environ["LLM2CLIP_DATA"])
    counts = {
        "flickr8k": 7090, "flickr8k@train": 5999, "flickr8k@none": 91, "coco_img": 1813, "ade20k_ids": 432,
        "flickr30k_text@test": 1000, "flickr30k_text": 31014, "flickr8k_text": 1000, "coco_text": 14024,
        "coco_text@karpathy_test": 5000, "ade20k_ids_text": 5702, "stanford_paragraphs_text": 4976,
    }  # fmt: skip
    for name, count in counts.items():
        log = SkipLog(limit=0.0)
        records = list(open_records(f"{data / name}", log))
        assert (name, len(records), log.seen) == (name, count, count)
        assert not log.dropped
        pictures = "_text" not in name
        assert all((record.image is not None) == pictures and record.texts for record in records)
    long = list(open_records(data / "ade20k_ids"))
    assert sum(bool(record.captions) for record in long) == 27  # the sentences are no captions beside the long one
    assert all(len(record.long_captions) == 1 for record in long)
    german = Source(str(data / "flickr30k_text"), columns={"captions": "captions_de"})
    assert sum(len(record.captions) for record in open_records(german)) == 5 * 31014
