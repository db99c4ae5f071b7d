"""Write formats-X.Y: tiny files in all formats of this release. `tests/test_stored_formats.py` opens them.

    PYTHONPATH=src:tests python tests/stored_format_fixtures.py

Run this once for each release that changes a format, and never change the files of an earlier release. If a format
changes before the release is published, delete the folder and run this again. With the same versions of the
dependencies, the files are always the same. expected.json contains embeddings that the models compute.
"""

import dataclasses
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

from caption_fixtures import FixedCaptioner, make_photos
from conftest import make_tower, save_tokenizer
from llm2clip import __version__
from llm2clip.caption.options import CaptionOptions, Prompt
from llm2clip.caption.run import caption_images
from llm2clip.config import DistillConfig, FitConfig
from llm2clip.data.images import load_image
from llm2clip.models.dual_encoder import DualEncoder, open_dual_encoder
from llm2clip.models.export import export_model
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.model_folder import AdapterConfig, LLM2CLIPConfig
from llm2clip.models.text.caption_encoder import CaptionEncoder
from llm2clip.models.vision.vision_tower import VisionTower
from llm2clip.runs.checkpoint import CheckpointManager, save_training_state
from llm2clip.runs.output_folder import save_or_check_config
from llm2clip.search.backends import open_backend
from llm2clip.store.encode import embed
from llm2clip.train.distill import build_student_model, load_student
from postgres_fixtures import get_postgres_server
from search_fixtures import index_sources, make_index

FIXTURES = Path(__file__).parent / "fixtures"
POSTGRES_SCHEMA = "stored_index"
CAPTIONS = ["a dog", "two cats in the snow", "a red boat"]
PROMPT = Prompt("one", "short", "Describe the image.")
SIGNATURE = {"lr": 0.1}


def make_layer() -> tuple[nn.Linear, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Return a linear layer with its optimizer and learning rate schedule."""
    torch.manual_seed(0)
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=SIGNATURE["lr"])
    return layer, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def train_layer(layer: nn.Linear, optimizer: torch.optim.Optimizer, schedule: Any, steps: int) -> None:
    for _ in range(steps):
        layer(torch.ones(2)).square().sum().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def make_model(folder: Path, work: Path) -> Path:
    """Save an LLM2CLIP model with a vision transformer and a Llama of one layer each."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 258, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=0)
    LlamaModel(config).save_pretrained(work / "llm")
    save_tokenizer(work / "llm", chat_template=False)
    encoder = CaptionEncoder.from_pretrained(work / "llm", max_length=32, template="a photo: {caption}", device="cpu")
    vit = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 1, "num_heads": 2, "num_classes": 0}
    tower = VisionTower.from_pretrained(str(make_tower(work / "tower", "test_vit", **vit)))
    settings = LLM2CLIPConfig(tower.config, text_dim=8, embed_dim=8, adapter=AdapterConfig(depth=1))
    settings.encoder = encoder.identity()
    model = LLM2CLIP(settings, tower, encoder).eval()
    model.training_images = np.array([1, 2], np.uint64)
    return model.save_pretrained(folder)


def make_student(folder: Path, teacher_folder: Path) -> Path:
    """Save a model with a static student, without training it."""
    teacher = LLM2CLIP.from_pretrained(teacher_folder, device="cpu")
    student = load_student("static", teacher_folder, teacher.config.embed_dim, DistillConfig())
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.normal_()
    return build_student_model(teacher, student).save_pretrained(folder)


def make_exports(folder: Path, model_folder: Path, forms: Sequence[str] = ("sentence-transformers", "vision")) -> None:
    for form in forms:
        export_model(LLM2CLIP.from_pretrained(model_folder, "cpu"), form, folder / f"export-{form}")


def make_stores(folder: Path, model_folder: Path) -> None:
    for dtype in ("float16", "int8"):
        encoder = CaptionEncoder.from_pretrained(model_folder, device="cpu")
        embed(CAPTIONS, encoder, folder / f"store-{dtype}", dtype=dtype, shard_size=2, device=torch.device("cpu"))


