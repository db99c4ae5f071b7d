"""Readers for folders and webdataset tar files in which the captions of `x.jpg` are in `x.json` or `x.txt`."""

from __future__ import annotations

import io
import os
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, cast

from llm2clip.data.formats import (
    IMAGE_SUFFIXES,
    NOT_UTF8,
    UNSUPPORTED_SUFFIXES,
    BadRow,
    FilePart,
    RawRow,
    ReadOptions,
    SourceFormat,
    list_files_with_suffixes,
)
from llm2clip.data.formats.text_files import open_text_file, parse_json, reject_undecodable_text
from llm2clip.data.image_refs import FileImage, LoadedImage, TarImage
from llm2clip.data.remote import (
    file_exists,
    get_remote_version,
    list_folder,
    open_file,
    pin_current_versions,
    walk_folder,
)
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.storage import is_remote

MAX_CAPTION_BYTES = 1 << 20  # maximum size of the caption file of a single image
MAX_TAR_HEADER_BYTES = 1 << 16  # maximum size of a member's headers, which contain the member's name and attributes
MAX_GLOBAL_HEADERS = 100  # maximum number of global PAX headers in a tar file
WINDOW_BYTES = 1 << 20  # number of bytes read from a tar file at a time
JUMP_BYTES = 1 << 14  # number of bytes to read after skipping a large image
MAX_LOADED_BYTES = 1 << 17  # images above this size are not read together with their captions
_PLAIN_HEADER = re.compile(  # fields after the name in the tar header of a regular file or PAX header
    rb"(?:[0-7]{7}[\0 ]|[0-7]{6} \0){3}"  # mode, user and group
    rb"([0-7]{11})[\0 ][0-7]{11}[\0 ]"  # size and time
    rb"([0-7]{6})\0 ([0x\0])\0{100}ustar.{67}"  # checksum, type, empty link, format, user and group names
    rb"(?:\0{16}|(?:0{7}\0|0{6} \0){2})",  # device
    re.DOTALL,
)
_TIME_RECORDS = re.compile(rb"(?:\d{1,3} [amc]time=[0-9.]+\n)+")  # PAX records with a length, a name and a timestamp


class ImageFolderFormat(SourceFormat):
    """Folder of images with caption files next to the images. File suffixes are case-insensitive.

    An image in an unsupported format, such as a RAW photo, becomes a `BadRow`, unless the folder also contains an image
    in a supported format with the same stem.
    """

    name = "images"
    is_folder = True
    has_caption_columns = False

    def compute_version(self, path: str) -> str:
        if not is_remote(path):
            return super().compute_version(path)
        urls = [f"{parent}/{name}" for parent, _, names in walk_folder(path) for name in names]
        pin_current_versions(urls)
        return "\n".join(f"{url} {get_remote_version(url)}" for url in urls)

    def read(self, part: FilePart, options: ReadOptions) -> Iterator[RawRow]:
        log, note_encoding = options.log, True
        parent, files = "", dict[str, str]()
        for number, path in enumerate(
            list_files_with_suffixes(part.path, IMAGE_SUFFIXES | UNSUPPORTED_SUFFIXES, log), 1
        ):
            if os.path.dirname(path) != parent:
                parent = os.path.dirname(path)
                files = {_get_lowercase_suffix(name): name for name in list_folder(parent)}
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
    """Read the fields in the JSON file and the text file of an image, if these files exist."""
    fields: dict[str, Any] | BadRow = {}
    json_path = os.path.join(parent, files.get(f"{stem}.json", ""))
    if f"{stem}.json" in files and file_exists(json_path):
        with open_file(json_path) as file:
            data = file.read(MAX_CAPTION_BYTES + 1)
        fields = _reject_large_caption_file(json_path) if len(data) > MAX_CAPTION_BYTES else _parse_caption_json(data)
    text_path = os.path.join(parent, files.get(f"{stem}.txt", ""))
    if isinstance(fields, BadRow) or f"{stem}.txt" not in files or not file_exists(text_path):
        return fields
    with open_text_file(text_path, log) as text_file:
        text = text_file.read(MAX_CAPTION_BYTES + 1)
    if len(text) > MAX_CAPTION_BYTES:
        return _reject_large_caption_file(text_path)
    undecodable = reject_undecodable_text(text, text_path, log if note_encoding else None)
    return undecodable or fields | {"txt": [line for line in text.split("\n") if line.strip()]}


def _get_lowercase_suffix(name: str) -> str:
    stem, dot, suffix = name.rpartition(".")
    return f"{stem}{dot}{suffix.lower()}"


def _reject_large_caption_file(name: str) -> BadRow:
    return BadRow("caption file over 1 MB", name)


