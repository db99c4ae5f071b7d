"""Image of search results, with one row per query.

Each row shows the query text on the left and the retrieved images on the right.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from llm2clip.io_utils import atomic_path
from llm2clip.models.hub.pretrained import AssetError, resolve_pretrained

# Sizes in pixels.
TEXT_WIDTH = 320
THUMBNAIL = 168
GAP = 14
MARGIN = 32
TITLE_HEIGHT = 28
SCORE_HEIGHT = 24
LINE_SPACING = 8

MAX_LINES = 9  # maximum number of lines per query
BLACK, GREY, LIGHT_GREY, GREEN = "#1a1a1a", "#8a8a8a", "#e4e4e4", "#2e9e5b"
CJK_FAMILIES = (
    "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "Noto Sans CJK JP", "PingFang SC", "Hiragino Sans GB",
    "Microsoft YaHei", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei",
)  # fmt: skip
# Characters with which a line must not start.
CLOSING_MARKS = "、。，．！？：；）」』】》〉ーっゃゅょッャュョ,.!?:;)"

Row = tuple[str, Sequence[Image.Image | str | Path], Sequence[float]]  # query, images, scores


def draw_results(
    rows: Sequence[Row],
    out: str | Path,
    title: str,
    *,
    correct: Sequence[Collection[int]] | None = None,
    columns: int = 5,
    offline: bool = False,
) -> Path:
    """Draw a row of top-ranked images for each query and save it as a PNG file; return the path of the file.

    Chinese, Japanese and Korean text requires a font that supports these languages. If none is installed, one is
    downloaded (2.3 MB).

    Args:
        rows: Query, images and scores of each row.
        out: Path of the PNG file to write.
        title: Title drawn above the results.
        correct: Zero-based ranks of the correct images in each row. Correct images are drawn with a green frame.
        columns: Maximum number of images per row.
        offline: If True, do not download a font.
    """
    if correct is not None and len(correct) != len(rows):
        raise ValueError(f"got {len(rows)} rows, but `correct` has {len(correct)} entries: pass one entry per row")
    queries = [_lay_out_query(query, offline) for query, _, _ in rows]
    heights = [max(THUMBNAIL + SCORE_HEIGHT, query.height) + 2 * GAP for query in queries]
    top = MARGIN + TITLE_HEIGHT + GAP
    width = 2 * MARGIN + TEXT_WIDTH + columns * (THUMBNAIL + GAP)
    canvas = Image.new("RGB", (width, top + sum(heights) + MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    title_font = _load_font(title, 24, offline)
    draw.text((MARGIN, MARGIN), _shorten(title, title_font, width - 2 * MARGIN), fill=BLACK, font=title_font)

    score_font = _load_font("0.123", 14, offline)
    for n, (_, images, scores) in enumerate(rows):
        draw.line((MARGIN, top, width - MARGIN, top), fill=LIGHT_GREY, width=1)
        _draw_query(draw, queries[n], top, heights[n])
        results = list(zip(images, scores, strict=True))[:columns]
        for rank, (image, score) in enumerate(results):
            is_correct = correct is not None and rank in correct[n]
            x, y = MARGIN + TEXT_WIDTH + GAP + rank * (THUMBNAIL + GAP), top + GAP
            _draw_image(canvas, draw, image, x, y, is_correct)
            score_position = (x + THUMBNAIL // 2, y + THUMBNAIL + 6)
            colour = GREEN if is_correct else GREY
            draw.text(score_position, f"{score:.3f}", fill=colour, font=score_font, anchor="mt")
        top += heights[n]

    with atomic_path(out) as temporary:
        canvas.save(temporary, format="PNG", optimize=True)
    return Path(out)


@dataclass(frozen=True)
class _QueryText:
    """Text of a query, broken into lines."""

    lines: list[str]
    font: ImageFont.FreeTypeFont
    line_height: int

    @property
    def height(self) -> int:
        return len(self.lines) * self.line_height


def _lay_out_query(query: str, offline: bool) -> _QueryText:
    """Break a query into lines. Long queries use a smaller font, and very long queries are truncated."""
    for size in (20, 16, 14):
        font = _load_font(query, size, offline)
        text = _QueryText(wrap(query, font, TEXT_WIDTH - GAP), font, size + LINE_SPACING)
        if text.height <= THUMBNAIL + SCORE_HEIGHT:
            break
    if len(text.lines) > MAX_LINES:
        rest = " ".join(text.lines[MAX_LINES - 1 :])
        last_line = _shorten(rest, text.font, TEXT_WIDTH - GAP)
        text = _QueryText([*text.lines[: MAX_LINES - 1], last_line], text.font, text.line_height)
    return text


def _draw_query(draw: ImageDraw.ImageDraw, text: _QueryText, top: int, row_height: int) -> None:
    """Draw a query to the left of its images, vertically centred unless it is taller than the images."""
    y = top + GAP
    if text.height <= THUMBNAIL:
        y = top + (row_height - SCORE_HEIGHT - text.height) // 2
    for line in text.lines:
        draw.text((MARGIN, y), line, fill=BLACK, font=text.font)
        y += text.line_height


def _draw_image(
    canvas: Image.Image,
    draw: ImageDraw.ImageDraw,
    image: Image.Image | str | Path,
    x: int,
    y: int,
    is_correct: bool,
) -> None:
    """Draw an image in a square frame. The image is scaled to fit without cropping."""
    if isinstance(image, Image.Image):
        upright = ImageOps.exif_transpose(image)
    else:
        with Image.open(image) as opened:
            upright = ImageOps.exif_transpose(opened)
    if upright.has_transparency_data:
        rgba = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    thumbnail = ImageOps.contain(upright.convert("RGB"), (THUMBNAIL - 8, THUMBNAIL - 8), Image.Resampling.LANCZOS)
    canvas.paste(thumbnail, (x + (THUMBNAIL - thumbnail.width) // 2, y + (THUMBNAIL - thumbnail.height) // 2))
    colour, line_width = (GREEN, 4) if is_correct else (LIGHT_GREY, 1)
    frame = (x, y, x + THUMBNAIL - 1, y + THUMBNAIL - 1)
    draw.rounded_rectangle(frame, radius=6, outline=colour, width=line_width)


# ---- line breaking --------------------------------------------------------------------------------------------------


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Break a text into lines of at most `width` pixels.

    Lines are broken at spaces and next to Chinese and Japanese characters. A word that does not fit in a line is broken
    between any two characters.
    """
    lines, line = [], ""
    for piece in _breakable_pieces(text):
        remaining = piece
        while True:
            extended = line + remaining if line else remaining.lstrip()
            if font.getlength(extended.rstrip()) <= width:
                line = extended
                break
            if line.strip():
                lines.append(line.strip())
                line = ""
                continue
            fitting = [n for n in range(1, len(remaining)) if font.getlength(remaining[:n]) <= width]
            count = max(fitting, default=1)
            if count >= len(remaining):
                line = remaining
                break
            lines.append(remaining[:count].strip())
            remaining = remaining[count:]
    if line.strip():
        lines.append(line.strip())
    return lines


