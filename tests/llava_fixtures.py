"""Models, conversations and loaders shared by the LLaVA tests."""

from pathlib import Path
from typing import Any

import torch

from conftest import make_llm
from llm2clip.data.records import open_records
from llm2clip.llava.build import build_llava
from llm2clip.llava.conversations import Conversation, make_captioning_conversations
from llm2clip.models.vision.vision_tower import VisionTower
from test_export import hf_tower, timm_tower


def make_vision_tower(kind: str, folder: Path) -> VisionTower:
    """Return a random tower: "timm", "timm transformer", "resized clip", or a model type of transformers."""
    if kind == "timm":
        return timm_tower(64)
    if kind == "timm transformer":
        torch.manual_seed(0)
        return VisionTower.from_pretrained("test_vit", image_size=64, pretrained=False)
    if kind == "resized clip":
        return hf_tower(folder, "clip_vision_model", 48)
    return hf_tower(folder, kind)


def build_tiny_llava(folder: Path) -> Path:
    """Build a LLaVA model from a random timm tower and a random LLM with two layers, and return its folder."""
    return build_llava(timm_tower(64), str(make_llm(folder / "llm", layers=2)), folder / "built")


def make_conversations(image_folder: Path) -> list[Conversation]:
    """Return twenty conversations with an image and one without."""
    records = list(open_records(f"{image_folder / 'captions.jsonl'}@train"))
    return [*make_captioning_conversations(records)[:20], Conversation("text", None, (("Hello?", "Hello."),))]


def load_model(folder: Path) -> tuple[Any, Any]:
    """Return the model in a folder and its processor."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    return AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = load_model(folder)[0].state_dict()
    return weights


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
