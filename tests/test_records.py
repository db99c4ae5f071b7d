"""Reading of records: row contents, splits, column mappings, paths, and skipped rows."""

import gzip
import json
import os
import pickle
import re
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from format_fixtures import (
    ROWS,
    as_jsonl,
    as_tar,
    as_tars_in_braces,
    ids_and_skips,
    image_bytes,
    read_skip_log,
    write_jsonl,
    write_tar,
)
from llm2clip.data.records import EARLY_CHECK_ROWS, Record, Source, open_records
from llm2clip.data.skip_log import SkipLog, TooManySkippedError

# ---- row contents --------------------------------------------------------------------------------------------------


def test_open_records_strips_captions_and_guesses_their_column(tmp_path: Path) -> None:
    long = "word " * 5000
    rows = [
        {"captions": "  one string \n", "sentences": ["no"]},
        {"captions": [], "caption": "fallback"},
        {"sentences": ["part", "part"], "long_captions": [long]},  # as in ADE20K: the parts of the long caption
        {"sentences": ["whole"]},
        {"captions": ["x"], "long_captions": "y", "id": 7},
        {"captions": float("nan"), "text": "after NaN"},
    ]
    records = list(open_records(write_jsonl(tmp_path / "many.jsonl", rows)))
    assert [r.captions for r in records] == [("one string",), ("fallback",), (), ("whole",), ("x",), ("after NaN",)]
    assert [r.long_captions for r in records] == [(), (), (long.strip(),), (), ("y",), ()]
    assert [r.id for r in records] == ["many:1", "many:2", "many:3", "many:4", "7", "many:6"]
    assert all(r.image is None for r in records)


def test_open_records_resolves_image_paths_and_takes_ids_from_them(folder: Path) -> None:
    paths = ["../images/a.jpg", str(folder / "images/b.png"), "..\\images\\c.jpg"]  # the last one as on Windows
    (folder / "deep").mkdir()
    records = list(open_records(write_jsonl(folder / "deep/x.jsonl", [{"path": path, "text": "x"} for path in paths])))
    assert [r.id for r in records] == ["a", "b", "c"]
    names = ("a.jpg", "b.png", "c.jpg")
    assert [r.image.read() for r in records if r.image] == [(folder / "images" / name).read_bytes() for name in names]


def test_open_records_merges_csv_rows_by_id_and_split(tmp_path: Path) -> None:
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


def test_source_parse_accepts_paths_and_splits(tmp_path: Path) -> None:
    assert Source.parse("photos.csv@train+none") == Source("photos.csv", ("train", "none"))
    assert Source.parse("a@b/photos.csv") == Source("a@b/photos.csv")
    assert Source.parse("hf:org/name:config@test") == Source("hf:org/name:config", ("test",))
    (tmp_path / "x@train").mkdir()
    existing = str(tmp_path / "x@train")
    assert Source.parse(existing) == Source(existing)
    assert Source.parse(f"{existing}@val") == Source(existing, ("val",))
    assert Source.parse(str(Source("x", ("a", "b")))) == Source("x", ("a", "b"))
    assert pickle.loads(pickle.dumps(Source("x", ("a",), {"id": "k"}))) == Source("x", ("a",), {"id": "k"})
    with pytest.raises(ValueError, match="unknown field 'caption'; available fields: id, image, captions"):
        Source("x", columns={"caption": "text"})


def test_open_records_selects_splits_and_lists_them_in_errors(folder: Path) -> None:
    path = as_jsonl(folder)
    assert [r.id for r in open_records(f"{path}@train+none")] == ["a", "c"]
    log = SkipLog()
    assert [r.id for r in open_records(f"{path}@val", log)] == ["b"]
    assert log.rows_seen == 1
    write_jsonl(folder / "y.jsonl", [{"text": "x", "split": "none"}, {"text": "y", "split": "a"}])
    assert [(r.captions, r.split) for r in open_records(f"{folder / 'y.jsonl'}@none")] == [(("x",), None)]
    with pytest.raises(ValueError, match=r"@tarin: no records; rows per split: train 1, val 1, none"):
        list(open_records(f"{path}@tarin"))


