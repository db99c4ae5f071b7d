"""Readers for JSON Lines and JSON files, including the JSON formats of COCO, Flickr30k and Flickr8k.

- COCO's `captions_train2017.json`: {"images": [{"id", "file_name", "coco_url"}], "annotations": [{"image_id",
  "caption"}]} (cocodataset.org, "Data format")
- Karpathy's `dataset_coco.json`: {"images": [{"filename", "filepath", "split", "sentences": [{"raw"}]}]} (arXiv
  1412.2306; `filepath` occurs only for COCO)
"""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from llm2clip.data.formats.base import (
    BadRow,
    FilePart,
    RawRow,
    ReadOptions,
    SourceFormat,
    describe_encoding,
    detect_encoding,
    make_parts,
    open_text,
    parse_json,
    read_lines,
)
from llm2clip.data.image_refs import FileImage
from llm2clip.data.remote import file_exists, get_parent, is_remote, join_path, open_file
from llm2clip.data.texts import is_valid_unicode
from llm2clip.io_utils import MAX_LINE_CHARACTERS, DataFormatError, check_json_size

# Folders that may contain the images, relative to the caption file. COCO's `annotations/` is next to its image folders.
IMAGE_FOLDERS = (
    "", "images", "Images", "..", "../images", "flickr30k-images", "flickr30k_images", "Flicker8k_Dataset",
    "Flickr8k_Dataset",
)  # fmt: skip
MAX_SEARCHED_IMAGES = 50  # number of images to look for when searching for the image folder
MAX_SEARCHED_REMOTE_IMAGES = 3  # each candidate takes a request
CHUNK_BYTES = 1 << 20
UNUSED_KEYS = ("tokens", "sentids", "segmentation", "flickr_url", "license", "date_captured")


class JsonLines(SourceFormat):
    """One JSON object per line."""

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
                    yield part.path, number, _require_object(parse_json(line))
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            yield part.path, number + 1, BadRow("truncated file", str(error))

    def split(self, path: str, target_bytes: int) -> list[FilePart]:
        if path.lower().endswith(".gz"):
            return [FilePart(self, path)]
        return make_parts(self, path, _find_line_starts(path, target_bytes))


class JsonFile(SourceFormat):
    """A list of JSON objects, or the images in a file with COCO's or Karpathy's format. The file is read at once."""

    name = "json"
    suffixes = (".json",)

    def read(self, part: FilePart, options: ReadOptions) -> Iterator[RawRow]:
        path = part.path
        with open_text(path, options.log) as file:
            check_json_size(path, file.buffer)
            text = file.read()
        if not is_valid_unicode(text):
            raise DataFormatError(f"{path}: {describe_encoding(path)}")
        is_object = text.lstrip().startswith("{")
        try:
            rows = json.loads(text, object_hook=drop_unused_keys if is_object else None)
        except (ValueError, RecursionError) as error:
            raise DataFormatError(
                f"{path}: not JSON ({error}). If the file has one object per line, change its suffix to .jsonl"
            ) from error
        del text
        if isinstance(rows, dict):
            yield from _read_caption_json(path, rows)
            return
        if not isinstance(rows, list):
            raise DataFormatError(f"{path}: a .json file must contain a list of objects (got {type(rows).__name__})")
        for number, row in enumerate(rows, 1):
            yield path, number, _require_object(row)


def _require_object(value: Any) -> dict[str, Any] | BadRow:
    if isinstance(value, dict | BadRow):
        return value
    return BadRow("malformed row", f"not a JSON object: {value!r}")


