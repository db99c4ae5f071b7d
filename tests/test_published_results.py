"""Published results: values copied by hand from the project page, and the places that show them."""

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from llm2clip.evaluate.benchmarks import BENCHMARKS
from llm2clip.evaluate.benchmarks.base import BenchmarkResult
from llm2clip.evaluate.comparison import build_benchmark_section, build_caption_retrieval_section
from llm2clip.models.export.model_card import render_model_card
from llm2clip.published_results import (
    CRA,
    CRA_NOTE,
    PUBLISHED_NAMES,
    TABLES,
    VISION_TRANSFER_METRICS,
    get_published_metrics,
    get_published_notes,
    get_published_recalls,
)
from llm2clip.reports import Table, render_markdown

ROOT = Path(__file__).parents[1]


def test_published_rows_have_the_values_of_the_project_page() -> None:
    assert CRA == {
        "CLIP-L/14": 25.2, "EVA02-L/14": 27.11, "Llama3-8B": 5.2, "Llama3.2-1B": 5.6, "Llama3-8B-CC": 29.5,
        "Llama3.2-1B-CC": 29.4,
    }  # fmt: skip
    assert get_published_recalls("flickr30k")["2026: CLIP"] == (89.6, None, None, 77.8, None, None)
    assert get_published_recalls("coco")["2026: Llama-3-8B-CC"] == (62.7, None, None, 51.9, None, None)
    assert get_published_recalls("sharegpt4v")["2026: LLM2Vec-Llama-3-8B"] == (94.5, None, None, 96.4, None, None)
    assert get_published_recalls("urban1k")["2026: VLM2Vec"] == (90.9, None, None, 92.0, None, None)
    docci = get_published_recalls("docci")
    assert docci["2026: DeepSeek-R1-Distill-Llama-8B-CC"] == (82.5, None, None, 85.2, None, None)
    assert docci["2024: Llama3-8B-TC"] == (85.0, None, None, 87.8, None, None)
    assert get_published_recalls("flickr30k-cn")["2026: SigLIP2 + LLM2CLIP"] == (90.0, None, None, 76.1, None, None)
    assert get_published_recalls("coco-cn")["2024: EVA02 + LLM2CLIP"] == (69.1, 92.5, 97.2, 70.0, 92.6, 96.7)
    assert get_published_recalls("xm3600") == {
        "2026: EVA-L-224": (14.0, None, None, 8.0, None, None),
        "2026: EVA-L-224 + LLM2CLIP": (68.3, None, None, 56.0, None, None),
        "2026: SigLIP2": (59.7, None, None, 48.2, None, None),
        "2026: SigLIP2 + LLM2CLIP": (69.1, None, None, 56.3, None, None),
    }
    assert TABLES["vision_transfer"].get_cell("EVA02 + LLM2CLIP", "OV-COCO") == (28.9, 54.7, 48.0)
    assert get_published_recalls("xtd10") == {} == get_published_recalls("data")
    assert get_published_metrics("ade20k") == {"2026: EVA02": {"mIoU": 11.5}, "2026: EVA02 + LLM2CLIP": {"mIoU": 15.8}}
    assert get_published_metrics("cityscapes")["2026: EVA02 + LLM2CLIP"] == {"mIoU": 20.1}
    assert get_published_metrics("coco-object") == {}


def test_published_tables_are_complete() -> None:
    assert set(PUBLISHED_NAMES) | set(VISION_TRANSFER_METRICS) <= set(BENCHMARKS)
    for table in TABLES.values():
        assert re.fullmatch(r"LLM2CLIP project page, commit [0-9a-f]{7}, 20\d\d-\d\d-\d\d", table.source)
        assert all(len(cells) == len(table.columns) for cells in table.rows.values())
    for table in (TABLES["eva02_text_towers"], TABLES["clip_text_encoders"]):
        for name, cells in table.rows.items():
            *benchmarks, average = cells
            i2t, t2i = (sum(cell[n] for cell in benchmarks if cell) / len(benchmarks) for n in (0, 1))
            means = (i2t, t2i) if len(average or ()) == 2 else ((i2t + t2i) / 2,)
            # The page truncates or rounds some averages; a mistyped value would differ by more.
            assert average == pytest.approx(means, abs=0.12), name


