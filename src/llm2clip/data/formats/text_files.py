"""Readers for text, JSON Lines and JSON files, including the JSON formats of COCO, Flickr30k and Flickr8k.

Text files must be UTF-8 or UTF-16. Decoding with a guessed encoding could corrupt the text, so error messages explain
how to convert files in other encodings to UTF-8.

- COCO's `captions_train2017.json`: {"images": [{"id", "file_name", "coco_url"}], "annotations": [{"image_id",
  "caption"}]} (cocodataset.org, "Data format")
- Karpathy's `dataset_coco.json`: {"images": [{"filename", "filepath", "split", "sentences": [{"raw"}]}]} (arXiv
  1412.2306; `filepath` occurs only for COCO)
"""

from __future__ import annotations

import codecs
import functools
import gzip
import io
import json
import os
import re
import shlex
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any, BinaryIO, TextIO, cast

from charset_normalizer import from_bytes

from llm2clip.data.formats import NOT_UTF8, BadRow, FilePart, RawRow, ReadOptions, SourceFormat
from llm2clip.data.image_refs import FileImage
from llm2clip.data.remote import FileSlice, file_exists, get_file_size, open_file
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.storage import get_file_name, get_parent_folder, is_remote, join_path
from llm2clip.io_utils import (
    MAX_LINE_CHARACTERS,
    DataFormatError,
    check_json_size,
    detect_encoding,
    is_valid_unicode,
    to_valid_unicode,
)

# Common encodings of caption files. The Windows encodings include the corresponding ISO 8859 encodings.
_LIKELY_ENCODINGS = (
    "cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "koi8_r", "shift_jis", "euc_jp", "gb18030",
    "big5", "euc_kr",
)  # fmt: skip
MAX_LISTED_ENCODINGS = 3  # maximum number of likely encodings listed in a message
MAX_SAMPLE_BYTES = 1 << 14  # maximum size of the sample from which the encoding is guessed
MAX_SEARCHED_BYTES = 1 << 28  # maximum number of bytes to search for invalid UTF-8
MAX_SKIPPED_CHARACTERS = 1 << 30  # files with longer lines are rejected as corrupt or sparse
# Possible image folders, relative to the caption file. COCO's `annotations/` is next to its image folders.
IMAGE_FOLDERS = (
    "", "images", "Images", "..", "../images", "flickr30k-images", "flickr30k_images", "Flicker8k_Dataset",
    "Flickr8k_Dataset",
)  # fmt: skip
MAX_SEARCHED_IMAGES = 50  # number of images to look for in each candidate folder
MAX_SEARCHED_REMOTE_IMAGES = 3  # fewer in remote folders, because each lookup requires a request
CHUNK_BYTES = 1 << 20
UNUSED_KEYS = ("tokens", "sentids", "segmentation", "flickr_url", "license", "date_captured")


# ---- text ------------------------------------------------------------------------------------------------------------


def open_text_file(
    path: str, log: SkipLog | None = None, newline: str | None = None, start: int = 0, stop: int | None = None
) -> TextIO:
    """Open a UTF-8 or UTF-16 text file, which may be gzipped (.gz). To read lines, use `BoundedLineIterator`.

    Undecodable bytes become lone surrogates; see `reject_undecodable_text`. UTF-16 files are recorded in `log`.
    `newline` has the same meaning as for the built-in `open`. `start` and `stop` are byte offsets in a UTF-8 file.
    """
    stream = _open_decompressed_file(path, start, stop)
    try:
        encoding = "utf-8" if start else detect_encoding(stream.read(4))
        stream.seek(0)
    except Exception:
        stream.close()
        raise
    if encoding in ("utf-8", "utf-8-sig"):
        return io.TextIOWrapper(stream, encoding, "surrogateescape", newline)
    if log is not None:
        log.add_note(f"read as {encoding.upper()}", path)
    return io.TextIOWrapper(stream, encoding, "escape_undecodable", newline)


class LineTooLongError(ValueError):
    """Raised when a line or a multi-line row has too many characters."""


