"""Readers: every format gives the same records, files can be read in parts, and corrupt files are read or rejected."""

import gzip
import io
import json
import os
import pickle
import random
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from conftest import load_benchmark
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
from llm2clip.data.build_table import read_data_splits
from llm2clip.data.formats import (
    BadRow,
    FilePart,
    RawRow,
    ReadOptions,
    build_file_part,
    image_files,
    load_source_formats,
    read_rows,
    split_file_into_parts,
    text_files,
)
from llm2clip.data.image_refs import (
    FileImage,
    InMemoryImage,
    LoadedImage,
    ParquetImage,
    TarImage,
    compute_content_digest,
)
from llm2clip.data.records import Source, open_records
from llm2clip.data.skip_log import SkipLog
from llm2clip.io_utils import DataFormatError


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
        assert not isinstance(image, InMemoryImage)  # these formats allow random access: no bytes in memory
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
    with pytest.raises(ValueError, match=r"no split val\. Available splits: train, test"):
        list(open_records(f"hf:{folder / 'hub'}@val"))


def test_saved_datasets_must_be_converted(folder: Path) -> None:
    (folder / "saved").mkdir()
    (folder / "saved/dataset_dict.json").touch()
    with pytest.raises(ValueError, match="save each split with to_parquet"):
        open_records(folder / "saved")


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
    *_, mapped = open_records(source, SkipLog(max_skipped=1), image_check="unchecked")
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
    splits = read_data_splits([str(file)], EvaluateConfig(), {}, SkipLog(max_skipped=0.5))
    assert [record.split for record in splits.train] == ["restval", "train"]
    assert [record.split for record in splits.held_out["captions"]] == ["val"]
    for row in rows:
        del row["filepath"], row["cocoid"]  # as for Flickr30k
    (folder / "val2014").rename(folder / "flickr30k-images")
    (folder / "dataset_flickr30k.json").write_text(json.dumps({"images": rows}))
    assert [r.id for r in open_records(f"{folder / 'dataset_flickr30k.json'}@test")] == ["COCO_val2014_000000000003"]


# ---- parts of files --------------------------------------------------------------------------------------------------


LINES = (
    b'{"caption": "a dog"}', '{"caption": "a cät 一只猫"}'.encode(), b'{"caption": "caf\xe9"}', b"", b"  ", b"[1]",
    b'{"caption": ', b'\xef\xbb\xbf{"caption": "mark"}', "\u2028".encode(), b'{"a": 1}\r{"a": 2}',
    b'{"caption": "x\0"}',
    b'{"caption": "' + b"long " * 300 + b'"}', b'{"caption": "\xc3',
)  # fmt: skip


def split(path: Path, target_bytes: int = 64 << 20) -> list[FilePart]:
    return split_file_into_parts(build_file_part(str(path)), target_bytes)


def read_parts(path: Path, target_bytes: int = 1 << 40) -> tuple[list[RawRow], list[str]]:
    """Return the rows of a file that is read in parts, and the notes and the error, if any."""
    log, messages = SkipLog(), list[str]()
    rows: list[RawRow] = []
    try:
        for part in split(path, target_bytes):
            for row in read_rows(part, ReadOptions(log=log)):
                rows.append(row)
    except DataFormatError as error:
        messages = [str(error)]
    return rows, [*log.notes, *messages]


def read_in_text_mode(path: Path) -> list[tuple[int, Any]]:
    """Return the number and the value of each row of a .jsonl file, or the reason for which it is a `BadRow`."""
    rows: list[tuple[int, Any]] = []
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if len(line) > text_files.MAX_LINE_CHARACTERS:
                rows.append((number, "malformed row"))
            elif any("\udc80" <= character <= "\udcff" for character in line):
                rows.append((number, "not UTF-8"))
            elif line.strip():
                try:
                    value = json.loads(line)
                except ValueError:
                    value = None
                rows.append((number, value if isinstance(value, dict) else "malformed row"))
    return rows


