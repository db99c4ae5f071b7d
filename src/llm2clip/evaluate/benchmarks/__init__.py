"""Readers for public benchmarks as distributed by their authors, with the protocol and source of each benchmark."""

from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from llm2clip.evaluate.benchmarks import classification, coco_instances, retrieval, segmentation
from llm2clip.evaluate.benchmarks.base import Benchmark
from llm2clip.evaluate.benchmarks.classification import read_class_folders
from llm2clip.evaluate.benchmarks.coco_instances import read_boxes, read_objects
from llm2clip.evaluate.benchmarks.segmentation import read_coco_masks, read_mask_folder
from llm2clip.io_utils import MissingFileError, find_first
from llm2clip.published_results import get_published_metrics, get_published_rows
from llm2clip.reports import Table, render_markdown

USER_BENCHMARKS: dict[str, tuple[Any, str, Callable[[Path, Sequence[str]], Any]]] = {
    "folder:": ("classification", "one folder of images per class", read_class_folders),
    "boxes:": ("regions", "boxes with class names", read_boxes),
    "segmentation:": ("segmentation", "images with masks", read_coco_masks),
    "detection:": ("detection", "objects with boxes", read_objects),
}
"""Kind, description and reader of benchmarks from the user's data, keyed by name prefix. See `_make_user_benchmark`."""
COCO_SOURCE = "a JSON file in COCO's format, with the images in the same folder or in images/"


def _load_benchmarks() -> dict[str, Benchmark]:
    entries = yaml.safe_load((files("llm2clip.evaluate.benchmarks") / "benchmarks.yaml").read_text(encoding="utf-8"))
    readers: dict[str, Callable[[Path], Any]] = {}
    for module in (retrieval, classification, coco_instances, segmentation):
        readers |= module.READERS
    benchmarks = {}
    for name, entry in entries.items():
        folders = tuple(entry.pop("folders"))
        benchmarks[name] = Benchmark(name=name, folders=folders, read=readers[name], **entry)
    return benchmarks


BENCHMARKS = _load_benchmarks()


def has_user_data(name: str) -> bool:
    """Return True if a benchmark name refers to the user's own data. See `get_benchmarks`."""
    return name.startswith(tuple(USER_BENCHMARKS))


def get_benchmarks(names: Sequence[str], templates: Sequence[str] = ()) -> list[Benchmark]:
    """Return the benchmarks with the given names, or raise ValueError if a name is unknown.

    The name "all" selects every public benchmark. Names of the form PREFIX:PATH create benchmarks from the user's data
    (see `USER_BENCHMARKS`), with the given prompt templates.
    """
    user_benchmarks = []
    for name in names:
        if has_user_data(name):
            user_benchmarks.append(_make_user_benchmark(name, templates))
        elif name not in BENCHMARKS and name != "all":
            choices = [*BENCHMARKS, "all", *(f"{prefix}PATH" for prefix in USER_BENCHMARKS)]
            raise ValueError(f"unknown benchmark {name!r}; choose from {', '.join(choices)}")
    public = [benchmark for benchmark in BENCHMARKS.values() if "all" in names or benchmark.name in names]
    return public + user_benchmarks


def _make_user_benchmark(name: str, templates: Sequence[str]) -> Benchmark:
    prefix = next(prefix for prefix in USER_BENCHMARKS if name.startswith(prefix))
    path = Path(name.removeprefix(prefix)).expanduser().absolute()
    kind, description, read = USER_BENCHMARKS[prefix]
    folder, source = path.parent, COCO_SOURCE
    if prefix == "folder:":
        folder, source = path, "one folder of images per class"
    elif prefix == "segmentation:" and not name.endswith(".json"):
        folder, read, source = path, read_mask_folder, "a folder with images/, masks/ (PNGs) and classes.txt"
    return Benchmark(
        name=name,
        kind=kind,
        description=description,
        folders=(str(folder),),
        read=lambda folder: read(folder if folder == path else find_first(folder, path.name), templates),
        source=source,
    )


def list_benchmarks(root: Path) -> list[str]:
    """Return lines of text that list all benchmarks, the number of published results, and download locations."""
    rows, missing = [], []
    for benchmark in BENCHMARKS.values():
        try:
            folder = str(benchmark.find(root).relative_to(root))
        except MissingFileError:
            folder = "–"
            missing.append(f"{benchmark.name} ({benchmark.folders[0]}/): {benchmark.source}")
        published = len(get_published_rows(benchmark.name) or get_published_metrics(benchmark.name)) or None
        rows.append([benchmark.name, benchmark.kind, benchmark.description, published, folder])
    table = Table(["benchmark", "kind", "description", "published results", f"folder in {root}"], rows)
    lines = [render_markdown("Benchmarks", [table])]
    if missing:
        lines += [f"To use the missing benchmarks, put their files into these folders in {root}:", *missing]
    return lines
