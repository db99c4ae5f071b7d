"""Two towers inside the same multimodal LLM: as it comes, and as `align` trained it. And what a step of training costs.

    python benchmarks/llava.py DATA --aligned MODEL [--seeds 3] [--pretrain_steps 60] [--steps 120] [--out FOLDER]
    python benchmarks/llava.py DATA --aligned MODEL --only speed

DATA holds flickr8k/, coco_img/ and ade20k_ids/ (`captions.jsonl` each); MODEL is a model folder whose tower began as
EfficientNet-Lite0, with nothing of flickr8k's val in its training. SmolLM2-135M-Instruct learns from flickr8k's train
split, coco_img and ade20k_ids, with either tower on the same conversations in the same order for the same steps, and
describes flickr8k's val: CIDEr-D and BLEU-4 against its five captions, and POPE about what they name.

`--only speed`: conversations a second in training, the same model and data three ways: batches as they come, batches of
similar length, and those with the tower's features kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from transformers import AutoModelForImageTextToText, AutoProcessor

from llm2clip.config import LlavaConfig
from llm2clip.data.records import Record, open_records
from llm2clip.data.skip_log import SkipLog
from llm2clip.llava.build import build_llava
from llm2clip.llava.chat_template import Conversation
from llm2clip.llava.datasets import captioning_conversations, instruction_conversations
from llm2clip.llava.evaluate import GenerationOptions, caption_task, pope_task, run_task
from llm2clip.llava.image_features import PatchFeatures, cache_patch_features
from llm2clip.llava.train import train_llava
from llm2clip.llava.verbs import tower_of
from llm2clip.models.pretrained import resolve_pretrained

TRAIN = ("flickr8k/captions.jsonl@train", "coco_img/captions.jsonl", "ade20k_ids/captions.jsonl")
RECIPE = LlavaConfig(
    pretrain_lr=2e-3, pretrain_batch_size=64, lr=2e-4, batch_size=64, micro_batch_size=32, save_steps=1000
)


def records(data: Path, names: tuple[str, ...]) -> list[Record]:
    return [record for name in names for record in open_records(str(data / name))]


def some(conversations: list[Conversation], count: int, seed: int) -> list[Conversation]:
    """As many as a run sees, by lot: the same for both towers."""
    return random.Random(seed).sample(conversations, min(count, len(conversations)))


def compare(given: argparse.Namespace, towers: dict[str, Any], known: list[Record]) -> None:
    held = records(given.data, ("flickr8k/captions.jsonl@val",))
    asked = random.Random(0).sample(held, min(given.images, len(held)))
    work = [caption_task(asked), pope_task(asked[: given.pope_images])]
    first, second = captioning_conversations(known), instruction_conversations(known)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in towers}
    print("| tower | seed | CIDEr-D | BLEU-4 | POPE accuracy | POPE F1 | minutes |\n|---|---|---|---|---|---|---|")
    for seed in range(given.seeds):
        for name, tower in towers.items():
            run = given.out / f"{name}-{seed}"
            start = time.perf_counter()
            config = dataclasses.replace(RECIPE, seed=seed)
            if not (run / "model").is_dir():
                built = given.out / f"built-{name}-{seed}"
                if not built.is_dir():
                    build_llava(tower, resolve_pretrained("smollm2-135m"), built, seed)
                pretrain = some(first, given.pretrain_steps * config.pretrain_batch_size, seed)
                instruct = some(second, given.steps * config.batch_size, seed)
                shared = given.out / f"features-{name}"
                shared.mkdir(parents=True, exist_ok=True)
                run.mkdir(parents=True, exist_ok=True)
                if not (run / "features").is_symlink():
                    (run / "features").symlink_to(shared.resolve())
                train_llava(str(built), pretrain, instruct, config, run, SkipLog())
                shutil.rmtree(built)
            figures: dict[str, float] = {}
            for measured in run_task(str(run / "model"), work, GenerationOptions(beams=3), run, SkipLog()):
                figures |= measured.figures
            minutes = (time.perf_counter() - start) / 60
            found[name].append(figures)
            (run / "figures.json").write_text(json.dumps(figures, indent=1))
            print(f"| {name} | {seed} | {_row(figures)} | {minutes:.1f} |", flush=True)
    for name, runs in found.items():
        shown = []
        for key in ("CIDEr-D", "BLEU-4", "accuracy", "F1"):
            values = [run[key] for run in runs]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            shown.append(f"{statistics.mean(values):.1f}{spread}")
        print(f"| {name}, mean | | {' | '.join(shown)} | |")


def _row(figures: dict[str, float]) -> str:
    return " | ".join(f"{figures[key]:.1f}" for key in ("CIDEr-D", "BLEU-4", "accuracy", "F1"))


def speed(given: argparse.Namespace, tower: Any, known: list[Record]) -> None:
    talks = some(instruction_conversations(known), 768, 0)
    built = given.out / "built-speed"
    if not built.is_dir():
        build_llava(tower, resolve_pretrained("smollm2-135m"), built)
    print("| batches | tower | conversations/s | against the first |\n|---|---|---|---|")
    rates: list[float] = []
    for name, grouped, cache in (
        ("as they come", False, 0.0),
        ("of similar length", True, 0.0),
        ("the same", True, 20.0),
    ):
        config = dataclasses.replace(RECIPE, group_by_length=grouped, cache_gb=cache)
        run = given.out / f"speed-{len(rates)}"
        shutil.rmtree(run, ignore_errors=True)
        if cache:  # the features are kept before the clock starts: they are worked out once for all passes
            model = AutoModelForImageTextToText.from_pretrained(built)
            side = PatchFeatures(model, AutoProcessor.from_pretrained(built))
            cache_patch_features(
                [one.image for one in talks if one.image is not None], side, run / "features", SkipLog()
            )
        start = time.perf_counter()
        train_llava(str(built), [], talks, config, run, SkipLog())
        lines = [json.loads(line) for line in (run / "instruct/metrics.jsonl").read_text().splitlines()]
        rates.append(lines[-1]["train_samples_per_second"])
        shown = "kept features" if cache else "in each step"
        print(f"| {name} | {shown} | {rates[-1]:.2f} | {rates[-1] / rates[0]:.2f}x |", flush=True)
        print(f"  ({time.perf_counter() - start:.0f} s with opening and writing the model)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--aligned", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pretrain_steps", type=int, default=60)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--images", type=int, default=1000, help="of val that are described")
    parser.add_argument("--pope_images", type=int, default=200, help="of those that are asked about")
    parser.add_argument("--only", choices=["towers", "speed"])
    parser.add_argument("--out", type=Path, default=Path("runs/llava"))
    given = parser.parse_args()
    aligned = tower_of(given.aligned)
    plain = tower_of(resolve_pretrained("efficientnet-lite0"), aligned.preprocess.size)
    known = records(given.data, TRAIN)
    if given.only != "speed":
        compare(given, {"as it comes": plain, "aligned": aligned}, known)
    if given.only != "towers":
        speed(given, aligned, known)


if __name__ == "__main__":
    main()
