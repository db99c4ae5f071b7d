"""The figures of multimodal models beside the paper's, as a page: tables, and pictures with their captions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from llm2clip.data.images import load_thumbnail
from llm2clip.html_report import (
    Block,
    Code,
    Heading,
    Paragraph,
    ResultImage,
    ResultImages,
    Table,
    write_report,
)
from llm2clip.llava.evaluate import LlavaResult
from llm2clip.models.display_names import display_names

# LLM2CLIP's project page, the table of LLaVA-1.5 with its tower: the figure of a task, as it names it.
COLUMNS = {
    "vqav2": ("VQAv2", "accuracy"),
    "gqa": ("GQA", "accuracy"),
    "vizwiz": ("VizWiz", "accuracy"),
    "scienceqa": ("SQA-IMG", "accuracy"),
    "textvqa": ("TextVQA", "accuracy"),
    "pope": ("POPE", "F1"),
    "mme": ("MME", "perception"),
    "mmbench": ("MMBench", "accuracy"),
    "mmbench-cn": ("MMBench-CN", "accuracy"),
    "llava-bench": ("LLaVA-Bench", "relative"),
    "mm-vet": ("MM-Vet", "total"),
    "seed": ("SEED", "accuracy"),
}
# LLaVA's own row is printed there as random, popular, adversarial, unlike the others; here all are in one order.
POPE = {
    "LLaVA (paper)": (87.3, 84.2, 86.1),
    "LLaVA (reproduced)": (87.7, 84.85, 86.3),
    "+ LLM2CLIP": (88.55, 82.76, 87.75),
}
PAPER: dict[str, dict[str, float]] = {
    "LLaVA (paper)": {
        "vqav2": 78.5, "gqa": 62.0, "vizwiz": 50.0, "scienceqa": 66.8, "textvqa": 58.2, "mme": 1510.7, "mmbench": 64.3,
        "mmbench-cn": 58.3, "llava-bench": 65.4, "mm-vet": 31.1, "seed": 58.6,
    },
    "LLaVA (reproduced)": {
        "vqav2": 79.04, "gqa": 62.86, "vizwiz": 50.57, "scienceqa": 67.97, "textvqa": 57.48, "mme": 1476.69,
        "mmbench": 66.66, "mmbench-cn": 60.39, "llava-bench": 58.0, "mm-vet": 34.3, "seed": 59.86,
    },
    "+ LLM2CLIP": {
        "vqav2": 79.80, "gqa": 63.15, "vizwiz": 52.37, "scienceqa": 69.92, "textvqa": 58.35, "mme": 1505.82,
        "mmbench": 68.29, "mmbench-cn": 60.40, "llava-bench": 62.7, "mm-vet": 34.8, "seed": 60.96,
    },
}  # fmt: skip
SHOWN, SIDE = 12, 280  # pictures, and pixels of their longer side
SPLITS = {  # where the figures above are of questions whose answers only a server knows
    "vqav2": "The paper's figures are of test-dev; what is scored here is val2014.",
    "vizwiz": "The paper's figures are of the test set; what is scored here is val.",
    "mmbench": "The server asks a language model where an answer names no option; here it is wrong.",
}


def write_llava_report(measured: Sequence[LlavaResult], command: str, out: Path) -> Path:
    """Write `out/report.html` and `out/report.md`; the page's path."""
    models = list(dict.fromkeys(m.model for m in measured))
    called = dict(zip(models, display_names(models), strict=True))
    measured = [replace(m, model=called[m.model]) for m in measured]
    blocks: list[Block] = [Code(command)]
    public = [task for task in COLUMNS if any(m.task == task for m in measured)]
    if public:
        blocks += [Heading("Beside the paper"), Paragraph("In percent; MME in points. The paper's model is Vicuna-7B with "
                   "CLIP L/14 at 336 pixels.")]  # fmt: skip
        rows = [[name, *(figures.get(task) for task in public)] for name, figures in PAPER.items()]
        for name in dict.fromkeys(m.model for m in measured):
            by = {m.task: m.figures for m in measured if m.model == name}
            rows.append([name, *(by.get(task, {}).get(COLUMNS[task][1]) for task in public)])
        blocks.append(Table(["", *(COLUMNS[task][0] for task in public)], rows))
    for task in dict.fromkeys(m.task for m in measured):
        mine = [m for m in measured if m.task == task]
        names = list(dict.fromkeys(name for m in mine for name in m.figures))
        blocks.append(Heading(f"{task}: {len(mine[0].asked):,} questions"))
        rows = [[m.model, *(m.figures.get(name) for name in names)] for m in mine]
        blocks.append(
            Table(["", *names], rows) if names else Paragraph("Answers are written; nobody here scores them.")
        )
        if task in SPLITS and names:
            blocks.append(Paragraph(SPLITS[task]))
        if task == "pope":
            blocks.append(
                Table(["F1 in the paper", "random", "adversarial", "popular"], [[n, *v] for n, v in POPE.items()])
            )
        if task == "captions":
            blocks += _pictures(mine)
    return write_report(out, "report", "A multimodal LLM, measured", blocks)[1]


def _pictures(measured: Sequence[LlavaResult]) -> list[Block]:
    """The same pictures, chosen by lot, with each model's caption and one of people's."""
    blocks: list[Block] = []
    numbers = random.Random(0).sample(range(len(measured[0].asked)), min(SHOWN, len(measured[0].asked)))
    for m in measured:
        said = {one.id: answer for one, answer in zip(m.asked, m.answers, strict=True)}
        shots = []
        for n in numbers:
            one = measured[0].asked[n]
            if one.id in said and one.image is not None:
                shots.append(
                    ResultImage(load_thumbnail(one.image, SIDE), None, f"{said[one.id]} — people: {one.truth[0]}")
                )
        blocks.append(ResultImages(m.model, shots))
    return blocks
