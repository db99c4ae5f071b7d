"""Block-based reports, rendered as Markdown, as text for a terminal, and as an HTML page without scripts.

The page uses the template `templates/report.html.jinja` and inlines the CSS from `templates/report.css`. All text is
escaped.
"""

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from io import StringIO
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from llm2clip.io_utils import atomic_write_text, escape_control_characters

GOOD, BAD, UNSURE = "good", "bad", "unsure"  # status of a paragraph or table cell; determines its colour
LONG_CELL = 30  # in characters; table cells with longer text may wrap


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of text, in which backticks mark code. `status` is GOOD, BAD, UNSURE or empty."""

    text: str
    status: str = ""


@dataclass(frozen=True)
class Code:
    """A code block. `language` selects the syntax highlighting in Markdown, and may be empty."""

    text: str
    language: str = ""


@dataclass(frozen=True)
class Table:
    """A table. `format_cell` formats its values.

    Args:
        header: Column names. They must not be empty, because screen readers read them aloud.
        rows: Cell values, row by row.
        highlight: Indices of the rows to highlight.
        statuses: Status of each cell, keyed by the cell's text, e.g. {"holds": GOOD}.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    highlight: frozenset[int] = frozenset()
    statuses: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plot:
    """An SVG plot and its caption."""

    svg: str
    caption: str


@dataclass(frozen=True)
class ResultImage:
    """An image retrieved by a query.

    Args:
        jpeg: JPEG data. None if the image cannot be decoded.
        is_correct: True if the image is a correct result for the query. None if unknown.
        caption: Text shown below the image.
        url: Link target of the image, or None for no link.
    """

    jpeg: bytes | None
    is_correct: bool | None
    caption: str
    url: str | None = None


@dataclass(frozen=True)
class ResultImages:
    """A query and its retrieved images."""

    query: str
    images: Sequence[ResultImage]


@dataclass(frozen=True)
class ImageCard:
    """An image of a data set, with its texts.

    Args:
        title: Text shown above the image, such as its file name.
        details: Short texts shown below the title, such as the size of the image.
        jpeg: JPEG data. None if the image cannot be decoded.
        error: Text shown in place of the image.
        texts: Texts of each kind, keyed by a label such as "captions".
    """

    title: str
    details: Sequence[str]
    jpeg: bytes | None
    error: str
    texts: Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class ImageCards:
    """Images of a data set, with their texts."""

    cards: Sequence[ImageCard]


@dataclass(frozen=True)
class Legend:
    """Colour legend for the preceding images. Each entry is a name and a CSS colour, such as "#ff0000"."""

    entries: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Details:
    """Collapsed text, such as a run's settings. Clicking on the summary expands it."""

    summary: str
    text: str


Block = Heading | Paragraph | Code | Table | Plot | ResultImages | ImageCards | Legend | Details
_VISUAL = Plot | ResultImages | ImageCards | Legend | Details  # blocks that Markdown reports omit


def write_report(folder: Path, name: str, title: str, blocks: Sequence[Block]) -> tuple[Path, Path]:
    """Write a report to `folder/name.md` and `folder/name.html`; return both paths."""
    markdown_file, html_file = folder / f"{name}.md", folder / f"{name}.html"
    atomic_write_text(markdown_file, render_markdown(title, blocks, html_file.name))
    atomic_write_text(html_file, render_html(title, blocks))
    return markdown_file, html_file


def render_markdown(title: str, blocks: Sequence[Block], html_name: str = "") -> str:
    """Render a report as Markdown, without plots, images and collapsed text.

    Sections that contain such blocks but neither tables nor code are omitted. If blocks were omitted and `html_name` is
    not empty, the first paragraph refers to this HTML file.
    """
    parts = []
    has_images = any(isinstance(block, _VISUAL) for block in blocks)
    for block in _omit_visual_sections(blocks):
        if isinstance(block, Heading):
            parts.append(f"{'#' * block.level} {_escape_tags(block.text)}")
        elif isinstance(block, Paragraph):
            text = _escape_tags(block.text)
            parts.append(f"**{text}**" if block.status else text)
        elif isinstance(block, Code):
            parts.append(f"```{block.language}\n{block.text}\n```")
        elif isinstance(block, Table):
            parts.append(_format_table(block))
    if has_images and html_name:
        parts.insert(0, f"Plots and images are in {html_name}.")
    return "\n\n".join([f"# {_escape_tags(title)}", *parts]) + "\n"


def render_text(blocks: Sequence[Block], width: int = 120) -> str:
    """Render a report as plain text for a terminal, without plots, images and collapsed text."""
    page = StringIO()
    console = Console(file=page, width=width, highlight=False, markup=False, emoji=False)
    for block in _omit_visual_sections(blocks):
        if isinstance(block, Heading):
            console.print(escape_control_characters(block.text.upper()))
        elif isinstance(block, Paragraph | Code):
            console.print(f"{escape_control_characters(block.text)}\n")
        elif isinstance(block, Table):
            console.print(_make_terminal_table(block), "")
    return "\n".join(line.rstrip() for line in page.getvalue().splitlines()).strip()


