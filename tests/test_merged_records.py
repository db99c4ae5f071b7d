"""Several sources read as one list with one record per image."""

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from format_fixtures import image_bytes, write_jsonl, write_tar
from llm2clip.data import image_hashes
from llm2clip.data.build_table import open_table
from llm2clip.data.image_refs import FileImage
from llm2clip.data.records import EARLY_CHECK_ROWS, ImageCheck, open_records
from llm2clip.data.skip_log import SkipLog


def test_tar_images_have_the_same_key_by_any_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "x.tar", [("0.jpg", image_bytes(0)), ("0.txt", b"x")])
    (tmp_path / "link.tar").symlink_to(tmp_path / "x.tar")
    monkeypatch.chdir(tmp_path)
    images = [next(open_records(path)).image for path in ("x.tar", str(tmp_path / "x.tar"), "link.tar")]
    relative, absolute, link = [image.key for image in images if image is not None]
    assert relative == absolute
    assert link.startswith(str(tmp_path / "link.tar")), "links to files are not resolved"


def test_open_table_reads_a_second_source_with_a_bad_first_row(tmp_path: Path) -> None:
    good = write_jsonl(tmp_path / "a.jsonl", [{"caption": "x"}] * (EARLY_CHECK_ROWS + 1))
    bad = write_jsonl(tmp_path / "b.jsonl", ["not a JSON object", *[{"caption": "x"}] * 50])
    log = SkipLog()
    assert len(open_table([str(good), str(bad)], {}, log, "unchecked")) == EARLY_CHECK_ROWS + 51
    assert log.skipped.total() == 1


def test_sources_without_images_name_the_columns(tmp_path: Path) -> None:
    rows = "".join(f"{n}.jpg,a dog\n" for n in range(3))
    (tmp_path / "x.csv").write_text("img_file,sentence\n" + rows)
    message = (
        r"none of the 3 records has an image.*no image column; the file has the columns img_file, sentence\. "
        "Select one with --columns image=img_file"
    )
    with pytest.raises(ValueError, match=f"(?s){message}"):
        open_table([str(tmp_path / "x.csv")], {}, SkipLog())
    assert len(open_table([str(tmp_path / "x.csv")], {}, SkipLog(), "unchecked")) == 3, "enough for `tune`"


def test_unchecked_rows_are_merged_by_image_path_or_id(tmp_path: Path) -> None:
    """The images do not exist."""
    cells = [{"image": {"bytes": None, "path": f"{n}.jpg"}, "caption": f"{n} {k}"} for n in range(4) for k in range(2)]
    pq.write_table(pa.Table.from_pylist(cells), tmp_path / "cells.parquet")
    paths = [{"image": f"{n}.jpg", "caption": f"{n} {k}"} for n in range(4) for k in range(2)]
    write_jsonl(tmp_path / "paths.jsonl", paths)
    write_jsonl(tmp_path / "ids.jsonl", [{"id": n, "caption": f"{n} {k}"} for n in range(4) for k in range(2)])
    for source in ("cells.parquet", "paths.jsonl", "ids.jsonl"):
        records = open_table([str(tmp_path / source)], {}, SkipLog(), "unchecked")
        assert [r.captions for r in records] == [(f"{n} 0", f"{n} 1") for n in range(4)]


def test_rows_without_id_and_image_are_never_merged(tmp_path: Path) -> None:
    (tmp_path / "some").mkdir()
    for n in range(2):
        write_jsonl(tmp_path / f"some/data.{n}.jsonl", [{"caption": f"{n} {k}"} for k in range(3)])
    assert len(open_table([str(tmp_path / "some/data.{0..1}.jsonl")], {}, SkipLog(), "unchecked")) == 6
    cells = [{"image": {"bytes": image_bytes(n), "path": "image.png"}, "caption": f"{n}"} for n in range(6)]
    pq.write_table(pa.Table.from_pylist(cells), tmp_path / "x.parquet")
    for image_check in ("header", "unchecked", "ignore"):
        records = open_table([str(tmp_path / "x.parquet")], {}, SkipLog(), image_check)  # type: ignore[arg-type]
        assert len(records) == 6


