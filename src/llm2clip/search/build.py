"""Index builder, which embeds new and changed images and removes deleted images from an index.

Each batch is committed separately, so an interrupted run can be resumed.
"""

import dataclasses
import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from llm2clip.data.image_refs import TarImage, resolve_folder_links
from llm2clip.data.images import encode_thumbnail, iter_image_batches
from llm2clip.data.records import Source, open_records
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.storage import is_remote
from llm2clip.io_utils import to_valid_unicode
from llm2clip.models.dual_encoder import DualEncoder
from llm2clip.progress import ProgressBar
from llm2clip.search.backends import IndexBackend
from llm2clip.search.images import format_file_version
from llm2clip.search.metadata import read_exif
from llm2clip.search.ocr import RecognizeText, recognize_text_in_images
from llm2clip.search.query import truncate_model_to_index
from llm2clip.search.relevance import update_calibration
from llm2clip.search.types import REF_TYPES, ImageState, IndexedContent, IndexedImage

THUMBNAIL_SIDE = 256  # length of the longer side of a thumbnail, in pixels
# If the number of missing images of a source exceeds both limits, a disk may be unmounted, so `prune` is required.
MAX_DELETED, MAX_DELETED_FRACTION = 10, 0.2
CHUNK = 8192  # number of images that are hashed at a time, before the new images are embedded


@dataclass
class IndexReport:
    """Image counts of an indexing run. `read` is the number of images processed by OCR, or None without OCR."""

    added: int = 0
    changed: int = 0
    removed: int = 0
    embedded: int = 0
    read: int | None = None

    def __bool__(self) -> bool:
        return bool(self.added or self.changed or self.removed or self.read)

    def __str__(self) -> str:
        text = (
            f"Images: {self.added:,} added, {self.changed:,} changed, {self.removed:,} removed, "
            f"{self.embedded:,} embedded"
        )
        return text if self.read is None else f"{text}, {self.read:,} processed by OCR"


@dataclass(frozen=True)
class IndexOptions:
    columns: dict[str, str] = field(default_factory=dict)  # source column of each record field
    batch_size: int = 64  # number of images per forward pass and per commit
    workers: int | None = None  # number of image decoding processes; default as in `iter_image_batches`
    # If False, raise an error if a source is missing or empty, or if many of its images no longer exist.
    prune: bool = False
    allow_outside: bool = False  # also index images outside their source's folder (see `scan_source`)
    dim: int | None = None  # embedding dimension; default: the dimension of the index, or of the model for a new index
    recognize: RecognizeText | None = None  # function that recognises the text in an image (see `search.ocr`)


def build_index(
    sources: Sequence[str],
    model: DualEncoder,
    backend: IndexBackend,
    log: SkipLog,
    options: IndexOptions = IndexOptions(),
) -> IndexReport:
    """Add, update and remove images so that an index matches the given sources. Keep images from other sources.

    Args:
        sources: Image sources in the format of `open_records`. Captions are optional. Folders are read recursively.
        log: Log of images that cannot be read.

    Raises:
        FolderInUseError: Another run is writing to the index.
        ValueError: The index was built with a different model or embedding dimension, or many images of a source no
            longer exist. In the latter case, new images have been added, but no image has been removed.
        OSError: A source does not exist, or a folder cannot be listed.
        TooManySkippedError: Too many images could not be read.
    """
    with backend.lock():
        model = _prepare_backend(backend, model, options.dim)
        parsed = [_parse_index_source(source, options.columns) for source in sources]
        names = [to_valid_unicode(str(source)) for source in parsed]
        indexed_by_source = {name: backend.read_image_states([name]) for name in names}
        images = _scan_indexed_sources(parsed, indexed_by_source, log, options)
        indexed = {name: state for states in indexed_by_source.values() for name, state in states.items()}
        to_add = []
        for image in images.values():
            if indexed.get(image.name) != ImageState(image.file_version, image.captions):
                to_add.append(image)
        added, embedded = _add_images(to_add, model, backend, log, options)
        log.check()  # if too many images were skipped, raise an error before any image is removed

        folders = [f"{source.path.rstrip('/')}/" for source in parsed if os.path.isdir(source.path)]
        deleted = []
        for name, state in indexed.items():
            if name not in images and not _is_unchanged_file(name, state.file_version, folders):
                deleted.append(name)
        if not options.prune:
            for source, states in indexed_by_source.items():
                _check_deleted_fraction(source, states, set(deleted))
        not_added = {image.name for image in to_add} - added
        unreadable = [name for name in indexed if name in not_added]  # changed files that can no longer be decoded
        backend.remove_images([*deleted, *unreadable])
        backend.finish_indexing()
        report = IndexReport(
            added=len(added - indexed.keys()),
            changed=len(added & indexed.keys()),
            removed=len(deleted) + len(unreadable),
            embedded=embedded,
        )
        if options.recognize is not None:
            report.read = recognize_text_in_images(names, backend, options.recognize, log, options.workers)
        update_calibration(backend, model, changed=bool(report))
    return report


