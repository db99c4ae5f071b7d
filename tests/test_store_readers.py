"""Readers of store rows: memory-mapped and positional, in this process and in forked workers."""

from __future__ import annotations

import gc
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import HANG_TIMEOUT
from llm2clip.models.text.caption_encoder import CaptionEncoder
from llm2clip.store.encode import embed
from llm2clip.store.layout import StoreError
from llm2clip.store.store import EmbeddingStore, MmapReader, PreadReader, ReadMode, available_memory
from llm2clip.store.writer import StoreWriter

CAPTIONS = [f"caption number {i} of some" for i in range(50)]
IDENTITY = {"weights": "abc", "layers": 3}


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("read_mode", ["mmap", "pread"])
def test_take_returns_the_written_rows(tmp_path: Path, read_mode: ReadMode, dtype: str) -> None:
    """Repeated rows of many shards, in any order; int8 is within half a quantization step of each row."""
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(70, 12)).astype(np.float32) * 10 ** rng.uniform(-2, 1, (70, 1)).astype(np.float32)
    embeddings[3] = 0
    writer = StoreWriter(tmp_path, IDENTITY, 12, dtype)
    for number, start in enumerate(range(0, 70, 16)):
        texts = [str(i) for i in range(start, min(start + 16, 70))]
        writer.write(number, texts, [1] * len(texts), embeddings[start : start + 16])
    writer.finish()
    store = pickle.loads(pickle.dumps(EmbeddingStore(tmp_path, read_mode)))
    order = rng.integers(0, 70, 200)
    result = store.take(store.find_rows([str(i) for i in order]))
    if dtype == "int8":
        tolerance = np.abs(embeddings).max(1, keepdims=True) / 254 + 1e-6
    else:
        tolerance = np.abs(embeddings) / 1024 + 1e-7
    assert (np.abs(result - embeddings[order]) <= tolerance[order]).all()
    assert store.take([]).shape == (0, 12)
    for row in (-1, 70):
        with pytest.raises(IndexError, match="row numbers must be between 0 and 69"):
            store.take([row])


@pytest.mark.parametrize("read_mode", ["mmap", "pread"])
def test_readers_limit_and_close_open_files(
    tmp_path: Path, read_mode: ReadMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm2clip.store.store.MAX_OPEN_FILES", 2)
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


def test_pread_reader_raises_if_a_shard_is_truncated_later(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, IDENTITY, 4)
    writer.write(0, ["a", "b"], [1, 1], np.ones((2, 4)))
    writer.finish()
    store = EmbeddingStore(tmp_path, "pread")
    os.truncate(tmp_path / "embeddings-00000.npy", 140)
    with pytest.raises(StoreError, match="truncated while it was being read"):
        store.take([1])


def test_available_memory_respects_the_control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert available_memory(tmp_path / "none") > 1 << 20
    machine = 5_000_000  # the memory of the real machine changes while the test runs
    monkeypatch.setattr("llm2clip.store.store.psutil.virtual_memory", lambda: SimpleNamespace(available=machine))
    assert available_memory(tmp_path / "none") == machine
    for limit, available in (("max\n", machine), ("3000000\n", 1000000)):
        (tmp_path / "memory.max").write_text(limit)
        (tmp_path / "memory.current").write_text("2000000\n")
        assert available_memory(tmp_path) == available
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 600000\nactive_file 7\n")
    assert available_memory(tmp_path) == 1600000, "inactive page cache counts as available"
    (tmp_path / "memory.current").unlink()
    assert available_memory(tmp_path) == machine


def test_store_is_mapped_if_it_takes_less_than_half_of_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = StoreWriter(tmp_path, IDENTITY, 3)
    writer.write(0, list("abcde"), [1] * 5, np.ones((5, 3)))  # 30 bytes of embeddings
    writer.finish()
    for memory, reader in ((61, MmapReader), (60, PreadReader)):
        monkeypatch.setattr("llm2clip.store.store.available_memory", lambda memory=memory: memory)
        store = EmbeddingStore(tmp_path)
        assert type(store._reader) is reader
        assert type(pickle.loads(pickle.dumps(store))._reader) is reader
    mapped = EmbeddingStore(tmp_path, "mmap")._reader
    assert type(mapped) is MmapReader and isinstance(mapped.open_embeddings(0), np.memmap)


@pytest.mark.parametrize("read_mode", ["mmap", "pread"])
def test_store_can_be_read_in_forked_workers(encoder: CaptionEncoder, tmp_path: Path, read_mode: ReadMode) -> None:
    embed(CAPTIONS, encoder, tmp_path, shard_size=8)
    store = EmbeddingStore(tmp_path, read_mode)
    data = [store.find_rows([caption]) for caption in CAPTIONS]
    expected = [store.take(rows) for rows in data]  # starts the threads of this process
    loader = torch.utils.data.DataLoader(
        RowDataset(store, data),
        batch_size=5,
        num_workers=2,
        collate_fn=list,
        multiprocessing_context="fork",
        timeout=HANG_TIMEOUT,
    )
    assert np.array_equal([embedding for batch in loader for embedding in batch], expected)


class RowDataset(torch.utils.data.Dataset[np.ndarray]):
    def __init__(self, store: EmbeddingStore, rows: list[np.ndarray]) -> None:
        self.store, self.rows = store, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, n: int) -> np.ndarray:
        return self.store.take(self.rows[n])
