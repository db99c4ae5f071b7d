"""Names of captions and orders of epochs."""

from __future__ import annotations

from llm2clip.data.hashing import caption_key, epoch_permutation, unique_captions


def test_keys_and_orders() -> None:
    assert caption_key("a") == caption_key("a") != caption_key("A")
    assert caption_key("a").hex() == "ca978112ca1bbdcafac231b39a23dc4d", "the key of every store on disk: SHA-256"
    assert unique_captions(["b", "a", "b"]) == ["b", "a"]
    assert sorted(epoch_permutation(9, 0, 1).tolist()) == list(range(9))
    assert (
        epoch_permutation(9, 0, 1).tolist()
        == epoch_permutation(9, 0, 1).tolist()
        != epoch_permutation(9, 0, 2).tolist()
    )
