"""A model card: what a model is made of, how it was trained, what it measured, how it is loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

LOAD = {
    "llm2clip": """```python
from llm2clip import LLM2CLIP

model = LLM2CLIP.from_pretrained("{name}")
images = model.encode_image(["cat.jpg"])                    # (N, {width}) float32, L2-normalised
texts = model.encode_text(["a long description ..."])
scores = model.similarity(texts, images)
```""",
    "llm2clip_export": """```python
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{name}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{name}")
texts = model.get_text_features(**processor(text=["a long description ..."], padding=True, return_tensors="pt"))
```""",
}


def render_model_card(folder: Path, name: str, licence: str | None = None) -> str:
    """The card of a model folder, markdown with front matter. The settings and the report of the run that made it are
    in it where they lie beside it (RUN/recipe.yaml, RUN/report.md).

    Args:
        folder: a model folder of ours, or an exported one.
        name: what it is called where it is loaded from.
        licence: as the hub calls it; what the weights and the data that it was made of allow is for its maker to say.
    """
    file = folder / "config.json"
    config: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    kind = config.get("model_type", "")
    library, task = "transformers", "image-feature-extraction"  # a bare tower
    if kind in LOAD or (folder / "open_clip_config.json").is_file() or (folder / "text.onnx").is_file():
        task = "zero-shot-image-classification"
        library = "llm2clip" if kind == "llm2clip" else "transformers"
        library = "open_clip" if (folder / "open_clip_config.json").is_file() else library
        library = "onnx" if (folder / "text.onnx").is_file() else library
    front: dict[str, Any] = {
        "library_name": library,
        "pipeline_tag": task,
        "tags": ["llm2clip", "image-retrieval", "clip", "arxiv:2411.04997"],
    }
    if licence:
        front["license"] = licence
    parts = [f"---\n{yaml.safe_dump(front, sort_keys=False)}---", f"# {name}"]
    parts.append(
        "A vision tower and a large language model as its text tower, in one space (LLM2CLIP, arXiv 2411.04997), made "
        "with llm2clip. It finds pictures by words, sentences and paragraphs."
    )
    if tower := config.get("tower"):
        parts.append(f"## What it is made of\n\n{_table(_made_of(config, tower))}")
    embed_dim = config.get("embed_dim", config.get("width"))  # version 0.1 and exported models call it width
    if kind in LOAD:
        parts.append(f"## Load it\n\n{LOAD[kind].format(name=name, width=embed_dim)}")
    recipe, report = (folder.parent / beside for beside in ("recipe.yaml", "report.md"))
    if kind == "llm2clip" and report.is_file():
        parts.append("## What it measured\n\n" + _public(_lowered(report.read_text(encoding="utf-8"))))
    if kind == "llm2clip" and recipe.is_file():
        parts.append(f"## How it was trained\n\n```yaml\n{_public(recipe.read_text().strip())}\n```")
    parts.append(
        "## Before you use it\n\nIt learned from the pictures and captions that it was shown, with what they get wrong "
        "about people. Licences of the vision tower, the language model and the data bind its use."
    )
    return "\n\n".join(parts) + "\n"


def _made_of(config: dict[str, Any], tower: dict[str, Any]) -> list[tuple[str, Any]]:
    """Rows of what a model is made of, as far as its config says."""
    architecture = tower.get("architecture")
    named = architecture if isinstance(architecture, str) else (architecture or {}).get("model_type")
    size = (tower.get("preprocess") or {}).get("crop_size", {}).get("height") or tower.get("image_size")
    encoder, text = config.get("encoder") or {}, config.get("text") or {}
    rows = [
        ("vision tower", f"{named} ({tower.get('library')}), {size} pixels"),
        ("language model's vectors", config.get("text_dim", config.get("text_width"))),
        ("language model's blocks", encoder.get("layers") or text.get("num_hidden_layers")),
        ("reads in both directions", encoder.get("bidirectional", not text.get("is_causal", True))),
        ("adapter", f"{config.get('adapter_depth')} residual blocks"),
        ("shared space", f"{config.get('embed_dim', config.get('width'))} wide"),
    ]
    return [(what, value) for what, value in rows if value is not None]


def _table(rows: list[tuple[str, Any]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows)])


def _public(text: str) -> str:
    """Without the folders that things lay in: /home/somebody/photos.csv is photos.csv."""
    quoted = re.sub(r"(['\"])(?:file://)?/[^'\"\n]*/([^'\"/\n]+)\1", r"\1\2\1", text)
    return re.sub(r"(?<![\w.:/])(?:file://)?/(?:[^\s/`'\"]+/)+", "", quoted)


def _lowered(report: str) -> str:
    """A report's headings two levels lower, without its title; what is fenced stays as it is."""
    lines, fenced = [], False
    for line in report.splitlines():
        fenced ^= line.startswith("```")
        if line.startswith(("# ", "Plots and pictures are in ")) and not fenced:
            continue  # of the report as a file
        lines.append("##" + line if line.startswith("#") and not fenced else line)
    return "\n".join(lines).strip()
