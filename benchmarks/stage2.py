"""Run ablations of stage 2, and report the retrieval accuracy on photographs for each setting.

    python benchmarks/stage2.py DATA --out runs/stage2 \\
        --encoder tc=runs/stage1/100-steps/tc/encoder cc=runs/stage1/100-steps/cc/encoder

DATA contains flickr8k, coco_img and ade20k_ids, each with a captions.jsonl and images. The training data consists of
8,335 images: Flickr8k's training split, the 91 Flickr8k images without a split, coco_img and ade20k_ids. The test data
consists of Flickr8k's 1,000 validation images with 5,000 captions. The vision tower is a frozen EfficientNet-Lite0 at
160 pixels, so only the heads are trained, on cached features.

`raw` is SmolLM2-135M and `minilm` is all-MiniLM-L6-v2. The tuned encoders (`tc`, `cc`, `gemma-cc`) must be passed with
--encoder; rows whose encoder is missing are skipped. The tables are:

    frozen      comparison of text towers
    captions    one caption per image in each step, or all captions, for several numbers of epochs
    dense       training with 0, 50 or 100% dense captions. An image's dense caption joins all its captions. These
                models are trained without ade20k_ids and are also tested on ade20k_ids, both with full captions and
                with their first sentences

Results are cached in OUT. Each table is written to OUT/TABLE.md, with the command for each row.
"""

import argparse
import json
import re
import shlex
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared import read_rows, run_llm2clip, write_rows_once

FROZEN = [
    *("--align.image_size", "160", "--align.embed_dim", "256", "--align.captions_per_image", "0"),
    *("--align.tower_lr", "0", "--align.eval_steps", "1000", "--align.epochs", "10", "--align.batch_size", "512"),
]


@dataclass
class Row:
    """A table row: the caption encoder, and all settings that differ from FROZEN."""

    encoder: str
    settings: list[str] = field(default_factory=list)


def caption_mix(dense_percent: int) -> list[str]:
    mix = json.dumps({"captions": 100 - dense_percent, "long_captions": dense_percent})
    return ["--align.captions_per_image", "2", "--align.caption_mix", mix]


TABLES: dict[str, dict[str, Row]] = {
    "frozen": {name: Row(name) for name in ("raw", "minilm", "tc", "cc", "gemma-cc")},
    "captions": {
        f"{count or 'all'} per step, {epochs} epochs": Row(
            "minilm", ["--align.captions_per_image", str(count), "--align.epochs", str(epochs)]
        )
        for count in (1, 0)
        for epochs in (2, 4, 8, 16)
    },
    "dense": {
        f"{percent}% dense, {name}": Row(name, caption_mix(percent))
        for name in ("cc", "gemma-cc", "minilm")
        for percent in (0, 50, 100)
    },
}
SEEDS = {"frozen": 3, "captions": 3, "dense": 1}


