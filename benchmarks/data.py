"""Measure how fast data is read and loaded, and how much memory this takes, at up to millions of images.

    python benchmarks/data.py FOLDER make --samples 400000 2000000      # make the samples only
    python benchmarks/data.py FOLDER table --samples 400000 2000000 [--formats tar jsonl parquet] [--before CHECKOUT]
    python benchmarks/data.py FOLDER slopes                             # print the results of all earlier runs again
    python benchmarks/data.py FOLDER loaders                            # pip install webdataset wids datasets
    python benchmarks/data.py FOLDER s3                                 # pip install 'moto[server]' s3fs
    python benchmarks/data.py FOLDER features [--before CHECKOUT]

Samples are a small JPEG and two captions, in webdataset tar files, in a JSONL file with image files, or in Parquet
files. Samples that exist in FOLDER are reused. `--before` is a checkout of an earlier version, which is also measured.

Each measurement runs in a new process. CPU seconds include the worker processes. The time to import the code is not
included. Results are saved in FOLDER/results.jsonl. Slopes are fitted to the results for all sizes.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from loaders import compare_loaders, compare_s3, get_preprocess, load_images
from measurements import Measurement, Timer, measure, run_measurement
from samples import make_samples

STEPS = {  # name -> (measurement, options)
    "read the sources with one core": ("read", {"cores": 1}),
    "read the sources with two cores": ("read", {"cores": 2}),
    "open the table again": ("read", {}),
    "extract phrases (two cores)": ("phrases", {"cores": 2}),
    "load the phrases again": ("phrases", {}),
    "start align": ("align", {}),
    "start align again": ("align", {}),
    "start align again, 4 processes": ("align", {"processes": 4}),
}
COLUMNS = {"cpu": "CPU, s", "seconds": "wall, s", "peak": "peak, MB", "anonymous": "private, MB", "pss": "PSS, MB",
           "rss": "RSS, MB"}  # fmt: skip


# ---- measured code ---------------------------------------------------------------------------------------------------


def read_records(timer: Timer, source: str, folder: str) -> tuple[None, Any]:
    """Measure reading the records of a source, and print their number."""
    from llm2clip.config import EvaluateConfig
    from llm2clip.data.build_table import read_splits
    from llm2clip.data.skip_log import SkipLog

    options: dict[str, Any] = {"keep_selected_splits": True, "folder": Path(folder) / "data"}
    with timer:
        records = read_splits([f"{source}@none"], EvaluateConfig(), {}, SkipLog(), **options).train
    return None, records


def extract_phrases(timer: Timer, source: str, folder: str) -> tuple[None, Any]:
    """Measure extracting phrases, without reading the records."""
    import llm2clip.runs.ranks  # noqa: F401 - imports PyTorch, which `add_phrases` would import
    from llm2clip.data.noun_phrases import add_phrases

    _, records = read_records(Timer(), source, folder)
    with timer:
        records = add_phrases(records)
    return None, records


def start_align(
    timer: Timer, source: str, folder: str, workers: int = 0, batch_size: int = 128, iterate: bool = True
) -> tuple[None, Any]:
    """Measure what `align` does with its data before the first step, and then iterate over an epoch without images."""
    from llm2clip.config import AlignConfig
    from llm2clip.store.store import EmbeddingStore
    from llm2clip.train.sampling import AlignBatches

    _, records = extract_phrases(Timer(), source, folder)
    model: Any = SimpleNamespace(tower=SimpleNamespace(preprocess=get_preprocess()))  # what `AlignBatches` uses
    config = AlignConfig(batch_size=batch_size, workers=workers, captions_per_image=2, epochs=99)
    store = EmbeddingStore(Path(folder) / "store")
    with timer:
        batches = AlignBatches(records, store, model.tower.preprocess, config)
        samples = batches.samples(0)
        next(samples)
    for images in islice(samples, batches.steps_per_epoch if iterate else 0):
        batches.captions.sample(*np.array(images, np.int64).T)
    return None, (records, batches)


def write_store(timer: Timer, source: str, folder: str) -> tuple[None, None]:
    """Write a store with one-dimensional embeddings of the captions and phrases."""
    from llm2clip.data.records import TEXT_FIELDS
    from llm2clip.store.writer import open_for_writing

    _, records = extract_phrases(Timer(), source, folder)
    with open_for_writing(
        records.iterate_texts(TEXT_FIELDS),
        Path(folder) / "store",
        {"weights": "none"},
        1,
        dtype="float16",
        shard_size=1 << 16,
    ) as plan:
        for number in plan.shards:
            captions = plan.read_captions(number)
            plan.writer.write(number, captions, [1] * len(captions), np.ones((len(captions), 1), np.float32))
    return None, None


MEASUREMENTS: dict[str, Measurement] = {
    "read": read_records,
    "phrases": extract_phrases,
    "align": start_align,
    "write_store": write_store,
    "load": load_images,
}


# ---- tables ----------------------------------------------------------------------------------------------------------


def measure_tables(folder: Path, args: argparse.Namespace) -> None:
    """Measure all steps for all formats and sizes."""
    for form in args.formats:
        for count in args.samples:
            if args.before:
                measure_steps(folder, form, count, args, args.before)
            measure_steps(folder, form, count, args, None)


def measure_steps(folder: Path, form: str, count: int, args: argparse.Namespace, checkout: Path | None) -> None:
    """Measure the steps for one size, print a table, and append the results to results.jsonl."""
    source = make_samples(folder, form, count, args.pixels)
    code = "before" if checkout else "after"
    work = folder / f"work-{form}-{count}-{code}"
    options: dict[str, Any] = {"source": source, "folder": str(work), "checkout": checkout}
    print(
        f"\n{count:,} images, {form}, {code}:\n\n| | {' | '.join(COLUMNS.values())} |\n|{'---|' * (1 + len(COLUMNS))}"
    )
    for step, (name, step_options) in STEPS.items():
        if args.steps and not re.search(args.steps, step):
            continue
        if step.startswith("read"):
            shutil.rmtree(work, ignore_errors=True)
        if name == "align" and not (work / "store" / "manifest.json").exists():
            measure("write_store", **options)
        result = measure(name, **options, **step_options)
        with (folder / "results.jsonl").open("a") as file:
            file.write(json.dumps({"format": form, "code": code, "samples": count, "step": step, **result}) + "\n")
        cells = [f"{result[column]:,.1f}" for column in COLUMNS]
        print(f"| {step} | {' | '.join(cells)} |", flush=True)
    print(f"size on disk: {measure_size(work / 'data'):,.0f} MB")


def measure_size(folder: Path) -> float:
    """Return the size of the files in a folder in MB."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def print_slopes(folder: Path) -> None:
    """Print the time and memory per image, fitted to the latest results of each step and size."""
    results: dict[tuple[str, str, str], dict[int, dict[str, float]]] = {}
    for line in (folder / "results.jsonl").read_text().splitlines():
        row = json.loads(line)
        results.setdefault((row["format"], row["step"], row["code"]), {})[row["samples"]] = row
    print("\n| format | step | code | images | CPU, µs/image | wall, µs/image | private memory, bytes/image | peak |")
    print("|---|---|---|---|---|---|---|---|")
    for (form, step, code), rows in sorted(results.items()):
        sizes = sorted(rows)
        slopes = {}
        for column in ("cpu", "seconds", "anonymous", "peak"):
            values = [rows[size][column] * 1e6 for size in sizes]
            slopes[column] = np.polyfit(sizes, values, 1)[0] if len(sizes) > 1 else np.nan
        cells = " | ".join(f"{slope:,.1f}" for slope in slopes.values())
        print(f"| {form} | {step} | {code} | {', '.join(f'{size:,}' for size in sizes)} | {cells} |")


