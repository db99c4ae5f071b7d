"""A model in the forms of other tools: each opens it by itself, in a process that has never heard of us, and gives the
same vectors."""

from __future__ import annotations

import json
import os
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
from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.models.export import verb
from llm2clip.models.export.model_card import render_model_card
from llm2clip.models.export.verb import export_model
from llm2clip.models.llm2clip import LLM2CLIP, LLM2CLIPConfig
from llm2clip.models.vision_tower import VisionTower

TEXTS = ["a dog", "Two children in the snow, and an old man who watches them.", "一只猫", "x" * 600]


def make(folder: Path, tower: VisionTower, family: str = "llama", **options: Any) -> LLM2CLIP:
    """A random model; options that begin with text_ are the caption encoder's."""
    torch.manual_seed(1)
    text = {k.removeprefix("text_"): v for k, v in options.items() if k.startswith("text_")}
    encoder = CaptionEncoder.from_pretrained(make_llm(folder / "llm", family), device="cpu", **text)
    others = {k: v for k, v in options.items() if not k.startswith("text_")}
    config = LLM2CLIPConfig(tower=tower.config, text_dim=encoder.embed_dim, embed_dim=16, adapter_depth=2, **others)
    model = LLM2CLIP(config, tower, encoder).eval()
    with torch.no_grad():
        model.logit_scale.fill_(2.5)
    model.config.encoder = encoder.identity()
    return model


def timm_tower(size: int = 76) -> VisionTower:
    torch.manual_seed(0)
    return VisionTower.from_pretrained("test_efficientnet", image_size=size, pretrained=False)


def hf_tower(folder: Path, kind: str, size: int = 32) -> VisionTower:
    """A random tower of transformers; CLIP's and SigLIP's run at another resolution than their own, too."""
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
    made = {"clip_vision_model": CLIPVisionModel, "siglip_vision_model": SiglipVisionModel}.get(kind)
    (made(config) if made else AutoModel.from_config(config)).save_pretrained(folder / kind)
    return VisionTower.from_pretrained(folder / kind, image_size=size)


@pytest.fixture(scope="module")
def photos(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Squares: where an odd margin is cropped off, transformers and torchvision differ by a pixel."""
    folder, found = tmp_path_factory.mktemp("photos"), []
    for n in (0, 7, 14):
        found.append(folder / f"{n}.png")
        Image.open(pictures / f"{n}.png").crop((4, 0, 44, 40)).save(found[-1])
    return found


def alone(code: str, folders: dict[str, Path], photos: list[Path], out: Path) -> dict[str, dict[str, np.ndarray]]:
    """Run code that fills `found` from FOLDER, PHOTOS and TEXTS, for each folder, in one process that cannot import us;
    what it filled, by the folder's name."""
    body = "\n".join(f"    {line}" for line in code.strip().splitlines())
    script = f"""
import sys, json, os
sys.modules["llm2clip"] = None
import numpy as np
from PIL import Image

FOLDERS, PHOTOS, TEXTS = json.loads(sys.argv[1])
images = [Image.open(p).convert("RGB") for p in PHOTOS]

def run(FOLDER, found):
{body}

filled = {{}}
for name, folder in FOLDERS.items():
    run(folder, found := {{}})
    filled |= {{f"{{name}}/{{key}}": value for key, value in found.items()}}
np.savez(sys.argv[2], **filled)
"""
    given = json.dumps([{name: str(folder) for name, folder in folders.items()}, [str(p) for p in photos], TEXTS])
    done = subprocess.run(
        [sys.executable, "-c", script, given, str(out / "found.npz")],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HOME": str(out / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, np.ndarray]] = {name: {} for name in folders}
    for key, value in np.load(out / "found.npz").items():
        name, _, what = key.rpartition("/")
        found[name][what] = value
    return found


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "template": {"text_template": "<|user|>Caption:\n{caption}<|end|>"},
    "causal, last token": {"text_bidirectional": False, "text_pooling": "lasttoken"},
    "truncated, projection bias": {"text_dim": 16, "projection_bias": True, "family": "gemma3_text"},
    "clip": {"tower": "clip_vision_model"},
    "clip at another size": {"tower": "clip_vision_model", "size": 48},
    "siglip": {"tower": "siglip_vision_model", "family": "qwen3"},
    "dinov2": {"tower": "dinov2"},
}


def model_of(case: str, folder: Path) -> LLM2CLIP:
    options = dict(CASES[case])
    kind, size = options.pop("tower", None), options.pop("size", 32)
    folder.mkdir()
    return make(folder, hf_tower(folder, kind, size) if kind else timm_tower(), **options)


Opened = dict[str, tuple[LLM2CLIP, dict[str, np.ndarray]]]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory, photos: list[Path]) -> Opened:
    """Every case with what transformers and sentence-transformers make of it."""
    root = tmp_path_factory.mktemp("exports")
    models = {case: model_of(case, root / case) for case in CASES}
    for case, model in models.items():
        export_model(model, "sentence-transformers", root / case / "out")
    found = alone(
        """
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(FOLDER)
with torch.no_grad():
    tokens = processor(text=TEXTS, padding=True, truncation=True, return_tensors="pt")
    pixels = processor(images=images, return_tensors="pt")
    found["texts"] = model.get_text_features(**tokens).pooler_output.numpy()
    found["images"] = model.get_image_features(**pixels).pooler_output.numpy()
    found["logits"] = model(**tokens, **pixels).logits_per_image.numpy()
st = SentenceTransformer(FOLDER, trust_remote_code=True, device="cpu")
found["st_texts"], found["st_images"] = st.encode(TEXTS), st.encode(images)
found["one"] = st.encode(TEXTS[1])
""",
        {case: root / case / "out" for case in CASES},
        photos,
        root,
    )
    return {case: (model, found[case]) for case, model in models.items()}