def _make_terminal_table(table: Table) -> RichTable:
    """Create a table without lines. Columns of numbers are aligned to the right."""
    rows = [[escape_control_characters(format_cell(value)) for value in row] for row in table.rows]
    terminal_table = RichTable(box=None, pad_edge=False)
    for number, name in enumerate(table.header):
        is_numeric = all(_is_number(row[number]) for row in rows)
        terminal_table.add_column(Text(name), justify="right" if is_numeric else "left", overflow="fold")
    for row in rows:
        terminal_table.add_row(*map(Text, row))
    return terminal_table


def _escape_tags(text: str) -> str:
    """Escape HTML tags outside code in backticks, because Markdown would interpret them."""
    return re.sub(r"(`[^`]+`)|<(?=[a-z/!?])", lambda match: match[1] or "&lt;", text, flags=re.IGNORECASE)


def _omit_visual_sections(blocks: Sequence[Block]) -> list[Block]:
    """Remove sections that contain visual blocks but neither tables nor code."""
    remaining: list[Block] = []
    position = 0
    while position < len(blocks):
        section = _find_section(blocks, position)
        is_visual = any(isinstance(block, _VISUAL) for block in section)
        if is_visual and not any(isinstance(block, Table | Code) for block in section):
            position += len(section)
        else:
            remaining.append(blocks[position])
            position += 1
    return remaining


def _find_section(blocks: Sequence[Block], start: int) -> Sequence[Block]:
    """Return the section whose heading is at index `start`, or an empty list if there is no heading at this index.

    A section ends before the next heading of the same or a higher level.
    """
    heading = blocks[start]
    if not isinstance(heading, Heading):
        return []
    end = start + 1
    while end < len(blocks):
        block = blocks[end]
        if isinstance(block, Heading) and block.level <= heading.level:
            break
        end += 1
    return blocks[start:end]


def _format_table(table: Table) -> str:
    rows = [list(table.header), ["---"] * len(table.header)]
    rows += [[format_cell(value) for value in row] for row in table.rows]
    lines = []
    for row in rows:
        cells = [_escape_tags(text).replace("|", "\\|").replace("\n", " ") for text in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def render_html(title: str, blocks: Sequence[Block]) -> str:
    """Render a report as a single HTML page."""
    style = (files("llm2clip") / "templates" / "report.css").read_text(encoding="utf-8")
    return _load_template().render(title=title, blocks=blocks, style=style)


@lru_cache
def _load_template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "inline": _format_inline,
        "cell": format_cell,
        "cell_classes": _choose_cell_classes,
        "labelled_svg": _label_svg,
        "base64": lambda data: base64.b64encode(data).decode(),
        "type_name": lambda block: type(block).__name__,
    }
    source = (files("llm2clip") / "templates" / "report.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(source)


def _format_inline(text: str) -> Markup:
    """Escape text for HTML, and convert backticks to <code> elements."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _label_svg(plot: Plot) -> Markup:
    """Add a text alternative to a plot's SVG, because screen readers would otherwise read out each axis label."""
    return Markup(plot.svg.replace("<svg", f'<svg role="img" aria-label="{escape(plot.caption)}"', 1))


def format_cell(value: Any) -> str:
    """Format a table cell. Floats have one decimal place, or one significant digit from 0.0005 to 0.1."""
    if isinstance(value, float):
        return f"{value:.1g}" if 0.0005 <= abs(value) < 0.1 else f"{value:.1f}"
    return "–" if value is None else str(value)


def format_interval(interval: Sequence[float], number_format: str = ".1f") -> str:
    """Format an interval, for example as "43.1 to 47.0"."""
    low, high = (format(limit, number_format) for limit in interval)
    return f"{low} to {high}"


def format_with_interval(value: float, interval: Sequence[float], number_format: str = ".1f") -> str:
    """Format a value and its interval, for example as "45.2 (43.1 to 47.0)"."""
    return f"{format(value, number_format)} ({format_interval(interval, number_format)})"


def _choose_cell_classes(text: str, statuses: Mapping[str, str]) -> str:
    """Return the CSS classes for a table cell."""
    classes = []
    if text in statuses:
        classes.append(statuses[text])
    if len(text) > LONG_CELL:
        classes.append("long")
    if _is_number(text):
        classes.append("number")
    return " ".join(classes)


def _is_number(text: str) -> bool:
    """Return True if a cell contains only numbers and signs."""
    return re.fullmatch(r"[-+±–×x., \d%]+", text) is not None
