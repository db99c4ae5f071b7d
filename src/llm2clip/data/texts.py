"""Validation, hashing and deduplication of texts."""

import hashlib
import re
from collections.abc import Iterable, Iterator

# Letters of scripts that do not separate words with spaces: Thai, Lao, Burmese, Khmer, Chinese and Japanese.
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
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


def check_texts(texts: Iterable[str]) -> Iterator[str]:
    """Yield the texts. Check that each text is a string and valid Unicode.

    Raises:
        TypeError: An item is not a string. The message contains the item's index.
        ValueError: A text contains a lone surrogate. The message contains the text's index.
    """
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
    """Raise ValueError if a text is empty or only whitespace. The message contains the index of the first such text."""
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
