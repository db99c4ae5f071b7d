"""Reports that consist of blocks, rendered as an HTML page, Markdown or text for a terminal.

Every report starts with a verdict: one or two sentences that state the main result. The HTML template
`templates/report.html.jinja` has one macro per kind of block, and inlines `templates/report.css`. HTML pages contain no
scripts and load nothing from the network. All text is escaped.
"""

import base64
import html
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from io import StringIO
from pathlib import Path
from typing import Any

import jinja2
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from llm2clip.io_utils import atomic_write_text, escape_control_characters, format_install_command

GOOD, BAD, UNSURE = "good", "bad", "unsure"  # status of a paragraph or table cell, shown as a colour
LONG_CELL = 30  # in characters; longer table cells may wrap


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """Paragraph of text, in which backticks mark code. `status` is GOOD, BAD, UNSURE or empty."""

    text: str
    status: str = ""


@dataclass(frozen=True)
class CodeBlock:
    """Code block. `language`, which may be empty, selects the syntax highlighting in Markdown."""

    text: str
    language: str = ""


@dataclass(frozen=True)
class Table:
    """Table whose values are formatted by `format_cell`."""

    header: Sequence[str]  # column names, which must not be empty, because screen readers read them aloud
    rows: Sequence[Sequence[Any]]
    highlight: frozenset[int] = frozenset()  # indices of the rows to highlight
    statuses: Mapping[str, str] = field(default_factory=dict)  # statuses keyed by cell text, e.g. {"holds": GOOD}


@dataclass(frozen=True)
class Figure:
    """SVG plot with a caption."""

    svg: str | None  # None if Matplotlib is not installed
    caption: str


@dataclass(frozen=True)
class ReportImage:
    """Image with a caption and other texts."""

    jpeg: bytes | None  # None if the image cannot be decoded
    caption: str = ""  # below the image
    is_correct: bool | None = None  # True if the image is a correct result for a query, None if unknown
    title: str = ""  # title above the image, such as the file name
    details: Sequence[str] = ()  # short texts below the title, such as the size of the image
    texts: Mapping[str, Sequence[str]] = field(default_factory=dict)  # texts keyed by label, such as "captions"
    error: str = "image not available"  # shown in place of an image that cannot be decoded


@dataclass(frozen=True)
class ReportImageGroup:
    """Images shown side by side."""

    images: Sequence[ReportImage]
    title: str = ""  # title above the images, such as the query that retrieved them
    as_cards: bool = False  # show wide cards with space for texts instead of thumbnails
    legend: Sequence[tuple[str, str]] = ()  # names and CSS colours of the legend entries, such as ("cat", "#ff0000")


@dataclass(frozen=True)
class CollapsibleSection:
    """Text, such as a run's settings, that is hidden until the reader clicks the summary."""

    summary: str
    text: str


Block = Heading | Paragraph | CodeBlock | Table | Figure | ReportImageGroup | CollapsibleSection
_ONLY_HTML = Figure | ReportImageGroup | CollapsibleSection


def write_report(
    html_file: Path, title: str, verdict: str, blocks: Sequence[Block], with_markdown: bool = True
) -> None:
    """Write a report as HTML and, in the same folder, as Markdown. `verdict` states the main result."""
    if with_markdown:
        markdown = render_markdown(title, blocks, verdict, html_file.name)
        atomic_write_text(html_file.with_suffix(".md"), markdown)
    atomic_write_text(html_file, render_html(title, blocks, verdict))
    if _has_missing_plots(blocks):
        print(f"{html_file} has no plots. To add plots, run {format_install_command('reports')}", file=sys.stderr)


def _has_missing_plots(blocks: Sequence[Block]) -> bool:
    return any(isinstance(block, Figure) and block.svg is None for block in blocks)


def render_markdown(title: str, blocks: Sequence[Block], verdict: str = "", html_name: str = "") -> str:
    """Render a report as Markdown, without figures, images and collapsed text.

    Omit sections that have visual blocks but no tables or code. If the report has visual blocks and `html_name` is not
    empty, a paragraph refers to the HTML file.
    """
    parts = [f"# {_escape_html_tags(title)}"]
    if verdict:
        parts.append(f"**{_escape_html_tags(verdict)}**")
    if html_name and any(isinstance(block, _ONLY_HTML) for block in blocks):
        contents = "Images and details" if _has_missing_plots(blocks) else "Plots and images"
        parts.append(f"{contents} are in {html_name}.")
    for block in _omit_visual_sections(blocks):
        if isinstance(block, Heading):
            parts.append(f"{'#' * block.level} {_escape_html_tags(block.text)}")
        elif isinstance(block, Paragraph):
            text = _escape_html_tags(block.text)
            parts.append(f"**{text}**" if block.status else text)
        elif isinstance(block, CodeBlock):
            parts.append(f"```{block.language}\n{block.text}\n```")
        elif isinstance(block, Table):
            parts.append(_format_markdown_table(block))
    return "\n\n".join(parts) + "\n"


