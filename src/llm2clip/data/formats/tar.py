"""Webdataset tar files, in which the captions of an image are stored in adjacent members."""

import io
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

from llm2clip.data.formats.base import BadRow, FilePart, RawRow, ReadOptions, SourceFormat
from llm2clip.data.formats.image_folder import (
    IMAGE_SUFFIXES,
    MAX_CAPTION_BYTES,
    build_too_large_row,
    parse_caption_json,
)
from llm2clip.data.image_refs import LoadedImage, TarImage
from llm2clip.data.remote import open_file

MAX_TAR_HEADER_BYTES = 1 << 16  # maximum size of a member's headers (its name, links and attributes)
MAX_GLOBAL_HEADERS = 100  # maximum number of PAX headers that apply to all members of a tar file
WINDOW_BYTES = 1 << 20  # number of bytes of a tar file that are read at a time
JUMP_BYTES = 1 << 14  # number of bytes that are read after a large image
MAX_LOADED_BYTES = 1 << 17  # larger images are not read with the captions
_PLAIN_NUMBERS = re.compile(rb"([0-7]{11})[\0 ][0-7]{11}[\0 ]([0-7]{6})\0 ")  # size, time and checksum in a header
_TIME_RECORD = re.compile(rb"(\d{1,3}) [amc]time=[0-9.]+")  # a PAX record: length, name and value


class TarFile(SourceFormat):
    """Uncompressed webdataset tar file. A sample consists of adjacent members with the same name up to the first dot.

    The file is scanned once. Images are referenced by offset, and with `ReadOptions.image_bytes`, the references
    include the bytes of images of at most `MAX_LOADED_BYTES`. If the file is truncated, its complete samples are
    yielded, followed by one `BadRow`. Member names are used only as keys, and nothing is extracted to disk.
    """

    name = "tar"
    suffixes = (".tar",)
    is_shard = has_lists_as_text = True
    has_caption_columns = False

    def estimate_text_bytes(self, part: FilePart) -> float:
        return super().estimate_text_bytes(part) / 8

    def read(self, part: FilePart, options: ReadOptions) -> Iterator[RawRow]:
        path = part.path
        number, sample = 0, _Sample("")
        try:
            file = _BoundedFile(open_file(path).detach())
            tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - `file` is closed below
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            yield path, 1, BadRow("unreadable tar", str(error))
            return
        with file:
            window = _Window(file)
            damage = ""
            for member in _read_members(tar, file, window):
                if isinstance(member, str):
                    damage = member
                    break
                key, suffix = _split_name(member.name)
                if not key:
                    continue
                if key != sample.key:
                    if sample.members:
                        number += 1
                        yield path, number, sample.to_row(path)
                    sample = _Sample(key)
                sample.add(suffix, member, window, options.image_bytes)
            if sample.members and (not damage or sample.is_complete()):  # skip a sample cut off by the damage
                number += 1
                yield path, number, sample.to_row(path)
            if damage:
                yield path, number + 1, BadRow("truncated tar", damage)


# ---- members of tar files --------------------------------------------------------------------------------------------


class _Member(NamedTuple):
    name: str
    offset: int  # position of the contents in the tar file
    size: int


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


class _Window:
    """Part of a file in memory. Ranges that are read in the order of the file share one large read."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file
        self._buffer = memoryview(bytearray(WINDOW_BYTES))
        self._start = self._stop = 0  # range of the file that is in the buffer

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes at `offset`, or fewer at the end of the file. `size` must be at most `WINDOW_BYTES`."""
        if offset < self._start or offset + size > self._stop:
            is_jump = not self._start <= offset <= self._stop  # past a large image, which is not needed
            length = max(size, JUMP_BYTES) if is_jump else WINDOW_BYTES
            self._file.seek(offset)
            self._start = offset
            self._stop = offset + self._file.readinto(self._buffer[:length])
        return bytes(self._buffer[offset - self._start : min(offset + size, self._stop) - self._start])


def _read_members(tar: tarfile.TarFile, file: _BoundedFile, window: _Window) -> Iterator[_Member | str]:
    """Yield the regular files in a tar file. If it is corrupt, the last item is a string that describes the problem.

    On its own, `tarfile` would stop at the corrupt position without raising an error.
    """
    size, end = os.fstat(file.fileno()).st_size, 0
    headers = _PlainHeaders(tar, window)
    while True:
        member = headers.parse(tar.offset) if end else None
        if member is not None:
            end = member.offset + member.size
            tar.offset = end + -end % tarfile.BLOCKSIZE
            if end > size:
                yield f"{member.name} ends at byte {end}, but the file ends at byte {size}"
                return
            yield member
            continue
        file.bytes_left = MAX_TAR_HEADER_BYTES
        file.seek(0)  # so that `tarfile` checks that the file does not end before the next header
        try:
            info = tar.next()
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            yield f"after byte {end}: {error}"
            return
        cast(Any, tar).members.clear()  # saves memory: `tarfile` keeps every member with a copy of the global headers
        if len(tar.pax_headers) > MAX_GLOBAL_HEADERS:
            yield f"after byte {end}: more than {MAX_GLOBAL_HEADERS} global headers"
            return
        if info is None:
            break
        if info.size < 0 or info.offset_data < end:  # a header that points backwards would cause an endless loop
            yield f"after byte {end}: invalid header"
            return
        end = info.offset_data + info.size
        if info.isreg() and end > size:
            yield f"{info.name} ends at byte {end}, but the file ends at byte {size}"
            return
        if info.isreg() and not info.issparse():
            headers.learn(info)
            yield _Member(info.name, info.offset_data, info.size)
    file.seek(tar.offset)
    file.bytes_left = MAX_TAR_HEADER_BYTES
    if file.read(512) != bytes(512):
        yield f"no end-of-archive marker at byte {tar.offset}"


