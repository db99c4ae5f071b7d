"""Model config and layout of a model folder.

MODEL/
  config.json                model config (`LLM2CLIPConfig`)
  model.safetensors          weights of the vision tower, the projection and the adapter
  preprocessor_config.json   image preprocessing, in the transformers format
  text/                      caption encoder, in the sentence-transformers format
  README.md                  model card
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm2clip.data.image_facts import TRAINING_IMAGES_FILE
from llm2clip.io_utils import atomic_write_text, read_json_object
from llm2clip.models.loading import download_hub_snapshot
from llm2clip.models.prompts import NO_TEMPLATES, QueryTemplates
from llm2clip.runs.output_folder import check_format_version

# Glob patterns of the model files to download from the hub, excluding pickle files and code.
MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.md", TRAINING_IMAGES_FILE)
FORMAT_VERSION = 1  # version of the model folder layout
# Layers of an adapter's residual block: name in llm2clip -> name in official checkpoints.
_OFFICIAL_NAMES = {"norm": "ln", "up": "fn.0", "down": "fn.3"}


@dataclass(frozen=True)
class AdapterConfig:
    """Architecture of the text adapter, as saved in the model config (see `Adapter`)."""

    depth: int = 4  # number of residual blocks (4 in the LLM2CLIP paper); 0 means no adapter
    expansion: int = 2  # ratio of a residual block's hidden size to its input size
    normalize_input: bool = True

    @classmethod
    def from_official(
        cls, names: Collection[str], get_shape: Callable[[str], tuple[int, ...]], normalize_input: bool
    ) -> tuple[AdapterConfig, int, int]:
        """Infer the architecture from an official checkpoint. Return (adapter config, input size, output size).

        In official checkpoints, the adapter is an nn.Sequential of residual blocks, a LayerNorm and a linear layer, so
        the tensor names start with a layer index. `names` are the tensor names without the adapter's prefix.
        """
        depth = len({name.partition(".")[0] for name in names if ".ln." in name})
        text_dim = get_shape(f"{depth}.weight")[0]
        hidden = get_shape("0.fn.0.weight")[0] if depth else 2 * text_dim
        embed_dim = get_shape(f"{depth + 1}.weight")[0]
        return cls(depth, hidden // text_dim, normalize_input), text_dim, embed_dim

    def get_official_name(self, name: str) -> str:
        """Return the name of an adapter tensor in official checkpoints."""
        *block, layer, kind = name.split(".")  # blocks.N.LAYER.weight, norm.weight, out.weight, ...
        if block:
            return f"{block[1]}.{_OFFICIAL_NAMES[layer]}.{kind}"
        return f"{self.depth + ('norm', 'out').index(layer)}.{kind}"


@dataclass
class LLM2CLIPConfig:
    """Architecture of an LLM2CLIP model.

    Attributes:
        tower: Vision tower config, as in `VisionTower.config`.
        text_dim: Dimension of the caption embeddings, which are the adapter's input.
        embed_dim: Dimension of the shared embedding space.
        projection: True if the model has an image projection. Without a projection, the tower's features are the image
            embeddings, and `embed_dim` must equal the tower's feature dimension.
        logit_bias: True if the model has a learned logit bias, as the sigmoid loss requires.
        matryoshka_dims: Truncated embedding sizes that the model was trained for, in addition to `embed_dim`.
        encoder: `identity()` of the caption encoder that the adapter was trained with, or an empty dict if unknown.
        query_templates: Prompt templates for short queries in search and evaluation. Not used by `encode_text`.
    """

    tower: dict[str, Any]
    text_dim: int
    embed_dim: int = 1280  # as in the LLM2CLIP paper
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    projection: bool = True
    projection_bias: bool = False
    logit_bias: bool = False
    matryoshka_dims: list[int] = field(default_factory=list)
    encoder: dict[str, Any] = field(default_factory=dict)
    query_templates: QueryTemplates = NO_TEMPLATES

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LLM2CLIPConfig:
        """Create a config from the contents of config.json. Raise ValueError if the query templates are invalid."""
        fields = {f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values}
        if "adapter" in fields:
            fields["adapter"] = AdapterConfig(**fields["adapter"])
        if "query_templates" in fields:
            fields["query_templates"] = QueryTemplates.from_dict(fields["query_templates"])
        return cls(**fields)

    def identity(self) -> dict[str, Any]:
        """Return a dict of all fields that affect the embeddings."""
        fields = dataclasses.asdict(self)
        del fields["query_templates"], fields["matryoshka_dims"]
        return fields


def is_model_folder(path: str | Path) -> bool:
    """Return True if `path` is a folder written by `LLM2CLIP.save_pretrained`."""
    try:
        return read_json_object(Path(path) / "config.json").get("model_type") == "llm2clip"
    except (OSError, ValueError):
        return False


def read_model_config(folder: Path, source: str | Path) -> dict[str, Any]:
    """Read the config.json of a model folder. `source` is the path or hub id to show in errors.

    Raises:
        FileNotFoundError: The folder has no config.json.
        ValueError: The file is corrupt or does not belong to an llm2clip model.
        FormatVersionError: The model folder has a different format version.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{source} is not a model folder: it has no config.json")
    values = read_json_object(file)
    if values.get("model_type") != "llm2clip":
        raise ValueError(f"{file}: model_type must be 'llm2clip' (got {values.get('model_type')!r})")
    advice = "Create the model again with `llm2clip align` or `llm2clip convert`"
    check_format_version(file, values.get("format_version"), FORMAT_VERSION, advice)
    return values


def save_query_templates(folder: Path, templates: QueryTemplates) -> None:
    """Replace the query templates in a saved model's config."""
    file = folder / "config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    values["query_templates"] = dataclasses.asdict(templates)
    atomic_write_text(file, json.dumps(values, indent=1))


def find_model_folder(path: str | Path) -> Path:
    """Return a model's local folder. Download hub models. Raise FileNotFoundError if the download fails."""
    return Path(path) if Path(path).is_dir() else download_hub_snapshot(str(path), MODEL_FILES)
