"""Reading of records: row contents, splits, column mappings and paths."""

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from format_fixtures import ROWS, as_jsonl, as_tars_in_braces, image_bytes, write_jsonl
from llm2clip.data.records import Record, Source, open_records
from llm2clip.data.skip_log import SkipLog

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
    with pytest.raises(ValueError, match=r"@tarin: no records; its splits: train \(1 rows\), val \(1 rows\), none"):
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
    message = r"no caption column; the file has the columns words, n\. Select one with --columns"
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
    with pytest.raises(ValueError, match=r"image_check must be one of header, exists, unchecked, ignore \(got 'all'\)"):
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
