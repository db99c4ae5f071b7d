"""What a caption is called, and in which order an epoch goes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np


def caption_key(caption: str) -> bytes:
    """The name of a caption in a store: the first 16 bytes of the SHA-256 of its text."""
    return hashlib.sha256(caption.encode()).digest()[:16]


def text_key(text: str) -> int:
    """A number that names a text on every process: int64."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)


def unique_captions(captions: Iterable[str]) -> list[str]:
    """The captions without repetitions, in order of first appearance."""
    return list(dict.fromkeys(captions))


def epoch_permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of `n` items in one epoch: int64 (n,), the same for the same (seed, epoch)."""
    return np.random.default_rng([seed, epoch]).permutation(n)
