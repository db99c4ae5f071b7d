"""Weights stored in bf16 for encoding: identical embeddings, less memory, and no use that needs fp32 weights."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conftest import FAMILIES, make_llm
from llm2clip import LLM2CLIP, open_dual_encoder
from llm2clip.config import Stage
from llm2clip.data.skip_log import SkipLog
from llm2clip.evaluate.embeddings import ModelEmbeddings
from llm2clip.models import precision as precision_choice
from llm2clip.models.precision import (
    AUTO_PRECISION,
    Precision,
    calibrate_precision,
    cast_linear_weights,
    offload_llm_layers,
    resolve_precision,
)
from llm2clip.models.text.caption_encoder import CaptionEncoder, load_encoder_for_evaluation
from llm2clip.store.encode import embed

CPU = torch.device("cpu")
TEXTS = ["a dog runs", "two cats sleep in the snow", "x", "a boat", "four boats on a lake in the morning"]


@pytest.mark.parametrize(
    ("device", "has_bf16", "expected"),
    [
        ("cuda", True, "bf16 bf16 measured bf16 bf16 bf16 measured measured"),
        ("cuda", False, "fp32 fp32 fp32 fp32 fp32 fp32 fp32 fp32"),
        ("cpu", True, "bf16 bf16 measured fp32 fp32 bf16 fp32 measured"),
        ("cpu", False, "fp32 fp32 fp32 fp32 fp32 fp32 fp32 fp32"),
        ("mps", True, "fp32 fp32 fp32 fp32 fp32 fp32 fp32 fp32"),
    ],
)
def test_auto_precision_depends_on_stage_and_device(
    device: str, has_bf16: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other values than `auto` are returned unchanged."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has_bf16, "avx2": True}, raising=False)
    precisions = [resolve_precision(stage, "auto", torch.device(device), lambda: "bf16+7") for stage in AUTO_PRECISION]
    assert precisions == expected.replace("measured", "bf16+7").split()
    assert resolve_precision("align", "fp16", torch.device(device)) == "fp16"


def test_precision_has_a_dtype_and_a_number_of_fp32_layers() -> None:
    properties = {name: (Precision(name).dtype, Precision(name).num_fp32_layers) for name in ("fp32", "fp16", "bf16+2")}
    assert properties == {"fp32": (torch.float32, 0), "fp16": (torch.float16, 0), "bf16+2": (torch.bfloat16, 2)}
    assert json.loads(json.dumps(Precision("bf16"))) == "bf16"
    with pytest.raises(ValueError, match=r"precision must be fp32, fp16, bf16, or bf16\+N.*'int8'"):
        Precision("int8")


def test_documented_table_equals_the_table_in_the_code() -> None:
    docs = (Path(__file__).parents[1] / "docs/howto/models.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.+`) \| (\w+) \| (\w+) \| fp32 \|$", docs, re.MULTILINE)
    documented = {stage: (cuda, cpu) for stages, cuda, cpu in rows for stage in re.findall(r"\w+", stages)}
    for stage, precisions in AUTO_PRECISION.items():
        assert documented[stage] == (precisions["cuda"], precisions["cpu"])


def linear_dtypes(encoder: CaptionEncoder) -> list[torch.dtype]:
    """Return the dtype of each layer's first linear weight."""
    return [layer.self_attn.o_proj.weight.dtype for layer in encoder.llm.layers]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16+2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_identical_after_move_for_encoding(family: str, precision: str, tmp_path: Path) -> None:
    encoder = CaptionEncoder.from_pretrained(make_llm(tmp_path, family), device="cpu")
    expected = encoder.encode(TEXTS, precision=precision)
    encoder.move_for_encoding("cpu", precision)
    assert torch.equal(encoder.encode(TEXTS, precision=precision), expected)
    assert torch.equal(encoder.encode(TEXTS), expected)  # the default is the precision of the weights
    fp32_layers = {"fp32": 3, "bf16": 0, "bf16+2": 2}[precision]
    assert linear_dtypes(encoder) == [torch.float32] * fp32_layers + [torch.bfloat16] * (3 - fp32_layers)


def test_encoder_in_bf16_rejects_uses_that_need_fp32_weights(encoder: CaptionEncoder, tmp_path: Path) -> None:
    uses: list[Callable[[], object]] = [
        lambda: encoder.encode(TEXTS, precision="fp32"),
        lambda: encoder.encode(TEXTS, precision="bf16+2"),
        lambda: encoder.move_for_encoding("cpu", "fp32"),
        encoder.identity,
        lambda: encoder.save_pretrained(tmp_path),
    ]
    expected = encoder.encode(TEXTS, precision="bf16")
    encoder.move_for_encoding("cpu", "bf16+1")
    for use in uses:
        with pytest.raises(ValueError, match=r"converted to bf16\+1.*Load the encoder again"):
            use()
    assert torch.equal(encoder.encode(TEXTS, precision="bf16"), expected)  # the fp32 weights are cast again
    assert not list(tmp_path.iterdir())


def test_weights_that_embeddings_share_stay_in_fp32(encoder: CaptionEncoder) -> None:
    llm = encoder.llm
    llm.head = nn.Linear(32, 300, bias=False)
    llm.head.weight = llm.embed_tokens.weight
    cast_linear_weights(llm, Precision("bf16"))
    assert llm.head.weight.dtype == llm.embed_tokens.weight.dtype == llm.norm.weight.dtype == torch.float32
    assert linear_dtypes(encoder) == [torch.bfloat16] * 3


