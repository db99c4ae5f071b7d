"""Compare a vision tower before and after `align` in the same multimodal LLM.

    python benchmarks/llava.py DATA --aligned MODEL

DATA contains flickr8k/, coco_img/ and ade20k_ids/, each with a captions.jsonl. MODEL is a model folder whose tower was
initialised from EfficientNet-Lite0 and was not trained on the val split of flickr8k.

SmolLM2-135M-Instruct is trained with each tower on the same conversations, in the same order and for the same number of
steps. The conversations come from the train split of flickr8k, coco_img and ade20k_ids. lmms-eval evaluates the models
on the val split of flickr8k: CIDEr against the five captions of each image, and accuracy for yes-or-no questions about
objects. Install lmms-eval and Java, which its caption metrics need.
"""

import dataclasses
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

from llm2clip.data.records import Record, open_records
from llm2clip.data.skip_log import SkipLog
from llm2clip.llava import LlavaConfig
from llm2clip.llava.build import build_llava, load_vision_tower
from llm2clip.llava.conversations import (
    SHORT_ANSWER,
    SHORT_CAPTION_PROMPTS,
    Conversation,
    make_captioning_conversations,
    make_instruction_conversations,
    make_object_conversations,
)
from llm2clip.llava.train import train_llava
from llm2clip.models.pretrained import resolve_pretrained_name
from llm2clip.models.vision.vision_tower import VisionTower
from shared import format_mean_std, make_parser, print_header, print_row

LLM = "smollm2-135m"
TRAIN = ("flickr8k/captions.jsonl@train", "coco_img/captions.jsonl", "ade20k_ids/captions.jsonl")
TEST = "flickr8k/captions.jsonl@val"
CONFIG = LlavaConfig(
    pretrain_lr=2e-3, pretrain_batch_size=64, lr=2e-4, batch_size=64, micro_batch_size=32, save_steps=1000
)
# Name in the table -> task and metric in lmms-eval.
METRICS = {
    "CIDEr": ("flickr30k_test", "flickr_CIDEr,none"),
    "accuracy": ("pope", "pope_accuracy,none"),
}
SEEDS = 3
OUT = Path("runs/llava")  # folder for models and results
PRETRAIN_STEPS, STEPS = 30, 60  # training steps of the projector alone, and of the projector and the LLM
CAPTIONED_IMAGES, POPE_IMAGES = 250, 100


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("data", type=Path, help="folder that contains the datasets")
    parser.add_argument("--aligned", required=True, help="folder of the aligned model")
    args = parser.parse_args()
    aligned = load_vision_tower(args.aligned)
    original = load_vision_tower(resolve_pretrained_name("efficientnet-lite0"), aligned.preprocess.size)
    compare_towers(args.data, OUT, {"original": original, "aligned": aligned})


def compare_towers(data: Path, out: Path, towers: dict[str, VisionTower]) -> None:
    """Train and evaluate a model with each tower and seed. Print a table row per run, and the mean per tower."""
    train_records = [record for source in TRAIN for record in open_records(str(data / source))]
    test_records = list(open_records(str(data / TEST)))
    sample = random.Random(0).sample(test_records, min(CAPTIONED_IMAGES, len(test_records)))
    tasks = write_tasks(out / "tasks", sample, sample[:POPE_IMAGES])
    captioning = make_captioning_conversations(train_records)
    instruction = make_instruction_conversations(train_records)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in towers}
    print_header("tower", "seed", *METRICS)
    for seed in range(SEEDS):
        config = dataclasses.replace(CONFIG, seed=seed)
        pretrain = sample_conversations(captioning, PRETRAIN_STEPS * config.pretrain_batch_size, seed)
        instruct = sample_conversations(instruction, STEPS * config.batch_size, seed)
        for name, tower in towers.items():
            run = out / f"{name}-{seed}"
            if not (run / "model").is_dir():
                train_model(out, name, tower, pretrain, instruct, config=config)
            metrics = evaluate(run / "model", tasks)
            runs[name].append(metrics)
            print_row(name, seed, *(f"{metrics[key]:.1f}" for key in METRICS))
    for name, results in runs.items():
        means = [format_mean_std([metrics[key] for metrics in results]) for key in METRICS]
        print_row(f"{name}, mean", "", *means)


def write_tasks(folder: Path, captioned: list[Record], asked_about: list[Record]) -> list[dict[str, Any]]:
    """Write the images of two tasks, and the questions about `asked_about`. Return variants of lmms-eval's tasks."""
    captions = [(record, {"img_id": n, "caption": list(record.captions)}) for n, record in enumerate(captioned)]
    questions = []
    record_by_id = {record.id: record for record in asked_about}
    for conversation in make_object_conversations(asked_about):
        for question, answer in conversation.turns:
            row = {"question_id": len(questions), "question": question.removesuffix(SHORT_ANSWER)}
            questions.append((record_by_id[conversation.id], {**row, "answer": answer.lower()}))
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


def sample_conversations(conversations: list[Conversation], count: int, seed: int) -> list[Conversation]:
    return random.Random(seed).sample(conversations, min(count, len(conversations)))


if __name__ == "__main__":
    main()
