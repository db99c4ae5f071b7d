"""Index builder, which embeds new and changed images and removes deleted ones.

Each batch is committed separately, so an interrupted run can resume where it left off.
"""

from __future__ import annotations

import dataclasses
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from llm2clip.data.image_loader import image_batches
from llm2clip.data.image_refs import printable
from llm2clip.data.images import make_thumbnail
from llm2clip.data.records import Source
from llm2clip.data.skip_log import SkipLog
from llm2clip.models.dual_encoder import DualEncoder
from llm2clip.models.hub.fingerprint import fingerprint
from llm2clip.progress import ProgressBar
from llm2clip.search.backends import Backend, ImageState, IndexedContent, IndexedImage
from llm2clip.search.scan import format_file_version, read_digest_and_date, scan_sources

THUMBNAIL_SIDE = 256  # length of the longer side, in pixels
# If more than this number and this fraction of a source's images were deleted, the user must confirm with `prune`,
# because a disk may be unmounted.
MAX_DELETED, MAX_DELETED_FRACTION = 10, 0.2
CHUNK = 8192  # number of images to read and hash at a time, before new ones are embedded


@dataclass
class IndexReport:
    """Numbers of images added, changed, removed and embedded by an indexing run.

    Identical files are embedded only once.
    """

    added: int = 0
    changed: int = 0
    removed: int = 0
    embedded: int = 0

    def __bool__(self) -> bool:
        return bool(self.added or self.changed or self.removed)

    def __str__(self) -> str:
        return (
            f"Images: {self.added:,} added, {self.changed:,} changed, {self.removed:,} removed, "
            f"{self.embedded:,} embedded"
        )


def build_index(
    sources: Sequence[str],
    model: DualEncoder,
    backend: Backend,
    log: SkipLog,
    columns: dict[str, str] | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    prune: bool = False,
    allow_outside: bool = False,
) -> IndexReport:
    """Update an index so that it contains the current images of the given sources.

    Images from all other sources stay in the index.

    Args:
        sources: Image sources in the format of `open_records`. Captions are optional. Folders are read recursively.
        log: Skip log for images that cannot be read.
        columns: Column names of the sources, keyed by llm2clip field.
        batch_size: Number of images per forward pass and per commit.
        workers: Number of processes that decode images. For the default, see `image_batches`.
        prune: If True, remove deleted images from the index even if a source is missing or empty, or many of its images
            no longer exist. If False, these cases raise an error.
        allow_outside: If True, also index images outside the folder of their source (see `scan_source`).

    Raises:
        FolderInUseError: Another run is writing to the index.
        ValueError: The index was built with a different model, or many images of a source no longer exist. In the
            second case, new images have been added, but no images have been removed.
        OSError: A source does not exist, or a folder cannot be listed.
        TooManySkipped: Too many images cannot be read.
    """
    with backend.lock():
        metadata = backend.metadata()
        if metadata:
            check_model(metadata, model)
        else:
            name = os.path.abspath(model.name) if os.path.isdir(model.name) else model.name
            identity = fingerprint(model.identity())
            backend.initialize({"model": name, "fingerprint": identity, "embed_dim": model.embed_dim})
        parsed = [_parse_source(source, columns or {}) for source in sources]
        indexed_by_source = {str(source): backend.indexed([printable(str(source))]) for source in parsed}
        try:
            images = scan_sources(parsed, log, prune, allow_outside)
        except FileNotFoundError as error:
            if any(indexed_by_source[str(source)] and source.path in str(error) for source in parsed):
                raise FileNotFoundError(
                    f"{error}\nIf the source no longer exists, add --prune to remove its images from the index."
                ) from error
            raise
        indexed = {name: state for states in indexed_by_source.values() for name, state in states.items()}
        to_add = []
        for image in images.values():
            if indexed.get(image.name) != ImageState(image.file_version, image.captions):
                to_add.append(image)
        added, embedded = _add_images(to_add, model, backend, log, batch_size, workers)
        log.check()  # raise an error before any image is removed

        folders = [f"{source.path.rstrip('/')}/" for source in parsed if os.path.isdir(source.path)]
        deleted = []
        for name, state in indexed.items():
            if name not in images and not _is_unchanged_file(name, state.file_version, folders):
                deleted.append(name)
        if not prune:
            for source, states in indexed_by_source.items():
                _check_deleted(source, states, set(deleted))
        not_added = {image.name for image in to_add} - added
        unreadable = [name for name in indexed if name in not_added]  # changed files that can no longer be decoded
        backend.remove([*deleted, *unreadable])
        backend.finish()
    return IndexReport(
        added=len(added - indexed.keys()),
        changed=len(added & indexed.keys()),
        removed=len(deleted) + len(unreadable),
        embedded=embedded,
    )


