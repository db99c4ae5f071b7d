"""Atomic writes, and readers for JSON and text files that report errors with the file and the line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class MissingFileError(FileNotFoundError):
    """A file or folder of a data set is missing. The message names the missing path."""


class DataFormatError(ValueError):
    """A file has the wrong format. The message names the file and the position of the error."""


# ---- atomic writes -------------------------------------------------------------------------------------------------


@contextmanager
def atomic_path(file: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `file`; on success, fsync it and rename it to `file`.

    Readers see either the old file or the complete new one. If the block raises, the temporary file is removed. The
    parent folder is created if needed.
    """
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    # Keep the suffix at the end: np.save, for example, appends .npy to a path without this suffix.
    temporary = file.with_name(f".{file.stem}.{os.getpid()}.part{file.suffix}")
    temporary.unlink(missing_ok=True)  # may be left over from a killed process with the same id, and may be a hard link
    try:
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(file)
        fsync_folder(file.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_dir(folder: str | Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `folder`; on success, rename it to `folder`, which must not exist.

    If the block raises, the temporary folder is removed.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                with path.open("rb") as stream:
                    os.fsync(stream.fileno())
        temporary.replace(folder)
        fsync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def atomic_write_text(file: str | Path, text: str) -> None:
    """Write a text file atomically, see `atomic_path`."""
    with atomic_path(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def atomic_write_jsonl(file: str | Path, rows: Iterable[Any]) -> None:
    """Write rows as JSON lines atomically, see `atomic_path`."""
    atomic_write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def fsync_folder(folder: Path) -> None:
    """Flush a folder to disk, so that a rename inside it survives a power cut."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows cannot open folders
        return
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems do not support fsync on folders
        pass
    finally:
        os.close(descriptor)


# ---- readers -------------------------------------------------------------------------------------------------------


def first_existing(folder: Path, *names: str) -> Path:
    """Return the first of the named files or folders that exists in `folder`. Names may be glob patterns.

    Raises:
        MissingFileError: none of the names exists.
    """
    for name in names:
        if any(c in name for c in "*?["):
            matches = sorted(folder.glob(name))
            if matches:
                return matches[0]
        elif (folder / name).exists():
            return folder / name
    raise MissingFileError(f"{folder} has no {' or '.join(names)}")


def read_json(file: Path) -> Any:
    """Read a JSON file.

    Raises:
        DataFormatError: the file is not valid JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataFormatError(f"{file}: not JSON ({error})") from error


def read_jsonl(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) for each line of a JSONL file. Line numbers start at 1, and empty lines are skipped.

    Raises:
        DataFormatError: a line is not a JSON object.
    """
    for number, line in _numbered_lines(file):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataFormatError(f"{file}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise DataFormatError(f"{file}, line {number}: not a JSON object")
        yield number, row


def read_lines(file: Path) -> list[str]:
    """Return the non-empty lines of a UTF-8 text file.

    Raises:
        DataFormatError: the file is not valid UTF-8.
    """
    return [line for _, line in _numbered_lines(file)]


def _numbered_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number, line) for each non-empty line. Line numbers start at 1.

    Lines are split only at newlines, unlike in `str.splitlines`, which also splits at U+2028 and U+0085. Captions can
    contain these characters.
    """
    with file.open(encoding="utf-8-sig") as stream:
        try:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield number, line.rstrip("\n")
        except UnicodeDecodeError as error:
            raise DataFormatError(f"{file}: not UTF-8 ({error})") from error
