"""Immich uses a model through `serve --immich`. The client behaves as Immich's server does (its repository
immich-app/immich: server/src/repositories/machine-learning.repository.ts and server/src/config.ts)."""

import dataclasses
import json
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI, File, Form
from fastapi.responses import PlainTextResponse
from PIL import Image

from conftest import HANG_TIMEOUT
from llm2clip.cli import main
from llm2clip.models.dual_encoder import DualEncoder, open_dual_encoder
from llm2clip.models.prompts import QueryTemplates
from llm2clip.search import immich
from llm2clip.search import server as server_module
from llm2clip.search.immich import UpstreamService, add_immich_routes, choose_immich_model_name
from llm2clip.search.inference import ServerLimits
from llm2clip.search.middleware import make_connection_class
from llm2clip.search.schemas import MAX_TEXT_LENGTH
from llm2clip.search.server import create_app
from search_fixtures import running_server, wait_until
from test_server import decompression_bomb

MODEL_NAME = "ViT-B-16__openai"
CONCURRENCY = 2  # Immich's default for the jobs Smart Search and Face Detection
PING_SECONDS = 2.0
BOUNDARY = "----formdata-undici-012345678901"
TEMPLATES = QueryTemplates(("a photo of a {}", "there is {}"))
FACES = {"facial-recognition": {"detection": {"modelName": "buffalo_l", "options": {"minScore": 0.7}},
                                "recognition": {"modelName": "buffalo_l"}}}  # fmt: skip
OCR = {"ocr": {"detection": {"modelName": "PP-OCRv5_mobile", "options": {"minScore": 0.5, "maxResolution": 736}},
               "recognition": {"modelName": "PP-OCRv5_mobile", "options": {"minScore": 0.8}}}}  # fmt: skip


class ImmichServer:
    """Immich's requests to its machine-learning services, the health of each, and its vector database."""

    def __init__(self, urls: Sequence[str]) -> None:
        self.urls = urls
        self.healthy: dict[str, bool] = {}
        self.statuses: list[int] = []  # of the responses to predict
        self.embeddings: dict[Path, str] = {}

    def check(self) -> None:
        for url in self.urls:
            try:
                response = httpx.get(httpx.URL(url).join("/ping"), timeout=PING_SECONDS)
                self.healthy[url] = response.is_success
            except httpx.TransportError:
                self.healthy[url] = False

    def predict(self, entries: dict[str, Any], payload: Path | str) -> Any:
        """Try the healthy servers first. Raise OSError if all fail. Requests have no token and no time limit."""
        parts = [b'name="entries"\r\n\r\n' + json.dumps(entries, separators=(",", ":")).encode()]
        if isinstance(payload, Path):
            header = b'name="image"; filename="blob"\r\nContent-Type: application/octet-stream\r\n\r\n'
            parts.append(header + payload.read_bytes())
        else:
            parts.append(b'name="text"\r\n\r\n' + payload.encode())
        disposition = b"Content-Disposition: form-data; "
        body = b"".join(b"--%s\r\n%s%s\r\n" % (BOUNDARY.encode(), disposition, part) for part in parts)
        headers = {
            "content-type": f"multipart/form-data; boundary={BOUNDARY}",
            "accept": "*/*",
            "accept-language": "*",
            "sec-fetch-mode": "cors",
            "user-agent": "node",
            "accept-encoding": "gzip, deflate",
        }
        for url in sorted(self.urls, key=lambda url: not self.healthy.get(url)):
            target = httpx.URL(url).join("/predict")
            response = httpx.post(target, content=body + f"--{BOUNDARY}--\r\n".encode(), headers=headers, timeout=None)
            self.statuses.append(response.status_code)
            self.healthy[url] = response.is_success
            if response.is_success:
                return response.json()
        raise OSError(f"Machine learning request {entries} failed for all URLs: {response.text}")

    def encode_image(self, path: Path) -> None:
        response = self.predict({"clip": {"visual": {"modelName": MODEL_NAME}}}, path)
        assert isinstance(response["imageHeight"], int) and isinstance(response["imageWidth"], int)
        self.embeddings[path] = response["clip"]

    def encode_text(self, text: str, language: str = "en") -> str:
        entries = {"clip": {"textual": {"modelName": MODEL_NAME, "options": {"language": language}}}}
        return self.predict(entries, text)["clip"]

    def run_smart_search_job(self, paths: Sequence[Path]) -> None:
        with ThreadPoolExecutor(CONCURRENCY) as workers:
            list(workers.map(self.encode_image, paths))

    def search(self, text: str) -> list[Path]:
        """Sort the images by cosine distance, as pgvector does."""
        query = parse_vector(self.encode_text(text))
        distances = {}
        for path, embedding in self.embeddings.items():
            vector = parse_vector(embedding)
            distances[path] = 1 - query @ vector / (np.linalg.norm(query) * np.linalg.norm(vector))
        return sorted(distances, key=distances.__getitem__)


