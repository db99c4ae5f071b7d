"""Compare models trained on human captions, on synthetic captions, and on mixtures of both, on photographs.

    python benchmarks/captions.py DATA --out runs/captions

DATA contains flickr8k, coco_img and ade20k_ids, each with a captions.jsonl and images. The steps are:

1. A LLaVA is built from EfficientNet-Lite0 and SmolLM2-135M, and trained on coco_img and ade20k_ids only:

       llm2clip llava build --vision efficientnet-lite0 --llm smollm2-135m --out OUT/built
       llm2clip llava train OUT/built --pretrain OUT/llava.json --instruct OUT/llava.json --images DATA --out OUT/llava

2. It writes two short captions and a dense one for each of Flickr8k's training images:

       llm2clip caption OUT/human.jsonl --model OUT/llava/model --prompts OUT/prompts.yaml --out OUT/captions.jsonl

   On one core of the AMX machine, an image takes up to 3.8 s (0.8 s for each short caption and 2.2 s for the dense one,
   if they reach the maximum number of tokens), so Flickr8k's 5,999 training images take up to 6.4 hours.

3. For each share of synthetic captions and each seed, `align` trains the heads of a frozen EfficientNet-Lite0 at 160
   pixels on cached features, with all-MiniLM-L6-v2 as the caption encoder. A step uses one caption per image, which is
   synthetic with the probability given by --align.caption_mix. The models are:

       human                     human captions only
       short-25 to short-100     25 to 100% short synthetic captions, otherwise human captions
       dense-25 to dense-100     25 to 100% dense synthetic captions, otherwise human captions

4. The models are tested on the human captions of Flickr8k's validation images.

The table OUT/table.md contains the means and standard deviations over the seeds, and in brackets the 95% intervals of
the first seed. An interrupted benchmark can be resumed with the same command. To try all steps quickly, pass
--images 20 --epochs 0.1 --align_epochs 1 --seeds 1 --shares 100.

--check MODEL compares the captions with the images (see `llm2clip caption`), so that the benchmark can be repeated with
and without captions that do not match. Copy OUT without the seeds for this, so that no captions are written again.
"""

import argparse
import json
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from llm2clip.data.records import open_records
from llm2clip.llava.chat_template import IMAGE_TOKEN
from llm2clip.llava.conversations import LONG_CAPTION_PROMPTS, SHORT_CAPTION_PROMPTS
from shared import run_llm2clip, write_rows_once

