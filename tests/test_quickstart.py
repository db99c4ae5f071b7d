"""The quickstart's records, page of search results and last lines, on generated emoji."""

import ast
import base64
import json
import re
import shlex
import shutil
from collections import Counter
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from PIL import Image
from torch import Tensor

from llm2clip.data.image_refs import ImageRef
from llm2clip.data.images import decode_image
from llm2clip.io_utils import atomic_write_jsonl, read_jsonl
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.tools import quickstart
from llm2clip.tools.quickstart import (
    EMOJI_FILE,
    LANGUAGES,
    QUERIES,
    _format_next_steps,
    _write_search_page,
    make_emoji_rows,
    prepare_emoji_dataset,
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("LLM2CLIP_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "llm2clip"


PEOPLE = re.compile(r"\b(wo)?m[ae]n\b|\b(persons?|people|boys?|girls?|family|facing right)\b")
SQUARE = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72"><rect width="40" height="40" fill="{}"/></svg>'


def test_prepare_emoji_records_draws_images_and_adds_names_in_other_languages(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("emoji")
    pytest.importorskip("resvg_py")
    colours = {"1F600": "gold", "1F43B": "brown"}  # face, bear
    svg = cache / "openmoji" / "svg"
    svg.mkdir(parents=True)
    (svg.parent / "LICENSE").write_text("CC BY-SA 4.0")
    for id_, colour in colours.items():
        (svg / f"{id_}.svg").write_text(SQUARE.format(colour))
    table = [row for _, row in read_jsonl(EMOJI_FILE) if row["id"] in colours]
    atomic_write_jsonl(tmp_path / "emoji.jsonl", table)
    monkeypatch.setattr(quickstart, "EMOJI_FILE", tmp_path / "emoji.jsonl")

    folder = prepare_emoji_dataset(tmp_path / "records", size=48, offline=True)
    by_id = {row["id"]: row for _, row in read_jsonl(folder / "captions.jsonl")}
    assert by_id.keys() == colours.keys()
    for row in by_id.values():
        with Image.open(folder / row["image"]) as image:
            assert (image.size, image.mode) == ((48, 48), "RGB")
            assert image.getpixel((47, 47)) == (255, 255, 255)
        for language in LANGUAGES:
            (name,) = row[f"captions_{language}"]
            assert name == name.strip(": _")
    assert by_id["1F43B"]["captions_zh"] == ["熊"]
    assert "CC BY-SA 4.0" in (folder / "README.md").read_text()

    def make_rows_while_another_process_finishes() -> list[dict[str, Any]]:
        shutil.copytree(folder, tmp_path / "shared")
        return make_emoji_rows()

    monkeypatch.setattr(quickstart, "make_emoji_rows", make_rows_while_another_process_finishes)
    assert prepare_emoji_dataset(tmp_path / "shared", size=48, offline=True) == tmp_path / "shared"


def test_table_of_emoji_has_distinct_captions_and_splits_by_family() -> None:
    pytest.importorskip("emoji")
    rows = {row["id"]: row for row in make_emoji_rows()}
    assert len(rows) == 1625
    names = Counter(row["captions"][0].lower() for row in rows.values())
    captions = Counter(text.lower() for row in rows.values() for text in row["captions"])
    assert all(count == 1 or text in names for text, count in captions.items())
    for row in rows.values():
        assert len({text.lower() for text in row["captions"]}) == len(row["captions"]) >= 2
        assert len(row["long_captions"]) == 1 and row["split"] in {"train", "val"}
    assert rows["1F600"]["captions"] == ["grinning face", "grinning", "an emoji of a smiling face: grin"]
    assert "It is a mammal" in rows["1F43B"]["long_captions"][0]
    splits: dict[str, set[str]] = {}  # of each family, such as that of "man surfing" and "woman surfing"
    for row in rows.values():
        family = " ".join(PEOPLE.sub(" ", row["captions"][0].lower()).split())
        splits.setdefault(family, set()).add(row["split"])
    assert len(splits) < 1500
    assert [family for family, family_splits in splits.items() if len(family_splits) > 1] == []


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
    _write_search_page(cast(LLM2CLIP, Model()), tmp_path / "captions.jsonl", page)
    parts = page.read_text(encoding="utf-8").split('class="query">')[1:]
    assert [part.partition("<")[0] for part in parts] == list(QUERIES)
    for part in parts:
        assert re.findall(r'alt="([\d.]+)"', part) == ["0.500", "0.400", "0.300", "0.200", "0.100"]
        jpegs = re.findall(r"base64,([^\"]+)", part)
        reds = [int(decode_image(base64.b64decode(jpeg))[0].float().mean()) for jpeg in jpegs]
        assert reds == pytest.approx([200, 160, 120, 80, 40], abs=3)


def test_last_lines_are_quoted_for_the_shell() -> None:
    commands = [shlex.split(line, comments=True) for line in _format_next_steps(Path("my 'own' run"))[-3:]]
    assert commands[0][:2] == ["python", "-c"]
    assert repr(str(Path("my 'own' run/model"))) in ast.unparse(ast.parse(commands[0][2]))
    assert [command[:2] for command in commands[1:]] == [["llm2clip", "fit"]] * 2
