"""Commands for multimodal LLMs: `llm2clip llava build | train | plan | evaluate | benchmarks`."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt

from llm2clip.cli.checks import check_pretrained, check_sources, resolve_model
from llm2clip.cli.commands import ArgumentParser, Commands, add_reading_arguments, format_command
from llm2clip.cli.plan import add_machine_arguments, machine_from_args
from llm2clip.config import LlavaConfig
from llm2clip.runs.output_folder import check_output_folder


def add(commands: Commands) -> None:
    """Add this module's commands."""
    llava = commands.group("llava", "Build, train and evaluate a multimodal LLM: LLaVA-1.5 with any vision tower.")

    parser = llava.add("build", _build, "Combine a vision tower and a causal LLM into an untrained multimodal model.")
    _add_model_arguments(parser, required=True)
    parser.add_argument("--out", type=str, required=True, help="Model folder to create.")
    parser.add_argument(
        "--pad",
        type=bool,
        default=True,
        help="Pad images to squares, as LLaVA-1.5 does. false: use the tower's own preprocessing, usually "
        "a center crop.",
    )

    parser = llava.add(
        "train", _train, "Train the projector, then the projector and the LLM. Run the command again to resume."
    )
    parser.add_argument("model", type=str, help="Model folder written by `llava build`.")
    parser.add_argument(
        "--pretrain",
        nargs="+",
        type=str,
        default=[],
        help="Data for training the projector: image-caption sources, or JSON files in LLaVA's format.",
    )
    parser.add_argument(
        "--instruct",
        nargs="+",
        type=str,
        default=[],
        help="Data for training the projector and the LLM: image-caption sources, or JSON files in LLaVA's format.",
    )
    parser.add_argument(
        "--images",
        type=str,
        help="Folder that image paths in LLaVA's JSON files are relative to. Default: the folder of each JSON file.",
    )
    parser.add_argument("--out", type=str, required=True, help="Run directory; the result is OUT/model.")
    add_reading_arguments(parser)
    parser.add_class_arguments(LlavaConfig, "llava")

    parser = llava.add("plan", _plan, "Estimate the memory and hours needed for training, without running it.")
    _add_model_arguments(parser, required=False)
    parser.add_argument("--pretrain", type=int, default=558_128, help="Number of conversations in the first stage.")
    parser.add_argument("--instruct", type=int, default=665_298, help="Number of conversations in the second stage.")
    parser.add_argument(
        "--pretrain_tokens",
        type=float,
        default=60,
        help="Average number of text tokens per conversation in the first stage.",
    )
    parser.add_argument(
        "--instruct_tokens",
        type=float,
        default=300,
        help="Average number of text tokens per conversation in the second stage.",
    )
    add_machine_arguments(parser)
    parser.add_class_arguments(LlavaConfig, "llava")

    parser = llava.add(
        "evaluate", _evaluate, "Evaluate models on LLaVA-1.5's benchmarks, on image captioning and on POPE."
    )
    parser.add_argument("models", nargs="+", type=str, help="Model folders or hub ids.")
    parser.add_argument(
        "--benchmarks",
        nargs="+",
        type=str,
        default=[],
        help="Names of benchmarks (see `llm2clip llava benchmarks`), or `all` for every benchmark whose folder exists.",
    )
    _add_root_argument(parser)
    parser.add_argument(
        "--captions", nargs="+", type=str, default=[], help="Sources of images to caption. Reports BLEU-4 and CIDEr-D."
    )
    parser.add_argument(
        "--pope",
        nargs="+",
        type=str,
        default=[],
        help="Sources for POPE, which asks about objects mentioned in the captions.",
    )
    parser.add_argument("--out", type=str, required=True, help="Folder for the answers and report.html.")
    parser.add_argument(
        "--num_beams",
        type=PositiveInt,
        default=3,
        help="Number of beams for captioning. Benchmarks always use greedy decoding.",
    )
    parser.add_argument(
        "--by_likelihood",
        action="store_true",
        help="Answer multiple-choice questions with the most likely option instead of generating a letter.",
    )
    parser.add_argument("--batch_size", type=PositiveInt, default=16, help="Questions per forward pass.")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="Precision of the model.")
    parser.add_argument(
        "--limit",
        type=PositiveInt,
        help="Maximum number of questions per task, for a quick test. Questions that are scored together count as one.",
    )
    parser.add_argument(
        "--judge", type=str, help="Base URL, up to /v1, of an OpenAI-compatible API that scores free-form answers."
    )
    parser.add_argument("--judge_model", type=str, default="gpt-4-0613", help="Model name of the judge.")
    add_reading_arguments(parser)

    parser = llava.add("benchmarks", _benchmarks, "List LLaVA-1.5's benchmarks and where to download each of them.")
    _add_root_argument(parser)


def _add_model_arguments(parser: ArgumentParser, required: bool) -> None:
    """Add the model arguments of `build` and `plan`.

    If the arguments are not required, they default to the models of LLaVA-1.5.
    """
    parser.add_argument(
        "--vision",
        type=str,
        required=required,
        default=None if required else "openai/clip-vit-large-patch14-336",
        help="LLM2CLIP model folder, or any vision tower that --align.tower accepts.",
    )
    parser.add_argument(
        "--llm",
        type=str,
        required=required,
        default=None if required else "lmsys/vicuna-7b-v1.5",
        help="Folder or hub id of a causal LLM, or smollm2-135m.",
    )
    parser.add_argument(
        "--image_size", type=PositiveInt, help="Image size in pixels. Default: the size used in the tower's training."
    )


