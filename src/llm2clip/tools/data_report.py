"""Dataset overview: the text that `llm2clip data` prints, and an HTML page with plots and example images."""

import json
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import numpy as np

from llm2clip.config import EvaluateConfig
from llm2clip.data.build_table import NoImagesError, build_record_table, read_data_splits
from llm2clip.data.formats import IMAGE_SUFFIXES, load_source_formats
from llm2clip.data.image_refs import IMAGE_KINDS
from llm2clip.data.noun_phrases import add_noun_phrases
from llm2clip.data.records import CAPTION_FIELDS, TEXT_FIELDS, NoCaptionsError, Record, Source
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.table import RecordTable
from llm2clip.data.table_statistics import (
    STATISTICS_COLUMNS,
    Histogram,
    TableStatistics,
    compute_statistics,
    count_languages,
)
from llm2clip.evaluate.plots import plot_histograms
from llm2clip.io_utils import (
    format_bytes,
    format_count,
    format_duration,
    format_install_command,
    hide_url_secrets,
    to_valid_unicode,
)
from llm2clip.reports import (
    BAD,
    Block,
    CodeBlock,
    Figure,
    Heading,
    Paragraph,
    ReportImage,
    ReportImageGroup,
    Table,
    write_report,
)
from llm2clip.runs.run_description import build_run_section, describe_run

NUM_EXAMPLES = 24  # number of example images on the page
EXAMPLES_PER_REASON = 3  # maximum number of skipped rows listed for each reason
MAX_LANGUAGE_SAMPLE = 10_000  # maximum number of texts per field for language identification
MIN_LANGUAGE_SHARE = 0.01  # rarer languages are counted as "other", because most of them are misidentified
MAX_LISTED = 20  # maximum number of listed splits or file name suffixes
MAX_TEXTS = 50  # maximum number of texts per field on an image card
MIN_HELD_OUT = 50  # with fewer held-out images, recall is only a rough estimate
FILE_SUFFIX = re.compile(r"\.[a-z][a-z0-9]{0,4}$")  # longer strings after a dot are usually not file name suffixes
SMALL_SIDE = 224  # input resolution of most vision towers, in pixels
FIT_MAX_SKIPPED = 0.05  # the default of `fit --max_skipped`
FIELD_LABELS = {name: name.replace("_", " ") for name in TEXT_FIELDS}


SkippedRow = tuple[str, int, str, str]  # (file, row number, reason, value) of a skipped row


@dataclass
class DataOverview:
    sources: list[str]  # data sources from the command line
    statistics: TableStatistics
    languages: dict[str, Counter[str]]  # counts of language codes, keyed by field; empty without py3langid
    training: list[str]  # sentences about the images that `fit` would train on and hold out
    num_training: int  # number of images on which `fit` would train
    num_held_out: int
    log: SkipLog
    skipped: list[SkippedRow]  # the first skipped rows for each reason
    unsupported_files: Counter[str]  # see `count_unsupported_files`
    table_bytes: int  # size of the record table on disk
    seconds: float  # time to build or open the record table

    @property
    def num_captions(self) -> int:
        return sum(self.statistics.texts[name].words.count for name in CAPTION_FIELDS)


def inspect_data_sources(
    sources: Sequence[str], columns: dict[str, str], max_skipped: float = 1.0
) -> tuple[DataOverview, RecordTable]:
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        skipped_file = Path(folder) / "skipped.jsonl"
        log = SkipLog(skipped_file, max_skipped)
        num_training = num_held_out = 0
        try:
            splits = read_data_splits(sources, EvaluateConfig(), columns, log)
            table = splits.records
            training = [splits.summary, splits.rule]
            num_training = len(splits.train)
            num_held_out = max(map(len, splits.held_out.values()), default=0)
        except NoImagesError:
            table = build_record_table(sources, columns, log, image_check="unchecked")
            training = ["No record has an image. Only `tune` and `embed` accept text-only data"]
        except NoCaptionsError:
            skipped_file = Path(folder) / "skipped_images.jsonl"
            log = SkipLog(skipped_file, max_skipped)
            table = build_record_table(sources, columns, log, require_captions=False)
            training = ["`fit` needs captions"]
        seconds = time.monotonic() - start
        skipped = read_first_skipped_rows(skipped_file)
    if any(table.count_texts(name).any() for name in CAPTION_FIELDS):
        table = add_noun_phrases(table)
    language_fields = CAPTION_FIELDS if find_spec("py3langid") else ()
    overview = DataOverview(
        sources=list(sources),
        statistics=compute_statistics(table.iterate_batches(STATISTICS_COLUMNS)),
        languages={name: count_languages(sample_texts(table, name, MAX_LANGUAGE_SAMPLE)) for name in language_fields},
        training=training,
        num_training=num_training,
        num_held_out=num_held_out,
        log=log,
        skipped=skipped,
        unsupported_files=count_unsupported_files(sources),
        table_bytes=sum(os.path.getsize(file) for file in {file for file, _ in table.record_batches.paths}),
        seconds=seconds,
    )
    return overview, table


