"""Scanner that lists the images and captions in the sources of an index without decoding the images."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from datetime import datetime

from llm2clip.data.image_header import open_header
from llm2clip.data.image_refs import TarImage, file_version, printable, resolve_folder
from llm2clip.data.records import Source, open_records
from llm2clip.data.skip_log import SkipLog
from llm2clip.search.backends import REF_TYPES, IndexedImage

EXIF_IFD, EXIF_DATE_TAKEN, EXIF_DATE = 0x8769, 0x9003, 0x0132  # EXIF tags


def scan_sources(
    sources: Sequence[Source], log: SkipLog, prune: bool = False, allow_outside: bool = False
) -> dict[str, IndexedImage]:
    """Return the images of all sources, keyed by name. See `scan_source` for the arguments.

    Rows with the same image are merged into one image with all of their captions.
    """
    images: dict[str, IndexedImage] = {}
    for source in sources:
        for image in scan_source(source, log, prune, allow_outside):
            previous = images.get(image.name)
            if previous is not None and isinstance(previous.ref, TarImage) and previous.ref != image.ref:
                # If two members of a tar file have the same name, the offset is appended to the name of the second one.
                image = dataclasses.replace(image, name=printable(image.ref.key))
                previous = images.get(image.name)
            if previous is not None:  # for example, if a folder contains both the images and a caption file
                captions = dict.fromkeys([*previous.captions, *image.captions])
                image = dataclasses.replace(previous, captions=tuple(captions))
            images[image.name] = image
    return images


def scan_source(
    source: Source, log: SkipLog, prune: bool = False, allow_outside: bool = False
) -> Iterator[IndexedImage]:
    """Yield the images of a source, without decoding them.

    All users of the server can see the images in an index. By default, images outside the source's folder are therefore
    skipped: a caption file or a symbolic link from an untrusted source could otherwise expose private images.

    Args:
        source: Image source. Its path must be absolute.
        log: Skip log for rows without an image.
        prune: If True, yield nothing if the source does not exist or has no images, instead of raising an error.
        allow_outside: If True, also yield images outside the source's folder.

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
    folder = _find_source_folder(source.path)
    versions: dict[str, str] = {}
    for record in records:
        if record.image is None:
            log.skip(record.id, 0, "no image", "")
            continue
        if type(record.image).__name__ not in REF_TYPES:
            raise ValueError(
                f"{source}: the images are not in local files. Write the data set to disk with save_to_disk first."
            )
        path = record.image.container_path or ""
        if not allow_outside and not _is_in_folder(path, folder):
            log.skip(record.image.canonical_path, 0, "outside the source's folder", os.path.realpath(path))
            continue
        try:
            stat = os.stat(path)
            if path not in versions:
                versions = {path: container_version(path)}  # for a table, the same for all of its images
        except FileNotFoundError:
            continue  # the file was deleted during the scan
        yield IndexedImage(
            name=printable(record.image.canonical_path),
            ref=record.image,
            source=printable(str(source)),
            file_version=versions[path],
            captions=record.texts,
            taken=stat.st_mtime,
        )


def _find_source_folder(source: str) -> str:
    """Return the folder that must contain the images of a source, with symbolic links resolved.

    For a folder, this is the source itself; for a file, it is the file's folder; and for a pattern, it is the part
    before the first folder with a special character. For files in a folder called `annotations`, such as COCO's caption
    files, it is the parent of that folder, which also contains the images.
    """
    folder = os.path.abspath(source)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(source) and os.path.basename(folder) == "annotations":
        folder = os.path.dirname(folder)
    return os.path.realpath(folder)


def _is_in_folder(path: str, folder: str) -> bool:
    path = resolve_folder(path)
    if os.path.islink(path):
        path = os.path.realpath(path)
    return path == folder or path.startswith(os.path.join(folder, ""))


def format_file_version(stat: os.stat_result) -> str:
    """Return the size and modification time of a file as a string, which is used to detect changes."""
    return f"{stat.st_size} {stat.st_mtime_ns}"


def container_version(path: str) -> str:
    """Return the version of an image file, tar file or table. For a saved data set, it covers all of its files."""
    if not os.path.isdir(path):
        return format_file_version(os.stat(path))
    return hashlib.sha256(repr(file_version(path)).encode()).hexdigest()[:32]


def read_digest_and_date(image: IndexedImage, log: SkipLog) -> tuple[bytes | None, float]:
    """Return the SHA-256 hash of an image's bytes and the Unix timestamp at which the image was taken.

    The hash is None if the image cannot be read.
    """
    try:
        data = image.ref.read()
    except (OSError, ValueError, LookupError) as error:
        log.skip(image.name, 0, "unreadable image", error)
        return None, 0.0
    return hashlib.sha256(data).digest(), read_date_taken(data) or image.taken


def read_date_taken(data: bytes) -> float | None:
    """Return the EXIF date of an encoded image as a Unix timestamp, or None if the image has no EXIF date.

    EXIF dates do not specify a time zone, so the date is interpreted in the local time zone.
    """
    try:
        header = open_header(io.BytesIO(data))
        if header.format == "PNG" and "exif" not in header.info:
            return None  # otherwise, Pillow would decode the entire image to look for EXIF data after the pixels
        exif = header.getexif()
        date = exif.get_ifd(EXIF_IFD).get(EXIF_DATE_TAKEN) or exif.get(EXIF_DATE)
        return datetime.strptime(str(date)[:19], "%Y:%m:%d %H:%M:%S").timestamp()
    except Exception:  # Pillow can raise almost any exception for a damaged header, in which case there is no date
        return None
