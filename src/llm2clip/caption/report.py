"""Report of a captioning run: numbers in the terminal, and an HTML page with images and captions, worst first."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llm2clip.caption.checks import (
    DUPLICATE,
    MIN_OPENING_SHARE,
    MISMATCH,
    NEAR_DUPLICATE,
    ScoredCaptions,
    TextChecks,
    find_image_file,
    remove_opening,
)
from llm2clip.caption.database import CaptionDatabase, ImageRow, StoredAnswer
from llm2clip.caption.options import Prompt
from llm2clip.data.image_refs import to_valid_unicode
from llm2clip.data.images import ImageError, load_image, make_thumbnail
from llm2clip.data.table_statistics import Histogram
from llm2clip.io_utils import hide_url_secrets
from llm2clip.reports import Block, Example, Examples, Heading, Paragraph, Table, render_text
from llm2clip.reports import write_report as write_html_report
from llm2clip.runs.run_description import build_run_section, describe_run

MAX_IMAGES = 200  # images on the page
MAX_ERRORS = 20  # reasons of failed requests
MAX_SOURCE_CAPTIONS = 10  # per image
MAX_TEXT_CHARACTERS = 2000  # longer texts are truncated
THUMBNAIL_SIDE = 320  # in pixels

# Images with failed or rejected captions come first, then those with the highest rank. Duplicates do not count.
_WORST_IMAGES = """
SELECT (SELECT min(number) FROM images WHERE images.hash = answers.hash) AS first_number FROM answers
WHERE model = ? AND prompt IN ({prompts}) AND first_number IS NOT NULL
GROUP BY hash
ORDER BY sum(error IS NOT NULL OR coalesce(problem, ?) NOT IN (?, ?)) DESC, max(rank) DESC, first_number LIMIT ?
"""


@dataclass(frozen=True)
class CaptionReport:
    """Results of a captioning run that are shown in its report.

    Args:
        sources: Sources as given by the user.
        model: Name of the captioner.
        checks: Result of the checks of the texts.
        scores: Result of the comparison with the images, or None if the captions were not compared.
        encoder: Name of the dual encoder with which the captions were compared.
        cost: Cost of all answers, or None if no price is known.
        seconds: Duration of this run.
    """

    sources: Sequence[str]
    model: str
    prompts: Sequence[Prompt]
    checks: TextChecks
    scores: ScoredCaptions | None = None
    encoder: str | None = None
    max_rank: float | None = None
    cost: float | None = None
    seconds: float = 0.0


def format_report(database: CaptionDatabase, report: CaptionReport) -> str:
    """Return the numbers of a report as text for a terminal."""
    return render_text(build_blocks(database, report), describe_captions(database, report))


def write_report(file: Path, database: CaptionDatabase, report: CaptionReport) -> None:
    """Write a report with images and captions as a self-contained HTML page."""
    blocks = build_blocks(database, report)
    cards = [_make_card(database, row, report) for row in find_worst_images(database, report)]
    if cards:
        text = f"{len(cards):,} images: those with failed or rejected captions first, then by highest rank."
        blocks += [Heading("Images"), Paragraph(text), Examples(cards, as_cards=True)]
    sources = "\n".join(to_valid_unicode(hide_url_secrets(source)) for source in report.sources)
    blocks += build_run_section(describe_run(report.seconds), code=sources)
    write_html_report(file, "Captions", describe_captions(database, report), blocks, with_markdown=False)


def describe_captions(database: CaptionDatabase, report: CaptionReport) -> str:
    """State in words how many captions were rejected and why, and how many requests failed."""
    num_captions = report.checks.num_captions
    problems = database.count_problems(report.model, report.prompts)
    num_failed = sum(count for _, count, _ in database.count_errors(report.model, report.prompts, MAX_ERRORS))
    if not num_captions:
        return f"No image has a caption. {num_failed:,} requests failed." if num_failed else "No image has a caption."
    verdict = f"None of the {num_captions:,} captions is rejected."
    if problems:
        [(problem, count)] = problems.most_common(1)
        share = 100 * problems.total() / num_captions
        verdict = f"{problems.total():,} of {num_captions:,} captions ({share:.1f}%) are rejected"
        verdict += f", most of them because: {problem} ({count:,})." if len(problems) > 1 else f": {problem}."
    if num_failed:
        verdict += f" {num_failed:,} requests failed."
    elif report.scores is None:
        verdict += " They were not compared with their images."
    return verdict


# ---- tables ----------------------------------------------------------------------------------------------------------


def build_blocks(database: CaptionDatabase, report: CaptionReport) -> list[Block]:
    """Return the tables of a report."""
    return [
        *_build_summary(database, report),
        *_build_problems(database, report),
        *_build_lengths(report.checks),
        *_build_openings(report.checks),
        *_build_errors(database, report),
    ]


def _build_summary(database: CaptionDatabase, report: CaptionReport) -> list[Block]:
    checks = report.checks
    num_rejected = database.count_problems(report.model, report.prompts).total()
    input_tokens, output_tokens = database.count_tokens(report.model)
    rows = [
        ("images", f"{database.count_images():,}"),
        ("captions", f"{checks.num_captions:,}"),
        ("rejected captions", f"{num_rejected:,}"),
        ("captions whose opening was removed", f"{checks.num_shortened:,}"),
        ("input tokens", f"{input_tokens:,}"),
        ("output tokens", f"{output_tokens:,}"),
    ]
    if report.cost is not None:
        rows.append(("cost", f"{report.cost:.2f}"))
    return [Table(["content", "number"], rows), Paragraph(f"Model: {report.model}")]


def _build_problems(database: CaptionDatabase, report: CaptionReport) -> list[Block]:
    checks, scores = report.checks, report.scores
    problems = database.count_problems(report.model, report.prompts)
    paragraphs = []
    if scores is not None:
        paragraphs.append(
            f"{scores.num_captions:,} captions were compared with {scores.sample_size:,} images by {report.encoder}. "
            f"A caption is rejected if more than {report.max_rank:.0%} of these images match it better than its own."
        )
        if scores.unreadable:
            name, error = next(iter(scores.unreadable.items()))
            paragraphs.append(f"{len(scores.unreadable):,} images could not be read, for example {name}: {error}")
    elif problems[MISMATCH]:
        paragraphs.append("This run did not compare the captions with their images. Earlier rejections remain valid.")
    else:
        paragraphs.append("The captions were not compared with their images. To compare them, use --check MODEL.")
    unknown = [name for name, code in checks.languages.items() if code is None]
    if unknown:
        paragraphs.append(f"The language of these prompts' captions was not checked: {', '.join(unknown)}.")
    paragraphs.append(f"A caption fits many images if more than {checks.max_images:,} images have it.")
    rows = []
    for problem, count in problems.most_common():
        rows.append((problem, f"{count:,}", f"{100 * count / max(1, checks.num_captions):.1f}%"))
    table = Table(["problem", "captions", "share"], rows) if rows else Paragraph("No caption is rejected.")
    return [Heading("Rejected captions"), table, *map(Paragraph, paragraphs)]


def _build_lengths(checks: TextChecks) -> list[Block]:
    rows = []
    for kind, counts in checks.lengths.items():
        histogram = Histogram(counts)
        lengths = [f"{histogram.percentile(percent):,}" for percent in (0, 5, 50, 95, 100)]
        rows.append([f"{kind} captions", f"{histogram.count:,}", *lengths])
    if not rows:
        return []
    return [Heading("Lengths"), Table(["words", "captions", "shortest", "5%", "median", "95%", "longest"], rows)]


def _build_openings(checks: TextChecks) -> list[Block]:
    text = f"First words that more than {MIN_OPENING_SHARE:.0%} of the captions share. They are not rejected."
    rows = []
    for opening, count in checks.openings:
        rows.append((opening, f"{count:,}", f"{100 * count / checks.num_captions:.1f}%"))
    return [Heading("Common openings"), Paragraph(text), Table(["opening", "captions", "share"], rows)] if rows else []


def _build_errors(database: CaptionDatabase, report: CaptionReport) -> list[Block]:
    errors = database.count_errors(report.model, report.prompts, MAX_ERRORS)
    rows = []
    for reason, count, example in errors:
        rows.append((_shorten(reason), f"{count:,}", _shorten(example.removeprefix(reason).removeprefix(": "))))
    return [Heading("Failed requests"), Table(["reason", "requests", "example"], rows)] if rows else []


# ---- images ----------------------------------------------------------------------------------------------------------


def find_worst_images(database: CaptionDatabase, report: CaptionReport) -> list[ImageRow]:
    """Return at most `MAX_IMAGES` images: those with the most failed or rejected captions, then by highest rank."""
    keys = [prompt.key for prompt in report.prompts]
    query = _WORST_IMAGES.format(prompts=", ".join("?" * len(keys)))
    parameters = (report.model, *keys, DUPLICATE, DUPLICATE, NEAR_DUPLICATE, MAX_IMAGES)
    numbers = [number for (number,) in database.connection.execute(query, parameters)]
    return [database.read_image(number) for number in numbers]


def _make_card(database: CaptionDatabase, row: ImageRow, report: CaptionReport) -> Example:
    """Return an image's thumbnail and captions. If the image cannot be decoded, the card shows the error."""
    file = find_image_file(database, row)
    jpeg, error = None, ""
    try:
        jpeg = make_thumbnail(load_image(file), THUMBNAIL_SIDE)
    except (ImageError, OSError) as problem:
        error = to_valid_unicode(str(problem))
    texts: dict[str, list[str]] = {}
    for answer in database.list_answers(row.hash, report.model, [prompt.key for prompt in report.prompts]):
        texts.setdefault(_get_label(answer), []).append(_format_answer(answer))
    if captions := row.record.get("captions"):
        texts["captions in the source"] = [_shorten(caption) for caption in captions[:MAX_SOURCE_CAPTIONS]]
    name = to_valid_unicode(file.path)
    details = [to_valid_unicode(row.record["image"])]
    return Example(jpeg, title=Path(name).name, details=details, texts=texts, error=error)


def _get_label(answer: StoredAnswer) -> str:
    if answer.text is None:
        return "failed requests"
    return "captions" if answer.problem is None else f"rejected: {answer.problem}"


def _format_answer(answer: StoredAnswer) -> str:
    """Return the text or error of an answer, with its rank and score."""
    if answer.text is None:
        return _shorten(answer.error or "")
    text = _shorten(remove_opening(answer.text))
    if answer.rank is None or answer.score is None:
        return text
    return f"{text} (rank {answer.rank:.1%}, score {answer.score:.3f})"


def _shorten(text: str) -> str:
    is_long = len(text) > MAX_TEXT_CHARACTERS
    return to_valid_unicode(f"{text[:MAX_TEXT_CHARACTERS]} … ({len(text):,} characters)" if is_long else text)