class Ablations:
    """Data, embedding stores and training runs of the benchmark."""

    def __init__(self, data: Path, out: Path, encoders: dict[str, str]) -> None:
        self.out, self.encoders = out, {"raw": "smollm2-135m", "minilm": "all-minilm-l6-v2", **encoders}
        self.train = str(write_rows_once(out / "data/train.jsonl", training_rows(data, dense=False)))
        self.train_dense = str(write_rows_once(out / "data/dense.jsonl", training_rows(data, dense=True)))
        self.ade20k = str(write_rows_once(out / "data/ade20k.jsonl", ade20k_rows(data)))
        self.held_out = f"{data / 'flickr8k/captions.jsonl'}@val"
        self._embedded: set[tuple[str, bool]] = set()

    def measure_row(self, table: str, name: str, row: Row, seeds: int) -> dict[str, str]:
        """Train the models for a table row and return the cells of the row."""
        dense = table == "dense"
        encoder = ["--encoder.path", self.encoders[row.encoder]]
        store = self._embed(row.encoder, encoder, dense)
        evaluations = []
        for seed in range(seeds):
            folder = self.out / table / f"{re.sub(r'[^A-Za-z0-9]+', '-', name)}-{seed}"
            command = ["align", self.train_dense if dense else self.train, "--store", store, *encoder]
            command += ["--held_out", self.held_out, "--features", str(self.out / "features-160")]
            command += [*FROZEN, *row.settings, "--out", str(folder), "--align.seed", str(seed)]
            if not (folder / "model").exists():
                run_llm2clip(command, folder.with_suffix(".log"))
            evaluations.append(list(read_rows(folder / "evaluations.jsonl"))[-1])
        cells = {"row": name, "encoder": row.encoder}
        for direction in ("I2T", "T2I"):
            cells[direction] = format_mean_std([metrics[f"captions {direction} R@1"] for metrics in evaluations])
        cells["mean"] = format_mean_std(
            [(metrics["captions I2T R@1"] + metrics["captions T2I R@1"]) / 2 for metrics in evaluations]
        )
        if dense:
            cells |= self._evaluate_ade20k(folder)
        return cells | {"command": f"`llm2clip {shlex.join(command)}`"}

    def _embed(self, name: str, encoder: list[str], dense: bool) -> str:
        """Embed the captions of the training and test data, once per encoder and table type. Return the store."""
        store = str(self.out / "stores" / name)
        if (name, dense) not in self._embedded:
            sources = [self.train_dense, self.ade20k] if dense else [self.train]
            command = ["embed", *sources, self.held_out, "--out", store, *encoder]
            run_llm2clip(command, self.out / f"embed-{name}.log")
            self._embedded.add((name, dense))
        return store

    def _evaluate_ade20k(self, folder: Path) -> dict[str, str]:
        """Return the T2I R@1 of a run's model on ADE20K, using first sentences and full captions as queries."""
        result = folder / "ade20k/results.json"
        if not result.exists():
            command = ["evaluate", str(folder / "model"), f"{self.ade20k}@none", "--out", str(result.parent)]
            run_llm2clip(command, folder.with_suffix(".log"))
        rows = json.loads(result.read_text())["results"][0]["rows"]
        recalls = {row["captions"]: f"{row['T2I']['R@1']:.1f}" for row in rows}
        return {"ADE20K T2I, first sentence": recalls["captions"], "whole caption": recalls["long_captions"]}


def training_rows(data: Path, dense: bool) -> Iterator[dict[str, Any]]:
    """Yield the training data. If `dense`, omit ade20k_ids and join each image's captions into its long caption."""
    for name in ("flickr8k", "coco_img", *(() if dense else ("ade20k_ids",))):
        for row in rows_with_paths(data / name / "captions.jsonl"):
            if name == "flickr8k" and row["split"] == "val":
                continue
            captions: dict[str, Any] = {kind: row[kind] for kind in ("captions", "long_captions") if kind in row}
            if dense and len(captions["captions"]) > 1:
                captions["long_captions"] = [" ".join(captions["captions"])]
            yield {"image": row["image"], "id": row["id"], "split": "train", **captions}


def ade20k_rows(data: Path) -> Iterator[dict[str, Any]]:
    """Yield the images from ADE20K, each with the first sentence of its long caption and with the full long caption."""
    for row in rows_with_paths(data / "ade20k_ids/captions.jsonl"):
        captions = {"captions": row["sentences"][:1], "long_captions": row["long_captions"]}
        yield {"image": row["image"], "id": row["id"], **captions}


def rows_with_paths(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file, with image paths made absolute."""
    for row in read_rows(file):
        yield row | {"image": str(file.parent / row["image"])}


def format_mean_std(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def write_table(file: Path, rows: list[dict[str, str]]) -> None:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    file.write_text("".join(f"| {' | '.join(line)} |\n" for line in lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--encoder", nargs="+", default=[], metavar="NAME=PATH", help="names and paths of tuned caption encoders"
    )
    parser.add_argument(
        "--only", nargs="+", choices=list(TABLES), default=list(TABLES), help="tables to compute; default: all"
    )
    parser.add_argument("--rows", nargs="+", help="names of the rows to compute; default: all")
    parser.add_argument("--seeds", type=int, help="number of runs per row; default: depends on the table")
    args = parser.parse_args()
    encoders = dict(argument.split("=", 1) for argument in args.encoder)
    ablations = Ablations(args.data.resolve(), args.out, encoders)
    for table in args.only:
        rows: list[dict[str, str]] = []
        for name, row in TABLES[table].items():
            if row.encoder not in ablations.encoders or (args.rows and name not in args.rows):
                continue
            cells = ablations.measure_row(table, name, row, args.seeds or SEEDS[table])
            print(" | ".join(list(cells.values())[:-1]), flush=True)
            rows.append(cells)
            write_table(args.out / f"{table}.md", rows)


if __name__ == "__main__":
    main()
