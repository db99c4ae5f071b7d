"""What each part of stage 2 is worth: tables of retrieval on photographs, a row a command.

    python benchmarks/stage2.py DATA --out runs/stage2 \\
        --encoder tc=runs/stage1/100-steps/tc/encoder cc=runs/stage1/100-steps/cc/encoder

DATA holds flickr8k, coco_img and ade20k_ids, one captions.jsonl and images each. Trained on 8,335 images: Flickr8k's
training split and its 91 of no split, coco_img, ade20k_ids. Tested on Flickr8k's 1,000 validation images with 5,000
captions. `raw` is SmolLM2-135M, `minilm` all-MiniLM-L6-v2; the encoders named on the command line are tuned ones (`tc`,
`cc`, `gemma-cc`), and rows of those that are not named are left out.

    frozen      text tower by text tower: the heads alone, on features of EfficientNet-Lite0 at 160 pixels
    towers      the same heads, and then two passes that train the tower's last eight blocks with them
    neighbours  LLM2CLIP, LiT, SAIL and LIFT, each with the passes that its row tells
    captions    one caption of each image in a step against all of them, heads alone, run by run of as many passes
    dense       how often a caption is a dense one: 0, 50, 100%, heads alone; trained without ade20k_ids, where an
                image's captions joined are its dense one, and tested on ade20k_ids with whole captions and with their
                first sentences

A run that is done is not done again; OUT/TABLE.md has them, each with its command.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from shared import lines, run, write

SIZE = ["--align.image_size", "160", "--align.embed_dim", "256", "--align.captions_per_image", "0"]
HEADS = [*SIZE, "--align.tower_lr", "0", "--align.cache_features", "true", "--align.eval_steps", "1000"]
FROZEN = [*HEADS, "--align.epochs", "10", "--align.batch_size", "512"]
TRAINED = [
    *(
        *SIZE,
        "--align.head_epochs",
        "10",
        "--align.epochs",
        "2",
        "--align.batch_size",
        "128",
        "--align.tower_lr",
        "3e-4",
    ),
    *("--align.train_layers", "8", "--align.min_crop_scale", "0.6", "--align.hflip", "true", "--align.ema", "0.99"),
]
SAIL = [*HEADS, "--align.projection", "glu", "--align.adapter", "glu", "--align.loss", "sigmoid"]
# table: {row: (encoder, settings)}
TABLES: dict[str, dict[str, tuple[str, list[str]]]] = {
    "frozen": {name: (name, FROZEN) for name in ("raw", "minilm", "tc", "cc", "gemma-cc")},
    "towers": {name: (name, TRAINED) for name in ("raw", "minilm", "tc", "cc", "gemma-cc")},
    "neighbours": {
        "LLM2CLIP": ("cc", TRAINED),
        "LiT: tower locked": ("cc", [*TRAINED, "--align.tower_lr", "0", "--align.train_layers", "null"]),
        "SAIL, 2 passes of batch 512: tower and LLM frozen, GLU heads, sigmoid": (
            "cc",
            [*SAIL, "--align.epochs", "2", "--align.batch_size", "512"],
        ),
        "SAIL, 40 passes of batch 2,048 over the features of one": (
            "cc",
            [*SAIL, "--align.epochs", "40", "--align.batch_size", "2048"],
        ),
        "LIFT: cosine to the captions' vectors, tower trained": (
            "cc",
            [*TRAINED, "--align.loss", "cosine", "--align.adapter", "none"],
        ),
    },
    "captions": {
        f"{k or 'all'} a step, {passes} passes": (
            "minilm",
            [*FROZEN, "--align.captions_per_image", str(k), "--align.epochs", str(passes)],
        )
        for k in (1, 0)
        for passes in (2, 4, 8, 16)
    },
    "dense": {
        f"{share}% dense, {name}": (
            name,
            [
                *(*FROZEN, "--align.captions_per_image", "2", "--align.caption_mix"),
                json.dumps({"captions": 100 - share, "long_captions": share}),
            ],
        )
        for name in ("cc", "gemma-cc", "minilm")
        for share in (0, 50, 100)
    },
}
SEEDS = {"frozen": 3, "towers": 3, "neighbours": 1, "captions": 3, "dense": 1}


def pictured(file: Path) -> Iterator[dict[str, Any]]:
    """Rows whose images are named by their whole paths."""
    for row in lines(file):
        yield row | {"image": str(file.parent / row["image"])}


def photographs(data: Path, dense: bool) -> Iterator[dict[str, Any]]:
    """What is trained on; with dense captions, the short ones joined, and without ade20k_ids."""
    for name in ("flickr8k", "coco_img", *(() if dense else ("ade20k_ids",))):
        for row in pictured(data / name / "captions.jsonl"):
            if name == "flickr8k" and row["split"] == "val":
                continue
            texts: dict[str, Any] = {k: row[k] for k in ("captions", "long_captions") if k in row}
            if dense and len(texts["captions"]) > 1:
                texts["long_captions"] = [" ".join(texts["captions"])]
            yield {"image": row["image"], "id": row["id"], "split": "train", **texts}


def sentences(data: Path) -> Iterator[dict[str, Any]]:
    """ADE20K's images with the first sentence of their long captions, and with all."""
    for row in pictured(data / "ade20k_ids/captions.jsonl"):
        texts = {"captions": row["sentences"][:1], "long_captions": row["long_captions"]}
        yield {"image": row["image"], "id": row["id"], **texts}


