"""Export formats: the other library loads the folder in a process that cannot import llm2clip, and its embeddings
equal the original ones."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers.base.modules import Dense

from conftest import make_llm
from llm2clip.cli import main
from llm2clip.models import modeling_llm2clip
from llm2clip.models.export import export_model
from llm2clip.models.export.model_card import render_model_card
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.model_folder import AdapterConfig, LLM2CLIPConfig
from llm2clip.models.pretrained import ASSETS
from llm2clip.models.text.caption_encoder import CaptionEncoder
from llm2clip.models.text.sentence_transformer import truncate_transformer_layers
from llm2clip.models.vision.vision_tower import VisionTower

TEXTS = ["a dog", "Two children in the snow, and an old man.", "一只猫", " a dog \n", " a <|user|> dog ", "x" * 600]


def make_model(folder: Path, tower: VisionTower, family: str = "llama", **options: Any) -> LLM2CLIP:
    """Build a random model. Options that start with text_ go to the caption encoder, the others to LLM2CLIPConfig."""
    torch.manual_seed(1)
    text = {k.removeprefix("text_"): v for k, v in options.items() if k.startswith("text_")}
    encoder = CaptionEncoder.from_pretrained(make_llm(folder / "llm", family), device="cpu", **text)
    fields = {k: v for k, v in options.items() if not k.startswith("text_")}
    fields = {"embed_dim": 16, "adapter": AdapterConfig(depth=2), **fields}
    config = LLM2CLIPConfig(tower=tower.config, text_dim=encoder.embed_dim, **fields)
    model = LLM2CLIP(config, tower, encoder).eval()
    with torch.no_grad():
        model.logit_scale.fill_(2.5)
    model.config.encoder = encoder.identity()
    return model


def timm_tower(size: int = 76) -> VisionTower:
    torch.manual_seed(0)
    return VisionTower.from_pretrained("test_efficientnet", image_size=size, pretrained=False)


def hf_tower(folder: Path, kind: str, size: int = 32) -> VisionTower:
    """Build a random transformers tower of native size 32; CLIP's and SigLIP's can run at another size."""
    from transformers import AutoConfig, AutoModel, CLIPVisionModel, SiglipVisionModel

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    model_class = {"clip_vision_model": CLIPVisionModel, "siglip_vision_model": SiglipVisionModel}.get(kind)
    model = model_class(config) if model_class else AutoModel.from_config(config)
    model.save_pretrained(folder / kind)
    return VisionTower.from_pretrained(folder / kind, image_size=size)


@pytest.fixture(scope="module")
def photos(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Square images: when an odd number of pixels is cropped, transformers and torchvision differ by one pixel."""
    folder, files = tmp_path_factory.mktemp("photos"), []
    for n in (0, 7, 14):
        files.append(folder / f"{n}.png")
        Image.open(image_folder / f"{n}.png").crop((4, 0, 44, 40)).save(files[-1])
    return files


Results = dict[str, dict[str, np.ndarray]]


