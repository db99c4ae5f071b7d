"""Records of a captioning run: the images listed in its sources, and the captioned records that it writes.

A run for OUT = captions.jsonl writes these files next to each other:

    captions.jsonl             records with the captions
    captions.jsonl.sqlite      all answers; see `database.py`. It makes the run resumable
    captions_failures.jsonl    requests without a caption, with their reason. They are retried by the next run
    captions_report.html       what quality control has found, with images and captions, worst first
    captions_skipped.jsonl     images that could not be read when they were listed
    captions_images/           copies of the images that are not files: members of tars, cells of tables, URLs

The output of captioning runs is not read as a source.
"""

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, TextIO

from llm2clip.caption.checks import remove_opening
from llm2clip.caption.database import CaptionDatabase, ImageRow, StoredAnswer
from llm2clip.caption.options import Prompt
from llm2clip.data.columns import CAPTION_FIELDS, TEXT_FIELDS
from llm2clip.data.formats import find_files
from llm2clip.data.image_facts import UNREADABLE_IMAGE
from llm2clip.data.image_header import DecodingLimitError, ImageFormatError, open_header
from llm2clip.data.image_refs import FileImage, ImageRef, get_file_version
from llm2clip.data.records import Record, RecordReader, Source
from llm2clip.data.remote import is_remote
from llm2clip.data.skip_log import SkipLog
from llm2clip.io_utils import atomic_path, explain_write_errors
from llm2clip.progress import ProgressBar

_COPIED_IMAGE = re.compile(r"[0-9a-f]{64}\.\w+")
WRITTEN_BY_CAPTION = "not read, because `llm2clip caption` has written it"


@dataclass(frozen=True)
class CaptionOutput:
    """Paths of a captioning run's files. They are derived from the path of the output, which must end with .jsonl."""

    records: Path

    @property
    def database(self) -> Path:
        return self.records.with_name(f"{self.records.name}.sqlite")

    @property
    def failures(self) -> Path:
        return self.records.with_name(f"{self.records.stem}_failures.jsonl")

    @property
    def report(self) -> Path:
        return self.records.with_name(f"{self.records.stem}_report.html")

    @property
    def skipped(self) -> Path:
        return self.records.with_name(f"{self.records.stem}_skipped.jsonl")

    @property
    def images(self) -> Path:
        return self.records.with_name(f"{self.records.stem}_images")

    def check(self) -> None:
        """Raise ValueError if the path is not valid, or if the file was not written by a captioning run."""
        if self.records.suffix.lower() != ".jsonl":
            raise ValueError(f"--out must be a .jsonl file (got {self.records})")
        if self.records.exists() and not self.database.exists():
            raise ValueError(
                f"--out {self.records} already exists, and was not written by `llm2clip caption`, because "
                f"{self.database.name} does not exist. Choose another file"
            )


# ---- list the images -------------------------------------------------------------------------------------------------


def list_images(
    sources: Sequence[str],
    columns: dict[str, str],
    output: CaptionOutput,
    log: SkipLog,
    earlier: CaptionDatabase,
) -> Iterator[ImageRow]:
    """Yield a row for each record with an image. Copy images that are not local files to the images folder.

    Args:
        columns: Mapping from fields to columns of the sources; see `Source`.
        earlier: Database with the images of the last run. Unchanged files are not read again.
    """
    number = 0
    with ProgressBar(desc="read", unit="image") as bar:
        for source in sources:
            for record, image in _open_images(source, columns, output, log):
                key = _make_key(record, image)
                try:
                    if isinstance(image, FileImage) and not is_remote(image.path):
                        path = os.path.abspath(image.path)
                        image_hash, version = _hash_file(image, earlier.find_image(key))
                    else:
                        path, image_hash, version = *_copy_image(image.read(), output), None
                except (OSError, ImageFormatError, DecodingLimitError) as error:
                    log.skip(str(image), number, UNREADABLE_IMAGE, error)
                    continue
                path = path.removeprefix(os.path.join(os.path.abspath(output.records.parent), ""))
                yield ImageRow(number, key, image_hash, _make_record(record, path), version)
                number += 1
                bar.update()


def _open_images(
    source: str, columns: dict[str, str], output: CaptionOutput, log: SkipLog
) -> Iterator[tuple[Record, ImageRef]]:
    """Yield the records of a source that have an image, and the image. The output of captioning runs is omitted."""
    parsed = Source.parse(source)
    parsed = Source(parsed.path, parsed.splits, columns or parsed.columns)
    source_path = os.path.realpath(os.path.expanduser(parsed.path))
    # The output of another run is read if the user has named the file.
    omits_output = not os.path.isfile(source_path) or source_path == os.path.realpath(output.records)
    files = []
    for file in find_files(parsed.path, all_files=True, log=log):
        if omits_output and _is_caption_output(file.path):
            log.add_note(WRITTEN_BY_CAPTION, file.path)
        else:
            files.append(file)
    for number, record in enumerate(RecordReader(parsed, log, "header", require_captions=False).read(files)):
        if record.image is None:
            log.skip(parsed.path, number, "no image", record.id)
        elif omits_output and _is_copied_image(str(record.image)):
            log.add_note(WRITTEN_BY_CAPTION, os.path.dirname(str(record.image)))
        else:
            yield record, record.image


def _make_key(record: Record, image: ImageRef) -> str:
    """Return a string that identifies an image and its split. Invalid bytes in file names are escaped."""
    key = image.key if record.split is None else f"{image.key}@{record.split}"
    return key.encode(errors="backslashreplace").decode()


