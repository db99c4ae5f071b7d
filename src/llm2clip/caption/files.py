"""Input and output files of a captioning run.

With --out captions.jsonl, a run writes the following files:

    captions.jsonl             records with captions
    captions.jsonl.sqlite      all answers, which make the run resumable (see `database.py`)
    captions_failures.jsonl    failed requests and their reasons; the next run retries them
    captions_report.html       results of quality control, with images and captions, worst first
    captions_skipped.jsonl     unreadable images
    captions_images/           copies of images that are not local files: members of tars, cells of tables, URLs

If a source folder contains these files, captioning runs do not read them.
"""

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, TextIO

from llm2clip.caption.checks import (
    DUPLICATE,
    MANY_IMAGES,
    MISMATCH,
    ImageCheckSummary,
    TextCheckSummary,
    find_image_file,
    strip_boilerplate_opening,
)
from llm2clip.caption.database import CaptionDatabase, ImageRow, StoredAnswer
from llm2clip.caption.options import Prompt
from llm2clip.data.formats import find_source_files
from llm2clip.data.image_facts import UNREADABLE_IMAGE
from llm2clip.data.image_header import DecodingLimitError, ImageFormatError, open_image_header
from llm2clip.data.image_refs import FileImage, ImageRef, get_file_version
from llm2clip.data.images import ImageError, encode_thumbnail, load_image
from llm2clip.data.records import CAPTION_FIELDS, TEXT_FIELDS, Record, RecordReader, Source
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.storage import is_remote
from llm2clip.io_utils import atomic_path, explain_write_errors, format_count, hide_url_secrets, to_valid_unicode
from llm2clip.progress import ProgressBar
from llm2clip.reports import Block, Heading, Paragraph, ReportImage, ReportImageGroup, Table, write_report
from llm2clip.runs.run_description import build_run_section, describe_run

WRITTEN_BY_CAPTION = "not read (written by `llm2clip caption`)"
MAX_IMAGES = 200  # maximum number of images in the report
MAX_ERRORS = 20  # maximum number of failure reasons to list in the report
MAX_SOURCE_CAPTIONS = 10  # maximum number of source captions per image in the report
MAX_TEXT_CHARACTERS = 2000  # longer texts are truncated in the report
THUMBNAIL_SIDE = 320  # in pixels
_COPIED_IMAGE = re.compile(r"(.*)_images/[0-9a-f]{64}\.\w+", re.DOTALL)
# Selects the images with the most failed or rejected captions. Duplicate captions are not counted as rejected.
_WORST_IMAGES = """
SELECT (SELECT min(number) FROM images WHERE images.hash = answers.hash) AS first_number FROM answers
WHERE model = ? AND prompt IN ({prompts}) AND first_number IS NOT NULL
GROUP BY hash
ORDER BY sum(error IS NOT NULL OR coalesce(problem, ?) != ?) DESC, max(rank) DESC, first_number LIMIT ?
"""


class CaptionOutputPaths:
    """Paths of the output files of a captioning run, derived from the path of the JSONL file."""

    def __init__(self, records: Path) -> None:
        self.records = records
        self.database = records.with_name(f"{records.name}.sqlite")
        self.failures = records.with_name(f"{records.stem}_failures.jsonl")
        self.report = records.with_name(f"{records.stem}_report.html")
        self.skipped = records.with_name(f"{records.stem}_skipped.jsonl")
        self.images = records.with_name(f"{records.stem}_images")

    def check_records_path(self) -> None:
        """Raise ValueError if `records` is not a .jsonl path, or exists but was not written by a captioning run."""
        if self.records.suffix.lower() != ".jsonl":
            raise ValueError(f"--out must be a .jsonl file (got {self.records})")
        if self.records.exists() and not self.database.exists():
            raise ValueError(
                f"--out {self.records} already exists, but was not written by `llm2clip caption` "
                f"({self.database.name} does not exist). Choose another file"
            )


# ---- list the images -------------------------------------------------------------------------------------------------


