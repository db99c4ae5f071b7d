"""A random model, and an index of generated pictures by it, for the tests of search, server and page."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from conftest import make_llm
from llm2clip.data.skip_log import SkipLog
from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.models.dual_encoder import DualEncoder
from llm2clip.models.llm2clip import LLM2CLIP, LLM2CLIPConfig
from llm2clip.models.vision_tower import VisionTower
from llm2clip.search.build import build_index
from llm2clip.search.sqlite_backend import SqliteBackend


def make_model(folder: Path) -> Path:
    """A random model with a caption encoder, in its folder."""
    torch.manual_seed(0)
    tower = VisionTower.from_pretrained("test_efficientnet", image_size=32, pretrained=False)
    encoder = CaptionEncoder.from_pretrained(make_llm(folder / "llm"))
    model = LLM2CLIP(LLM2CLIPConfig(tower=tower.config, text_dim=encoder.embed_dim, embed_dim=16), tower, encoder)
    model.config.encoder = encoder.identity()
    return model.eval().save_pretrained(folder / "model")


def make_index(folder: Path, pictures: Path, model: DualEncoder) -> SqliteBackend:
    """The index of a folder of pictures."""
    engine = SqliteBackend(folder, write=True)
    build_index([str(pictures)], model, engine, SkipLog(None, 1.0))
    return engine


@contextmanager
def running_server(app: Any) -> Iterator[str]:
    """The address of an application that a thread serves."""
    import uvicorn

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
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
