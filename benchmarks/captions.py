"""Compare models trained on human captions, on synthetic captions, and on mixtures of both.

    python benchmarks/captions.py DATA --out runs/captions [--images 3000]

DATA contains flickr8k, coco_img and ade20k_ids, each with a captions.jsonl and images. The steps are:

1. Build a LLaVA from EfficientNet-Lite0 and SmolLM2-135M, and train it on the captions of coco_img and ade20k_ids.
2. Write two short captions and a dense one for each of Flickr8k's training images, with and without `--check`.
3. Train the heads of a frozen EfficientNet-Lite0 with all-MiniLM-L6-v2 as the caption encoder. The model of `--check`
   is trained in the same way, on coco_img and ade20k_ids.
4. Test the models on the human captions of Flickr8k's validation images.

The table contains the number of training images, and means and standard deviations over three seeds. To resume an
interrupted run, repeat the command.
"""

import json
import random
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from llm2clip.data.records import open_records
from llm2clip.llava.conversations import IMAGE_TOKEN, LONG_CAPTION_PROMPTS, SHORT_CAPTION_PROMPTS
from shared import (
    format_mean_std,
    make_flags,
    make_parser,
    print_header,
    print_row,
    read_rows,
    run_llm2clip,
    write_rows_once,
)

TOWER, LLM = "efficientnet-lite0", "smollm2-135m"
ENCODER = ("--encoder.path", "all-minilm-l6-v2")
LLAVA = {"pretrain_epochs": 1, "pretrain_lr": 2e-3, "pretrain_batch_size": 32, "epochs": 1.5, "lr": 2e-4}
LLAVA |= {"batch_size": 32}
ALIGN = {"tower": TOWER, "image_size": 160, "tower_lr": 0, "captions_per_image": 1, "epochs": 10, "eval_steps": 0}
# The LLaVA has been trained with these questions.
PROMPTS = {
    "sentence": {"kind": "short", "text": SHORT_CAPTION_PROMPTS[0], "temperature": 0, "max_tokens": 40},
    "sampled": {"kind": "short", "text": SHORT_CAPTION_PROMPTS[2], "temperature": 0.7, "max_tokens": 40},
    "dense": {"kind": "dense", "text": LONG_CAPTION_PROMPTS[0], "temperature": 0, "max_tokens": 120},
}
FIELDS = {"short": "short_captions", "dense": "long_captions"}
SEEDS = 3


