"""Skipped rows: each is listed with file and row, and too many of them are an error."""

import gzip
import json
import os
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from format_fixtures import as_tar, ids_and_skips, image_bytes, read_skip_log, write_jsonl, write_tar
from llm2clip.data.records import EARLY_CHECK_ROWS, Source, open_records
from llm2clip.data.skip_log import SkipLog, TooManySkipped


def test_skip_log_lists_every_skipped_row_of_a_jsonl(folder: Path) -> None:
    (folder / "images/truncated.jpg").write_bytes(image_bytes(0)[:20])
    huge = bytearray(image_bytes(0, "PNG"))
    huge[16:24] = (20_000).to_bytes(4, "big") * 2  # only the size in the header is checked
    huge[29:33] = zlib.crc32(huge[12:29]).to_bytes(4, "big")
    (folder / "images/huge.png").write_bytes(huge)
    (folder / "images/dir.jpg").mkdir()
    lines = [
        b'{"image": "images/a.jpg", "captions": ["kept", " ", "also"]}',
        b'{"image": "images/none.jpg", "captions": ["x"]}',
        b'{"image": "images/truncated.jpg", "captions": ["x"]}',
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
    ids, skips = ids_and_skips(source, folder / "log.jsonl")
    assert ids == ["a", "t"]
    assert skips == [("x.jsonl", row, reason) for row, reason in [
        (1, "empty caption"), (2, "missing image"), (3, "unreadable image"), (4, "image too large"),
        (5, "image is a URL"), (6, "no caption"), (7, "empty caption"), (7, "no caption"),
        (8, "malformed row"), (9, "malformed row"), (10, "malformed row"), (11, "malformed row"),
        (12, "malformed row"), (13, "not UTF-8"), (14, "malformed row"), (15, "malformed row"),
        (18, "missing image"),
    ]]  # fmt: skip
    assert ids_and_skips(source, folder / "log.jsonl") == (ids, skips)  # a second run starts a new list
    ids, _ = ids_and_skips(source, folder / "log.jsonl", image_check="exists")
    assert ids == ["a", "truncated", "huge", "t"]
    records = list(open_records(source, SkipLog(max_skipped=1.0), image_check="ignore"))
    assert [r.id for r in records] == ["a", "none", "truncated", "huge", "a", "t", "dir"]
    names = [None if r.image is None else os.path.basename(str(r.image)) for r in records]
    assert names == ["a.jpg", "none.jpg", "truncated.jpg", "huge.png", "a.jpg", None, "dir.jpg"]


def test_skip_log_lists_csv_rows_by_line(folder: Path) -> None:
    lines = ["image,caption", "images/a.jpg,one", "images/a.jpg,too,many", "images/a.jpg,", '"images/b.png","two']
    lines += ['lines"', "images/none.jpg,x", "images/none.jpg,y", "images/c.jpg, ", 'images/a.jpg,"bad" quote']
    (folder / "x.csv").write_bytes("\n".join(lines).encode() + b"\nimages/a.jpg,\xff\n")
    log = SkipLog(folder / "log.jsonl", max_skipped=1.0)
    records = list(open_records(folder / "x.csv", log))
    assert [(r.id, r.captions) for r in records] == [("a", ("one",)), ("b", ("two\nlines",))]
    assert sorted((row, reason) for _, row, reason in read_skip_log(folder / "log.jsonl")) == [
        (3, "malformed row"), (4, "empty caption"), (7, "missing image"), (9, "empty caption"), (9, "no caption"),
        (10, "malformed row"), (11, "not UTF-8"),
    ]  # fmt: skip
    assert (log.rows_seen, log.skipped.total(), log.dropped.total()) == (9, 6, 2)  # none.jpg has two rows


def test_damaged_files_give_the_rows_before_the_damage(folder: Path) -> None:
    data = Path(as_tar(folder)).read_bytes()
    with tarfile.open(folder / "x.tar") as tar:
        third, third_json = tar.getmember("x/c.jpg"), tar.getmember("x/c.json")
    complete_samples = {  # end of the truncated tar -> samples that are complete before it
        third.offset + 100: ["a", "b"],
        third_json.offset_data + 5: ["a", "b"],
        third_json.offset_data + 512: ["a", "b", "c"],  # only the end-of-archive marker is missing
    }
    log = folder / "log.jsonl"
    for end, complete in complete_samples.items():
        (folder / "cut.tar").write_bytes(data[:end])
        ids, skips = ids_and_skips(Source(str(folder / "cut.tar")), log)
        assert (end, ids, skips) == (end, complete, [("cut.tar", len(complete) + 1, "truncated tar")])
    (folder / "cut.tar").write_bytes(data[: third.offset] + b"garbage" * 500)
    assert ids_and_skips(Source(str(folder / "cut.tar")), log)[1] == [("cut.tar", 3, "truncated tar")]
    (folder / "shard-0.tar").write_bytes(b"no tar")
    (folder / "shard-1.tar").write_bytes(data)
    ids, skips = ids_and_skips(Source(str(folder / "shard-{0,1}.tar")), log)
    assert (ids, skips) == (["a", "b", "c"], [("shard-0.tar", 1, "unreadable tar")])

    packed = gzip.compress(b"".join(b'{"text": "%d"}\n' % number**9 for number in range(500)))
    (folder / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    ids, skips = ids_and_skips(Source(str(folder / "cut.jsonl.gz")), log)
    assert len(ids) > 50
    assert skips == [("cut.jsonl.gz", len(ids) + 1, "truncated file")]

    (folder / "tables").mkdir()
    pq.write_table(pa.table({"text": ["x"]}), folder / "tables/0.parquet")
    (folder / "tables/1.parquet").write_bytes(b"PAR1 no parquet")
    assert ids_and_skips(Source(str(folder / "tables")), log) == (["0:1"], [("1.parquet", 1, "unreadable file")])


def test_bad_tar_samples_and_caption_files_are_skipped_one_by_one(folder: Path) -> None:
    image, log = image_bytes(1), folder / "log.jsonl"
    members = [
        ("a.jpg", image), ("a.txt", b"x" * (1 << 20 | 1)),
        ("b.jpg", image), ("b.json", b"{broken"),
        ("c.jpg", image), ("c.json", b"3"),
        ("d.jpg", image), ("d.txt", b"\xff\xfe"),
        ("e.jpg", image), ("f.jpg", image[:10]), ("f.txt", b"text"),
        ("g.txt", b"no image"), ("h.jpg", image), ("h.txt", b"fine"),
    ]  # fmt: skip
    ids, skips = ids_and_skips(Source(str(write_tar(folder / "x.tar", members))), log)
    assert ids == ["g", "h"]
    reasons = "caption file over 1 MB", "malformed row", "malformed row", "not UTF-8", "no caption", "unreadable image"
    assert skips == [("x.tar", row, reason) for row, reason in enumerate(reasons, 1)]
    (folder / "images/a.txt").write_bytes(b"\xff")
    (folder / "images/b.json").write_text("{broken")
    (folder / "images/c.txt").write_text("fine")
    (folder / "images/d.jpg").write_bytes(image)
    assert ids_and_skips(Source(str(folder / "images")), log) == (
        ["c"],
        [("a.jpg", 1, "not UTF-8"), ("b.png", 2, "malformed row"), ("d.jpg", 4, "no caption")],
    )


def test_open_records_stops_when_too_many_rows_are_skipped(tmp_path: Path) -> None:
    rows = [{"image": f"{n}.jpg" if n % 10 == 0 else None, "captions": ["x", ""]} for n in range(3000)]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    log = SkipLog(tmp_path / "lists/skipped.jsonl")
    with pytest.raises(TooManySkipped) as caught:
        list(open_records(path, log))
    assert log.rows_seen == 1001  # at the first skipped row after 1,000 rows
    message = str(caught.value)
    assert "101 of 1,001 rows skipped (missing image: 101)" in message
    assert "over the limit of 5.0%" in message
    assert f"{path}, row 1: missing image: {tmp_path / '0.jpg'}" in message
    assert message.count(": missing image: ") == 3
    assert str(tmp_path / "lists/skipped.jsonl") in message
    assert "--max_skipped" in message
    tolerant = SkipLog(max_skipped=0.11)
    assert len(list(open_records(path, tolerant))) == 2700
    assert tolerant.summary() == (
        "300 of 3,000 rows skipped (missing image: 300); parts of rows dropped (empty caption: 3,000)"
    )
    few = write_jsonl(tmp_path / "few.jsonl", rows[:5])
    with pytest.raises(TooManySkipped, match="1 of 5 rows skipped"):
        list(open_records(few))
    assert len(list(open_records(few, SkipLog(max_skipped=0.2)))) == 4


def test_skip_log_truncates_values_and_writes_any_file_name(tmp_path: Path) -> None:
    log = SkipLog(tmp_path / "log.jsonl")
    log.count_rows(1)
    log.skip("odd\udcff.jsonl", 3, "no caption", "长" * 500)
    entry = json.loads((tmp_path / "log.jsonl").read_text(encoding="utf-8"))
    assert entry == {"file": "odd\udcff.jsonl", "row": 3, "reason": "no caption", "value": "长" * 200}


def test_skip_log_summarizes_notes_and_copies() -> None:
    log = SkipLog()
    for file in ("a.csv", "b.csv", "a.csv"):
        log.add_note("read as UTF-16", file)
    log.count_copies(np.array([7, 9], np.uint64))
    log.count_copies(np.array([9], np.uint64))
    assert log.summary() == (
        "0 of 0 rows skipped; 2 duplicate images merged with the originals; a.csv and 1 more: read as UTF-16"
    )
    for number in range(10):
        log.add_note(f"note {number}", "odd\udcff.csv")
    assert log.summary().endswith("; odd\\udcff.csv: note 3")
    log.count_rows(1)
    log.skip("a.csv", 1, "not UTF-8", "x")
    with pytest.raises(TooManySkipped, match=r"over the limit of 5.0%\n  a.csv, row 1.*\na.csv and 1 more: read as"):
        log.check()


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl"])
def test_skip_limit_counts_all_rows_in_every_format(tmp_path: Path, name: str) -> None:
    """A .csv is read completely before its first record; its rows must be counted while reading."""
    good, bad = ("{n}.jpg,one", "a,b,c") if name == "x.csv" else ('{{"image": "{n}.jpg", "caption": "one"}}', "{")
    lines = [bad if n % 40 == 0 else good.format(n=n // 5) for n in range(6 * EARLY_CHECK_ROWS)]
    (tmp_path / name).write_text("image,caption\n" * (name == "x.csv") + "\n".join(lines))
    log = SkipLog()
    assert len(list(open_records(tmp_path / name, log, "ignore"))) > EARLY_CHECK_ROWS
    assert log.summary() == "150 of 6,000 rows skipped (malformed row: 150)"


@pytest.mark.parametrize(
    ("image", "reason", "advice"),
    [
        (
            "photos/{n}.jpg",
            "missing image: {folder}/photos/0.jpg",
            "are resolved against the folder of the caption file",
        ),
        ("https://example.org/{n}.jpg", "image is a URL", "Download them first"),
        ("empty.jpg", "unreadable image: {folder}/empty.jpg: not an image: the file is empty", "Fix the source"),
        ("text.jpg", "unreadable image: {folder}/text.jpg: not an image in a supported format (", "Fix the source"),
    ],
)
def test_skip_limit_explains_how_to_fix_the_images(tmp_path: Path, image: str, reason: str, advice: str) -> None:
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("no image")
    path = write_jsonl(tmp_path / "x.jsonl", [{"image": image.format(n=n), "caption": "x"} for n in range(3)])
    with pytest.raises(TooManySkipped) as caught:
        list(open_records(path))
    message = str(caught.value)
    assert reason.format(folder=tmp_path) in message and advice in message
    assert "--max_skipped" not in message, "a higher limit does not help if all rows are skipped"
    assert "object at" not in message


def test_skip_log_counts_dropped_parts_and_rows_of_several_passes_once(tmp_path: Path) -> None:
    rows = [{"captions": ["x", ""], "split": split} for split in ("train", "train", "val")] + [{"captions": 3}]
    path, log = write_jsonl(tmp_path / "x.jsonl", rows), SkipLog(tmp_path / "log.jsonl", max_skipped=1.0)
    for splits in ((), ("train",), ("val",), ("train", "val")):
        list(open_records(Source(str(path), splits), log, "unchecked"))
        assert log.summary() == "1 of 4 rows skipped (malformed row: 1); parts of rows dropped (empty caption: 3)"
    assert len(read_skip_log(tmp_path / "log.jsonl")) == 4
