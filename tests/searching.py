"""A random model, and an index of generated pictures by it, for the tests of search, server and page."""

from __future__ import annotations

from pathlib import Path

import torch

from conftest import make_llm
from llm2clip.data.skips import SkipLog
from llm2clip.models.dual import DualEncoder
from llm2clip.models.llm2clip import LLM2CLIP, LLM2CLIPConfig
from llm2clip.models.text import CaptionEncoder
from llm2clip.models.vision import VisionTower
from llm2clip.search.build import index
from llm2clip.search.local import LocalIndex


def make_model(folder: Path) -> Path:
    """A random model with a caption encoder, in its folder."""
    torch.manual_seed(0)
    tower = VisionTower.from_pretrained("test_efficientnet", image_size=32, pretrained=False)
    encoder = CaptionEncoder.from_pretrained(make_llm(folder / "llm"))
    model = LLM2CLIP(LLM2CLIPConfig(tower=tower.config, text_width=encoder.width, width=16), tower, encoder)
    model.config.encoder = encoder.identity()
    return model.eval().save_pretrained(folder / "model")


def make_index(folder: Path, pictures: Path, model: DualEncoder) -> LocalIndex:
    """The index of a folder of pictures."""
    engine = LocalIndex(folder, write=True)
    index([str(pictures)], model, engine, SkipLog(None, 1.0))
    return engine
