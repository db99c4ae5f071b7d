"""Compare the memory that `llm2clip plan` predicts for a CPU with the memory that `tune`, `embed` and `align` use.

    python benchmarks/plan_memory.py --work /tmp/plan [--tiny]

The models have the shapes of Llama-3.2-1B and ViT-L/14-336, random weights, and a tokenizer with one token per byte.
All data are generated, so nothing is downloaded. Each stage runs in its own process, whose peak memory (RSS) is
measured. The largest stage needs 15 GB, and all stages together take about twenty minutes on two cores. --tiny uses
small models, for testing this script.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image

from gpu_parts import TINY_LLM, TOWERS, save_llm
from llm2clip.config import AlignConfig, EncoderConfig, FitConfig, TuneConfig
from llm2clip.tools.plan import plan_fit
from llm2clip.tools.plan_costs import LLMS
from llm2clip.tools.plan_memory import Machine, compute_peak_memory
from shared import make_flags, make_parser, print_header, print_row

IMAGES, CAPTIONS, TOKENS = 32, 2, 64  # number of images, captions per image, and tokens per caption
TUNE = {"steps": 2, "batch_size": 28, "lora_r": 16}
ALIGN = {"batch_size": 4, "epochs": 0.375, "captions_per_image": 1, "adapter_depth": 4, "embed_dim": 1280}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for models, data and outputs")
    parser.add_argument("--tiny", action="store_true", help="use small models")
    args = parser.parse_args()
    shape = LLMS["meta-llama/llama-3.2-1b"]
    llm = save_llm(args.work / "llm", {**shape, **TINY_LLM} if args.tiny else shape)
    tower = save_tower(args.work / "tower", "test_vit" if args.tiny else TOWERS["ViT-L/14-336"][0])
    data = save_data(args.work / "data")
    config = FitConfig(
        encoder=EncoderConfig(str(llm)),
        tune=TuneConfig(**TUNE),
        align=AlignConfig(tower=str(tower), workers=0, **ALIGN),  # type: ignore[arg-type]
    )
    plan = plan_fit(config, Machine("cpu", tflops=1, memory=64), IMAGES, CAPTIONS, TOKENS)
    print_header("stage", "planned, GB", "measured, GB")
    encoder = ["--encoder.path", str(llm)]
    commands = {
        "tune": ["tune", f"{data}@train", *encoder, *make_flags("tune", TUNE)],
        "embed": ["embed", str(data), *encoder],
        "align": ["align", f"{data}@train", *encoder, "--store", str(args.work / "embed"), *make_flags("align", ALIGN)],
    }
    commands["align"] += ["--align.tower", str(tower), "--align.workers", "0"]
    for stage, command in commands.items():
        out = args.work / stage
        shutil.rmtree(out, ignore_errors=True)
        measured = run(["-m", "llm2clip", *command, "--out", str(out)])
        planned = compute_peak_memory(plan.stage_memory[stage]) / 1e9
        print_row(stage, f"{planned:.2f}", f"{measured:.2f}")


def run(arguments: list[str]) -> float:
    """Run Python with these arguments in a new process, and return the process's peak memory in GB."""
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: python {' '.join(arguments)}")
    return usage.ru_maxrss * 1024 / 1e9


def save_tower(folder: Path, architecture: str) -> Path:
    """Save a timm model with random weights, unless the folder exists."""
    if not folder.exists():
        torch.manual_seed(0)
        timm.models.save_for_hf(timm.create_model(architecture), folder, safe_serialization=True)
    return folder


def save_data(folder: Path) -> Path:
    """Save generated images, and captions with TOKENS characters each. Return the JSONL file."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    rows = []
    for n in range(IMAGES):
        Image.fromarray(rng.integers(0, 255, (336, 336, 3), dtype=np.uint8)).save(folder / f"{n}.png")
        captions = ["".join(rng.choice(list("abcdefgh "), TOKENS - 2)) for _ in range(CAPTIONS)]
        rows.append({"image": f"{n}.png", "captions": [f"x{text}x" for text in captions], "split": "train"})
    file = folder / "captions.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


if __name__ == "__main__":
    main()
