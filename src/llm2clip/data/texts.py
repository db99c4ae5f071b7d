"""Parsing, validation, hashing and deduplication of texts."""

import ast
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from llm2clip.data.skip_log import SkipLog, UnusableRow

# Letters of scripts that do not separate words with spaces: Thai, Lao, Burmese, Khmer, Chinese and Japanese.
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
NOT_UTF8 = "not UTF-8"  # reason for skipping a row that cannot be decoded
MAX_CAPTION_CHARACTERS = 1 << 20  # maximum for all captions in a cell; encoders use only a few hundred words of each
MAX_LITERAL_CHARACTERS = 1 << 16  # maximum length of a Python list literal that is parsed
# Python's parser takes quadratic time for some expressions, such as f-strings, so it is given only list literals that
# match this pattern.
_PYTHON_LIST = re.compile(
    r"""\s*\[(?:[\s,]|None|[uU]?(?:'[^'\\]*+(?:\\.[^'\\]*+)*+'|"[^"\\]*+(?:\\.[^"\\]*+)*+"))*+\]\s*""", re.DOTALL
)


def is_valid_unicode(text: str) -> bool:
    """Return True if a text can be encoded as UTF-8, that is, if it contains no lone surrogates."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_null(value: object) -> bool:
    """Return True for missing values: None, an empty string, an empty list, or NaN (as used by pandas)."""
    kind = type(value)
    if kind is str or kind is list:
        return not value
    return value is None or (isinstance(value, float) and math.isnan(value))


def check_texts(texts: Iterable[str]) -> Iterator[str]:
    """Yield the texts. Raise TypeError or ValueError for the first one that is not a string or not valid Unicode."""
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"text {index} must be a string (got {text!r}). Remove it, or replace it with a string")
        if not is_valid_unicode(text):
            raise ValueError(
                f"text {index} is not valid Unicode: it contains a lone surrogate ({text[:200]!a}). Remove the "
                "text, or decode it again with the right encoding"
            )
        yield text


def check_not_empty(texts: Iterable[str]) -> None:
    """Raise ValueError if a text is empty or only whitespace."""
    for index, text in enumerate(texts):
        if isinstance(text, str) and not text.strip():
            raise ValueError(f"text {index} is empty. Describe what the image should show")


def make_caption_key(caption: str) -> bytes:
    """Return a caption's key in an embedding store: the first 16 bytes of the text's SHA-256 hash."""
    return hashlib.sha256(caption.encode()).digest()[:16]


def make_text_key(text: str) -> int:
    """Hash a text to a signed 64-bit integer that is the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)


def deduplicate_captions(captions: Iterable[str]) -> list[str]:
    """Remove duplicate captions, keeping the order of first appearance."""
    return list(dict.fromkeys(captions))


def to_valid_unicode(name: str) -> str:
    """Convert a file name to valid Unicode. Bytes that are not UTF-8 are replaced with escape sequences."""
    return name.encode("utf-8", "backslashreplace").decode()


# ---- cells of data sources ------------------------------------------------------------------------------------------


def parse_captions(value: Any, parse_lists: bool, log: SkipLog, file: str, row: int) -> tuple[str, ...]:
    """Return the stripped captions in a cell, which contains either a single caption or a list of captions.

    If `parse_lists` is True, strings that look like JSON or Python lists are parsed. Empty captions are dropped and
    recorded in `log` with the cell's location.

    Raises:
        UnusableRow: The value is neither a string nor a list of strings, a caption is not valid Unicode, or the total
            length of the captions exceeds `MAX_CAPTION_CHARACTERS`.
    """
    if isinstance(value, str):
        value = _parse_list(value) if parse_lists else [value]
    elif is_null(value):
        return ()
    if not isinstance(value, list):
        raise UnusableRow("malformed row", f"captions must be text or a list of texts (got {value!r})")
    num_characters = 0
    for text in value:
        if isinstance(text, str):
            num_characters += len(text)
    if num_characters > MAX_CAPTION_CHARACTERS:
        raise UnusableRow(
            "malformed row", f"the captions have {num_characters:,} characters; the limit is {MAX_CAPTION_CHARACTERS:,}"
        )
    captions = []
    for text in value:
        if not isinstance(text, str) and text is not None:
            raise UnusableRow("malformed row", f"a caption must be text (got {text!r})")
        text = (text or "").strip()
        if not text:
            log.record_dropped(file, row, "empty caption", value)
            continue
        try:
            if not text.isascii():
                text.encode()
        except UnicodeEncodeError as error:
            if "\udc80" <= text[error.start] <= "\udcff":  # a byte that could not be decoded (surrogateescape)
                raise UnusableRow(NOT_UTF8, to_valid_unicode(text)) from error
            raise UnusableRow("malformed row", f"not valid Unicode: {text!r}") from error
        captions.append(text)
    return tuple(captions)


def _parse_list(text: str) -> list[Any]:
    """Parse a JSON or Python list of strings. Any other text is returned as a list with one item."""
    if text.lstrip().startswith("["):
        parsers: list[Callable[[str], Any]] = [json.loads]
        if len(text) <= MAX_LITERAL_CHARACTERS and _PYTHON_LIST.fullmatch(text):
            parsers.append(ast.literal_eval)
        for parse in parsers:
            try:
                value = parse(text.strip())
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            if isinstance(value, list) and all(isinstance(item, str | None) for item in value):
                return value
    return [text]