class BoundedLineIterator:
    """Iterator over the lines of a text file, with a limit on the length of rows.

    If a row is too long, `LineTooLongError` is raised, and iteration can continue after the row. For formats in which a
    row can span several lines, call `start_row` before each row.
    """

    def __init__(self, file: TextIO, path: str) -> None:
        self._file, self._path = file, path
        self.start_row()

    def start_row(self) -> None:
        """Reset the character count at the start of a row."""
        self._characters_left = MAX_LINE_CHARACTERS

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._file.readline(self._characters_left + 1)
        if not line:
            raise StopIteration
        self._characters_left -= len(line)
        if self._characters_left >= 0:
            return line
        num_skipped = 0
        while line and not line.endswith("\n"):
            line = self._file.readline(1 << 20)
            num_skipped += len(line)
            if num_skipped > MAX_SKIPPED_CHARACTERS:
                raise DataFormatError(f"{self._path}: a line has more than {MAX_SKIPPED_CHARACTERS:,} characters")
        self.start_row()
        raise LineTooLongError(f"a row has more than {MAX_LINE_CHARACTERS:,} characters")


def read_lines(
    path: str, log: SkipLog | None = None, newline: str | None = None, start: int = 0, stop: int | None = None
) -> Iterator[str | BadRow]:
    """Yield the lines of a text file; see `open_text_file`. An overlong or undecodable line becomes a `BadRow`."""
    with open_text_file(path, log, newline, start, stop) as file:
        lines = BoundedLineIterator(file, path)
        while True:
            lines.start_row()
            try:
                line = next(lines)
            except StopIteration:
                return
            except LineTooLongError as error:
                yield BadRow("malformed row", str(error))
                continue
            yield reject_undecodable_text(line, path, log) or line


def reject_undecodable_text(text: str, path: str, log: SkipLog | None = None) -> BadRow | None:
    """Return a `BadRow` if a text has undecodable bytes, otherwise None. Record the likely encodings in `log`."""
    if is_valid_unicode(text):
        return None
    if log is not None:
        log.add_note(describe_encoding_problem(path), path)
    return BadRow(NOT_UTF8, to_valid_unicode(text.strip()))


@functools.lru_cache(maxsize=64)
def describe_encoding_problem(path: str) -> str:
    """Return a message that shows an undecodable line in each likely encoding and explains how to convert the file."""
    with _open_decompressed_file(path) as stream:
        encoding = detect_encoding(stream.read(4))
    if encoding != "utf-8-sig":
        return f"contains bytes that are not valid {encoding.upper()}"
    sample, line = _sample_undecodable_lines(path)
    if not line:
        return "not UTF-8. Convert the file to UTF-8"
    likely = [match.encoding for match in from_bytes(sample, cp_isolation=list(_LIKELY_ENCODINGS))]
    if sum(byte > 127 for byte in sample) < 0.3 * len(sample):
        likely.insert(0, "cp1252")  # the most common encoding, after UTF-8, of text that is mostly ASCII
    readings: dict[str, str] = {}  # decoded line -> encoding
    for encoding in likely:
        with suppress(UnicodeDecodeError):
            readings.setdefault(line.decode(encoding).strip()[:60], encoding)
    listed = " or ".join(f"{encoding} ({text!r})" for text, encoding in islice(readings.items(), MAX_LISTED_ENCODINGS))
    description = f"not UTF-8, {f'probably {listed}' if listed else 'in an unknown encoding'}"
    if path.lower().endswith(".gz"):  # iconv would convert the compressed bytes
        return f"{description}. Convert the file to UTF-8"
    stem, suffix = os.path.splitext(path)
    command = f"iconv -f ENCODING -t UTF-8 {shlex.quote(path)} > {shlex.quote(f'{stem}-utf8{suffix}')}"
    return f"{description}. Convert the file from the encoding that shows this text correctly: `{command}`"


def _open_decompressed_file(path: str, start: int = 0, stop: int | None = None) -> BinaryIO:
    if start or stop is not None:
        size = (get_file_size(path) if stop is None else stop) - start
        return io.BufferedReader(FileSlice(path, start, size))
    stream = open_file(path)
    is_compressed = get_file_name(path).lower().endswith(".gz")
    return cast(BinaryIO, gzip.GzipFile(fileobj=stream)) if is_compressed else stream


def _sample_undecodable_lines(path: str) -> tuple[bytes, bytes]:
    """Return a sample of the lines that are not valid UTF-8, as one byte string, and the first such line."""
    sample = first = b""
    num_searched = 0
    with _open_decompressed_file(path) as stream:
        while len(sample) <= MAX_SAMPLE_BYTES and num_searched <= MAX_SEARCHED_BYTES:
            line = stream.readline(1 << 20)
            if not line:
                break
            num_searched += len(line)
            if not is_valid_unicode(line.decode(errors="surrogateescape")):
                sample += line
                first = first or line
    return sample[: 2 * MAX_SAMPLE_BYTES], first


