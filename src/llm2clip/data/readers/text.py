"""Readers for text files that contain image paths: JSON Lines, JSON and captions.txt."""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from typing import Any

from llm2clip.data.columns import BadRow, RawRow
from llm2clip.data.readers.coco import drop_unused_keys, read_caption_json
from llm2clip.data.readers.encoding import describe_encoding, open_text, read_text_lines
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.texts import is_valid_unicode
from llm2clip.io_utils import DataFormatError, check_json_size

FLICKR8K_IMAGE_FOLDERS = ("images", "Images", "Flicker8k_Dataset", "Flickr8k_Dataset", "flickr30k_images")


def read_json_rows(path: str, log: SkipLog | None = None) -> Iterator[RawRow]:
    """Yield the objects in a .json, .jsonl or .jsonl.gz file; see `read_json_list` and `read_json_lines`."""
    return read_json_list(path, log) if path.endswith(".json") else read_json_lines(path, log)


def read_json_lines(path: str, log: SkipLog | None = None) -> Iterator[RawRow]:
    """Yield the objects in a .jsonl or .jsonl.gz file. A line that is not valid UTF-8 invalidates only its own row.

    UTF-16 files and files in other encodings are noted in `log`.
    """
    number = 0
    try:
        for number, line in enumerate(read_text_lines(path, log, newline="\n"), 1):
            if isinstance(line, BadRow):
                yield path, number, line
            elif line.strip():
                yield path, number, _require_object(_parse_json(line))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield path, number + 1, BadRow("truncated file", str(error))


def read_json_list(path: str, log: SkipLog | None = None) -> Iterator[RawRow]:
    """Yield the objects in a JSON file that contains a list, or the images in a file in COCO's or Karpathy's format.

    The entire file is read into memory.

    Raises:
        DataFormatError: The file is not valid JSON, is too large, or has a different format.
    """
    with open_text(path, log) as file:
        check_json_size(path, file.buffer)
        text = file.read()
    if not is_valid_unicode(text):
        raise DataFormatError(f"{path}: {describe_encoding(path)}")
    is_object = text.lstrip().startswith("{")
    try:
        rows = json.loads(text, object_hook=drop_unused_keys if is_object else None)
    except (ValueError, RecursionError) as error:
        raise DataFormatError(
            f"{path}: not JSON ({error}). If it has one object per line, rename it to .jsonl"
        ) from error
    del text
    if isinstance(rows, dict):
        yield from read_caption_json(path, rows)
        return
    if not isinstance(rows, list):
        raise DataFormatError(f"{path}: a .json source must be a list of objects (got {type(rows).__name__})")
    for number, row in enumerate(rows, 1):
        yield path, number, _require_object(row)


def parse_json(data: bytes) -> Any:
    """Parse UTF-8 encoded JSON. Return a `BadRow` if the JSON is malformed."""
    try:
        return _parse_json(data.decode("utf-8-sig"))
    except ValueError as error:
        return BadRow("malformed row", f"{error}: {data[:200].decode('utf-8', 'replace')}")


def read_captions_txt(path: str, log: SkipLog | None = None) -> Iterator[RawRow]:
    """Yield the captions in a file that has one of the two formats used for Flickr8k.

    The first format is `name.jpg,caption`, optionally with a header line. The second is `name.jpg#0<TAB>caption`.
    """
    folder, image_folder = os.path.dirname(path), None
    for number, line in enumerate(read_text_lines(path, log), 1):
        if isinstance(line, BadRow):
            yield path, number, line
            continue
        name, comma, caption = re.sub(r"#\d+\t", ",", line.strip(), count=1).partition(",")
        if not name or (number == 1 and re.fullmatch(r"image(_name)?|file_?name", name.strip().lower())):
            continue
        if not comma:
            yield path, number, BadRow("malformed row", f"neither 'name,caption' nor 'name#0<TAB>caption': {line}")
            continue
        if len(caption) > 1 and caption[0] == caption[-1] == '"':
            caption = caption[1:-1].replace('""', '"')
        if image_folder is None:
            image_folder = _find_image_folder(folder, name)
        yield path, number, {"image": os.path.join(image_folder, name.strip()), "caption": caption}


def _parse_json(text: str) -> Any:
    """Parse JSON. Return a `BadRow` if the JSON is malformed."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return BadRow("malformed row", f"{error}: {text[:200]}")


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