def _scan_indexed_sources(
    sources: Sequence[Source], indexed: Mapping[str, Mapping[str, ImageState]], log: SkipLog, options: IndexOptions
) -> dict[str, IndexedImage]:
    try:
        return scan_sources(sources, log, options.prune, options.allow_outside)
    except FileNotFoundError as error:
        if any(indexed[to_valid_unicode(str(source))] and source.path in str(error) for source in sources):
            raise FileNotFoundError(
                f"{error}\nIf the source no longer exists, add --prune to remove its images from the index."
            ) from error
        raise


def _prepare_backend(backend: IndexBackend, model: DualEncoder, dim: int | None) -> DualEncoder:
    """Initialise a new index, or check an existing index. Return the model, truncated to the index's dimension."""
    metadata = backend.read_metadata()
    if metadata:
        if dim not in (None, metadata["embed_dim"]):
            raise ValueError(
                f"the index has vectors of {metadata['embed_dim']} dimensions, not {dim}. Remove --dim, or build a "
                "new index in another folder."
            )
        model = truncate_model_to_index(metadata, model)
    else:
        model = model if dim is None else model.truncate(dim)
        backend.initialize(_make_index_metadata(model))
    return model


def _check_deleted_fraction(source: str, indexed: Mapping[str, ImageState], deleted: set[str]) -> None:
    missing = [name for name in indexed if name in deleted]
    if len(missing) > max(MAX_DELETED, MAX_DELETED_FRACTION * len(indexed)):
        raise ValueError(
            f"{source}: {len(missing):,} of {len(indexed):,} indexed images no longer exist, for example "
            f"{missing[0]}. A disk may be disconnected. To remove these images from the index, add --prune."
        )


def _make_index_metadata(model: DualEncoder) -> dict[str, Any]:
    name = os.path.abspath(model.name) if os.path.isdir(model.name) else model.name
    metadata = {"model": name, "embed_dim": model.embed_dim}
    parts = model.part_fingerprints
    if parts is None:
        return {**metadata, "fingerprint": model.fingerprint}
    return {**metadata, "image_fingerprint": parts[0], "text_fingerprint": parts[1]}


def _parse_index_source(text: str, columns: dict[str, str]) -> Source:
    source = Source.parse(text, columns)
    path = source.path
    if is_remote(path):
        raise ValueError(f"{source}: only local images can be indexed. Copy the images to this machine first")
    if not path.startswith("hf:"):
        path = os.path.realpath(os.path.expanduser(path))
    return dataclasses.replace(source, path=path)


def _is_unchanged_file(name: str, version: str, folders: Sequence[str]) -> bool:
    """Return True if a file in one of the folders is unchanged. A scan misses such a file only after a read error."""
    try:
        stat = os.stat(name)
    except (OSError, ValueError):
        return False
    return version == format_file_version(stat) and any(name.startswith(folder) for folder in folders)


def _add_images(
    images: Sequence[IndexedImage], model: DualEncoder, backend: IndexBackend, log: SkipLog, options: IndexOptions
) -> tuple[set[str], int]:
    """Return the names of all added images and the number of new embeddings."""
    added: set[str] = set()
    embedded = 0
    for start in range(0, len(images), CHUNK):
        known, unknown = _hash_images(images[start : start + CHUNK], backend, log)
        backend.add_images([], known)
        added.update(image.name for image, _ in known)
        for batch in _embed_new_images(unknown, model, log, options):
            batch_images = [(image, content.hash) for content in batch for image in unknown[content.hash]]
            backend.add_images(batch, batch_images)
            added.update(image.name for image, _ in batch_images)
            embedded += len(batch)
    return added, embedded


def _hash_images(
    images: Sequence[IndexedImage], backend: IndexBackend, log: SkipLog
) -> tuple[list[tuple[IndexedImage, bytes]], dict[bytes, list[IndexedImage]]]:
    """Return (image, hash) pairs for images with indexed content, and the other images, grouped by hash."""
    readable: list[tuple[IndexedImage, bytes]] = []
    for image in ProgressBar(images, desc="read", unit="image"):
        try:
            data = image.ref.read()
        except (OSError, ValueError, LookupError) as error:
            log.skip(image.name, 0, "unreadable image", error)
            continue
        described = dataclasses.replace(image, **read_exif(data, modified=image.taken))
        readable.append((described, hashlib.sha256(data).digest()))
    existing = backend.find_existing_hashes({digest for _, digest in readable})
    known: list[tuple[IndexedImage, bytes]] = []
    unknown: dict[bytes, list[IndexedImage]] = defaultdict(list)
    for image, digest in readable:
        if digest in existing:
            known.append((image, digest))
        else:
            unknown[digest].append(image)
    return known, unknown


