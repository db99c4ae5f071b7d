"""The claims on generated pictures and random models, judged by cases worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from conftest import make_llm
from llm2clip.cli import main
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
from llm2clip.tools.reproduce.datasets import glosses, sentences, split_in_two
from llm2clip.tools.reproduce.statistics import (
    ALIKE,
    HOLDS,
    REVERSED,
    UNTESTED,
    WAY,
    Claim,
    Comparison,
    bootstrap_interval,
    compare_hits,
)


def command(pictures: Path, models: Path, out: Path, *more: str) -> list[str]:
    captions = '["captions.jsonl@train"]'
    held = '["captions.jsonl@val"]'
    settings = {
        "tune": captions, "exclude": held, "pairs": '["pairs.jsonl"]', "cra": held, "train": captions, "test": held,
        "dense": held, "foreign": "captions_xx", "llm": str(models / "llm"), "layers": "2",
        "plain": str(models / "plain"), "larger": str(models / "larger"), "tower": str(models / "tower"),
        "image_size": "32", "width": "8", "steps": "2", "batch": "4", "epochs": "2", "seeds": "2", "cost_images": "4",
        "cost_steps": "2",
    }  # fmt: skip
    dotted = [part for name, value in settings.items() for part in (f"--reproduce.{name}", value)]
    return ["reproduce", str(pictures), "--out", str(out), *dotted, *more]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    """Random language models and a random tower, in folders."""
    import timm

    folder = tmp_path_factory.mktemp("models")
    for name, layers, seed in (("llm", 3, 0), ("plain", 1, 1), ("larger", 4, 2)):
        make_llm(folder / name, layers=layers, seed=seed)
    timm.models.save_for_hf(timm.create_model("test_efficientnet"), folder / "tower", safe_serialization=True)
    pairs = [{"query": f"word {n}", "positive": f"what the word {n} means"} for n in range(8)]
    (pictures / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder


def test_all_claims_and_again(
    pictures: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every claim is tested, the report is whole, and the same command does no work again."""
    out = tmp_path / "run"
    assert main(command(pictures, models, out)) == 0
    claims = {int(f.stem): json.loads(f.read_text()) for f in (out / "claims").iterdir()}
    assert sorted(claims) == [1, 2, 3, 4, 5, 6]
    assert [row[0] for row in claims[2]["rows"]] == [
        "llm, first 2 blocks, raw",
        "llm, first 2 blocks after 2 steps of captions",
        "larger, raw",
        "plain",
        "larger after 2 steps of general text pairs",
        "larger after 2 steps of captions",
    ]
    assert claims[3]["points"] == ["1 sentence", "whole"]
    ranks = json.loads((out / "ranks/cc-1-captions.json").read_text())
    assert len(ranks["of_image"]) == 6 and len(ranks["of_text"]) == 15
    hits = sum(rank < 1 for rank in ranks["of_image"])
    row = next(row for row in claims[2]["rows"] if row[0].endswith("of captions"))
    other = json.loads((out / "ranks/cc-0-captions.json").read_text())
    assert row[1] == pytest.approx(100 * (hits + sum(rank < 1 for rank in other["of_image"])) / 12)
    found = [rank < 1 for some in (ranks, other) for rank in some["of_text"]]  # two or three captions an image
    assert row[2] == pytest.approx(100 * sum(found) / len(found))
    page = (out / "report.html").read_text()
    assert "<script" not in page and "<svg" in page and "http://" not in page.replace("http://www.w3.org", "")
    assert "6. With the cached teacher" in (out / "report.md").read_text()

    def never(*_: object, **__: object) -> None:
        raise AssertionError("this was done before")

    for name in ("tune", "fill", "align", "caption_accuracy"):
        monkeypatch.setattr(f"llm2clip.tools.reproduce.experiments.{name}", never)
    capsys.readouterr()
    assert main(command(pictures, models, out)) == 0
    assert "claim 6:" in capsys.readouterr().out
    assert main(command(pictures, models, out, "--reproduce.steps", "3")) == 1
    assert "begun with other settings" in capsys.readouterr().err


