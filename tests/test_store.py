"""The store: rows by key, shards whole or absent, other encoders refused, work resumed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from llm2clip.cache.embed import embed
from llm2clip.cache.store import EmbeddingStore, StoreError, StoreWriter
from llm2clip.models.text import CaptionEncoder

CAPTIONS = [f"caption number {i} of some" for i in range(50)]
IDENTITY = {"weights": "abc", "layers": 3}


@pytest.fixture
def encoder(llm: Path) -> CaptionEncoder:
    return CaptionEncoder.from_pretrained(llm, device="cpu")


def test_vectors_are_found_by_text_in_any_order(encoder: CaptionEncoder, tmp_path: Path) -> None:
    store = embed(CAPTIONS, encoder, tmp_path, shard_size=16)
    assert len(store.manifest["shards"]) == 4
    asked = [CAPTIONS[i] for i in (49, 3, 3, 17, 0, 32)]
    found = store.take(store.rows(asked))
    assert found.dtype == np.float32
    direct = encoder.encode(asked).numpy()
    assert np.allclose(found, direct, rtol=1e-3, atol=1e-3)  # float16
    with pytest.raises(StoreError, match="never seen"):
        store.rows(["never seen"])
    store.verify()


def test_a_repeated_caption_is_encoded_once(encoder: CaptionEncoder, tmp_path: Path) -> None:
    assert len(embed(["a", "b", "a", "a"], encoder, tmp_path)) == 2


def test_new_captions_leave_old_shards_alone(encoder: CaptionEncoder, tmp_path: Path) -> None:
    embed(CAPTIONS[:20], encoder, tmp_path, shard_size=16)
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("embeddings-*")}
    store = embed(CAPTIONS, encoder, tmp_path, shard_size=16)
    after = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("embeddings-*")}
    assert len(store) == 50 and before.items() <= after.items()


def test_killed_between_shards_it_goes_on(
    encoder: CaptionEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    write = StoreWriter.write

    def dies(self: StoreWriter, number: int, *rest: object) -> None:
        if number == 2:
            raise KeyboardInterrupt
        written.append(number)
        write(self, number, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(StoreWriter, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        embed(CAPTIONS, encoder, tmp_path, shard_size=16)
    monkeypatch.setattr(StoreWriter, "write", write)
    store = embed(CAPTIONS, encoder, tmp_path, shard_size=16)
    assert written == [0, 1]
    whole = embed(CAPTIONS, encoder, tmp_path / "whole", shard_size=16)
    assert np.array_equal(store.take(store.rows(CAPTIONS)), whole.take(whole.rows(CAPTIONS)))


def test_killed_inside_a_shard_it_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = StoreWriter(tmp_path, IDENTITY, 4)

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("llm2clip.cache.store.pq.write_table", dies)  # embeddings are down, keys are not
        writer.write(0, ["a"], [1], np.zeros((1, 4)))
    assert writer.numbers() == [] and writer.keys() == set()
    assert not list(tmp_path.glob(".*.tmp"))
    writer.write(0, ["a"], [1], np.ones((1, 4)))
    writer.finish()
    assert EmbeddingStore(tmp_path).take([0]).tolist() == [[1.0] * 4]


def test_another_encoders_store_is_refused_by_name(tmp_path: Path) -> None:
    StoreWriter(tmp_path, IDENTITY, 4)
    with pytest.raises(StoreError, match=r"layers: 3 there, 2 here"):
        StoreWriter(tmp_path, {**IDENTITY, "layers": 2}, 4)


def test_damage_is_found(encoder: CaptionEncoder, tmp_path: Path) -> None:
    store = embed(CAPTIONS, encoder, tmp_path, shard_size=16)
    shard = tmp_path / "embeddings-00001.npy"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(StoreError, match="embeddings-00001"):
        store.verify()
    shard.write_bytes(data[:200])
    with pytest.raises((StoreError, ValueError)):
        EmbeddingStore(tmp_path)
    shard.unlink()
    with pytest.raises(StoreError, match="shard 1 is missing"):
        EmbeddingStore(tmp_path)


def test_a_caption_that_was_encoded_twice_moves_no_other(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, IDENTITY, 1)
    writer.write(0, ["a", "b"], [1, 1], np.array([[1], [2]]))
    writer.write(1, ["b", "c"], [1, 1], np.array([[2], [3]]))
    writer.finish()
    store = EmbeddingStore(tmp_path)
    assert store.take(store.rows(["c", "b", "a"])).ravel().tolist() == [3, 2, 1]


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, IDENTITY, 2)
    with pytest.raises(StoreError, match="too big"), np.errstate(over="ignore"):
        writer.write(0, ["fine", "too big"], [1, 1], np.array([[1, 1], [1e6, 0]]))
    assert writer.numbers() == []


def test_cut_captions_are_listed(llm: Path, tmp_path: Path) -> None:
    encoder = CaptionEncoder.from_pretrained(llm, max_length=8, device="cpu")
    embed(["short", "far too long for eight"], encoder, tmp_path)
    listed = [json.loads(line) for line in (tmp_path / "truncated-00000.jsonl").read_text().splitlines()]
    assert listed == [{"caption": "far too long for eight"}]


def test_two_processes_write_what_one_writes(encoder: CaptionEncoder, llm: Path, tmp_path: Path) -> None:
    """The shards of both ranks, split statically, are those of a single process."""
    from conftest import distributed

    distributed(2, _embed_rank, str(llm), str(tmp_path / "two"))
    two, one = EmbeddingStore(tmp_path / "two"), embed(CAPTIONS, encoder, tmp_path / "one", shard_size=8)
    assert two.manifest["shards"] == one.manifest["shards"]
    assert torch.equal(torch.from_numpy(two.take(two.rows(CAPTIONS))), torch.from_numpy(one.take(one.rows(CAPTIONS))))


def _embed_rank(llm: str, folder: str) -> None:
    embed(CAPTIONS, CaptionEncoder.from_pretrained(llm, device="cpu"), folder, shard_size=8)
