"""Run ablations of stage 1, and report the caption retrieval accuracy (CRA) of each caption encoder.

    python benchmarks/stage1.py DATA --out runs/stage1 [--steps 100] [--only cc cc-causal ...]

DATA contains flickr30k_text, coco_text, flickr8k_text and stanford_paragraphs_text, each with a captions.jsonl. All
rows in TUNED_ROWS use the same number of tuning steps. The tuning data is Flickr30k's training split, except in rows
that specify other data. The test sets are:

- COCO: captions of the 5,000 images in Karpathy's test split.
- paragraphs: the first and the second half of each of 1,000 paragraphs from the test split.
- Chinese: a Chinese and an English caption for each of Flickr8k's 1,000 test images.

General text pairs (TC) are taken from WordNet's glosses and Debian's package descriptions. To get them, install
wordnet-base and run apt-get update. Results are cached in OUT. The table is written to OUT/STEPS-steps/table.md.

The paragraphs that `cc-long` is tuned on describe images from Visual Genome, and some of these images are also in
COCO's test split.
"""

import argparse
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from reproduce_data import WORDNET, read_wordnet
from shared import read_rows, run_llm2clip, write_rows_once

BASE_SETTINGS = [
    *("--encoder.path", "smollm2-135m", "--encoder.layers", "12", "--tune.lora_r", "0", "--tune.lr", "4e-4"),
    *("--tune.batch_size", "128", "--tune.hard_negative_group_size", "32", "--tune.warmup_ratio", "0.05"),
]
LORA = ["--tune.lora_r", "16", "--tune.lr", "1e-3"]


@dataclass
class TunedRow:
    """An encoder to tune: its settings that differ from BASE_SETTINGS, and its training data."""

    settings: list[str] = field(default_factory=list)
    captions: bool = True
    paragraphs: bool = False
    text_pairs: bool = False


TUNED_ROWS = {
    "cc": TunedRow(),
    "cc-causal": TunedRow(["--encoder.bidirectional", "false"]),
    "cc-template": TunedRow(["--encoder.template", "<|im_start|>user\n{caption}<|im_end|>"]),
    "cc-6-layers": TunedRow(["--encoder.layers", "6"]),
    "cc-30-layers": TunedRow(["--encoder.layers", "30"]),
    "cc-random": TunedRow(["--tune.hard_negative_group_size", "1"]),
    "cc-lora": TunedRow(LORA),
    "cc-asymmetric": TunedRow(["--tune.symmetric", "false"]),
    "tc": TunedRow(captions=False, text_pairs=True),
    "tc-cc": TunedRow(text_pairs=True),
    "cc-long": TunedRow(paragraphs=True),
    "gemma-cc": TunedRow(["--encoder.path", "gemma3-270m", "--encoder.layers", "18", *LORA]),
}
UNTUNED_ROWS = {  # row name -> encoder settings
    "minilm": ["--encoder.path", "all-minilm-l6-v2"],
    "raw-causal": ["--encoder.path", "smollm2-135m", "--encoder.bidirectional", "false"],
    "raw": ["--encoder.path", "smollm2-135m"],
    "gemma-raw": ["--encoder.path", "gemma3-270m"],
    "raw-12-layers": ["--encoder.path", "smollm2-135m", "--encoder.layers", "12"],
}
# Dimensions of truncated embeddings with which these encoders are also tested on COCO.
TRUNCATED_DIMS = {"cc": (256, 128, 64)}


