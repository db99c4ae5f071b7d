"""What a search found: a table, pictures in the terminal, a contact sheet."""

from __future__ import annotations

import sys
import tempfile
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text as RichText

from llm2clip.html_report import Block, Paragraph, ResultImage, ResultImages, write_report
from llm2clip.search.types import Backend, Hit


def print_hits(hits: Sequence[Hit], engine: Backend, console: Console, pictures: bool = True) -> None:
    """A table of hits, with their pictures where this terminal can show them."""
    shown = pictures and console.is_terminal and console.color_system in ("truecolor", "256")
    table = RichTable(show_lines=shown)
    table.add_column("", justify="right")
    table.add_column("cosine", justify="right")
    if shown:
        table.add_column("picture")
    table.add_column("file", overflow="fold")
    for number, hit in enumerate(hits, 1):
        first, *others = hit.pictures
        name = RichText(_printable(first.name))
        if others:
            name.append(f"\nand {len(others)} more of the same bytes", style="dim")
        if first.captions:
            name.append("\n" + shorten(_printable(first.captions[0]), 160, placeholder=" …"), style="dim")
        picture = [_drawn(engine.thumbnail(hit.id))] if shown else []
        table.add_row(str(number), f"{hit.score:.3f}", *picture, name)
    console.print(table)


def _printable(text: str) -> str:
    """Without what a terminal would obey."""
    return "".join(c if c.isprintable() else " " for c in text)


def _drawn(jpeg: bytes | None) -> RichText:
    """A thumbnail in characters, each two pixels high."""
    import torch
    from torchvision.transforms.v2 import functional as F

    from llm2clip.data.images import decode_image

    if jpeg is None:
        return RichText("")
    pixels = decode_image(jpeg)
    height, width = pixels.shape[-2:]
    columns = 24
    rows = max(2, min(24, round(columns * height / width))) // 2 * 2
    small = F.resize(pixels, [rows, columns], antialias=True).to(torch.int).permute(1, 2, 0).tolist()
    text = RichText()
    for upper, lower in zip(small[::2], small[1::2], strict=True):
        for above, below in zip(upper, lower, strict=True):
            text.append("▀", style=f"#{bytes(above).hex()} on #{bytes(below).hex()}")
        text.append("\n")
    return text


def write_contact_sheet(query: str, hits: Sequence[Hit], engine: Backend, folder: Path | None = None) -> Path:
    """A page of what was found, one HTML file with its pictures in it.

    Args:
        query: what was looked for.
        hits: the answer.
        engine: that gave it.
        folder: where the page goes; None makes one.
    """
    folder = folder or Path(tempfile.mkdtemp(prefix="llm2clip-"))
    folder.mkdir(parents=True, exist_ok=True)
    shots = [
        ResultImage(engine.thumbnail(hit.id), None, f"{n}. {hit.score:.3f} {Path(hit.pictures[0].name).name}")
        for n, hit in enumerate(hits, 1)
    ]
    blocks: list[Block] = [
        ResultImages(query, shots),
        Paragraph(f"{len(hits)} pictures, the closest first, with their cosine."),
    ]
    return write_report(folder, "found", "Found", blocks)[1]


def open_in_browser(page: Path) -> None:
    """Open a page in the user's browser, if there is one; its path is printed anyhow."""
    if not webbrowser.open(page.resolve().as_uri()):
        print(f"there is no browser to open {page} with", file=sys.stderr)