def count_unsupported_files(sources: Sequence[str]) -> Counter[str]:
    """Count the files of unsupported formats in local source folders, keyed by suffix such as ".mp4"."""
    formats = load_source_formats().values()
    readable = (*(f".{suffix}" for suffix in IMAGE_SUFFIXES), *(suffix for each in formats for suffix in each.suffixes))
    suffixes: Counter[str] = Counter()
    for source in sources:
        for _, folders, names in os.walk(os.path.expanduser(Source.parse(source).path)):
            folders[:] = [name for name in folders if not name.startswith(".")]
            others = [name.lower() for name in names if not name.startswith(".")]
            matches = [FILE_SUFFIX.search(name) for name in others if not name.endswith(readable)]
            suffixes.update(match[0] for match in matches if match is not None)
    return suffixes


def read_first_skipped_rows(file: Path) -> list[SkippedRow]:
    rows: dict[str, list[SkippedRow]] = {}
    with file.open(encoding="utf-8") as stream:
        for line in stream:
            entry = json.loads(line)
            examples = rows.setdefault(entry["reason"], [])
            if len(examples) < EXAMPLES_PER_REASON:
                name, value = to_valid_unicode(entry["file"]), to_valid_unicode(entry["value"])
                examples.append((name, entry["row"], entry["reason"], value))
    return [row for examples in rows.values() for row in examples]