def _escape_undecodable_bytes(error: UnicodeError) -> tuple[str, int]:
    """Replace undecodable bytes with lone surrogates. Unlike surrogateescape, this error handler supports UTF-16."""
    assert isinstance(error, UnicodeDecodeError)
    return "\udc80" * (error.end - error.start), error.end


codecs.register_error("escape_undecodable", _escape_undecodable_bytes)


# ---- JSON ------------------------------------------------------------------------------------------------------------


class JsonLinesFormat(SourceFormat):
    """Text file with one JSON object per line."""

    name = "jsonl"
    suffixes = (".jsonl", ".jsonl.gz")

    def read(self, part: FilePart, options: ReadOptions) -> Iterator[RawRow]:
        number = part.first_row - 1
        lines = read_lines(part.path, options.log, "\n", part.start, part.stop)
        try:
            for number, line in enumerate(lines, part.first_row):
                if isinstance(line, BadRow):
                    yield part.path, number, line
                elif line.strip():
                    yield part.path, number, _require_json_object(parse_json(line))
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            yield part.path, number + 1, BadRow("truncated file", str(error))

    def find_part_starts(self, path: str, target_bytes: int) -> Iterator[tuple[int, int]]:
        """Yield (byte offset, line number) of the first line that starts at or after each multiple of `target_bytes`.

        Stop at an overlong line, which can occur in sparse files.
        """
        start, number = 0, 1
        yield start, number
        if path.lower().endswith(".gz"):
            return
        with open_file(path) as file:
            if detect_encoding(file.read(4)) != "utf-8-sig":
                return
            size = file.seek(0, os.SEEK_END)
            for target in range(target_bytes, size, target_bytes):
                if target <= start:
                    continue
                file.seek(target - 1)
                rest_of_line = file.readline(MAX_LINE_CHARACTERS)
                stop = target - 1 + len(rest_of_line)
                if not rest_of_line.endswith(b"\n") or stop == size:
                    return
                file.seek(start)
                while start < stop and (chunk := file.read(min(CHUNK_BYTES, stop - start))):
                    number += chunk.count(b"\n")
                    start += len(chunk)
                yield start, number


class JsonFileFormat(SourceFormat):
    """JSON file with a list of objects, or in COCO's or Karpathy's format. The entire file is read into memory."""

    name = "json"
    suffixes = (".json",)

    def read(self, part: FilePart, options: ReadOptions) -> Iterator[RawRow]:
        path = part.path
        with open_text_file(path, options.log) as file:
            check_json_size(path, file.buffer)
            text = file.read()
        if not is_valid_unicode(text):
            raise DataFormatError(f"{path}: {describe_encoding_problem(path)}")
        is_object = text.lstrip().startswith("{")
        try:
            rows = json.loads(text, object_hook=drop_unused_json_keys if is_object else None)
        except (ValueError, RecursionError) as error:
            raise DataFormatError(
                f"{path}: not JSON ({error}). If the file contains one object per line, change its suffix to .jsonl"
            ) from error
        del text
        if isinstance(rows, dict):
            yield from _read_caption_json(path, rows)
            return
        if not isinstance(rows, list):
            raise DataFormatError(f"{path}: a .json file must contain a list of objects (got {type(rows).__name__})")
        for number, row in enumerate(rows, 1):
            yield path, number, _require_json_object(row)


def parse_json(text: str | bytes) -> Any:
    """Parse JSON. Return a `BadRow` if the text is malformed."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return BadRow("malformed row", f"{error}: {text[:200]!r}")


def _require_json_object(value: Any) -> dict[str, Any] | BadRow:
    if isinstance(value, dict | BadRow):
        return value
    return BadRow("malformed row", f"not a JSON object: {value!r}")


@dataclass(frozen=True)
class KarpathyImage:
    """Image and its captions, parsed from a JSON file in Karpathy's format."""

    id: str  # COCO image id, or the file name without its suffix
    name: str  # path relative to the dataset's image folder
    split: str  # train, restval, val or test
    captions: list[str]

    @classmethod
    def parse(cls, row: Mapping[str, Any]) -> KarpathyImage:
        """Parse an entry of the `images` list. Raise KeyError or TypeError if a field is missing or malformed."""
        name = os.path.join(row.get("filepath") or "", row["filename"])
        stem = os.path.splitext(row["filename"])[0]
        captions = [sentence["raw"] for sentence in row["sentences"]]
        return cls(str(row.get("cocoid", stem)), name, row["split"], captions)


def drop_unused_json_keys(fields: dict[str, Any]) -> dict[str, Any]:
    """Remove unused keys. If passed to `json.loads` as `object_hook`, this function more than halves the memory use."""
    for key in UNUSED_KEYS:
        fields.pop(key, None)
    return fields