def _embed_new_images(
    images_by_hash: Mapping[bytes, list[IndexedImage]], model: DualEncoder, log: SkipLog, options: IndexOptions
) -> Iterator[list[IndexedContent]]:
    hashes = list(images_by_hash)
    refs = [images_by_hash[digest][0].ref for digest in hashes]
    with ProgressBar(total=len(refs), desc="embed", unit="image", disable=not refs) as bar:
        prepare = partial(_prepare_image_for_index, model.transform)  # can be pickled
        batches = iter_image_batches(refs, prepare, options.batch_size, options.workers)
        for indices, prepared, errors in batches:
            contents = []
            vectors = model.encode_images([pixels for pixels, *_ in prepared]).numpy() if indices else ()
            for index, vector, (_, thumbnail, width, height) in zip(indices, vectors, prepared, strict=True):
                if np.isfinite(vector).all():
                    half = vector.astype(np.float16)
                    contents.append(IndexedContent(hashes[index], half, thumbnail, width=width, height=height))
                else:
                    errors[index] = "the model returned NaN or infinity for this image"
            for index, reason in errors.items():
                for image in images_by_hash[hashes[index]]:
                    log.skip(image.name, 0, "undecodable image", reason)
            yield contents
            bar.update(len(contents) + len(errors))


def _prepare_image_for_index(transform: Callable[[Tensor], Any], image: Tensor) -> tuple[Any, bytes, int, int]:
    """Return the model input, JPEG thumbnail, width and height of a decoded image."""
    height, width = image.shape[-2:]
    return transform(image), encode_thumbnail(image, THUMBNAIL_SIDE), width, height


# ---- scanning the sources


def scan_sources(
    sources: Sequence[Source], log: SkipLog, prune: bool = False, allow_outside: bool = False
) -> dict[str, IndexedImage]:
    """Return the images of all sources, keyed by name. Merge the captions of rows with the same image."""
    images: dict[str, IndexedImage] = {}
    for source in sources:
        for image in scan_source(source, log, prune, allow_outside):
            previous = images.get(image.name)
            if previous is not None and isinstance(previous.ref, TarImage) and previous.ref != image.ref:
                # Two members of a tar file have the same name, so append the offset to the second name.
                image = dataclasses.replace(image, name=to_valid_unicode(image.ref.key))
                previous = images.get(image.name)
            if previous is not None:  # a folder can contain an image and a caption file that lists the image
                captions = dict.fromkeys([*previous.captions, *image.captions])
                image = dataclasses.replace(previous, captions=tuple(captions))
            images[image.name] = image
    return images


def scan_source(
    source: Source, log: SkipLog, prune: bool = False, allow_outside: bool = False
) -> Iterator[IndexedImage]:
    """Yield the images of a source, whose path must be absolute. The images are not decoded.

    By default, images outside the source's folder are skipped, because a caption file or symbolic link in an untrusted
    source could otherwise expose private images to all users of a server. If `prune` is True, a missing source is
    treated as an empty source.

    Raises:
        FileNotFoundError: `prune` is False, and the source does not exist or has no images.
        OSError: A folder cannot be listed.
        ValueError: The images are not in local files.
    """
    try:
        records = open_records(source, log, require_captions=False)
    except FileNotFoundError:
        if prune:
            return
        raise
    folder, source_name = _find_source_folder(source.path), to_valid_unicode(str(source))
    versions: dict[str, str] = {}
    for record in records:
        if record.image is None:
            log.skip(record.id, 0, "no image", "")
            continue
        if type(record.image).__name__ not in REF_TYPES:
            raise ValueError(f"{source}: the images are not in local files. Save the dataset as Parquet files first.")
        path = record.image.container_path or ""
        if not allow_outside and not _is_in_folder(path, folder):
            reason = "the image is outside the source's folder; see --allow_outside"
            log.skip(record.image.canonical_path, 0, reason, os.path.realpath(path))
            continue
        try:
            stat = os.stat(path)
        except FileNotFoundError:
            continue  # the file was deleted during the scan
        if path not in versions:
            versions = {path: format_file_version(stat)}  # all images in a table have the same version
        yield IndexedImage(
            name=to_valid_unicode(record.image.canonical_path),
            ref=record.image,
            source=source_name,
            file_version=versions[path],
            captions=record.texts,
            taken=stat.st_mtime,
        )


def _find_source_folder(source: str) -> str:
    """Return the deepest existing folder in the path of a source. This folder must contain the images of the source.

    For a file in a folder called `annotations`, such as COCO's caption files, return the parent of `annotations`.
    """
    folder = os.path.abspath(source)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(source) and os.path.basename(folder) == "annotations":
        folder = os.path.dirname(folder)
    return os.path.realpath(folder)


def _is_in_folder(path: str, folder: str) -> bool:
    path = resolve_folder_links(path)
    if os.path.islink(path):
        path = os.path.realpath(path)
    return path == folder or path.startswith(os.path.join(folder, ""))
