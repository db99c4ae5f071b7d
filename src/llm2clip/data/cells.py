"""Conversion of table cells to captions, ids, split names and image references, and image validation."""

from __future__ import annotations

import ast
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image

from llm2clip.data.columns import is_null
from llm2clip.data.image_header import MAX_PIXELS, DecodingLimitError, ImageFormatError, open_header
from llm2clip.data.image_refs import FileImage, ImageRef, LoadedImage, MemoryImage, printable
from llm2clip.data.skip_log import SkipLog
from llm2clip.io_utils import DataFormatError, describe_error

# Lower-case strings that represent a missing value in CSV cells.
MISSING_TEXTS = frozenset({"nan", "-nan", "none", "null", "n/a", "#n/a", "#na", "<na>"})

MAX_CAPTION_CHARACTERS = 1 << 20  # in all captions of a cell; encoders use only a few hundred words of each
MAX_PYTHON_LIST = 1 << 16  # characters
# Only list literals that match this pattern are passed to Python's parser, because it takes quadratic time for some
# other expressions, such as f-strings.
_PYTHON_LIST = re.compile(
    r"""\s*\[(?:[\s,]|None|[uU]?(?:'[^'\\]*+(?:\\.[^'\\]*+)*+'|"[^"\\]*+(?:\\.[^"\\]*+)*+"))*+\]\s*""", re.DOTALL
)


class UnusableRow(Exception):
    """Raised if a row cannot be converted to a record. Skipped rows are counted by `reason`."""

    def __init__(self, reason: str, value: object) -> None:
        super().__init__(reason, value)
        self.reason, self.value = reason, value


@contextmanager
def malformed_row_on_error() -> Iterator[None]:
    """Convert an unexpected exception to `UnusableRow`, so that a single bad row does not stop a run."""
    try:
        yield
    except (UnusableRow, DataFormatError):
        raise
    except Exception as error:
        raise UnusableRow("malformed row", describe_error(error)) from error


def is_missing_text(cell: object) -> bool:
    """Return True if a table cell contains a placeholder for a missing value, such as "nan" or "n/a"."""
    return isinstance(cell, str) and len(cell) < 10 and cell.strip().lower() in MISSING_TEXTS


def parse_captions(value: Any, parse_lists: bool, log: SkipLog, file: str, row: int) -> tuple[str, ...]:
    """Return the captions in a cell, stripped. A string is a single caption, and a list contains several captions.

    Args:
        parse_lists: If True, parse strings that look like a list in JSON or Python notation.
        log: Log in which to record empty captions, which are dropped.
        file, row: Location of the cell, for the log.

    Raises:
        UnusableRow: The value is neither a string nor a list of strings, a caption is not valid Unicode, or the
            captions together have more than `MAX_CAPTION_CHARACTERS` characters.
    """
    if isinstance(value, str):
        value = _parse_list(value) if parse_lists else [value]
    elif is_null(value):
        return ()
    if not isinstance(value, list):
        raise UnusableRow("malformed row", f"captions must be text or a list of texts (got {value!r})")
    num_characters = sum(len(text) for text in value if isinstance(text, str))
    if num_characters > MAX_CAPTION_CHARACTERS:
        raise UnusableRow("malformed row", f"{num_characters:,} characters; the limit is {MAX_CAPTION_CHARACTERS:,}")
    captions = []
    for text in value:
        if not isinstance(text, str) and text is not None:
            raise UnusableRow("malformed row", f"a caption must be text (got {text!r})")
        text = (text or "").strip()
        if not text:
            log.record_dropped(file, row, "empty caption", value)
            continue
        try:
            text.encode()
        except UnicodeEncodeError as error:
            if "\udc80" <= text[error.start] <= "\udcff":  # a byte that could not be decoded (surrogateescape)
                raise UnusableRow("not UTF-8", printable(text)) from error
            raise UnusableRow("malformed row", f"not valid Unicode: {text!r}") from error
        captions.append(text)
    return tuple(captions)


def parse_name(value: Any, field: str) -> str | None:
    """Return an id or a split name as a string. Return None if the value is missing.

    Raises:
        UnusableRow: The value is neither a string nor a number.
    """
    if is_null(value):
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UnusableRow("malformed row", f"{field} must be text or a number (got {value!r})")
    return str(value).strip() or None


def parse_image(value: Any, file: str, reject_urls: bool) -> LoadedImage | None:
    """Return a reference to the image in a cell. Return None if the value is missing.

    A cell can contain any of the following: a path relative to the folder of `file`, encoded bytes, a Hugging Face dict
    with the keys "bytes" and "path", or a reference created by the reader.

    Raises:
        UnusableRow: The value has an unsupported type, or the value is a URL and `reject_urls` is True.
    """
    name = None
    if isinstance(value, dict) and {"bytes", "path"} & value.keys():
        name = value.get("path")
        value = value["bytes"] if value.get("bytes") is not None else name
    if is_null(value) or value == b"":
        return None
    if isinstance(value, LoadedImage):
        return value
    if isinstance(value, ImageRef):
        return LoadedImage(value, None, str(value))
    if isinstance(value, bytes):
        return LoadedImage(MemoryImage(value, name or f"image in {file}"), value, name)
    if not isinstance(value, str):
        raise UnusableRow("malformed row", f"an image must be a path, bytes or null (got {value!r})")
    if reject_urls and re.match(r"[A-Za-z][A-Za-z0-9+.-]+://|data:", value):
        raise UnusableRow("image is a URL", value)
    path = os.path.join(os.path.dirname(file), value)
    if "\\" in value and not os.path.exists(path):  # a relative path that was written on Windows
        portable = os.path.join(os.path.dirname(file), value.replace("\\", "/"))
        path = portable if os.path.exists(portable) else path
    return LoadedImage(FileImage(path), None, path)


def check_image(image: LoadedImage, read_header: bool) -> None:
    """Check that an image file exists. If `read_header` is True, also check that its format and size are supported.

    Raises:
        UnusableRow: The image is missing, unreadable or larger than `MAX_PIXELS`.
    """
    if isinstance(image.ref, FileImage) and not os.path.isfile(image.ref.path):
        raise UnusableRow("missing image", os.path.abspath(image.ref.path))
    if not read_header:
        return
    try:
        with io.BytesIO(image.data) if image.data is not None else image.ref.open() as stream:
            width, height = open_header(stream).size
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # Pillow's own limits
        raise UnusableRow("image too large", f"{image.ref}: {error}") from error
    except Exception as error:  # malicious bytes can make Pillow's plugins raise any type of exception
        is_complete = isinstance(error, ImageFormatError | DecodingLimitError | OSError)
        reason = str(error) if is_complete else describe_error(error)
        raise UnusableRow("unreadable image", f"{image.ref}: {reason}") from error
    if width * height > MAX_PIXELS:
        raise UnusableRow("image too large", f"{image.ref}: {width} x {height}")


def _parse_list(text: str) -> list[Any]:
    """Parse a list of strings in JSON or Python notation. Any other text is returned as a list with one item."""
    if text.lstrip().startswith("["):
        parsers: list[Callable[[str], Any]] = [json.loads]
        if len(text) <= MAX_PYTHON_LIST and _PYTHON_LIST.fullmatch(text):
            parsers.append(ast.literal_eval)
        for parse in parsers:
            try:
                value = parse(text.strip())
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            if isinstance(value, list) and all(isinstance(item, str | None) for item in value):
                return value
    return [text]
