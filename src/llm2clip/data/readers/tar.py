"""Readers for image folders and webdataset tar files, in which captions are stored next to the image files."""

import io
import os
import tarfile
from collections.abc import Iterator
from typing import Any, cast

from llm2clip.data.columns import BadRow, RawRow
from llm2clip.data.image_refs import FileImage, TarImage
from llm2clip.data.readers.encoding import find_undecodable, open_text
from llm2clip.data.readers.json_files import parse_json
from llm2clip.data.skip_log import SkipLog
from llm2clip.io_utils import open_regular_file
from llm2clip.runs.output_folder import describe_output_folder

IMAGE_SUFFIXES = frozenset(
    {"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif", "jp2", "heic", "heif", "hif"}
)
# Unsupported image formats. Files in these formats are recorded in the skip log.
UNSUPPORTED_SUFFIXES = frozenset({"dng", "cr2", "cr3", "nef", "arw", "orf", "rw2", "raw", "psd", "svg", "jxl"})
MAX_CAPTION_BYTES = 1 << 20  # size limit for the caption file of a single image
MAX_TAR_HEADER_BYTES = 1 << 16  # maximum size of a member's headers (its name, links and attributes)
MAX_GLOBAL_HEADERS = 100  # maximum number of PAX headers that apply to all members of a tar file