def run_without_llm2clip(code: str, folders: dict[str, Path], photos: list[Path], out: Path) -> Results:
    """Run code for each folder, in one process that cannot import llm2clip.

    The code sees FOLDER, TEXTS and `images` (PIL), and stores arrays in the dict `results`.

    Returns:
        The results by the folder's name.
    """
    body = "\n".join(f"    {line}" for line in code.strip().splitlines())
    script = f"""
import sys, json, os
sys.modules["llm2clip"] = None
import numpy as np
from PIL import Image

FOLDERS, PHOTOS, TEXTS = json.loads(sys.argv[1])
images = [Image.open(p).convert("RGB") for p in PHOTOS]

def run(FOLDER, results):
{body}

arrays = {{}}
for name, folder in FOLDERS.items():
    run(folder, results := {{}})
    arrays |= {{f"{{name}}/{{key}}": value for key, value in results.items()}}
np.savez(sys.argv[2], **arrays)
"""
    arguments = json.dumps([{name: str(folder) for name, folder in folders.items()}, [str(p) for p in photos], TEXTS])
    process = subprocess.run(
        [sys.executable, "-c", script, arguments, str(out / "results.npz")],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HOME": str(out / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr[-3000:]
    results: Results = {name: {} for name in folders}
    for path, value in np.load(out / "results.npz").items():
        name, _, key = path.rpartition("/")
        results[name][key] = value
    return results


CASES: dict[str, dict[str, Any]] = {
    "template": {"text_template": "<|user|>Caption:\n{caption}<|end|>"},
    "causal, last token, dinov2": {"text_bidirectional": False, "text_pooling": "lasttoken", "tower": "dinov2"},
    "truncated, projection bias": {"text_truncate_dim": 16, "projection_bias": True, "family": "gemma3_text"},
    "clip at another size, no adapter": {
        "tower": "clip_vision_model", "size": 48, "adapter": AdapterConfig(depth=0), "embed_dim": 32,
    },
    "siglip, no projection": {
        "tower": "siglip_vision_model", "family": "qwen3", "text_template": "Caption:\n{caption}<|end|>",
        "projection": False, "embed_dim": 24,
    },
}  # fmt: skip


def make_case(case: str, folder: Path) -> LLM2CLIP:
    options = dict(CASES[case])
    kind, size = options.pop("tower", None), options.pop("size", 32)
    folder.mkdir()
    tower = hf_tower(folder, kind, size) if kind else timm_tower()
    return make_model(folder, tower, **options)


Loaded = dict[str, tuple[LLM2CLIP, dict[str, np.ndarray]]]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory, photos: list[Path]) -> Loaded:
    """Every case: the original model, and the embeddings of transformers and sentence-transformers."""
    root = tmp_path_factory.mktemp("exports")
    models = {case: make_case(case, root / case) for case in CASES}
    for case, model in models.items():
        export_model(model, "sentence-transformers", root / case / "out")
    results = run_without_llm2clip(
        """
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)
with torch.no_grad():
    tokens = processor(text=TEXTS, padding=True, truncation=True, return_tensors="pt")
    pixels = processor(images=images, return_tensors="pt")
    results["texts"] = model.get_text_features(**tokens).pooler_output.numpy()
    results["images"] = model.get_image_features(**pixels).pooler_output.numpy()
    results["logits"] = model(**tokens, **pixels).logits_per_image.numpy()
st = SentenceTransformer(FOLDER, trust_remote_code=True, device="cpu")
results["st_texts"], results["st_images"] = st.encode(TEXTS), st.encode(images)
results["single"] = st.encode(TEXTS[1])
""",
        {case: root / case / "out" for case in CASES},
        photos,
        root,
    )
    return {case: (model, results[case]) for case, model in models.items()}


@pytest.mark.parametrize("case", CASES)
def test_transformers_and_sentence_transformers_exports_give_the_same_embeddings(
    case: str, loaded: Loaded, photos: list[Path]
) -> None:
    model, results = loaded[case]
    texts, images = model.encode_text(TEXTS).numpy(), model.encode_image(photos).numpy()
    np.testing.assert_allclose(results["texts"], texts, atol=2e-5)
    np.testing.assert_allclose(results["st_texts"], texts, atol=2e-5)
    np.testing.assert_allclose(results["single"], texts[1], atol=2e-5)
    for name in ("images", "st_images"):  # transformers rounds differently when it resizes
        assert ((results[name] * images).sum(1) > 0.999).all(), (results[name] * images).sum(1)
    np.testing.assert_allclose(results["logits"], images @ texts.T * np.exp(2.5), atol=0.1)