class Benchmark:
    """Data, models and results of a benchmark run in the folder `out`."""

    def __init__(self, data: Path, out: Path, num_images: int | None) -> None:
        self.data, self.out, self.num_images = data, out, num_images
        self.human = write_rows_once(out / "human.jsonl", self.read_rows("flickr8k", "@train"))
        self.val = write_rows_once(out / "val.jsonl", self.read_rows("flickr8k", "@val"))
        self.other = write_rows_once(out / "other.jsonl", [*self.read_rows("coco_img"), *self.read_rows("ade20k_ids")])

    def read_rows(self, name: str, split: str = "") -> Iterator[dict[str, Any]]:
        """Yield the images and English captions of a dataset, with absolute paths."""
        for record in islice(open_records(f"{self.data / name / 'captions.jsonl'}{split}"), self.num_images):
            row: dict[str, Any] = {"image": str(Path(str(record.image)).absolute()), "id": record.id}
            yield row | {"captions": list(record.captions), "long_captions": list(record.long_captions)}

    def run(self, *command: object) -> None:
        run_llm2clip([str(word) for word in command], self.out / "log.txt")

    def train_llava(self) -> None:
        if (self.out / "llava/model").exists():
            return
        built, file = self.out / "built", self.out / "llava.json"
        if not built.exists():
            self.run("llava", "build", "--vision", TOWER, "--llm", LLM, "--out", built)
        file.write_text(json.dumps(list(self.make_conversations())))
        data = ["--pretrain", file, "--instruct", file, "--images", self.data]
        self.run("llava", "train", built, *data, *make_flags("llava", LLAVA), "--out", self.out / "llava")

    def make_conversations(self) -> Iterator[dict[str, Any]]:
        """Yield one conversation per caption in LLaVA's format. Paths of images are relative to the data folder."""
        rng = random.Random(0)
        for record in open_records(f"{self.other}@none"):
            image = str(Path(str(record.image)).relative_to(self.data.absolute()))
            for prompts, texts in (
                (SHORT_CAPTION_PROMPTS, record.captions),
                (LONG_CAPTION_PROMPTS, record.long_captions),
            ):
                for text in texts:
                    question = {"from": "human", "value": f"{IMAGE_TOKEN}\n{rng.choice(prompts)}"}
                    turns = [question, {"from": "gpt", "value": text}]
                    yield {"id": record.id, "image": image, "conversations": turns}

    def write_captions(self) -> tuple[Path, Path]:
        """Write human and synthetic captions. Return the file of all captions, and of those that --check accepts."""
        captions, checked = self.out / "captions.jsonl", self.out / "checked.jsonl"
        prompts = self.out / "prompts.yaml"
        prompts.write_text(yaml.safe_dump(PROMPTS, sort_keys=False))
        command = ["caption", f"{self.human}@none", "--model", self.out / "llava/model", "--prompts", prompts]
        self.run(*command, "--batch_size", 64, "--out", captions)
        shutil.copy(f"{captions}.sqlite", f"{checked}.sqlite")  # use the answers that already exist
        for file in (captions, self.other):
            self.run("embed", f"{file}@none", *ENCODER, "--out", self.out / "store")
        self.align(self.other, {"captions": 1, "long_captions": 1}, self.out / "checker", 0)
        self.run(*command, "--check", self.out / "checker/model", "--out", checked)
        return captions, checked

    def align(self, captions: Path, mix: dict[str, float], out: Path, seed: int) -> None:
        """Train a model on embedded captions, unless it exists."""
        if not (out / "model").exists():
            flags = make_flags("align", {**ALIGN, "caption_mix": json.dumps(mix), "seed": seed})
            folders = ["--store", self.out / "store", "--features", self.out / "features", "--out", out]
            self.run("align", f"{captions}@none", *ENCODER, *flags, *folders)

    def write_synthetic(self, source: Path, field: str, name: str) -> Path:
        """Write the images with synthetic captions, which become the column `captions`."""
        rows = [
            {"image": str(record.image), "id": record.id, "captions": list(getattr(record, field))}
            for record in open_records(f"{source}@none")
            if getattr(record, field)
        ]
        return write_rows_once(self.out / f"{name}.jsonl", rows)

    def train_models(self, captions: Path, checked: Path) -> None:
        """Train and test all models, and print their results."""
        models: dict[str, tuple[Path, dict[str, float]]] = {"human": (captions, {"captions": 1})}
        for name in ("short", "dense"):
            models[f"{name}-50"] = captions, {"captions": 0.5, FIELDS[name]: 0.5}
            models[f"{name}-100"] = self.write_synthetic(captions, FIELDS[name], name), {"captions": 1}
        models["checked"] = self.write_synthetic(checked, "short_captions", "short-checked"), {"captions": 1}
        recalls: dict[str, dict[str, list[float]]] = {name: {"I2T": [], "T2I": []} for name in models}
        for seed in range(SEEDS):
            folder = self.out / f"seed-{seed}"
            for name, (file, mix) in models.items():
                self.align(file, mix, folder / name, seed)
            first, *others = [folder / name / "model" for name in models]
            command = ["evaluate", first, f"{self.val}@none", "--baselines", *others]
            self.run(*command, "--out", folder / "evaluate")
            results = json.loads((folder / "evaluate/results.json").read_text())["results"]
            for name, result in zip(models, results, strict=True):
                for direction, values in recalls[name].items():
                    values.append(result["rows"][0][direction]["R@1"])
        print_header("captions", "images", "I2T R@1", "T2I R@1")
        for name, directions in recalls.items():
            images = sum(1 for _ in read_rows(models[name][0]))
            print_row(name, f"{images:,}", *map(format_mean_std, directions.values()))


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("data", type=Path, help="folder that contains the datasets")
    parser.add_argument("--out", type=Path, required=True, help="folder for models and results")
    parser.add_argument("--images", type=int, help="use only the first images of each dataset")
    args = parser.parse_args()
    benchmark = Benchmark(args.data, args.out, args.images)
    benchmark.train_llava()
    captions, checked = benchmark.write_captions()
    benchmark.train_models(captions, checked)


if __name__ == "__main__":
    main()