def read_source_image_rows(
    sources: Sequence[str],
    columns: dict[str, str],
    output: CaptionOutputPaths,
    log: SkipLog,
    earlier: CaptionDatabase,
) -> Iterator[ImageRow]:
    """Yield a row for each source record with an image. Copy images that are not local files to `output.images`.

    Args:
        columns: Mapping from record fields to source columns.
        earlier: Database of the previous run, from which the hashes of unchanged files are reused.
    """
    number = 0
    with ProgressBar(desc="read", unit="image") as bar:
        for source in sources:
            for record, image in _iterate_image_records(source, columns, output, log):
                key = image.key.encode(errors="backslashreplace").decode()  # file names can be invalid UTF-8
                try:
                    if isinstance(image, FileImage) and not is_remote(image.path):
                        path = os.path.abspath(image.path)
                        image_hash, version = _hash_file(image, earlier.find_image_row(key))
                    else:
                        path, image_hash, version = *_copy_image(image.read(), output), None
                except (OSError, ImageFormatError, DecodingLimitError) as error:
                    log.skip(str(image), number, UNREADABLE_IMAGE, error)
                    continue
                path = path.removeprefix(os.path.join(os.path.abspath(output.records.parent), ""))
                yield ImageRow(number, key, image_hash, _make_source_record(record, path), version)
                number += 1
                bar.update()


def _iterate_image_records(
    source: str, columns: dict[str, str], output: CaptionOutputPaths, log: SkipLog
) -> Iterator[tuple[Record, ImageRef]]:
    """Yield each source record with its image. Skip records without an image, and the output of captioning runs."""
    parsed = Source.parse(source, columns)
    source_path = os.path.realpath(os.path.expanduser(parsed.path))
    # The output of another captioning run is read only if the source is the path of that output file.
    omits_output = not os.path.isfile(source_path) or source_path == os.path.realpath(output.records)
    files = []
    for file in find_source_files(parsed.path, all_files=True, log=log):
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


def _make_source_record(record: Record, path: str) -> dict[str, Any]:
    fields: dict[str, Any] = {"image": path, "id": record.id}
    for name in TEXT_FIELDS:
        if texts := getattr(record, name):
            fields[name] = list(texts)
    if record.split is not None:
        fields["split"] = record.split
    return fields


def _hash_file(image: FileImage, earlier: ImageRow | None) -> tuple[str, str]:
    """Return the hash and version of an image file. Read the file only if its version has changed."""
    ((size, modified),) = get_file_version(image.path)
    version = f"{size} {modified}"
    if earlier is not None and earlier.version == version:
        return earlier.hash, version
    return hashlib.sha256(image.read()).hexdigest(), version


def _copy_image(data: bytes, output: CaptionOutputPaths) -> tuple[str, str]:
    image_hash = hashlib.sha256(data).hexdigest()
    image_format = (open_image_header(BytesIO(data)).format or "").lower()
    suffix = {"jpeg": "jpg", "mpo": "jpg", "heif": "heic"}.get(image_format, image_format)
    path = output.images.absolute() / f"{image_hash}.{suffix}"
    if not path.exists() or path.stat().st_size != len(data):
        path.parent.mkdir(parents=True, exist_ok=True)
        # If the temporary name were predictable, other users could create a link at this path.
        temporary = path.with_name(f".{secrets.token_hex(8)}.part")
        with explain_write_errors(path), temporary.open("xb") as stream:
            stream.write(data)
        temporary.replace(path)
    return os.path.abspath(path), image_hash


def _is_caption_output(path: str) -> bool:
    return path.endswith(".jsonl") and not is_remote(path) and os.path.exists(f"{path}.sqlite")


def _is_copied_image(path: str) -> bool:
    match = _COPIED_IMAGE.fullmatch(path)
    return match is not None and _is_caption_output(f"{match[1]}.jsonl")


# ---- records and failures --------------------------------------------------------------------------------------------


def write_captioned_records(
    database: CaptionDatabase, file: Path, model: str, prompts: Sequence[Prompt]
) -> tuple[int, int]:
    """Write records with accepted captions to a file. Return the numbers of records and generated captions."""
    num_records = num_captions = 0
    with _open_jsonl(file) as stream:
        for row in database.iterate_image_rows():
            answers = database.list_answers(row.hash, model, prompts)
            accepted = [answer for answer in answers if answer.text is not None and answer.problem is None]
            record = _add_generated_captions(row, accepted, prompts, database.has_source_captions(row.hash))
            if any(record.get(name) for name in CAPTION_FIELDS):
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")
                num_records += 1
                num_captions += len(accepted)
    return num_records, num_captions


