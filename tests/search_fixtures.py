"""A random model, index backends and a server in a thread, for the tests of search and for others that need a model.

The pytest fixtures `model_folder` and `dual_encoder` in conftest.py are made with these.
"""

import dataclasses
import hashlib
import multiprocessing.process
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from conftest import HANG_TIMEOUT, make_llm
from llm2clip.data.skip_log import SkipLog
from llm2clip.models.dual_encoder import DualEncoder
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.model_folder import LLM2CLIPConfig
from llm2clip.models.text.caption_encoder import CaptionEncoder
from llm2clip.models.vision.dense import DenseEncoder
from llm2clip.models.vision.vision_tower import VisionTower
from llm2clip.search.backends import IndexBackend, open_backend
from llm2clip.search.build import IndexOptions, IndexReport, build_index
from llm2clip.search.metadata import Filter
from llm2clip.search.relevance import Calibration, RelevanceScale
from llm2clip.search.sqlite_backend import SqliteBackend
from postgres_fixtures import get_postgres_server

BACKENDS = ("sqlite", "postgres")


def make_model(folder: Path) -> Path:
    """Save a random LLM2CLIP model with a caption encoder, and return its folder."""
    torch.manual_seed(0)
    tower = VisionTower.from_pretrained("test_efficientnet", image_size=32, pretrained=False)
    encoder = CaptionEncoder.from_pretrained(make_llm(folder / "llm"))
    model = LLM2CLIP(LLM2CLIPConfig(tower=tower.config, text_dim=encoder.embed_dim, embed_dim=16), tower, encoder)
    model.config.encoder = encoder.identity()
    return model.eval().save_pretrained(folder / "model")


def add_red_detector(model: DualEncoder, text: str) -> DualEncoder:
    """Return the model with a dense encoder whose red cells have the embedding of `text`, and the others its negative.

    A cell has 8 x 8 pixels, and images are resized to 40 pixels.
    """
    embedding = model.encode_texts([text])[0]

    def features(pixels: Tensor, variant: str) -> Tensor:
        red, green, blue = F.avg_pool2d(pixels.float(), 8).unbind(1)  # each (N, h, w)
        is_red = (red > 150) & (green < 90) & (blue < 90)
        return torch.where(is_red[..., None], embedding, -embedding)

    dense = DenseEncoder(8, 40, ("plain",), torch.device("cpu"), "bilinear", "plain", features)
    return dataclasses.replace(model, dense=dense)


def make_index(folder: Path, images: Path, model: DualEncoder) -> SqliteBackend:
    """Index a folder of images."""
    backend = SqliteBackend(folder, write=True)
    index_sources([images], model, backend)
    return backend


def reject_all_texts(backend: IndexBackend, model: DualEncoder) -> None:
    """Store a calibration with which no image is close to any text, and every image is close to every image query."""
    vectors = np.stack(list(backend.read_vectors(backend.sample_ids(100)).values()))
    never, always = RelevanceScale(0, 1, 1, -20), RelevanceScale(0, 1, 1, 20)
    mean, scales = vectors.mean(axis=0), {"texts": never, "images": always, "captions": never}
    calibration = Calibration(mean, vectors[:1], [], len(vectors), 0, model.fingerprint, **scales)
    backend.save_calibration(calibration.to_bytes())


def index_sources(sources: list[Path], model: DualEncoder, backend: IndexBackend, **options: Any) -> IndexReport:
    """Call `build_index` without a limit on invalid images."""
    log = options.pop("log", None) or SkipLog(None, 1.0)
    return build_index([str(source) for source in sources], model, backend, log, IndexOptions(**options))


def create_backend(kind: str, folder: Path) -> IndexBackend:
    """Create an empty index of one of BACKENDS. All tests share one PostgreSQL server."""
    return open_backend(get_location(kind, folder), write=True)


def make_postgres_url(folder: Path) -> str:
    """Return the URL of an index in the tests' PostgreSQL server. Each folder has its own index."""
    schema = f"index_{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}"
    return get_postgres_server().url(schema)


def get_location(kind: str, folder: Path) -> str:
    """Return the location of an index from `create_backend` for `open_backend`."""
    return make_postgres_url(folder) if kind == "postgres" else str(folder)


def search_names(backend: IndexBackend, image_filter: Filter | None = None, count: int = 100) -> set[str]:
    """Return the file names of the images that a search with a filter returns."""
    query = np.eye(int(backend.read_metadata()["embed_dim"]), dtype=np.float32)[0]
    hits = backend.search(query, count, image_filter or Filter())
    return {Path(image.name).name for hit in hits for image in hit.images}


def create_patient_app(
    model: DualEncoder, backend: IndexBackend | None = None, access: Any = None, **limits: Any
) -> Any:
    """Create the web application with a request timeout that no test reaches, however slow the machine is."""
    from llm2clip.search.inference import ServerLimits
    from llm2clip.search.server import create_app

    return create_app(model, backend, ServerLimits(**{"timeout": HANG_TIMEOUT, **limits}), access)


@contextmanager
def running_server(app: Any, **options: Any) -> Iterator[str]:
    """Serve an application in a thread with the given options of uvicorn, and yield its address."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, log_level="error", **options))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            wait_until(lambda: server.started or not thread.is_alive())
            assert server.started, "the server failed to start"
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join()


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until a condition is true. Only a test that hangs reaches the timeout."""
    deadline = time.monotonic() + HANG_TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, f"waited for more than {HANG_TIMEOUT} seconds"
        time.sleep(0.005)


def read_until(process: multiprocessing.process.BaseProcess, output: Path, pattern: str) -> re.Match[str]:
    """Wait until the output of a process matches a pattern, and return the match."""
    matches: list[re.Match[str]] = []

    def find() -> bool:
        matches.extend(re.finditer(pattern, output.read_text() if output.exists() else ""))
        return bool(matches) or not process.is_alive()

    wait_until(find)
    assert matches, f"the process stopped before it printed {pattern!r}; it printed:\n{output.read_text()}"
    return matches[0]
