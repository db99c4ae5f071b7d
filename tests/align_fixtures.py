"""Tiny models, data and runs for the tests of align."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conftest import Killed
from llm2clip.config import AlignConfig
from llm2clip.data.records import Record, open_records
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.table import RecordTable
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.model_folder import AdapterConfig, LLM2CLIPConfig
from llm2clip.models.text.caption_encoder import CaptionEncoder
from llm2clip.models.vision.vision_tower import VisionTower
from llm2clip.store.encode import embed
from llm2clip.store.store import EmbeddingStore
from llm2clip.train.align import align
from llm2clip.train.loop import StepLogger

ALIGN = AlignConfig(
    embed_dim=12,
    epochs=2,
    batch_size=10,
    save_steps=2,
    workers=0,
    image_size=64,
    eval_steps=0,
    captions_per_image=2,
)


def read_split(images: Path, split: str = "train") -> list[Record]:
    """Return the records of one split of the `image_folder` fixture: 30 for training, 6 held out."""
    return [record for record in open_records(images / "captions.jsonl") if record.split == split]


def make_store(images: Path, llm: Path, folder: Path) -> EmbeddingStore:
    """Embed all captions of the `image_folder` fixture."""
    encoder = CaptionEncoder.from_pretrained(llm, device="cpu")
    return embed([text for record in open_records(images / "captions.jsonl") for text in record.texts], encoder, folder)


@pytest.fixture(scope="module")
def records(image_folder: Path) -> list[Record]:
    return read_split(image_folder)


@pytest.fixture(scope="module")
def store(image_folder: Path, llm: Path, tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    return make_store(image_folder, llm, tmp_path_factory.mktemp("embedded") / "store")


def fresh_model(config: AlignConfig = ALIGN, tower: str = "test_vit", dropout: float = 0.0) -> LLM2CLIP:
    """Return a random model, the same on every call."""
    torch.manual_seed(0)
    vision_tower = VisionTower.from_pretrained(f"timm:{tower}", pretrained=False, image_size=64)
    for module in vision_tower.backbone.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    model_config = LLM2CLIPConfig(
        vision_tower.config,
        text_dim=32,
        embed_dim=12,
        adapter=AdapterConfig(depth=1),
        logit_bias=config.loss == "sigmoid",
    )
    return LLM2CLIP(model_config, vision_tower)


def run_align(
    records: list[Record],
    store: EmbeddingStore,
    run_dir: Path,
    config: AlignConfig = ALIGN,
    validate: Any = None,
    **model_options: Any,
) -> LLM2CLIP:
    """Train a fresh model; any number of images may be undecodable."""
    model = fresh_model(config, **model_options)
    table = RecordTable.from_records(records)
    return align(table, store, model, config, run_dir, SkipLog(max_skipped=1.0), validate)


@pytest.fixture
def train(records: list[Record], store: EmbeddingStore) -> Any:
    """Return `run_align` for the records and the store of the other fixtures."""
    return partial(run_align, records, store)


@contextmanager
def killed_after(steps: int) -> Iterator[None]:
    """Expect a run of `align` or `distill` to be killed in the step that follows step `steps`."""
    add = StepLogger.add_step

    def killing_add(self: StepLogger, step: int, *args: Any) -> None:
        if step > steps:
            raise Killed
        add(self, step, *args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(StepLogger, "add_step", killing_add)
        yield
