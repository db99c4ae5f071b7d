"""Reports as HTML and Markdown."""

from PIL import Image

from llm2clip.evaluate.reporting.plots import plot_curves, plot_distributions, plot_intervals
from llm2clip.html_report import (
    Code,
    Details,
    Heading,
    ImageCard,
    ImageCards,
    Paragraph,
    Plot,
    ResultImage,
    ResultImages,
    Table,
    render_html,
    render_markdown,
    render_text,
)


def test_report_escapes_all_texts() -> None:
    text = "<img src=x onerror=alert(1)> | `code`"
    jpeg = Image.new("RGB", (2, 2)).tobytes()  # the bytes are embedded without being decoded
    images = [ResultImage(jpeg, True, text), ResultImage(jpeg, None, text)]
    blocks = [
        Heading(text), Paragraph(text), Code(text), Table([text], [[text], [1.25], [None]]), Plot("<svg></svg>", text),
        ResultImages(text, images), Details(text, text),
        ImageCards([ImageCard(text, [text], jpeg, "", {text: [text, text]}), ImageCard(text, [], None, text, {})]),
    ]  # fmt: skip
    page = render_html(text, blocks)
    assert "<img src=x" not in page and page.count("&lt;img src=x") == 25
    assert "<code>code</code>" in page and ">1.2<" in page and ">–<" in page
    assert "right: " in page and "wrong: " not in page
    markdown = render_markdown("T", blocks, "page.html")
    assert "page.html" in markdown and "\\| `code`" in markdown
    code = f"```\n{text}\n```"
    assert "<img" not in markdown.replace(code, "") and code in markdown


def test_markdown_escapes_tags_only() -> None:
    text = "<b>x</b> <!-- y --> 1 < 2 `<|end|>` `<b>` <|end|>"
    assert "&lt;b>x&lt;/b> &lt;!-- y --> 1 < 2 `<|end|>` `<b>` <|end|>\n" in render_markdown("T", [Paragraph(text)])


def test_plots_show_dollar_signs_as_text() -> None:
    label = r"$\frac{$ $x$"
    for svg in (
        plot_curves({label: [1.0, 2.0]}, [1, 2], label, label, tick_labels=[label, "b"]),
        plot_intervals({label: (1.0, 0.0, 2.0)}, label),
        plot_distributions({label: ([1, 20, 400], [2.0, 60.0, 100.0]), "b": ([3], [100.0])}, label, label),
    ):
        assert svg.count(label) >= 2


def test_html_report_is_accessible() -> None:
    """Wide tables can be scrolled with the keyboard, and each has a name of its own."""
    table = Table(["model", "R@1"], [["a", 1.0]])
    page = render_html("Evaluation", [table, Heading("Retrieval"), table, Plot("<svg></svg>", "a plot")])
    assert page.count("<main>") == page.count("</main>") == page.count("<h1>") == 1
    for label in ("Table 1: Evaluation", "Table 2: Retrieval"):
        assert f'<div class="scroll" role="region" tabindex="0" aria-label="{label}">' in page
    assert page.count('<th scope="col">') == 4 and '<svg role="img" aria-label="a plot">' in page


def test_markdown_omits_sections_that_consist_of_plots_and_images() -> None:
    plot = Plot("<svg></svg>", "a plot")
    table = Table(["a"], [[1]])
    blocks = [
        Heading("Results"), table,
        Heading("Loss", 3), Paragraph("about the plot"), plot,
        Heading("Details", 3), table, plot,
        Heading("Examples"), Heading("Good", 3), plot, Heading("Bad", 3), plot,
        Heading("Notes"), Paragraph("a note"),
    ]  # fmt: skip
    markdown = render_markdown("T", blocks)
    headings = [line.lstrip("# ") for line in markdown.splitlines() if line.startswith("#")]
    assert headings == ["T", "Results", "Details", "Notes"]
    assert "about the plot" not in markdown and "a note" in markdown and "Plots and images" not in markdown
    assert "Plots and images are in page.html" in render_markdown("T", blocks, "page.html")


def test_texts_of_image_cards_cannot_reorder_each_other() -> None:
    card = ImageCard("\u202ea.jpg", ["\u202e1", "2"], None, "", {"captions": ["\u202ex"]})
    page = render_html("T", [ImageCards([card])])
    for element in ("<bdi>\u202ea.jpg</bdi>", "<bdi>\u202e1</bdi>, <bdi>2</bdi>", '<li dir="auto">\u202ex</li>'):
        assert element in page


def test_text_report_is_aligned_and_has_no_control_characters() -> None:
    blocks = [Heading("Sizes"), Table(["name", "size"], [["[red]\x1b[31m", 12.5], ["b", None]]), Paragraph(":cat: [b]")]
    visual = [Heading("Plots"), Plot("<svg></svg>", "a plot")]
    lines = ["SIZES", "name           size", "[red]\\x1b[31m  12.5", "b                 –", "", ":cat: [b]"]
    assert render_text([*blocks, *visual]).splitlines() == lines
