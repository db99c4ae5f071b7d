"""Case-insensitive in-memory substring search over an index's captions.

SQLite's trigram index (FTS5) is not used: it cannot search for fewer than three characters, and common texts would
still return millions of rows. A NumPy scan of all bytes takes 45 to 110 ms for a million captions (see
benchmarks/search.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

BLOCK = 4096  # approximate number of captions per block, small enough for a block's text to fit in the CPU cache
SEPARATOR = b"\xff"  # never occurs in UTF-8, so no match spans two captions
SPARSE_BYTES, DENSE_BYTES = 4, 8  # number of bytes to compare at every position: 4, or 8 if many candidates remain


@dataclass(frozen=True)
class CaptionBlock:
    """A block of N captions. Its arrays must not be modified, because searches may be using them.

    Args:
        text: UTF-8 bytes of the casefolded captions, each followed by a separator, uint8.
        starts: Start position of each caption in `text`, int64 of shape (N,).
        rows: Row number of each caption in the image table, int64 of shape (N,).
        contents: Content id of each caption's image, int64 of shape (N,).
    """

    text: np.ndarray
    starts: np.ndarray
    rows: np.ndarray
    contents: np.ndarray

    @classmethod
    def from_captions(cls, captions: list[bytes], rows: list[int], contents: list[int]) -> CaptionBlock:
        lengths = [0, *(len(caption) + 1 for caption in captions[:-1])]
        text = np.frombuffer(b"".join(caption + SEPARATOR for caption in captions), np.uint8)
        return cls(text, np.cumsum(lengths, dtype=np.int64), np.array(rows, np.int64), np.array(contents, np.int64))

    def select(self, keep: np.ndarray) -> CaptionBlock:
        """Return a block with only the captions selected by a boolean mask of shape (N,)."""
        lengths = np.diff(self.starts, append=len(self.text))
        starts = np.cumsum(lengths[keep]) - lengths[keep]
        return CaptionBlock(self.text[np.repeat(keep, lengths)], starts, self.rows[keep], self.contents[keep])

    def contains(self, text: bytes) -> np.ndarray:
        """Return a boolean mask of shape (N,) that selects the captions containing the given casefolded text."""
        count = len(self.starts)
        length = len(self.text) - len(text) + 1  # number of positions at which the text can start
        if not text or length <= 0:
            return np.full(count, not text)
        matches = np.zeros(len(self.text), bool)
        matches[:length] = self.text[:length] == text[0]
        compared = min(SPARSE_BYTES, len(text))
        for offset in range(1, compared):
            matches[:length] &= self.text[offset : offset + length] == text[offset]
        # With many remaining positions, comparing more bytes at all positions is faster than checking each position.
        if np.count_nonzero(matches) > (count // 2 if len(text) <= DENSE_BYTES else 2 * count):
            for offset in range(compared, min(DENSE_BYTES, len(text))):
                matches[:length] &= self.text[offset : offset + length] == text[offset]
            compared = min(DENSE_BYTES, len(text))
        if compared < len(text):
            positions = np.flatnonzero(matches)
            for offset, window, value in _iterate_windows(self.text, text):
                positions = positions[window[positions + offset] == value]
            matches[:] = False
            matches[positions] = True
        if np.count_nonzero(matches) > count // 2:
            return np.logical_or.reduceat(matches, self.starts)
        contains = np.zeros(count, bool)
        contains[np.searchsorted(self.starts, np.flatnonzero(matches), "right") - 1] = True
        return contains


def _iterate_windows(text: np.ndarray, needle: bytes) -> Iterator[tuple[int, np.ndarray, np.unsignedinteger]]:
    """Read groups of 4 or 8 bytes as integers, so that each group needs only one comparison.

    Yields:
        (offset, windows, value): an offset in the needle, the integers read at all positions of the text, and the
        integer read from the needle at this offset.
    """
    size = 8 if len(needle) >= 8 else 4
    dtype = np.dtype(f"<u{size}")
    window = np.ndarray((len(text) - size + 1,), dtype, text, strides=(1,))
    for offset in (*range(0, len(needle) - size, size), len(needle) - size):
        yield offset, window, np.frombuffer(needle, dtype, 1, offset)[0]


@dataclass(frozen=True)
class CaptionIndex:
    """An index's captions. Updates return a new object, so they do not affect searches that use the old one."""

    blocks: tuple[CaptionBlock, ...] = ()

    def with_changes(self, removed: np.ndarray, rows: Iterable[tuple[int, int, str]]) -> CaptionIndex:
        """Return a new index without the captions of removed contents and with those of new images.

        Args:
            removed: Ids of the removed contents, int64 of shape (N,).
            rows: Row number, content id and captions (a JSON list) of each new image.
        """
        blocks = []
        for block in self.blocks:
            keep = np.isin(block.contents, removed, invert=True)
            if not keep.all():
                block = block.select(keep)
            if len(block.rows):
                blocks.append(block)
        for block in _read_blocks(rows):
            if blocks and len(blocks[-1].rows) + len(block.rows) <= BLOCK:
                block = _concatenate_blocks(blocks.pop(), block)
            blocks.append(block)
        return CaptionIndex(tuple(blocks))

    def find_captions(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Find the captions that contain the given text, ignoring case.

        Returns:
            The row numbers and content ids of the K matching captions, both int64 of shape (K,).
        """
        encoded = encode_casefolded(text)
        rows, contents = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for block in self.blocks:
            contains = block.contains(encoded)
            rows.append(block.rows[contains])
            contents.append(block.contents[contains])
        return np.concatenate(rows), np.concatenate(contents)


def encode_casefolded(text: str) -> bytes:
    """Casefold text and encode it as UTF-8. Lone surrogates are encoded too, although they are invalid in UTF-8."""
    return text.casefold().encode("utf-8", "surrogatepass")


def _read_blocks(rows: Iterable[tuple[int, int, str]]) -> Iterator[CaptionBlock]:
    """Split the captions of images into blocks of about `BLOCK` captions."""
    captions: list[bytes] = []
    caption_rows: list[int] = []
    caption_contents: list[int] = []
    for row, content, texts in rows:
        for text in json.loads(texts):
            captions.append(encode_casefolded(text))
            caption_rows.append(row)
            caption_contents.append(content)
        if len(captions) >= BLOCK:
            yield CaptionBlock.from_captions(captions, caption_rows, caption_contents)
            captions, caption_rows, caption_contents = [], [], []
    if captions:
        yield CaptionBlock.from_captions(captions, caption_rows, caption_contents)


def _concatenate_blocks(first: CaptionBlock, second: CaptionBlock) -> CaptionBlock:
    return CaptionBlock(
        text=np.concatenate([first.text, second.text]),
        starts=np.concatenate([first.starts, second.starts + len(first.text)]),
        rows=np.concatenate([first.rows, second.rows]),
        contents=np.concatenate([first.contents, second.contents]),
    )