def sample_texts(table: RecordTable, field: str, count: int) -> Iterator[str]:
    """Yield up to `count` texts of a field from evenly spaced records."""
    num_texts = table.count_texts(field)
    rows = np.flatnonzero(num_texts)
    if not len(rows):
        return
    num_rows = max(1, min(len(rows), len(rows) * count // int(num_texts.sum())))
    spaced = rows[get_evenly_spaced_indices(len(rows), num_rows)]
    yield from islice(table.select(spaced).iterate_texts([field]), count)


def get_evenly_spaced_indices(length: int, count: int) -> np.ndarray:
    return np.linspace(0, length - 1, min(length, count)).astype(np.int64)


# ---- tables ----------------------------------------------------------------------------------------------------------


def describe_data_quality(overview: DataOverview) -> str:
    """Describe the worst problem of the data in a sentence, or state that the data can be used for training."""
    statistics, log = overview.statistics, overview.log
    captions = overview.num_captions
    size = f"{format_count(statistics.num_images, 'image')} with {format_count(captions, 'caption')}"
    skipped = log.skipped.total()
    if not statistics.num_images:
        return f"No record has an image, so only `tune` and `embed` can use the {format_count(captions, 'caption')}."
    if not captions:
        return f"{format_count(statistics.num_images, 'image')} without captions. Training requires captions."
    if skipped > FIT_MAX_SKIPPED * log.rows_seen:
        [(reason, count)] = log.skipped.most_common(1)
        share = 100 * skipped / log.rows_seen
        rows = format_count(count, "row")
        return f"`fit` would fail: {share:.1f}% of the rows cannot be used. Most common reason: {reason} ({rows})."
    if not overview.num_training:
        return f"{size}, but `fit` would hold out all images, so no image would be left for training."
    if overview.num_held_out < MIN_HELD_OUT:
        held_out = format_count(overview.num_held_out, "image")
        return f"{size}. `fit` would hold out only {held_out}, which is not enough to evaluate a model."
    num_small = statistics.short_sides.count_below(SMALL_SIDE)
    if num_small > statistics.short_sides.count / 2:
        share = 100 * num_small / statistics.short_sides.count
        return f"{size}. {share:.0f}% of the images have a side below {SMALL_SIDE} pixels, a common model input size."
    return f"{size} can be used for training."


def build_data_report_blocks(overview: DataOverview) -> list[Block]:
    return [
        *_build_summary_blocks(overview),
        *_build_caption_blocks(overview),
        *_build_image_blocks(overview.statistics),
        *_build_unsupported_file_blocks(overview.unsupported_files),
        *_build_skipped_row_blocks(overview),
    ]


def _build_summary_blocks(overview: DataOverview) -> list[Block]:
    statistics, log = overview.statistics, overview.log
    rows = [
        ("images", statistics.num_images),
        ("records without an image", statistics.num_records - statistics.num_images),
        *((FIELD_LABELS[name], texts.words.count) for name, texts in statistics.texts.items() if texts.num_records),
        ("rows read", log.rows_seen),
        ("rows skipped", log.skipped.total()),
        ("duplicate images merged", log.num_duplicate_images),
    ]
    splits = list(statistics.splits.items())
    split_rows = [(name, f"{records:,}", f"{images:,}") for name, (records, images) in splits[:MAX_LISTED]]
    more = [Paragraph(f"and {len(splits) - MAX_LISTED:,} more")] if len(splits) > MAX_LISTED else []
    return [
        Table(["content", "number"], [(name, f"{number:,}") for name, number in rows]),
        Paragraph(f"Read in {format_duration(overview.seconds)}. Record table: {format_bytes(overview.table_bytes)}."),
        *(Paragraph(f"{note}.") for note in log.list_notes()),
        Heading("Training and held-out images"),
        *(Paragraph(f"{sentence}." if sentence[-1] != "." else sentence) for sentence in overview.training),
        Table(["split", "records", "images"], split_rows),
        *more,
    ]


def _build_caption_blocks(overview: DataOverview) -> list[Block]:
    texts = {name: texts for name, texts in overview.statistics.texts.items() if texts.num_records}
    if not texts:
        return []
    rows: list[list[str]] = []
    for name, statistics in texts.items():
        label, counts = FIELD_LABELS[name], [f"{statistics.num_records:,}", f"{statistics.words.count:,}"]
        rows.append([f"{label} (words)", *counts, *_format_quantiles(statistics.words)])
        rows.append([f"{label} (characters)", "", "", *_format_quantiles(statistics.characters)])
    header = ["length", "records", "texts", "median", "95%", "longest"]
    blocks: list[Block] = [Heading("Captions"), Table(header, rows)]
    counts_per_image = overview.statistics.captions_per_image
    if counts_per_image.count:
        text = (
            f"Captions per image: mean {counts_per_image.mean:.1f}, median {counts_per_image.percentile(50):,}, "
            f"maximum {counts_per_image.maximum:,}."
        )
        if num_single := counts_per_image.count_below(2):
            text += f" Images with a single caption: {num_single:,}. `tune` uses only images with several captions."
        blocks.append(Paragraph(text))
    words = {FIELD_LABELS[name]: statistics.words for name, statistics in texts.items()}
    blocks.append(Figure(plot_histograms(words, "words", "texts"), "Lengths of the texts."))
    return blocks + _build_language_blocks(overview.languages)


def _format_quantiles(histogram: Histogram) -> list[str]:
    return [f"{value:,}" for value in (histogram.percentile(50), histogram.percentile(95), histogram.maximum)]


def _build_language_blocks(languages: dict[str, Counter[str]]) -> list[Block]:
    if not languages:
        command = format_install_command("reports")
        return [Paragraph(f"To identify the languages of captions, install py3langid: `{command}`.")]
    sampled = {name: counts for name, counts in languages.items() if counts}
    total: Counter[str] = sum(sampled.values(), Counter())
    listed = [code for code, count in total.most_common() if count >= MIN_LANGUAGE_SHARE * total.total()]
    rows = []
    for code in listed:
        rows.append([code, *(_format_percent(counts[code], counts.total()) for counts in sampled.values())])
    others = [counts.total() - sum(counts[code] for code in listed) for counts in sampled.values()]
    if any(others):
        shares = [_format_percent(n, counts.total()) for n, counts in zip(others, sampled.values(), strict=True)]
        rows.append(["other", *shares])
    captions = format_count(total.total(), "evenly spaced caption")
    text = f"Languages of {captions}, identified by py3langid. Results for short texts are unreliable."
    return [Paragraph(text), Table(["language", *(FIELD_LABELS[name] for name in sampled)], rows)]


def _build_image_blocks(statistics: TableStatistics) -> list[Block]:
    if not statistics.num_images:
        return []
    blocks: list[Block] = [Heading("Images")]
    sides = {"width": statistics.widths, "height": statistics.heights, "shorter side": statistics.short_sides}
    if statistics.widths.count:
        rows = [[name, *(f"{side.percentile(p):,}" for p in (0, 5, 50, 95, 100))] for name, side in sides.items()]
        num_small = statistics.short_sides.count_below(SMALL_SIDE)
        share = _format_percent(num_small, statistics.short_sides.count)
        blocks += [
            Table(["pixels", "smallest", "5%", "median", "95%", "largest"], rows),
            Paragraph(f"Images with a shorter side of less than {SMALL_SIDE} pixels: {num_small:,} ({share})."),
            Figure(
                plot_histograms({"images": statistics.short_sides}, "shorter side, pixels", "images"),
                "Sizes of the images.",
            ),
        ]
    kinds = [(IMAGE_KINDS[kind].kind_name, f"{count:,}") for kind, count in statistics.kinds.most_common()]
    blocks.append(Table(["stored in", "images"], kinds))
    if statistics.suffixes:
        suffixes = statistics.suffixes.most_common(MAX_LISTED)
        blocks.append(Table(["file name suffix", "images"], [(name or "none", f"{n:,}") for name, n in suffixes]))
    return blocks


def _build_unsupported_file_blocks(suffixes: Counter[str]) -> list[Block]:
    if not suffixes:
        return []
    rows = [(suffix, f"{count:,}") for suffix, count in suffixes.most_common(MAX_LISTED)]
    text = "The following files are ignored because their formats are not supported."
    return [Heading("Other files"), Paragraph(text), Table(["suffix", "files"], rows)]


def _build_skipped_row_blocks(overview: DataOverview) -> list[Block]:
    log = overview.log
    blocks: list[Block] = []
    if log.skipped:
        share = log.skipped.total() / max(1, log.rows_seen)
        if share > FIT_MAX_SKIPPED:
            text = f"{share:.1%} of the rows are skipped. `fit` accepts at most {FIT_MAX_SKIPPED:.0%} (--max_skipped)."
            blocks.append(Paragraph(text, BAD))
        blocks.append(Table(["reason", "skipped rows"], [(r, f"{n:,}") for r, n in log.skipped.most_common()]))
    if log.dropped:
        rows = [(reason, f"{count:,}") for reason, count in log.dropped.most_common()]
        blocks.append(Table(["unused parts of rows", "rows"], rows))
    if overview.skipped:
        header = ["file", "row", "reason", "value"]
        blocks.append(Table(header, overview.skipped))
    return [Heading("Skipped rows"), *(blocks or [Paragraph("No rows are skipped.")])]


def _format_percent(count: int, total: int) -> str:
    return f"{100 * count / total:.1f}%"


# ---- page ------------------------------------------------------------------------------------------------------------


def write_data_report(file: Path, overview: DataOverview, table: RecordTable, next_commands: str) -> None:
    rows = np.flatnonzero(table.has_image)
    cards = [_make_record_card(table[int(row)]) for row in rows[get_evenly_spaced_indices(len(rows), NUM_EXAMPLES)]]
    blocks = build_data_report_blocks(overview)
    if cards:
        text = f"Images and texts of {format_count(len(cards), 'evenly spaced record')}."
        blocks += [Heading("Examples"), Paragraph(text), ReportImageGroup(cards, as_cards=True)]
    sources = "\n".join(to_valid_unicode(hide_url_secrets(source)) for source in overview.sources)
    if next_commands:
        blocks += [Heading("Next"), CodeBlock(to_valid_unicode(next_commands), "bash")]
    blocks += build_run_section(describe_run(overview.seconds), code=sources)
    write_report(file, "Dataset overview", describe_data_quality(overview), blocks, with_markdown=False)


def _make_record_card(record: Record) -> ReportImage:
    from llm2clip.caption.files import make_image_card, shorten_text

    assert record.image is not None
    details = [f"id {record.id}"] if record.id != Path(str(record.image)).stem else []
    if record.split:
        details.append(record.split)
    texts = {}
    for field in TEXT_FIELDS:
        if values := getattr(record, field):
            shown = [shorten_text(text) for text in values[:MAX_TEXTS]]
            more = [f"… and {len(values) - MAX_TEXTS:,} more"] if len(values) > MAX_TEXTS else []
            texts[FIELD_LABELS[field]] = [*shown, *more]
    return make_image_card(record.image, details, texts)
