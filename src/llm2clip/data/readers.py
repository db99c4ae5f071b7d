"""Formats in, raw rows out: one small function a format, and the references by which image bytes are found again.

A raw row is `(file, row, fields)`. `row` counts from 1 and is the line in a text file. `fields` is the row as the
format holds it, or a `Bad` where it cannot be read. Nothing here knows what a caption is: `records` decides that.
"""

from __future__ import annotations

import csv
import difflib
import functools
import glob
import gzip
import importlib
import io
import json
import os
import re
import tarfile
import zlib
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif", "jp2"})
FORMATS = {  # what a name ends with -> the format's name in `read`
    ".jsonl": "jsonl", ".jsonl.gz": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
    ".tar": "tar", ".txt": "captions.txt",
}  # fmt: skip
CAPTION_FILES = (
    "captions.jsonl", "captions.jsonl.gz", "captions.csv", "captions.tsv", "metadata.jsonl", "metadata.csv",
    "captions.txt",
)  # fmt: skip
KNOWN = (
    f"files ending in {', '.join(FORMATS)} (.txt: lines of 'name.jpg,caption' or 'name.jpg#0<TAB>caption'; tars "
    "uncompressed), globs and {000..010} patterns of them, a folder of tars, of parquet files, of images with x.txt or "
    "x.json beside each x.jpg, or with captions.jsonl or metadata.csv, a folder written by save_to_disk, and "
    "hf:NAME[:CONFIG]"
)
MAX_CAPTION_BYTES = 1 << 20  # a caption file in a tar larger than this is no caption


# ---- references to images ------------------------------------------------------------------------------------------


class ImageRef(ABC):
    """Where an image's bytes are: small, picklable, readable in any process. `str()` names it in messages."""

    __slots__ = ()

    @abstractmethod
    def open(self) -> BinaryIO:
        """The bytes as a stream, for who needs only the header."""

    def read(self) -> bytes:
        """All the encoded bytes (not decoded)."""
        with self.open() as stream:
            return stream.read()


@dataclass(frozen=True, slots=True)
class FileImage(ImageRef):
    """An image file."""

    path: str

    def open(self) -> BinaryIO:
        return open(self.path, "rb")

    def __str__(self) -> str:
        return self.path


@dataclass(frozen=True, slots=True)
class TarImage(ImageRef):
    """A member of an uncompressed tar, read by seeking: any member costs the same, nothing is extracted."""

    path: str
    offset: int
    size: int
    name: str = ""

    def open(self) -> BinaryIO:
        return io.BufferedReader(_Window(self.path, self.offset, self.size))

    def __str__(self) -> str:
        return f"{self.path}!{self.name or self.offset}"


class _Window(io.RawIOBase):
    """A stretch of a file as a stream of its own, so that PIL can read a header without the whole member."""

    def __init__(self, path: str, offset: int, size: int) -> None:
        self._file, self._offset, self._size, self._at = open(path, "rb", buffering=0), offset, size, 0  # noqa: SIM115

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, (0, self._at, self._size)[whence] + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self._size - self._at))
        self._file.seek(self._offset + self._at)
        got = self._file.readinto(memoryview(buffer)[:wanted]) or 0
        self._at += got
        return got

    def close(self) -> None:
        self._file.close()
        super().close()


@dataclass(frozen=True, slots=True)
class ParquetImage(ImageRef):
    """A cell of a parquet file (bytes, or a struct of bytes and path).

    The first read of a row group decodes its whole image column; four such columns are kept a process. Reading in file
    order is therefore cheap, and reading at random costs a row group an image: write small row groups (HF's are 100).
    """

    path: str
    row: int
    column: str

    def open(self) -> BinaryIO:
        starts = _row_group_starts(self.path)
        group = bisect_right(starts, self.row) - 1
        value = _parquet_column(self.path, group, self.column)[self.row - starts[group]].as_py()
        return _open_cell(value, os.path.dirname(self.path), str(self))

    def __str__(self) -> str:
        return f"{self.path}[{self.row}].{self.column}"


@functools.lru_cache(maxsize=1024)
def _row_group_starts(path: str) -> list[int]:
    meta = pq.read_metadata(path)
    starts = [0]
    for group in range(meta.num_row_groups - 1):
        starts.append(starts[-1] + meta.row_group(group).num_rows)
    return starts


@functools.lru_cache(maxsize=4)
def _parquet_column(path: str, group: int, column: str) -> pa.ChunkedArray:
    # Opened anew and read on this thread: a handle or a thread pool kept over a fork is what hangs data loaders.
    with pq.ParquetFile(path) as file:
        return file.read_row_group(group, columns=[column], use_threads=False).column(0)


