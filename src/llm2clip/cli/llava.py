"""Commands for multimodal LLMs: `llm2clip llava build | train`."""

import json
import shlex
from pathlib import Path

from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt

from llm2clip.cli.checks import check_output_folder, check_pretrained_names, check_sources_exist
from llm2clip.cli.commands import SECTIONS, CommandGroup, add_data_reading_arguments, format_command
from llm2clip.io_utils import format_count
from llm2clip.llava import LlavaConfig

SECTIONS.add("llava")


def add_commands(commands: CommandGroup) -> None:
    llava = commands.add_group("llava", "Build and train a multimodal LLM: LLaVA-1.5 with any vision tower.")

    parser = llava.add("build", _run_build, "Build an untrained multimodal model from a vision tower and an LLM.")
    parser.add_argument(
        "--vision",
        type=str,
        required=True,
        help="LLM2CLIP model folder, or any vision tower that --align.tower accepts.",
    )
    parser.add_argument("--llm", type=str, required=True, help="Folder or hub id of a causal LLM, or smollm2-135m.")
    parser.add_argument(
        "--image_size", type=PositiveInt, help="Image size in pixels. Default: the tower's training resolution."
    )
    parser.add_argument("--out", type=str, required=True, help="Model folder to create.")
    parser.add_argument(
        "--pad",
        type=bool,
        default=True,
        help="Pad images to squares, as LLaVA-1.5 does. If false, use the preprocessing of the vision tower, usually a "
        "center crop.",
    )

    parser = llava.add(
        "train",
        _run_train,
        "Train the projector alone, then the projector and the LLM. Run the command again to resume.",
    )
    parser.add_argument("model", type=str, help="Model folder written by `llava build`.")
    parser.add_argument(
        "--pretrain",
        nargs="+",
        type=str,
        default=[],
        help="Training data for the projector: image-caption sources, or JSON files in LLaVA's format.",
    )
    parser.add_argument(
        "--instruct",
        nargs="+",
        type=str,
        default=[],
        help="Training data for the projector and LLM: image-caption sources, or JSON files in LLaVA's format.",
    )
    parser.add_argument(
        "--images",
        type=str,
        help="Base folder for relative image paths in LLaVA's JSON files. Default: the folder of each JSON file.",
    )
    parser.add_argument("--out", type=str, required=True, help="Run directory. The trained model is in OUT/model.")
    add_data_reading_arguments(parser)
    parser.add_class_arguments(LlavaConfig, "llava")


def _run_build(args: Namespace) -> list[str]:
    check_pretrained_names(args.vision, args.llm)
    from llm2clip.data.image_facts import load_training_image_hashes, save_training_image_hashes
    from llm2clip.llava.build import build_llava, load_vision_tower

    folder = build_llava(load_vision_tower(args.vision, args.image_size), args.llm, args.out, pad=args.pad)
    training_images = load_training_image_hashes(args.vision)
    if training_images is not None:
        save_training_image_hashes(folder, training_images)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return [
        f"Built: {folder} ({config['image_seq_length']} tokens per image; the projector is untrained)",
        f"Next: {format_command('llava', 'train', folder)} --pretrain CAPTIONS --instruct CONVERSATIONS --out RUN",
    ]


def _run_train(args: Namespace) -> list[str]:
    check_output_folder(args.out, "llava")
    check_sources_exist(args.pretrain, args.instruct)
    check_pretrained_names(args.model)
    from llm2clip.data.skip_log import SkipLog
    from llm2clip.llava.conversations import (
        make_captioning_conversations,
        make_instruction_conversations,
        read_conversations,
    )
    from llm2clip.llava.train import train_llava
    from llm2clip.runs.output_folder import save_or_check_config
    from llm2clip.runs.ranks import print_once, process_state

    run = Path(args.out)
    is_main = process_state().is_main_process
    if is_main:
        names = ("model", "pretrain", "instruct", "images", "columns", "llava")
        save_or_check_config({name: args[name] for name in names}, run)
    log = SkipLog(run / "skipped.jsonl" if is_main else None, args.max_skipped)
    reading = {"images": args.images, "columns": args.columns, "log": log, "seed": args.llava.seed}
    pretrain = read_conversations(args.pretrain, make_captioning_conversations, **reading)
    instruct = read_conversations(args.instruct, make_instruction_conversations, **reading)
    count = format_count(len(pretrain), "conversation")
    print_once(f"{count} to train the projector, {len(instruct):,} to train the projector and the LLM", log.summary())
    folder = train_llava(args.model, pretrain, instruct, config=args.llava, out=run, log=log)
    evaluate = ["lmms-eval", "--model", "llm2clip_llava", "--model_args", f"pretrained={folder}", "--tasks", "pope"]
    return [
        f"Model: {folder}",
        f"Next: {shlex.join(evaluate)}",
        f'Use: pipeline("image-text-to-text", model="{folder}")',
    ]