def test_layers_offloaded_moves_one_layer_at_a_time(encoder: CaptionEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here, both devices are the CPU. The moves to and from the device are recorded."""
    expected = calibrate_precision(encoder), encoder.encode(TEXTS)
    layers = list(encoder.llm.layers)
    moves: list[tuple[int, str]] = []
    monkeypatch.setattr(
        precision_choice,
        "_move_layer",
        lambda layer, device: moves.append((layers.index(layer), type(device).__name__)),
    )
    with offload_llm_layers(encoder, CPU):
        embeddings = encoder.encode(TEXTS)
        in_order = [(n, name) for n in range(3) for name in ("device", "str")]
        assert moves == in_order
        with torch.autocast("cpu", torch.bfloat16):
            assert not torch.is_autocast_cache_enabled()  # autocast keeps no bf16 copies of the layers
        assert (calibrate_precision(encoder), embeddings)[0] == expected[0]
    assert torch.equal(embeddings, expected[1])
    assert torch.is_autocast_cache_enabled()
    moves.clear()
    encoder.encode(TEXTS)
    assert not moves and list(encoder.llm.layers) == layers


@pytest.mark.parametrize("precision", ["bf16", "bf16+1"])
def test_embed_on_a_device_writes_the_same_store(encoder: CaptionEncoder, precision: str, tmp_path: Path) -> None:
    other = copy.deepcopy(encoder)
    expected = embed(TEXTS, encoder, tmp_path / "a", precision=precision)
    store = embed(TEXTS, other, tmp_path / "b", precision=precision, device=CPU)
    assert store.manifest == expected.manifest
    assert [shard.sha256 for shard in store.shards] == [shard.sha256 for shard in expected.shards]
    assert encoder.has_full_precision and not other.has_full_precision
    embed(TEXTS[:2], encoder, tmp_path / "b", precision=precision, device=CPU)  # a complete store needs no encoder
    assert encoder.has_full_precision


@pytest.mark.parametrize(("precision", "stage"), [("bf16", "evaluate"), ("auto", "serve")])
def test_open_dual_encoder_loads_only_the_weights_of_the_precision(
    model_folder: Path, precision: str, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    expected = open_dual_encoder(str(model_folder), CPU).encode_texts_raw(TEXTS, False)
    loaded: list[CaptionEncoder] = []
    move = CaptionEncoder.move_for_encoding

    def record(self: CaptionEncoder, *args: Any) -> None:
        loaded.append(self)
        move(self, *args)

    monkeypatch.setattr(CaptionEncoder, "move_for_encoding", record)
    dual_encoder = open_dual_encoder(str(model_folder), CPU, precision, stage=stage)
    assert bool(loaded) == (stage == "serve")
    embeddings = dual_encoder.encode_texts_raw(TEXTS, False)
    assert linear_dtypes(loaded[0]) == [torch.bfloat16] * len(loaded[0].llm.layers)
    assert len(loaded) == 1 and torch.cosine_similarity(embeddings, expected).min() > 0.99
    fp32 = LLM2CLIP.from_pretrained(model_folder, CPU)
    assert torch.equal(fp32.encode_text(TEXTS, precision="bf16"), embeddings)


def test_commands_run_in_fp32_on_the_cpu_by_default(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    dual_encoder = open_dual_encoder(str(model_folder), CPU)
    assert dual_encoder.precision == "fp32"
    expected = LLM2CLIP.from_pretrained(model_folder, CPU).encode_text(TEXTS, precision="fp32")
    assert torch.equal(dual_encoder.encode_texts_raw(TEXTS, False), expected)
    encoder = load_encoder_for_evaluation(model_folder, CPU)
    assert encoder.has_full_precision and encoder.device == CPU


def test_auto_uses_the_bf16_precision_that_the_model_was_trained_with(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    model = LLM2CLIP.from_pretrained(model_folder, CPU)
    model.config.encoder["precision"] = "bf16+1"
    assert model.load_encoder("auto") == "bf16+1"
    assert model.load_encoder("auto") == "bf16+1"  # already loaded
    assert linear_dtypes(model.encoder) == [torch.float32] + [torch.bfloat16] * (len(model.encoder.llm.layers) - 1)
    monkeypatch.setattr("torch.cpu.get_capabilities", dict, raising=False)
    model = LLM2CLIP.from_pretrained(model_folder, CPU)
    model.config.encoder["precision"] = "bf16+1"
    assert model.load_encoder("auto") == "fp32"  # this CPU does not support bf16


def test_cached_embeddings_depend_on_the_precision(model_folder: Path, tmp_path: Path) -> None:
    folders = []
    for precision in ("fp32", "bf16"):
        dual_encoder = open_dual_encoder(str(model_folder), CPU, precision)
        folders.append(ModelEmbeddings(dual_encoder, SkipLog(), tmp_path).folder)
    assert folders[0] != folders[1]


def test_model_with_encoder_in_bf16_is_saved_with_its_fp32_weights(model_folder: Path, tmp_path: Path) -> None:
    model = LLM2CLIP.from_pretrained(model_folder, CPU)
    assert model.load_encoder("bf16") == "bf16"
    assert model.load_encoder("bf16") == "bf16"  # already loaded
    model.save_pretrained(tmp_path / "copy")
    for name in ("model.safetensors", "text/model.safetensors"):
        assert (tmp_path / "copy" / name).read_bytes() == (model_folder / name).read_bytes()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_encoders_with_layers_under_another_name_run_without_fp32_layers(precision: str) -> None:
    """For example, DistilBERT has `transformer.layer` and T5 `encoder.block`."""
    linear = nn.Linear(4, 4)
    with precision_choice.autocast_llm(linear, torch.device("cpu"), precision_choice.Precision(precision)):
        assert linear(torch.ones(1, 4)).dtype == precision_choice.Precision(precision).dtype
