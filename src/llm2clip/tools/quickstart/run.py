"""The quickstart: an emoji search engine with an LLM for a text tower, trained from nothing in minutes on two cores.

Everything is real and small: SmolLM2-135M (its first 12 blocks), EfficientNet-Lite0, and OpenMoji's pictures with
their names. It is `llm2clip fit` with a recipe; all that is added here is fetching, and showing what was learned.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from llm2clip.config import AlignConfig, EmbedConfig, EncoderConfig, EvaluateConfig, FitConfig, TuneConfig
from llm2clip.data.records import open_records
from llm2clip.distributed import print_once, process_state
from llm2clip.io_utils import atomic_write_jsonl, read_jsonl
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.pretrained import resolve_pretrained
from llm2clip.pipeline import fit
from llm2clip.tools.quickstart.figure import draw_results
from llm2clip.tools.quickstart.openmoji import emoji_records

LANGUAGES = {"zh": "Chinese", "es": "Spanish", "ja": "Japanese"}
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


def quickstart(out: Path, offline: bool = False, hub: bool = False) -> Path:
    """Fetch, fit, and draw `quickstart.png`; run again, it goes on or says that all is done.

    Args:
        out: run folder.
        offline: fetch nothing; an earlier run has filled the cache.
        hub: weights from the model hub where it has them, in place of package registries.
    """
    if (out / "quickstart.png").exists():
        print_once((out / "report.md").read_text())
        print_once("All is done already; delete the folder to begin again.")
        return _goodbye(out)
    weights = {
        name: resolve_pretrained(name, source="hub" if hub else "packages", offline=offline)
        for name in ("smollm2-135m", "efficientnet-lite0")
    }
    emoji = emoji_records(offline=offline)
    config = FitConfig(
        encoder=EncoderConfig(path=weights["smollm2-135m"], layers=12, max_length=128),
        # The English captions teach the LLM; it cannot yet tell what the foreign names have to do with them.
        tune=TuneConfig(data=[f"{emoji / 'captions.jsonl'}@train"], steps=100, batch_size=48, save_steps=20),
        embed=EmbedConfig(batch_tokens=1024),  # not tried: every run shall give the same picture
        align=AlignConfig(
            tower=weights["efficientnet-lite0"],
            image_size=128,
            embed_dim=256,
            epochs=12,
            batch_size=96,
            tower_lr=5e-4,
            precision="fp32",
            caption_mix={"captions": 4, "long_captions": 1},
            save_steps=50,
        ),
        evaluate=EvaluateConfig(fields=[f"captions_{code}" for code in LANGUAGES]),
    )
    with process_state().main_process_first():
        data = _records(emoji, out / "data" / "captions.jsonl")
    model = LLM2CLIP.from_pretrained(fit([str(data)], out, config))
    held_out = [r for r in open_records(f"{data}@val") if r.image is not None]
    images = model.encode_image([r.image for r in held_out])
    scores, best = model.similarity(model.encode_text(QUERIES), images).topk(5)
    rows = [
        (query, [str(held_out[i].image) for i in row.tolist()], values.tolist())
        for query, row, values in zip(QUERIES, best, scores, strict=True)
    ]
    if process_state().is_main_process:
        title = f"Searching {len(held_out)} emoji that were never trained on"
        draw_results(rows, out / "quickstart.png", title, offline=offline)
    return _goodbye(out)


def _records(emoji: Path, file: Path) -> Path:
    """The emoji's rows with absolute paths, and with the names in the quickstart's languages among the captions of
    the training rows: the model is to be searched in them. Held-out rows keep languages apart, to be tested apart."""
    if file.exists():
        return file
    rows = []
    for _, row in read_jsonl(emoji / "captions.jsonl"):
        row["image"] = str((emoji / row["image"]).absolute())
        if row["split"] == "train":
            row["captions"] += [name for code in LANGUAGES for name in row.get(f"captions_{code}", ())]
        rows.append(row)
    atomic_write_jsonl(file, rows)
    return file


def _goodbye(out: Path) -> Path:
    picture = out / "quickstart.png"
    here = "" if shutil.which("llm2clip") else f"{os.path.relpath(Path(sys.executable).parent)}/"
    print_once(f"\nModel:   {out / 'model'}\nReport:  {out / 'report.html'}\nPicture: {picture}   <- look at it")
    print_once(
        "\nNext:\n"
        f"  {here}python -c \"from llm2clip import LLM2CLIP; m = LLM2CLIP.from_pretrained('{out / 'model'}'); "
        "print(m.encode_text(['a sad face', '一只猫']).shape)\"\n"
        f"  {here}llm2clip fit YOUR_CAPTIONS.jsonl --out runs/mine     # your own pictures\n"
        f"  {here}llm2clip fit --help                                  # every setting"
    )
    return picture