def _add_root_argument(parser: ArgumentParser) -> None:
    parser.add_argument("--root", type=str, default="benchmarks", help="Folder that contains one folder per benchmark.")


def _build(args: Namespace) -> list[str]:
    check_pretrained(args.vision, args.llm)
    from llm2clip.data.training_images import load_training_images, save_training_images
    from llm2clip.llava.build import build_llava
    from llm2clip.llava.vision import load_tower

    folder = build_llava(load_tower(args.vision, args.image_size), args.llm, args.out, pad=args.pad)
    training_images = load_training_images(args.vision)
    if training_images is not None:
        save_training_images(folder, training_images)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return [
        f"Built: {folder} ({config['image_seq_length']} tokens per image; the projector is untrained)",
        f"Next: {format_command('llava', 'train', folder)} --pretrain CAPTIONS --instruct CONVERSATIONS --out RUN",
    ]


def _train(args: Namespace) -> list[str]:
    check_output_folder(args.out, "llava")
    check_sources(args.pretrain, args.instruct)
    from llm2clip.data.skip_log import SkipLog
    from llm2clip.llava.datasets import captioning_conversations, instruction_conversations, read_conversations
    from llm2clip.llava.train import train_llava
    from llm2clip.runs.ranks import print_once, process_state
    from llm2clip.runs.run_config import save_or_check_config

    run = Path(args.out)
    is_main = process_state().is_main_process
    if is_main:
        names = ("model", "pretrain", "instruct", "images", "columns", "llava")
        save_or_check_config({name: args[name] for name in names}, run)
    log = SkipLog(run / "skipped.jsonl" if is_main else None, args.max_skipped)
    reading = {"images": args.images, "columns": args.columns, "log": log, "seed": args.llava.seed}
    pretrain = read_conversations(args.pretrain, captioning_conversations, **reading)
    instruct = read_conversations(args.instruct, instruction_conversations, **reading)
    print_once(
        f"{len(pretrain):,} conversations for the projector, {len(instruct):,} for the projector and the LLM",
        log.summary(),
    )
    folder = train_llava(args.model, pretrain, instruct, config=args.llava, out=run, log=log)
    return [
        f"Model: {folder}",
        f"Next: {format_command('llava', 'evaluate', folder)} --captions DATA --pope DATA --out OUT",
        f'Use: pipeline("image-text-to-text", model="{folder}")',
    ]


def _plan(args: Namespace) -> list[str]:
    from llm2clip.tools.plan.llava import format_llava_plan, plan_llava

    conversations = {"pretrain": args.pretrain, "instruct": args.instruct}
    text_tokens = {"pretrain": args.pretrain_tokens, "instruct": args.instruct_tokens}
    plan = plan_llava(
        args.llava,
        machine_from_args(args),
        llm=args.llm,
        vision=args.vision,
        image_size=args.image_size,
        conversations=conversations,
        text_tokens=text_tokens,
    )
    return format_llava_plan(plan, conversations)


def _evaluate(args: Namespace) -> list[str]:
    check_output_folder(args.out, "evaluation")
    check_sources(args.captions, args.pope)
    args.models = [resolve_model(model) for model in args.models]
    from llm2clip.data.merged_records import read_merged_records
    from llm2clip.data.skip_log import SkipLog
    from llm2clip.io_utils import atomic_write_text
    from llm2clip.llava.evaluate import GenerationOptions, caption_task, evaluate_model, pope_task
    from llm2clip.llava.report import format_results, training_warnings, write_llava_report
    from llm2clip.llava.tasks import read_benchmarks
    from llm2clip.llava.tasks.base import first_units
    from llm2clip.llava.tasks.llm_judge import OpenAIJudge
    from llm2clip.runs.ranks import print_once, process_state
    from llm2clip.runs.run_description import describe_run

    out, start = Path(args.out), time.time()
    is_main = process_state().is_main_process
    log = SkipLog(out / "skipped.jsonl" if is_main else None, args.max_skipped)
    tasks = read_benchmarks(args.benchmarks, args.root, log)
    # Merge all rows of an image. Otherwise, POPE could treat an object as absent although another row mentions it.
    for sources, make_task in ((args.captions, caption_task), (args.pope, pope_task)):
        if sources:
            records = [record for _, record in read_merged_records(sources, args.columns, log)]
            tasks.append(make_task(records))
    if not tasks:
        raise ValueError("Nothing to evaluate: pass --captions DATA, --pope DATA, or --benchmarks with --root")
    log.check()
    tasks = [(task, first_units(questions, args.limit)) for task, questions in tasks]
    judge = OpenAIJudge(args.judge, args.judge_model, os.environ.get("OPENAI_API_KEY", "")) if args.judge else None
    options = GenerationOptions(
        num_beams=args.num_beams,
        by_likelihood=args.by_likelihood,
        batch_size=args.batch_size,
        precision=args.precision,
        judge=judge,
    )
    results = [result for model in args.models for result in evaluate_model(model, tasks, options, out, log)]
    log.check()
    if not is_main:
        return []
    atomic_write_text(out / "results.json", json.dumps([result.to_dict() for result in results], indent=1))
    page = write_llava_report(results, describe_run(time.time() - start), out)
    print_once(format_results(results))
    return [log.summary(), *training_warnings(results), f"Report: {page}"]


def _benchmarks(args: Namespace) -> list[str]:
    from llm2clip.llava.tasks import TASKS

    width = max(map(len, TASKS))
    lines = []
    for name, task in TASKS.items():
        status = "found" if task.folder(args.root).is_dir() else "missing"
        lines.append(f"{name:<{width}}  {status:<7}  {task.description}; {task.source}")
    return lines
