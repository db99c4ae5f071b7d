"""Caption keys and the order of items in an epoch."""

from __future__ import annotations

from llm2clip.data.hashing import caption_key, epoch_permutation, unique_captions


def test_caption_key_is_the_start_of_sha256() -> None:
    assert caption_key("a") == caption_key("a") != caption_key("A")
    # Stores on disk contain these keys.
    assert caption_key("a").hex() == "ca978112ca1bbdcafac231b39a23dc4d"


def test_unique_captions_keeps_the_first_of_each() -> None:
    assert unique_captions(["b", "a", "b"]) == ["b", "a"]


def test_epoch_permutation_depends_on_the_epoch_only() -> None:
    first = epoch_permutation(9, 0, 1).tolist()
    assert sorted(first) == list(range(9))
    assert epoch_permutation(9, 0, 1).tolist() == first
    assert epoch_permutation(9, 0, 2).tolist() != first