def recalls(offset: float) -> dict[str, float]:
    return {"R@1": offset, "R@5": offset + 10, "R@10": offset + 20, "median rank": 2}


def retrieval_row(field: str, i2t: float, t2i: float) -> dict[str, Any]:
    chance, interval = {"R@1": 0.1, "R@5": 0.5, "R@10": 1.0}, {"R@1": (0.0, 1.0)}
    return {
        "captions": field, "images": 10, "texts": 20, "truncated": 0, "I2T": recalls(i2t), "T2I": recalls(t2i),
        "I2T chance": chance, "T2I chance": chance, "I2T interval": interval, "T2I interval": interval,
    }  # fmt: skip


def test_report_shows_published_rows_and_their_sources() -> None:
    result = BenchmarkResult({"rows": [retrieval_row("captions", 80.0, 70.0)]}, model="mine")
    report = render_markdown("x", build_benchmark_section(BENCHMARKS["flickr30k"], [result]))
    assert "| paper 2024: Llama3-8B-CC | 92.0 |" in report and "| paper 2026: Llama-3.1-8B-CC | 92.2 |" in report
    assert "| mine minus paper 2026: Llama-3.1-8B-CC | -12.2 |" in report
    notes = get_published_notes("flickr30k")
    assert len(notes) == 2 and all(note in report for note in notes)
    assert "commit cba3b45, 2026-02-01" in report and "commit b62fedf, 2024-11-20" in report


def test_report_compares_the_mean_over_languages_with_the_published_xm3600_rows() -> None:
    rows = [retrieval_row("captions_de", 60.0, 50.0), retrieval_row("captions_zh", 30.0, 20.0)]
    blocks = build_benchmark_section(BENCHMARKS["xm3600"], [BenchmarkResult({"rows": rows}, model="mine")])
    mean, german, _ = [block for block in blocks if isinstance(block, Table)]
    assert ["mine", 45.0, 55.0, 65.0, 35.0, 45.0, 55.0] in mean.rows
    assert ["paper 2026: SigLIP2 + LLM2CLIP", 69.1, None, None, 56.3, None, None] in mean.rows
    assert ["mine minus paper 2026: SigLIP2 + LLM2CLIP", "-24.1", None, None, "-21.3", None, None] in mean.rows
    assert not any("paper" in str(row[0]) for row in german.rows)


def test_model_card_with_cra_explains_the_corrected_values(tmp_path: Path) -> None:
    metrics = {
        "CRA": 30.0, "CRA interval": (29.0, 31.0), "chance": 0.1, "images": 10, "excluded": 0, "truncated": 0,
        "positive cosine": 0.5, "negative cosine": 0.1, "first to second": recalls(30), "second to first": recalls(30),
    }  # fmt: skip
    report = render_markdown("Caption retrieval", build_caption_retrieval_section("mine", metrics))
    (tmp_path / "report.md").write_text(report)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "llm2clip"}))
    card = render_model_card(model, "me/mine")
    assert "paper: Llama3-8B-CC, COCO | 29.5" in card and CRA_NOTE in card


def test_docs_have_the_current_tables_of_published_results() -> None:
    page = (ROOT / "docs/method.md").read_text(encoding="utf-8")
    render_page = runpy.run_path(str(ROOT / "docs/published_tables.py"))["render_page"]
    assert render_page(page) == page, "run: python docs/published_tables.py"
    assert "| EVA02 | 12.9 | 11.5 | 21.0 | 13.5 | 24.7 / 53.6 / 46.0 | 45.0 / 38.2 |" in page
    assert "| CN-CLIP | 80.2 / 68.0 | 63.4 / 64.0 | – |" in page and CRA_NOTE in page


def test_withdrawn_cra_values_appear_only_in_the_note() -> None:
    """Lines that name one of the paper's encoders must not have the CRA values that the authors withdrew."""
    withdrawn = re.compile(r"\b(66\.6|69\.8|18\.4|18\.3|73\.0|72\.8)\b")
    encoders = re.compile(r"CLIP-L/14|EVA02-L/14|Llama-?3")
    files = [*ROOT.glob("src/**/*.py"), *ROOT.glob("src/**/*.yaml"), *ROOT.glob("docs/**/*.md"), ROOT / "README.md"]
    found = set()
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            if withdrawn.search(line) and encoders.search(line):
                found.add(file.name)
    assert found == {"published_results.yaml", "method.md"}