def _parse_caption_json(data: bytes) -> dict[str, Any] | BadRow:
    """Parse a JSON caption file, which contains an object, a list of captions or a single caption."""
    value = parse_json(data)
    if isinstance(value, dict | BadRow):
        return value
    if isinstance(value, list | str):
        return {"captions": value}
    return BadRow("malformed row", f"no captions: {value!r}")


# ---- samples of tar files --------------------------------------------------------------------------------------------


class WebdatasetTarFormat(SourceFormat):
    """Uncompressed webdataset tar file. A sample consists of adjacent members with the same name up to the first dot.

    If the tar file is truncated, its complete samples are yielded, followed by one `BadRow`.
    """

    name = "tar"
    suffixes = (".tar",)
    text_share = 1 / 8
    is_shard = has_lists_as_text = True
    has_caption_columns = False

    def read(self, part: FilePart, options: ReadOptions) -> Iterator[RawRow]:
        path = part.path
        number, sample = 0, _WebdatasetSample("")
        try:
            file = _BoundedHeaderReader(open_file(path).detach())
            tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - `file` is closed below
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            yield path, 1, BadRow("unreadable tar", str(error))
            return
        with file:
            window = _ReadAheadBuffer(file)
            damage = ""
            for member in _iterate_tar_members(tar, file, window):
                if isinstance(member, str):
                    damage = member
                    break
                key, suffix = _split_member_name(member.name)
                if not key:
                    continue
                if key != sample.key:
                    if sample.members:
                        number += 1
                        yield path, number, sample.to_row(path)
                    sample = _WebdatasetSample(key)
                sample.add(suffix, member, window, options.image_bytes)
            if sample.members and (not damage or sample.is_complete()):  # a truncated sample is skipped
                number += 1
                yield path, number, sample.to_row(path)
            if damage:
                yield path, number + 1, BadRow("truncated tar", damage)


class _TarMember(NamedTuple):
    name: str
    offset: int  # byte offset of the member's contents in the tar file
    size: int


def _split_member_name(name: str) -> tuple[str, str]:
    """Split a member's path at the first dot in the file name. Return the sample key and the lower-case suffix."""
    if "//" in name:
        name = os.path.join(*os.path.split(name))
    start = name.rfind("/") + 1
    dot = name.find(".", start)
    if dot < 0:
        dot = len(name)
    return name[:dot] if dot > start else "", name[dot + 1 :].lower()


class _WebdatasetSample:
    """Members of a tar file that have the same key."""

    def __init__(self, key: str) -> None:
        self.key, self.members = key, dict[str, _TarMember]()
        self.contents: dict[str, bytes] = {}  # suffix -> bytes of a caption file or of the first image
        self.image_suffix = ""
        self.duplicate = ""  # name of a member that occurs more than once, if any

    def add(self, suffix: str, member: _TarMember, window: _ReadAheadBuffer, image_bytes: bool) -> None:
        if suffix in self.members:
            self.duplicate = member.name
        self.members[suffix] = member
        if suffix in ("json", "txt"):
            if member.size <= MAX_CAPTION_BYTES:
                self.contents[suffix] = window.read(member.offset, member.size)
        elif suffix in IMAGE_SUFFIXES and not self.image_suffix:
            self.image_suffix = suffix
            if image_bytes and member.size <= MAX_LOADED_BYTES:
                self.contents[suffix] = window.read(member.offset, member.size)

    def is_complete(self) -> bool:
        return bool(self.image_suffix and self.members.keys() & {"txt", "json"})

    def to_row(self, path: str) -> dict[str, Any] | BadRow:
        if self.duplicate:
            return BadRow("duplicate name in tar", self.duplicate)
        fields: dict[str, Any] = {}
        for suffix in ("json", "txt"):
            member = self.members.get(suffix)
            if member is None:
                continue
            data = self.contents.get(suffix)
            if data is None:
                return _reject_large_caption_file(member.name)
            if suffix == "txt":
                fields["txt"] = data.decode("utf-8-sig", "surrogateescape")
                continue
            parsed = _parse_caption_json(data)
            if isinstance(parsed, BadRow):
                return parsed
            fields = parsed
        images: dict[str, LoadedImage] = {}
        for suffix, member in self.members.items():
            if suffix.rpartition(".")[2] in IMAGE_SUFFIXES:
                ref = TarImage(path, member.offset, member.size, member.name)
                images[suffix] = LoadedImage(ref, self.contents.get(suffix), member.name)
        fields |= images  # fields named by suffix, so that a column mapping can select one of several images
        fields["image"] = images.get(self.image_suffix)
        return {"id": self.key.rpartition("/")[2]} | fields


# ---- members of tar files --------------------------------------------------------------------------------------------


class _BoundedHeaderReader(io.BufferedReader):
    """Tar file reader that limits the size of each member's headers, which could be terabytes in a sparse file."""

    bytes_left = MAX_TAR_HEADER_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        self.bytes_left -= size or 0
        if self.bytes_left < 0:
            raise tarfile.ReadError(f"the headers of a member are larger than {MAX_TAR_HEADER_BYTES:,} bytes")
        return super().read(size)


