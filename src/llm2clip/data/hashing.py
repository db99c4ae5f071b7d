"""Hashing and deduplication of captions, and random permutations of the items for each epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np


def caption_key(caption: str) -> bytes:
    """Return a caption's key in an embedding store: the first 16 bytes of the text's SHA-256 hash."""
    return hashlib.sha256(caption.encode()).digest()[:16]


def text_key(text: str) -> int:
    """Hash a text to a signed 64-bit integer. The hash is the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)


def unique_captions(captions: Iterable[str]) -> list[str]:
    """Remove duplicate captions, keeping the order of first appearance."""
    return list(dict.fromkeys(captions))


def epoch_permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """Return a random permutation of `n` items, int64 (n,). It depends only on `n`, the seed and the epoch."""
    return np.random.default_rng([seed, epoch]).permutation(n)
