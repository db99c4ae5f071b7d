"""Registry of public benchmarks, and benchmarks built from the user's data."""

from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from llm2clip.evaluate.benchmarks import classification, coco_instances, retrieval, segmentation
from llm2clip.evaluate.benchmarks.base import Benchmark, BenchmarkKind
from llm2clip.evaluate.benchmarks.classification import read_class_folders
from llm2clip.evaluate.benchmarks.coco_instances import read_detection_data, read_region_data
from llm2clip.evaluate.benchmarks.segmentation import read_coco_masks, read_mask_folder
from llm2clip.io_utils import MissingFileError, find_first_existing
from llm2clip.published_results import get_published_metrics, get_published_recalls
from llm2clip.reports import Table, render_markdown

CLASS_FOLDERS = "one folder of images per class"
MASK_FOLDER = "a folder with images/, masks/ (PNGs) and classes.txt"
COCO_FILE = "a JSON file in COCO's format, with the images in the same folder or in images/"
UserReaders = dict[str, tuple[BenchmarkKind, str, str, Callable[[Path, Sequence[str]], Any]]]
"""Kind, description, source and reader of each type of user benchmark, keyed by name prefix."""
FOLDER_READERS: UserReaders = {
    "folder:": ("classification", CLASS_FOLDERS, CLASS_FOLDERS, read_class_folders),
    "segmentation:": ("segmentation", "images with masks", MASK_FOLDER, read_mask_folder),
}
FILE_READERS: UserReaders = {
    "boxes:": ("regions", "boxes with class names", COCO_FILE, read_region_data),
    "segmentation:": ("segmentation", "images with masks", COCO_FILE, read_coco_masks),
    "detection:": ("detection", "objects with boxes", COCO_FILE, read_detection_data),
}
USER_PREFIXES = tuple(dict.fromkeys((*FOLDER_READERS, *FILE_READERS)))


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


def is_user_benchmark(name: str) -> bool:
    """Return True if a benchmark name has the form PREFIX:PATH. See `get_benchmarks`."""
    return name.startswith(USER_PREFIXES)


def get_benchmarks(names: Sequence[str], templates: Sequence[str] = ()) -> list[Benchmark]:
    """Return the benchmarks with the given names. Raise ValueError if a name is unknown.

    The name "all" selects every public benchmark. A name of the form PREFIX:PATH, with a prefix from
    `USER_PREFIXES`, creates a benchmark from the user's data with the prompt templates `templates`.
    """
    user_benchmarks = []
    for name in names:
        if is_user_benchmark(name):
            user_benchmarks.append(_make_user_benchmark(name, templates))
        elif name not in BENCHMARKS and name != "all":
            choices = [*BENCHMARKS, "all", *(f"{prefix}PATH" for prefix in USER_PREFIXES)]
            raise ValueError(f"unknown benchmark {name!r}: choose from {', '.join(choices)}")
    public = [benchmark for benchmark in BENCHMARKS.values() if "all" in names or benchmark.name in names]
    return public + user_benchmarks


def _make_user_benchmark(name: str, templates: Sequence[str]) -> Benchmark:
    prefix = next(prefix for prefix in USER_PREFIXES if name.startswith(prefix))
    path = Path(name.removeprefix(prefix)).expanduser().absolute()
    is_folder = prefix == "folder:" or (prefix == "segmentation:" and not name.endswith(".json"))
    kind, description, source, read_data = (FOLDER_READERS if is_folder else FILE_READERS)[prefix]

    def read_folder(folder: Path) -> Any:
        return read_data(folder if is_folder else find_first_existing(folder, path.name), templates)

    folders = (str(path if is_folder else path.parent),)
    return Benchmark(name=name, kind=kind, description=description, folders=folders, read=read_folder, source=source)


def list_benchmarks(root: Path) -> list[str]:
    """Return lines with a table of all public benchmarks, and download sources of benchmarks not found in `root`."""
    rows, missing = [], []
    for benchmark in BENCHMARKS.values():
        try:
            folder = str(benchmark.find_folder(root).relative_to(root))
        except MissingFileError:
            folder = "–"
            missing.append(f"{benchmark.name} ({benchmark.folders[0]}/): {benchmark.source}")
        published = len(get_published_recalls(benchmark.name) or get_published_metrics(benchmark.name)) or None
        rows.append([benchmark.name, benchmark.kind, benchmark.description, published, folder])
    table = Table(["benchmark", "kind", "description", "published results", f"folder in {root}"], rows)
    lines = [render_markdown("Benchmarks", [table])]
    if missing:
        lines += [f"To use a missing benchmark, download its files to the following folder in {root}:", *missing]
    return lines
