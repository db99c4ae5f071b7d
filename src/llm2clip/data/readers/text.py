"""Readers for text files that contain image paths: JSON Lines, JSON, CSV, TSV and captions.txt."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from typing import Any

from llm2clip.data.raw_rows import BadRow, RawRow

FLICKR8K_IMAGE_FOLDERS = ("images", "Images", "Flicker8k_Dataset", "Flickr8k_Dataset", "flickr30k_images")


def read_json_rows(path: str) -> Iterator[RawRow]:
    """Yield the objects in a .json, .jsonl or .jsonl.gz file; see `read_json_list` and `read_json_lines`."""
    return read_json_list(path) if path.endswith(".json") else read_json_lines(path)


def read_json_lines(path: str) -> Iterator[RawRow]:
    """Yield the objects in a .jsonl or .jsonl.gz file. If a line is not valid UTF-8, only that row is invalid."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield path, number, _require_object(parse_json(line))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield path, number + 1, BadRow("truncated file", str(error))


def read_json_list(path: str) -> Iterator[RawRow]:
    """Yield the objects in a JSON file that contains a list. The entire file is read into memory.

    Raises:
        ValueError: The file is not valid JSON, or its content is not a list.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            rows = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}). If it has one object per line, rename it to .jsonl") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path}: a .json source must be a list of objects (got {type(rows).__name__})")
    for number, row in enumerate(rows, 1):
        yield path, number, _require_object(row)


def parse_json(data: bytes) -> Any:
    """Parse UTF-8 encoded JSON. Return a `BadRow` if the JSON is malformed."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return BadRow("malformed row", f"{error}: {data[:200].decode('utf-8', 'replace')}")


def read_csv(path: str, delimiter: str) -> Iterator[RawRow]:
    """Yield the rows in a CSV or TSV file with a header line.

    If several columns have the same name, their values become a list. A row with more or fewer fields than
    the header becomes a `BadRow`.

    Raises:
        ValueError: The header is malformed, or a quoted field is never closed.
    """
    # surrogateescape keeps bytes that are not UTF-8, so that `records` can skip the row and not the entire file.
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.reader(file, delimiter=delimiter, skipinitialspace=True, strict=True)
        try:
            header = [name.strip() for name in next(rows, [])]
        except csv.Error as error:
            raise ValueError(f"{path}: malformed CSV header ({error})") from error
        repeated = {name for name in header if header.count(name) > 1}
        while True:
            number = rows.line_num + 1
            try:
                cells = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                if "unexpected end" in str(error) or "field limit" in str(
                    error
                ):  # all following rows are part of the quoted field
                    raise ValueError(f"{path}: a quote opened in the row at line {number} is not closed") from error
                yield path, number, BadRow("malformed row", str(error))
                continue
            if len(cells) == len(header):
                fields: dict[str, Any] = dict(zip(header, cells, strict=True))
                for name in repeated:
                    fields[name] = [cell for column, cell in zip(header, cells, strict=True) if column == name]
                yield path, number, fields
            elif cells:
                problem = f"{len(cells)} fields, but the header has {len(header)}: {cells}"
                yield path, number, BadRow("malformed row", problem)


def read_captions_txt(path: str) -> Iterator[RawRow]:
    """Yield the captions in a file that has one of the two formats used for Flickr8k.

    The first format is `name.jpg,caption`, optionally with a header line. The second is `name.jpg#0<TAB>caption`.
    """
    folder, image_folder = os.path.dirname(path), None
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            name, comma, caption = re.sub(r"#\d+\t", ",", line.strip(), count=1).partition(",")
            if not name or (number == 1 and re.fullmatch(r"image(_name)?|file_?name", name.strip())):
                continue
            if not comma:
                yield path, number, BadRow("malformed row", f"neither 'name,caption' nor 'name#0<TAB>caption': {line}")
                continue
            if len(caption) > 1 and caption[0] == caption[-1] == '"':
                caption = caption[1:-1].replace('""', '"')
            if image_folder is None:
                image_folder = _find_image_folder(folder, name)
            yield path, number, {"image": os.path.join(image_folder, name.strip()), "caption": caption}


def _require_object(value: Any) -> dict[str, Any] | BadRow:
    if isinstance(value, dict | BadRow):
        return value
    return BadRow("malformed row", f"not an object: {value!r}")


def _find_image_folder(folder: str, image: str) -> str:
    """Return the subfolder that contains the images, or "" if the images are next to captions.txt."""
    for name in ("", *FLICKR8K_IMAGE_FOLDERS):
        if os.path.isfile(os.path.join(folder, name, image)):
            return name
    return ""