def measure_features(args: argparse.Namespace) -> None:
    """Print the CPU time per step of the background thread with 4,096 cached features, before and after."""
    for checkout in [args.before, Path(__file__).parents[1]]:
        if checkout:
            command = [sys.executable, "benchmarks/align_host.py"]
            environment = {**os.environ, "PYTHONPATH": f"{checkout}/src"}
            print(subprocess.run(command, cwd=checkout, env=environment, check=True, stdout=subprocess.PIPE).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder for the samples and results")
    parser.add_argument("parts", nargs="+", choices=("make", "table", "slopes", "loaders", "s3", "features"))
    parser.add_argument("--samples", type=int, nargs="*", default=[400_000, 2_000_000, 8_000_000])
    parser.add_argument("--formats", nargs="*", default=["tar"], choices=("tar", "jsonl", "parquet"))
    parser.add_argument("--pixels", type=int, default=32, help="side length of the images")
    parser.add_argument("--steps", help="regular expression of the steps to measure")
    parser.add_argument("--before", type=Path, help="checkout of an earlier version")
    parser.add_argument("--loader_samples", type=int, default=20_000)
    parser.add_argument("--loader_pixels", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=10, help="number of turns of each loader")
    parser.add_argument("--run", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run_measurement(MEASUREMENTS[args.run[0]], args.run[1])
    if "make" in args.parts:
        for form in args.formats:
            for count in args.samples:
                print(make_samples(args.folder, form, count, args.pixels))
    if "table" in args.parts:
        measure_tables(args.folder, args)
    if "table" in args.parts or "slopes" in args.parts:
        print_slopes(args.folder)
    if "loaders" in args.parts:
        compare_loaders(args.folder, args)
    if "s3" in args.parts:
        compare_s3(args.folder, args)
    if "features" in args.parts:
        measure_features(args)


if __name__ == "__main__":
    main()
