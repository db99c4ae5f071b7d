"""The recipes in the repository are read by the command, and overrides act on them."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm2clip.cli import build
from llm2clip.recipes import AlignRecipe

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_recipes_parse(recipe: Path) -> None:
    parser, _ = build()
    given = parser.parse_args(["fit", "a.jsonl", "--out", "r", "--config", str(recipe), "--align.epochs", "7"]).fit
    assert given.align.epochs == 7
    assert given.data == ["a.jsonl"]
    assert given.align.batch == 128
    AlignRecipe(**vars(given.align))
    template = given.encoder.template
    assert template is None or template.count("{caption}") == 1


def test_the_papers_text_towers_have_recipes_that_tune_reads() -> None:
    parser, _ = build()
    names = {"llama-3-8b", "llama-3.1-8b", "llama-3.2-1b", "mistral-nemo-12b", "qwen2.5-0.5b"}
    papers = [r for r in RECIPES if r.name.removesuffix(".yaml") in names]
    assert len(papers) == len(names)
    for recipe in papers:
        tune = parser.parse_args(["tune", "a.jsonl", "--out", "r", "--config", str(recipe)]).tune.tune
        assert (tune.temperature, tune.lora_r, tune.lora_alpha, tune.lora_dropout) == (0.02, 16, 32, 0.05)
        assert tune.lr == 2e-4 and tune.batch * 8 == 512 and tune.warmup * tune.steps == 300


def test_there_are_recipes() -> None:
    assert RECIPES


def test_an_unknown_setting_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    parser, _ = build()
    with pytest.raises(SystemExit):
        parser.parse_args(["fit", "a.jsonl", "--out", "r", "--align.epocs", "7"])
    assert "align.epocs" in capsys.readouterr().err