def parse_vector(text: str) -> np.ndarray:
    vector = np.array(json.loads(text), np.float32)
    assert vector.shape == (512,)  # the number of dimensions of MODEL_NAME in Immich's database
    return vector


@contextmanager
def immich_service(model: DualEncoder, upstream: str | None = None, **limits: Any) -> Iterator[ImmichServer]:
    """Serve a model as `serve --immich` does, and yield Immich."""
    add_routes = partial(add_immich_routes, upstream=None if upstream is None else UpstreamService(upstream))
    limits = {"timeout": HANG_TIMEOUT, "max_body_bytes": 1 << 20, "max_pixels": 1_000_000, **limits}
    app = create_app(model, limits=ServerLimits(**limits), add_routes=add_routes)
    connection_class = make_connection_class(app.state.service.limits)
    with running_server(app, http=connection_class, ws="none", timeout_graceful_shutdown=1) as url:
        yield ImmichServer([url])


@pytest.fixture(scope="module")
def immich_server(dual_encoder: DualEncoder) -> Iterator[ImmichServer]:
    with immich_service(dual_encoder) as server:
        yield server


@pytest.fixture
def photo(image_folder: Path) -> Path:
    return image_folder / "3.png"


# ---- embeddings -----------------------------------------------------------------------------------------------------


def test_immich_stores_the_vectors_of_the_model_and_finds_its_hits(model_folder: Path, image_folder: Path) -> None:
    model = open_dual_encoder(str(model_folder), precision="fp32")
    assert model.llm2clip is not None
    model.llm2clip.config.query_templates = TEMPLATES
    images = sorted(image_folder.glob("*.png"))
    queries = ["red", "a blue area covers the left half of a grey image"]  # only the first query is short
    with immich_service(dataclasses.replace(model, query_templates=TEMPLATES)) as immich_server:
        immich_server.check()
        immich_server.run_smart_search_job(images)
        hits = [immich_server.search(query) for query in queries]
        texts = [parse_vector(immich_server.encode_text(query)) for query in queries]
        assert list(immich_server.healthy.values()) == [True] and set(immich_server.statuses) == {200}
    image_vectors = model.llm2clip.encode_image(images).numpy()
    text_vectors = model.llm2clip.encode_query(queries).numpy()
    received = np.stack([parse_vector(immich_server.embeddings[path]) for path in images])
    for padded, expected in ((received, image_vectors), (np.stack(texts), text_vectors)):
        assert not padded[:, expected.shape[1] :].any()
        cosines = (padded[:, : expected.shape[1]] * expected).sum(axis=1) / np.linalg.norm(padded, axis=1)
        assert cosines.min() >= 0.9999
    for query_hits, scores in zip(hits, text_vectors @ image_vectors.T, strict=True):
        assert query_hits[0] == images[scores.argmax()]


