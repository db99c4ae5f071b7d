"""`llm2clip llava build`, `train` and `evaluate`, as they are typed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from llm2clip.config import LlavaConfig
from llm2clip.data.merged_records import read_merged_records
from llm2clip.data.records import Record
from llm2clip.data.skip_log import SkipLog
from llm2clip.distributed import command_line, print_once, process_state
from llm2clip.io_utils import atomic_write_text
from llm2clip.llava.build import build_llava
from llm2clip.llava.chat_template import Conversation
from llm2clip.llava.datasets import captioning_conversations, instruction_conversations, read_llava
from llm2clip.llava.tasks import TASKS, Question, Task
from llm2clip.llava.tasks.base import first_units
from llm2clip.llava.tasks.llm_judge import OpenAIJudge
from llm2clip.models.llm2clip import LLM2CLIP, is_model_folder
from llm2clip.models.vision_tower import VisionTower
from llm2clip.run_config import save_or_check_config


def build_verb(vision: str, llm: str, out: str, image_size: int | None, pad: bool) -> list[str]:
    """Lines that say what was written; `vision` is a model folder of ours, or a tower by its name."""
    folder = build_llava(tower_of(vision, image_size), llm, out, pad=pad)
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
    if is_model_folder(name):
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
    recipe: LlavaConfig,
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
    from llm2clip.llava.train import train_llava

    run = Path(out)
    main = process_state().is_main_process
    if main:
        sources = {"pretrain": list(pretrain), "instruct": list(instruct), "images": images, "columns": columns}
        save_or_check_config({"model": model, **sources, "llava": recipe}, run)
    log = SkipLog(run / "skipped.jsonl" if main else None, max_skipped)
    first = conversations(pretrain, captioning_conversations, images, columns, log, recipe.seed)
    second = conversations(instruct, instruction_conversations, images, columns, log, recipe.seed)
    print_once(f"{len(first):,} conversations for the projector, {len(second):,} for the language model", log.summary())
    folder = train_llava(model, first, second, recipe, run, log)
    return [
        f"Model: {folder}",
        f"Next: llm2clip llava evaluate {folder} --captions DATA --pope DATA",
        f'Use it: pipeline("image-text-to-text", model="{folder}")',
    ]


def evaluate_verb(
    models: Sequence[str],
    out: str,
    *,
    benchmarks: Sequence[str],
    root: str,
    captions: Sequence[str],
    pope: Sequence[str],
    columns: dict[str, str],
    max_skipped: float,
    beams: int,
    choose: bool,
    batch: int,
    precision: str,
    limit: int | None,
    judge: OpenAIJudge | None,
) -> list[str]:
    """Measure models, write the report, and say what came out.

    Raises:
        ValueError: nothing is to be measured, or a benchmark is not known.
        FileNotFoundError: a benchmark's files are not there.
    """
    from llm2clip.llava.evaluate import GenerationOptions, caption_task, pope_task, run_task
    from llm2clip.llava.report import write_llava_report

    folder = Path(out)
    main = process_state().is_main_process
    log = SkipLog(folder / "skipped.jsonl" if main else None, max_skipped)
    work: list[tuple[Task, list[Question]]] = []
    for name in TASKS if list(benchmarks) == ["all"] else benchmarks:
        if name not in TASKS:
            raise ValueError(f"there is no benchmark {name!r}; there are {', '.join(TASKS)}")
        place = TASKS[name].place(root)
        if list(benchmarks) == ["all"] and not place.is_dir():
            continue
        try:
            work.append((TASKS[name], TASKS[name].read(place, log)))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{name}: {place} is not in its official form ({error!r})") from error
    if captions:
        work.append(caption_task(_records(captions, columns, log)))
    if pope:
        work.append(pope_task(_records(pope, columns, log)))
    if not work:
        raise ValueError("name --captions DATA, --pope DATA, or --benchmarks with their folders under --root")
    log.check()
    work = [(task, first_units(asked, limit)) for task, asked in work]
    ways = GenerationOptions(beams, choose, batch, precision, judge)
    measured = [found for model in models for found in run_task(model, work, ways, folder, log)]
    log.check()
    if not main:
        return []
    atomic_write_text(folder / "results.json", json.dumps([m.to_dict() for m in measured], indent=1))
    page = write_llava_report(measured, command_line(), folder)
    lines = []
    for m in measured:
        figures = ", ".join(f"{name} {value:.1f}" for name, value in list(m.figures.items())[:4])
        lines.append(f"{m.model}, {m.task} ({len(m.asked):,} questions): {figures or 'answered, not scored'}")
    return [*lines, log.summary(), f"Report: {page}"]


def _records(sources: Sequence[str], columns: dict[str, str], log: SkipLog) -> list[Record]:
    """One an image: what another row says of it is no negative, and a caption to be scored against."""
    return [record for _, record in read_merged_records(sources, columns, log)]


def tasks_verb(root: str) -> list[str]:
    """A line for each benchmark: whether its folder is there, what it asks, where its files are from."""
    width = max(map(len, TASKS))
    return [
        f"{name:<{width}}  {'here' if task.place(root).is_dir() else 'absent':<6}  {task.about}; {task.get}"
        for name, task in TASKS.items()
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
            found += made(_records([name], columns, log), seed)
    return found


def is_llava(name: str) -> bool:
    """Whether a source is a file of conversations in LLaVA's form."""
    path = Path(name)
    if path.suffix not in (".json", ".jsonl") or not path.is_file():
        return False
    with path.open("rb") as file:
        return b'"conversations"' in file.read(1 << 16)
