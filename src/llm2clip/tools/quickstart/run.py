"""The `quickstart` command, which trains an emoji search engine with an LLM text tower.

Training takes minutes on two CPU cores, because the models and the data set are small: the first 12 layers of
SmolLM2-135M, EfficientNet-Lite0, and OpenMoji's images with their names. The command downloads the models and data,
runs `fit`, and draws the trained model's search results.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Literal

from llm2clip.config import AlignConfig, EmbedConfig, EncoderConfig, EvaluateConfig, FitConfig, TuneConfig
from llm2clip.data.records import open_records
from llm2clip.io_utils import atomic_write_jsonl, read_jsonl
from llm2clip.models.hub.pretrained import resolve_pretrained
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.pipeline import fit
from llm2clip.runs.ranks import print_once, process_state
from llm2clip.tools.quickstart.figure import draw_results
from llm2clip.tools.quickstart.openmoji import prepare_emoji_records

QUERY_LANGUAGES = ("zh", "es", "ja")
QUERIES = (
    "a big animal with thick fur and long tusks that lived in the ice age",
    "a yellow face that looks sad and worried",
    "a yellow vehicle that takes people through the city",
    "a red heart broken in two pieces",
    "汽车",
    "月亮",
    "corazón azul",
    "鳥",
)


def quickstart(out: Path, offline: bool = False, hub: bool = False) -> list[str]:
    """Download models and data, train a model, and draw its search results in `out/quickstart.png`.

    An interrupted run can be resumed.

    Args:
        out: Run directory.
        offline: If True, do not download anything. All files must already be in the cache.
        hub: If True, download weights from the model hub instead of package registries, if they are on the hub.

    Returns:
        Lines to print at the end, with the paths of the model, the report and the image, and commands to try next.
    """
    if (out / "quickstart.png").exists():
        print_once(f"This run is complete. Delete {out} to start over.")
        return _last_lines(out)

    source: Literal["hub", "packages"] = "hub" if hub else "packages"
    llm = resolve_pretrained("smollm2-135m", source=source, offline=offline)
    tower = resolve_pretrained("efficientnet-lite0", source=source, offline=offline)
    emoji = prepare_emoji_records(offline=offline)
    data = out / "data" / "captions.jsonl"
    with process_state().main_process_first():
        if not data.exists():
            _write_training_data(emoji, data)

    model_dir = fit([str(data)], out, _config(llm, tower, emoji))
    _draw_queries(LLM2CLIP.from_pretrained(model_dir), data, out / "quickstart.png", offline)
    return _last_lines(out)


def _config(llm: str, tower: str, emoji: Path) -> FitConfig:
    """Return the settings for `fit`.

    Args:
        llm, tower: Folders with the pretrained weights.
        emoji: Folder with the emoji data set.
    """
    return FitConfig(
        encoder=EncoderConfig(path=llm, layers=12, max_length=128),
        # The LLM is tuned only on English captions, which do not contain names in other languages.
        tune=TuneConfig(data=[f"{emoji / 'captions.jsonl'}@train"], steps=100, batch_size=48, save_steps=20),
        # Use a fixed value instead of a measured one, so that every run produces the same result.
        embed=EmbedConfig(batch_tokens=1024),
        align=AlignConfig(
            tower=tower,
            image_size=128,
            embed_dim=256,
            epochs=12,
            batch_size=96,
            tower_lr=5e-4,
            precision="fp32",
            caption_mix={"captions": 4, "long_captions": 1},
            save_steps=50,
        ),
        evaluate=EvaluateConfig(fields=[f"captions_{language}" for language in QUERY_LANGUAGES]),
    )


def _write_training_data(emoji: Path, file: Path) -> None:
    """Write a copy of the emoji data set with absolute image paths and multilingual training captions.

    In training rows, the names in all query languages are added to the captions. In held-out rows, the names in each
    language stay in a column of their own, so that each language is evaluated separately.
    """
    rows = []
    for _, row in read_jsonl(emoji / "captions.jsonl"):
        row["image"] = str((emoji / row["image"]).absolute())
        if row["split"] == "train":
            for language in QUERY_LANGUAGES:
                row["captions"] += row.get(f"captions_{language}", [])
        rows.append(row)
    atomic_write_jsonl(file, rows)


def _draw_queries(model: LLM2CLIP, data: Path, file: Path, offline: bool) -> None:
    """Search the held-out images for each text in `QUERIES` and draw the results."""
    images = [record.image for record in open_records(f"{data}@val") if record.image is not None]
    image_embeddings = model.encode_image(images)
    scores, indices = model.similarity(model.encode_text(QUERIES), image_embeddings).topk(5)
    if not process_state().is_main_process:
        return
    rows = []
    for query, query_indices, query_scores in zip(QUERIES, indices.tolist(), scores.tolist(), strict=True):
        rows.append((query, [str(images[i]) for i in query_indices], query_scores))
    draw_results(rows, file, f"Searching {len(images)} emoji that were never trained on", offline=offline)


def _last_lines(out: Path) -> list[str]:
    # Without an activated environment, `llm2clip` and `python` are not on the PATH.
    prefix = "" if shutil.which("llm2clip") else f"{os.path.relpath(Path(sys.executable).parent)}/"
    model = out / "model"
    return [
        "",
        f"Model:  {model}",
        f"Report: {out / 'report.html'}",
        f"Image:  {out / 'quickstart.png'} (search results of the model)",
        "",
        "Next:",
        f"  {prefix}python -c \"from llm2clip import LLM2CLIP; model = LLM2CLIP.from_pretrained('{model}'); "
        "print(model.encode_text(['a sad face', '一只猫']).shape)\"",
        f"  {prefix}llm2clip fit YOUR_CAPTIONS.jsonl --out runs/mine   # train on your own images",
        f"  {prefix}llm2clip fit --help                                # list all settings",
    ]