def test_open_records_maps_columns_and_explains_missing_ones(tmp_path: Path) -> None:
    rows = [{"key": 1, "captions": ["en"], "captions_de": ["de"], "part": "a"}, {"key": 2, "captions": ["en"]}]
    path = str(write_jsonl(tmp_path / "x.jsonl", rows))
    mapped = Source(path, ("a",), {"captions": "captions_de", "id": "key", "split": "part"})
    assert list(open_records(mapped)) == [Record("1", None, ("de",), split="a")]
    (tmp_path / "x.csv").write_text("bild,beschreibung\na.jpg,eins\n")
    csv_path = str(tmp_path / "x.csv")
    with pytest.raises(ValueError, match=r"no column 'beschreibun' for captions \(did you mean beschreibung\?\)"):
        list(open_records(Source(csv_path, columns={"captions": "beschreibun"})))
    german = Source(csv_path, columns={"captions": "beschreibung"})
    assert [r.captions for r in open_records(german)] == [("eins",)]
    with pytest.raises(ValueError, match="no column 'captions_fr' for captions"):
        list(open_records(Source(path, columns={"captions": "captions_fr"}), SkipLog(max_skipped=1)))
    # pandas writes the index in a column without a name
    (tmp_path / "pandas.csv").write_text(",id,caption,split\n0,a,x,val\n")
    unnamed = Source(str(tmp_path / "pandas.csv"), columns={"split": "", "id": ""})
    assert list(open_records(unnamed)) == [Record("pandas:2", None, ("x",))]


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl", "x.parquet", "header.csv"])
def test_open_records_explains_a_missing_caption_column(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.csv").write_text("words,n\nx,1\n")
    write_jsonl(tmp_path / "x.jsonl", [{"words": "x", "n": 1}])
    pq.write_table(pa.table({"words": ["x"], "n": [1]}), tmp_path / "x.parquet")
    (tmp_path / "header.csv").write_text("a.jpg,a dog\nb.jpg,a cat\n")
    message = r"no caption column; the file has the columns words, n\. Select a column with --columns"
    if name == "header.csv":
        message = r"columns a\.jpg, a dog\. The first line of the file must contain the column"
    with pytest.raises(ValueError, match=message):
        list(open_records(tmp_path / name))


def test_image_folder_reads_txt_and_json_files_and_names_unsupported_formats(tmp_path: Path) -> None:
    for name in ("IMG_0.JPG", "IMG_1.jpg", "IMG_2.jpg", "IMG_3.jpg"):
        (tmp_path / name).write_bytes(image_bytes(0))
    (tmp_path / "IMG_0.TXT").write_text("first\n\n second \n")
    (tmp_path / "IMG_1.Json").write_text('{"caption": "an object"}')
    (tmp_path / "IMG_2.json").write_text('["a list"]')
    (tmp_path / "IMG_3.json").write_text('"a string"')
    (tmp_path / "IMG_3.CR2").write_bytes(b"raw data of an image that is also a JPEG file")
    (tmp_path / "IMG_4.svg").write_bytes(b"unsupported")
    log = SkipLog(max_skipped=1.0)
    records = list(open_records(tmp_path, log))
    assert [r.texts for r in records] == [("first", "second"), ("an object",), ("a list",), ("a string",)]
    assert log.summary() == "1 of 5 rows skipped (unsupported image format: 1)"
    assert "IMG_4.svg to JPEG" in log.examples[0]


@pytest.mark.parametrize(
    ("file", "advice"),
    [
        ("photos.zip", "photos.zip: unknown format; unpack the archive"),
        ("a.jpg", "a.jpg: unknown format; this is a single image: pass the folder"),
        ("x.xlsx", "x.xlsx: unknown format; supported formats: files ending in .jsonl"),
        ("camera/a.NEF", "(files: 1 .nef); convert the images to JPEG"),
        ("empty/.hidden", "empty: the folder contains no images, tar files, Parquet files"),
    ],
)
def test_open_records_explains_unsupported_files(tmp_path: Path, file: str, advice: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    with pytest.raises(ValueError, match=re.escape(advice)):
        open_records(tmp_path / file.split("/")[0])


@pytest.mark.parametrize("require_captions", [True, False])
def test_outputs_of_llm2clip_in_a_folder_are_not_read(folder: Path, require_captions: bool) -> None:
    for name in ("runs/a/config.yaml", "runs/a/skipped.jsonl", "store/manifest.json", "store/keys-00000.parquet"):
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "images" / name).touch()
    (folder / "images/runs/a/figure.png").write_bytes(image_bytes(1))
    (folder / "images/a.txt").write_text("a dog")
    log = SkipLog(max_skipped=1.0)
    records = list(open_records(folder / "images", log, require_captions=require_captions))
    assert not any("runs" in str(record.image) for record in records)
    assert log.rows_seen == 3
    assert f"{folder}/images/runs/a: not read, because it is a run directory written by llm2clip" in log.summary()
    assert f"{folder}/images/store: not read, because it is an embedding store written by llm2clip" in log.summary()


def test_images_that_a_caption_file_lists_are_counted_once(folder: Path) -> None:
    rows = [{"image": name, "caption": "x"} for name in ("a.jpg", "b.png", "empty.jpg")]
    write_jsonl(folder / "images/captions.jsonl", rows)
    (folder / "images/empty.jpg").touch()
    log = SkipLog(max_skipped=1.0)
    records = list(open_records(folder / "images", log, require_captions=False))
    assert sorted({Path(str(record.image)).name for record in records}) == ["a.jpg", "b.png", "c.jpg"]
    assert log.summary() == "1 of 4 rows skipped (unreadable image: 1)"


def test_open_records_rejects_wrong_paths_immediately(folder: Path) -> None:
    as_jsonl(folder)
    with pytest.raises(FileNotFoundError, match=r"x\.json1: no such file or folder; did you mean .*x\.jsonl\?"):
        open_records(folder / "x.json1")
    with pytest.raises(FileNotFoundError, match=r"imagse/deep: no such file or folder; did you mean .*images"):
        open_records(folder / "imagse/deep")
    as_tars_in_braces(folder)
    with pytest.raises(FileNotFoundError, match=r"shard-003\.tar: no such file"):
        open_records(folder / "shard-{000..003}.tar")
    with pytest.raises(ValueError, match=r"image_check must be one of header, unchecked, ignore \(got 'all'\)"):
        open_records(folder / "x.jsonl", image_check="all")  # type: ignore[arg-type]
    (folder / "shard-{9}.tar").write_bytes((folder / "shard-000.tar").read_bytes())
    assert [r.id for r in open_records(folder / "shard-{9}.tar")] == ["a"]  # taken literally, since it exists


def test_open_records_reads_rows_on_demand(folder: Path) -> None:
    write_jsonl(folder / "x.jsonl", ROWS * 10_000)
    log = SkipLog()
    records = open_records(folder / "x.jsonl", log)
    assert next(records).id == "a"
    assert log.rows_seen == 1


def test_records_module_imports_neither_torch_nor_datasets() -> None:
    code = "import sys, llm2clip.data.records; sys.exit(bool({'torch', 'datasets'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- real data -----------------------------------------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.skipif("LLM2CLIP_DATA" not in os.environ, reason="LLM2CLIP_DATA is not set")
def test_open_records_reads_all_rows_of_real_data() -> None:
    data = Path(os.environ["LLM2CLIP_DATA"])
    counts = {
        "flickr8k": 7090, "flickr8k@train": 5999, "flickr8k@none": 91, "coco_img": 1813, "ade20k_ids": 432,
        "flickr30k_text@test": 1000, "flickr30k_text": 31014, "flickr8k_text": 1000, "coco_text": 14024,
        "coco_text@karpathy_test": 5000, "ade20k_ids_text": 5702, "stanford_paragraphs_text": 4976,
    }  # fmt: skip
    for name, count in counts.items():
        log = SkipLog(max_skipped=0.0)
        records = list(open_records(f"{data / name}", log))
        assert (name, len(records), log.rows_seen) == (name, count, count)
        assert not log.dropped
        has_images = "_text" not in name
        assert all((record.image is not None) == has_images and record.texts for record in records)
    long = list(open_records(data / "ade20k_ids"))
    assert sum(bool(record.captions) for record in long) == 27  # sentences next to a long caption are its parts
    assert all(len(record.long_captions) == 1 for record in long)
    german = Source(str(data / "flickr30k_text"), columns={"captions": "captions_de"})
    assert sum(len(record.captions) for record in open_records(german)) == 5 * 31014


# ---- skipped rows ----------------------------------------------------------------------------------------------------


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
    with pytest.raises(TooManySkippedError) as caught:
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
        "300 of 3,000 rows skipped (missing image: 300); dropped values (empty caption: 3,000)"
    )
    few = write_jsonl(tmp_path / "few.jsonl", rows[:5])
    with pytest.raises(TooManySkippedError, match="1 of 5 rows skipped"):
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
    log.count_duplicate_images(np.array([7, 9], np.uint64))
    log.count_duplicate_images(np.array([9], np.uint64))
    assert log.summary() == (
        "0 of 0 rows skipped; 2 duplicate images merged with the originals; a.csv and 1 more: read as UTF-16"
    )
    for number in range(10):
        log.add_note(f"note {number}", "odd\udcff.csv")
    assert log.summary().endswith("; odd\\udcff.csv: note 3")
    log.count_rows(1)
    log.skip("a.csv", 1, "not UTF-8", "x")
    with pytest.raises(TooManySkippedError, match=r"the limit of 5.0%\n  a.csv, row 1.*\na.csv and 1 more: read as"):
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
        ("https://example.org/{n}.jpg", "image is a URL", "Download the images first"),
        ("empty.jpg", "unreadable image: {folder}/empty.jpg: not an image: the file is empty", "Fix the source"),
        ("text.jpg", "unreadable image: {folder}/text.jpg: not an image in a supported format (", "Fix the source"),
    ],
)
def test_skip_limit_explains_how_to_fix_the_images(tmp_path: Path, image: str, reason: str, advice: str) -> None:
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("no image")
    path = write_jsonl(tmp_path / "x.jsonl", [{"image": image.format(n=n), "caption": "x"} for n in range(3)])
    with pytest.raises(TooManySkippedError) as caught:
        list(open_records(path))
    message = str(caught.value)
    assert reason.format(folder=tmp_path) in message and advice in message
    assert "--max_skipped" not in message, "a higher limit does not help if all rows are skipped"
    assert "object at" not in message


def test_skip_log_counts_dropped_values_and_rows_of_several_passes_once(tmp_path: Path) -> None:
    rows = [{"captions": ["x", ""], "split": split} for split in ("train", "train", "val")] + [{"captions": 3}]
    path, log = write_jsonl(tmp_path / "x.jsonl", rows), SkipLog(tmp_path / "log.jsonl", max_skipped=1.0)
    for splits in ((), ("train",), ("val",), ("train", "val")):
        list(open_records(Source(str(path), splits), log, "unchecked"))
        assert log.summary() == "1 of 4 rows skipped (malformed row: 1); dropped values (empty caption: 3)"
    assert len(read_skip_log(tmp_path / "log.jsonl")) == 4