@dataclass(frozen=True, slots=True)
class DatasetImage(ImageRef):
    """A cell of a Hugging Face data set saved by `save_to_disk`: memory-mapped, so random access is cheap."""

    folder: str
    split: str | None
    row: int
    column: str

    def open(self) -> BinaryIO:
        return _open_cell(_saved(self.folder, self.split)[self.row][self.column], self.folder, str(self))

    def __str__(self) -> str:
        return f"{self.folder}{'/' + self.split if self.split else ''}[{self.row}].{self.column}"


@functools.lru_cache(maxsize=16)
def _saved(folder: str, split: str | None) -> Any:
    from datasets import load_from_disk

    loaded = load_from_disk(folder)
    return _undecoded(loaded[split] if split is not None and isinstance(loaded, dict) else loaded)


def _open_cell(value: Any, folder: str, name: str) -> BinaryIO:
    data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if data is None and path is None:
        raise FileNotFoundError(f"{name} holds no image")
    return io.BytesIO(data) if data is not None else open(os.path.join(folder, str(path)), "rb")


@dataclass(frozen=True, slots=True)
class MemoryImage(ImageRef):
    """Bytes in memory, for sources that can be read only once. Keep few."""

    data: bytes
    name: str = "image in memory"

    def open(self) -> BinaryIO:
        return io.BytesIO(self.data)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Held:
    """A reference met while its bytes are in hand (not read here if None); `name` is the file it once was."""

    ref: ImageRef
    data: bytes | None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Bad:
    """A row that cannot be read: the reason it is counted under, and what was found."""

    reason: str
    value: str


RawRow = tuple[str, int, dict[str, Any] | Bad]
Choose = Callable[[str, Sequence[str]], dict[str, str]]  # (file, column names) -> our field: column


# ---- finding -------------------------------------------------------------------------------------------------------


def find(path: str) -> list[tuple[str, str]]:
    """The `(format, file)` pairs a path stands for, in order. A path that exists is itself, whatever its characters."""
    if path.startswith("hf:"):
        return [("hf", path[3:])]
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        return _find_in_folder(path)
    if os.path.exists(path):
        suffixes = [suffix for suffix in FORMATS if path.lower().endswith(suffix)]
        if not suffixes:
            raise ValueError(f"{path}: unknown format; these can be read: {KNOWN}")
        return [(FORMATS[suffixes[0]], path)]
    names = _braces(path) if "{" in path else [path]
    found: list[tuple[str, str]] = []
    for name in names:
        matches = sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) else [name] * os.path.exists(name)
        if not matches:
            raise FileNotFoundError(_absent(name))
        for match in matches:
            found += find(match)
    return found


def _find_in_folder(folder: str) -> list[tuple[str, str]]:
    names = sorted(os.listdir(folder))
    if "dataset_dict.json" in names or {"dataset_info.json", "state.json"} <= set(names):
        return [("saved", folder)]
    for name in CAPTION_FILES:
        if name in names:
            return find(os.path.join(folder, name))
    for suffix in (".tar", ".parquet"):
        files = [os.path.join(folder, name) for name in names if name.lower().endswith(suffix)]
        if files:
            return [(FORMATS[suffix], file) for file in files]
    if next(_images_in(folder), None) is None:
        raise ValueError(f"{folder}: a folder without images, tars, parquet or captions; these can be read: {KNOWN}")
    return [("images", folder)]


def _braces(pattern: str) -> list[str]:
    try:  # not through webdataset.shardlists, which imports torch
        braceexpand = importlib.import_module("braceexpand").braceexpand
    except ImportError as error:
        raise ImportError(f"{pattern}: patterns in braces need `pip install llm2clip[tars]`") from error
    return list(braceexpand(pattern))


def _absent(path: str) -> str:
    """The message for a path that is not there: how far it exists, and what there looks like it."""
    parent, name = os.path.split(os.path.abspath(path))
    while not os.path.isdir(parent):
        parent, name = os.path.split(parent)
    near = [os.path.join(parent, match) for match in difflib.get_close_matches(name, os.listdir(parent), n=3)]
    hint = f"did you mean {' or '.join(near)}?" if near else f"{parent} has no '{name}'"
    return f"{path}: no such file or folder; {hint}"


def read(
    kind: str, path: str, choose: Choose, image_bytes: bool = True, splits: Sequence[str] | None = ()
) -> Iterator[RawRow]:
    """The raw rows of one file or folder of a format named by `find`.

    choose: from a table's column names, those wanted; the others are not read. image_bytes: whether images embedded in
    parquet are read while scanning. splits: which of a Hugging Face data set's splits (empty: all), whose name becomes
    the rows' `split`; None: all, and the rows keep their own.
    """
    if kind == "parquet":
        return read_parquet(path, choose, image_bytes)
    if kind in ("hf", "saved"):
        return read_huggingface(path, kind == "saved", choose, splits)
    if kind in ("csv", "tsv"):
        return read_csv(path, "\t" if kind == "tsv" else ",")
    readers = {"jsonl": read_jsonl, "json": read_json, "captions.txt": read_captions_txt, "tar": read_tar}
    return readers.get(kind, read_images)(path)