def test_image_size_is_the_stored_one(immich_server: ImmichServer, tmp_path: Path) -> None:
    """Immich's service ignores the EXIF orientation too."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    response = immich_server.predict({"clip": {"visual": {"modelName": MODEL_NAME}}}, tmp_path / "a.jpg")
    assert (response["imageWidth"], response["imageHeight"]) == (30, 20)


def test_only_the_routes_of_immich_are_served(immich_server: ImmichServer) -> None:
    with httpx.Client(base_url=immich_server.urls[0]) as client:
        assert (client.get("/ping").text, client.get("/").json()) == ("pong", {"message": "Immich ML"})
        assert client.get("/ping").headers["content-type"].startswith("text/plain")
        for path in ("/health", "/metrics", "/openapi.json", "/static/page.js", "/image/1", "/docs"):
            assert client.get(path).status_code == 404
        for path in ("/search", "/embed", "/v1/embeddings", "/heatmap"):
            assert client.post(path, json={}).status_code == 404
        assert client.get("/predict").status_code == 405


@pytest.mark.parametrize(
    ("embed_dim", "name"),
    [(16, "ViT-B-16__openai"), (512, "ViT-B-16__openai"), (513, "ViT-L-14__openai"), (768, "ViT-L-14__openai"),
     (1024, "ViT-H-14__laion2b-s32b-b79k"), (1280, "ViT-gopt-16-SigLIP2-256__webli")],
)  # fmt: skip
def test_borrowed_name_has_enough_dimensions(embed_dim: int, name: str) -> None:
    assert choose_immich_model_name(embed_dim) == name


def test_models_with_too_many_dimensions_are_rejected(dual_encoder: DualEncoder) -> None:
    with pytest.raises(ValueError, match="at most 1,536 dimensions, but the model has 2,048"):
        create_app(dataclasses.replace(dual_encoder, embed_dim=2048), add_routes=add_immich_routes)


# ---- invalid and hostile requests -----------------------------------------------------------------------------------


def make_clip(kind: str, name: str = MODEL_NAME) -> str:
    return json.dumps({"clip": {kind: {"modelName": name}}})


@pytest.mark.parametrize(
    ("form", "image", "code", "message"),
    [
        ({"entries": make_clip("textual")}, None, 400, "either image or text"),
        ({"entries": make_clip("textual"), "text": ""}, None, 400, "either image or text"),
        ({"entries": make_clip("textual"), "text": " \n"}, None, 422, "the text is empty"),
        ({"entries": make_clip("textual"), "text": "a" * (MAX_TEXT_LENGTH + 1)}, None, 422, "at most 20000"),
        ({"entries": make_clip("textual")}, b"x", 422, "the type must be `visual` for an image"),
        ({"entries": make_clip("visual"), "text": "a"}, None, 422, "and `textual` for a text"),
        ({"text": "a"}, None, 422, "body.entries: Field required"),
        ({"entries": "{", "text": "a"}, None, 422, "JSON"),
        ({"entries": "[" * 500_000, "text": "a"}, None, 422, "JSON"),
        ({"entries": "[]", "text": "a"}, None, 422, "entries"),
        ({"entries": '{"clip": {"textual": {}}}', "text": "a"}, None, 422, "modelName"),
        ({"entries": json.dumps({str(n): 0 for n in range(50_000)}), "text": "a"}, None, 501, "--immich_upstream"),
        ({"entries": "{}", "text": "a"}, None, 501, "--immich_upstream"),
        ({"entries": json.dumps({**json.loads(make_clip("textual")), **OCR}), "text": "a"}, None, 422, "other tasks"),
        ({"entries": make_clip("visual")}, b"GIF89a", 422, "not an image"),
        ({"entries": make_clip("visual")}, decompression_bomb(2000), 413, "too many pixels: 2000 x 2000"),
        ({"entries": make_clip("textual", "RN50__openai"), "text": "a"}, None, 422,
         "RN50__openai is not served here. In Immich, set the CLIP model to ViT-B-16__openai"),
        ({"entries": make_clip("textual", "ViT-B-32__openai"), "text": "a"}, None, 422,  # Immich's default
         "ViT-B-32__openai is not served here. In Immich, set the CLIP model to ViT-B-16__openai"),
    ],
)  # fmt: skip
def test_invalid_requests_are_explained(
    immich_server: ImmichServer, form: dict[str, str], image: bytes | None, code: int, message: str
) -> None:
    files = {"image": ("blob", image)} if image is not None else {"ignored": ("blob", b"")}
    response = httpx.post(immich_server.urls[0] + "predict", data=form, files=files, timeout=HANG_TIMEOUT)
    assert response.status_code == code, response.text
    assert message in response.json()["error"]["message"]


def test_names_with_fewer_dimensions_are_rejected(dual_encoder: DualEncoder) -> None:
    model = dataclasses.replace(dual_encoder, embed_dim=768)
    with immich_service(model) as immich_server, pytest.raises(OSError, match="has 512 dimensions, but this model has"):
        immich_server.encode_text("a")
    assert list(immich_server.healthy.values()) == [False]


def test_large_and_malformed_bodies_are_rejected(immich_server: ImmichServer, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(1 << 20))
    with pytest.raises(OSError, match="the request body is too large"):
        immich_server.encode_image(tmp_path / "large")

    def post(body: bytes, content_type: str = f"multipart/form-data; boundary={BOUNDARY}") -> int:
        target = immich_server.urls[0] + "predict"
        return httpx.post(target, content=body, headers={"content-type": content_type}).status_code

    part = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="entries"\r\n\r\n'.encode()
    image = part.replace(b"\r\n\r\n", b'; filename="blob"\r\n\r\n')
    chunks = (image if n == 0 else bytes(1 << 16) for n in range(32))  # without Content-Length
    assert post(chunks) == 413  # type: ignore[arg-type]
    assert post(part * 5000) == 400
    assert post(part.replace(b"\r\n\r\n", b"\r\n" + b"a: b\r\n" * 50_000)) == 400
    assert post(part.replace(b"entries", b"e" * 5000)) == 400
    for content_type in (
        "application/json",
        "application/x-www-form-urlencoded",
        f"multipart/form-data; boundary={BOUNDARY}; charset=punycode",
        f"multipart/form-data; CHARSET*0=puny; charset*1=code; boundary={BOUNDARY}",
    ):
        assert post(part, content_type) == 415
    immich_server.check()
    assert list(immich_server.healthy.values()) == [True]


# ---- facial recognition and OCR -------------------------------------------------------------------------------------


def test_without_upstream_faces_and_ocr_fail_and_searches_still_work(immich_server: ImmichServer, photo: Path) -> None:
    for task in (FACES, OCR):
        with pytest.raises(OSError, match="pass --immich_upstream, or turn off facial recognition and OCR"):
            immich_server.predict(task, photo)
        assert immich_server.statuses[-1] == 501
        assert list(immich_server.healthy.values()) == [False]
        immich_server.encode_text("a")
        assert list(immich_server.healthy.values()) == [True]


@contextmanager
def real_service(answer: Any) -> Iterator[tuple[str, list[Any]]]:
    """A stand-in for Immich's machine-learning service. Yield its address, and the tasks and images it receives."""
    app, received = FastAPI(), []

    @app.post("/predict")
    def predict(
        entries: Annotated[str, Form()],
        image: Annotated[bytes | None, File()] = None,
        text: Annotated[str | None, Form()] = None,
    ) -> Any:
        received.append((entries, image if text is None else text))
        return answer() if callable(answer) else answer

    with running_server(app) as url:
        yield url, received


