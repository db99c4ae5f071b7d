"""The quickstart's records, page of search results and last lines, on generated emoji."""

import ast
import base64
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from PIL import Image
from torch import Tensor

from llm2clip.data.image_refs import ImageRef
from llm2clip.data.images import decode_image
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.tools import quickstart
from llm2clip.tools.quickstart import (
    LANGUAGES,
    QUERIES,
    Emoji,
    _add_article_if_countable,
    _format_last_lines,
    _make_keyword_caption,
    _make_rows,
    _write_search_results,
    prepare_emoji_records,
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("LLM2CLIP_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "llm2clip"


SQUARE = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72"><rect width="40" height="40" fill="{}"/></svg>'


def test_prepare_emoji_records_deduplicates_and_splits_by_family(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("emoji")
    pytest.importorskip("resvg_py")
    colours = {
        "1F600": "gold", "1F43B": "brown", "1F43B-200D-2744-FE0F": "silver",  # face, bear, polar bear
        "1F3C4": "blue", "1F3C4-200D-2640-FE0F": "navy", "1F3C4-200D-2642-FE0F": "blue",  # two are drawn identically
        "1F3C4-1F3FB": "red", "1F1EF-1F1F5": "green",  # skin tone, flag
    }  # fmt: skip
    svg, keywords, groups = (cache / name for name in ("openmoji", "emoji-keywords", "emoji-subgroups"))
    (svg / "svg").mkdir(parents=True)
    (svg / "LICENSE").write_text("CC BY-SA 4.0")
    for id_, colour in colours.items():
        (svg / "svg" / f"{id_}.svg").write_text(SQUARE.format(colour))
    keywords.mkdir()
    lines = (
        "😀 grinning face <small>(face, grin, grinning face)</small>\n🏄 person surfing <small>(surf, wave)</small>\n"
    )
    (keywords / "all.csv").write_text(lines, encoding="utf-8")
    groups.mkdir()
    bear = {"character": "🐻", "category_slug": "animals-and-nature", "subcategory_slug": "animal-mammal"}
    (groups / "emojis.json").write_text(json.dumps([bear]))

    folder = prepare_emoji_records(tmp_path / "records", size=48, offline=True)
    rows = [json.loads(line) for line in (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    by_id = {row["id"]: row for row in rows}
    assert set(by_id) == {"1F600", "1F43B", "1F43B-200D-2744-FE0F", "1F3C4", "1F3C4-200D-2640-FE0F"}
    assert len(list((folder / "images").iterdir())) == len(rows)
    for row in rows:
        with Image.open(folder / row["image"]) as image:
            assert (image.size, image.mode) == ((48, 48), "RGB")
            assert image.getpixel((47, 47)) == (255, 255, 255)
        assert len({text.lower() for text in row["captions"]}) == len(row["captions"]) >= 2
        assert row["split"] in {"train", "val"}
        for language in LANGUAGES:
            (name,) = row[f"captions_{language}"]
            assert name == name.strip(": _")
    assert by_id["1F600"]["captions"] == ["grinning face", "grinning", "an emoji of grin"]
    assert by_id["1F43B"]["captions_zh"] == ["熊"]
    assert "It is a mammal" in by_id["1F43B"]["long_captions"][0]
    assert by_id["1F3C4-200D-2640-FE0F"]["captions"][-1] == "an emoji of surf, wave and woman"
    assert by_id["1F3C4"]["split"] == by_id["1F3C4-200D-2640-FE0F"]["split"]  # the same family
    captions = [text for row in rows for text in row["captions"]]
    assert len(captions) == len(set(captions))
    assert "CC BY-SA 4.0" in (folder / "README.md").read_text()

    def make_rows_while_another_process_finishes(emojis: list[Emoji]) -> list[dict[str, Any]]:
        shutil.copytree(folder, tmp_path / "shared")
        return _make_rows(emojis)

    monkeypatch.setattr(quickstart, "_make_rows", make_rows_while_another_process_finishes)
    assert prepare_emoji_records(tmp_path / "shared", size=48, offline=True) == tmp_path / "shared"


@pytest.mark.parametrize(
    ("name", "keywords", "subgroup", "from_keywords", "of_drawing"),
    [
        ("grapes", ["fruit", "grape", "grapes"], "food-fruit", None, "grapes"),
        ("unicorn", ["face", "unicorn"], "animal-mammal", "an emoji of a mammal: face", "a unicorn"),
        ("owl", ["bird", "wise"], "animal-bird", "an emoji of a bird: wise", "an owl"),
        ("foggy", ["fog", "foggy"], "sky-and-weather", "an emoji of fog", "foggy"),
        ("man", ["adult", "man"], "person", None, "a man"),
    ],
)
def test_captions_are_built_from_name_keywords_and_subgroup(
    name: str, keywords: list[str], subgroup: str, from_keywords: str | None, of_drawing: str
) -> None:
    assert _make_keyword_caption(name, keywords, subgroup) == from_keywords
    assert _add_article_if_countable(name, subgroup) == of_drawing


def test_search_results_page_shows_the_nearest_images_of_each_query(tmp_path: Path) -> None:
    for n in range(6):
        Image.new("RGB", (9, 9), (40 * n, 0, 0)).save(tmp_path / f"{n}.png")
    rows = [{"image": f"{n}.png", "captions": [f"image {n}"], "split": "val"} for n in range(6)]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = torch.arange(6).expand(len(QUERIES), 6) / 10

    class Model:
        def encode_image(self, images: list[ImageRef]) -> Tensor:
            assert [Path(str(image)).name for image in images] == [f"{n}.png" for n in range(6)]
            return torch.zeros(6, 1)

        def encode_text(self, texts: tuple[str, ...]) -> Tensor:
            assert texts == QUERIES
            return torch.ones(len(texts), 1)

        def similarity(self, texts: Tensor, images: Tensor) -> Tensor:
            assert texts.all() and not images.any()
            return scores

    page = tmp_path / "search.html"
    _write_search_results(cast(LLM2CLIP, Model()), tmp_path / "captions.jsonl", page)
    parts = page.read_text(encoding="utf-8").split('class="query">')[1:]
    assert [part.partition("<")[0] for part in parts] == list(QUERIES)
    for part in parts:
        assert re.findall(r'alt="([\d.]+)"', part) == ["0.500", "0.400", "0.300", "0.200", "0.100"]
        jpegs = re.findall(r"base64,([^\"]+)", part)
        reds = [int(decode_image(base64.b64decode(jpeg))[0].float().mean()) for jpeg in jpegs]
        assert reds == pytest.approx([200, 160, 120, 80, 40], abs=3)


def test_last_lines_are_quoted_for_the_shell() -> None:
    commands = [shlex.split(line, comments=True) for line in _format_last_lines(Path("my 'own' run"))[-3:]]
    assert commands[0][:2] == ["python", "-c"]
    assert repr(str(Path("my 'own' run/model"))) in ast.unparse(ast.parse(commands[0][2]))
    assert [command[:2] for command in commands[1:]] == [["llm2clip", "fit"]] * 2