def test_a_claim_without_its_data_is_said_to_be_untested(
    pictures: Path, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = command(pictures, models, tmp_path / "run", "--reproduce.foreign_column", "captions_yy", "--claims")
    assert main([*run, "4"]) == 1
    assert "no claim could be tested: 4: " in capsys.readouterr().err
    assert main([*run, "1", "4"]) == 0
    assert "claim 4 is not tested" in capsys.readouterr().out
    report = (tmp_path / "run/report.md").read_text()
    assert "| not tested |" in report and "no column 'captions_yy'" in report
    assert main(command(pictures, models, tmp_path / "other", "--claims", "7")) == 1
    assert "no claim 7" in capsys.readouterr().err


def test_verdicts() -> None:
    """Two hundred images, of which so many are found, by one seed."""

    def found(count: int, start: int = 0) -> torch.Tensor:
        values = torch.zeros(1, 200, dtype=torch.float64)
        values[:, start : start + count] = 1
        return values

    def compared(low: torch.Tensor, high: torch.Tensor) -> Comparison:
        return compare_hits("a", "b", "R@1", low, high)

    apart, back = compared(found(20), found(100)), compared(found(100), found(20))
    way = compared(found(50), found(60))  # the same images and ten more
    alike = compared(found(50), found(60, start=100))  # others: chance could do it
    assert [c.verdict for c in (apart, back, way, alike)] == [HOLDS, REVERSED, WAY, ALIKE]
    assert compared(found(0), found(1)).verdict == ALIKE  # none of 200 may be up to three
    assert compared(found(0), found(12)).verdict == HOLDS
    for comparisons, verdict in (
        ([], UNTESTED),
        ([apart], HOLDS),
        ([way], WAY),
        ([alike], ALIKE),
        ([back], "does not hold"),
        ([apart, back], "holds in part"),
        ([apart, way], "holds in part"),
        ([way, alike], ALIKE),
        ([way, back], "does not hold"),
    ):
        assert Claim(1, comparisons=comparisons).verdict == verdict


def test_intervals_of_images_and_of_seeds() -> None:
    """By the binomial's spread where seeds agree; wider where they do not."""
    values = torch.zeros(1, 200, dtype=torch.float64)
    values[:, :50] = 1
    spread = 196 * (0.25 * 0.75 / 200) ** 0.5
    assert bootstrap_interval(values) == pytest.approx((25, 25 - spread, 25 + spread), abs=0.8)
    assert bootstrap_interval(values.repeat(3, 1)) == pytest.approx(bootstrap_interval(values), abs=1e-9)
    seeds = values.repeat(3, 1)
    seeds[0] = 0
    seeds[2, 50:100] = 1
    middle, low, high = bootstrap_interval(seeds)
    assert middle == 25 and high - low > 1.5 * 2 * spread
    assert bootstrap_interval(torch.zeros(2, 100)) == (0.0, 0.0, 3.0)
    assert bootstrap_interval(torch.ones(2, 100)) == (100.0, 97.0, 100.0)
    assert bootstrap_interval(-torch.ones(2, 100)) == (-100.0, -100.0, -97.0)


def test_texts_that_are_made() -> None:
    assert split_in_two(("a", "b", "c", "d", "e")) == ("a b", "c d e")
    assert split_in_two(("a", "b", "c")) == ()
    assert sentences("A room. It has 2 chairs! Is it red?") == ["A room.", "It has 2 chairs!", "Is it red?"]


def test_glosses_of_wordnet(tmp_path: Path) -> None:
    """A line with two words, a definition and two examples, and one without an example."""
    licence = "  1 This software and database is being provided to you\n"
    lines = (
        '00001740 03 n 02 entity 0 thing_of(a) 0 001 ~ 00001930 n 0000 | that which is; "one"; "a second one"\n'
        "00001930 03 n 01 physical_entity 0 000 | an entity that has existence\n"
    )
    for part in ("noun", "verb", "adj", "adv"):
        (tmp_path / f"data.{part}").write_text(licence + (lines if part == "noun" else ""))
    found = list(glosses(tmp_path))
    assert [(pair.anchor, pair.positive) for pair in found] == [
        ("entity, thing of", "that which is"),
        ("one", "entity: that which is"),
        ("physical entity", "an entity that has existence"),
    ]


def test_a_page_escapes_what_it_is_given() -> None:
    evil = "<img src=x onerror=alert(1)> | `code`"
    picture = Image.new("RGB", (2, 2))
    file = Path(__file__)  # any bytes will do
    blocks = [
        Heading(evil), Paragraph(evil), Code(evil), Table([evil], [[evil], [1.25], [None]]), Plot("<svg></svg>", evil),
        ResultImages(evil, [ResultImage(file.read_bytes()[:10], True, evil), ResultImage(picture.tobytes(), None, evil)]),
    ]  # fmt: skip
    page = to_html(evil, blocks)
    assert "<img src=x" not in page and page.count("&lt;img src=x") == 13
    assert "<code>code</code>" in page and ">1.2<" in page and ">–<" in page
    assert "right: " in page and "wrong: " not in page
    text = to_markdown("T", blocks, "page.html")
    assert "page.html" in text and "\\| `code`" in text
