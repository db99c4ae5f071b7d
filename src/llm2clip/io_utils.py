"""Files of others, read with errors that name the place; files of our own, which appear whole or not at all.

At the bottom of the house: whatever reads a public set's files or leaves a result does it with these.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


class MissingFileError(FileNotFoundError):
    """A set, or a part of it, is not in its folder; the message names what is missing."""


class DataFormatError(ValueError):
    """A file is not what it should be; the message names the file and the place."""


def first_existing(folder: Path, *names: str) -> Path:
    """The first of these files or folders that is there; a name may be a pattern.

    Raises:
        Absent: none is.
    """
    for name in names:
        if any(c in name for c in "*?["):
            if found := sorted(folder.glob(name)):
                return found[0]
        elif (folder / name).exists():
            return folder / name
    raise MissingFileError(f"{folder} has no {' or '.join(names)}")


def read_json(file: Path) -> Any:
    """What a JSON file holds.

    Raises:
        Malformed: it is not JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataFormatError(f"{file}: not JSON ({error})") from error


def read_jsonl(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a file of JSON lines and their numbers, from 1; empty lines are passed over.

    Raises:
        Malformed: a line is not a JSON object.
    """
    for number, line in _lines(file):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataFormatError(f"{file}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise DataFormatError(f"{file}, line {number}: not an object")
        yield number, row


def read_lines(file: Path) -> list[str]:
    """The lines of a text file that are not empty; a last line without an end counts.

    Raises:
        Malformed: it is not UTF-8.
    """
    return [line for _, line in _lines(file)]


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Lines with something in them, and their numbers. A line ends where the file says so, and not at the separators
    that `str.splitlines` also takes for ends (U+2028, U+0085): they occur within captions."""
    with file.open(encoding="utf-8-sig") as stream:
        try:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield number, line.rstrip("\n")
        except UnicodeDecodeError as error:
            raise DataFormatError(f"{file}: not UTF-8 ({error})") from error


def atomic_write_text(file: Path, text: str) -> None:
    """Write a text by a rename, so that whoever looks sees the old file or the new one; its folder is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def atomic_write_jsonl(file: Path, rows: Iterable[Any]) -> None:
    """Write rows as JSON lines, as `write_whole` does."""
    atomic_write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