ENCODER, TOWER, LLM = "all-minilm-l6-v2", "efficientnet-lite0", "smollm2-135m"
LLAVA = {"pretrain_epochs": "1", "pretrain_lr": "2e-3", "pretrain_batch_size": "32", "lr": "2e-4", "batch_size": "32"}
# The LLaVA has been trained with these questions.
PROMPTS = {
    "sentence": {"kind": "short", "text": SHORT_CAPTION_PROMPTS[0], "temperature": 0, "max_tokens": 40},
    "sampled": {"kind": "short", "text": SHORT_CAPTION_PROMPTS[2], "temperature": 0.7, "max_tokens": 40},
    "dense": {"kind": "dense", "text": LONG_CAPTION_PROMPTS[0], "temperature": 0, "max_tokens": 120},
}
METRICS = ("I2T R@1", "T2I R@1", "mAP, 1 word", "mAP, 2 words", "mAP, 3 words")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder that contains the data sets")
    parser.add_argument("--out", type=Path, required=True, help="folder for models and results")
    parser.add_argument(
        "--shares", type=int, nargs="+", default=[25, 50, 75, 100], help="percentages of synthetic captions"
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of training runs per model")
    parser.add_argument("--images", type=int, help="use only the first images of each data set")
    parser.add_argument("--epochs", type=float, default=1.5, help="epochs of the LLaVA's LLM")
    parser.add_argument("--align_epochs", type=float, default=10, help="epochs of `align`")
    parser.add_argument("--check", help="dual encoder that compares the captions with the images")
    args = parser.parse_args()
    log = args.out / "log.txt"
    captions = write_captions(args, log)
    mixes = make_mixes(args.shares)
    val = write_rows_once(args.out / "val.jsonl", read_rows(args, "flickr8k", "@val"))
    run_llm2clip(["embed", captions, "--encoder.path", ENCODER, "--out", str(args.out / "store")], log)
    for seed in range(args.seeds):
        for name, mix in mixes.items():
            if not (args.out / f"seed-{seed}" / name / "model").exists():
                align(args, captions, mix, args.out / f"seed-{seed}" / name, seed)
        first, *others = [str(args.out / f"seed-{seed}" / name / "model") for name in mixes]
        command = ["evaluate", first, f"{val}@none", "--short_queries"]
        run_llm2clip([*command, "--baselines", *others, "--out", str(args.out / f"seed-{seed}/evaluate")], log)
    table = make_table([args.out / f"seed-{seed}" / "evaluate/results.json" for seed in range(args.seeds)], list(mixes))
    (args.out / "table.md").write_text(table)
    print(table)


def write_captions(args: argparse.Namespace, log: Path) -> str:
    """Train the LLaVA and write the synthetic captions. Return the file with human and synthetic captions."""
    out = args.out
    human = write_rows_once(out / "human.jsonl", read_rows(args, "flickr8k", "@train"))
    conversations = out / "llava.json"
    if not conversations.exists():
        rows = [*read_rows(args, "coco_img"), *read_rows(args, "ade20k_ids")]
        conversations.write_text(json.dumps(list(make_conversations(rows, args.data))))
    (out / "prompts.yaml").write_text(yaml.safe_dump(PROMPTS, sort_keys=False))
    if not (out / "llava/model").exists():
        if not (out / "built").exists():
            run_llm2clip(["llava", "build", "--vision", TOWER, "--llm", LLM, "--out", str(out / "built")], log)
        settings = {**LLAVA, "epochs": str(args.epochs)}
        flags = [word for name, value in settings.items() for word in (f"--llava.{name}", value)]
        data = ["--pretrain", str(conversations), "--instruct", str(conversations), "--images", str(args.data)]
        run_llm2clip(["llava", "train", str(out / "built"), *data, *flags, "--out", str(out / "llava")], log)
    captions = out / "captions.jsonl"
    command = ["caption", str(human), "--model", str(out / "llava/model"), "--prompts", str(out / "prompts.yaml")]
    check = ["--check", args.check] if args.check else []
    start = time.monotonic()
    run_llm2clip([*command, *check, "--out", str(captions)], log)
    print(f"{time.monotonic() - start:.0f} s for the captions, including starting and those that already existed")
    return str(captions)


def read_rows(args: argparse.Namespace, name: str, split: str = "") -> Iterator[dict[str, Any]]:
    """Yield the images and English captions of a data set, with absolute paths."""
    for record in islice(open_records(f"{args.data / name / 'captions.jsonl'}{split}"), args.images):
        row: dict[str, Any] = {"image": str(Path(str(record.image)).absolute()), "id": record.id}
        yield row | {"captions": list(record.captions), "long_captions": list(record.long_captions)}


def make_conversations(rows: list[dict[str, Any]], folder: Path) -> Iterator[dict[str, Any]]:
    """Yield one conversation per caption in LLaVA's format. Paths of images are relative to the folder."""
    rng = random.Random(0)
    for row in rows:
        image = str(Path(row["image"]).relative_to(folder.absolute()))
        for prompts, field in ((SHORT_CAPTION_PROMPTS, "captions"), (LONG_CAPTION_PROMPTS, "long_captions")):
            for caption in row[field]:
                question = {"from": "human", "value": f"{IMAGE_TOKEN}\n{rng.choice(prompts)}"}
                turns = [question, {"from": "gpt", "value": caption}]
                yield {"id": row["id"], "image": image, "conversations": turns}


def make_mixes(shares: list[int]) -> dict[str, dict[str, float]]:
    """Return the weight of each kind of caption, keyed by the name of the model."""
    mixes: dict[str, dict[str, float]] = {"human": {"captions": 1}}
    for name, field in (("short", "short_captions"), ("dense", "long_captions")):
        for share in shares:
            mix = {"captions": 1 - share / 100, field: share / 100}
            mixes[f"{name}-{share}"] = {field: weight for field, weight in mix.items() if weight}
    return mixes


def align(args: argparse.Namespace, captions: str, mix: dict[str, float], out: Path, seed: int) -> None:
    command = [
        "align",
        f"{captions}@none",
        "--store",
        str(args.out / "store"),
        "--encoder.path",
        ENCODER,
        "--out",
        str(out),
    ]
    settings = {
        "tower": TOWER,
        "image_size": "160",
        "tower_lr": "0",
        "captions_per_image": "1",
        "caption_mix": json.dumps(mix),
        "epochs": str(args.align_epochs),
        "eval_steps": "0",
        "seed": str(seed),
    }
    flags = [word for name, value in settings.items() for word in (f"--align.{name}", value)]
    run_llm2clip([*command, *flags, "--features", str(args.out / "features")], args.out / "log.txt")


def make_table(files: list[Path], names: list[str]) -> str:
    """Return the metrics of each model as a Markdown table. `names` has the order in which `evaluate` lists models."""
    values: dict[tuple[str, str], list[float]] = defaultdict(list)
    intervals: dict[tuple[str, str], tuple[float, float]] = {}
    for file in files:
        results = json.loads(file.read_text())["results"]
        for name, result in zip(names, results, strict=True):
            for metric, (value, interval) in read_metrics(result["rows"][0]).items():
                values[name, metric].append(value)
                intervals.setdefault((name, metric), interval)
    lines = [f"| captions | {' | '.join(METRICS)} |", f"|---|{'---|' * len(METRICS)}"]
    for name in names:
        cells = []
        for metric in METRICS:
            if (name, metric) not in intervals:  # a few images have no queries of this length
                cells.append("–")
                continue
            seeds, (low, high) = values[name, metric], intervals[name, metric]
            cells.append(f"{statistics.mean(seeds):.1f} ± {statistics.pstdev(seeds):.1f} ({low:.1f} to {high:.1f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def read_metrics(row: dict[str, Any]) -> dict[str, tuple[float, tuple[float, float]]]:
    """Return each metric and its interval."""
    metrics = {f"{way} R@1": (row[way]["R@1"], row[f"{way} interval"]["R@1"]) for way in ("I2T", "T2I")}
    for length in row["short queries"]:
        plural = "" if length["words"] == "1" else "s"
        metrics[f"mAP, {length['words']} word{plural}"] = (length["mAP"], length["mAP interval"])
    return metrics


if __name__ == "__main__":
    main()