# ---- copies of images ----------------------------------------------------------------------------------------------


def write_copies(folder: Path) -> Path:
    """Write an image, a copy, a symbolic link and a hard link to it, and two images that are only of the same size."""
    image = image_bytes(0)
    (folder / "a.jpg").write_bytes(image)
    (folder / "copy.jpg").write_bytes(image)
    (folder / "link.jpg").symlink_to(folder / "a.jpg")
    (folder / "hard.jpg").hardlink_to(folder / "copy.jpg")
    for position in (len(image) // 2, -1):  # a different byte in the middle, and at the end
        other = bytearray(image)
        other[position] ^= 1
        (folder / f"other{position}.jpg").write_bytes(other)
    names = sorted(path.name for path in folder.iterdir())
    return write_jsonl(folder / "x.jsonl", [{"image": name, "caption": f"{name} {k}"} for name in names for k in "xy"])


@pytest.mark.parametrize("image_check", ["header", "exists", "unchecked"])
def test_copies_of_an_image_are_merged_and_counted(tmp_path: Path, image_check: ImageCheck) -> None:
    source, log = str(write_copies(tmp_path)), SkipLog()
    for _ in range(2):  # the copies are counted once
        records = open_table([source], {}, log, image_check)
        assert [record.id for record in records] == ["a", "other-1", f"other{len(image_bytes(0)) // 2}"]
    assert records[0].captions == tuple(f"{name}.jpg {k}" for name in ("a", "copy", "hard", "link") for k in "xy")
    assert log.summary() == "0 of 12 rows skipped; 3 duplicate images merged with the originals"


def test_copies_in_a_tar_file_are_merged_with_files(tmp_path: Path) -> None:
    image, other = image_bytes(0), image_bytes(1)
    members = []
    for n, data in enumerate((image, other, other)):
        members += [(f"{n}.jpg", data), (f"{n}.txt", f"{n}".encode())]
    write_tar(tmp_path / "x.tar", members)
    (tmp_path / "a.jpg").write_bytes(image)
    write_jsonl(tmp_path / "x.jsonl", [{"image": "a.jpg", "caption": "a"}])
    records = open_table([str(tmp_path / "x.jsonl"), str(tmp_path / "x.tar")], {}, SkipLog())
    assert [record.captions for record in records] == [("a", "0"), ("1", "2")]


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which the length of each later read for hashing is appended."""
    lengths: list[int] = []
    read = image_hashes._hash_range
    monkeypatch.setattr(
        image_hashes, "_hash_range", lambda path, start, length: lengths.append(length) or read(path, start, length)
    )
    return lengths


def test_links_have_the_contents_of_their_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The target is read once, and what cannot be read has no hash."""
    data = image_bytes(0)
    (tmp_path / "target.jpg").write_bytes(data)
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "folder").symlink_to(tmp_path)
    (tmp_path / "link.jpg").symlink_to("folder/target.jpg")
    (tmp_path / "broken.jpg").symlink_to("nothing.jpg")
    lengths = count_reads(monkeypatch)
    names = ("link", "target", "broken", "empty", "missing")
    expected = [hashlib.sha256(data).digest()] * 2 + [b""] * 3
    assert image_hashes.hash_contents([FileImage(str(tmp_path / f"{name}.jpg")) for name in names]) == expected
    assert lengths == [len(data)]


def test_only_images_with_equal_hashes_are_read_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images have the same size and middle, but different ends."""
    end = b"\xff\xd9" + bytes(4096)
    images = [image_bytes(0) + end, image_bytes(0) + end[:-1] + b"x", image_bytes(1) + end, image_bytes(0) + end]
    write_jsonl(tmp_path / "x.jsonl", [{"image": f"{n}.jpg", "caption": f"{n}"} for n in range(4)])
    for n, data in enumerate(images):
        (tmp_path / f"{n}.jpg").write_bytes(data)
    lengths = count_reads(monkeypatch)
    records = open_table([str(tmp_path / "x.jsonl")], {}, SkipLog())
    assert [record.captions for record in records] == [("0", "3"), ("1",), ("2",)]
    assert lengths == [len(images[0])] * 3
