"""Files of others, read with errors that name the place; files of our own, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm2clip.io_utils import (
    DataFormatError,
    MissingFileError,
    atomic_write_text,
    first_existing,
    read_json,
    read_jsonl,
    read_lines,
)


def test_a_caption_may_hold_what_python_takes_for_the_end_of_a_line(tmp_path: Path) -> None:
    caption = "one\u2028two\x85three\x0cfour"
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"caption": caption}, ensure_ascii=False) + "\n\n" + '{"caption": "last"}', "utf-8")
    assert list(read_jsonl(file)) == [(1, {"caption": caption}), (3, {"caption": "last"})]
    assert len(read_lines(file)) == 2


@pytest.mark.parametrize(("bad", "said"), [("{", "line 2: not JSON"), ("[1]", "line 2: not an object")])
def test_a_bad_line_is_named(tmp_path: Path, bad: str, said: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": 1}\n' + bad, encoding="utf-8")
    with pytest.raises(DataFormatError, match=said):
        list(read_jsonl(file))
    with pytest.raises(DataFormatError, match=r"a\.jsonl: not JSON"):
        read_json(file)
    file.write_bytes(b"\xff\xfe\xff")
    for read in (read_lines, read_json, lambda f: list(read_jsonl(f))):
        with pytest.raises(DataFormatError, match=r"a\.jsonl"):
            read(file)


def test_the_first_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "b1.txt").touch()
    assert first_existing(tmp_path, "a.txt", "b*.txt") == tmp_path / "b1.txt"
    with pytest.raises(MissingFileError, match=r"has no a.txt or c\*.txt"):
        first_existing(tmp_path, "a.txt", "c*.txt")


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "new" / "a.txt"
    atomic_write_text(file, "größer")
    assert file.read_bytes() == "größer".encode()
    with pytest.raises(UnicodeEncodeError):
        atomic_write_text(file, "half\ud800")
    assert file.read_bytes() == "größer".encode() and [p.name for p in file.parent.iterdir()] == ["a.txt"]
