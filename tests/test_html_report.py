"""Reports as HTML and Markdown."""

from __future__ import annotations

from PIL import Image

from llm2clip.html_report import (
    Code,
    Heading,
    Paragraph,
    Plot,
    ResultImage,
    ResultImages,
    Table,
    to_html,
    to_markdown,
)


def test_report_escapes_all_texts() -> None:
    text = "<img src=x onerror=alert(1)> | `code`"
    jpeg = Image.new("RGB", (2, 2)).tobytes()  # the bytes are embedded without being decoded
    images = [ResultImage(jpeg, True, text), ResultImage(jpeg, None, text)]
    blocks = [
        Heading(text), Paragraph(text), Code(text), Table([text], [[text], [1.25], [None]]), Plot("<svg></svg>", text),
        ResultImages(text, images),
    ]  # fmt: skip
    page = to_html(text, blocks)
    assert "<img src=x" not in page and page.count("&lt;img src=x") == 13
    assert "<code>code</code>" in page and ">1.2<" in page and ">–<" in page
    assert "right: " in page and "wrong: " not in page
    markdown = to_markdown("T", blocks, "page.html")
    assert "page.html" in markdown and "\\| `code`" in markdown
