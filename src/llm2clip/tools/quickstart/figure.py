"""What queries found, as one picture: a row for each query, its text on the left and its best images on the right."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from llm2clip.models.pretrained import AssetError, resolve_pretrained

__all__ = ["Row", "draw_results", "wrap"]

Row = tuple[str, Sequence[Image.Image | str | Path], Sequence[float]]  # a query, its images, their scores

TEXT, THUMB, GAP, MARGIN = 320, 168, 14, 32
SCORE_LINE, MAX_LINES = 24, 9
INK, GREY, LINE, GREEN = "#1a1a1a", "#8a8a8a", "#e4e4e4", "#2e9e5b"
CJK_FAMILIES = (
    "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "Noto Sans CJK JP", "PingFang SC", "Hiragino Sans GB",
    "Microsoft YaHei", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei",
)  # fmt: skip


def draw_results(
    rows: Sequence[Row],
    out: str | Path,
    title: str,
    *,
    correct: Sequence[Collection[int]] | None = None,
    columns: int = 5,
    offline: bool = False,
) -> Path:
    """Write a PNG with a row for each query and its first `columns` images; correct ones get a green frame.

    correct: for each row the places (0 is the first image) that are right. Chinese, Japanese and Korean need a font
    that has them: the system's, or else a small one is fetched once (2.3 MB; not with `offline`).
    """
    if correct is not None and len(correct) != len(rows):
        raise ValueError(f"{len(rows)} rows, but correct answers for {len(correct)}")
    texts = [_lines(query, offline) for query, _, _ in rows]
    heights = [max(THUMB + SCORE_LINE, len(lines) * step) + 2 * GAP for lines, _, step in texts]
    top = MARGIN + 28 + GAP
    width = 2 * MARGIN + TEXT + columns * (THUMB + GAP)
    picture = Image.new("RGB", (width, top + sum(heights) + MARGIN), "white")
    draw = ImageDraw.Draw(picture)
    title_font = _font(title, 24, offline)
    draw.text((MARGIN, MARGIN), _shortened(title, title_font, width - 2 * MARGIN), fill=INK, font=title_font)

    y = top
    small = _font("0.123", 14, offline)
    for number, ((_, images, scores), (lines, font, step), height) in enumerate(zip(rows, texts, heights, strict=True)):
        draw.line((MARGIN, y, width - MARGIN, y), fill=LINE, width=1)
        # The text stands beside the middle of the pictures, not of the row: the scores below them do not count.
        text_top = y + (height - SCORE_LINE - step * len(lines)) // 2 if len(lines) * step <= THUMB else y + GAP
        for line in lines:
            draw.text((MARGIN, text_top), line, fill=INK, font=font)
            text_top += step
        for place, (image, score) in enumerate(list(zip(images, scores, strict=True))[:columns]):
            x = MARGIN + TEXT + GAP + place * (THUMB + GAP)
            right = correct is not None and place in correct[number]
            _place(picture, draw, image, (x, y + GAP), right)
            draw.text(
                (x + THUMB // 2, y + GAP + THUMB + 6),
                f"{score:.3f}",
                fill=GREEN if right else GREY,
                font=small,
                anchor="mt",
            )
        y += height
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.part")
    picture.save(part, format="PNG", optimize=True)
    part.replace(out)
    return out


def _place(
    picture: Image.Image, draw: ImageDraw.ImageDraw, image: Image.Image | str | Path, at: tuple[int, int], right: bool
) -> None:
    """An image whole inside its square, with a frame."""
    if isinstance(image, Image.Image):
        whole = ImageOps.exif_transpose(image)
    else:
        with Image.open(image) as opened:
            whole = ImageOps.exif_transpose(opened)
    if whole.has_transparency_data:
        rgba = whole.convert("RGBA")
        whole = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    fitted = ImageOps.contain(whole.convert("RGB"), (THUMB - 8, THUMB - 8), Image.Resampling.LANCZOS)
    x, y = at
    picture.paste(fitted, (x + (THUMB - fitted.width) // 2, y + (THUMB - fitted.height) // 2))
    edge, width = (GREEN, 4) if right else (LINE, 1)
    draw.rounded_rectangle((x, y, x + THUMB - 1, y + THUMB - 1), radius=6, outline=edge, width=width)


def _lines(query: str, offline: bool) -> tuple[list[str], ImageFont.FreeTypeFont, int]:
    """A query as lines, their font and their height: smaller letters if it is long, cut where it is very long."""
    for size in (20, 16, 14):
        font = _font(query, size, offline)
        lines = wrap(query, font, TEXT - GAP)
        if len(lines) * (size + 8) <= THUMB + SCORE_LINE:
            break
    if len(lines) > MAX_LINES:
        lines = [*lines[: MAX_LINES - 1], _shortened(" ".join(lines[MAX_LINES - 1 :]), font, TEXT - GAP)]
    return lines, font, size + 8


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines no wider than `width`: broken at spaces, and within scripts without spaces and too long words anywhere."""
    lines, line = [], ""
    for word in _pieces(text):
        while True:
            joined = line + word if line else word.lstrip()
            if font.getlength(joined.rstrip()) <= width:
                line = joined
                break
            if line.strip():
                lines.append(line.strip())
                line = ""
                continue
            fits = max((n for n in range(1, len(word)) if font.getlength(word[:n]) <= width), default=1)
            if fits >= len(word):
                line = word
                break
            lines.append(word[:fits].strip())
            word = word[fits:]
    return [*lines, line.strip()] if line.strip() else lines