def test_upstream_receives_faces_and_ocr_and_nothing_else(dual_encoder: DualEncoder, photo: Path) -> None:
    face = {"boundingBox": {"x1": 1, "y1": 2, "x2": 3, "y2": 4}, "embedding": "[0.5]", "score": 0.9}
    answer = {"facial-recognition": [face], "imageHeight": 40, "imageWidth": 48}
    with real_service(answer) as (url, received), immich_service(dual_encoder, url + "ignored") as immich_server:
        assert immich_server.predict(FACES, photo) == answer
        assert immich_server.predict(OCR, photo) == answer
        immich_server.predict(new_task := {"pets": {"detection": {"modelName": "a"}}}, photo)
        immich_server.encode_image(photo)
        immich_server.encode_text("a")
        immich_server.predict(new_task, "a text")
        sent = [json.dumps(task, separators=(",", ":")) for task in (FACES, OCR, new_task)]
        assert received == [*((entries, photo.read_bytes()) for entries in sent), (sent[-1], "a text")]


def test_upstream_errors_are_reported_and_searches_still_work(
    dual_encoder: DualEncoder, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(immich, "MAX_ANSWER_BYTES", 1000)
    codes = {code: PlainTextResponse("no", code, {"location": "http://a/"}) for code in (500, 422, 302)}
    answers = [*codes.values(), "x" * 1001]
    with real_service(lambda: answers.pop(0)) as (url, _), immich_service(dual_encoder, url) as immich_server:
        for message in (*(f"returned status {code}" for code in codes), "is too large"):
            with pytest.raises(OSError, match=message):
                immich_server.predict(FACES, photo)
    with immich_service(dual_encoder, url) as immich_server:  # the upstream is down
        with pytest.raises(OSError, match="--immich_upstream service cannot be reached"):
            immich_server.predict(FACES, photo)
        assert immich_server.statuses == [502]
        immich_server.encode_text("a")
        assert list(immich_server.healthy.values()) == [True]


@contextmanager
def hanging_service() -> Iterator[tuple[str, list[Any]]]:
    stopped = threading.Event()
    with real_service(lambda: stopped.wait(HANG_TIMEOUT)) as (url, received):
        try:
            yield url, received
        finally:
            stopped.set()


def test_waiting_for_upstream_ends_at_the_time_limit(dual_encoder: DualEncoder, photo: Path) -> None:
    with (
        hanging_service() as (url, _),
        immich_service(dual_encoder, url, timeout=0.2) as immich_server,
        pytest.raises(OSError, match=r"took longer than 0\.2 seconds"),
    ):
        immich_server.predict(FACES, photo)


def test_hanging_upstream_blocks_neither_searches_nor_shutdown(
    dual_encoder: DualEncoder, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(immich, "MAX_FORWARDED", 1)
    errors = []

    def predict(immich_server: ImmichServer) -> None:
        try:
            immich_server.predict(FACES, photo)
        except (OSError, httpx.TransportError) as error:
            errors.append(error)

    with hanging_service() as (url, received):
        with immich_service(dual_encoder, url, max_queue=2) as immich_server:
            clients = [threading.Thread(target=predict, args=[ImmichServer(immich_server.urls)]) for _ in range(3)]
            for client in clients:
                client.start()
            wait_until(lambda: bool(errors and received))
            assert "2 forwarded requests are waiting" in str(errors)
            immich_server.check()
            immich_server.encode_text("a")
            assert len(received) == 1
        for client in clients:
            client.join()
        assert len(errors) == 3


def test_server_that_is_its_own_upstream_says_so(dual_encoder: DualEncoder, photo: Path) -> None:
    upstream = UpstreamService("http://127.0.0.1:1")
    app = create_app(
        dual_encoder,
        limits=ServerLimits(timeout=HANG_TIMEOUT),
        add_routes=partial(add_immich_routes, upstream=upstream),
    )
    with running_server(app) as url:
        upstream.address = url.rstrip("/")
        with pytest.raises(OSError, match="returned status 502"):
            ImmichServer([url]).predict(FACES, photo)
        response = httpx.post(
            url + "predict",
            data={"entries": json.dumps(FACES)},
            files={"image": photo.read_bytes()},
            headers={"via": "1.1 llm2clip"},
        )
        assert "an llm2clip server forwarded this request" in response.text


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        ([], ["Facial recognition and OCR: not available", "http://127.0.0.1:3003/ for Immich, without a token"]),
        (["--host", "0.0.0.0", "--port", "0"], ["http://0.0.0.0:3003/ for Immich"]),
        (["--immich_upstream", "http://ml:3004/x"], ["Facial recognition and OCR: forwarded to http://ml:3004, "]),
    ],
)
def test_serve_prints_the_steps_in_immich(
    options: list[str],
    lines: list[str],
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("LLM2CLIP_TOKEN", "secret")
    ports = []
    monkeypatch.setattr("llm2clip.cli.serve.check_port_is_available", lambda host, port: ports.append(port))
    monkeypatch.setattr(server_module, "serve", lambda *_, on_start, behind_proxy: on_start(3003))
    assert main(["serve", "--model", str(model_folder), "--immich", "--precision", "fp32", *options]) == 0
    output = capsys.readouterr().out
    assert ports == [0 if "--port" in options else 3003]
    for line in [*lines, "CLIP model: ViT-B-16__openai", "Smart Search for all images"]:
        assert line in output
    assert "secret" not in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--immich", "--token", "a"], "--token cannot be used with --immich"),
        (["--immich_upstream", "http://ml:3003"], "--immich_upstream requires --immich"),
        (["--immich", "--immich_upstream", "ml:3003"], "--immich_upstream must be of the form http://HOST:PORT"),
        (["--immich", "--immich_upstream", "http://me:password@ml"], "--immich_upstream must be of the form"),
        (["--immich", "INDEX"], "--immich does not use an index"),
    ],
)
def test_serve_explains_wrong_immich_options(
    options: list[str], message: str, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--model", str(model_folder), "--port", "0", *options]) == 1
    error = capsys.readouterr().err
    assert message in error and "password" not in error


def test_immich_requires_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--immich"]) == 1
    assert "--immich requires --model" in capsys.readouterr().err
