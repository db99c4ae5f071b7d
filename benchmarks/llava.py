"""Compare a vision tower before and after `align` in the same multimodal LLM, and measure training speed.

    python benchmarks/llava.py DATA --aligned MODEL [--seeds 3] [--pretrain_steps 60] [--steps 120] [--out FOLDER]
    python benchmarks/llava.py DATA --aligned MODEL --only speed

DATA contains flickr8k/, coco_img/ and ade20k_ids/, each with a captions.jsonl. MODEL is a model folder whose tower was
initialised from EfficientNet-Lite0 and was not trained on the val split of flickr8k.

Quality: SmolLM2-135M-Instruct is trained with each tower on the same conversations, in the same order and for the same
number of steps. The conversations come from the train split of flickr8k, coco_img and ade20k_ids. lmms-eval evaluates
the models on the val split of flickr8k: CIDEr and BLEU-4 against the five captions of each image, and accuracy and F1
for yes-or-no questions about objects. Install lmms-eval and Java, which its caption metrics need.

Speed (`--only speed`): training conversations per second with random batches, with length-grouped batches, and with
length-grouped batches plus cached tower features.
"""

import argparse
import dataclasses
import json
import os
import random
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from transformers import AutoModelForImageTextToText, AutoProcessor

from llm2clip.data.records import Record, open_records
from llm2clip.data.skip_log import SkipLog
from llm2clip.llava import LlavaConfig
from llm2clip.llava.build import build_llava, load_tower
from llm2clip.llava.conversations import (
    SHORT_ANSWER,
    SHORT_CAPTION_PROMPTS,
    Conversation,
    make_captioning_conversations,
    make_instruction_conversations,
    make_object_conversations,
)
from llm2clip.llava.dataset import PatchFeatures
from llm2clip.llava.train import train_llava
from llm2clip.models.pretrained import resolve_pretrained
from llm2clip.models.vision.vision_tower import VisionTower
from llm2clip.store.encode import store_image_features

LLM = "smollm2-135m"
TRAIN = ("flickr8k/captions.jsonl@train", "coco_img/captions.jsonl", "ade20k_ids/captions.jsonl")
TEST = ("flickr8k/captions.jsonl@val",)
CONFIG = LlavaConfig(
    pretrain_lr=2e-3, pretrain_batch_size=64, lr=2e-4, batch_size=64, micro_batch_size=32, save_steps=1000
)
# Name in the table -> task and metric in lmms-eval.
METRICS = {
    "CIDEr": ("flickr30k_test", "flickr_CIDEr,none"),
    "BLEU-4": ("flickr30k_test", "flickr_Bleu_4,none"),
    "accuracy": ("pope", "pope_accuracy,none"),
    "F1": ("pope", "pope_f1_score,none"),
}
SPEED_CONVERSATIONS = 768


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder that contains the data sets")
    parser.add_argument("--aligned", required=True, help="folder of the aligned model")
    parser.add_argument("--seeds", type=int, default=3, help="number of training runs per tower")
    parser.add_argument(
        "--pretrain_steps", type=int, default=60, help="number of training steps for the projector alone"
    )
    parser.add_argument("--steps", type=int, default=120, help="number of training steps for the projector and the LLM")
    parser.add_argument("--images", type=int, default=1000, help="number of val images to caption")
    parser.add_argument("--pope_images", type=int, default=200, help="number of val images to ask about objects")
    parser.add_argument("--only", choices=["towers", "speed"], help="run only this part")
    parser.add_argument("--out", type=Path, default=Path("runs/llava"), help="folder for models and results")
    args = parser.parse_args()
    aligned = load_tower(args.aligned)
    original = load_tower(resolve_pretrained("efficientnet-lite0"), aligned.preprocess.size)
    train_records = read_records(args.data, TRAIN)
    if args.only != "speed":
        compare_towers(args, {"original": original, "aligned": aligned}, train_records)
    if args.only != "towers":
        measure_speed(args, aligned, train_records)


def compare_towers(args: argparse.Namespace, towers: dict[str, VisionTower], train_records: list[Record]) -> None:
    """Train and evaluate a model with each tower and seed. Print a table row per run, and the mean per tower."""
    test_records = read_records(args.data, TEST)
    sample = random.Random(0).sample(test_records, min(args.images, len(test_records)))
    tasks = write_tasks(args.out / "tasks", sample, sample[: args.pope_images])
    captioning = make_captioning_conversations(train_records)
    instruction = make_instruction_conversations(train_records)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in towers}
    print(f"| tower | seed | {' | '.join(METRICS)} | minutes |\n|---|---|---|---|---|---|---|")
    for seed in range(args.seeds):
        config = dataclasses.replace(CONFIG, seed=seed)
        pretrain = sample_conversations(captioning, args.pretrain_steps * config.pretrain_batch_size, seed)
        instruct = sample_conversations(instruction, args.steps * config.batch_size, seed)
        for name, tower in towers.items():
            start = time.perf_counter()
            run = args.out / f"{name}-{seed}"
            if not (run / "model").is_dir():
                train_model(args.out, name, tower, pretrain, instruct, config=config)
            metrics = evaluate(run / "model", tasks)
            minutes = (time.perf_counter() - start) / 60
            runs[name].append(metrics)
            (run / "metrics.json").write_text(json.dumps(metrics, indent=1))
            values = " | ".join(f"{metrics[key]:.1f}" for key in METRICS)
            print(f"| {name} | {seed} | {values} | {minutes:.1f} |", flush=True)
    for name, results in runs.items():
        print(f"| {name}, mean | | {' | '.join(format_mean_std(results, key) for key in METRICS)} | |")


