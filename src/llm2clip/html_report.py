"""A report as a list of blocks, written twice: as markdown, and as one HTML page that needs no other file.

Everything that comes from data is escaped in the page, which holds no script.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from llm2clip.io_utils import atomic_write_text

STYLE = """
:root { color-scheme: light dark; --ink: #1c2127; --dim: #5f6b7a; --line: #d9dee5; --paper: #fff; --soft: #f4f6f9;
  --good: #16794c; --bad: #b3261e; --unsure: #8a6100; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --dim: #9aa5b3; --line: #363d47; --paper: #14181d;
  --soft: #1d2229; --good: #58c48f; --bad: #f2857c; --unsure: #e3b341; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 5rem; max-width: 72rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 3rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.75rem 0 .25rem; }
p { max-width: 48rem; margin: .5rem 0; }
.scroll { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; color: var(--dim); border-bottom-width: 2px; }
td { white-space: nowrap; } td:first-child, td.long { white-space: normal; min-width: 12rem; }
td:first-child.number { min-width: 0; } td.number { text-align: right; }
tr.highlighted td { font-weight: 600; background: var(--soft); }
code, pre { font: .85rem/1.5 ui-monospace, monospace; background: var(--soft); border-radius: 4px; }
code { padding: .1rem .3rem; }
pre { padding: .6rem .8rem; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
.good { color: var(--good); font-weight: 600; } .bad { color: var(--bad); font-weight: 600; }
.unsure { color: var(--unsure); font-weight: 600; } .dim { color: var(--dim); }
figure { display: inline-block; vertical-align: top; max-width: 100%; margin: 1rem 1.5rem 1rem 0; }
figure svg { max-width: 100%; height: auto; color: var(--dim); }
figcaption { color: var(--dim); font-size: .85rem; }
.query { margin: 1.25rem 0 .25rem; max-width: 60rem; }
.shots { display: flex; flex-wrap: wrap; gap: .5rem; }
.shot { width: 8.75rem; font-size: .75rem; color: var(--dim); }
.shot img { width: 100%; height: 8.75rem; object-fit: cover; border-radius: 6px; border: 3px solid var(--line);
  display: block; }
.shot .none { height: 8.75rem; display: grid; place-items: center; border: 1px dashed var(--line); border-radius: 6px; }
.shot.good img { border-color: var(--good); } .shot.bad img { border-color: var(--bad); }
.shot.good, .shot.bad { font-weight: 400; }
"""
GOOD, BAD, UNSURE = "good", "bad", "unsure"


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """A paragraph; `code` in it is set as such. `status`: good, bad or unsure, of a verdict."""

    text: str
    status: str = ""


@dataclass(frozen=True)
class Command:
    """What makes the numbers above it or below."""

    text: str


@dataclass(frozen=True)
class Code:
    """Lines to copy, in a language that markdown knows by name."""

    text: str
    language: str = ""


@dataclass(frozen=True)
class Table:
    """Floats are shown with one decimal, small ones with one digit, None as a dash; `highlighted` are the rows to look at;
    `statuses` a cell's status by its text."""

    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    highlighted: frozenset[int] = frozenset()
    statuses: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Plot:
    """A drawing, SVG, and what it shows."""

    svg: str
    caption: str


@dataclass(frozen=True)
class ResultImage:
    """A picture, JPEG (None: it cannot be shown), whether it is right (None: nobody asked), and a line under it."""

    jpeg: bytes | None
    right: bool | None
    line: str


@dataclass(frozen=True)
class ResultImages:
    """What a query found."""

    query: str
    shots: Sequence[ResultImage]


Block = Heading | Paragraph | Command | Code | Table | Plot | ResultImages


def write_report(folder: Path, name: str, title: str, blocks: Sequence[Block]) -> tuple[Path, Path]:
    """Write `name`.md and `name`.html in a folder, each by a rename; their paths."""
    written = []
    for suffix, text in ((".md", to_markdown(title, blocks, f"{name}.html")), (".html", to_html(title, blocks))):
        file = folder / f"{name}{suffix}"
        atomic_write_text(file, text)
        written.append(file)
    return written[0], written[1]


def format_cell(value: Any) -> str:
    """A table's cell as text."""
    if isinstance(value, float):
        return f"{value:.1g}" if 0.0005 <= abs(value) < 0.1 else f"{value:.1f}"
    return "–" if value is None else str(value)


def to_markdown(title: str, blocks: Sequence[Block], page: str) -> str:
    """The report as markdown, without its pictures; `page` is the name of the HTML that has them."""
    parts, pictures = [f"# {title}"], False
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"{'#' * block.level} {block.text}")
        elif isinstance(block, Paragraph):
            parts.append(f"**{block.text}**" if block.status else block.text)
        elif isinstance(block, Command):
            parts.append(f"```\n{block.text}\n```")
        elif isinstance(block, Code):
            parts.append(f"```{block.language}\n{block.text}\n```")
        elif isinstance(block, Table):
            lines = [
                list(block.header),
                ["---"] * len(block.header),
                *([format_cell(v) for v in row] for row in block.rows),
            ]
            shown = [[text.replace("|", "\\|").replace("\n", " ") for text in line] for line in lines]
            parts.append("\n".join(f"| {' | '.join(line)} |" for line in shown))
        else:
            pictures = True
    if pictures:
        parts.insert(1, f"Plots and pictures are in {page}.")
    return "\n\n".join(parts) + "\n"


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """The report as one page."""
    body = "\n".join(_html(block) for block in blocks)
    return (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style></head>\n<body>\n<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def _html(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{_inline(block.text)}</h{block.level}>"
    if isinstance(block, Paragraph):
        return (
            f'<p class="{block.status}">{_inline(block.text)}</p>' if block.status else f"<p>{_inline(block.text)}</p>"
        )
    if isinstance(block, Command | Code):
        return f"<pre>{escape(block.text)}</pre>"
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Plot):
        return f"<figure>{block.svg}<figcaption>{_inline(block.caption)}</figcaption></figure>"
    shots = "".join(_shot(shot) for shot in block.shots)
    return f'<p class="query">{escape(block.query)}</p><div class="shots">{shots}</div>'


def _table(table: Table) -> str:
    head = "".join(f"<th>{_inline(name)}</th>" for name in table.header)
    statuses, lines = dict(table.statuses), []
    for n, row in enumerate(table.rows):
        cells = []
        for value in row:
            text = format_cell(value)
            kinds = [
                statuses.get(text, ""),
                "long" if len(text) > 30 else "",
                "number" if re.fullmatch(r"[-+±–×x., \d%]+", text) else "",
            ]
            names = " ".join(kind for kind in kinds if kind)
            cells.append(f'<td class="{names}">{_inline(text)}</td>' if names else f"<td>{_inline(text)}</td>")
        highlighted = ' class="strong"' if n in table.highlighted else ""
        lines.append(f"<tr{highlighted}>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _shot(shot: ResultImage) -> str:
    status = "" if shot.right is None else f" {GOOD if shot.right else BAD}"
    mark = {None: "", True: "right: ", False: "wrong: "}[shot.right]
    line = escape(shot.line)
    if shot.jpeg is None:
        return f'<div class="shot{status}"><div class="none">cannot be shown</div>{mark}{line}</div>'
    data = base64.b64encode(shot.jpeg).decode()
    return f'<div class="shot{status}"><img src="data:image/jpeg;base64,{data}" alt="{mark}{line}">{mark}{line}</div>'


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
