"""Image files with their captions beside them as raw rows: a folder of them, or a tar."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from llm2clip.data.image_refs import FileImage, TarImage
from llm2clip.data.raw_rows import BadRow, RawRow

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif", "jp2"})
MAX_CAPTION_BYTES = 1 << 20  # a caption file in a tar larger than this is no caption


def list_images(folder: str) -> Iterator[str]:
    """The paths of the images under a folder, in order; what is hidden is passed over."""
    return list_files(folder, IMAGE_SUFFIXES)


def list_files(folder: str, suffixes: frozenset[str]) -> Iterator[str]:
    """The paths of the files of some kinds under a folder, likewise.

    Raises:
        OSError: a folder cannot be listed; passed over, what is in it would look as if it were gone.
    """

    def fail(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.rpartition(".")[2].lower() in suffixes and not name.startswith("."):
                yield os.path.join(parent, name)


def read_images(folder: str) -> Iterator[RawRow]:
    """Every image under a folder, with the captions beside it: `x.json`, or `x.txt` with a caption a line."""
    for number, path in enumerate(list_images(folder), 1):
        stem = path.rpartition(".")[0]
        fields: dict[str, Any] | BadRow = {}
        if os.path.isfile(stem + ".json"):
            with open(stem + ".json", "rb") as file:
                fields = _sidecar(file.read())
        if not isinstance(fields, BadRow) and os.path.isfile(stem + ".txt"):
            with open(stem + ".txt", encoding="utf-8-sig", errors="surrogateescape") as lines:
                fields["txt"] = [line for line in lines if line.strip()]
        if not isinstance(fields, BadRow):
            fields["image"] = FileImage(path)
        yield path, number, fields


def _sidecar(data: bytes) -> dict[str, Any] | BadRow:
    """A caption file as fields: an object is them, a list or a string is the captions."""
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return BadRow("malformed row", f"{error}: {data[:200].decode('utf-8', 'replace')}")
    if isinstance(value, dict):
        return value
    return {"captions": value} if isinstance(value, list | str) else BadRow("malformed row", f"no captions: {value!r}")


def read_tar(path: str) -> Iterator[RawRow]:
    """The samples of a webdataset tar: neighbouring members whose names agree up to the first dot of the last part.

    One pass over the headers; only .txt and .json members are read, images are remembered by offset. A tar that ends
    early yields what it holds and then one bad row. Names are only keys: nothing is written, whatever they say.
    """
    number, sample = 0, _Sample("")
    try:
        tar = tarfile.open(path, "r:")  # noqa: SIM115 - closed below, and opening is what fails
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        yield path, 1, BadRow("unreadable tar", str(error))
        return
    with tar, open(path, "rb") as file:
        damage = ""
        for member in _members(tar, file):
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
                    yield path, number, sample.row(path, file)
                sample = _Sample(key)
            if suffix.lower() in sample.members:
                sample.twice = member.name
            sample.members[suffix.lower()] = member
        if sample.members and (not damage or sample.whole()):  # else the damage is what is wrong with it
            number += 1
            yield path, number, sample.row(path, file)
        if damage:
            yield path, number + 1, BadRow("truncated tar", damage)


def _members(tar: tarfile.TarFile, file: BinaryIO) -> Iterator[tarfile.TarInfo | str]:
    """The tar's members and, if it is damaged, a last string saying how: `tarfile` ends at damage without a word."""
    size, end = os.fstat(file.fileno()).st_size, 0
    while True:
        try:
            member = tar.next()
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            yield f"after byte {end}: {error}"
            return
        if member is None:
            break
        if member.size < 0 or member.offset_data < end:  # a header that points backwards would be read for ever
            yield f"after byte {end}: a header without sense"
            return
        end = member.offset_data + member.size
        if member.isreg() and end > size:
            yield f"{member.name} ends at byte {end}, the file at {size}"
            return
        yield member
    file.seek(tar.offset)
    if file.read(512) != bytes(512):
        yield f"no end-of-archive mark at byte {tar.offset}"


class _Sample:
    """The members of a tar that share a key, by suffix."""

    def __init__(self, key: str) -> None:
        self.key, self.members = key, dict[str, tarfile.TarInfo]()
        self.twice = ""  # a name that two neighbouring members have

    def whole(self) -> bool:
        return bool(self.members.keys() & IMAGE_SUFFIXES and self.members.keys() & {"txt", "json"})

    def row(self, path: str, file: BinaryIO) -> dict[str, Any] | BadRow:
        if self.twice:
            return BadRow("name twice in a tar", self.twice)
        fields: dict[str, Any] = {}
        for suffix in ("json", "txt"):
            member = self.members.get(suffix)
            if member is None:
                continue
            if member.size > MAX_CAPTION_BYTES:
                return BadRow("caption file over 1 MB", f"{member.name}: {member.size} bytes")
            file.seek(member.offset_data)
            data = file.read(member.size)
            if suffix == "txt":
                fields["txt"] = data.decode("utf-8-sig", "surrogateescape")
            elif isinstance(sidecar := _sidecar(data), BadRow):
                return sidecar
            else:
                fields = sidecar
        images = {
            suffix: TarImage(path, member.offset_data, member.size, member.name)
            for suffix, member in self.members.items()
            if suffix.rpartition(".")[2] in IMAGE_SUFFIXES
        }
        fields |= images  # by suffix too, so that `columns` can name one of several
        fields["image"] = next((images[suffix] for suffix in images if suffix in IMAGE_SUFFIXES), None)
        return {"id": os.path.basename(self.key)} | fields