def write_tasks(folder: Path, captioned: list[Record], asked_about: list[Record]) -> list[dict[str, Any]]:
    """Write the images and questions of two tasks. Return task definitions, which are variants of lmms-eval's tasks.

    Args:
        captioned: images for which captions are generated.
        asked_about: images about which yes-or-no questions are asked.
    """
    captions = []
    for n, record in enumerate(captioned):
        captions.append((record, {"img_id": n, "caption": list(record.captions)}))
    questions = []
    record_by_id = {record.id: record for record in asked_about}
    for conversation in make_object_conversations(asked_about):
        for question, answer in conversation.turns:
            row = {
                "question_id": len(questions),
                "question": question.removesuffix(SHORT_ANSWER),
                "answer": answer.lower(),
            }
            questions.append((record_by_id[conversation.id], row))
    caption_settings = {
        "doc_to_text": SHORT_CAPTION_PROMPTS[0],
        "generation_kwargs": {"max_new_tokens": 32, "num_beams": 3, "do_sample": False},
    }
    tasks: list[dict[str, Any]] = []
    for task, rows, settings in (("flickr30k_test", captions, caption_settings), ("pope", questions, {})):
        data = folder / task
        (data / "test").mkdir(parents=True, exist_ok=True)
        with (data / "test/metadata.jsonl").open("w") as file:
            for n, (record, row) in enumerate(rows):
                source = Path(str(record.image)).resolve()
                link = data / f"test/{n}{source.suffix}"
                if not link.is_symlink():
                    link.symlink_to(source)
                file.write(json.dumps({"file_name": link.name, **row}) + "\n")
        dataset = {"dataset_path": "imagefolder", "dataset_kwargs": {"data_dir": str(data)}}
        tasks.append({"task": task, **dataset, **settings})
    return tasks


def evaluate(model: Path, tasks: list[dict[str, Any]]) -> dict[str, float]:
    """Evaluate a model with lmms-eval. Return its metrics in percent."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all task data are local
    from lmms_eval.evaluator import simple_evaluate

    from llm2clip.llava.lmms import LmmsModel

    results = simple_evaluate(LmmsModel(str(model)), tasks=[dict(task) for task in tasks], bootstrap_iters=0)["results"]
    return {name: 100 * results[task][metric] for name, (task, metric) in METRICS.items()}


def train_model(
    out: Path,
    name: str,
    tower: VisionTower,
    pretrain: list[Conversation],
    instruct: list[Conversation],
    *,
    config: LlavaConfig,
) -> None:
    """Build and train a model in `out/NAME-SEED`. Runs with the same tower share its cached features."""
    built = out / f"built-{name}-{config.seed}"
    if not built.is_dir():
        build_llava(tower, LLM, built, config.seed)
    run = out / f"{name}-{config.seed}"
    run.mkdir(parents=True, exist_ok=True)
    features = out / f"features-{name}"
    features.mkdir(parents=True, exist_ok=True)
    if not (run / "features").is_symlink():
        (run / "features").symlink_to(features.resolve())
    train_llava(str(built), pretrain, instruct, config=config, out=run, log=SkipLog())
    shutil.rmtree(built)


def format_mean_std(results: list[dict[str, float]], key: str) -> str:
    values = [metrics[key] for metrics in results]
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def measure_speed(args: argparse.Namespace, tower: VisionTower, train_records: list[Record]) -> None:
    """Print the training speed, in conversations per second, for three settings with the same model and data."""
    conversations = sample_conversations(make_instruction_conversations(train_records), SPEED_CONVERSATIONS, 0)
    built = args.out / "built-speed"
    if not built.is_dir():
        build_llava(tower, LLM, built)
    settings = {
        "random": dataclasses.replace(CONFIG, group_by_length=False, cache_gb=0),
        "grouped by length": dataclasses.replace(CONFIG, group_by_length=True, cache_gb=0),
        "grouped by length, cached features": dataclasses.replace(CONFIG, group_by_length=True, cache_gb=20),
    }
    print("| batches | conversations/s | speed-up |\n|---|---|---|")
    rates: list[float] = []
    for name, config in settings.items():
        run = args.out / f"speed-{len(rates)}"
        shutil.rmtree(run, ignore_errors=True)
        if config.cache_gb:  # fill the cache before measuring, because all epochs and runs share it
            model = AutoModelForImageTextToText.from_pretrained(built)
            features = PatchFeatures(model, AutoProcessor.from_pretrained(built))
            images = {item.image.key: item.image for item in conversations if item.image is not None}
            folder = run / "features"
            store_image_features(list(images.values()), features, features.identity(), folder, SkipLog(), batch_size=32)
        start = time.perf_counter()
        train_llava(str(built), [], conversations, config=config, out=run, log=SkipLog())
        seconds = time.perf_counter() - start
        last_line = (run / "instruct/metrics.jsonl").read_text().splitlines()[-1]
        rates.append(json.loads(last_line)["train_samples_per_second"])
        print(f"| {name} | {rates[-1]:.2f} | {rates[-1] / rates[0]:.2f}x |", flush=True)
        print(f"  ({seconds:.0f} s, including loading and saving the model)")


def read_records(data: Path, sources: tuple[str, ...]) -> list[Record]:
    return [record for source in sources for record in open_records(str(data / source))]


def sample_conversations(conversations: list[Conversation], count: int, seed: int) -> list[Conversation]:
    return random.Random(seed).sample(conversations, min(count, len(conversations)))


if __name__ == "__main__":
    main()