def render_plain_text(blocks: Sequence[Block], verdict: str = "", width: int = 120) -> str:
    """Render a report as plain text for a terminal, without figures, images and collapsed text."""
    page = StringIO()
    console = Console(file=page, width=width, highlight=False, markup=False, emoji=False)
    if verdict:
        console.print(f"{escape_control_characters(verdict)}\n")
    for block in _omit_visual_sections(blocks):
        if isinstance(block, Heading):
            console.print(escape_control_characters(block.text.upper()))
        elif isinstance(block, Paragraph | CodeBlock):
            console.print(f"{escape_control_characters(block.text)}\n")
        elif isinstance(block, Table):
            console.print(_make_terminal_table(block), "")
    return "\n".join(line.rstrip() for line in page.getvalue().splitlines()).strip()


def _make_terminal_table(table: Table) -> RichTable:
    rows = [[escape_control_characters(format_cell(value)) for value in row] for row in table.rows]
    terminal_table = RichTable(box=None, pad_edge=False)
    for number, name in enumerate(table.header):
        is_numeric = all(_is_numeric_text(row[number]) for row in rows)
        terminal_table.add_column(Text(name), justify="right" if is_numeric else "left", overflow="fold")
    for row in rows:
        terminal_table.add_row(*map(Text, row))
    return terminal_table


def _escape_html_tags(text: str) -> str:
    """Escape HTML tags outside of code in backticks, because Markdown allows HTML."""
    return re.sub(r"(`[^`]+`)|<(?=[a-z/!?])", lambda match: match[1] or "&lt;", text, flags=re.IGNORECASE)


def _omit_visual_sections(blocks: Sequence[Block]) -> list[Block]:
    """Remove sections that have visual blocks but no tables or code, and then headings without content.

    A section ends before the next heading of the same or a higher level.
    """
    remaining = list(blocks)
    for start, heading in reversed(list(enumerate(blocks))):
        if not isinstance(heading, Heading):
            continue
        end = start + 1
        while end < len(remaining) and getattr(remaining[end], "level", heading.level + 1) > heading.level:
            end += 1
        section = remaining[start:end]
        is_visual = len(section) == 1 or any(isinstance(block, _ONLY_HTML) for block in section)
        if is_visual and not any(isinstance(block, Table | CodeBlock) for block in section):
            del remaining[start:end]
    return remaining


def _format_markdown_table(table: Table) -> str:
    rows = [list(table.header), ["---"] * len(table.header)]
    rows += [[format_cell(value) for value in row] for row in table.rows]
    lines = []
    for row in rows:
        cells = [_escape_html_tags(text).replace("|", "\\|").replace("\n", " ") for text in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def render_html(title: str, blocks: Sequence[Block], verdict: str = "") -> str:
    """Render a report as a single HTML page."""
    style = (files("llm2clip") / "templates" / "report.css").read_text(encoding="utf-8")
    return _load_report_template().render(title=title, blocks=blocks, verdict=verdict, style=style)


@lru_cache
def _load_report_template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "inline": _render_inline_as_html,
        "cell": format_cell,
        "cell_classes": _choose_cell_css_classes,
        "labelled_svg": _add_text_alternative,
        "base64": lambda data: base64.b64encode(data).decode(),
        "type_name": lambda block: type(block).__name__,
    }
    source = (files("llm2clip") / "templates" / "report.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(source)


def _render_inline_as_html(text: str) -> str:
    """Escape text for HTML, and convert backticks to <code> elements."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def _add_text_alternative(figure: Figure) -> str:
    """Add a text alternative to a figure's SVG, because screen readers would otherwise read out each axis label."""
    if figure.svg is None:
        command = format_install_command("reports")
        return f"<p>Matplotlib is not installed. To add plots to reports, run <code>{command}</code></p>"
    return figure.svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(figure.caption)}"', 1)


def format_cell(value: Any) -> str:
    """Format a table cell. Floats have one decimal place or, between 0.0005 and 0.1, one significant digit."""
    if isinstance(value, float):
        return f"{value:.1g}" if 0.0005 <= abs(value) < 0.1 else f"{value:.1f}"
    return "–" if value is None else str(value)


def format_interval(interval: Sequence[float], number_format: str = ".1f") -> str:
    """Format an interval, such as "43.1 to 47.0"."""
    low, high = (format(limit, number_format) for limit in interval)
    return f"{low} to {high}"


def format_value_with_interval(value: float, interval: Sequence[float], number_format: str = ".1f") -> str:
    """Format a value and its interval, such as "45.2 (43.1 to 47.0)"."""
    return f"{format(value, number_format)} ({format_interval(interval, number_format)})"


def _choose_cell_css_classes(text: str, statuses: Mapping[str, str]) -> str:
    classes = []
    if text in statuses:
        classes.append(statuses[text])
    if len(text) > LONG_CELL:
        classes.append("long")
    if _is_numeric_text(text):
        classes.append("number")
    return " ".join(classes)


def _is_numeric_text(text: str) -> bool:
    return re.fullmatch(r"[-+±–×x., \d%]+", text) is not None