def list_files(folder: str, suffixes: frozenset[str], log: SkipLog | None = None) -> Iterator[str]:
    """Yield the paths of all files with the given suffixes in a folder and its subfolders, sorted within each folder.

    Hidden files and folders are skipped, as are llm2clip run directories and stores in subfolders.

    Args:
        suffixes: File suffixes in lower case, without the dot.
        log: Skip log. It records folders that are skipped, because they were written by llm2clip.

    Raises:
        OSError: A folder cannot be listed. If the folder were skipped, its files would look deleted.
    """

    def fail(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(folder, onerror=fail):
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


def read_image_folder(folder: str, log: SkipLog | None = None) -> Iterator[RawRow]:
    """Yield the images in a folder. The captions of `x.jpg` are in `x.json` or, one per line, in `x.txt`.

    Suffixes are case-insensitive. An image in an unsupported format becomes a `BadRow`, unless there is a supported
    image with the same name, such as a JPEG file next to a camera's raw file. `log` records
    UTF-16 text files, and the likely encodings of the first text file that is neither UTF-8 nor UTF-16.
    """
    has_noted_encoding = False
    parent, files = "", dict[str, str]()  # file name with a lower-case suffix -> actual file name
    for number, path in enumerate(list_files(folder, IMAGE_SUFFIXES | UNSUPPORTED_SUFFIXES, log), 1):
        if os.path.dirname(path) != parent:
            parent = os.path.dirname(path)
            files = {_lowercase_suffix(name): name for name in sorted(os.listdir(parent))}
        stem, _, suffix = os.path.basename(path).rpartition(".")
        if suffix.lower() in UNSUPPORTED_SUFFIXES:
            if not any(f"{stem}.{supported}" in files for supported in IMAGE_SUFFIXES):
                yield path, number, BadRow("unsupported image format", f"convert {path} to JPEG, PNG or WebP")
            continue
        fields: dict[str, Any] | BadRow = {}
        json_path = os.path.join(parent, files.get(stem + ".json", stem + ".json"))
        text_path = os.path.join(parent, files.get(stem + ".txt", stem + ".txt"))
        if os.path.isfile(json_path):
            with open_regular_file(json_path) as file:
                data = file.read(MAX_CAPTION_BYTES + 1)
            fields = _build_too_large_row(json_path) if len(data) > MAX_CAPTION_BYTES else _parse_caption_json(data)
        if isinstance(fields, BadRow):
            yield path, number, fields
            continue
        if os.path.isfile(text_path):
            with open_text(text_path, log) as text_file:
                text = text_file.read(MAX_CAPTION_BYTES + 1)
            if len(text) > MAX_CAPTION_BYTES:
                yield path, number, _build_too_large_row(text_path)
                continue
            undecodable = find_undecodable(text, text_path, None if has_noted_encoding else log)
            if undecodable is not None:
                has_noted_encoding = True
                yield path, number, undecodable
                continue
            fields["txt"] = [line for line in text.split("\n") if line.strip()]
        fields["image"] = FileImage(path)
        yield path, number, fields


def _lowercase_suffix(name: str) -> str:
    stem, dot, suffix = name.rpartition(".")
    return f"{stem}{dot}{suffix.lower()}"


def read_tar(path: str) -> Iterator[RawRow]:
    """Yield each sample in a webdataset tar file, that is, adjacent members with the same name up to the first dot.

    The tar file is scanned once. Only .txt and .json members are read. Images are referenced by offset. If the tar file
    is truncated, its complete samples are yielded, followed by one `BadRow`. Member names are used only as keys, and
    nothing is extracted to disk.
    """
    number, sample = 0, _Sample("")
    try:
        file = _BoundedFile(open_regular_file(path).detach())
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - `file` is closed below
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        yield path, 1, BadRow("unreadable tar", str(error))
        return
    with file:
        damage = ""
        for member in _read_members(tar, file):
            if isinstance(member, str):
                damage = member
                break
            parent, name = os.path.split(member.name)
            key, _, suffix = name.partition(".")
            if not member.isreg() or member.issparse() or not key:
                continue
            key = os.path.join(parent, key)
            if key != sample.key:
                if sample.members:
                    number += 1
                    yield path, number, sample.to_row(path, file)
                sample = _Sample(key)
            sample.add(suffix.lower(), member)
        if sample.members and (not damage or sample.is_complete()):  # skip a sample cut off by the damage
            number += 1
            yield path, number, sample.to_row(path, file)
        if damage:
            yield path, number + 1, BadRow("truncated tar", damage)


def _build_too_large_row(name: str) -> BadRow:
    return BadRow("caption file over 1 MB", name)


def _parse_caption_json(data: bytes) -> dict[str, Any] | BadRow:
    """Parse a JSON caption file, which contains an object with fields, a list of captions or a single caption."""
    value = parse_json(data)
    if isinstance(value, dict | BadRow):
        return value
    if isinstance(value, list | str):
        return {"captions": value}
    return BadRow("malformed row", f"no captions: {value!r}")


class _BoundedFile(io.BufferedReader):
    """Tar file reader that limits how many bytes `tarfile` can read for a member's headers.

    Without this limit, a header in a sparse file could claim to be terabytes in size.
    """

    bytes_left = MAX_TAR_HEADER_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        self.bytes_left -= size or 0
        if self.bytes_left < 0:
            raise tarfile.ReadError(f"the headers of a member are larger than {MAX_TAR_HEADER_BYTES:,} bytes")
        return super().read(size)

    def read_member(self, member: tarfile.TarInfo) -> bytes:
        """Read the contents of a member."""
        self.seek(member.offset_data)
        return super().read(member.size)


def _read_members(tar: tarfile.TarFile, file: _BoundedFile) -> Iterator[tarfile.TarInfo | str]:
    """Yield the members of a tar file. If the file is corrupt, the last item is a string that describes the problem.

    On its own, `tarfile` would stop at the corrupt position without raising an error.
    """
    size, end = os.fstat(file.fileno()).st_size, 0
    while True:
        file.bytes_left = MAX_TAR_HEADER_BYTES
        try:
            member = tar.next()
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            yield f"after byte {end}: {error}"
            return
        cast(Any, tar).members.clear()  # saves memory: `tarfile` keeps every member with a copy of the global headers
        if len(tar.pax_headers) > MAX_GLOBAL_HEADERS:
            yield f"after byte {end}: more than {MAX_GLOBAL_HEADERS} global headers"
            return
        if member is None:
            break
        if member.size < 0 or member.offset_data < end:  # a header that points backwards would cause an endless loop
            yield f"after byte {end}: invalid header"
            return
        end = member.offset_data + member.size
        if member.isreg() and end > size:
            yield f"{member.name} ends at byte {end}, but the file ends at byte {size}"
            return
        yield member
    file.seek(tar.offset)
    file.bytes_left = MAX_TAR_HEADER_BYTES
    if file.read(512) != bytes(512):
        yield f"no end-of-archive marker at byte {tar.offset}"


class _Sample:
    """Members of a tar file that share a key, indexed by suffix."""

    def __init__(self, key: str) -> None:
        self.key, self.members = key, dict[str, tarfile.TarInfo]()
        self.duplicate = ""  # name of a member that occurs twice, if any

    def add(self, suffix: str, member: tarfile.TarInfo) -> None:
        if suffix in self.members:
            self.duplicate = member.name
        self.members[suffix] = member

    def is_complete(self) -> bool:
        """Return True if the sample has an image and captions."""
        return bool(self.members.keys() & IMAGE_SUFFIXES and self.members.keys() & {"txt", "json"})

    def to_row(self, path: str, file: _BoundedFile) -> dict[str, Any] | BadRow:
        if self.duplicate:
            return BadRow("duplicate name in tar", self.duplicate)
        fields: dict[str, Any] = {}
        for suffix in ("json", "txt"):
            member = self.members.get(suffix)
            if member is None:
                continue
            if member.size > MAX_CAPTION_BYTES:
                return _build_too_large_row(member.name)
            data = file.read_member(member)
            if suffix == "txt":
                fields["txt"] = data.decode("utf-8-sig", "surrogateescape")
                continue
            parsed = _parse_caption_json(data)
            if isinstance(parsed, BadRow):
                return parsed
            fields = parsed
        images = {}
        for suffix, member in self.members.items():
            if suffix.rpartition(".")[2] in IMAGE_SUFFIXES:
                images[suffix] = TarImage(path, member.offset_data, member.size, member.name)
        fields |= images  # images are also keyed by suffix, so that a column mapping can select one of them
        fields["image"] = next((image for suffix, image in images.items() if suffix in IMAGE_SUFFIXES), None)
        return {"id": os.path.basename(self.key)} | fields
