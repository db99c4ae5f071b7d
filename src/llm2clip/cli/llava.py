"""`llm2clip llava`: the vision tower inside a multimodal LLM."""

from __future__ import annotations

import os

from jsonargparse import Namespace

from llm2clip.cli.commands import Commands, add_reading_arguments, select
from llm2clip.cli.plan import add_machine_arguments, machine_from_args
from llm2clip.config import LlavaConfig


def add(commands: Commands) -> None:
    """The verbs of this file."""
    llava = commands.group("llava", "The vision tower inside a multimodal LLM, as LLaVA-1.5: built, trained, measured.")
    some = llava.add("build", _build, "A multimodal model of a vision tower and a causal LLM, to be trained.")
    some.add_argument("--vision", type=str, required=True, help="model folder, or a tower as --align.tower")
    some.add_argument("--llm", type=str, required=True, help="folder or hub id of a causal LLM; or smollm2-135m")
    some.add_argument("--image_size", type=int, help="pixels; null is what the tower was trained with")
    some.add_argument("--out", type=str, required=True, help="folder")
    some.add_argument("--pad", type=bool, default=True, help="pictures to squares, as LLaVA-1.5 does; else cropped")
    some = llava.add("train", _train, "Its projector alone, then the LLM with it; resumable.")
    some.add_argument("model", type=str, help="what `llava build` made")
    some.add_argument("--pretrain", nargs="+", type=str, default=[], help="for the projector: records, or LLaVA's JSON")
    some.add_argument("--instruct", nargs="+", type=str, default=[], help="for the LLM: the same kinds of sources")
    some.add_argument("--images", type=str, help="folder of the images that LLaVA's JSON names; null is the file's own")
    some.add_argument("--out", type=str, required=True, help="run folder; OUT/model is the result")
    add_reading_arguments(some)
    some.add_class_arguments(LlavaConfig, "llava")
    some = llava.add(
        "plan", _plan, "What training would take: parameters, memory and hours; nothing is fetched or run."
    )
    some.add_argument("--llm", type=str, default="lmsys/vicuna-7b-v1.5", help="as of `llava build`")
    some.add_argument("--vision", type=str, default="openai/clip-vit-large-patch14-336", help="as of `llava build`")
    some.add_argument("--image_size", type=int, help="pixels; null is what the tower was trained with")
    some.add_argument("--pretrain", type=int, default=558_128, help="conversations of the first stage")
    some.add_argument("--instruct", type=int, default=665_298, help="conversations of the second")
    some.add_argument("--pretrain_tokens", type=float, default=60, help="of a conversation, beside the picture's")
    some.add_argument("--instruct_tokens", type=float, default=300, help="the same of the second; LLaVA's are assumed")
    add_machine_arguments(some)
    some.add_class_arguments(LlavaConfig, "llava")
    some = llava.add("evaluate", _evaluate, "Models on LLaVA-1.5's benchmarks, on captions, and on what pictures show.")
    some.add_argument("models", nargs="+", type=str, help="folders or hub ids of models for images and text")
    some.add_argument("--benchmarks", nargs="+", type=str, default=[], help="by name, see `llava benchmarks`; or all")
    some.add_argument("--root", type=str, default="benchmarks", help="folder that holds the benchmarks' folders")
    some.add_argument("--captions", nargs="+", type=str, default=[], help="records: BLEU-4 and CIDEr-D of captions")
    some.add_argument("--pope", nargs="+", type=str, default=[], help="records: POPE about what their captions name")
    some.add_argument("--out", type=str, required=True, help="folder for answers and report.html")
    some.add_argument("--beams", type=int, default=3, help="of captions; benchmarks are greedy")
    some.add_argument("--choose", action="store_true", help="multiple choice by likelihood, not by the letter said")
    some.add_argument("--batch", type=int, default=16, help="questions in a pass")
    some.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="of the model")
    some.add_argument("--limit", type=int, help="only so many of each, to try; what is scored together counts as one")
    some.add_argument("--judge", type=str, help="address of OpenAI's form for free answers, up to /v1")
    some.add_argument("--judge_model", type=str, default="gpt-4-0613", help="the judge's name there")
    add_reading_arguments(some)
    some = llava.add("benchmarks", _benchmarks, "LLaVA-1.5's benchmarks: which are here, and where to get the others.")
    some.add_argument("--root", type=str, default="benchmarks", help="folder that holds the benchmarks' folders")


def _build(given: Namespace) -> list[str]:
    from llm2clip.llava.verbs import build_verb

    return build_verb(given.vision, given.llm, given.out, given.image_size, given.pad)


def _train(given: Namespace) -> list[str]:
    from llm2clip.llava.verbs import train_verb

    reads = select(given, "images", "columns", "max_skipped")
    return train_verb(given.model, given.pretrain, given.instruct, given.out, config=given.llava, **reads)


def _plan(given: Namespace) -> list[str]:
    from llm2clip.tools.plan.llava import format_llava_plan, plan_llava

    asked = select(given, "pretrain", "instruct")
    tokens = {stage: given[f"{stage}_tokens"] for stage in asked}
    return format_llava_plan(
        plan_llava(given.llava, machine_from_args(given), given.llm, given.vision, given.image_size, asked, tokens),
        asked,
    )


def _evaluate(given: Namespace) -> list[str]:
    from llm2clip.llava.tasks.llm_judge import OpenAIJudge
    from llm2clip.llava.verbs import evaluate_verb

    judge = OpenAIJudge(given.judge, given.judge_model, os.environ.get("OPENAI_API_KEY", "")) if given.judge else None
    names = ("benchmarks", "root", "captions", "pope", "columns", "max_skipped")
    how = ("beams", "choose", "batch", "precision", "limit")
    return evaluate_verb(given.models, given.out, judge=judge, **select(given, *names, *how))


def _benchmarks(given: Namespace) -> list[str]:
    from llm2clip.llava.verbs import tasks_verb

    return tasks_verb(given.root)
