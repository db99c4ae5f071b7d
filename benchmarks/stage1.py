"""What each part of stage 1 is worth: one table of CRA, a row a command, on a folder of public caption sets.

    python benchmarks/stage1.py DATA --out runs/stage1 [--steps 100] [--only cc cc-causal ...]

DATA holds flickr30k_text, coco_text, flickr8k_text and stanford_paragraphs_text, one captions.jsonl each. Every row is
tuned on Flickr30k's training split with the same number of steps, and judged on: COCO, the 5,000 images of Karpathy's
test split; paragraphs, the first against the last sentences of a paragraph, 1,000 of the test split; Chinese, a Chinese
caption against the English one of the same image, Flickr8k's 1,000 test images. General text pairs (TC) are WordNet's
glosses and Debian's package descriptions: `apt-get install wordnet-base`, and apt's lists. A row that is done is not
done again.

The paragraphs that cc-long is tuned on are of Visual Genome's images, some of which are COCO's, too: its figure on COCO
is not free of that.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from llm2clip.tools.reproduce.datasets import WORDNET, glosses
from shared import lines, run, write

BASE = [
    *("--encoder.path", "smollm2-135m", "--encoder.layers", "12", "--tune.lora_r", "0", "--tune.lr", "4e-4"),
    *("--tune.batch_size", "128", "--tune.hard_negative_group_size", "32", "--tune.warmup_ratio", "0.05"),
]
LORA = ["--tune.lora_r", "16", "--tune.lr", "1e-3"]
# name: (settings that differ from the base, sources: captions, long captions too, pairs)
TUNED: dict[str, tuple[list[str], str]] = {
    "cc": ([], "captions"),
    "cc-causal": (["--encoder.bidirectional", "false"], "captions"),
    "cc-template": (["--encoder.template", "<|im_start|>user\n{caption}<|im_end|>"], "captions"),
    "cc-6-layers": (["--encoder.layers", "6"], "captions"),
    "cc-30-layers": (["--encoder.layers", "30"], "captions"),
    "cc-random": (["--tune.hard_negative_group_size", "1"], "captions"),
    "cc-lora": (LORA, "captions"),
    "cc-asymmetric": (["--tune.symmetric", "false"], "captions"),
    "cc-matryoshka": (["--tune.matryoshka_dims", "[256,128,64]"], "captions"),
    "mntp-cc": (["--tune.mntp_steps", "50"], "captions"),
    "tc": ([], "pairs"),
    "tc-cc": ([], "captions pairs"),
    "cc-long": ([], "captions long"),
    "gemma-cc": (["--encoder.path", "gemma3-270m", "--encoder.layers", "18", *LORA], "captions"),
}
# name: settings of the encoder
MEASURED: dict[str, list[str]] = {
    "minilm": ["--encoder.path", "all-minilm-l6-v2"],
    "raw-causal": ["--encoder.path", "smollm2-135m", "--encoder.bidirectional", "false"],
    "raw": ["--encoder.path", "smollm2-135m"],
    "gemma-raw": ["--encoder.path", "gemma3-270m"],
    "raw-12-layers": ["--encoder.path", "smollm2-135m", "--encoder.layers", "12"],
}
CUT = {"cc": (256, 128, 64), "cc-matryoshka": (256, 128, 64)}  # the same vectors, cut


def halves(paragraphs: Path, split: str) -> Iterator[dict[str, Any]]:
    """The first and the last sentences of each paragraph of a split; to train on, the first one and the whole too."""
    for row in lines(paragraphs):
        text = row["long_captions"][0]
        sentences = re.split(r"(?<=[.!?])\s+", text.strip())
        if len(sentences) > 1 and row["split"] == split:
            middle = len(sentences) // 2
            first, last = " ".join(sentences[:middle]), " ".join(sentences[middle:])
            more = {"captions": sentences[:1], "long_captions": [first, last, text]} if split != "test" else {}
            yield {"id": row["id"], "captions": [first, last], **more}


def general_pairs() -> Iterator[dict[str, Any]]:
    """A word's definition for the sentence that uses it or for the word; a package's title for its description."""
    for pair in glosses(WORDNET):
        yield {"query": pair.anchor, "positive": pair.positive, "instruction": pair.instruction}
    listed = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout
    for entry in listed.split("\n\n"):
        found = re.search(r"^Description(?:-en)?: (.+)\n((?: .+\n?)+)", entry, re.MULTILINE)
        if found:
            body = " ".join(line.strip() for line in found[2].splitlines() if line.strip() not in ("", "."))
            yield {
                "query": found[1], "positive": body[:600], "instruction": "Given a title, find the description:",
            }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--only", nargs="+", choices=[*MEASURED, *TUNED])
    given = parser.parse_args()
    data, out = given.data, given.out / f"{given.steps}-steps"

    paragraphs = data / "stanford_paragraphs_text/captions.jsonl"
    tests = {
        "COCO": f"{data / 'coco_text/captions.jsonl'}@karpathy_test",
        "paragraphs": str(write(out / "halves.jsonl", islice(halves(paragraphs, "test"), 1000))),
        "Chinese": str(
            write(
                out / "chinese.jsonl",
                (
                    {"id": row["id"], "captions": [row["captions_zh"][0], row["captions"][0]]}
                    for row in lines(data / "flickr8k_text/captions.jsonl")
                    if row.get("captions_zh")
                ),
            )
        ),
    }
    excluded = json.dumps([f"{data / 'flickr8k/captions.jsonl'}@val", str(data / "flickr8k_text/captions.jsonl")])
    short = f"{data / 'flickr30k_text/captions.jsonl'}@train"

    rows = []
    for name in given.only or [*MEASURED, *TUNED]:
        encoder, tuning = MEASURED.get(name), None
        if encoder is None:
            settings, kinds = TUNED[name]
            sources = [short] if "captions" in kinds else []
            if "long" in kinds:
                sources.append(str(write(out / "paragraphs.jsonl", halves(paragraphs, "val"))))
            pairs = []
            if "pairs" in kinds:
                pairs = ["--tune.text_pairs", json.dumps([str(write(out / "pairs.jsonl", general_pairs()))])]
            if len(sources) + len(pairs) // 2 > 1:
                pairs += ["--tune.source_weights", "[1,1]"]
            folder = out / name
            tuning = ["tune", *sources, "--out", str(folder), *BASE, "--tune.steps", str(given.steps),
                      "--tune.exclude", excluded, *pairs, *settings]  # fmt: skip
            if not (folder / "encoder").exists():
                run(tuning, out / f"{name}.log")
            encoder = ["--encoder.path", str(folder / "encoder")]
        for width in (None, *CUT.get(name, ())):
            shown = {"name": name if width is None else f"{name}, {width} wide"}
            options = encoder if width is None else [*encoder, "--encoder.embed_dim", str(width)]
            for test, source in tests.items():
                if width is not None and test != "COCO":
                    shown[test] = "–"
                    continue
                result = out / "results" / f"{name}-{width or 'whole'}-{test}"
                if not (result / "results.json").exists():
                    run(["evaluate", "--captions", source, "--out", str(result), *options], out / f"{name}.log")
                figures = json.loads((result / "results.json").read_text())["captions"]
                shown[test] = f"{figures['CRA']:.1f}"
            command = ["evaluate", "--captions", tests["COCO"], *options] if tuning is None else tuning
            written = shlex.join(command).replace("\n", "\\n").replace("|", "\\|")
            rows.append([*shown.values(), f"`llm2clip {written}`" if width is None else "the same"])
            print(" | ".join(rows[-1][:-1]), flush=True)
    table = [["caption encoder", *(f"CRA, {test}" for test in tests), "command"], ["---"] * (len(tests) + 2), *rows]
    (out / "table.md").write_text("".join(f"| {' | '.join(row)} |\n" for row in table))
    print(f"\n{out / 'table.md'}")