@pytest.mark.parametrize("seed", range(20))
def test_parts_of_json_lines_have_the_rows_of_the_file(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "MAX_LINE_CHARACTERS", 1000)
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 1 + seed)  # newlines are counted across chunks
    rng, path = random.Random(seed), tmp_path / "x.jsonl"
    newline = rng.choice([b"\n", b"\r\n"])
    content = b"".join(rng.choice(LINES) + newline for _ in range(rng.choice([1, 5, 40])))
    content = rng.choice([b"", b"\xef\xbb\xbf"]) + content.removesuffix(rng.choice([b"", newline, b"\n"]))
    path.write_bytes(content)
    reference, notes = read_parts(path)
    values = [(row, fields.reason if isinstance(fields, BadRow) else fields) for _, row, fields in reference]
    assert values == read_in_text_mode(path)
    for target_bytes in (1, 2, 3, 7, 30, 100, 1000, len(content) - 1, len(content), len(content) + 1):
        assert read_parts(path, max(1, target_bytes)) == (reference, notes)
    assert len(split(path, len(content))) == 1


CSV_CELLS = (
    "a dog", "a cät 一只猫", "", '"quoted, with; a comma"', '"two\nlines"', '"two\r\nlines"', '"a ""quoted"" word"',
    '"', 'a "stray" quote', '"closed" too early', "caf\udce9", "\x85\u2028", " padded ", '"\n\n"', "x" * 300,
)  # fmt: skip


