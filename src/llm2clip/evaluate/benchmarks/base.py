"""Data types for benchmarks and their results, and helpers for benchmark readers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llm2clip.data.image_refs import FileImage, ImageRef, is_safe_relative_path
from llm2clip.data.records import Record
from llm2clip.io_utils import DataFormatError, MissingFileError
from llm2clip.reports import Block

if TYPE_CHECKING:
    from llm2clip.evaluate.metrics import BootstrapMetrics
    from llm2clip.evaluate.retrieval import ErrorAnalysis, RetrievalRanks
    from llm2clip.evaluate.short_queries import ShortQueryResult

ImageId = int | str
COCO_FOLDERS = ("coco", "COCO", "mscoco")
IGNORED = 255  # label of ignored pixels in segmentation

BenchmarkKind = Literal["retrieval", "compositional", "classification", "regions", "segmentation", "detection"]

CaptionFields = Mapping[str, Sequence[Record]]
"""Records, keyed by caption field such as "captions_zh". `Record.captions` contains only captions of that field."""


@dataclass(frozen=True)
class CompositionalExample:
    """An image with a correct caption and a wrong caption. Accuracy is reported separately for each `kind`."""

    kind: str
    image: ImageRef
    caption: str
    wrong: str


@dataclass(frozen=True)
class ClassificationData:
    """Images with class labels (indices into `names`), class names, and prompt templates with {} for the name."""

    images: Sequence[ImageRef]
    labels: Sequence[int]
    names: Sequence[str]
    templates: Sequence[str]


@dataclass(frozen=True)
class RegionData:
    """Images with labelled boxes. `images`, `sizes`, `boxes`, `labels` and `areas` have one item per image."""

    images: Sequence[ImageRef]
    sizes: Sequence[tuple[int, int]]  # annotated (width, height) of each image in pixels
    boxes: Sequence[np.ndarray]  # (left, top, right, bottom) in pixels, clipped to the image, float32 of shape (R, 4)
    labels: Sequence[np.ndarray]  # class index of each box, int64 of shape (R,)
    areas: Sequence[np.ndarray]  # mask area of each object in square pixels, float32 of shape (R,)
    names: Sequence[str]
    templates: Sequence[str]
    excluded: Mapping[str, int]  # number of excluded boxes, by reason for exclusion


@dataclass(frozen=True)
class SegmentationData:
    """Images with pixel labels, class names, prompt templates and protocol parameters."""

    images: Sequence[ImageRef]
    read_labels: Callable[[int], np.ndarray]
    """Function that takes an image index and returns class indices (or `IGNORED`), uint8 of shape (H, W)."""
    names: Sequence[Sequence[str]]  # names of each class (the score of a class is the maximum over its names)
    templates: Sequence[str]
    has_background: bool = False  # True if class 0 is the background
    scale: float = 1.5  # ratio of the resized image's shorter side to the side of the sliding window
    logit_scale: float = 40.0  # factor by which cosine similarities are multiplied before the softmax
    min_probability: float = 0.0
    """Pixels whose maximum class probability is below `min_probability` are assigned to class 0, the background."""
    min_area: float = 0.0
    """A foreground class is predicted only if its area exceeds the fraction `min_area` of the foreground area."""

    def get_class_name(self, label: int) -> str:
        return "background" if label == 0 and self.has_background else self.names[label][0]


@dataclass(frozen=True)
class DetectionData:
    """Images with annotated objects, and the names of the classes to detect."""

    images: Sequence[ImageRef]
    image_ids: Sequence[ImageId]
    sizes: Sequence[tuple[int, int]]  # annotated (width, height) of each image in pixels
    annotations: Sequence[Mapping[str, Any]]
    """Objects in COCO's format: "image_id", "category_id", "bbox" as [x, y, width, height] in pixels, and "iscrowd".
    Each box lies inside its image and is not empty."""
    names: Sequence[str]
    category_ids: Sequence[int]  # COCO category id of each class in `names`
    groups: Mapping[str, Sequence[str]]
    """Groups of class names for which metrics are reported, such as {"novel": [...], "base": [...]}."""
    templates: Sequence[str]


@dataclass(frozen=True)
class Benchmark:
    """Public benchmark, or one built from the user's own data.

    Args:
        kind: Type of the benchmark, which determines the metrics and the return type of `read`: `CaptionFields` for
            "retrieval", a list of `CompositionalExample` for "compositional", or a data class such as `RegionData`.
        description: One-line description with the split and the size. `size` parses the size, such as "1,000 images".
        folders: Possible names of the benchmark's folder inside the root folder, in order of preference.
        source: Names and download locations of the required files.
    """

    name: str
    kind: BenchmarkKind
    description: str
    folders: tuple[str, ...]
    read: Callable[[Path], Any]
    source: str

    @property
    def size(self) -> tuple[int, str] | None:
        """Size of the complete benchmark with its unit ("images" or "boxes"). None if `description` has no size."""
        match = re.search(r"([\d,]+) (?:test )?(images|boxes)", self.description)
        return (int(match[1].replace(",", "")), match[2]) if match else None

    def find_folder(self, root: Path) -> Path:
        """Return the folder of the benchmark. Raise MissingFileError if `root` contains none of `folders`."""
        for name in self.folders:
            if (root / name).is_dir():
                return root / name
        raise MissingFileError(f"{root} has no folder {' or '.join(self.folders)}")

    def load(self, folder: Path) -> Any:
        """Read the data. Raise MissingFileError if a file is missing, or DataFormatError if a file is invalid."""
        try:
            return self.read(folder)
        except (KeyError, IndexError, TypeError, AttributeError) as error:  # a row has missing or invalid fields
            raise DataFormatError(f"{folder}: a row does not match the {self.name} format ({error!r})") from error


@dataclass
class BenchmarkResult:
    """Result of evaluating a model on a benchmark."""

    summary: dict[str, Any]
    """Entry for results.json, with "benchmark", "kind" and metrics in percent.

    Retrieval entries have "rows" (see `compute_field_metrics`). All other entries have the counts "images", "texts" and
    "truncated" (texts that exceed the model's maximum length). Compositional and classification entries have "metrics",
    and "examples" (number of decodable examples) or "intervals" (95% confidence intervals).

    Region, segmentation and detection entries have "rows", one per method, with "method", "metrics", "intervals",
    per-class metrics ("class top-1", "IoU" or "class AP50") and "logit scale" (if the scale affects the metrics)."""
    images: Sequence[ImageRef] = ()
    """All images in the benchmark, including images that cannot be decoded."""
    ranks: dict[str, RetrievalRanks] = field(default_factory=dict)
    """Retrieval ranks, keyed by caption field. Empty if the benchmark is not a retrieval benchmark."""
    bootstrap: dict[str, BootstrapMetrics] = field(default_factory=dict)
    """Metrics and their bootstrap resamples, keyed by method ("" for classification)."""
    draw_examples: Callable[[], list[Block]] | None = None
    """Function that returns a report section with example images."""
    model: str = ""
    error_analysis: dict[str, ErrorAnalysis] = field(default_factory=dict)  # keyed by caption field
    short_queries: dict[str, ShortQueryResult] = field(default_factory=dict)  # keyed by caption field
    examples: list[Block] = field(default_factory=list)  # result of `draw_examples`, or [] if no examples are shown

    @property
    def first_summary_row(self) -> Mapping[str, Any]:
        """First row of `summary["rows"]`, or `summary` itself if it has no rows."""
        rows: Sequence[Mapping[str, Any]] = self.summary.get("rows", [self.summary])
        return rows[0]


# ---- helpers for benchmark readers -----------------------------------------------------------------------------------


def resolve_benchmark_image(folder: Path, name: str) -> FileImage:
    """Return a reference to `folder/name`. Raise DataFormatError if the path is outside the folder."""
    if not is_safe_relative_path(name):
        raise DataFormatError(f"{folder}: the image path {name!r} points outside the folder")
    return FileImage(str(folder / name))


def find_coco_folders(folder: Path) -> list[Path]:
    """Return the folders that may contain COCO's images: the benchmark folder and sibling folders named coco."""
    return [folder, *(path for name in COCO_FOLDERS if (path := folder.parent / name).is_dir())]


def check_image_files_exist(refs: Sequence[ImageRef], source: Path) -> None:
    """Raise MissingFileError if any image file does not exist."""
    missing = [ref for ref in refs if isinstance(ref, FileImage) and not Path(ref.path).is_file()]
    if missing:
        raise MissingFileError(
            f"{len(missing):,} of {len(refs):,} images listed in {source} are missing, e.g. {missing[0]}"
        )


def make_captioned_records(pairs: Iterable[tuple[ImageRef, Sequence[str]]], source: Path) -> list[Record]:
    """Create one record per image. Leading and trailing whitespace is stripped from the captions.

    Raises:
        MissingFileError: An image file does not exist.
        DataFormatError: There are no images, an image has no captions, or a caption is empty.
    """
    records = []
    for image, captions in pairs:
        texts = tuple(caption.strip() for caption in captions)
        if not texts or not all(texts):
            raise DataFormatError(f"{source}: {image} must have at least one caption, and no caption may be empty")
        record_id = Path(image.path).stem if isinstance(image, FileImage) else str(image)
        records.append(Record(record_id, image, texts))
    check_image_files_exist([record.image for record in records if record.image is not None], source)
    if not records:
        raise DataFormatError(f"{source} contains no test images")
    return records