def _add_generated_captions(
    row: ImageRow, answers: Sequence[StoredAnswer], prompts: Sequence[Prompt], has_source_captions: bool
) -> dict[str, Any]:
    """Add the generated captions and their origin to a copy of an image's record.

    Short captions are added to `captions`, or to `short_captions` if any source record with this image has captions.
    Dense captions are added to `long_captions`.
    """
    record = dict(row.record)
    short_field = "short_captions" if has_source_captions else "captions"
    record.setdefault("captions", [])
    kinds = {prompt.key: prompt.kind for prompt in prompts}
    for answer in answers:
        field = short_field if kinds[answer.prompt] == "short" else "long_captions"
        record[field] = list(dict.fromkeys([*record.get(field, []), strip_boilerplate_opening(answer.text or "")]))
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


def write_failed_requests(database: CaptionDatabase, file: Path, model: str, prompts: Sequence[Prompt]) -> int:
    """Write all failed requests to a JSONL file, and return their number. If no request failed, delete the file."""
    num_failures = 0
    with _open_jsonl(file) as stream:
        for row in database.iterate_image_rows(distinct=True):
            for answer in database.list_answers(row.hash, model, prompts):
                if answer.error is not None:
                    failure = {"image": row.record["image"], "id": row.record["id"], "prompt": answer.prompt}
                    failure |= {"sample": answer.sample, "error": answer.error, "date": answer.date}
                    stream.write(json.dumps(failure, ensure_ascii=False) + "\n")
                    num_failures += 1
    if not num_failures:
        file.unlink()
    return num_failures


@contextmanager
def _open_jsonl(file: Path) -> Iterator[TextIO]:
    with atomic_path(file) as temporary, temporary.open("w", encoding="utf-8", errors="backslashreplace") as stream:
        yield stream


# ---- report ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CaptionReport:
    """Data for the report of a captioning run."""

    sources: Sequence[str]  # sources as passed on the command line
    model: str
    prompts: Sequence[Prompt]
    checks: TextCheckSummary
    scores: ImageCheckSummary | None = None  # None if the captions were not compared with their images
    seconds: float = 0.0  # duration of the run in seconds


def write_caption_report(file: Path, database: CaptionDatabase, report: CaptionReport) -> None:
    blocks = build_caption_report_blocks(database, report)
    cards = [_make_caption_card(database, row, report) for row in select_worst_images(database, report)]
    if cards:
        text = (
            f"{format_count(len(cards), 'image')}, sorted by the number of failed or rejected captions, then by rank."
        )
        blocks += [Heading("Images"), Paragraph(text), ReportImageGroup(cards, as_cards=True)]
    sources = "\n".join(to_valid_unicode(hide_url_secrets(source)) for source in report.sources)
    blocks += build_run_section(describe_run(report.seconds), code=sources)
    write_report(file, "Captions", describe_caption_results(database, report), blocks, with_markdown=False)


def describe_caption_results(database: CaptionDatabase, report: CaptionReport) -> str:
    num_captions = report.checks.num_captions
    problems = database.count_rejected_by_problem(report.model, report.prompts)
    num_failed = sum(count for _, count, _ in database.count_errors_by_reason(report.model, report.prompts, MAX_ERRORS))
    failures = f" {format_count(num_failed, 'request')} failed." if num_failed else ""
    if not num_captions:
        return f"No image has a caption.{failures}"
    captions = format_count(num_captions, "caption")
    verdict = f"No problems were found in {captions}."
    if problems:
        [(problem, count)] = problems.most_common(1)
        share = 100 * problems.total() / num_captions
        verdict = f"Rejected: {problems.total():,} of {captions} ({share:.1f}%). Main reason: {problem} ({count:,})."
    if not num_failed and report.scores is None:
        verdict += " The captions were not compared with their images."
    return verdict + failures


