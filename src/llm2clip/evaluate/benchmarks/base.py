"""Types of benchmarks and helpers shared by their readers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from llm2clip.data.image_refs import FileImage, ImageRef, is_inside
from llm2clip.data.records import Record
from llm2clip.io_utils import DataFormatError, MissingFileError

T = TypeVar("T")

CaptionFields = Mapping[str, Sequence[Record]]
"""Name of a caption field (captions, captions_zh, ...) to the records that have it, with its texts as `captions`."""


@dataclass(frozen=True)
class CompositionalExample:
    """Images and captions that a model must match by cosine similarity.

    Caption i belongs to image i. Captions beyond the number of images are wrong for every image.
    """

    id: str
    kind: str
    """Accuracies are averaged over the examples of one kind."""
    images: tuple[ImageRef, ...]
    captions: tuple[str, ...]


@dataclass(frozen=True)
class ClassificationData:
    """Images with class labels, and the texts of the classes."""

    images: Sequence[ImageRef]
    labels: Sequence[int]
    """Index into `names` for each image."""
    names: Sequence[str]
    templates: Sequence[str]
    """Prompts with {} in place of the class name."""


@dataclass(frozen=True)
class JudgedRetrieval:
    """COCO test images and captions with their COCO ids, for which people's relevance judgements exist."""

    images: Sequence[ImageRef]
    image_ids: Sequence[int]
    captions: Sequence[str]
    caption_ids: Sequence[int]


@dataclass(frozen=True)
class Benchmark:
    """A public data set in its distributed form.

    Args:
        name: Name on the command line.
        kind: Determines the metrics and what `read` returns: retrieval, `CaptionFields`; judged retrieval,
            `JudgedRetrieval`; compositional, a list of `CompositionalExample`; classification, `ClassificationData`.
        description: Size and split, in a line.
        folders: Names under a root folder, in order of preference.
        read: Reads the data from its folder.
        source: Files that are needed, and where to download them.
        read_train: For classification, reads the training images for a linear probe.
    """

    name: str
    kind: Literal["retrieval", "judged retrieval", "compositional", "classification"]
    description: str
    folders: tuple[str, ...]
    read: Callable[[Path], Any]
    source: str
    read_train: Callable[[Path], ClassificationData] | None = None

    def find(self, root: Path) -> Path:
        """Return the folder of the benchmark.

        Raises:
            MissingFileError: If `root` has none of its folders.
        """
        for name in self.folders:
            if (root / name).is_dir():
                return root / name
        raise MissingFileError(f"{root} has no folder {' or '.join(self.folders)}")

    def load(self, folder: Path) -> Any:
        """Read the data. See `kind` for the type.

        Raises:
            MissingFileError: If a file is missing.
            DataFormatError: If a file does not have the expected format.
        """
        return _with_format_errors(self.read, folder, self.name)

    def load_train(self, folder: Path) -> ClassificationData | None:
        """Read the training images for a linear probe; None if the benchmark has none. Raises as `load` does."""
        return None if self.read_train is None else _with_format_errors(self.read_train, folder, self.name)


def _with_format_errors(read: Callable[[Path], T], folder: Path, name: str) -> T:
    """Call a reader, and raise DataFormatError for a row with missing or wrong fields."""
    try:
        return read(folder)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise DataFormatError(f"{folder}: a row does not have the format of {name} ({error!r})") from error


def image_file(folder: Path, name: str) -> FileImage:
    """Return a reference to an image under a folder.

    Raises:
        DataFormatError: If the path leads out of the folder.
    """
    if not is_inside(name):
        raise DataFormatError(f"{folder}: the image path {name!r} leads out of the folder")
    return FileImage(str(folder / name))


def find_image(folders: Sequence[Path], name: str) -> FileImage:
    """Return a reference to an image in the first folder that has it, or in the first folder if none has it."""
    candidates = [image_file(folder, name) for folder in folders]
    return next((ref for ref in candidates if Path(ref.path).is_file()), candidates[0])


def check_files(refs: Sequence[ImageRef], source: Path) -> None:
    """Raise MissingFileError if image files are missing; the message has their number and the first one."""
    missing = [ref for ref in refs if isinstance(ref, FileImage) and not Path(ref.path).is_file()]
    if missing:
        raise MissingFileError(f"{len(missing):,} of {len(refs):,} images of {source} are missing, e.g. {missing[0]}")


def captioned_records(pairs: Iterable[tuple[ImageRef, Sequence[str]]], source: Path) -> list[Record]:
    """Return records of images with captions, in order. Captions are stripped and otherwise unchanged.

    Raises:
        MissingFileError: If image files are missing.
        DataFormatError: If there are no images, or an image has no caption or an empty one.
    """
    records = []
    for image, captions in pairs:
        texts = tuple(caption.strip() for caption in captions)
        if not texts or not all(texts):
            raise DataFormatError(f"{source}: {image} has no caption, or an empty one")
        record_id = Path(image.path).stem if isinstance(image, FileImage) else str(image)
        records.append(Record(record_id, image, texts))
    check_files([record.image for record in records if record.image is not None], source)
    if not records:
        raise DataFormatError(f"{source} has no image of the test split")
    return records
