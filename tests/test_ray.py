"""Embedding on a local Ray cluster of several workers: the store is the one that a single process makes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.store.encode import embed
from llm2clip.store.layout import StoreError
from llm2clip.store.lock import folder_lock
from llm2clip.store.ray_engine import embed_with_ray

ray = pytest.importorskip("ray", reason="Ray is not installed")
CAPTIONS = [f"caption number {i % 40} of some" for i in range(60)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_workers_fill_the_store_that_one_process_fills(cluster: None, llm: Path, tmp_path: Path) -> None:
    opening = partial(CaptionEncoder.from_pretrained, llm, device="cpu")
    first = embed_with_ray(CAPTIONS[:20], opening, tmp_path / "ray", workers=2, shard_size=8)
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "ray").glob("embeddings-*")}
    store = embed_with_ray(CAPTIONS, opening, tmp_path / "ray", workers=2, shard_size=8)
    assert times.items() <= {p.name: p.stat().st_mtime_ns for p in (tmp_path / "ray").glob("embeddings-*")}.items()
    embed(CAPTIONS[:20], opening(), tmp_path / "one", shard_size=8)
    one = embed(CAPTIONS, opening(), tmp_path / "one", shard_size=8)
    assert len(first) == 20 and len(store) == 40
    assert [s.sha256 for s in store.shards] == [s.sha256 for s in one.shards]
    assert np.array_equal(store.take(store.rows(CAPTIONS)), one.take(one.rows(CAPTIONS)))
    with folder_lock(tmp_path / "ray"), pytest.raises(StoreError, match="another run"):
        embed_with_ray(CAPTIONS, opening, tmp_path / "ray")
