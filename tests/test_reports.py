"""Reports as HTML, Markdown and text, and their verdicts in words."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from figures import plot_intervals
from llm2clip.evaluate.benchmarks.base import BenchmarkResult
from llm2clip.evaluate.comparison import (
    build_recall_table,
    describe_benchmark_results,
    describe_caption_retrieval,
    describe_percentage,
    get_informative_recalls,
)
from llm2clip.evaluate.metrics import retrieval_metrics
from llm2clip.evaluate.plots import plot_curves, plot_curves_with_intervals, plot_histograms
from llm2clip.evaluate.training_report import (
    _build_caption_retrieval_section,
    _build_retrieval_section,
    describe_distillation_result,
    describe_failed_tuning,
)
from llm2clip.reports import (
    CodeBlock,
    CollapsibleSection,
    Figure,
    Heading,
    Paragraph,
    ReportImage,
    ReportImageGroup,
    Table,
    format_cell,
    render_html,
    render_markdown,
    render_plain_text,
    write_report,
)

FIGURE, TABLE = Figure("<svg></svg>", "a plot"), Table(["a"], [[1]])


def test_report_escapes_all_texts(tmp_path: Path) -> None:
    text = "<img src=x onerror=alert(1)> | `code`"
    jpeg = Image.new("RGB", (2, 2)).tobytes()  # the bytes are embedded without being decoded
    thumbnails = [ReportImage(jpeg, text, is_correct=True), ReportImage(jpeg, text)]
    cards = [
        ReportImage(jpeg, title=text, details=[text], texts={text: [text, text]}),
        ReportImage(None, title=text, error=text),
    ]
    blocks = [
        Heading(text), Paragraph(text), CodeBlock(text), Table([text], [[text], [1.25], [None]]),
        Figure("<svg></svg>", text), ReportImageGroup(thumbnails, text, legend=[(text, "#fff")]),
        CollapsibleSection(text, text), ReportImageGroup(cards, as_cards=True),
    ]  # fmt: skip
    write_report(tmp_path / "page.html", text, text, blocks)
    page, markdown = (tmp_path / "page.html").read_text(), (tmp_path / "page.md").read_text()
    assert "<img src=x" not in page and page.count("&lt;img src=x") == 27
    assert "<code>code</code>" in page and ">1.2<" in page and ">–<" in page
    assert "correct: " in page and "wrong: " not in page
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
        plot_histograms({label: {1: 2, 20: 58, 400: 40}, "b": {3: 1}}, label, label),
    ):
        assert svg.count(label) >= 2


def test_reports_without_matplotlib_name_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    plots = [plot_curves({"a": [1.0, 2.0]}, [1, 2], "x", "y"), plot_histograms({"a": {1: 2}}, "x", "y")]
    plots.append(plot_curves_with_intervals({"a": [(1.0, 0.5, 1.5)]}, ["1"], "x", "y"))
    write_report(tmp_path / "page.html", "T", "", [TABLE, *(Figure(plot, "a plot") for plot in plots)])
    command = "pip install 'llm2clip[reports]'"
    assert (tmp_path / "page.html").read_text().count(f"<code>{command}</code>") == 3
    assert "\n\nImages and details are in page.html.\n" in (tmp_path / "page.md").read_text()
    assert capsys.readouterr().err == f"{tmp_path}/page.html has no plots. To add plots, run {command}\n"


def test_html_report_is_accessible() -> None:
    """Wide tables can be scrolled with the keyboard, and each has a name of its own."""
    page = render_html("Evaluation", [TABLE, Heading("Retrieval"), TABLE, FIGURE], "good")
    assert page.count("<main>") == page.count("</main>") == page.count("<h1>") == 1
    assert page.index("<h1>") < page.index('<p class="verdict">good</p>') < page.index("<table>")
    for label in ("Table 1: Evaluation", "Table 2: Retrieval"):
        assert f'<div class="scroll" role="region" tabindex="0" aria-label="{label}">' in page
    wide = render_html("T", [Table(["a", "b", 'c"', "d", "e"], [[1, 2, 3, 4, 5]])])
    assert '<table class="wide">' in wide and 'data-name="c&#34;">3</td>' in wide, "phones show a list for each row"
    assert page.count('<th scope="col">') == 2 and '<svg role="img" aria-label="a plot">' in page


def test_markdown_omits_sections_that_consist_of_plots_and_images() -> None:
    blocks = [
        Heading("Results"), TABLE,
        Heading("Loss", 3), Paragraph("about the plot"), FIGURE,
        Heading("Details", 3), TABLE, FIGURE,
        Heading("Examples"), Heading("Good", 3), FIGURE, Heading("Bad", 3), FIGURE,
        Heading("Notes"), Paragraph("a note"),
    ]  # fmt: skip
    markdown = render_markdown("T", blocks)
    headings = [line.lstrip("# ") for line in markdown.splitlines() if line.startswith("#")]
    assert headings == ["T", "Results", "Details", "Notes"]
    assert "about the plot" not in markdown and "a note" in markdown and "Plots and images" not in markdown
    with_verdict = render_markdown("T", blocks, "It works.", "page.html")
    assert with_verdict.startswith("# T\n\n**It works.**\n\nPlots and images are in page.html.\n")


def test_texts_of_cards_cannot_reorder_each_other() -> None:
    card = ReportImage(None, title="\u202ea.jpg", details=["\u202e1", "2"], texts={"rejected: \u202e": ["\u202ex"]})
    page = render_html("T", [ReportImageGroup([card], as_cards=True)])
    for element in (
        "<bdi>\u202ea.jpg</bdi>",
        "<bdi>\u202e1</bdi>, <bdi>2</bdi>",
        '<li dir="auto">\u202ex</li>',
        '<h4 class="bad">',
    ):
        assert element in page


def test_text_report_is_aligned_and_has_no_control_characters() -> None:
    blocks = [Heading("Sizes"), Table(["name", "size"], [["[red]\x1b[31m", 12.5], ["b", None]]), Paragraph(":cat: [b]")]
    lines = ["good\\x1b", "", "SIZES", "name           size", "[red]\\x1b[31m  12.5", "b                 –"]
    lines += ["", ":cat: [b]"]
    assert render_plain_text([*blocks, Heading("Plots"), FIGURE], "good\x1b").splitlines() == lines


# ---- verdicts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("percent", "text"),
    [
        (0.0, "0 of 100"), (0.4, "fewer than 1 of 100"), (3.2, "3 of 100"), (9.4, "9 of 100"), (9.6, "1 of 10"),
        (62.0, "6 of 10"), (94.9, "9 of 10"), (95.0, "95 of 100"), (99.9, "99 of 100"), (100.0, "all"),
    ],
)  # fmt: skip
def test_share_in_words_never_claims_more_than_the_percentage(percent: float, text: str) -> None:
    assert describe_percentage(percent) == text


def make_retrieval_result(model: str, recall: float, images: int = 1000, **row: Any) -> BenchmarkResult:
    row |= {"images": images, "T2I": {"R@10": recall}, "T2I chance": {"R@10": 1.0}, "T2I interval": {"R@10": (50, 71)}}
    return BenchmarkResult({"rows": [row]}, ranks={"captions": None}, model=model)  # type: ignore[dict-item]


def make_baseline(difference: float, low: float, high: float) -> BenchmarkResult:
    values = {"T2I": {"R@10": difference}, "T2I interval": {"R@10": (low, high)}}
    return make_retrieval_result("B", 50.0, difference=values)


FINDS = "M ranks the correct image in the top 10 of 1,000 for 6 of 10 captions (random order: 1 of 100)."


@pytest.mark.parametrize(
    ("others", "verdict"),
    [
        ([], ""),
        ([make_baseline(2.1, 0.8, 3.4)], " M beats B by 2.1 points of R@10 (95% interval 0.8 to 3.4)."),
        ([make_baseline(-2.0, -3.4, -0.8)], " M is 2.0 points of R@10 worse than B (95% interval 0.8 to 3.4)."),
        (
            [make_baseline(9.0, 8.0, 9.9), make_baseline(0.5, -1.0, 2.0)],  # the better baseline counts
            " The difference from B may be due to chance: +0.5 points of R@10 (95% interval -1.0 to +2.0).",
        ),
    ],
)
def test_retrieval_verdict_names_the_share_and_the_best_baseline(others: list[BenchmarkResult], verdict: str) -> None:
    assert describe_benchmark_results("coco", [make_retrieval_result("M", 62.0), *others]) == FINDS + verdict


def test_verdict_says_that_too_few_images_were_evaluated() -> None:
    few = describe_benchmark_results("data", [make_retrieval_result("M", 100.0, images=1)])
    assert "cannot be judged from 1 image." in few
    rough = describe_benchmark_results("data", [make_retrieval_result("M", 62.0, images=30)])
    assert "of 30 for 6 of 10" in rough and rough.endswith("recall is imprecise (95% interval 50 to 71%).")
    assert "from 3 images with two captions" in describe_caption_retrieval("E", {"images": 3, "CRA": 100.0})
    metrics = {"images": 5000, "CRA": 27.3}
    assert (
        describe_caption_retrieval("E", metrics)
        == "E retrieves the other caption of the same image for 3 of 10 captions (5,000 images)."
    )


def test_recall_that_a_random_order_reaches_is_not_shown() -> None:
    """With one image, every recall is 100.0, also that of a random order."""
    ranks = torch.zeros(1, dtype=torch.int64)
    row = {"truncated": 0, "texts": 1, **retrieval_metrics(ranks, ranks, ranks)}
    chance, model = build_recall_table({"M": row}, {}).rows
    assert set(chance[1:]) == {None} and set(model[1:]) == {None, "1", "none"}
    ranks = torch.zeros(6, dtype=torch.int64)
    row = retrieval_metrics(ranks, ranks, torch.arange(6))
    assert (
        get_informative_recalls(row, "T2I") == [100.0, 100.0, None]
        and get_informative_recalls(row, "T2I", " chance")[2] is None
    )


@pytest.mark.parametrize(
    ("summary", "verdict"),
    [
        ({"metrics": {"top-1": 71.0, "top-5": 90.0}}, "M predicts the correct class for 7 of 10 images in b."),
        ({"regions": 9, "rows": [{"metrics": {"top-1": 40}}]}, "M predicts the correct class for 4 of 10 boxes in b."),
        ({"metrics": {"text": 30.0, "image": 20.0, "group": 10.0}}, "M reaches 10.0% group on b."),
        ({"metrics": {"add_att": 30.0, "mean": 70.0}}, "M reaches 70.0% mean on b."),
        ({"rows": [{"metrics": {"mIoU": 16.5}}]}, "M reaches 16.5% mIoU on b."),
    ],
)
def test_verdict_of_other_benchmarks_names_the_main_metric(summary: dict[str, Any], verdict: str) -> None:
    assert describe_benchmark_results("b", [BenchmarkResult(summary, model="M")]) == verdict


def test_recall_table_says_that_the_number_of_truncated_texts_is_unknown() -> None:
    ranks = torch.zeros(20, dtype=torch.int64)
    row = {"truncated": None, "texts": 20, **retrieval_metrics(ranks, ranks, torch.arange(20))}
    table = build_recall_table({"M": row}, {})
    assert table.header[-1] == "truncated" and [cells[-1] for cells in table.rows] == [None, "unknown"]


def test_fit_report_compares_recall_of_each_caption_field_before_and_after_training() -> None:
    misses, hits = torch.full((20,), 5), torch.zeros(20, dtype=torch.int64)
    untrained, trained = [], []
    for field in ("captions", "captions_zh"):
        counts = {"captions": field, "images": 20, "texts": 20, "truncated": None}
        untrained.append(counts | retrieval_metrics(misses, misses, torch.arange(20)))
        trained.append(counts | retrieval_metrics(hits, hits, torch.arange(20)))
    _, table = _build_retrieval_section(untrained, trained)
    assert isinstance(table, Table) and table.highlight == {2, 5}
    assert [row[:2] for row in table.rows] == [
        ["captions (20 images, 20 texts)", "chance"],
        ["", "untrained"],
        ["", "trained"],
        ["captions_zh (20 images, 20 texts)", "chance"],
        ["", "untrained"],
        ["", "trained"],
    ]
    recalls = ["5.0 – 25.0 50.0", "0.0 0.0 to 16.8 0.0 100.0", "100.0 83.2 to 100.0 100.0 100.0"]  # in each direction
    for row, text in zip(table.rows, recalls * 2, strict=True):
        assert " ".join(map(format_cell, row[2:])) == f"{text} {text}"


def test_fit_report_of_an_untuned_encoder_has_no_row_for_the_tuned_one() -> None:
    raw = {"images": 100, "chance": 1.0, "CRA": 42.0, "CRA interval": (32.0, 52.0)}
    text, table = _build_caption_retrieval_section([raw], "minilm")
    assert text == Paragraph(
        "The encoder retrieves the other caption of the same image for 4 of 10 captions (100 images)."
    )
    assert table == Table(table.header, [["chance", 1.0, None], ["minilm", 42.0, "32.0 to 52.0"]])  # type: ignore[union-attr]
    assert _build_caption_retrieval_section([raw, raw], "minilm")[1].highlight == {2}  # type: ignore[union-attr]


def test_fit_report_says_if_tuning_did_not_help() -> None:
    raw, worse, better = ({"images": 50, "CRA": accuracy} for accuracy in (42.0, 41.0, 43.0))
    assert describe_failed_tuning([raw, worse]) == (
        " Tuning did not improve the caption encoder: the CRA was 42.0 before tuning and 41.0 after "
        "tuning. Use `--tune.steps 0`, or lower `--tune.lr`."
    )
    assert describe_failed_tuning([raw, raw])
    assert describe_failed_tuning([raw, better]) == describe_failed_tuning([raw]) == describe_failed_tuning([]) == ""
    assert describe_failed_tuning([{**raw, "images": 49}, worse]) == "", "too few images to say so"


def test_distillation_verdict_states_quality_and_speed() -> None:
    field = {"images": 100, "teacher": {"T2I": {"R@1": 20.0}}, "student": {"T2I": {"R@1": 19.6}}}
    result = {"fields": [field], "teacher": {"queries per second": 10.0}, "student": {"queries per second": 123.0}}
    speed = "encodes 12 times as many queries per second as the teacher on one CPU core"
    expected = f"The student retains 98% of the teacher's T2I R@1 (19.6 of 20.0) and {speed}."
    assert describe_distillation_result(result) == expected
    assert describe_distillation_result({**result, "fields": []}).endswith("because no images were held out.")
    few = describe_distillation_result({**result, "fields": [{**field, "images": 4}]})
    assert "98%" not in few and few.endswith("there are fewer than 50 held-out images (4).")