def trained(command: list[str], folder: Path) -> list[dict[str, Any]]:
    """Run an `align`, unless it is done; its evaluations."""
    if not (folder / "model").exists():
        run(command, folder.with_suffix(".log"))
    return [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]


def of_rooms(folder: Path, rooms: str) -> dict[str, str]:
    """T2I R@1 of a run's model on ADE20K: by the first sentence and by the whole caption."""
    result = folder / "rooms/results.json"
    if not result.exists():
        run(
            ["evaluate", str(folder / "model"), f"{rooms}@none", "--out", str(result.parent)],
            folder.with_suffix(".log"),
        )
    rows = {r["captions"]: f"{r['T2I']['R@1']:.1f}" for r in json.loads(result.read_text())["results"][0]["rows"]}
    return {"ADE20K T2I, first sentence": rows["captions"], "whole caption": rows["long_captions"]}


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--encoder", nargs="+", default=[], metavar="NAME=PATH")
    parser.add_argument("--only", nargs="+", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--rows", nargs="+", help="of those tables, these rows alone")
    parser.add_argument("--seeds", type=int, help="runs of each row, in place of the table's own number")
    given = parser.parse_args()
    data, out = given.data.resolve(), given.out
    encoders = {"raw": "smollm2-135m", "minilm": "all-minilm-l6-v2", **dict(e.split("=", 1) for e in given.encoder)}

    train = str(write(out / "data/train.jsonl", photographs(data, dense=False)))
    dense = str(write(out / "data/dense.jsonl", photographs(data, dense=True)))
    rooms = str(write(out / "data/ade20k.jsonl", sentences(data)))
    val = f"{data / 'flickr8k/captions.jsonl'}@val"
    embedded: set[tuple[str, bool]] = set()
    for table in given.only:
        rows: list[dict[str, str]] = []
        for row, (encoder, settings) in TABLES[table].items():
            if encoder not in encoders or (given.rows and row not in given.rows):
                continue
            path, store = ["--encoder.path", encoders[encoder]], str(out / "stores" / encoder)
            if (encoder, table == "dense") not in embedded:
                texts = [dense, rooms] if table == "dense" else [train]
                run(["embed", *texts, val, "--out", store, *path], out / f"embed-{encoder}.log")
                embedded.add((encoder, table == "dense"))
            found = []
            for seed in range(given.seeds or SEEDS[table]):
                folder = out / table / f"{re.sub(r'[^A-Za-z0-9]+', '-', row.split(':')[0])}-{seed}"
                size = settings[settings.index("--align.image_size") + 1] if "--align.image_size" in settings else "224"
                command = ["align", dense if table == "dense" else train, "--store", store, *path, "--held_out", val,
                           "--features", str(out / f"features-{size}"), *settings,
                           "--out", str(folder), "--align.seed", str(seed)]  # fmt: skip
                found.append(trained(command, folder))
            cells = {way: spread([run[-1][f"captions {way} R@1"] for run in found]) for way in ("I2T", "T2I")}
            cells["mean"] = spread([run[-1]["score"] for run in found])
            if table == "dense":
                cells |= of_rooms(folder, rooms)
            rows.append({"row": row, "encoder": encoder, **cells, "command": f"`llm2clip {shlex.join(command)}`"})
            print(" | ".join(list(rows[-1].values())[:-1]), flush=True)
            body = [list(rows[0]), ["---"] * len(rows[0]), *(r.values() for r in rows)]
            (out / f"{table}.md").write_text("".join(f"| {' | '.join(line)} |\n" for line in body))