class _ReadAheadBuffer:
    """Read-ahead buffer for a file that is read at increasing offsets. Nearby byte ranges share one large read."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file
        self._buffer = memoryview(bytearray(WINDOW_BYTES))
        self._start = self._stop = 0

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes at `offset`, or fewer at the end of the file. `size` must be at most `WINDOW_BYTES`."""
        if offset < self._start or offset + size > self._stop:
            is_jump = not self._start <= offset <= self._stop  # True if a large image was skipped
            length = max(size, JUMP_BYTES) if is_jump else WINDOW_BYTES
            self._file.seek(offset)
            self._start = offset
            self._stop = offset + self._file.readinto(self._buffer[:length])
        return bytes(self._buffer[offset - self._start : min(offset + size, self._stop) - self._start])


def _iterate_tar_members(
    tar: tarfile.TarFile, file: _BoundedHeaderReader, window: _ReadAheadBuffer
) -> Iterator[_TarMember | str]:
    """Yield the regular files in a tar file. For a corrupt file, the last item is a string that describes the problem.

    Plain headers are parsed without `tarfile`, which takes 20 times as long and does not detect corrupt offsets.
    """
    size, end = os.fstat(file.fileno()).st_size, 0
    while True:
        member = None if tar.pax_headers or not end else _parse_regular_file_headers(window, tar.offset)
        if member is not None:
            end = member.offset + member.size
            tar.offset = end + -end % tarfile.BLOCKSIZE
            if end > size:
                yield f"{member.name} ends at byte {end}, but the file ends at byte {size}"
                return
            yield member
            continue
        file.bytes_left = MAX_TAR_HEADER_BYTES
        file.seek(0)  # makes `tarfile` detect that the file ends before the next header
        try:
            info = tar.next()
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            yield f"after byte {end}: {error}"
            return
        cast(Any, tar).members.clear()  # saves memory, because `tarfile` would keep all members
        if len(tar.pax_headers) > MAX_GLOBAL_HEADERS:
            yield f"after byte {end}: more than {MAX_GLOBAL_HEADERS} global headers"
            return
        if info is None:
            break
        if info.size < 0 or info.offset_data < end:  # a header with a lower offset would cause an endless loop
            yield f"after byte {end}: invalid header"
            return
        end = info.offset_data + info.size
        if info.isreg() and end > size:
            yield f"{info.name} ends at byte {end}, but the file ends at byte {size}"
            return
        if info.isreg() and not info.issparse():
            yield _TarMember(info.name, info.offset_data, info.size)
    file.seek(tar.offset)
    file.bytes_left = MAX_TAR_HEADER_BYTES
    if file.read(512) != bytes(512):
        yield f"no end-of-archive marker at byte {tar.offset}"


def _parse_regular_file_headers(window: _ReadAheadBuffer, position: int) -> _TarMember | None:
    """Parse the headers of a regular file in a tar file. Return None for all other headers, which require `tarfile`.

    The headers may start with a PAX header that contains only timestamps, as in files written by webdataset.
    """
    header = window.read(position, tarfile.BLOCKSIZE)
    fields = _parse_tar_header_block(header)
    if fields is not None and fields[1] == b"x":
        records = window.read(position + tarfile.BLOCKSIZE, tarfile.BLOCKSIZE).rstrip(b"\0")
        if fields[0] != len(records) or not _has_only_pax_timestamps(records):
            return None
        position += 2 * tarfile.BLOCKSIZE
        header = window.read(position, tarfile.BLOCKSIZE)
        fields = _parse_tar_header_block(header)
    if fields is None or fields[1] == b"x":
        return None
    name = header[:100].partition(b"\0")[0]
    if header[345]:
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    if name.endswith(b"/"):  # marks a folder in old tar formats
        return None
    return _TarMember(name.decode(tarfile.ENCODING, "surrogateescape"), position + tarfile.BLOCKSIZE, fields[0])


def _parse_tar_header_block(header: bytes) -> tuple[int, bytes] | None:
    """Return the size and type of a tar member from its header, or None if the header requires `tarfile`."""
    match = _PLAIN_HEADER.match(header, 100)
    if match is None or len(header) < tarfile.BLOCKSIZE:
        return None
    # The low half of Adler-32 is 1 plus the sum of all bytes. Tar checksums treat the checksum field as eight spaces.
    checksum = (zlib.adler32(header) & 0xFFFF) - 1 - sum(header[148:156]) + 8 * ord(" ")
    return (int(match[1], 8), match[3]) if int(match[2], 8) == checksum else None


def _has_only_pax_timestamps(records: bytes) -> bool:
    lines = records.splitlines(keepends=True)
    return _TIME_RECORDS.fullmatch(records) is not None and all(int(line.split()[0]) == len(line) for line in lines)
