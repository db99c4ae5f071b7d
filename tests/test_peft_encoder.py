"""Caption encoders from LoRA adapters: merged embeddings, chains of adapters, and adapters that do not match."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm2clip import LLM2CLIP
from llm2clip.cli import main
from llm2clip.models.official_checkpoint import load_official_checkpoint
from llm2clip.models.published_encoders import LLAMA_3_1_8B, find_adapter, load_adapter_encoder
from llm2clip.models.text.caption_encoder import CaptionEncoder
from official_reference import FIXTURE, MAX_LENGTH, TEXTS, save_llm, save_lora
from test_published_checkpoints import write_checkpoint


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llm(tmp_path_factory.mktemp("llm"))


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return save_lora(tmp_path / "mntp", base, "mntp")


def test_chain_of_adapters_matches_the_authors_class(base: Path, adapter: Path, tmp_path: Path) -> None:
    """The reference merges the same two adapters with the LLM2Vec class of the authors' code."""
    second = save_lora(tmp_path / "supervised", base, "supervised")
    (second / "llm2vec_config.json").write_text(json.dumps({"pooling_mode": "mean", "max_length": MAX_LENGTH}))
    reference = json.loads(FIXTURE.read_text())["texts"]["adapters"]
    names = ["short", "longer", "other script", "spaces at the end"]
    expected = torch.tensor([reference[name] for name in names])
    for sources in ([adapter, second], [base, adapter, second]):
        encoder = load_adapter_encoder(sources)
        assert encoder.st.max_seq_length == MAX_LENGTH
        torch.testing.assert_close(encoder.encode([TEXTS[name] for name in names]), expected, atol=1e-5, rtol=0)
    other_order = load_adapter_encoder([base, second]).encode([TEXTS["short"]])
    assert not torch.allclose(other_order, expected[:1], atol=1e-2)


def test_adapter_whose_base_is_an_adapter(base: Path, adapter: Path, tmp_path: Path) -> None:
    second = save_lora(tmp_path / "supervised", adapter, "supervised")
    captions = list(TEXTS.values())
    assert torch.equal(
        load_adapter_encoder([second]).encode(captions), load_adapter_encoder([adapter, second]).encode(captions)
    )
    loop = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(adapter)}
    (adapter / "adapter_config.json").write_text(json.dumps(loop))
    with pytest.raises(ValueError, match="as its own base model"):
        load_adapter_encoder([adapter])


def test_adapter_of_a_causal_lm(base: Path, adapter: Path) -> None:
    """Its tensor names contain the decoder's name, and its task type requires an LM head."""
    expected = load_adapter_encoder([adapter]).encode(["a dog"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    renamed = {name.replace("model.layers", "model.model.layers"): tensor for name, tensor in tensors.items()}
    save_file(renamed, adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"task_type": "CAUSAL_LM"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert torch.equal(load_adapter_encoder([adapter]).encode(["a dog"]), expected)


def test_adapters_that_do_not_match_are_rejected(base: Path, adapter: Path, tmp_path: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.layers.0.mlp.up_proj.lora_A.weight"
    config = json.loads((adapter / "adapter_config.json").read_text())

    def check(message: str, error: type[Exception] = ValueError) -> None:
        with pytest.raises(error, match=message):
            load_adapter_encoder([adapter])

    save_file({n: t for n, t in tensors.items() if n != name}, adapter / "adapter_model.safetensors")
    check(rf"does not match the LLM: 1 tensors are missing.*{name}.*was trained on: {base}")
    save_file(tensors | {name: torch.zeros(4, 31)}, adapter / "adapter_model.safetensors")
    check(rf"wrong shape, including {name}")
    save_file(tensors, adapter / "adapter_model.safetensors")
    (adapter / "llm2vec_config.json").write_text('{"pooling_mode": "eos_token"}')
    check("pooling_mode is 'eos_token'; only 'mean' is supported")
    (adapter / "llm2vec_config.json").write_text('{"skip_instruction": false}')
    check("skip_instruction is false")
    (adapter / "llm2vec_config.json").unlink()
    (adapter / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": str(tmp_path / "gone")})
    )
    check(rf"LoRA adapter for {tmp_path}/gone.*llm2clip convert LLM {adapter} --out", FileNotFoundError)
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "IA3", "base_model_name_or_path": str(base), "target_modules": ["q_proj"]})
    )
    check("only LoRA adapters can be merged")
    with pytest.raises(ValueError, match=r"is not a PEFT adapter: it has no adapter_config\.json"):
        load_adapter_encoder([base, base])


def test_find_adapter_downloads_a_subfolder_of_a_repository(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository, _, subfolder = LLAMA_3_1_8B.rpartition("/")
    adapter.rename(tmp_path / subfolder)

    def download(name: str, allow_patterns: list[str]) -> str:
        assert name == repository
        assert {f"{subfolder}/adapter_config.json", f"{subfolder}/adapter_model.safetensors"} <= set(allow_patterns)
        assert all(pattern.startswith(subfolder) and "*" not in pattern for pattern in allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("llm2clip.models.loading.find_hub_problem", lambda: "")
    assert find_adapter(LLAMA_3_1_8B) == tmp_path / subfolder
    assert find_adapter(Path("weights.pt")) is None and find_adapter("C:\\weights\\model.pt") is None


def test_convert_command_merges_adapters(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second, out = save_lora(tmp_path / "supervised", base, "supervised"), tmp_path / "encoder"
    assert main(["convert", str(adapter), str(second), "--out", str(out)]) == 0
    output = capsys.readouterr().out
    assert f"Caption encoder: {out}" in output
    assert f"llm2clip fit DATA --out RUN --encoder.path {out}" in output
    captions = list(TEXTS.values())
    expected = load_adapter_encoder([adapter, second]).encode(captions)
    assert torch.equal(CaptionEncoder.from_pretrained(out, device="cpu").encode(captions), expected)
    assert main(["convert", str(adapter), "--out", str(out)]) == 1
    assert "exists" in capsys.readouterr().err
    assert main(["convert", str(adapter), "--out", str(tmp_path / "x"), "--to", "hf"]) == 1
    assert "--to and --text cannot be used with LoRA adapters" in capsys.readouterr().err

    checkpoint, model = write_checkpoint("siglip2", tmp_path), tmp_path / "model"
    assert main(["convert", str(checkpoint), "--out", str(model)]) == 0
    assert "--text ENCODER" in capsys.readouterr().out
    assert main(["convert", str(model), "--out", str(model), "--text", str(adapter)]) == 0
    assert torch.equal(
        LLM2CLIP.from_pretrained(model, device="cpu").encode_text(captions),
        load_official_checkpoint(checkpoint, text=adapter).encode_text(captions),
    )


def test_adapter_folders_are_rejected_as_encoders_with_the_command_to_convert_them(adapter: Path) -> None:
    with pytest.raises(ValueError, match=f"llm2clip convert {adapter} --out ENCODER"):
        CaptionEncoder.from_pretrained(adapter)
