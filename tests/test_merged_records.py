"""Several sources read as one list with one record per image."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from format_fixtures import image_bytes, image_row, write_images_and_jsonl, write_jsonl
from llm2clip.data.merged_records import read_merged_records, stream_records
from llm2clip.data.records import EARLY_CHECK_ROWS, open_records
from llm2clip.data.skip_log import SkipLog


def test_tar_images_have_the_same_key_by_any_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for n in range(4):
            for suffix, data in (("png", image.getvalue()), ("txt", f"{n}".encode())):
                info = tarfile.TarInfo(f"{n}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    monkeypatch.chdir(tmp_path)
    relative, absolute = (next(open_records(path)).image for path in ("x.tar", str(tmp_path / "x.tar")))
    assert relative is not None
    assert absolute is not None
    assert relative.key == absolute.key
    (tmp_path / "link.tar").symlink_to(tmp_path / "x.tar")
    link = next(open_records("link.tar")).image
    assert link is not None
    assert link.key.startswith(str(tmp_path / "link.tar")), "links to files are not resolved"


def test_stream_records_reads_a_second_source_with_a_bad_first_row(tmp_path: Path) -> None:
    good = write_images_and_jsonl(tmp_path / "a.jsonl", *(image_row(n) for n in range(EARLY_CHECK_ROWS + 1)))
    other = Path(write_images_and_jsonl(tmp_path / "b.jsonl", *(image_row(n) for n in range(50))))
    other.write_text("{broken\n" + other.read_text())
    log = SkipLog()
    assert sum(1 for _ in stream_records([good, str(other)], {}, log)) == EARLY_CHECK_ROWS + 51
    assert log.skipped.total() == 1


def test_a_source_that_is_read_again_counts_once(tmp_path: Path) -> None:
    file, log = tmp_path / "a.jsonl", SkipLog()
    write_images_and_jsonl(file, *(image_row(n) for n in range(20)))
    file.write_text(file.read_text() + "{broken\n")
    for _ in range(2):
        assert len(list(stream_records([str(file)], {}, log))) == 20
    assert log.summary().startswith("1 of 21 rows")
    list(stream_records([f"{file}@none"], {}, log))
    assert log.summary().startswith("1 of 21 rows")


def test_unchecked_rows_are_merged_by_image_path_or_id(tmp_path: Path) -> None:
    """The images do not exist."""
    cells = [{"image": {"bytes": None, "path": f"{n}.jpg"}, "caption": f"{n} {k}"} for n in range(4) for k in range(2)]
    pq.write_table(pa.Table.from_pylist(cells), tmp_path / "cells.parquet")
    paths = [{"image": f"{n}.jpg", "caption": f"{n} {k}"} for n in range(4) for k in range(2)]
    write_jsonl(tmp_path / "paths.jsonl", paths)
    write_jsonl(tmp_path / "ids.jsonl", [{"id": n, "caption": f"{n} {k}"} for n in range(4) for k in range(2)])
    for source in ("cells.parquet", "paths.jsonl", "ids.jsonl"):
        records = read_merged_records([str(tmp_path / source)], {}, SkipLog(), "unchecked")
        assert [r.captions for _, r in records] == [(f"{n} 0", f"{n} 1") for n in range(4)]


def test_rows_without_id_and_image_are_never_merged(tmp_path: Path) -> None:
    (tmp_path / "some").mkdir()
    for n in range(2):
        write_jsonl(tmp_path / f"some/data.{n}.jsonl", [{"caption": f"{n} {k}"} for k in range(3)])
    assert len(read_merged_records([str(tmp_path / "some/data.{0..1}.jsonl")], {}, SkipLog(), "unchecked")) == 6
    cells = [{"image": {"bytes": image_bytes(n), "path": "image.png"}, "caption": f"{n}"} for n in range(6)]
    pq.write_table(pa.Table.from_pylist(cells), tmp_path / "x.parquet")
    for image_check in ("header", "unchecked", "ignore"):
        records = read_merged_records([str(tmp_path / "x.parquet")], {}, SkipLog(), image_check)  # type: ignore[arg-type]
        assert len(records) == 6
