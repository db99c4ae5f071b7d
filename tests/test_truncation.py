"""Truncated embeddings (Matryoshka) in models, evaluation, indexes, the server and exports."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient
from torch import Tensor

from conftest import make_llm
from llm2clip.cli import main
from llm2clip.data.images import load_image
from llm2clip.data.records import open_records
from llm2clip.data.skip_log import SkipLog
from llm2clip.evaluate.embeddings import open_embedding_source
from llm2clip.models.dual_encoder import DualEncoder, open_dual_encoder
from llm2clip.models.export.transformers import build_exported_model, build_tokenizer
from llm2clip.models.llm2clip import LLM2CLIP, rotate_to_principal_components, truncate_model
from llm2clip.models.model_folder import AdapterConfig, LLM2CLIPConfig
from llm2clip.models.text.caption_encoder import CaptionEncoder
from llm2clip.models.vision.vision_tower import VisionTower
from llm2clip.search.backends import IndexBackend
from llm2clip.search.metadata import Filter
from llm2clip.search.query import QueryEncoder, SearchQuery, truncate_model_to_index
from search_fixtures import BACKENDS, create_backend, create_patient_app, index_sources

DIM = 6
TEXTS = ["the middle is red", "a dog"]


def truncate_by_hand(embeddings: Tensor, dim: int = DIM) -> Tensor:
    """Truncate and normalise in float64."""
    part = embeddings[:, :dim].double()
    return (part / part.square().sum(1, keepdim=True).sqrt()).float()


def list_images(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.png"))[:8]


def encode_images(model: DualEncoder, files: list[Path]) -> Tensor:
    return model.encode_images([model.transform(load_image(file)) for file in files])


def make_model(folder: Path, **options: object) -> LLM2CLIP:
    """Build a random model, with 16 dimensions unless `options` says otherwise."""
    torch.manual_seed(0)
    tower = VisionTower.from_pretrained("test_efficientnet", image_size=32, pretrained=False)
    encoder = CaptionEncoder.from_pretrained(make_llm(folder / "llm"), device="cpu")
    fields = {"embed_dim": 16, "matryoshka_dims": [4, 8], **options}
    config = LLM2CLIPConfig(tower=tower.config, text_dim=encoder.embed_dim, **fields)  # type: ignore[arg-type]
    model = LLM2CLIP(config, tower, encoder).eval()
    model.config.encoder = encoder.identity()
    return model


# ---- models ----------------------------------------------------------------------------------------------------------


def test_dual_encoder_truncates_and_normalises(dual_encoder: DualEncoder, image_folder: Path) -> None:
    truncated, files = dual_encoder.truncate(DIM), list_images(image_folder)
    assert truncated.embed_dim == DIM and truncated.identity() != dual_encoder.identity()
    expected = truncate_by_hand(dual_encoder.encode_texts(TEXTS))
    torch.testing.assert_close(truncated.encode_texts(TEXTS), expected, atol=1e-6, rtol=0)
    expected = truncate_by_hand(encode_images(dual_encoder, files))
    torch.testing.assert_close(encode_images(truncated, files), expected, atol=1e-6, rtol=0)
    assert dual_encoder.dense is not None and truncated.dense is not None
    pixels = torch.stack([dual_encoder.dense.resize(load_image(file)) for file in files[:2]])
    cells, truncated_cells = dual_encoder.dense.encode(pixels), truncated.dense.encode(pixels)
    torch.testing.assert_close(truncated_cells.flatten(0, 2), truncate_by_hand(cells.flatten(0, 2)), atol=1e-6, rtol=0)
    assert dual_encoder.truncate(16) is dual_encoder
    for dim in (0, 17):
        with pytest.raises(ValueError, match=f"have 16 dimensions, so they cannot be truncated to {dim}"):
            dual_encoder.truncate(dim)


@pytest.mark.parametrize(
    "options",
    [{}, {"projection_bias": True}, {"embed_dim": 256, "projection": False}, {"embed_dim": 32, "adapter": 0}],
    ids=str,
)
def test_truncated_models_and_their_exports_return_truncated_embeddings(
    options: dict[str, object], tmp_path: Path, image_folder: Path
) -> None:
    if "adapter" in options:
        options = {**options, "adapter": AdapterConfig(depth=0)}
    model = make_model(tmp_path, **options)
    files = list_images(image_folder)
    images, texts = model.encode_image(files), model.encode_text(TEXTS)
    truncated = truncate_model(model, DIM)
    assert truncated.config.embed_dim == DIM and truncated.config.matryoshka_dims == [4]
    torch.testing.assert_close(truncated.encode_image(files), truncate_by_hand(images), atol=1e-5, rtol=0)
    torch.testing.assert_close(truncated.encode_text(TEXTS), truncate_by_hand(texts), atol=1e-5, rtol=0)
    assert torch.equal(model.encode_text(TEXTS), texts), "the original model was modified"

    exported = build_exported_model(truncated)
    tokens = build_tokenizer(truncated.encoder)(TEXTS[0], return_tensors="pt")
    with torch.no_grad():
        text = exported.get_text_features(**tokens).pooler_output
    torch.testing.assert_close(text, truncate_by_hand(texts[:1]), atol=2e-5, rtol=0)

    loaded = LLM2CLIP.from_pretrained(truncated.save_pretrained(tmp_path / "saved"), "cpu")
    torch.testing.assert_close(loaded.encode_image(files), truncate_by_hand(images), atol=1e-5, rtol=0)
    torch.testing.assert_close(loaded.encode_text(TEXTS), truncate_by_hand(texts), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="cannot be truncated to 999"):
        truncate_model(model, 999)


@pytest.mark.parametrize("bias", [False, True])
def test_rotation_sorts_dimensions_by_variance_and_keeps_similarities(
    bias: bool, tmp_path: Path, image_folder: Path
) -> None:
    model = make_model(tmp_path, matryoshka_dims=[], projection_bias=bias)
    for layer in (model.projection, model.adapter.out):
        if layer.bias is not None:
            torch.nn.init.normal_(layer.bias, std=0.1)
    files, captions = list_images(image_folder), torch.randn(50, model.config.text_dim)
    images, texts = model.encode_image(files), model.project_text_embeddings(captions)
    rotate_to_principal_components(model, captions)
    rotated_images, rotated_texts = model.encode_image(files), model.project_text_embeddings(captions)
    torch.testing.assert_close(rotated_texts @ rotated_images.T, texts @ images.T, atol=1e-5, rtol=0)
    moments = rotated_texts.double().T @ rotated_texts.double()
    expected = np.linalg.eigvalsh((texts.double().T @ texts.double()).numpy())[::-1].copy()
    torch.testing.assert_close(moments, torch.diag(torch.from_numpy(expected)), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="only if the model has an image projection and an adapter"):
        rotate_to_principal_components(make_model(tmp_path, embed_dim=32, adapter=AdapterConfig(depth=0)), captions)


def test_matryoshka_dims_are_saved_and_checked(tmp_path: Path) -> None:
    model = make_model(tmp_path)
    loaded = LLM2CLIP.from_pretrained(model.save_pretrained(tmp_path / "saved"), "cpu")
    assert loaded.config.matryoshka_dims == [4, 8]
    assert "matryoshka_dims" not in loaded.config.identity(), "existing indexes would become invalid"
    for dims in ([16], [0], [4, 99]):
        with pytest.raises(ValueError, match="matryoshka_dims must be at least 1 and less than 16"):
            LLM2CLIP(dataclasses.replace(model.config, matryoshka_dims=dims), model.tower)


# ---- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_cache", [True, False])
def test_evaluate_dims_matches_truncation_by_hand(
    with_cache: bool, model_folder: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = str(image_folder / "captions.jsonl"), tmp_path / "out"
    cache_dir = tmp_path / "cache" if with_cache else None
    source = open_embedding_source(str(model_folder), SkipLog(), cache_dir)
    records = [r for r in open_records(data) if r.split == "val"]
    refs, texts = [r.image for r in records if r.image is not None], [c for r in records for c in r.captions]
    images, _ = source.encode_images(refs)
    captions = source.encode_texts(texts)
    truncated = source.truncate(DIM)
    assert truncated.embed_dim == DIM
    torch.testing.assert_close(truncated.encode_images(refs)[0], truncate_by_hand(images), atol=1e-6, rtol=0)
    torch.testing.assert_close(truncated.encode_texts(texts), truncate_by_hand(captions), atol=1e-6, rtol=0)
    if not with_cache:
        return

    assert main(["evaluate", str(model_folder), f"{data}@val", "--dims", "2", str(DIM), "16", "--out", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())["results"]
    assert [result["dimensions"] for result in results] == [16, 2, DIM]
    owner = torch.tensor([n for n, record in enumerate(records) for _ in record.captions])
    for result in results:
        dim = result["dimensions"]
        best = (truncate_by_hand(captions, dim) @ truncate_by_hand(images, dim).T).argmax(1)
        [row] = [row for row in result["rows"] if row["captions"] == "captions"]
        assert row["T2I"]["R@1"] == pytest.approx(100 * float((best == owner).double().mean()))
    assert f"{DIM} dimensions" in capsys.readouterr().out
    report = (out / "report.md").read_text()
    [line] = [line for line in report.splitlines() if "| 6 | 12 |" in line]
    [row] = [row for row in results[2]["rows"] if row["captions"] == "captions"]
    full = next(row for row in results[0]["rows"] if row["captions"] == "captions")["T2I"]["R@1"]
    assert f"| {row['T2I']['R@1']:.1f} |" in line and f"| {100 * row['T2I']['R@1'] / full:.1f} |" in line
    assert "bytes per image" in (out / "report.html").read_text()

    assert main(["evaluate", str(model_folder), f"{data}@val", "--dims", "17"]) == 1
    assert "cannot be truncated to 17" in capsys.readouterr().err


def test_precomputed_embeddings_are_truncated(tmp_path: Path, image_folder: Path) -> None:
    rng, files = np.random.default_rng(0), list_images(image_folder)
    images, texts = rng.normal(size=(8, 16)), rng.normal(size=(2, 16))
    np.savez(tmp_path / "a.npz", images=images, image_names=[str(f) for f in files], texts=texts, captions=TEXTS)
    source = open_embedding_source(str(tmp_path / "a.npz"), SkipLog(), None)
    expected = truncate_by_hand(torch.from_numpy(texts))
    torch.testing.assert_close(source.truncate(DIM).encode_texts(TEXTS), expected, atol=1e-6, rtol=0)
    assert source.embed_dim == 16
    with pytest.raises(ValueError, match="cannot be truncated to 17"):
        source.truncate(17)


# ---- search ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=BACKENDS)
def truncated_index(
    request: pytest.FixtureRequest, image_folder: Path, dual_encoder: DualEncoder, tmp_path: Path
) -> IndexBackend:
    backend = create_backend(request.param, tmp_path / "index")
    index_sources([image_folder], dual_encoder, backend, dim=DIM)
    return backend


def test_truncated_index_matches_brute_force(
    truncated_index: IndexBackend, image_folder: Path, dual_encoder: DualEncoder
) -> None:
    files = sorted(image_folder.glob("*.png"))
    model = truncate_model_to_index(truncated_index.read_metadata(), dual_encoder)
    query = QueryEncoder(model).embed(SearchQuery(texts=TEXTS[:1])).combined
    images = truncate_by_hand(encode_images(dual_encoder, files))
    cosines = (images @ truncate_by_hand(dual_encoder.encode_texts(TEXTS[:1])).T)[:, 0].numpy()
    best = np.argsort(-cosines)[:5]
    hits = truncated_index.search(query, 5, Filter())
    assert [Path(hit.images[0].name).name for hit in hits] == [files[i].name for i in best]
    assert [hit.score for hit in hits] == pytest.approx(cosines[best], abs=2e-3)
    vector = truncated_index.read_vector(hits[0].id)
    assert vector is not None and vector.shape == (DIM,)

    # A later run keeps the number of dimensions, and rejects another one.
    assert not index_sources([image_folder], dual_encoder, truncated_index)
    with pytest.raises(ValueError, match="the index has vectors of 6 dimensions, not 8"):
        index_sources([image_folder], dual_encoder, truncated_index, dim=8)


def test_server_truncates_queries_to_the_index_and_embeddings_to_the_request(
    truncated_index: IndexBackend, dual_encoder: DualEncoder
) -> None:
    expected = QueryEncoder(dual_encoder.truncate(DIM)).embed(SearchQuery(texts=TEXTS[:1])).combined
    [first, *_] = truncated_index.search(expected, 1, Filter())
    with TestClient(create_patient_app(dual_encoder, truncated_index), base_url="http://localhost") as client:
        hits = client.post("/search", json={"texts": TEXTS[:1], "words": False}).json()["hits"]
        assert (hits[0]["id"], hits[0]["score"]) == (first.id, pytest.approx(first.score, abs=1e-5))
        assert client.post("/search", json={"texts": ["a"], "like": [first.id]}).status_code == 200
        assert client.post("/heatmap", json={"texts": ["a"], "id": first.id}).status_code == 200
        full = dual_encoder.encode_texts(TEXTS)
        for dim in (1, 10, 16):
            response = client.post("/v1/embeddings", json={"input": TEXTS, "dimensions": dim}).json()
            vectors = torch.tensor([item["embedding"] for item in response["data"]])
            torch.testing.assert_close(vectors, truncate_by_hand(full, dim), atol=1e-5, rtol=0)
        for dim in (0, 17):
            response = client.post("/v1/embeddings", json={"input": "a", "dimensions": dim})
            assert response.status_code == 422 and f"cannot be truncated to {dim}" in response.text


def test_index_command_truncates(
    model_folder: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["index", str(image_folder), "--model", str(model_folder), "--out", str(tmp_path / "index")]
    assert main([*command, "--dim", "17"]) == 1
    assert "cannot be truncated to 17" in capsys.readouterr().err and not (tmp_path / "index").exists()
    assert main([*command, "--dim", str(DIM)]) == 0
    assert main(["search", str(tmp_path / "index"), *TEXTS[:1], "--no_words", "--paths", "--top", "1"]) == 0
    model = open_dual_encoder(str(model_folder))
    files = sorted(image_folder.glob("*.png"))
    cosines = truncate_by_hand(encode_images(model, files)) @ truncate_by_hand(model.encode_texts(TEXTS[:1])).T
    assert capsys.readouterr().out.splitlines()[-1] == str(files[int(cosines.argmax())])
