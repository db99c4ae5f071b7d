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


def test_there_are_recipes() -> None:
    assert RECIPES


def test_an_unknown_setting_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    parser, _ = build()
    with pytest.raises(SystemExit):
        parser.parse_args(["fit", "a.jsonl", "--out", "r", "--align.epocs", "7"])
    assert "align.epocs" in capsys.readouterr().err