def _find_line_starts(path: str, target_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield the byte positions and numbers of the first lines that start at or after each multiple of `target_bytes`.

    Nothing more is yielded after a line that is too long. Such lines occur in sparse files.
    """
    start, number = 0, 1
    yield start, number
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
            number += _count_newlines(file, start, stop)
            start = stop
            yield start, number


def _count_newlines(file: BinaryIO, start: int, stop: int) -> int:
    file.seek(start)
    num_newlines = 0
    while start < stop and (chunk := file.read(min(CHUNK_BYTES, stop - start))):
        num_newlines += chunk.count(b"\n")
        start += len(chunk)
    return num_newlines


# ---- COCO and Karpathy's splits --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KarpathyImage:
    """An image with its captions from a file with Karpathy's splits."""

    id: str  # COCO image id, or the file name without its suffix
    name: str  # path relative to the data set's image folder
    split: str  # train, restval, val or test
    captions: list[str]

    @classmethod
    def parse(cls, row: Mapping[str, Any]) -> KarpathyImage:
        """Parse an entry of the `images` list. Raise KeyError or TypeError if a field is missing or malformed."""
        name = os.path.join(row.get("filepath") or "", row["filename"])
        stem = os.path.splitext(row["filename"])[0]
        captions = [sentence["raw"] for sentence in row["sentences"]]
        return cls(str(row.get("cocoid", stem)), name, row["split"], captions)


def drop_unused_keys(fields: dict[str, Any]) -> dict[str, Any]:
    """Remove large unused fields. As an `object_hook` for `json.loads`, this more than halves memory use."""
    for key in UNUSED_KEYS:
        fields.pop(key, None)
    return fields


def _read_caption_json(path: str, data: Mapping[str, Any]) -> Iterator[RawRow]:
    """Return the rows in a JSON file in COCO's or Karpathy's format. Raise DataFormatError for other formats."""
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
        raise DataFormatError(f"{path}: its annotations have no captions. Use COCO's captions_*.json")
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
    captions: dict[Any, list[Any]] = {_read_id(image, "id"): [] for image in images}
    num_bad = 0
    example = ""
    for annotation in annotations:
        image_id = _read_id(annotation, "image_id") if isinstance(annotation, dict) else None
        if image_id is None or image_id not in captions:
            num_bad += 1
            example = example or repr(annotation)
        else:
            captions[image_id].append(annotation.get("caption"))
    folder = find_image_folder(path, [str(image.get("file_name")) for image in images], guess_folders(path, images))
    for number, image in enumerate(images, 1):
        name = image.get("file_name")
        image_id = _read_id(image, "id")
        if not isinstance(name, str) or image_id is None:
            yield path, number, BadRow("malformed row", f"an image has no id or no file_name: {dict(image)!r}")
            continue
        ref = FileImage(join_path(folder, name))
        yield path, number, {"id": image_id, "image": ref, "captions": captions[image_id]}
    if num_bad:
        problem = f"annotations whose image_id is missing or not in 'images', such as {example}"
        yield path, len(images) + 1, BadRow("malformed row", problem, num_bad)


def _read_id(fields: Mapping[str, Any], key: str) -> str | int | float | None:
    """Return an id, or None if it is missing or is neither text nor a number."""
    value = fields.get(key)
    return value if isinstance(value, str | int | float) else None


def guess_folders(path: str, images: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return likely names of a COCO split's image folder, such as train2017.

    The names are derived from the JSON file name (`captions_train2017.json`) and from `coco_url`
    (http://images.cocodataset.org/train2017/000000391895.jpg).
    """
    match = re.fullmatch(r"[a-z_]+_([a-z]+\d*)", os.path.splitext(os.path.basename(path))[0])
    names = [match[1]] if match else []
    url = images[0].get("coco_url") if images else None
    if isinstance(url, str) and url.count("/") > 2:
        names.append(url.split("/")[-2])
    return names


def find_image_folder(path: str, names: Sequence[str], subfolders: Sequence[str] = ()) -> str:
    """Return the first folder that contains one of the images, or the caption file's folder if none does."""
    parent = get_parent(path)
    for name in names[: MAX_SEARCHED_REMOTE_IMAGES if is_remote(path) else MAX_SEARCHED_IMAGES]:
        for folder in IMAGE_FOLDERS:
            for subfolder in ("", *subfolders):
                candidate = join_path(parent, os.path.join(folder, subfolder))
                candidate = candidate if is_remote(candidate) else os.path.normpath(candidate)
                if file_exists(join_path(candidate, name)):
                    return candidate
    return parent