@pytest.mark.parametrize(
    ("kind", "class_name"),
    [
        ("clip_vision_model", "CLIPVisionModel"),
        ("siglip_vision_model", "SiglipVisionModel"),
        ("dinov2", "Dinov2Model"),
        ("timm", "TimmWrapperModel"),
    ],
)
@torch.no_grad()
def test_vision_export_loads_as_the_towers_own_class(kind: str, class_name: str, tmp_path: Path) -> None:
    from transformers import AutoModel

    tower = timm_tower(32) if kind == "timm" else hf_tower(tmp_path, kind)
    export_model(make_model(tmp_path, tower), "vision", tmp_path / "out")
    loaded, report = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True, trust_remote_code=False)
    assert type(loaded).__name__ == class_name
    assert not report["missing_keys"] and not report["unexpected_keys"]
    pixels = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
    output = loaded.eval()(pixel_values=pixels)
    torch.testing.assert_close(output.pooler_output, tower(pixels * tower.std + tower.mean), atol=1e-4, rtol=1e-3)
    assert output.last_hidden_state.ndim >= 3


def example_code(file: Path) -> str:
    """Return the code of USE.md, with the test's inputs."""
    code = file.read_text().split("```python\n")[1].rsplit("```", 1)[0]
    return code.replace('["a long description ..."]', "TEXTS[:3]").replace("pixels = ...", "pixels = PIXELS")