@pytest.mark.parametrize("case", CASES)
def test_transformers_and_sentence_transformers(case: str, opened: Opened, photos: list[Path]) -> None:
    model, found = opened[case]
    texts, images = model.encode_text(TEXTS).numpy(), model.encode_image(photos).numpy()
    np.testing.assert_allclose(found["texts"], texts, atol=2e-5)
    np.testing.assert_allclose(found["st_texts"], texts, atol=2e-5)
    np.testing.assert_allclose(found["one"], texts[1], atol=2e-5)
    for name in ("images", "st_images"):  # transformers resizes with other rounding
        assert ((found[name] * images).sum(1) > 0.999).all(), (found[name] * images).sum(1)
    np.testing.assert_allclose(found["logits"], images @ texts.T * np.exp(2.5), atol=0.1)


def test_the_bare_tower(tmp_path: Path, photos: list[Path]) -> None:
    towers = {kind: hf_tower(tmp_path, kind) for kind in ("clip_vision_model", "siglip_vision_model", "dinov2")}
    towers["timm"] = timm_tower(32)
    for kind, tower in towers.items():
        (tmp_path / "of" / kind).mkdir(parents=True)
        export_model(make(tmp_path / "of" / kind, tower), "vision", tmp_path / "of" / kind / "out")
    found = alone(
        """
import torch
from transformers import AutoModel
model, report = AutoModel.from_pretrained(FOLDER, output_loading_info=True)
assert not report["missing_keys"] and not report["unexpected_keys"], report
found["kind"] = type(model).__name__
pixels = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
with torch.no_grad():
    out = model.eval()(pixel_values=pixels)
found["pooled"], found["patches"] = out.pooler_output.numpy(), out.last_hidden_state.numpy()
""",
        {kind: tmp_path / "of" / kind / "out" for kind in towers},
        photos,
        tmp_path,
    )
    pixels = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
    kinds = ("CLIPVisionModel", "SiglipVisionModel", "Dinov2Model", "TimmWrapperModel")
    for kind, (name, tower) in zip(kinds, towers.items(), strict=True):
        with torch.no_grad():
            expected = tower(pixels * tower.std + tower.mean).numpy()
        np.testing.assert_allclose(found[name]["pooled"], expected, atol=1e-4, rtol=1e-3)
        assert str(found[name]["kind"]) == kind and found[name]["patches"].ndim >= 3


def test_onnx(tmp_path: Path, photos: list[Path]) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    models = {case: model_of(case, tmp_path / case) for case in ("template", "clip")}
    for case, model in models.items():
        lines = export_model(model, "onnx", tmp_path / case / "out", int8=case == "clip")
        assert len(lines) == (4 if case == "clip" else 2)
        assert all("PyTorch's vectors 1.0000" in line or "int8" in line for line in lines)
    use = (tmp_path / "clip/out/USE.md").read_text().split("```python\n")[1].rsplit("```", 1)[0]
    use = use.replace('["a long description ..."]', "TEXTS[:3]").replace("pixels = ...", "pixels = PIXELS")
    assert use == (tmp_path / "template/out/USE.md").read_text().split("```python\n")[1].rsplit("```", 1)[0].replace(
        '["a long description ..."]', "TEXTS[:3]"
    ).replace("pixels = ...", "pixels = PIXELS")
    found = alone(
        "import numpy as np\nos.chdir(FOLDER)\n"
        "size = json.load(open('preprocessor_config.json'))['crop_size']['height']\n"
        f"PIXELS = (np.arange(5 * 3 * size ** 2) % 251).astype(np.uint8).reshape(5, 3, size, size)\n{use}\n"
        "found['texts'], found['images'], found['pixels'] = texts, images, PIXELS",
        {case: tmp_path / case / "out" for case in models},
        photos,
        tmp_path,
    )
    for case, model in models.items():
        np.testing.assert_allclose(found[case]["texts"], model.encode_text(TEXTS[:3]).numpy(), atol=1e-4)
        with torch.no_grad():
            images = model(pixels=torch.from_numpy(found[case]["pixels"]))[0]
        np.testing.assert_allclose(found[case]["images"], images.numpy(), atol=1e-4)


