"""Encoding on a local Ray cluster with several workers."""

import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from conftest import HANG_TIMEOUT
from llm2clip.models.text.caption_encoder import CaptionEncoder
from llm2clip.runs.output_folder import FolderInUseError, hold_folder_lock
from llm2clip.store import encode
from llm2clip.store.encode import embed, embed_with_ray
from llm2clip.store.layout import StoreError

ray = pytest.importorskip("ray", reason="Ray is not installed")
CAPTIONS = [f"caption number {i % 40} of some" for i in range(60)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Start Ray on this machine as the command does. Yield the home folder."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            patch.delenv(name)
        patch.setenv("HOME", str(home))
        patch.setenv("RAY_OVERRIDE_RESOURCES", '{"CPU": 4}')
        patch.setenv("RAY_AUTH_TOKEN", "")  # restored afterwards, with the token that `_start_ray` sets
        encode._start_ray()
        yield home
        ray.shutdown()


def test_embed_with_ray_writes_the_store_of_embed(cluster: Path, llm: Path, tmp_path: Path) -> None:
    """A store that was begun without Ray is continued, and no shard is encoded again."""
    open_encoder = partial(CaptionEncoder.from_pretrained, llm)
    for name in ("ray", "local"):
        embed(CAPTIONS[:20], open_encoder(device="cpu"), tmp_path / name, shard_size=8)
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "ray").glob("embeddings-*")}
    store = embed_with_ray(CAPTIONS, open_encoder, tmp_path / "ray", workers=2, shard_size=8)
    assert times.items() <= {p.name: p.stat().st_mtime_ns for p in (tmp_path / "ray").glob("embeddings-*")}.items()
    local = embed(CAPTIONS, open_encoder(device="cpu"), tmp_path / "local", shard_size=8)
    assert len(store) == 40
    assert [shard.sha256 for shard in store.shards] == [shard.sha256 for shard in local.shards]
    assert np.array_equal(store.take(store.find_rows(CAPTIONS)), local.take(local.find_rows(CAPTIONS)))
    with hold_folder_lock(tmp_path / "ray"), pytest.raises(FolderInUseError, match="another run"):
        embed_with_ray(CAPTIONS, open_encoder, tmp_path / "ray")


def test_ray_driver_frees_its_encoder_before_the_workers_start(
    cluster: Path, llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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

    monkeypatch.setattr(encode, "open_store_for_writing", check_and_stop)
    with pytest.raises(StoreError, match="stopped here"):
        embed_with_ray(CAPTIONS, open_encoder, tmp_path / "store")


def test_a_worker_that_always_dies_is_not_restarted_without_limit(
    cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker does not import llm2clip, so that it starts quickly."""

    class DyingWorker:
        def __init__(self, *_: object) -> None: ...

        def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            (tmp_path / f"{os.getpid()}").touch()
            os._exit(1)

    monkeypatch.setattr(encode, "MAX_RETRIES", 1)
    monkeypatch.setattr(encode, "ShardWorker", DyingWorker)
    plan: Any = SimpleNamespace(shards=[0])
    with pytest.raises(ChildProcessError, match=r"A Ray worker died 2 times(.|\n)*Run the same command again"):
        encode._run_ray_workers(plan, None, workers=1, precision="fp32")
    assert len(list(tmp_path.iterdir())) == 2


CONNECT = """
import os, sys
os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 64)
from ray._raylet import GcsClient
GcsClient(sys.argv[1])  # every driver connects to this server first
print("connected")
"""


def test_ray_on_this_machine_refuses_drivers_that_do_not_have_its_token(cluster: Path) -> None:
    """Ray listens on all network interfaces, so the address alone must not be enough."""
    command = [sys.executable, "-c", CONNECT, ray.get_runtime_context().gcs_address]
    result = subprocess.run(command, capture_output=True, text=True, timeout=HANG_TIMEOUT, check=False)
    assert not result.stdout and "AuthenticationError" in result.stderr
    assert not (cluster / ".ray").exists()  # the token is in no file


def test_ray_does_not_start_without_authentication(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray was started"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(ValueError, match=r"Unset RAY_AUTH_MODE \(currently 'disabled'\)"):
        encode._start_ray()
