"""Model cards in Markdown with a model's architecture, usage, evaluation and training config."""

import re
from pathlib import Path
from typing import Any

import yaml

from llm2clip.io_utils import atomic_write_text, read_json
from llm2clip.models.pretrained import ASSETS
from llm2clip.runs.output_folder import CONFIG_FILE, ENCODER_CHOICE_FILE

# Example code for the model card, keyed by `model_type` in config.json.
USAGE = {
    "llm2clip": """```python
from llm2clip import LLM2CLIP

model = LLM2CLIP.from_pretrained("{name}")
images = model.encode_image(["cat.jpg"])                    # (N, {embed_dim}) float32, L2-normalised
texts = model.encode_text(["a long description ..."])
scores = model.similarity(texts, images)
```""",
    "llm2clip_export": """```python
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{name}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)
texts = model.get_text_features(**processor(text=["a long description ..."], padding=True, return_tensors="pt"))
```""",
}
INTRODUCTION = (
    "This LLM2CLIP model (arXiv 2411.04997) combines a vision tower and a pretrained language model, which is the text "
    "tower, in a shared embedding space. You can search images with words, sentences or paragraphs."
)
# Introductions for exported parts of an LLM2CLIP model, keyed by `pipeline_tag`.
INTRODUCTIONS = {
    "image-feature-extraction": "Vision tower of an LLM2CLIP model (arXiv 2411.04997). It returns image features.",
    "sentence-similarity": "Caption encoder for LLM2CLIP models (arXiv 2411.04997). It returns embeddings of texts.",
}
PROVENANCE = (
    "Third parties uploaded these packages. The checksums guarantee that all users get the same files, but not that "
    "the files are identical to the original publishers' files."
)
LIMITATIONS = (
    "The model reproduces the errors and biases of the images and captions that it was trained on. The licenses of the "
    "vision tower, the language model and the training data apply to its use."
)


def write_model_card(folder: Path, name: str) -> None:
    """Write a model card (see `render_model_card`) to a model folder, replacing any existing README.md."""
    atomic_write_text(folder / "README.md", render_model_card(folder, name))


def render_model_card(folder: Path, name: str, license: str | None = None) -> str:
    """Render the model card for a model folder as Markdown with YAML front matter.

    If the folder is RUN/model, the model card includes the training config RUN/config.yaml and the report
    RUN/report.md. Missing files are skipped, and absolute paths are shortened to file names. `license` is a hub license
    identifier.
    """
    config_file = folder / "config.json"
    config: dict[str, Any] = read_json(config_file) if config_file.is_file() else {}
    model_type = config.get("model_type", "")
    embed_dim = config.get("embed_dim")
    fields = _build_hub_fields(folder, model_type, license)
    sections = [f"---\n{yaml.safe_dump(fields, sort_keys=False)}---", f"# {name}"]
    sections.append(INTRODUCTIONS.get(fields["pipeline_tag"], INTRODUCTION))
    if config.get("tower"):
        sections.append(f"## Architecture\n\n{_render_architecture_table(config, embed_dim)}")
    if model_type in USAGE:
        sections.append(f"## Usage\n\n{USAGE[model_type].format(name=name, embed_dim=embed_dim)}")
    if model_type == "llm2clip":
        sections += _render_asset_section(folder.parent) + _render_training_sections(folder.parent)
    sections.append(f"## Limitations\n\n{LIMITATIONS}")
    return "\n\n".join(sections) + "\n"


def _build_hub_fields(folder: Path, model_type: str, license: str | None) -> dict[str, Any]:
    task = "zero-shot-image-classification"
    if (folder / "text.onnx").is_file():
        library = "onnx"
    elif model_type == "llm2clip":
        library = "llm2clip"
    elif (folder / "modules.json").is_file() and model_type not in USAGE:
        library, task = "sentence-transformers", "sentence-similarity"
    else:
        library = "transformers"
        if model_type not in USAGE:  # exported vision tower without a text tower
            task = "image-feature-extraction"
    fields: dict[str, Any] = {
        "library_name": library,
        "pipeline_tag": task,
        "tags": ["llm2clip", "image-retrieval", "clip", "arxiv:2411.04997"],
    }
    if license:
        fields["license"] = license
    return fields


