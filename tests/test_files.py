"""Files of others, read with errors that name the place; files of our own, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm2clip.files import Absent, Malformed, first, json_file, json_lines, text_lines, write_whole


def test_a_caption_may_hold_what_python_takes_for_the_end_of_a_line(tmp_path: Path) -> None:
    caption = "one\u2028two\x85three\x0cfour"
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"caption": caption}, ensure_ascii=False) + "\n\n" + '{"caption": "last"}', "utf-8")
    assert list(json_lines(file)) == [(1, {"caption": caption}), (3, {"caption": "last"})]
    assert len(text_lines(file)) == 2


@pytest.mark.parametrize(("bad", "said"), [("{", "line 2: not JSON"), ("[1]", "line 2: not an object")])
def test_a_bad_line_is_named(tmp_path: Path, bad: str, said: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": 1}\n' + bad, encoding="utf-8")
    with pytest.raises(Malformed, match=said):
        list(json_lines(file))
    with pytest.raises(Malformed, match=r"a\.jsonl: not JSON"):
        json_file(file)
    file.write_bytes(b"\xff\xfe\xff")
    for read in (text_lines, json_file, lambda f: list(json_lines(f))):
        with pytest.raises(Malformed, match=r"a\.jsonl"):
            read(file)


def test_the_first_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "b1.txt").touch()
    assert first(tmp_path, "a.txt", "b*.txt") == tmp_path / "b1.txt"
    with pytest.raises(Absent, match=r"has no a.txt or c\*.txt"):
        first(tmp_path, "a.txt", "c*.txt")


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "new" / "a.txt"
    write_whole(file, "größer")
    assert file.read_bytes() == "größer".encode()
    with pytest.raises(UnicodeEncodeError):
        write_whole(file, "half\ud800")
    assert file.read_bytes() == "größer".encode() and [p.name for p in file.parent.iterdir()] == ["a.txt"]