# ---- text files ----------------------------------------------------------------------------------------------------


def read_jsonl(path: str) -> Iterator[RawRow]:
    """An object a line, also gzipped. Lines are decoded one by one, so that one bad line costs one row."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield path, number, _object(line)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield path, number + 1, Bad("truncated file", str(error))


def _object(line: bytes) -> dict[str, Any] | Bad:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return Bad("malformed row", f"{error}: {line[:200].decode('utf-8', 'replace')}")
    return value if isinstance(value, dict) else Bad("malformed row", f"not an object: {value!r}")


def read_json(path: str) -> Iterator[RawRow]:
    """A list of objects. Read whole, as JSON must be: write large sets as .jsonl."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            rows = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); if it holds an object a line, name it .jsonl") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path}: a .json source is a list of objects, this holds one {type(rows).__name__}")
    for number, row in enumerate(rows, 1):
        yield path, number, row if isinstance(row, dict) else Bad("malformed row", f"not an object: {row!r}")


def read_csv(path: str, delimiter: str) -> Iterator[RawRow]:
    """Rows under a header line. A row with more or fewer fields than the header is bad, not guessed at."""
    # surrogateescape: bytes that are no UTF-8 stay visible to `records`, which refuses the row and not the file
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.reader(file, delimiter=delimiter, skipinitialspace=True, strict=True)
        header = [name.strip() for name in next(rows, [])]
        while True:
            number = rows.line_num + 1
            try:
                cells = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                if "unexpected end" in str(error) or "field limit" in str(error):  # it has swallowed the rows after it
                    raise ValueError(f"{path}: a quote opened in the row at line {number} is not closed") from error
                yield path, number, Bad("malformed row", str(error))
                continue
            if len(cells) == len(header):
                yield path, number, dict(zip(header, cells, strict=True))
            elif cells:
                yield path, number, Bad("malformed row", f"{len(cells)} fields, the header has {len(header)}: {cells}")


def read_captions_txt(path: str) -> Iterator[RawRow]:
    """Flickr8k's two forms: `name.jpg,caption`, with or without a header, and `name.jpg#0<TAB>caption`."""
    folder, prefix = os.path.dirname(path), None
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            name, comma, caption = re.sub(r"#\d+\t", ",", line.strip(), count=1).partition(",")
            if not name or (number == 1 and re.fullmatch(r"image(_name)?|file_?name", name.strip())):
                continue
            if not comma:
                yield path, number, Bad("malformed row", f"neither 'name,caption' nor 'name#0<TAB>caption': {line}")
                continue
            if len(caption) > 1 and caption[0] == caption[-1] == '"':
                caption = caption[1:-1].replace('""', '"')
            if prefix is None:  # the published archives keep the images in a folder beside this file
                places = ("", "images", "Images", "Flicker8k_Dataset", "Flickr8k_Dataset", "flickr30k_images")
                prefix = next((p for p in places if os.path.isfile(os.path.join(folder, p, name))), "")
            yield path, number, {"image": os.path.join(prefix, name.strip()), "caption": caption}


# ---- files of images -----------------------------------------------------------------------------------------------


def _images_in(folder: str) -> Iterator[str]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.rpartition(".")[2].lower() in IMAGE_SUFFIXES and not name.startswith("."):
                yield os.path.join(parent, name)


def read_images(folder: str) -> Iterator[RawRow]:
    """Every image under a folder, with the captions beside it: `x.json`, or `x.txt` with a caption a line."""
    for number, path in enumerate(_images_in(folder), 1):
        stem = path.rpartition(".")[0]
        fields: dict[str, Any] | Bad = {}
        if os.path.isfile(stem + ".json"):
            with open(stem + ".json", "rb") as file:
                fields = _sidecar(file.read())
        if not isinstance(fields, Bad) and os.path.isfile(stem + ".txt"):
            with open(stem + ".txt", encoding="utf-8-sig", errors="surrogateescape") as lines:
                fields["txt"] = [line for line in lines if line.strip()]
        if not isinstance(fields, Bad):
            fields["image"] = FileImage(path)
        yield path, number, fields


def _sidecar(data: bytes) -> dict[str, Any] | Bad:
    """A caption file as fields: an object is them, a list or a string is the captions."""
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return Bad("malformed row", f"{error}: {data[:200].decode('utf-8', 'replace')}")
    if isinstance(value, dict):
        return value
    return {"captions": value} if isinstance(value, list | str) else Bad("malformed row", f"no captions: {value!r}")


