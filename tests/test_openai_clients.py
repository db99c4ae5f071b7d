"""OpenAI's client and mteb's wrapper for OpenAI-compatible servers, unchanged, with the command `serve`."""

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageColumn
from PIL import Image
from torch.utils.data import DataLoader

from conftest import HANG_TIMEOUT, start_command
from llm2clip import LLM2CLIP
from search_fixtures import read_until

openai = pytest.importorskip("openai", reason="openai is not installed")
TOKEN = "secret"
TEXTS = ["a red dog", "eine lange Beschreibung", "两只猫"]


@pytest.fixture(scope="module")
def address(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server whose clients can read the model's name without a token."""
    output = tmp_path_factory.mktemp("serve") / "output"
    command = ["serve", "--model", str(model_folder), "--port", "0", "--token", TOKEN, "--precision", "fp32"]
    process = start_command([*command, "--list_models_without_token", "--timeout", str(HANG_TIMEOUT)], output)
    try:
        yield read_until(process, output, r"Serving at (http://127.0.0.1:\d+)/")[1]
    finally:
        process.kill()


@pytest.fixture
def client(address: str) -> Any:
    return openai.OpenAI(base_url=f"{address}/v1", api_key=TOKEN, max_retries=0)


class Expected(NamedTuple):
    """Images, and the embeddings of TEXTS, the images, and pairs of both, computed in Python."""

    images: list[bytes]
    text: np.ndarray
    image: np.ndarray
    pair: np.ndarray


@pytest.fixture(scope="module")
def expected(model_folder: Path, image_folder: Path) -> Expected:
    model = LLM2CLIP.from_pretrained(model_folder, device="cpu")
    images = [(image_folder / f"{number}.png").read_bytes() for number in range(len(TEXTS))]
    pairs = [{"image": image, "text": text} for image, text in zip(images, TEXTS, strict=True)]
    embeddings = [model.encode_document(documents).numpy() for documents in (TEXTS, images, pairs)]
    return Expected(images, *embeddings)


def min_cosine(vectors: Any, expected: np.ndarray) -> float:
    array = np.asarray(vectors, np.float64)
    assert array.shape == expected.shape
    norms = np.linalg.norm(array, axis=1) * np.linalg.norm(expected, axis=1)
    return float(((array * expected).sum(1) / norms).min())


def data_uri(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


def make_message(image: bytes | None, text: str | None) -> dict[str, Any]:
    content = []
    if image is not None:
        content.append({"type": "image_url", "image_url": {"url": data_uri(image)}})
    if text is not None:
        content.append({"type": "text", "text": text})
    return {"role": "user", "content": content}


def test_openai_client_gets_the_vectors_of_the_model(client: Any, expected: Expected) -> None:
    without_token = openai.OpenAI(base_url=client.base_url, api_key="wrong", max_retries=0)
    assert [model.id for model in without_token.models.list()] == ["model"]
    with pytest.raises(openai.AuthenticationError, match="invalid token"):
        without_token.embeddings.create(model="model", input="a")
    uris = [data_uri(image) for image in expected.images]

    def embed(inputs: Any, **options: Any) -> list[Any]:
        return [item.embedding for item in client.embeddings.create(model="model", input=inputs, **options).data]

    assert min_cosine(embed(TEXTS), expected.text) > 0.999999
    assert min_cosine(embed(TEXTS, encoding_format="float"), expected.text) > 0.999999
    assert min_cosine(embed(uris), expected.image) > 0.999999
    assert min_cosine(embed(uris, extra_body={"modality": "image"}), expected.image) > 0.999999
    assert np.shape(embed(uris[:1] * 32)) == (32, 16)
    with pytest.raises(openai.UnprocessableEntityError, match="URLs are not downloaded"):
        embed("https://example.com/a.jpg", extra_body={"modality": "image"})
    with pytest.raises(openai.UnprocessableEntityError, match=r"input\.1 does not support the modality 'text'"):
        embed(["a", uris[0]], extra_body={"modality": "text"})


def test_openai_client_sends_messages_in_the_form_of_vllm(client: Any, expected: Expected) -> None:
    def embed(messages: Any, **options: Any) -> list[Any]:
        body = {"model": "model", "messages": messages, "encoding_format": "float", **options}
        response = client.post("/embeddings", body=body, cast_to=openai.types.CreateEmbeddingResponse)
        return [item.embedding for item in response.data]

    pairs = list(zip(expected.images, TEXTS, strict=True))
    assert min_cosine(embed([[make_message(*pair)] for pair in pairs]), expected.pair) > 0.999999
    assert min_cosine(embed([[make_message(image, None)] for image in expected.images]), expected.image) > 0.999999
    assert min_cosine(embed([make_message(*pairs[0])]), expected.pair[:1]) > 0.999999
    assert min_cosine(embed([{"role": "user", "content": TEXTS[0]}]), expected.text[:1]) > 0.999999
    truncated = embed([[make_message(*pair)] for pair in pairs], dimensions=5)
    assert min_cosine(truncated, expected.pair[:, :5]) > 0.999999
    np.testing.assert_allclose(np.linalg.norm(truncated, axis=1), 1, atol=1e-6)


def test_mteb_wrapper_gets_the_vectors_of_the_model(
    address: str, expected: Expected, caplog: pytest.LogCaptureFixture
) -> None:
    from mteb.models import OpenAIAPIEncodeWrapper

    wrapper = OpenAIAPIEncodeWrapper(address, "model", TOKEN, modalities=["text", "image"], max_retries=1)
    assert "not found" not in caplog.text
    images = [Image.open(io.BytesIO(image)).convert("RGB") for image in expected.images]
    columns: dict[str, Any] = {"text": (TEXTS, Value("string")), "image": (images, ImageColumn())}
    for names, vectors in ((["text"], expected.text), (["image"], expected.image), (["text", "image"], expected.pair)):
        features = Features({name: columns[name][1] for name in names})
        dataset = Dataset.from_dict({name: columns[name][0] for name in names}, features)
        loader: Any = DataLoader(dataset, batch_size=2, collate_fn=collate)  # type: ignore[arg-type]
        for use_chat_template in (True, False):
            wrapper.use_chat_template = use_chat_template
            embeddings = wrapper.encode(
                loader, task_metadata=None, hf_split="test", hf_subset="default", show_progress_bar=False
            )  # type: ignore[arg-type]
            assert min_cosine(embeddings, vectors) > 0.999999


def collate(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}
