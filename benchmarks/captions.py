"""Compare models trained on human captions, on synthetic captions, and on mixtures of both, on photographs.

    python benchmarks/captions.py DATA --out runs/captions

DATA contains flickr8k, coco_img and ade20k_ids, each with a captions.jsonl and images. Requires pycocoevalcap. The
steps are:

1. A LLaVA is built from EfficientNet-Lite0 and SmolLM2-135M, and trained on the captions of coco_img and ade20k_ids:

       llm2clip llava build --vision efficientnet-lite0 --llm smollm2-135m --out OUT/built
       llm2clip llava train OUT/built --pretrain OUT/llava.json --instruct OUT/llava.json --images DATA --out OUT/llava

2. It writes two short captions and a dense one for each of Flickr8k's training images:

       llm2clip caption OUT/human.jsonl --model OUT/llava/model --prompts OUT/captions.yaml --out OUT/captions.jsonl

3. `align` trains the heads of a frozen EfficientNet-Lite0 at 160 pixels on cached features, with all-MiniLM-L6-v2 as
   the caption encoder. A step uses one caption per image. The models of each seed are:

       human                    human captions only
       short-25 to short-75     25 to 75% short synthetic captions, otherwise human captions
       short-100                short synthetic captions only
       dense-25 to dense-100    the same with dense synthetic captions
       one prompt               short synthetic captions of the first prompt only
       checked                  short synthetic captions that `llm2clip caption --check OUT/checker/model` accepts

   The model of --check is trained in the same way, on coco_img and ade20k_ids. The texts of synthetic captions are
   always checked. An image without accepted captions is not used for training.

4. The models are tested on the human captions of Flickr8k's validation images.

OUT/captions.md compares the captions with the images (rank, and CLIPScore, arXiv 2104.08718, with the model of --check)
and with the human captions (CIDEr-D, arXiv 1411.5726). OUT/table.md contains the results of the models: means and
standard deviations over the seeds, and in brackets the 95% intervals of the first seed. An interrupted benchmark can be
resumed with the same command. To try all steps quickly, pass
--images 20 --epochs 0.1 --align_epochs 1 --seeds 1 --shares 100.
"""

import argparse
import json
import random
import shutil
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml

from llm2clip.caption.checks import rank_captions, split_words
from llm2clip.data.records import Record, open_records
from llm2clip.data.skip_log import SkipLog
from llm2clip.evaluate.embeddings import ModelEmbeddings
from llm2clip.llava.conversations import IMAGE_TOKEN, LONG_CAPTION_PROMPTS, SHORT_CAPTION_PROMPTS
from llm2clip.models.dual_encoder import open_dual_encoder
from shared import run_llm2clip, write_rows_once

TOWER, LLM = "efficientnet-lite0", "smollm2-135m"
ENCODER = ("--encoder.path", "all-minilm-l6-v2")
LLAVA = {"pretrain_epochs": "1", "pretrain_lr": "2e-3", "pretrain_batch_size": "32", "lr": "2e-4", "batch_size": "32"}
# The LLaVA has been trained with these questions.
PROMPTS = {
    "sentence": {"kind": "short", "text": SHORT_CAPTION_PROMPTS[0], "temperature": 0, "max_tokens": 40},
    "sampled": {"kind": "short", "text": SHORT_CAPTION_PROMPTS[2], "temperature": 0.7, "max_tokens": 40},
    "dense": {"kind": "dense", "text": LONG_CAPTION_PROMPTS[0], "temperature": 0, "max_tokens": 120},
}
METRICS = ("I2T R@1", "T2I R@1", "mAP, 1 word", "mAP, 2 words", "mAP, 3 words")
SCORED_IMAGES = 1000  # number of images whose captions are compared with the images


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
    args = parser.parse_args()
    captions = write_captions(args)
    print(write_text(args.out / "captions.md", describe_captions(captions, args.out / "checker/model")))
    models = make_training_sets(captions, args)
    val = write_rows_once(args.out / "val.jsonl", read_rows(args, "flickr8k", "@val"))
    for seed in range(args.seeds):
        for name, (file, mix) in models.items():
            align(args, file, mix, args.out / f"seed-{seed}" / name, seed)
        first, *others = [str(args.out / f"seed-{seed}" / name / "model") for name in models]
        command = ["evaluate", first, f"{val}@none", "--short_queries"]
        run_llm2clip(
            [*command, "--baselines", *others, "--out", str(args.out / f"seed-{seed}/evaluate")], get_log(args)
        )
    results = [args.out / f"seed-{seed}" / "evaluate/results.json" for seed in range(args.seeds)]
    print(write_text(args.out / "table.md", make_table(results, list(models))))


