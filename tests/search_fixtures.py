"""A random model, index backends and a server in a thread, for the tests of search and for others that need a model.

The pytest fixtures `model_folder` and `dual_encoder` in conftest.py are made with these.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import make_llm
from llm2clip.data.skip_log import SkipLog
from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.models.dual_encoder import DualEncoder
from llm2clip.models.llm2clip import LLM2CLIP, LLM2CLIPConfig
from llm2clip.models.vision_tower import VisionTower
from llm2clip.search.backends import Backend
from llm2clip.search.build import IndexReport, build_index
from llm2clip.search.sqlite_backend import SqliteBackend
from llm2clip.search.types import Filter

BACKENDS = ("sqlite", "qdrant")


def make_model(folder: Path) -> Path:
    """Save a random LLM2CLIP model with a caption encoder, and return its folder."""
    torch.manual_seed(0)
    tower = VisionTower.from_pretrained("test_efficientnet", image_size=32, pretrained=False)
    encoder = CaptionEncoder.from_pretrained(make_llm(folder / "llm"))
    model = LLM2CLIP(LLM2CLIPConfig(tower=tower.config, text_dim=encoder.embed_dim, embed_dim=16), tower, encoder)
    model.config.encoder = encoder.identity()
    return model.eval().save_pretrained(folder / "model")


def make_index(folder: Path, images: Path, model: DualEncoder) -> SqliteBackend:
    """Index a folder of images."""
    backend = SqliteBackend(folder, write=True)
    index_sources([images], model, backend)
    return backend


def index_sources(sources: list[Path], model: DualEncoder, backend: Backend, **options: Any) -> IndexReport:
    """Call `build_index` without a limit on invalid images."""
    log = options.pop("log", None) or SkipLog(None, 1.0)
    return build_index([str(source) for source in sources], model, backend, log, **options)


def create_backend(kind: str, folder: Path) -> Backend:
    """Create an empty index of one of BACKENDS; Qdrant runs in this process."""
    if kind == "sqlite":
        return SqliteBackend(folder, write=True)
    qdrant_backend = pytest.importorskip("llm2clip.search.qdrant_backend")
    from qdrant_client import QdrantClient

    backend: Backend = qdrant_backend.QdrantBackend(QdrantClient(path=str(folder)), "pictures")
    return backend


def search_names(backend: Backend, image_filter: Filter | None = None, count: int = 100) -> set[str]:
    """Return the file names of the images that a search with a filter returns."""
    query = np.eye(int(backend.metadata()["width"]), dtype=np.float32)[0]
    hits = backend.search(query, count, image_filter or Filter())
    return {Path(image.name).name for hit in hits for image in hit.images}


@contextmanager
def running_server(app: Any) -> Iterator[str]:
    """Serve an application in a thread, and yield its address."""
    import uvicorn

    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.should_exit = True
        thread.join()


def free_port() -> int:
    """Return a TCP port that is not in use."""
    with socket.socket() as unbound:
        unbound.bind(("127.0.0.1", 0))
        return int(unbound.getsockname()[1])
