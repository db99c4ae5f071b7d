"""Tests that need a GPU: embeddings, losses and a short fit on the GPU are compared with those on the CPU.

Without a GPU, test_pretended_gpu runs these tests on a pretended GPU.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from conftest import make_tower
from llm2clip.cli import main
from llm2clip.models.dual_encoder import open_dual_encoder, wrap_llm2clip
from llm2clip.models.text.caption_encoder import CaptionEncoder
from llm2clip.search.explain import compute_heatmap
from llm2clip.train.losses import info_nce, sigmoid_loss
from test_dense import BUILDERS, make_llm2clip

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]
CAPTIONS = ["a dog", "two cats in the snow", "x", "a longer caption of a red house behind a blue tree"] * 3


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.02)])
def test_caption_embeddings_equal_those_of_the_cpu(llm: Path, precision: str, tolerance: float) -> None:
    expected = CaptionEncoder.from_pretrained(llm, device="cpu").encode(CAPTIONS)
    actual = CaptionEncoder.from_pretrained(llm, device="cuda").encode(CAPTIONS, precision=precision)
    assert actual.device.type == "cpu"
    assert (1 - F.cosine_similarity(actual, expected)).max() < tolerance


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("auto", 0.05)])
def test_model_embeddings_equal_those_of_the_cpu(model_folder: Path, precision: str, tolerance: float) -> None:
    pixels = torch.randint(0, 255, (40, 40, 3), dtype=torch.uint8).permute(2, 0, 1)
    embeddings = []
    for device in ("cpu", "cuda"):
        model = open_dual_encoder(str(model_folder), device, precision)
        embeddings.append((model.encode_texts(CAPTIONS), model.encode_images([model.transform(pixels)])))
    for actual, expected in zip(embeddings[1], embeddings[0], strict=True):
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 0.05)])
@pytest.mark.parametrize("family", ["vit", "eva02", "clip", "siglip"])
def test_dense_embeddings_equal_those_of_the_cpu(family: str, precision: str, tolerance: float) -> None:
    model = make_llm2clip(BUILDERS[family]())
    on_cpu = wrap_llm2clip(model, "model").dense
    assert on_cpu is not None
    pixels = torch.randint(0, 255, (2, 3, 3 * on_cpu.cell_size, 5 * on_cpu.cell_size), dtype=torch.uint8)
    query = F.normalize(torch.randn(model.config.embed_dim), dim=0).numpy()
    expected = {variant: on_cpu.encode(pixels, variant) for variant in on_cpu.variants}
    heatmap = compute_heatmap(on_cpu, pixels[0], query)
    on_gpu = wrap_llm2clip(model.to("cuda"), "model", precision).dense
    assert on_gpu is not None and on_gpu.device.type == "cuda"
    for variant, embeddings in expected.items():
        actual = on_gpu.encode(pixels, variant)
        assert actual.device.type == "cuda" and actual.dtype == torch.float32
        assert (1 - F.cosine_similarity(actual.cpu(), embeddings, dim=-1)).max() < tolerance
    assert abs(compute_heatmap(on_gpu, pixels[0], query) - heatmap).max() < 4 * tolerance


@pytest.mark.parametrize("name", ["infonce", "sigmoid"])
def test_losses_and_gradients_equal_those_of_the_cpu(name: str) -> None:
    images, texts = F.normalize(torch.randn(20, 16), dim=1), F.normalize(torch.randn(50, 16), dim=1)
    image_of_text, text_ids = torch.arange(50) * 20 // 50, torch.arange(50) % 45
    results = []
    for device in ("cpu", "cuda"):
        inputs = [
            x.detach().to(device).requires_grad_() for x in (images, texts, torch.tensor(20.0), torch.tensor(-10.0))
        ]
        positions = image_of_text.to(device), text_ids.to(device)
        loss = info_nce(*inputs[:3], *positions) if name == "infonce" else sigmoid_loss(*inputs, *positions)
        loss.backward()
        gradients = [x.grad.cpu() for x in inputs if x.grad is not None]
        assert len(gradients) >= 3
        results.append([loss.detach().cpu(), *gradients])
    torch.testing.assert_close(results[1], results[0], atol=1e-4, rtol=1e-3)


def test_fit_completes_with_finite_losses(image_folder: Path, llm: Path, tmp_path: Path) -> None:
    vit = make_tower(tmp_path / "vit", "test_vit")
    command = ["fit", str(image_folder / "captions.jsonl"), "--out", str(tmp_path / "run"), "--encoder.path", str(llm)]
    command += ["--tune.steps=2", "--tune.batch_size=4", "--align.tower", str(vit), "--align.embed_dim=12"]
    main([*command, "--align.batch_size=4", "--align.epochs=0.3", "--align.workers=0"])
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/align/metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2
    assert all(0 < loss < 10 for loss in losses)
    assert json.loads((tmp_path / "run/evaluate/trained.json").read_text())
