"""Encoding on a local Ray cluster with several workers."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.store import ray_engine
from llm2clip.store.encode import embed
from llm2clip.store.layout import StoreError
from llm2clip.store.lock import folder_lock
from llm2clip.store.ray_engine import embed_with_ray

ray = pytest.importorskip("ray", reason="Ray is not installed")
CAPTIONS = [f"caption number {i % 40} of some" for i in range(60)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_embed_with_ray_writes_the_store_of_embed(cluster: None, llm: Path, tmp_path: Path) -> None:
    open_encoder = partial(CaptionEncoder.from_pretrained, llm)
    first = embed_with_ray(CAPTIONS[:20], open_encoder, tmp_path / "ray", workers=2, shard_size=8)
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "ray").glob("embeddings-*")}
    store = embed_with_ray(CAPTIONS, open_encoder, tmp_path / "ray", workers=2, shard_size=8)
    assert times.items() <= {p.name: p.stat().st_mtime_ns for p in (tmp_path / "ray").glob("embeddings-*")}.items()
    embed(CAPTIONS[:20], open_encoder(device="cpu"), tmp_path / "local", shard_size=8)
    local = embed(CAPTIONS, open_encoder(device="cpu"), tmp_path / "local", shard_size=8)
    assert len(first) == 20 and len(store) == 40
    assert [shard.sha256 for shard in store.shards] == [shard.sha256 for shard in local.shards]
    assert np.array_equal(store.take(store.rows(CAPTIONS)), local.take(local.rows(CAPTIONS)))
    with folder_lock(tmp_path / "ray"), pytest.raises(StoreError, match="another run"):
        embed_with_ray(CAPTIONS, open_encoder, tmp_path / "ray")


def test_ray_driver_frees_its_encoder_before_the_workers_start(
    cluster: None, llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver loads the encoder on the CPU. A GPU is then free for a worker on the same machine."""
    encoders: list[weakref.ref[CaptionEncoder]] = []

    def open_encoder(device: str) -> CaptionEncoder:
        assert device == "cpu"
        encoder = CaptionEncoder.from_pretrained(llm, device=device)
        encoders.append(weakref.ref(encoder))
        return encoder

    def check_and_stop(*args: object, **options: object) -> None:
        assert [encoder() for encoder in encoders] == [None]
        raise StoreError("stopped here")

    monkeypatch.setattr(ray_engine, "open_for_writing", check_and_stop)
    with pytest.raises(StoreError, match="stopped here"):
        embed_with_ray(CAPTIONS, open_encoder, tmp_path / "store")