def test_open_clip(tmp_path: Path, photos: list[Path]) -> None:
    pytest.importorskip("open_clip")
    tower = timm_tower()
    tower.config["preprocess"]["crop_pct"] = 1.0
    tower.config["preprocess"]["size"] = {"shortest_edge": tower.preprocess.size}
    model = make(tmp_path, VisionTower.from_config(tower.config))
    export_model(model, "open_clip", tmp_path / "out")
    found = alone(
        """
import open_clip, torch
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:" + FOLDER)
model.eval()
with torch.no_grad():
    found["images"] = model.encode_image(torch.stack([preprocess(i) for i in images]), normalize=True).numpy()
    found["texts"] = model.encode_text(torch.zeros(1, 8, dtype=torch.long)).numpy()
""",
        {"it": tmp_path / "out"},
        photos,
        tmp_path,
    )["it"]
    images = model.encode_image(photos).numpy()
    assert ((found["images"] * images).sum(1) > 0.999).all()
    assert np.isnan(found["texts"]).all()
    with pytest.raises(ValueError, match="towers of timm"):
        export_model(make(tmp_path, hf_tower(tmp_path, "clip_vision_model")), "open_clip", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_refused(tmp_path: Path) -> None:
    model = make(tmp_path, timm_tower(), text_pooling="max")
    with pytest.raises(ValueError, match="pools by 'max'"):
        export_model(model, "transformers", tmp_path / "out")
    odd = make(tmp_path / "odd", timm_tower())
    odd.encoder.st.append(Dense(32, 32, bias=True))  # trained after the pooling
    with pytest.raises(ValueError, match="has a part that the form has no place for"):
        export_model(odd, "transformers", tmp_path / "out")
    short = make(tmp_path / "short", timm_tower())
    short.encoder.st.max_seq_length = 12
    export_model(short, "transformers", tmp_path / "short out")
    with pytest.raises(ValueError, match="there is no form 'tf'"):
        export_model(model, "tf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError):
        export_model(model, "vision", tmp_path / "out")


def test_the_command_the_card_and_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make(tmp_path, timm_tower()).save_pretrained(tmp_path / "run/model")
    (tmp_path / "run/recipe.yaml").write_text("data:\n- /home/somebody/photos.csv\n- hf:some/name\nalign:\n  lr: 0.1\n")
    (tmp_path / "run/report.md").write_text(
        "# Report\n\n## Figures\n\n```\n# llm2clip fit /home/somebody/photos.csv\n```\n\nR@1 is 12/34.\n"
    )
    assert main(["export", str(folder), "--to", "vision", "--out", str(tmp_path / "tower")]) == 0
    assert "AutoModel.from_pretrained" in capsys.readouterr().out
    assert main(["export", str(folder), "--to", "vision", "--out", str(tmp_path / "x"), "--int8"]) == 1
    text = render_model_card(folder, "me/finder", "apache-2.0")
    assert text.startswith("---\nlibrary_name: llm2clip\n") and "license: apache-2.0" in text
    assert "somebody" not in text and "photos.csv" in text and "hf:some/name" in text and "12/34" in text
    assert "#### Figures" in text and "\n# llm2clip fit" in text and "test_efficientnet (timm), 76 pixels" in text
    calls: list[tuple[str, dict[str, Any]]] = []

    class Api:
        def __getattr__(self, name: str) -> Any:
            return lambda *args, **given: calls.append((name, given)) or "https://hub/me/finder"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert verb.push_verb(str(folder), "me/finder", True, None) == ["Pushed: https://hub/me/finder"]
    assert [name for name, _ in calls] == ["create_repo", "upload_file", "upload_folder"]
    assert b"me/finder" in calls[1][1]["path_or_fileobj"] and "README.md" in calls[2][1]["ignore_patterns"]
    with pytest.raises(FileNotFoundError, match="not a model folder"):
        verb.push_verb(str(tmp_path), "me/finder", True, None)


def test_images_are_read_as_ours(tmp_path: Path, photos: list[Path]) -> None:
    """The exported preparation of pictures is that of the tower, to what rounding leaves."""
    from transformers import AutoImageProcessor

    model = make(tmp_path, timm_tower())
    export_model(model, "transformers", tmp_path / "out")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    large = Image.open(photos[0]).convert("RGB").resize((300, 200))
    theirs = processor(images=[large], return_tensors="pt")["pixel_values"][0]
    from llm2clip.data.images import EvalTransform, load_image

    ours = (EvalTransform(model.tower.preprocess)(load_image(large)).float() / 255 - model.tower.mean) / model.tower.std
    assert theirs.shape == ours.shape and (theirs - ours).abs().mean() < 0.02
