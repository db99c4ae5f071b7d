"""Image folders, in which the captions of `x.jpg` are in `x.json` or, one per line, in `x.txt`."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

from llm2clip.data.formats.base import (
    NOT_UTF8,
    BadRow,
    FilePart,
    RawRow,
    ReadOptions,
    SourceFormat,
    find_undecodable,
    open_text,
    parse_json,
)
from llm2clip.data.image_refs import FileImage
from llm2clip.data.remote import (
    file_exists,
    get_remote_version,
    is_remote,
    list_folder,
    look_up_versions,
    open_file,
    walk_folder,
)
from llm2clip.data.skip_log import SkipLog
from llm2clip.runs.output_folder import describe_output_folder

IMAGE_SUFFIXES = frozenset(
    {"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif", "jp2", "heic", "heif", "hif"}
)
# Unsupported image formats. Files in these formats are recorded in the skip log.
UNSUPPORTED_SUFFIXES = frozenset({"dng", "cr2", "cr3", "nef", "arw", "orf", "rw2", "raw", "psd", "svg", "jxl"})
MAX_CAPTION_BYTES = 1 << 20  # size limit for the caption file of a single image


def list_files(folder: str, suffixes: frozenset[str], log: SkipLog | None = None) -> Iterator[str]:
    """Yield the paths of all files with the given suffixes in a folder and its subfolders, sorted within each folder.

    Hidden files and folders are skipped, as are llm2clip run directories and stores in subfolders.

    Args:
        suffixes: File suffixes in lower case, without the dot.
        log: Skip log. It records folders that are skipped, because they were written by llm2clip.

    Raises:
        OSError: A folder cannot be listed. If the folder were skipped, its files would look deleted.
    """

    for parent, folders, names in walk_folder(folder):
        kind = describe_output_folder(names) if parent != folder else None
        if kind is not None:
            folders.clear()
            if log is not None:
                log.add_note(f"not read, because it is {kind} written by llm2clip", parent)
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.rpartition(".")[2].lower() in suffixes and not name.startswith("."):
                yield os.path.join(parent, name)


class ImageFolder(SourceFormat):
    """Folder of images with captions in files next to them. File name suffixes are case-insensitive.

    An image in an unsupported format becomes a `BadRow`, unless there is a supported image with the same name, such as
    a JPEG file next to a camera's raw file. The skip log records UTF-16 text files, and the likely encodings of the
    first text file that is neither UTF-8 nor UTF-16.
    """

    name = "images"
    is_folder = True
    has_caption_columns = False

    def download(self, path: str) -> None:
        """Do nothing. Each file is downloaded when it is opened."""

    def compute_version(self, path: str) -> str:
        if not is_remote(path):
            return super().compute_version(path)
        urls = [f"{parent}/{name}" for parent, _, names in walk_folder(path) for name in names]
        look_up_versions(urls)
        return "\n".join(f"{url} {get_remote_version(url)}" for url in urls)

    def read(self, part: FilePart, options: ReadOptions) -> Iterator[RawRow]:
        log, note_encoding = options.log, True
        parent, files = "", dict[str, str]()  # file name with a lower-case suffix -> actual file name
        for number, path in enumerate(list_files(part.path, IMAGE_SUFFIXES | UNSUPPORTED_SUFFIXES, log), 1):
            if os.path.dirname(path) != parent:
                parent = os.path.dirname(path)
                files = {_lowercase_suffix(name): name for name in list_folder(parent)}
            stem, _, suffix = os.path.basename(path).rpartition(".")
            if suffix.lower() in UNSUPPORTED_SUFFIXES:
                if not any(f"{stem}.{supported}" in files for supported in IMAGE_SUFFIXES):
                    yield path, number, BadRow("unsupported image format", f"convert {path} to JPEG, PNG or WebP")
                continue
            fields = _read_caption_files(parent, stem, files, log, note_encoding)
            if isinstance(fields, BadRow):
                note_encoding = note_encoding and fields.reason != NOT_UTF8
                yield path, number, fields
            else:
                yield path, number, fields | {"image": FileImage(path)}


def _read_caption_files(
    parent: str, stem: str, files: Mapping[str, str], log: SkipLog | None, note_encoding: bool
) -> dict[str, Any] | BadRow:
    """Return the fields in an image's JSON and text files, if these exist."""
    fields: dict[str, Any] | BadRow = {}
    json_path = os.path.join(parent, files.get(f"{stem}.json", ""))
    if f"{stem}.json" in files and file_exists(json_path):
        with open_file(json_path) as file:
            data = file.read(MAX_CAPTION_BYTES + 1)
        fields = build_too_large_row(json_path) if len(data) > MAX_CAPTION_BYTES else parse_caption_json(data)
    text_path = os.path.join(parent, files.get(f"{stem}.txt", ""))
    if isinstance(fields, BadRow) or f"{stem}.txt" not in files or not file_exists(text_path):
        return fields
    with open_text(text_path, log) as text_file:
        text = text_file.read(MAX_CAPTION_BYTES + 1)
    if len(text) > MAX_CAPTION_BYTES:
        return build_too_large_row(text_path)
    undecodable = find_undecodable(text, text_path, log if note_encoding else None)
    return undecodable or fields | {"txt": [line for line in text.split("\n") if line.strip()]}


def _lowercase_suffix(name: str) -> str:
    stem, dot, suffix = name.rpartition(".")
    return f"{stem}{dot}{suffix.lower()}"


def build_too_large_row(name: str) -> BadRow:
    return BadRow("caption file over 1 MB", name)


def parse_caption_json(data: bytes) -> dict[str, Any] | BadRow:
    """Parse a JSON caption file, which contains an object with fields, a list of captions or a single caption."""
    value = parse_json(data)
    if isinstance(value, dict | BadRow):
        return value
    if isinstance(value, list | str):
        return {"captions": value}
    return BadRow("malformed row", f"no captions: {value!r}")
