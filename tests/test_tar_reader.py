"""Tar files are read like `tarfile` reads them. The reference is the reader without its fast parser for headers."""

import gzip
import io
import json
import random
import tarfile
import time
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from conftest import load_benchmark
from llm2clip.data.formats import BadRow, RawRow, ReadOptions, find_format, image_files, read_rows
from llm2clip.data.image_refs import LoadedImage, TarImage

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
    return list(read_rows(find_format(str(path)), ReadOptions(image_bytes=image_bytes)))


def read_with_tarfile(path: Path, monkeypatch: pytest.MonkeyPatch) -> list[RawRow]:
    with monkeypatch.context() as patch:
        patch.setattr(image_files, "_parse_plain_headers", lambda *_: None)
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