class Ablations:
    """Data, encoders and results of a benchmark run."""

    def __init__(self, data: Path, out: Path, steps: int) -> None:
        self.data, self.out, self.steps = data, out / f"{steps}-steps", steps
        test_paragraphs = islice(split_paragraphs(data, "test"), 1000)
        self.tests = {
            "COCO": f"{data / 'coco_text/captions.jsonl'}@karpathy_test",
            "paragraphs": str(write_rows_once(self.out / "halves.jsonl", test_paragraphs)),
            "Chinese": str(write_rows_once(self.out / "chinese.jsonl", pair_languages(data, "zh"))),
        }

    def measure_row(self, name: str) -> list[list[str]]:
        """Tune and test an encoder. Return its table row, and another row for each truncated dimension."""
        if name in UNTUNED_ROWS:
            encoder, tune_command = UNTUNED_ROWS[name], None
        else:
            tune_command = self._tune_command(name)
            encoder_dir = self.out / name / "encoder"
            if not encoder_dir.exists():
                run_llm2clip(tune_command, self.out / f"{name}.log")
            encoder = ["--encoder.path", str(encoder_dir)]
        command = tune_command or ["evaluate", "--captions", self.tests["COCO"], *encoder]
        accuracies = [f"{self._accuracy(name, test, encoder):.1f}" for test in self.tests]
        written = shlex.join(command).replace("\n", "\\n").replace("|", "\\|")
        rows = [[name, *accuracies, f"`llm2clip {written}`"]]
        for dim in TRUNCATED_DIMS.get(name, ()):
            accuracy = self._accuracy(name, "COCO", [*encoder, "--encoder.truncate_dim", str(dim)], str(dim))
            rows.append([f"{name}, {dim} dimensions", f"{accuracy:.1f}", "–", "–", "same"])
        return rows

    def _accuracy(self, name: str, test: str, encoder: list[str], dim: str = "full") -> float:
        """Return the CRA of an encoder on a test set, in percent."""
        folder = self.out / "results" / f"{name}-{dim}-{test}"
        if not (folder / "results.json").exists():
            command = ["evaluate", "--captions", self.tests[test], "--out", str(folder), *encoder]
            run_llm2clip(command, self.out / f"{name}.log")
        return float(json.loads((folder / "results.json").read_text())["caption retrieval"]["CRA"])

    def _tune_command(self, name: str) -> list[str]:
        row = TUNED_ROWS[name]
        sources, text_pairs = [], []
        if row.captions:
            sources.append(f"{self.data / 'flickr30k_text/captions.jsonl'}@train")
        if row.paragraphs:
            sources.append(str(write_rows_once(self.out / "paragraphs.jsonl", split_paragraphs(self.data, "val"))))
        if row.text_pairs:
            text_pairs.append(str(write_rows_once(self.out / "pairs.jsonl", general_text_pairs())))
        excluded = [f"{self.data / 'flickr8k/captions.jsonl'}@val", str(self.data / "flickr8k_text/captions.jsonl")]
        command = ["tune", *sources, "--out", str(self.out / name), *BASE_SETTINGS, "--tune.steps", str(self.steps)]
        command += ["--tune.exclude", json.dumps(excluded)]
        if text_pairs:
            command += ["--tune.text_pairs", json.dumps(text_pairs)]
        return command + row.settings


def split_paragraphs(data: Path, split: str) -> Iterator[dict[str, Any]]:
    """Yield the two halves of each paragraph and, for tuning, also the first sentence and the full paragraph."""
    for row in read_rows(data / "stanford_paragraphs_text/captions.jsonl"):
        paragraph = row["long_captions"][0]
        sentences = re.split(r"(?<=[.!?])\s+", paragraph.strip())
        if len(sentences) < 2 or row["split"] != split:
            continue
        middle = len(sentences) // 2
        first, last = " ".join(sentences[:middle]), " ".join(sentences[middle:])
        captions: dict[str, Any] = {"captions": [first, last]}
        if split != "test":
            captions = {"captions": sentences[:1], "long_captions": [first, last, paragraph]}
        yield {"id": row["id"], **captions}


def pair_languages(data: Path, language: str) -> Iterator[dict[str, Any]]:
    """Yield a caption in another language and an English caption of each image in Flickr8k's test split."""
    for row in read_rows(data / "flickr8k_text/captions.jsonl"):
        if row.get(f"captions_{language}"):
            yield {"id": row["id"], "captions": [row[f"captions_{language}"][0], row["captions"][0]]}


def general_text_pairs() -> Iterator[dict[str, Any]]:
    """Yield words or example sentences from WordNet with their definitions, and package titles with descriptions."""
    for pair in read_wordnet(WORDNET):
        yield {"query": pair.anchor, "positive": pair.positive, "instruction": pair.instruction}
    packages = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout
    for package in packages.split("\n\n"):
        match = re.search(r"^Description(?:-en)?: (.+)\n((?: .+\n?)+)", package, re.MULTILINE)
        if match:
            title, text = match[1], match[2]
            description = " ".join(line.strip() for line in text.splitlines() if line.strip() not in ("", "."))
            instruction = "Given a title, find the description:"
            yield {"query": title, "positive": description[:600], "instruction": instruction}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--only", nargs="+", choices=[*UNTUNED_ROWS, *TUNED_ROWS])
    args = parser.parse_args()
    ablations = Ablations(args.data, args.out, args.steps)
    table = [["caption encoder", *(f"CRA, {test}" for test in ablations.tests), "command"], ["---"] * 5]
    for name in args.only or [*UNTUNED_ROWS, *TUNED_ROWS]:
        rows = ablations.measure_row(name)
        for row in rows:
            print(" | ".join(row[:-1]), flush=True)
        table += rows
    file = ablations.out / "table.md"
    file.write_text("".join(f"| {' | '.join(row)} |\n" for row in table))
    print(f"\n{file}")


if __name__ == "__main__":
    main()
