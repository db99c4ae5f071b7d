"""Search results rendered as a terminal table, JSON lines or an HTML contact sheet."""

import json
import re
import sys
import tempfile
import webbrowser
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from textwrap import shorten

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text as RichText

from llm2clip.reports import Example, Examples, Paragraph, write_report
from llm2clip.search.backends import Backend
from llm2clip.search.explain import Explanation
from llm2clip.search.metadata import CONTENT_FIELDS, IMAGE_FIELDS, to_json
from llm2clip.search.query import RERANKED
from llm2clip.search.types import Hit

CAPTION_LENGTH = 160  # maximum length of a displayed caption, in characters
THUMBNAIL_COLUMNS, THUMBNAIL_ROWS = 24, 24  # in pixels; each character is one pixel wide and two pixels high


def print_hits(hits: Sequence[Hit], backend: Backend, console: Console) -> None:
    """Print a table of search results, with thumbnails if the terminal supports at least 256 colours."""
    with_thumbnails = console.is_terminal and console.color_system in ("truecolor", "256")
    table = RichTable(show_lines=with_thumbnails)
    table.add_column("", justify="right")
    table.add_column("date" if hits[0].score is None else "cosine", justify="right")
    if with_thumbnails:
        table.add_column("image")
    table.add_column("file", overflow="fold")
    for rank, hit in enumerate(hits, 1):
        first = hit.images[0]
        lines = []
        if hit.image_count > 1:
            lines.append(f"and {hit.image_count - 1:,} duplicates")
        if first.captions:
            lines.append(_shorten(first.captions[0]))
        if hit.text:
            lines.append(f"text: {_shorten(hit.text)}")
        if hit.similar:
            lines.append(f"+{len(hit.similar)} similar")
        if hit.matched:
            lines.append(f"matched: {', '.join(hit.matched)}")
        description = RichText(_replace_unprintable_characters(first.name))
        description.append("".join(f"\n{line}" for line in lines), style="dim")
        thumbnail = [_draw_thumbnail(backend.thumbnail(hit.id))] if with_thumbnails else []
        table.add_row(str(rank), _format_score_or_date(hit), *thumbnail, description)
    console.print(table)


def print_explanation(explanation: Explanation, console: Console) -> None:
    table = RichTable(title="Effect of each word on the first result's cosine similarity", title_justify="left")
    table.add_column("word", overflow="fold")
    table.add_column("effect", justify="right")
    for word in explanation.words:
        table.add_row(RichText(_replace_unprintable_characters(word.text)), f"{word.effect:+.3f}")
    console.print(table)


def hit_to_json(rank: int, hit: Hit) -> str:
    """Return a search result as a JSON object on a single line. Times are local and in ISO 8601 format."""
    first, *duplicates = hit.images
    values = {
        "rank": rank,
        "score": None if hit.score is None else round(float(hit.score), 4),
        "relevance": None if hit.relevance is None else round(hit.relevance, 4),
        "path": first.name,
        "duplicates": [image.name for image in duplicates],
        "similar": [other.name for other in hit.similar],
        "captions": list(first.captions),
        "text": hit.text,
        "matched": list(hit.matched),
        **to_json(first, IMAGE_FIELDS),
        **to_json(hit, CONTENT_FIELDS),
    }
    text = json.dumps(values, ensure_ascii=False)
    return re.sub(r"[\x7f-\x9f]", lambda match: f"\\u{ord(match[0]):04x}", text)  # escape terminal control characters


def _format_score_or_date(hit: Hit) -> str:
    return f"{datetime.fromtimestamp(hit.images[0].taken):%Y-%m-%d}" if hit.score is None else f"{hit.score:.3f}"


def _replace_unprintable_characters(text: str) -> str:
    """Replace unprintable characters with spaces, because terminals would interpret control characters."""
    return "".join(c if c.isprintable() else " " for c in text)


def _shorten(text: str) -> str:
    return shorten(_replace_unprintable_characters(text), CAPTION_LENGTH, placeholder=" …")


def _draw_thumbnail(jpeg: bytes | None) -> RichText:
    """Draw a thumbnail with half-block characters, each of which shows two pixels, one above the other."""
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


def write_contact_sheet(
    query: str,
    hits: Sequence[Hit],
    backend: Backend,
    folder: Path | None = None,
    heatmaps: Mapping[str, bytes] | None = None,
    rerank_model: str | None = None,
) -> Path:
    """Write a self-contained HTML page with search result thumbnails, and return its path.

    Args:
        query: Description of the query, shown above the images.
        folder: Output folder. Default: a new temporary folder.
        heatmaps: JPEG images to show instead of thumbnails, keyed by hit id. See `Index.draw_heatmaps`.
    """
    folder = folder or Path(tempfile.mkdtemp(prefix="llm2clip-"))
    folder.mkdir(parents=True, exist_ok=True)
    images = []
    for rank, hit in enumerate(hits, 1):
        label = f"{rank}. {_format_score_or_date(hit)} {hit.images[0].file_name}"
        if hit.similar:
            label += f" (+{len(hit.similar)} similar)"
        jpeg = (heatmaps or {}).get(hit.id) or backend.thumbnail(hit.id)
        images.append(Example(jpeg, label, url=_make_file_url(hit)))
    order = "best match first" if any(hit.matched for hit in hits) else "most similar first"
    if rerank_model is not None:
        first = f"the first {RERANKED} " if len(hits) > RERANKED else ""
        order = f"{first}re-ranked with {rerank_model} (the cosine similarities are those of the index's model)"
    text = f"{len(hits)} images, {order}, each with its rank and cosine similarity."
    if hits[0].score is None:
        text = f"{len(hits)} images, newest first, each with its rank and date."
    if heatmaps:
        text += " Bright parts of an image are the most similar to the query, and dark parts are the least similar."
    page = folder / "results.html"
    write_report(page, "Search results", "", [Examples(images, query), Paragraph(text)])
    return page


def _make_file_url(hit: Hit) -> str | None:
    path = Path(hit.images[0].container)
    return path.as_uri() if path.is_absolute() and path.exists() else None


def open_in_browser(page: Path) -> None:
    """Open a page in the user's browser. Print a message if no browser is available."""
    if not webbrowser.open(page.resolve().as_uri()):
        print(f"Could not open a browser. Open this file manually: {page}", file=sys.stderr)