def build_caption_report_blocks(database: CaptionDatabase, report: CaptionReport) -> list[Block]:
    problems = database.count_rejected_by_problem(report.model, report.prompts)
    input_tokens, output_tokens = database.count_tokens(report.model)
    numbers = {
        "images": database.count_images(),
        "captions": report.checks.num_captions,
        "rejected captions": problems.total(),
        "captions from which a boilerplate opening was removed": report.checks.num_shortened,
        "input tokens": input_tokens,
        "output tokens": output_tokens,
    }
    blocks: list[Block] = [
        Table(["content", "number"], [(name, f"{number:,}") for name, number in numbers.items()]),
        Paragraph(f"Model: {report.model}"),
    ]
    rows = []
    for problem, count in problems.most_common():
        rows.append((problem, f"{count:,}", f"{100 * count / max(1, report.checks.num_captions):.1f}%"))
    blocks += [
        Heading("Rejected captions"),
        Table(["problem", "captions", "share"], rows) if rows else Paragraph("No caption is rejected."),
        Paragraph(_describe_image_comparison(report.scores, problems[MISMATCH])),
        Paragraph(f'Captions shared by more than {report.checks.max_images:,} images are rejected as "{MANY_IMAGES}".'),
    ]
    rows = []
    for reason, count, example in database.count_errors_by_reason(report.model, report.prompts, MAX_ERRORS):
        rows.append((shorten_text(reason), f"{count:,}", shorten_text(example.removeprefix(reason).removeprefix(": "))))
    if rows:
        blocks += [Heading("Failed requests"), Table(["reason", "requests", "example"], rows)]
    return blocks


def _describe_image_comparison(scores: ImageCheckSummary | None, num_mismatches: int) -> str:
    if scores is not None:
        text = (
            f"{scores.encoder} was used to compare {format_count(scores.num_captions, 'caption')} with "
            f"{format_count(scores.sample_size, 'image')}. A caption is rejected if more than {scores.max_rank:.0%} of "
            "the other images match the caption better than its own image."
        )
        if scores.num_unreadable:
            unreadable = format_count(scores.num_unreadable, "image")
            text += f" The captions of {unreadable} were not compared, because the images could not be decoded."
        return text
    if num_mismatches:
        return "The captions were not compared with their images. Rejections by earlier comparisons remain in effect."
    return "The captions were not compared with their images. To compare captions with images, use --check MODEL."


def select_worst_images(database: CaptionDatabase, report: CaptionReport) -> list[ImageRow]:
    """Return at most `MAX_IMAGES` rows, sorted by number of failed or rejected captions, then by highest rank."""
    keys = [prompt.key for prompt in report.prompts]
    query = _WORST_IMAGES.format(prompts=", ".join("?" * len(keys)))
    parameters = (report.model, *keys, DUPLICATE, DUPLICATE, MAX_IMAGES)
    numbers = [number for (number,) in database.connection.execute(query, parameters)]
    return [database.read_image_row(number) for number in numbers]


def _make_caption_card(database: CaptionDatabase, row: ImageRow, report: CaptionReport) -> ReportImage:
    texts: dict[str, list[str]] = {}
    for answer in database.list_answers(row.hash, report.model, report.prompts):
        label, text = "failed requests", shorten_text(answer.error or "")
        if answer.text is not None:
            label = "captions" if answer.problem is None else f"rejected: {answer.problem}"
            text = shorten_text(strip_boilerplate_opening(answer.text))
            if answer.rank is not None and answer.score is not None:
                text = f"{text} (rank {answer.rank:.1%}, score {answer.score:.3f})"
        texts.setdefault(label, []).append(text)
    if captions := row.record.get("captions"):
        texts["captions in the source"] = [shorten_text(caption) for caption in captions[:MAX_SOURCE_CAPTIONS]]
    return make_image_card(find_image_file(database, row), [row.record["image"]], texts)


def make_image_card(image: ImageRef, details: Sequence[str], texts: Mapping[str, Sequence[str]]) -> ReportImage:
    """Return a card with the thumbnail, name and size of an image, or with the decoding error."""
    jpeg, size, error = None, [], ""
    try:
        pixels = load_image(image)
        jpeg = encode_thumbnail(pixels, THUMBNAIL_SIDE)
        size = [f"{pixels.shape[2]:,} × {pixels.shape[1]:,} pixels"]
    except (ImageError, OSError) as problem:
        error = to_valid_unicode(str(problem))
    title = to_valid_unicode(Path(str(image)).name)
    return ReportImage(jpeg, title=title, details=[*size, *map(to_valid_unicode, details)], texts=texts, error=error)


def shorten_text(text: str) -> str:
    is_long = len(text) > MAX_TEXT_CHARACTERS
    return to_valid_unicode(f"{text[:MAX_TEXT_CHARACTERS]} … ({len(text):,} characters)" if is_long else text)