def _pieces(text: str) -> list[str]:
    """Where a line may break: at a space and beside a Chinese or Japanese character, but before no closing mark."""
    pieces: list[str] = []
    for char in " ".join(text.split()):
        wide = "\u2e80" <= char <= "\u9fff" or "\uff00" <= char <= "\uffef"
        after_wide = bool(pieces) and ("\u2e80" <= pieces[-1][-1] <= "\u9fff" or "\uff00" <= pieces[-1][-1] <= "\uffef")
        closing = char in "、。，．！？：；）」』】》〉ーっゃゅょッャュョ,.!?:;)"
        if not pieces or char == " " or ((wide or after_wide) and not closing):
            pieces.append(char)
        else:
            pieces[-1] += char
    return pieces


def _shortened(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text, cut with an ellipsis if it is wider than `width`."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def _font(text: str, size: int, offline: bool) -> ImageFont.FreeTypeFont:
    """The font that has the most of a text's characters: the plain one that Matplotlib carries if that has them all."""
    wanted = {ord(char) for char in text if not char.isspace()}
    best = plain = _matplotlib_font("DejaVu Sans")
    assert plain is not None  # Matplotlib ships it
    if missing := wanted - _characters(plain):
        wider = _cjk_font(offline)
        if wider is not None and len(wanted - _characters(wider)) < len(missing):
            best = wider
    return ImageFont.truetype(str(best), size)


@cache
def _cjk_font(offline: bool) -> str | None:
    for family in CJK_FAMILIES:
        if path := _matplotlib_font(family):
            return path
    try:
        return str(next(Path(resolve_pretrained("cjk-font", offline=offline)).glob("*.ttc")))
    except AssetError:
        return None  # boxes in place of letters are better than no picture


@cache
def _matplotlib_font(family: str) -> str | None:
    from matplotlib import font_manager

    try:  # by its scores: a family is listed in the order of the file system, in which an oblique face may be the first
        return str(font_manager.findfont(font_manager.FontProperties(family=[family]), fallback_to_default=False))
    except ValueError:
        return None


@cache
def _characters(path: str) -> frozenset[int]:
    from fontTools.ttLib import TTFont  # type: ignore[import-untyped]  # Matplotlib needs it: it is there

    with TTFont(path, fontNumber=0, lazy=True) as font:
        return frozenset(font.getBestCmap())