def read_tar(path: str) -> Iterator[RawRow]:
    """The samples of a webdataset tar: neighbouring members whose names agree up to the first dot of the last part.

    One pass over the headers; only .txt and .json members are read, images are remembered by offset. A tar that ends
    early yields what it holds and then one bad row. Names are only keys: nothing is written, whatever they say.
    """
    number, sample = 0, _Sample("")
    try:
        tar = tarfile.open(path, "r:")  # noqa: SIM115 - closed below, and opening is what fails
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        yield path, 1, Bad("unreadable tar", str(error))
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
            sample.members[suffix.lower()] = member
        if sample.members and (not damage or sample.whole()):  # else the damage is what is wrong with it
            number += 1
            yield path, number, sample.row(path, file)
        if damage:
            yield path, number + 1, Bad("truncated tar", damage)


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

    def whole(self) -> bool:
        return bool(self.members.keys() & IMAGE_SUFFIXES and self.members.keys() & {"txt", "json"})

    def row(self, path: str, file: BinaryIO) -> dict[str, Any] | Bad:
        fields: dict[str, Any] = {}
        for suffix in ("json", "txt"):
            member = self.members.get(suffix)
            if member is None:
                continue
            if member.size > MAX_CAPTION_BYTES:
                return Bad("caption file over 1 MB", f"{member.name}: {member.size} bytes")
            file.seek(member.offset_data)
            data = file.read(member.size)
            if suffix == "txt":
                fields["txt"] = data.decode("utf-8-sig", "surrogateescape")
            elif isinstance(sidecar := _sidecar(data), Bad):
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


# ---- tables --------------------------------------------------------------------------------------------------------


def read_parquet(path: str, choose: Choose, image_bytes: bool) -> Iterator[RawRow]:
    """Rows in batches, the chosen columns only. An embedded image comes as a reference to its cell."""
    row = 0
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            schema = file.schema_arrow
            wanted = list(dict.fromkeys(choose(path, schema.names).values()))
            cells = {name for name in wanted if _holds_bytes(schema.field(name).type)}
            unread = set() if image_bytes else {c for c in cells if not pa.types.is_struct(schema.field(c).type)}
            columns = [c if image_bytes or c not in cells else f"{c}.path" for c in wanted if c not in unread]
            size = 64 if cells and image_bytes else 1024
            for batch in file.iter_batches(batch_size=size, columns=columns, use_threads=False):
                for fields in batch.to_pylist():
                    for column in cells - unread:
                        fields[column] = _held(ParquetImage(path, row, column), fields[column], not image_bytes)
                    row += 1
                    yield path, row, fields
    except (pa.ArrowException, OSError) as error:
        yield path, row + 1, Bad("unreadable file", str(error))


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return {"bytes", "path"} <= {kind.field(i).name for i in range(kind.num_fields)}
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _held(ref: ImageRef, value: Any, unread: bool = False) -> Any:
    """The cell's value as records take it: nothing, a path, or bytes that `ref` finds again."""
    data, name = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if value is None or (data is None and not unread):
        return name  # without bytes, a struct's path is that of a file
    return Held(ref, data, name)


def read_huggingface(name: str, saved: bool, choose: Choose, splits: Sequence[str] | None) -> Iterator[RawRow]:
    """A folder written by `save_to_disk` (random access), or a hub name (streamed; images stay in memory).

    Of a hub data set only the splits asked for are fetched. No code from the hub is run.
    """
    import datasets

    if saved:
        loaded = datasets.load_from_disk(name)
    else:
        hub, _, config = name.partition(":")
        loaded = datasets.load_dataset(hub, config or None, streaming=True)
    several = isinstance(loaded, dict)
    parts = dict(loaded) if several else {str(loaded.split) if loaded.split else None: loaded}
    wanted = [split for split in splits or () if several and split != "none"]
    if absent := [split for split in wanted if split not in parts]:
        raise ValueError(f"{name} has no split {', '.join(absent)}; it has {', '.join(map(str, parts))}")
    for split, part in parts.items():
        if wanted and split not in wanted:
            continue
        file = os.path.join(name, split or "") if saved else f"hf:{name}/{split}"
        names = part.column_names or list(next(iter(part), {}))  # a stream may not know its columns
        columns = list(dict.fromkeys(choose(file, names).values()))
        images = [c for c in columns if part.features and isinstance(part.features.get(c), datasets.Image)]
        for row, fields in enumerate(_undecoded(part.select_columns(columns))):
            for column in images:
                if saved:
                    fields[column] = _held(DatasetImage(name, split if several else None, row, column), fields[column])
            if splits is not None and split is not None:
                fields["split"] = split
            yield file, row + 1, fields


def _undecoded(part: Any) -> Any:
    import datasets

    for column, feature in (part.features or {}).items():
        if isinstance(feature, datasets.Image):
            part = part.cast_column(column, datasets.Image(decode=False))
    return part