def get_log(args: argparse.Namespace) -> Path:
    log: Path = args.out / "log.txt"
    return log


def write_text(file: Path, text: str) -> str:
    file.write_text(text)
    return text


# ---- captions --------------------------------------------------------------------------------------------------------


def write_captions(args: argparse.Namespace) -> dict[str, Path]:
    """Train the LLaVA and the model of --check, and write the synthetic captions.

    Returns:
        Files with human and synthetic captions: of all prompts, of the first prompt, and those that --check accepts.
    """
    out = args.out
    other = [*read_rows(args, "coco_img"), *read_rows(args, "ade20k_ids")]
    human = write_rows_once(out / "human.jsonl", read_rows(args, "flickr8k", "@train"))
    train_llava(args, list(make_conversations(other, args.data)))
    files = {"all": out / "captions.jsonl", "one prompt": out / "one_prompt.jsonl", "checked": out / "checked.jsonl"}
    start = time.monotonic()
    caption(args, human, files["all"], PROMPTS)
    print(f"{time.monotonic() - start:.0f} s for the captions, including starting and those that already existed")
    for name in ("one prompt", "checked"):  # with the answers that already exist
        shutil.copy(f"{files['all']}.sqlite", f"{files[name]}.sqlite")
    caption(args, human, files["one prompt"], {"sentence": PROMPTS["sentence"]})
    others = write_rows_once(out / "other.jsonl", other)
    for file in (files["all"], files["one prompt"], others):  # `checked` has no other captions than `all`
        run_llm2clip(["embed", f"{file}@none", *ENCODER, "--out", str(out / "store")], get_log(args))
    align(args, others, {"captions": 1, "long_captions": 1}, out / "checker", 0)
    caption(args, human, files["checked"], PROMPTS, "--check", str(out / "checker/model"))
    return files


def train_llava(args: argparse.Namespace, conversations: list[dict[str, Any]]) -> None:
    out = args.out
    if (out / "llava/model").exists():
        return
    if not (out / "built").exists():
        run_llm2clip(["llava", "build", "--vision", TOWER, "--llm", LLM, "--out", str(out / "built")], get_log(args))
    file = out / "llava.json"
    file.write_text(json.dumps(conversations))
    settings = {**LLAVA, "epochs": str(args.epochs)}
    flags = [word for name, value in settings.items() for word in (f"--llava.{name}", value)]
    data = ["--pretrain", str(file), "--instruct", str(file), "--images", str(args.data)]
    run_llm2clip(["llava", "train", str(out / "built"), *data, *flags, "--out", str(out / "llava")], get_log(args))


def caption(args: argparse.Namespace, source: Path, out: Path, prompts: dict[str, Any], *flags: str) -> None:
    prompts_file = out.with_suffix(".yaml")
    prompts_file.write_text(yaml.safe_dump(prompts, sort_keys=False))
    command = ["caption", f"{source}@none", "--model", str(args.out / "llava/model"), "--prompts", str(prompts_file)]
    run_llm2clip([*command, *flags, "--batch_size", "64", "--out", str(out)], get_log(args))


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
            for text in row[field]:
                question = {"from": "human", "value": f"{IMAGE_TOKEN}\n{rng.choice(prompts)}"}
                turns = [question, {"from": "gpt", "value": text}]
                yield {"id": row["id"], "image": image, "conversations": turns}


# ---- quality of the captions -----------------------------------------------------------------------------------------