def _breakable_pieces(text: str) -> list[str]:
    """Split a text at every possible line break: before spaces, and next to Chinese and Japanese characters."""
    pieces: list[str] = []
    for char in " ".join(text.split()):
        beside_wide = _is_wide(char) or (bool(pieces) and _is_wide(pieces[-1][-1]))
        if not pieces or char == " " or (beside_wide and char not in CLOSING_MARKS):
            pieces.append(char)
        else:
            pieces[-1] += char
    return pieces


def _is_wide(char: str) -> bool:
    """Return True if a character is Chinese, Japanese or a full-width form."""
    return "\u2e80" <= char <= "\u9fff" or "\uff00" <= char <= "\uffef"


def _shorten(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Truncate a text to at most `width` pixels. Truncated texts end with an ellipsis."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


# ---- fonts ----------------------------------------------------------------------------------------------------------


def _load_font(text: str, size: int, offline: bool) -> ImageFont.FreeTypeFont:
    """Load a font for a text.

    This is Matplotlib's default font, unless a CJK font supports more of the text's characters.
    """
    characters = {ord(char) for char in text if not char.isspace()}
    path = _matplotlib_font("DejaVu Sans")
    assert path is not None  # Matplotlib ships with this font
    missing = characters - _supported_characters(path)
    if missing:
        cjk_path = _cjk_font(offline)
        if cjk_path is not None and len(characters - _supported_characters(cjk_path)) < len(missing):
            path = cjk_path
    return ImageFont.truetype(str(path), size)


@cache
def _cjk_font(offline: bool) -> str | None:
    """Return the path of a font for Chinese, Japanese and Korean. If none is installed, download one.

    Return None if the download fails.
    """
    for family in CJK_FAMILIES:
        path = _matplotlib_font(family)
        if path:
            return path
    try:
        return str(next(Path(resolve_pretrained("cjk-font", offline=offline)).glob("*.ttc")))
    except AssetError:
        return None  # an image with boxes instead of characters is better than no image


@cache
def _matplotlib_font(family: str) -> str | None:
    """Return the path of the regular face of a font family, or None if the family is not installed."""
    from matplotlib import font_manager

    # findfont prefers the regular face. Matplotlib's font list is unsorted, so its first face may be oblique.
    try:
        return str(font_manager.findfont(font_manager.FontProperties(family=[family]), fallback_to_default=False))
    except ValueError:
        return None


@cache
def _supported_characters(path: str) -> frozenset[int]:
    """Return the code points of the characters that a font supports."""
    from fontTools.ttLib import TTFont  # type: ignore[import-untyped]  # a dependency of Matplotlib

    with TTFont(path, fontNumber=0, lazy=True) as font:
        return frozenset(font.getBestCmap())
