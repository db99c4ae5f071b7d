"""Text files as raw rows: JSON lines, JSON, CSV, TSV and captions.txt. Their images are named, not held."""

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


def read_jsonl(path: str) -> Iterator[RawRow]:
    """An object a line, also gzipped. Lines are decoded one by one, so that one bad line costs one row."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield path, number, _object(line)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield path, number + 1, BadRow("truncated file", str(error))


def _object(line: bytes) -> dict[str, Any] | BadRow:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return BadRow("malformed row", f"{error}: {line[:200].decode('utf-8', 'replace')}")
    return value if isinstance(value, dict) else BadRow("malformed row", f"not an object: {value!r}")


def read_json(path: str) -> Iterator[RawRow]:
    """A list of objects. Read whole, as JSON must be: write large sets as .jsonl."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            rows = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); if it holds an object a line, name it .jsonl") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path}: a .json source is a list of objects, this holds one {type(rows).__name__}")
    for number, row in enumerate(rows, 1):
        yield path, number, row if isinstance(row, dict) else BadRow("malformed row", f"not an object: {row!r}")


def read_csv(path: str, delimiter: str) -> Iterator[RawRow]:
    """Rows under a header line; columns of one name are a list. A row with more or fewer fields than the header is bad,
    not guessed at."""
    # surrogateescape: bytes that are no UTF-8 stay visible to `records`, which refuses the row and not the file
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.reader(file, delimiter=delimiter, skipinitialspace=True, strict=True)
        try:
            header = [name.strip() for name in next(rows, [])]
        except csv.Error as error:
            raise ValueError(f"{path}: its header is not CSV ({error})") from error
        repeated = {name for name in header if header.count(name) > 1}
        while True:
            number = rows.line_num + 1
            try:
                cells = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                if "unexpected end" in str(error) or "field limit" in str(error):  # it has swallowed the rows after it
                    raise ValueError(f"{path}: a quote opened in the row at line {number} is not closed") from error
                yield path, number, BadRow("malformed row", str(error))
                continue
            if len(cells) == len(header):
                fields: dict[str, Any] = dict(zip(header, cells, strict=True))
                for name in repeated:
                    fields[name] = [cell for column, cell in zip(header, cells, strict=True) if column == name]
                yield path, number, fields
            elif cells:
                yield (
                    path,
                    number,
                    BadRow("malformed row", f"{len(cells)} fields, the header has {len(header)}: {cells}"),
                )


def read_captions_txt(path: str) -> Iterator[RawRow]:
    """Flickr8k's two forms: `name.jpg,caption`, with or without a header, and `name.jpg#0<TAB>caption`."""
    folder, prefix = os.path.dirname(path), None
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
            if prefix is None:  # the published archives keep the images in a folder beside this file
                places = ("", "images", "Images", "Flicker8k_Dataset", "Flickr8k_Dataset", "flickr30k_images")
                prefix = next((p for p in places if os.path.isfile(os.path.join(folder, p, name))), "")
            yield path, number, {"image": os.path.join(prefix, name.strip()), "caption": caption}