def make_captions(photos: Path) -> Path:
    """Run `caption` on a folder of photos. Return the file with the records, next to the folder."""
    records = photos.with_name("captions.jsonl")
    with patch("llm2clip.caption.run.datetime") as clock:
        clock.now.return_value = datetime(2026, 12, 1)
        caption_images([str(photos)], records, FixedCaptioner(), [PROMPT], CaptionOptions())
    for name in ("captions_report.html", "captions_skipped.jsonl"):
        records.with_name(name).unlink()
    return records


def make_checkpoint(folder: Path) -> None:
    """Write a training checkpoint of a linear layer."""
    layer, optimizer, schedule = make_layer()
    train_layer(layer, optimizer, schedule, steps=2)
    checkpoints = CheckpointManager(folder)
    checkpoints.check_signature(SIGNATURE)
    save_training_state(checkpoints.get_checkpoint_path(2), layer, optimizer, schedule)
    checkpoints.commit(2)


def dump_postgres_index(file: Path, records: Path, model: DualEncoder) -> None:
    """Build an index in PostgreSQL, and write the SQL statements that create it."""
    server = get_postgres_server()
    index_sources([records], model, open_backend(server.url(POSTGRES_SCHEMA), write=True))
    command = [server._binaries / "pg_dump", "--inserts", "--no-owner", "--schema", POSTGRES_SCHEMA]
    dump = subprocess.run([*command, server.url("").partition("?")[0]], check=True, capture_output=True, text=True)
    lines = [line for line in dump.stdout.splitlines() if line and not line.startswith(("--", "\\"))]
    file.write_text("\n".join([*lines, ""]))


def shrink_database(file: Path) -> None:
    """Write an SQLite file with small pages and without a write-ahead log."""
    small = file.with_name("small")
    with closing(sqlite3.connect(file)) as db:
        db.execute("PRAGMA page_size = 512")
        db.execute("VACUUM INTO ?", (str(small),))
    for path in file.parent.glob(f"{file.name}*"):
        path.unlink()
    small.rename(file)


def main() -> None:
    torch.set_num_threads(1)
    target = FIXTURES / f"formats-{__version__.rpartition('.')[0]}"
    if target.exists():
        sys.exit(f"{target} exists. The files of a release must not be changed")
    work = Path(tempfile.gettempdir()) / "llm2clip-formats"  # an index contains the paths of its images
    if work.exists():
        sys.exit(f"{work} exists. Delete it")
    out = work / "out"
    photos = make_photos(out / "photos", 3, side=12)
    for photo in photos.iterdir():
        os.utime(photo, (10**9, 10**9))
    model_folder = make_model(out / "model", work)
    make_student(out / "student", model_folder)
    make_stores(out, model_folder)
    model = open_dual_encoder(str(model_folder), "cpu")
    records = make_captions(photos)
    model = dataclasses.replace(model, name="model")
    make_index(out / "index", records, model)
    dump_postgres_index(out / "index-postgres.sql", records, model)
    save_or_check_config({"data": ["photos/captions.jsonl"], **dataclasses.asdict(FitConfig())}, out / "run")
    make_checkpoint(out / "run/align/checkpoints")
    make_exports(out, model_folder)
    make_exports(out, model_folder, ["onnx"])
    for database in list(out.rglob("*.sqlite")):
        shrink_database(database)
    for lock in list(out.rglob("*.lock")):
        lock.unlink()
    student = open_dual_encoder(str(out / "student"), "cpu")
    values = {
        "images": model.encode_images([model.transform(load_image(photo)) for photo in sorted(photos.iterdir())]),
        "texts": model.encode_texts(CAPTIONS),
        "student": student.encode_texts(CAPTIONS),
    }
    expected = {name: tensor.numpy().round(5).tolist() for name, tensor in values.items()}
    (out / "expected.json").write_text(json.dumps(expected))
    shutil.copytree(out, target)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
