"""`llm2clip llava build` and `train`, as they are typed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from llm2clip.data.records import Record, Source, open_records
from llm2clip.data.skips import SkipLog
from llm2clip.llava.build import build
from llm2clip.llava.conversations import captioning, instructions, read_llava
from llm2clip.llava.prompts import Conversation
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.vision import VisionTower
from llm2clip.processes import processes, say
from llm2clip.recipes import LlavaRecipe, keep


def build_verb(vision: str, llm: str, out: str, image_size: int | None) -> list[str]:
    """Lines that say what was written; `vision` is a model folder of ours, or a tower by its name."""
    folder = build(tower_of(vision, image_size), llm, out)
    config = json.loads((folder / "config.json").read_text())
    return [
        f"Built: {folder} ({config['image_seq_length']} tokens a picture; its projector is random)",
        f"Next: llm2clip llava train {folder} --pretrain CAPTIONS --instruct CONVERSATIONS --out RUN",
    ]


def tower_of(name: str, image_size: int | None = None) -> VisionTower:
    """The tower of a model folder of ours, or one by its name; see `VisionTower.from_pretrained`.

    Raises:
        ValueError: another size is asked of a trained model.
    """
    file = Path(name) / "config.json"
    if file.is_file() and json.loads(file.read_text()).get("model_type") == "llm2clip":
        tower = LLM2CLIP.from_pretrained(name, device="cpu").tower
        if image_size not in (None, tower.preprocess.size):
            raise ValueError(f"{name} was trained at {tower.preprocess.size} pixels, and takes no other size here")
        return tower
    return VisionTower.from_pretrained(name, image_size=image_size)


def train_verb(
    model: str,
    pretrain: Sequence[str],
    instruct: Sequence[str],
    out: str,
    *,
    images: str | None,
    columns: dict[str, str],
    max_skipped: float,
    recipe: LlavaRecipe,
) -> list[str]:
    """Train, and say where the result is.

    Args:
        model: that `build` made.
        pretrain, instruct: sources of each stage, in LLaVA's form or of records.
        out: run folder.
        images: the folder that the paths in files of LLaVA's form are relative to.
        columns, max_skipped: as of `fit`.
        recipe: the settings.
    """
    from llm2clip.llava.train import train

    run = Path(out)
    main = processes().is_main_process
    if main:
        sources = {"pretrain": list(pretrain), "instruct": list(instruct), "images": images, "columns": columns}
        keep({"model": model, **sources, "llava": recipe}, run / "recipe.yaml")
    log = SkipLog(run / "skipped.jsonl" if main else None, max_skipped)
    first = conversations(pretrain, captioning, images, columns, log, recipe.seed)
    second = conversations(instruct, instructions, images, columns, log, recipe.seed)
    say(f"{len(first):,} conversations for the projector, {len(second):,} for the language model", log.summary())
    folder = train(model, first, second, recipe, run, log)
    return [
        f"Model: {folder}",
        f"Next: llm2clip llava evaluate {folder} --captions DATA --pope DATA",
        f'Use it: pipeline("image-text-to-text", model="{folder}")',
    ]


def conversations(
    sources: Sequence[str],
    made: Callable[[Iterable[Record], int], list[Conversation]],
    images: str | None,
    columns: dict[str, str],
    log: SkipLog,
    seed: int,
) -> list[Conversation]:
    """Conversations of sources in LLaVA's form as they are, and `made` of records."""
    found: list[Conversation] = []
    for name in sources:
        if is_llava(name):
            found += read_llava(name, images, log)
        else:
            source = Source.parse(name)
            source = replace(source, columns={**source.columns, **columns})
            found += made(open_records(source, log), seed)
    return found


def is_llava(name: str) -> bool:
    """Whether a source is a file of conversations in LLaVA's form."""
    path = Path(name)
    if path.suffix == ".jsonl" and path.is_file():
        with path.open(encoding="utf-8", errors="replace") as lines:
            return '"conversations"' in lines.readline()
    return path.suffix == ".json"
