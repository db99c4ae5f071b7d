"""The parts of a file have the same rows as the whole file. The reference for JSON lines is Python's text mode."""

import gzip
import json
import os
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm2clip.data.formats import (
    BadRow,
    FilePart,
    RawRow,
    ReadOptions,
    find_format,
    load_formats,
    read_rows,
    split_file,
    text_files,
)
from llm2clip.data.image_refs import LoadedImage
from llm2clip.data.skip_log import SkipLog
from llm2clip.io_utils import DataFormatError

LINES = (
    b'{"caption": "a dog"}', '{"caption": "a cät 一只猫"}'.encode(), b'{"caption": "caf\xe9"}', b"", b"  ", b"[1]",
    b'{"caption": ', b'\xef\xbb\xbf{"caption": "mark"}', "\u2028".encode(), b'{"a": 1}\r{"a": 2}',
    b'{"caption": "x\0"}',
    b'{"caption": "' + b"long " * 300 + b'"}', b'{"caption": "\xc3',
)  # fmt: skip


def split(path: Path, target_bytes: int = 64 << 20) -> list[FilePart]:
    return split_file(find_format(str(path)), target_bytes)


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


@pytest.mark.parametrize("chunk_bytes", [1, 5, 64])
def test_newlines_are_counted_across_chunks(chunk_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "CHUNK_BYTES", chunk_bytes)
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"a": "x" * (n % 17)}) + "\n" for n in range(200)))
    rows, _ = read_parts(path, 300)
    assert [row for _, row, _ in rows] == list(range(1, 201))


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
        "x.csv.gz": gzip.compress(b"caption\n" + b"a\n" * 1000, 0),
        "utf-16.csv": ("caption\n" + "a\n" * 100).encode("utf-16"),
        "section.csv": "sep=§\na§b\n1§2\n".encode(),
        "quote.csv": b'caption\n"' + b"a\n" * 1000,
        "corrupt.parquet": b"PAR1" + bytes(1000),
        "x.tar": bytes(10240),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        part = FilePart(find_format(name.removesuffix(".gz")).format, str(tmp_path / name))
        assert split_file(part, 10) == [part]
    missing, folder = find_format(f"{tmp_path}/missing.jsonl"), FilePart(load_formats()["images"], str(tmp_path))
    assert split_file(missing, 10) == [missing] and split_file(folder, 1) == [folder]
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
