"""Display search results as a table in the terminal or as an HTML contact sheet."""

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
from llm2clip.search.backends import Backend
from llm2clip.search.types import Hit

CAPTION_LENGTH = 160  # characters
THUMBNAIL_COLUMNS, THUMBNAIL_ROWS = 24, 24  # in pixels; each character covers one pixel column and two pixel rows


def print_hits(hits: Sequence[Hit], backend: Backend, console: Console) -> None:
    """Print a table of search results. If the terminal supports at least 256 colours, include thumbnails."""
    with_thumbnails = console.is_terminal and console.color_system in ("truecolor", "256")
    table = RichTable(show_lines=with_thumbnails)
    table.add_column("", justify="right")
    table.add_column("cosine", justify="right")
    if with_thumbnails:
        table.add_column("image")
    table.add_column("file", overflow="fold")
    for rank, hit in enumerate(hits, 1):
        first, *duplicates = hit.images
        description = RichText(_printable(first.name))
        if duplicates:
            description.append(f"\nand {len(duplicates)} duplicates", style="dim")
        if first.captions:
            caption = shorten(_printable(first.captions[0]), CAPTION_LENGTH, placeholder=" …")
            description.append("\n" + caption, style="dim")
        thumbnail = [_draw(backend.thumbnail(hit.id))] if with_thumbnails else []
        table.add_row(str(rank), f"{hit.score:.3f}", *thumbnail, description)
    console.print(table)


def _printable(text: str) -> str:
    """Replace unprintable characters with spaces, because a terminal would interpret control characters."""
    return "".join(c if c.isprintable() else " " for c in text)


def _draw(jpeg: bytes | None) -> RichText:
    """Draw a thumbnail with half-block characters. Each character shows two pixels, one above the other."""
    import torch
    from torchvision.transforms.v2 import functional as F

    from llm2clip.data.images import decode_image

    if jpeg is None:
        return RichText("")
    pixels = decode_image(jpeg)
    height, width = pixels.shape[-2:]
    rows = max(2, min(THUMBNAIL_ROWS, round(THUMBNAIL_COLUMNS * height / width))) // 2 * 2
    resized = F.resize(pixels, [rows, THUMBNAIL_COLUMNS], antialias=True).to(torch.int)
    lines = resized.permute(1, 2, 0).tolist()  # (rows, columns, RGB)
    text = RichText()
    for upper_line, lower_line in zip(lines[::2], lines[1::2], strict=True):
        for upper, lower in zip(upper_line, lower_line, strict=True):
            text.append("▀", style=f"#{bytes(upper).hex()} on #{bytes(lower).hex()}")
        text.append("\n")
    return text


def write_contact_sheet(query: str, hits: Sequence[Hit], backend: Backend, folder: Path | None = None) -> Path:
    """Write the thumbnails of search results to a self-contained HTML page, and return the path of the page.

    Args:
        query: Description of the query, shown above the images.
        hits: Search results to show.
        backend: Index that returned the hits.
        folder: Folder to write the page to. Default: a new temporary folder.
    """
    folder = folder or Path(tempfile.mkdtemp(prefix="llm2clip-"))
    folder.mkdir(parents=True, exist_ok=True)
    images = []
    for rank, hit in enumerate(hits, 1):
        label = f"{rank}. {hit.score:.3f} {Path(hit.images[0].name).name}"
        images.append(ResultImage(backend.thumbnail(hit.id), None, label))
    summary = Paragraph(f"{len(hits)} images, most similar first, each with its rank and cosine similarity.")
    blocks: list[Block] = [ResultImages(query, images), summary]
    return write_report(folder, "results", "Search results", blocks)[1]


def open_in_browser(page: Path) -> None:
    """Open a page in the user's browser. If no browser is available, print a message instead."""
    if not webbrowser.open(page.resolve().as_uri()):
        print(f"could not open a browser; open this file manually: {page}", file=sys.stderr)