def _make_record(record: Record, path: str) -> dict[str, Any]:
    fields: dict[str, Any] = {"image": path, "id": record.id}
    for name in TEXT_FIELDS:
        if texts := getattr(record, name):
            fields[name] = list(texts)
    if record.split is not None:
        fields["split"] = record.split
    return fields


def _hash_file(image: FileImage, earlier: ImageRow | None) -> tuple[str, str]:
    """Return the hash and the version of an image file. It is read only if it has changed since the last run."""
    ((size, modified),) = get_file_version(image.path)
    version = f"{size} {modified}"
    if earlier is not None and earlier.version == version:
        return earlier.hash, version
    return hashlib.sha256(image.read()).hexdigest(), version


def _copy_image(data: bytes, output: CaptionOutput) -> tuple[str, str]:
    """Copy an image to the images folder if it is not there yet. Return its path and hash.

    Raises:
        OSError: The image cannot be copied.
        ImageFormatError: The format of the image is unknown.
    """
    image_hash = hashlib.sha256(data).hexdigest()
    image_format = (open_header(BytesIO(data)).format or "").lower()
    suffix = {"jpeg": "jpg", "mpo": "jpg", "heif": "heic"}.get(image_format, image_format)
    path = output.images.absolute() / f"{image_hash}.{suffix}"
    if not path.exists() or path.stat().st_size != len(data):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{secrets.token_hex(8)}.part")  # others cannot create a link with this name
        with explain_write_errors(path), temporary.open("xb") as stream:
            stream.write(data)
        temporary.replace(path)
    return os.path.abspath(path), image_hash


def _is_caption_output(path: str) -> bool:
    return path.endswith(".jsonl") and not is_remote(path) and os.path.exists(f"{path}.sqlite")


def _is_copied_image(image: str) -> bool:
    """Return True if an image was copied by a captioning run. Its name consists of its hash and a suffix."""
    folder, name = os.path.split(image)
    return _COPIED_IMAGE.fullmatch(name) is not None and _is_images_folder(folder)


@cache
def _is_images_folder(folder: str) -> bool:
    """Return True if a captioning run copies images to a folder. It can also contain other images."""
    return folder.endswith("_images") and _is_caption_output(f"{folder.removesuffix('_images')}.jsonl")


# ---- output ----------------------------------------------------------------------------------------------------------


def write_records(
    database: CaptionDatabase, output: CaptionOutput, model: str, prompts: Sequence[Prompt]
) -> tuple[int, int]:
    """Write the records with their captions. Captions that quality control rejects are omitted.

    Returns:
        The number of records and the number of generated captions.
    """
    num_records = num_captions = 0
    samples = {prompt.key: prompt.samples for prompt in prompts}
    with _open_jsonl(output.records) as stream:
        for row in database.iterate_images():
            answers = database.list_answers(row.hash, model, [prompt.key for prompt in prompts])
            accepted = [
                answer
                for answer in answers
                if answer.text is not None and answer.problem is None and answer.sample < samples[answer.prompt]
            ]
            record = add_captions(row, accepted, prompts, database.has_source_captions(row.hash))
            if any(record.get(name) for name in CAPTION_FIELDS):
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")
                num_records += 1
                num_captions += len(accepted)
    return num_records, num_captions


def add_captions(
    row: ImageRow, answers: Sequence[StoredAnswer], prompts: Sequence[Prompt], has_source_captions: bool
) -> dict[str, Any]:
    """Return an image's record with generated captions and their origin.

    Short captions are added to `captions`, or to `short_captions` if the image has captions in the sources, in this
    record or another one. Dense captions are added to `long_captions`.
    """
    record = dict(row.record)
    short_field = "short_captions" if has_source_captions else "captions"
    record.setdefault("captions", [])
    kinds = {prompt.key: prompt.kind for prompt in prompts}
    for answer in answers:
        field = short_field if kinds[answer.prompt] == "short" else "long_captions"
        record[field] = list(dict.fromkeys([*record.get(field, []), remove_opening(answer.text or "")]))
    if answers:
        temperatures = {answer.prompt: answer.temperature for answer in answers}
        record["caption_source"] = {
            "image_hash": row.hash,
            "model": answers[0].model,
            "prompts": list(temperatures),
            "temperature": list(temperatures.values()),
            "date": max(answer.date for answer in answers),
        }
    return record


def write_failures(database: CaptionDatabase, output: CaptionOutput, model: str, prompts: Sequence[Prompt]) -> int:
    """Write the requests without a caption and their reasons. Return their number. Without failures, write no file."""
    num_failures = 0
    samples = {prompt.key: prompt.samples for prompt in prompts}
    with _open_jsonl(output.failures) as stream:
        for row in database.iterate_distinct_images():
            for answer in database.list_answers(row.hash, model, [prompt.key for prompt in prompts]):
                if answer.error is not None and answer.sample < samples[answer.prompt]:
                    failure = {"image": row.record["image"], "id": row.record["id"], "prompt": answer.prompt}
                    failure |= {"sample": answer.sample, "error": answer.error, "date": answer.date}
                    stream.write(json.dumps(failure, ensure_ascii=False) + "\n")
                    num_failures += 1
    if not num_failures:
        output.failures.unlink()
    return num_failures


@contextmanager
def _open_jsonl(file: Path) -> Iterator[TextIO]:
    with atomic_path(file) as temporary, temporary.open("w", encoding="utf-8", errors="backslashreplace") as stream:
        yield stream