class _PlainHeaders:
    """Fast parser for headers that differ only in name, size and modification time from one that `tarfile` accepted.

    A PAX header before the member's header may contain its time stamps and nothing else, as in files written by
    webdataset. Any other header, including every corrupt one, must be parsed by `tarfile`.
    """

    def __init__(self, tar: tarfile.TarFile, window: _Window) -> None:
        self._tar, self._window = tar, window
        self._templates: dict[bytes, tuple[bytes, bytes, int]] = {}  # type -> constant parts, sum of their bytes
        self._prefix = ""

    def learn(self, info: tarfile.TarInfo) -> None:
        """Use a member's headers as templates if they are plain headers."""
        is_plain = info.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not self._tar.pax_headers
        num_bytes = info.offset_data - info.offset
        headers = self._window.read(info.offset, min(num_bytes, 3 * tarfile.BLOCKSIZE))
        if not is_plain or len(headers) not in (512, 1536) or len(headers) < num_bytes:
            return
        if len(headers) == 1536 and headers[156:157] != tarfile.XHDTYPE:
            return
        for header in (headers[:512], headers[-512:]):
            parts = header[100:124], header[156:]
            self._templates[header[156:157]] = (*parts, sum(parts[0]) + sum(parts[1]) + 8 * ord(" "))
        prefix = headers[-512:][345:500].partition(b"\0")[0].decode(self._tar.encoding, self._tar.errors)
        self._prefix = f"{prefix}/" if prefix else ""

    def parse(self, position: int) -> _Member | None:
        """Parse the headers at a position. Return None if they must be parsed by `tarfile`."""
        header = self._window.read(position, tarfile.BLOCKSIZE)
        fields = self._parse_block(header)
        if fields is not None and header[156] == ord("x"):
            records = self._window.read(position + 512, 512).rstrip(b"\0")
            if fields[1] != len(records) or not records or not _has_only_times(records):
                return None
            position += 1024
            header = self._window.read(position, tarfile.BLOCKSIZE)
            fields = self._parse_block(header) if header[156:157] != b"x" else None
        if fields is None or self._tar.pax_headers:
            return None
        name = fields[0].decode(self._tar.encoding, self._tar.errors)
        if name.endswith("/"):  # a folder, in old tar files
            return None
        return _Member(self._prefix + name, position + 512, fields[1])

    def _parse_block(self, header: bytes) -> tuple[bytes, int] | None:
        """Return the name and size in a header, or None if `tarfile` must parse it."""
        template = self._templates.get(header[156:157])
        if template is None or header[100:124] != template[0] or header[156:] != template[1]:
            return None
        numbers = _PLAIN_NUMBERS.fullmatch(header, 124, 156)
        if numbers is None:
            return None
        # Adler-32 contains the sum of the bytes plus 1, modulo 65,521. The sum of 148 bytes is always smaller.
        checksum = template[2] + (zlib.adler32(header[:100]) & 0xFFFF) + (zlib.adler32(header[124:148]) & 0xFFFF) - 2
        if int(numbers[2], 8) != checksum:
            return None
        return header[:100].partition(b"\0")[0], int(numbers[1], 8)


def _has_only_times(records: bytes) -> bool:
    """Return True if all PAX records in a header are time stamps with correct lengths."""
    lines = records.split(b"\n")
    for line in lines[:-1]:
        match = _TIME_RECORD.fullmatch(line)
        if match is None or int(match[1]) != len(line) + 1:
            return False
    return not lines[-1]


# ---- samples ---------------------------------------------------------------------------------------------------------


def _split_name(name: str) -> tuple[str, str]:
    """Return a member's key, which is its path up to the first dot of the file name, and its lower-case suffix."""
    if "//" in name:
        name = os.path.join(*os.path.split(name))
    start = name.rfind("/") + 1
    dot = name.find(".", start)
    if dot < 0:
        dot = len(name)
    return name[:dot] if dot > start else "", name[dot + 1 :].lower()


class _Sample:
    """Members of a tar file that share a key, indexed by suffix."""

    def __init__(self, key: str) -> None:
        self.key, self.members = key, dict[str, _Member]()
        self.contents: dict[str, bytes] = {}  # contents of the captions and of the first image, unless they are large
        self.image_suffix = ""  # suffix of the first image
        self.duplicate = ""  # name of a member that occurs twice, if any

    def add(self, suffix: str, member: _Member, window: _Window, image_bytes: bool) -> None:
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
                return build_too_large_row(member.name)
            if suffix == "txt":
                fields["txt"] = data.decode("utf-8-sig", "surrogateescape")
                continue
            parsed = parse_caption_json(data)
            if isinstance(parsed, BadRow):
                return parsed
            fields = parsed
        images: dict[str, LoadedImage] = {}
        for suffix, member in self.members.items():
            if suffix.rpartition(".")[2] in IMAGE_SUFFIXES:
                ref = TarImage(path, member.offset, member.size, member.name)
                images[suffix] = LoadedImage(ref, self.contents.get(suffix), member.name)
        fields |= images  # images are also keyed by suffix, so that a column mapping can select one of them
        fields["image"] = images.get(self.image_suffix)
        return {"id": self.key.rpartition("/")[2]} | fields