def _read_caption_json(path: str, data: Mapping[str, Any]) -> Iterator[RawRow]:
    """Yield the rows of a JSON file in COCO's or Karpathy's format. Raise `DataFormatError` for other formats."""
    images, annotations = data.get("images"), data.get("annotations")
    if not isinstance(images, list) or not all(isinstance(image, dict) for image in images):
        raise DataFormatError(
            f"{path}: a .json file must contain a list of objects or have the format of COCO (images, annotations) or "
            f"Karpathy's splits (got an object with the keys {', '.join(map(str, list(data)[:10])) or '(none)'})"
        )
    if any("sentences" in image for image in images):
        return _read_karpathy_rows(path, images)
    if not isinstance(annotations, list) or not any(
        "caption" in item for item in annotations if isinstance(item, dict)
    ):
        raise DataFormatError(f"{path}: the annotations have no captions. Use COCO's captions_*.json")
    return _read_coco_rows(path, images, annotations)


def _read_karpathy_rows(path: str, images: Sequence[Mapping[str, Any]]) -> Iterator[RawRow]:
    parsed: list[KarpathyImage | BadRow] = []
    for row in images:
        try:
            parsed.append(KarpathyImage.parse(row))
        except (KeyError, TypeError, AttributeError) as error:
            parsed.append(BadRow("malformed row", f"not in the format of Karpathy's splits ({error!r})"))
    folder = find_image_folder(path, [image.name for image in parsed if isinstance(image, KarpathyImage)])
    for number, image in enumerate(parsed, 1):
        if isinstance(image, BadRow):
            yield path, number, image
            continue
        ref = FileImage(join_path(folder, image.name))
        yield path, number, {"id": image.id, "image": ref, "captions": image.captions, "split": image.split}


def _read_coco_rows(path: str, images: Sequence[Mapping[str, Any]], annotations: Sequence[Any]) -> Iterator[RawRow]:
    captions: dict[Any, list[Any]] = {_get_valid_image_id(image, "id"): [] for image in images}
    num_bad = 0
    example = ""
    for annotation in annotations:
        image_id = _get_valid_image_id(annotation, "image_id") if isinstance(annotation, dict) else None
        if image_id is None or image_id not in captions:
            num_bad += 1
            example = example or repr(annotation)
        else:
            captions[image_id].append(annotation.get("caption"))
    folder = find_image_folder(
        path, [str(image.get("file_name")) for image in images], guess_image_folders(path, images)
    )
    for number, image in enumerate(images, 1):
        name = image.get("file_name")
        image_id = _get_valid_image_id(image, "id")
        if not isinstance(name, str) or image_id is None:
            yield path, number, BadRow("malformed row", f"an image has no id or no file_name: {dict(image)!r}")
            continue
        ref = FileImage(join_path(folder, name))
        yield path, number, {"id": image_id, "image": ref, "captions": captions[image_id]}
    if num_bad:
        problem = f"annotations whose image_id is missing or not in 'images', such as {example}"
        yield path, len(images) + 1, BadRow("malformed row", problem, num_bad)


def _get_valid_image_id(fields: Mapping[str, Any], key: str) -> str | int | float | None:
    value = fields.get(key)
    return value if isinstance(value, str | int | float) else None


def guess_image_folders(path: str, images: Sequence[Mapping[str, Any]]) -> list[str]:
    """Guess the image folder of a COCO split, such as train2017, from the caption file's name and the image URLs."""
    match = re.fullmatch(r"[a-z_]+_([a-z]+\d*)", os.path.splitext(os.path.basename(path))[0])
    names = [match[1]] if match else []
    url = images[0].get("coco_url") if images else None
    if isinstance(url, str) and url.count("/") > 2:
        names.append(url.split("/")[-2])
    return names


def find_image_folder(path: str, names: Sequence[str], subfolders: Sequence[str] = ()) -> str:
    """Return the first folder that contains any of the images, or the caption file's own folder if none does."""
    parent = get_parent_folder(path)
    for name in names[: MAX_SEARCHED_REMOTE_IMAGES if is_remote(path) else MAX_SEARCHED_IMAGES]:
        for folder in IMAGE_FOLDERS:
            for subfolder in ("", *subfolders):
                candidate = join_path(parent, os.path.join(folder, subfolder))
                candidate = candidate if is_remote(candidate) else os.path.normpath(candidate)
                if file_exists(join_path(candidate, name)):
                    return candidate
    return parent