def test_onnx_export_and_its_example_give_the_same_embeddings(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, out = make_case("siglip, no projection", tmp_path / "siglip"), tmp_path / "out"
    truncate_transformer_layers(model.encoder.llm, 1)  # tracing takes seconds per layer
    messages = export_model(model, "onnx", out, int8=True)
    assert len(messages) == 4
    pattern = r"PyTorch's embeddings is 1\.0000|int8\.onnx: mean cosine similarity (0\.99|1\.00)"
    assert all(re.search(pattern, message) for message in messages)
    assert not any(b".py" in file.read_bytes() for file in out.glob("*.onnx")), "the graphs contain local paths"
    assert json.loads((out / "tokenizer.json").read_text())["padding"] is None
    assert not re.search("treespec|axis name", " ".join(str(warning.message) for warning in recwarn))
    size = json.loads((out / "preprocessor_config.json").read_text())["crop_size"]["height"]
    pixels = (np.arange(5 * 3 * size**2) % 251).astype(np.uint8).reshape(5, 3, size, size)
    monkeypatch.chdir(out)
    results: dict[str, Any] = {"TEXTS": TEXTS, "PIXELS": pixels}
    exec(example_code(out / "USE.md"), results)
    np.testing.assert_allclose(results["texts"], model.encode_text(TEXTS[:3]).numpy(), atol=1e-4)
    with torch.no_grad():
        images = model(pixels=torch.from_numpy(pixels))[0]
    np.testing.assert_allclose(results["images"], images.numpy(), atol=1e-4)


def test_export_model_rejects_models_that_the_format_cannot_represent(tmp_path: Path) -> None:
    model = make_model(tmp_path / "max", timm_tower(), text_pooling="max")
    with pytest.raises(ValueError, match=r"pooling mode must be one of .*got 'max'"):
        export_model(model, "transformers", tmp_path / "out")
    extended = make_model(tmp_path / "extended", timm_tower())
    extended.encoder.st.append(Dense(32, 32, bias=True))  # a trained layer after the pooling
    with pytest.raises(ValueError, match="has a module that this format does not support"):
        export_model(extended, "transformers", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_model_checks_its_arguments(tmp_path: Path) -> None:
    model = make_model(tmp_path, timm_tower())
    with pytest.raises(ValueError, match=r"must be one of transformers.*'tf'"):
        export_model(model, "tf", tmp_path / "out")
    with pytest.raises(ValueError, match="--int8 can only be used with --to onnx"):
        export_model(model, "vision", tmp_path / "out", int8=True)
    with pytest.raises(ValueError, match="--dim cannot be used with --to vision"):
        export_model(model, "vision", tmp_path / "out", dim=8)
    with pytest.raises(ValueError, match="have 16 dimensions, so they cannot be truncated to 17"):
        export_model(model, "transformers", tmp_path / "out", dim=17)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError):
        export_model(model, "vision", tmp_path / "out")


def test_export_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(make_model(tmp_path, timm_tower()).save_pretrained(tmp_path / "model"))
    assert main(["export", folder, "--to", "vision", "--out", str(tmp_path / "tower")]) == 0
    assert "AutoModel.from_pretrained" in capsys.readouterr().out
    assert main(["export", folder, "--to", "vision", "--out", str(tmp_path / "x"), "--int8"]) == 1
    assert main(["export", folder, "--to", "transformers", "--out", str(tmp_path / "small"), "--dim", "8"]) == 0
    assert json.loads((tmp_path / "small/config.json").read_text())["embed_dim"] == 8


def test_model_card_includes_report_and_config_without_local_folders(tmp_path: Path) -> None:
    folder = make_model(tmp_path, timm_tower()).save_pretrained(tmp_path / "run/model")
    config = "data:\n- /home/somebody/photos.csv\n- hf:some/name\nalign:\n  lr: 0.1\n"
    report = "# Report\n\n## Figures\n\n```\n# llm2clip fit /home/somebody/photos.csv\n```\n\nR@1 is 12/34.\n"
    (tmp_path / "run/config.yaml").write_text(config)
    (tmp_path / "run/report.md").write_text(report)
    card = render_model_card(folder, "me/finder", "apache-2.0")
    assert card.startswith("---\nlibrary_name: llm2clip\n") and "license: apache-2.0" in card
    assert "somebody" not in card and "photos.csv" in card and "hf:some/name" in card and "12/34" in card
    assert "## Pretrained parts" not in card
    (tmp_path / "run/config.yaml").write_text(config + "  tower: efficientnet-lite0\nencoder:\n  path: gemma3-270m\n")
    parts = render_model_card(folder, "me/finder").partition("## Pretrained parts")[2].partition("\n## ")[0]
    assert all(name in parts for name in ("Gemma Terms", "Original model: google/gemma-3-270m.", "EfficientNet-Lite0"))
    assert ASSETS["gemma3-270m"].wheels[2].sha256 in parts
    assert "#### Figures" in card and "\n# llm2clip fit" in card and "test_efficientnet (timm), 76 pixels" in card


def test_old_transformers_versions_cannot_load_exported_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would ignore `is_causal`. sentence-transformers also imports this code before it loads the weights."""
    monkeypatch.setattr("transformers.utils.versions.importlib.metadata.version", lambda name: "5.1.0")
    with pytest.raises(ImportError, match=r"transformers>=5\.2 is required .* found transformers==5\.1\.0"):
        runpy.run_path(modeling_llm2clip.__file__)


@pytest.mark.parametrize("kind", ["timm", "clip_vision_model"])
def test_transformers_export_preprocessing_matches_ours(
    kind: str, tmp_path: Path, photos: list[Path], modules_cache: None
) -> None:
    from transformers import AutoImageProcessor

    from llm2clip.data.images import load_image
    from llm2clip.data.transforms import EvalTransform

    model = make_model(tmp_path, timm_tower() if kind == "timm" else hf_tower(tmp_path, kind))
    model.encoder.st.max_seq_length = 12  # shorter than the sample texts
    export_model(model, "transformers", tmp_path / "out")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    photo = Image.open(photos[0]).convert("RGB")
    for width in range(90, 98):  # cropping an odd number of columns is rounded
        image = photo.resize((width, 64))
        theirs = processor(images=[image], return_tensors="pt")["pixel_values"][0]
        pixels = EvalTransform(model.tower.preprocess)(load_image(image))
        ours = (pixels.float() / 255 - model.tower.mean) / model.tower.std
        # The two round some pixels differently when they resize.
        assert (theirs - ours).abs().max() < 2.01 / 255 / model.tower.std.min(), width