def _render_architecture_table(config: dict[str, Any], embed_dim: int | None) -> str:
    tower = config["tower"]
    architecture = tower.get("architecture")  # a name for timm towers, a config dict for transformers towers
    if not isinstance(architecture, str):
        architecture = (architecture or {}).get("model_type")
    image_size = (tower.get("preprocess") or {}).get("crop_size", {}).get("height") or tower.get("image_size")
    encoder, llm = config.get("encoder") or {}, config.get("text") or {}
    depth = config["adapter"]["depth"]
    rows = {
        "vision tower": f"{architecture} ({tower.get('library')}), {image_size} pixels",
        "LLM layers": encoder.get("layers") or llm.get("num_hidden_layers"),
        "bidirectional attention": encoder.get("bidirectional", not llm.get("is_causal", True)),
        "caption embedding": config.get("text_dim"),
        "adapter": f"{depth} residual blocks" if depth else "none (images are embedded in the caption encoder's space)",
        "shared embedding": embed_dim,
        "truncated sizes trained (Matryoshka)": ", ".join(map(str, config.get("matryoshka_dims", ()))) or None,
    }
    lines = [f"| {label} | {value} |" for label, value in rows.items() if value is not None]
    return "\n".join(["| | |", "|---|---|", *lines])


def _render_asset_section(run: Path) -> list[str]:
    """Render the licenses and sources of the pretrained models that llm2clip downloaded for a run."""
    config_file = run / CONFIG_FILE
    if not config_file.is_file():
        return []
    config = yaml.safe_load(config_file.read_text(encoding="utf-8")) or {}
    encoder, choice = config.get("encoder") or {}, run / ENCODER_CHOICE_FILE
    if choice.is_file():
        encoder = read_json(choice)["encoder"]
    names = [encoder.get("path"), (config.get("align") or {}).get("tower")]
    lines = []
    for asset in (ASSETS[name] for name in names if name in ASSETS):
        original = f" Original model: {asset.hub_id}." if asset.hub_id else ""
        wheels = ", ".join(f"{wheel.package} {wheel.version} (SHA-256 {wheel.sha256})" for wheel in asset.wheels)
        lines.append(f"- {asset.description}: {asset.license}. PyPI packages: {wheels}.{original}")
    if not lines:
        return []
    return ["## Pretrained parts\n\n" + "\n".join(lines) + f"\n\n{PROVENANCE}"]


def _render_training_sections(run: Path) -> list[str]:
    sections = []
    report, config = run / "report.md", run / CONFIG_FILE
    if report.is_file():
        sections.append("## Evaluation\n\n" + _shorten_paths(_demote_headings(report.read_text(encoding="utf-8"))))
    if config.is_file():
        text = _shorten_paths(config.read_text(encoding="utf-8").strip())
        sections.append(f"## Training config\n\n```yaml\n{text}\n```")
    return sections


def _demote_headings(report: str) -> str:
    """Demote a report's headings by two levels, and remove the title and the link to the plots."""
    lines, in_code = [], False
    for line in report.splitlines():
        if line.startswith("```"):
            in_code = not in_code
        if in_code:
            lines.append(line)
        elif not line.startswith(("# ", "Plots and ")):
            lines.append("##" + line if line.startswith("#") else line)
    return "\n".join(lines).strip()


def _shorten_paths(text: str) -> str:
    """Shorten absolute paths to file names. For example, /home/user/photos.csv becomes photos.csv."""
    quoted = re.sub(r"(['\"])(?:file://)?/[^'\"\n]*/([^'\"/\n]+)\1", r"\1\2\1", text)
    return re.sub(r"(?<![\w.:/])(?:file://)?/(?:[^\s/`'\"]+/)+", "", quoted)