@pytest.mark.parametrize("seed", range(40))
def test_parts_of_csv_files_have_the_rows_of_the_file(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows with quoted line breaks, and malformed rows. The rows after an opened quote belong to it."""
    rng, path = random.Random(seed), tmp_path / "x.csv"
    monkeypatch.setattr(text_files, "MAX_LINE_CHARACTERS", 1000)
    newline, delimiter = rng.choice(["\n", "\r\n", "\r"]), rng.choice(",;\t")
    cells = [cell for cell in CSV_CELLS if cell != '"' and "early" not in cell] if seed % 2 else CSV_CELLS
    rows = [delimiter.join(rng.choices(cells, k=rng.choice([2, 2, 2, 2, 3]))) for _ in range(rng.choice([1, 5, 60]))]
    text = newline.join([rng.choice(["", "sep=;\n" if delimiter == ";" else ""]) + f"a{delimiter}b", *rows])
    content = rng.choice([b"", b"\xef\xbb\xbf"]) + text.encode(errors="surrogateescape")
    path.write_bytes(content)

    expected = read_parts(path)
    most = 0
    for target_bytes in (1, 2, 10, 50, 300, len(content)):
        most = max(most, len(split(path, target_bytes)))
        assert read_parts(path, target_bytes) == expected
    assert most > 1 or len(rows) < 5 or seed % 2 == 0


def test_files_are_divided_near_the_target_size(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("image,caption\n" + '1.jpg,"a\nb"\n' * 1000)  # 12 bytes per row, two lines per row
    csv_parts = split(tmp_path / "x.csv", 3000)
    assert [part.start for part in csv_parts] == [0, 3002, 6002, 9002, 12002]
    assert [part.first_row for part in csv_parts] == [1, 500, 1000, 1500, 2000]
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n' * 1000)  # 9 bytes per line
    assert len(split(tmp_path / "x.jsonl", 1)) == 1000
    parts = split(tmp_path / "x.jsonl", 2700)
    assert [(part.start, part.stop) for part in parts] == [(0, 2700), (2700, 5400), (5400, 8100), (8100, None)]
    assert [part.first_row for part in parts] == [1, 301, 601, 901]


def test_a_line_that_is_too_long_ends_the_division(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "MAX_LINE_CHARACTERS", 1 << 16)
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n' * 10)
    os.truncate(path, 1 << 40)  # a sparse file, whose last line has a terabyte
    assert len(split(path, 20)) < 10
    assert len(split(path)) == 1


def test_files_of_other_formats_are_not_divided(tmp_path: Path) -> None:
    text = '{"caption": "a"}\n' * 100
    files = {
        "x.jsonl.gz": gzip.compress(text.encode(), 0),
        "utf-16.jsonl": text.encode("utf-16"),
        "utf-16.csv": ("caption\n" + "a\n" * 100).encode("utf-16"),
        "section.csv": "sep=§\na§b\n1§2\n".encode(),
        "quote.csv": b'caption\n"' + b"a\n" * 1000,
        "corrupt.parquet": b"PAR1" + bytes(1000),
        "x.tar": bytes(10240),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        part = FilePart(build_file_part(name.removesuffix(".gz")).format, str(tmp_path / name))
        assert split_file_into_parts(part, 10) == [part]
    missing, folder = (
        build_file_part(f"{tmp_path}/missing.jsonl"),
        FilePart(load_source_formats()["images"], str(tmp_path)),
    )
    assert split_file_into_parts(missing, 10) == [missing] and split_file_into_parts(folder, 1) == [folder]
    assert len(read_parts(tmp_path / "x.jsonl.gz", 10)[0]) == 100
    rows, notes = read_parts(tmp_path / "utf-16.jsonl", 10)
    assert len(rows) == 100 and "read as UTF-16" in notes


def write_parquet(path: Path, num_rows: int, group_rows: int) -> Path:
    images = [{"bytes": f"image {n}".encode() * 20, "path": f"{n}.jpg"} for n in range(num_rows)]
    table = pa.table({"image": images, "caption": [f"caption {n}" for n in range(num_rows)]})
    pq.write_table(table, path, row_group_size=group_rows)
    return path


@pytest.mark.parametrize(("num_rows", "group_rows"), [(0, 10), (1, 10), (95, 10), (100, 7), (100, 1000)])
def test_parts_of_parquet_files_have_the_rows_of_the_file(num_rows: int, group_rows: int, tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", num_rows, group_rows)
    reference, _ = read_parts(path)
    assert [row for _, row, _ in reference] == list(range(1, num_rows + 1))
    num_groups = pq.read_metadata(path).num_row_groups
    for target_bytes in (1, 1000, 4000, 1 << 30):
        assert read_parts(path, target_bytes)[0] == reference
        assert 1 <= len(split(path, target_bytes)) <= max(1, num_groups)
    assert len(split(path, 1)) == max(1, num_groups)
    for _, row, fields in reference:
        assert not isinstance(fields, BadRow) and isinstance(image := fields["image"], LoadedImage)
        assert image.ref.read() == image.data == f"image {row - 1}".encode() * 20


def test_parts_of_a_corrupt_parquet_file_count_each_row_once(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", 100, 10)
    data = bytearray(path.read_bytes())
    data[len(data) // 3 : len(data) // 3 + 200] = bytes(200)
    path.write_bytes(data)
    rows, _ = read_parts(path, 1000)
    assert sum(fields.rows if isinstance(fields, BadRow) else 1 for _, _, fields in rows) == 100
    assert any(isinstance(fields, BadRow) for _, _, fields in rows)


# ---- tar files -------------------------------------------------------------------------------------------------------


mutate_tar: Callable[[bytes, random.Random], bytes] = load_benchmark("fuzz").mutate_tar
Edit = Callable[[tarfile.TarInfo], None]


def build_tar(
    members: Iterable[tuple[str, bytes]], edit: Edit = lambda _: None, kind: int = tarfile.PAX_FORMAT
) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            edit(info)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def build_members(count: int, image_bytes: int = 700) -> list[tuple[str, bytes]]:
    rng = random.Random(0)
    members = []
    for n in range(count):
        members.append((f"{n:05d}.jpg", rng.randbytes(rng.randrange(image_bytes))))
        members.append((f"{n:05d}.json", json.dumps({"captions": [f"a {n}", "b"]}).encode()))
    return members


def set_webdataset_fields(info: tarfile.TarInfo) -> None:
    """Set the fields as webdataset's TarWriter does. The time is a float, so each member gets a PAX header."""
    info.mode, info.uname, info.gname, info.mtime = 0o444, "bigdata", "bigdata", time.time() + info.size / 7


def use_long_names(info: tarfile.TarInfo) -> None:
    if info.size % 3 == 0:
        info.name = f"{'folder/' * 20}{info.name}"


def use_sub_folders(info: tarfile.TarInfo) -> None:
    info.name = f"part {int(info.name[:5]) // 3}//{info.name}"


def add_attributes(info: tarfile.TarInfo) -> None:
    if info.name.startswith("00003"):
        info.pax_headers = {"comment": "x", "mtime": "1.5"}
    if info.name == "00005.jpg":
        info.type, info.size, info.linkname = tarfile.SYMTYPE, 0, "00004.jpg"
    if info.name == "00006.json":
        info.uid = 1 << 40


EDITS: list[tuple[str, Edit, int]] = [
    ("ustar", lambda _: None, tarfile.USTAR_FORMAT),
    ("gnu", lambda _: None, tarfile.GNU_FORMAT),
    ("webdataset", set_webdataset_fields, tarfile.PAX_FORMAT),
    ("long gnu names", use_long_names, tarfile.GNU_FORMAT),
    ("long pax names", use_long_names, tarfile.PAX_FORMAT),
    ("long ustar names", use_long_names, tarfile.USTAR_FORMAT),
    ("sub-folders", use_sub_folders, tarfile.PAX_FORMAT),
    ("attributes", add_attributes, tarfile.PAX_FORMAT),
]


def read_tar(path: Path, image_bytes: bool = True) -> list[RawRow]:
    return list(read_rows(build_file_part(str(path)), ReadOptions(image_bytes=image_bytes)))


def read_with_tarfile(path: Path, monkeypatch: pytest.MonkeyPatch) -> list[RawRow]:
    with monkeypatch.context() as patch:
        patch.setattr(image_files, "_parse_regular_file_headers", lambda *_: None)
        return read_tar(path)


@pytest.mark.parametrize(("name", "edit", "kind"), EDITS, ids=[name for name, _, _ in EDITS])
@pytest.mark.parametrize("window_bytes", [1 << 20, 4096])
def test_rows_are_those_of_tarfile(
    name: str, edit: Edit, kind: int, window_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_files, "WINDOW_BYTES", window_bytes)
    monkeypatch.setattr(image_files, "JUMP_BYTES", 1024)
    path, data = tmp_path / "x.tar", build_tar(build_members(20), edit, kind)
    path.write_bytes(data)
    rows = read_tar(path)
    assert rows == read_with_tarfile(path, monkeypatch)
    assert len(rows) >= 20
    with tarfile.open(path) as tar:
        contents = {member.offset_data: tar.extractfile(member).read() for member in tar if member.isreg()}  # type: ignore[union-attr]
    for _, _, fields in rows:
        assert isinstance(fields, dict)
        image = fields["image"]
        if isinstance(image, LoadedImage):
            assert isinstance(image.ref, TarImage) and image.data == image.ref.read() == contents[image.ref.offset]


def count_tarfile_headers(path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return the number of times that `tarfile` reads a header while a tar file is read."""
    calls, next_member = [], tarfile.TarFile.next

    def count(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
        calls.append(tar.offset)
        return next_member(tar)

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "next", count)
        read_tar(path)
    return len(calls)


@pytest.mark.parametrize(("edit", "kind"), [edit[1:] for edit in EDITS[:3]])
def test_plain_headers_are_not_parsed_by_tarfile(
    edit: Edit, kind: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.tar").write_bytes(build_tar(build_members(50), edit, kind))
    assert count_tarfile_headers(tmp_path / "x.tar", monkeypatch) <= 4  # the first header and the end


@pytest.mark.parametrize("seed", range(8))
def test_rows_of_corrupt_files_are_those_of_tarfile(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, path = random.Random(seed), tmp_path / "x.tar"
    inputs = [build_tar(build_members(6), edit, kind) for _, edit, kind in EDITS]
    reasons: set[str] = set()
    for _ in range(150):
        data = mutate_tar(rng.choice(inputs), rng)
        path.write_bytes(data[: rng.randrange(len(data))] if rng.random() < 0.2 else data)
        rows = read_tar(path)
        assert rows == read_with_tarfile(path, monkeypatch)
        reasons |= {fields.reason for _, _, fields in rows if isinstance(fields, BadRow)}
    assert "truncated tar" in reasons


@pytest.mark.parametrize(
    "position", [0, 99, 100, 124, 134, 135, 136, 147, 148, 153, 154, 156, 157, 257, 329, 344, 345, 511]
)
def test_headers_with_an_unusual_byte_are_those_of_tarfile(
    position: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bytearray(build_tar([(f"{n}.txt", b"text") for n in range(6)], kind=tarfile.USTAR_FORMAT))
    path = tmp_path / "x.tar"
    for value, has_valid_checksum in product((b"\0", b" ", b"8", b"-", b"x", b"/", b"\xff"), (False, True)):
        header = data[2048:2560]
        header[position : position + 1] = value
        if has_valid_checksum and not 148 <= position < 156:
            header[148:156] = b"%06o\0 " % (sum(header[:148]) + 256 + sum(header[156:]))
        path.write_bytes(data[:2048] + header + data[2560:])
        assert read_tar(path) == read_with_tarfile(path, monkeypatch)


@pytest.mark.parametrize(
    "records",
    [
        b"13 mtime=1.5\n", b"12 mtime=1.5\n", b"14 mtime=1.5\n", b"13 mtime=1.5", b"13 mtime=1.5\n13 ctime=1.5\n",
        b"13 mtime=1.5\n10 size=1\n", b"13 mtime=1.5\n15 path=y.txt \n", b"13 mtime=1.5\n\0\0\0", b"", b"x",
        b"13 mtime=1.5\n30 hdrcharset=BINARY\n", b"13 mtime=x.5\n",
    ],
)  # fmt: skip
def test_pax_records_are_those_of_tarfile(records: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray(build_tar([(f"{n}.txt", b"text") for n in range(6)], set_webdataset_fields))
    header, block = bytearray(data[4096:4608]), records.ljust(512, b"\0")
    assert header[156:157] == b"x"
    path = tmp_path / "x.tar"
    for size in {len(records), len(records) + 1, 512}:
        header[124:136] = b"%011o\0" % size
        header[148:156] = b"%06o\0 " % (sum(header[:148]) + 256 + sum(header[156:]))
        path.write_bytes(data[:4096] + header + block + data[5120:])
        assert read_tar(path) == read_with_tarfile(path, monkeypatch)


def test_large_images_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "MAX_LOADED_BYTES", 10_000)
    members = [("a.jpg", bytes(10_000)), ("a.txt", b"a"), ("b.png", bytes(10_001)), ("b.txt", b"b")]
    (tmp_path / "x.tar").write_bytes(build_tar(members))
    images = [fields["image"] for _, _, fields in read_tar(tmp_path / "x.tar") if isinstance(fields, dict)]
    assert [image.data for image in images] == [bytes(10_000), None]
    assert [image.ref.read() for image in images] == [bytes(10_000), bytes(10_001)]
    rows: list[Any] = [fields for _, _, fields in read_tar(tmp_path / "x.tar", image_bytes=False)]
    assert [row["image"].data for row in rows] == [None, None]


def test_compressed_tar_file_is_unreadable(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(gzip.compress(build_tar(build_members(3))))
    [(_, _, row)] = read_tar(tmp_path / "x.tar")
    assert isinstance(row, BadRow) and row.reason == "unreadable tar"


# ---- mutated inputs --------------------------------------------------------------------------------------------------


fuzz = load_benchmark("fuzz")
COUNTS = {"images": 500, "parquet": 300, "tar": 300}  # the other readers are faster, or their inputs less varied


@pytest.mark.parametrize("name", list(fuzz.READERS))
def test_mutated_inputs_are_read_or_rejected_with_a_documented_exception(name: str, tmp_path: Path) -> None:
    fuzzer = fuzz.Fuzzer(name, 1, tmp_path)
    outcomes: Counter[str] = Counter()
    for number in range(COUNTS.get(name, 200)):
        outcome, errors = fuzzer.run(number)
        assert outcome in ("read", "rejected"), f"input {number}: {errors}"
        outcomes[outcome] += 1
    assert outcomes["read"] >= 10 and outcomes["rejected"] >= 10


def test_fuzzer_reports_an_exception_that_is_not_documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz.READERS["jsonl"], "read", lambda *_: {}["missing"])
    outcome, [error] = fuzz.Fuzzer("jsonl", 0, tmp_path).run(0)
    assert outcome == "failed" and error.startswith("KeyError: 'missing'")