def _check_deleted(source: str, indexed: Mapping[str, ImageState], deleted: set[str]) -> None:
    """Raise ValueError if more than MAX_DELETED and MAX_DELETED_FRACTION of a source's images were deleted."""
    missing = [name for name in indexed if name in deleted]
    if len(missing) > max(MAX_DELETED, MAX_DELETED_FRACTION * len(indexed)):
        raise ValueError(
            f"{source}: {len(missing):,} of {len(indexed):,} indexed images no longer exist, for example "
            f"{missing[0]}. A disk may be disconnected. To remove these images from the index, add --prune."
        )


def check_model(metadata: Mapping[str, Any], model: DualEncoder) -> None:
    """Raise ValueError if an index was built with another model, whose embeddings cannot be compared with new ones."""
    if metadata["fingerprint"] != fingerprint(model.identity()):
        raise ValueError(
            f"the index was built with a different model: {metadata['model']} (or an earlier version of it), "
            f"not {model.name}. Pass the original model with --model, or build a new index in another folder."
        )


def _parse_source(text: str, columns: dict[str, str]) -> Source:
    """Parse a source, make its path absolute and add the given column names."""
    source = Source.parse(text)
    path = source.path
    if not path.startswith("hf:"):
        path = os.path.realpath(os.path.expanduser(path))
    return dataclasses.replace(source, path=path, columns={**source.columns, **columns})


def _is_unchanged_file(name: str, file_version: str, folders: Sequence[str]) -> bool:
    """Return True if an image that the scan did not find is still an unchanged file in one of the folders.

    In this case, the scan missed the file because of a read error, and the image must not be removed from the index.
    """
    try:
        stat = os.stat(name)
    except (OSError, ValueError):
        return False
    return file_version == format_file_version(stat) and any(name.startswith(folder) for folder in folders)


def _add_images(
    images: Sequence[IndexedImage],
    model: DualEncoder,
    backend: Backend,
    log: SkipLog,
    batch_size: int,
    workers: int | None,
) -> tuple[set[str], int]:
    """Add images to the index. Return the names of the added images and the number of new embeddings."""
    added: set[str] = set()
    embedded = 0
    for start in range(0, len(images), CHUNK):
        known, unknown = _read_images(images[start : start + CHUNK], backend, log)
        backend.add([], known)
        added.update(image.name for image, _ in known)
        for batch in _embed_images(unknown, model, log, batch_size, workers):
            batch_images = [(image, content.hash) for content in batch for image in unknown[content.hash]]
            backend.add(batch, batch_images)
            added.update(image.name for image, _ in batch_images)
            embedded += len(batch)
    return added, embedded


def _read_images(
    images: Sequence[IndexedImage], backend: Backend, log: SkipLog
) -> tuple[list[tuple[IndexedImage, bytes]], dict[bytes, list[IndexedImage]]]:
    """Read and hash image files.

    Return the images whose content is already in the index, each with its content hash, and a dict of all other
    readable images, grouped by content hash.
    """
    readable: list[tuple[IndexedImage, bytes]] = []
    for image in ProgressBar(images, desc="read", unit="image"):
        digest, taken = read_digest_and_date(image, log)
        if digest is not None:
            readable.append((dataclasses.replace(image, taken=taken), digest))
    existing = backend.existing({digest for _, digest in readable})
    known: list[tuple[IndexedImage, bytes]] = []
    unknown: dict[bytes, list[IndexedImage]] = defaultdict(list)
    for image, digest in readable:
        if digest in existing:
            known.append((image, digest))
        else:
            unknown[digest].append(image)
    return known, unknown


def _embed_images(
    images_by_hash: Mapping[bytes, list[IndexedImage]],
    model: DualEncoder,
    log: SkipLog,
    batch_size: int,
    workers: int | None,
) -> Iterator[list[IndexedContent]]:
    """Decode and embed one image for each content hash; yield the image contents in batches."""
    hashes = list(images_by_hash)
    refs = [images_by_hash[digest][0].ref for digest in hashes]
    with ProgressBar(total=len(refs), desc="embed", unit="image", disable=not refs) as bar:
        batches = image_batches(refs, PreparedImages(model.transform), batch_size, workers)
        for indices, prepared, errors in batches:
            contents = []
            vectors = model.encode_images([pixels for pixels, *_ in prepared]).numpy() if indices else ()
            for index, vector, (_, thumbnail, width, height) in zip(indices, vectors, prepared, strict=True):
                if np.isfinite(vector).all():
                    half = vector.astype(np.float16)
                    contents.append(IndexedContent(hashes[index], half, thumbnail, width, height))
                else:
                    errors[index] = "the model returned NaN or infinity for this image"
            for index, reason in errors.items():
                for image in images_by_hash[hashes[index]]:
                    log.skip(image.name, 0, "undecodable image", reason)
            yield contents
            bar.update(len(contents) + len(errors))


@dataclass(frozen=True)
class PreparedImages:
    """Transform that returns the model input, a JPEG thumbnail, and the width and height of a decoded image."""

    transform: Callable[[Tensor], Any]

    def __call__(self, image: Tensor) -> tuple[Any, bytes, int, int]:
        height, width = image.shape[-2:]
        return self.transform(image), make_thumbnail(image, THUMBNAIL_SIDE), width, height
