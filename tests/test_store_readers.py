"""Rows of a store are read as they were written, mapped or positionally, here and in workers."""

from __future__ import annotations

import gc
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.store.encode import embed
from llm2clip.store.layout import StoreError
from llm2clip.store.readers import LRUCache, MmapReader, PreadReader, available_memory
from llm2clip.store.store import EmbeddingStore, ReadMode
from llm2clip.store.writer import StoreWriter

CAPTIONS = [f"caption number {i} of some" for i in range(50)]
IDENTITY = {"weights": "abc", "layers": 3}


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("read_mode", ["mmap", "pread"])
def test_rows_are_read_as_they_were_written(tmp_path: Path, read_mode: ReadMode, dtype: str) -> None:
    """Any rows, repeated or not, in any order, over many shards; int8 is within half a step of each row's scale."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(70, 12)).astype(np.float32) * 10 ** rng.uniform(-2, 1, (70, 1)).astype(np.float32)
    vectors[3] = 0
    writer = StoreWriter(tmp_path, IDENTITY, 12, dtype)
    for number, start in enumerate(range(0, 70, 16)):
        texts = [str(i) for i in range(start, min(start + 16, 70))]
        writer.write(number, texts, [1] * len(texts), vectors[start : start + 16])
    writer.finish()
    store = pickle.loads(pickle.dumps(EmbeddingStore(tmp_path, read_mode)))
    asked = rng.integers(0, 70, 200)
    found = store.take(store.rows([str(i) for i in asked]))
    bound = np.abs(vectors).max(1, keepdims=True) / 254 + 1e-6 if dtype == "int8" else np.abs(vectors) / 1024 + 1e-7
    assert (np.abs(found - vectors[asked]) <= bound[asked]).all()
    assert store.take([]).shape == (0, 12)
    for wrong in (-1, 70):
        with pytest.raises(IndexError, match="must be between 0 and 69"):
            store.take([wrong])


@pytest.mark.parametrize("read_mode", ["mmap", "pread"])
def test_few_files_are_open_at_once(tmp_path: Path, read_mode: ReadMode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm2clip.store.readers.MAX_OPEN_FILES", 2)
    writer = StoreWriter(tmp_path, IDENTITY, 3, "int8")
    for number in range(9):
        writer.write(number, [str(number)], [1], np.full((1, 3), number))
    writer.finish()
    store = EmbeddingStore(tmp_path, read_mode)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        assert store.take([8, 0, 5, 1])[:, 0].tolist() == [8, 0, 5, 1]
        assert np.allclose(store.take(range(9))[:, 2], range(9), atol=1e-5)
    assert len(os.listdir("/proc/self/fd")) <= before + 4
    del store
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before, "files stay open"


def test_what_was_asked_for_last_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm2clip.store.readers.MAX_OPEN_FILES", 2)
    closed: list[int] = []
    recent = LRUCache(lambda n: n, closed.append)
    for n in (1, 2, 1, 3):
        assert recent[n] == n
    assert closed == [2] and set(recent.items) == {1, 3}


def test_a_shard_that_was_cut_while_it_is_read_is_told(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, IDENTITY, 4)
    writer.write(0, ["a", "b"], [1, 1], np.ones((2, 4)))
    writer.finish()
    store = EmbeddingStore(tmp_path, "pread")
    os.truncate(tmp_path / "embeddings-00000.npy", 140)
    with pytest.raises(StoreError, match="truncated while it was being read"):
        store.take([1])


def test_what_a_control_group_leaves_is_what_there_is(tmp_path: Path) -> None:
    free = available_memory(tmp_path / "none")
    assert free > 1 << 20
    for limit, spare in (("max\n", free), ("3000000\n", 1000000)):
        (tmp_path / "memory.max").write_text(limit)
        (tmp_path / "memory.current").write_text("2000000\n")
        assert available_memory(tmp_path) == pytest.approx(spare, rel=0.3)
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 600000\nactive_file 7\n")
    assert available_memory(tmp_path) == 1600000, "pages of files that were read are given back"
    (tmp_path / "memory.current").unlink()
    assert available_memory(tmp_path) > 2000000


def test_a_store_is_mapped_where_twice_its_size_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = StoreWriter(tmp_path, IDENTITY, 3)
    writer.write(0, list("abcde"), [1] * 5, np.ones((5, 3)))  # 30 bytes of vectors
    writer.finish()
    for free, kind in ((61, MmapReader), (60, PreadReader)):
        monkeypatch.setattr("llm2clip.store.store.available_memory", lambda free=free: free)
        store = EmbeddingStore(tmp_path)
        assert type(store._reader) is kind
        assert type(pickle.loads(pickle.dumps(store))._reader) is kind
    assert type(EmbeddingStore(tmp_path, "mmap")._reader) is MmapReader
    assert isinstance(EmbeddingStore(tmp_path, "mmap")._reader.maps[0], np.memmap), "it is not read into memory"


@pytest.mark.parametrize("read_mode", ["mmap", "pread"])
def test_a_store_that_was_read_is_read_in_forked_workers(
    encoder: CaptionEncoder, tmp_path: Path, read_mode: ReadMode
) -> None:
    embed(CAPTIONS, encoder, tmp_path, shard_size=8)
    store = EmbeddingStore(tmp_path, read_mode)
    data = [store.rows([c]) for c in CAPTIONS]
    expected = [store.take(rows) for rows in data]  # its threads are up now
    loader = torch.utils.data.DataLoader(
        _Taken(store, data), batch_size=5, num_workers=2, collate_fn=list, multiprocessing_context="fork", timeout=30
    )
    assert np.array_equal([x for batch in loader for x in batch], expected)


class _Taken(torch.utils.data.Dataset[np.ndarray]):
    def __init__(self, store: EmbeddingStore, rows: list[np.ndarray]) -> None:
        self.store, self.rows = store, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, n: int) -> np.ndarray:
        return self.store.take(self.rows[n])
