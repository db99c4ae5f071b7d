"""What a benchmark is, and what its readers share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from llm2clip.data.image_refs import FileImage, ImageRef, is_inside
from llm2clip.data.records import Record
from llm2clip.io_utils import DataFormatError, MissingFileError

T = TypeVar("T")
Fields = Mapping[str, Sequence[Record]]  # of each kind of caption, the images that have some


@dataclass(frozen=True)
class CompositionalExample:
    """Images and captions of which each belongs to one: which do a model's cosines put together?

    Caption i is right for image i; captions beyond the images are right for none.
    """

    id: str
    kind: str
    """Of the items that are averaged together."""
    images: tuple[ImageRef, ...]
    captions: tuple[str, ...]


@dataclass(frozen=True)
class ClassificationData:
    """Images that each show one of some classes."""

    images: Sequence[ImageRef]
    labels: Sequence[int]
    """Of each image, an index into `names`."""
    names: Sequence[str]
    templates: Sequence[str]
    """Sentences with {} where a name goes."""


@dataclass(frozen=True)
class JudgedRetrieval:
    """COCO's test images and captions by COCO's own numbers, by which people have judged what else is right."""

    images: Sequence[ImageRef]
    image_ids: Sequence[int]
    captions: Sequence[str]
    caption_ids: Sequence[int]


@dataclass(frozen=True)
class Benchmark:
    """A public set, as the field hands it out.

    Args:
        name: as on the command line.
        kind: retrieval, whose reader gives records by the name of their captions; judged, `Judged`; choice, a list
            of `Choice`; classification, `Classes`.
        about: images, captions and protocol in a line.
        folders: where it is looked for under a root, the first that is there.
        read: from its folder; what it raises is made `Absent` or `Malformed` by `load`.
        get: how to get it.
        train: of classes, the images that a linear probe learns from.
    """

    name: str
    kind: Literal["retrieval", "judged", "choice", "classification"]
    about: str
    folders: tuple[str, ...]
    read: Callable[[Path], Any]
    get: str
    train: Callable[[Path], ClassificationData] | None = None

    def find(self, root: Path) -> Path:
        """Its folder under a root.

        Raises:
            Absent: there is none.
        """
        for name in self.folders:
            if (root / name).is_dir():
                return root / name
        raise MissingFileError(f"{root} has no folder {' or '.join(self.folders)}")

    def load(self, folder: Path) -> Any:
        """What its reader makes of a folder.

        Raises:
            Absent: something is missing.
            Malformed: a file is not what it should be.
        """
        return _guarded(self.read, folder, self.name)

    def load_train(self, folder: Path) -> ClassificationData | None:
        """The images that a linear probe learns from; None where the set has none. Raises as `load` does."""
        return None if self.train is None else _guarded(self.train, folder, self.name)


def _guarded(read: Callable[[Path], T], folder: Path, name: str) -> T:
    try:
        return read(folder)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise DataFormatError(f"{folder}: a row is not in the form of {name} ({error!r})") from error


def image_file(folder: Path, name: str) -> FileImage:
    """An image under a folder.

    Raises:
        Malformed: the name leads out of it.
    """
    path = folder / name
    if not is_inside(name):
        raise DataFormatError(f"{folder}: the image name {name!r} leads out of it")
    return FileImage(str(path))


def find_image(folders: Sequence[Path], name: str) -> FileImage:
    """An image in the first of some folders that has it; where none has, what it would be called in the first."""
    places = [image_file(folder, name) for folder in folders]
    return next((ref for ref in places if Path(ref.path).is_file()), places[0])


def check_files(refs: Sequence[ImageRef], source: Path) -> None:
    """Raises Absent if image files are missing; the message counts them and names the first."""
    missing = [ref for ref in refs if isinstance(ref, FileImage) and not Path(ref.path).is_file()]
    if missing:
        raise MissingFileError(
            f"{len(missing):,} of {len(refs):,} images of {source} are missing, {missing[0]} for one"
        )


def captioned_records(pairs: Iterable[tuple[ImageRef, Sequence[str]]], source: Path) -> list[Record]:
    """Records of images and their captions, in order; captions are stripped, and otherwise as they came.

    Raises:
        Absent: image files are missing; the message counts them and names the first.
        Malformed: an image has no caption.
    """
    records = []
    for image, captions in pairs:
        texts = tuple(c.strip() for c in captions)
        if not texts or not all(texts):
            raise DataFormatError(f"{source}: {image} has no caption, or an empty one")
        records.append(Record(Path(image.path).stem if isinstance(image, FileImage) else str(image), image, texts))
    check_files([record.image for record in records if record.image is not None], source)
    if not records:
        raise DataFormatError(f"{source} has no image of the test split")
    return records
