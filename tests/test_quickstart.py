"""The quickstart's records and figure, on generated emoji."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from llm2clip.tools.quickstart.captions import drawing_caption, keyword_caption
from llm2clip.tools.quickstart.figure import _matplotlib_font, draw_results
from llm2clip.tools.quickstart.openmoji import LANGUAGES, prepare_emoji_records


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

    folder = prepare_emoji_records(tmp_path / "records", size=48, offline=True, progress=False)
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


@pytest.mark.parametrize(
    ("name", "keywords", "subgroup", "from_keywords", "of_drawing"),
    [
        ("grapes", ["fruit", "grape", "grapes"], "food-fruit", None, "a drawing of grapes"),
        ("unicorn", ["face", "unicorn"], "animal-mammal", "an emoji of a mammal: face", "a drawing of a unicorn"),
        ("owl", ["bird", "wise"], "animal-bird", "an emoji of a bird: wise", "a drawing of an owl"),
        ("foggy", ["fog", "foggy"], "sky-and-weather", "an emoji of fog", "a drawing of foggy"),
        ("man", ["adult", "man"], "person", None, "a drawing of a man"),
    ],
)
def test_captions_are_built_from_name_keywords_and_subgroup(
    name: str, keywords: list[str], subgroup: str, from_keywords: str | None, of_drawing: str
) -> None:
    assert keyword_caption(name, keywords, subgroup) == from_keywords
    assert drawing_caption(name, subgroup) == of_drawing


def test_draw_results_has_one_row_per_query(tmp_path: Path) -> None:
    square, wide = Image.new("RGB", (60, 60), "red"), Image.new("RGBA", (300, 20), (0, 0, 255, 128))
    wide.save(tmp_path / "wide.png")
    rows = [("a red square", [square, tmp_path / "wide.png"], [0.9, 0.1]), ("word " * 400, [square], [0.5])]
    one_row = Image.open(draw_results(rows[:1], tmp_path / "one.png", "One", offline=True))
    two_rows = Image.open(draw_results(rows, tmp_path / "two.png", "Two", correct=[{0}, set()], offline=True))
    assert one_row.width == two_rows.width == 64 + 320 + 5 * 182
    assert one_row.height < two_rows.height < one_row.height + 400  # a very long text is truncated
    assert (46, 158, 91) in {color for _, color in two_rows.getcolors(1 << 20) or []}
    with pytest.raises(ValueError, match="2 rows, but `correct` has 1 entries"):
        draw_results(rows, tmp_path / "bad.png", "Bad", correct=[{0}])


def test_matplotlib_font_is_upright_regardless_of_list_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matplotlib lists fonts in file-system order, which differs between machines."""
    from matplotlib import font_manager

    faces = font_manager.fontManager.ttflist
    for fonts in (faces, faces[::-1]):
        monkeypatch.setattr(font_manager.fontManager, "ttflist", list(fonts))
        _matplotlib_font.cache_clear()
        assert Path(_matplotlib_font("DejaVu Sans")).name == "DejaVuSans.ttf"
    _matplotlib_font.cache_clear()
    assert _matplotlib_font("No Such Family") is None