def describe_captions(files: dict[str, Path], checker: Path) -> str:
    """Return a table with the number, length and quality of each kind of caption."""
    images: dict[str, list[tuple[Record, str]]] = defaultdict(list)  # one caption per image
    counts: dict[str, int] = defaultdict(int)
    for name, field in (("human", "captions"), ("short", "short_captions"), ("dense", "long_captions")):
        for record in open_records(f"{files['all']}@none"):
            texts = getattr(record, field)
            counts[name] += len(texts)
            if texts:
                images[name].append((record, texts[0]))
    for record in open_records(f"{files['checked']}@none"):
        counts["short, checked"] += len(record.short_captions)
        if record.short_captions:
            images["short, checked"].append((record, record.short_captions[0]))
    model = ModelEmbeddings(open_dual_encoder(str(checker)), SkipLog())
    lines = ["| captions | number | images with captions | median words | CIDEr-D | rank | CLIPScore |"]
    lines.append(f"|{'---|' * 7}")
    for name, pairs in images.items():
        words = statistics.median(len(split_words(text)) for _, text in pairs)
        rank, score = compare_with_images(pairs[:SCORED_IMAGES], model)
        quality = f"{compute_cider(pairs):.1f} | {rank:.1%} | {score:.3f}"
        lines.append(f"| {name} | {counts[name]:,} | {len(pairs):,} | {words:g} | {quality} |")
    return "\n".join(lines) + "\n"


def compare_with_images(pairs: Sequence[tuple[Record, str]], model: ModelEmbeddings) -> tuple[float, float]:
    """Return the mean rank (see `llm2clip caption`) and the mean CLIPScore, 2.5 max(cosine similarity, 0).

    Unlike in the published CLIPScore, the captions have no prefix ("A photo depicts").
    """
    images, indices = model.encode_images([record.image for record, _ in pairs if record.image is not None])
    texts = model.encode_texts([pairs[index][1] for index in indices])
    scores, ranks = rank_captions(texts, images, images, torch.eye(len(images), dtype=torch.bool))
    return float(ranks.mean()), float(2.5 * scores.clamp(min=0).mean())


def compute_cider(pairs: Sequence[tuple[Record, str]]) -> float:
    """Return the CIDEr-D score in percent against the human captions. The caption itself is not a reference."""
    from pycocoevalcap.cider.cider import Cider

    def tokenize(text: str) -> str:
        return " ".join(split_words(text.lower()))

    references, candidates = {}, {}
    for number, (record, text) in enumerate(pairs):
        references[number] = [tokenize(other) for other in record.captions if other != text]
        candidates[number] = [tokenize(text)]
    score, _ = Cider().compute_score(references, candidates)
    return 100 * float(score)


# ---- models ----------------------------------------------------------------------------------------------------------


def make_training_sets(files: dict[str, Path], args: argparse.Namespace) -> dict[str, tuple[Path, dict[str, float]]]:
    """Return the training set and the caption mix of each model.

    Sets without human captions contain only images with synthetic captions, which are in `captions`.
    """
    models: dict[str, tuple[Path, dict[str, float]]] = {"human": (files["all"], {"captions": 1})}
    for name, field in (("short", "short_captions"), ("dense", "long_captions")):
        for share in args.shares:
            if share == 100:
                file = write_synthetic(files["all"], field, args.out / f"{name}.jsonl")
                models[f"{name}-100"] = file, {"captions": 1}
            else:
                models[f"{name}-{share}"] = files["all"], {"captions": 1 - share / 100, field: share / 100}
    for name in ("one prompt", "checked"):
        file = write_synthetic(files[name], "short_captions", args.out / f"short_{files[name].name}")
        models[name] = file, {"captions": 1}
    return models


def write_synthetic(source: Path, field: str, out: Path) -> Path:
    rows = []
    for record in open_records(f"{source}@none"):
        if texts := list(getattr(record, field)):
            rows.append({"image": str(record.image), "id": record.id, "captions": texts})
    return write_rows_once(out, rows)


def align(args: argparse.Namespace, captions: Path, mix: dict[str, float], out: Path, seed: int) -> None:
    """Train a model on embedded captions, unless it exists."""
    if (out / "model").exists():
        return
    command = ["align", f"{captions}@none", "--store", str(args.out / "store"), *ENCODER, "--out", str(out)]
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
    run_llm2clip([*command, *flags, "--features", str(args.out / "features")], get_log(args))


# ---- results ---------------------------------------------------------------------------------------------------------


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
