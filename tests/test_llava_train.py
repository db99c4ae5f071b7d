"""Tests of LLaVA training: trained weights, cached features, resuming, several processes and the command."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import Killed, emulate_fsdp_launch, make_llm, run_distributed
from llava_fixtures import load_model, load_weights, make_conversations, make_vision_tower
from llm2clip.cli import main
from llm2clip.data.image_facts import load_training_image_hashes
from llm2clip.data.image_refs import FileImage
from llm2clip.data.skip_log import SkipLog
from llm2clip.llava import LlavaConfig
from llm2clip.llava import train as train_module
from llm2clip.llava.build import build_llava
from llm2clip.llava.conversations import Conversation
from llm2clip.llava.train import train_llava
from llm2clip.runs.output_folder import save_or_check_config
from llm2clip.tools.runs import format_run_table

SMALL = LlavaConfig(
    pretrain_epochs=1, pretrain_batch_size=4, epochs=1, batch_size=4, micro_batch_size=2, lr=1e-2, pretrain_lr=1e-2,
    save_steps=2, precision="fp32",
)  # fmt: skip
LORA = replace(SMALL, lora_r=4, lora_alpha=8)


@pytest.fixture(scope="module")
def conversations(image_folder: Path) -> list[Conversation]:
    return make_conversations(image_folder)


def train(
    source: Path | str,
    pretrain: list[Conversation],
    instruct: list[Conversation],
    config: LlavaConfig,
    out: Path,
    log: SkipLog | None = None,
) -> Path:
    return train_llava(str(source), pretrain, instruct, config=config, out=out, log=log or SkipLog())


@pytest.fixture(scope="module")
def small_run(tiny_llava: Path, conversations: list[Conversation], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of both stages with the settings `SMALL` and cached features."""
    return train(tiny_llava, conversations, conversations, SMALL, tmp_path_factory.mktemp("small") / "run").parent


def changed_names(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_each_stage_changes_only_its_own_weights(
    tiny_llava: Path,
    small_run: Path,
    conversations: list[Conversation],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    initial, both = load_weights(tiny_llava), load_weights(small_run / "model")
    pretrained = initial | load_file(small_run / "pretrain/learned.safetensors")
    assert changed_names(initial, pretrained) == {name for name in initial if "multi_modal_projector" in name}
    assert changed_names(pretrained, both) == {name for name in initial if "vision_tower" not in name}
    metrics = [json.loads(line) for line in (small_run / "instruct/metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["train_loss"] > 0

    lora = load_weights(train(tiny_llava, [], conversations, LORA, tmp_path / "lora"))
    assert "train_runtime" not in "".join(capsys.readouterr())  # the Trainer's dicts are not printed
    linear = {name for name in initial if "language_model" in name and "_proj" in name}
    assert changed_names(initial, lora) == linear | {name for name in initial if "projector" in name}


def test_cached_features_give_the_same_result_as_pixels(
    tiny_llava: Path, small_run: Path, conversations: list[Conversation], tmp_path: Path
) -> None:
    cached = load_weights(small_run / "model")
    assert (small_run / "features/manifest.json").is_file()
    uncached_config = replace(SMALL, cache_gb=0)
    uncached = load_weights(train(tiny_llava, conversations, conversations, uncached_config, tmp_path / "uncached"))
    assert not (tmp_path / "uncached/features").exists()
    for name, tensor in cached.items():
        torch.testing.assert_close(tensor, uncached[name], atol=2e-3, rtol=0, msg=name)


@pytest.mark.parametrize("case", ["CLIP", "convolutional with LoRA"])
def test_train_llava_resumes_exactly(
    case: str, tiny_llava: Path, conversations: list[Conversation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case == "CLIP":  # transformers saves its weights under other names than those of the parameters
        llm = make_llm(tmp_path / "llm", layers=2)
        tiny_llava = build_llava(make_vision_tower("clip_vision_model", tmp_path), str(llm), tmp_path / "built")
    config = replace(SMALL if case == "CLIP" else LORA, epochs=2)
    conversations = [*conversations[:11], conversations[-1]]  # three steps in the first stage and in each epoch
    uninterrupted = load_weights(train(tiny_llava, conversations, conversations, config, tmp_path / "uninterrupted"))
    steps = 0
    training_step = train_module._LlavaTrainer.training_step

    def interrupted_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps in (5, 13, 19):  # in the first stage, and in both epochs of the second, after a checkpoint
            raise Killed
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(train_module._LlavaTrainer, "training_step", interrupted_step)
    out = tmp_path / "interrupted"
    for _ in range(3):
        with pytest.raises(Killed):
            train(tiny_llava, conversations, conversations, config, out)
    save_or_check_config({"llava": config}, out)
    (out / "instruct/metrics.jsonl").write_text('{"step": 4, "loss": 1.5}\n')  # written every tenth step
    assert re.search("llava .* instruct  4 of 6  1.500", format_run_table(out)[0])
    (out / "instruct/checkpoint-99").mkdir(parents=True)  # an incomplete checkpoint
    resumed = load_weights(train(tiny_llava, conversations, conversations, config, out))
    for name, tensor in uninterrupted.items():
        assert torch.equal(tensor, resumed[name]), name


def test_train_llava_raises_for_non_finite_values(
    tiny_llava: Path, conversations: list[Conversation], tmp_path: Path
) -> None:
    diverging = replace(SMALL, lr=1e30, pretrain_lr=1e30)
    with pytest.raises(FloatingPointError):
        train(tiny_llava, conversations, conversations, diverging, tmp_path / "run")
    assert not (tmp_path / "run/model").exists()


def test_train_llava_rejects_settings_that_leave_nothing_to_train_on(
    tiny_llava: Path, conversations: list[Conversation], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="max_length must be at least"):
        train(tiny_llava, conversations, [], replace(SMALL, max_length=40), tmp_path / "short")
    with pytest.raises(ValueError, match="no conversations"):
        train(tiny_llava, conversations[-1:], [], SMALL, tmp_path / "text_only")


def test_train_llava_replaces_conversations_whose_image_cannot_be_decoded(
    tiny_llava: Path, conversations: list[Conversation], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    not_an_image = FileImage(str(tiny_llava / "config.json"))
    mixed = [Conversation("bad", not_an_image, (("What?", "Red."),)), *conversations[:7]]
    uncached = replace(SMALL, cache_gb=0)
    assert train(tiny_llava, mixed, [], uncached, tmp_path / "uncached").is_dir()
    assert "cannot be decoded" in caplog.text
    with pytest.raises(ValueError, match="the following conversations are also unusable"):
        train(tiny_llava, mixed[:1], [], uncached, tmp_path / "all_bad")
    log = SkipLog(tmp_path / "skipped.jsonl", 0.5)
    assert train(tiny_llava, mixed, [], SMALL, tmp_path / "cached", log).is_dir()
    assert log.skipped.total() == 1


# ---- several processes ----------------------------------------------------------------------------------------------


def _train_with_ddp_and_fsdp(source: str, conversations: list[Conversation], out: str) -> None:
    from accelerate.state import AcceleratorState
    from torch.distributed.fsdp import FSDPModule

    train(source, conversations, conversations, SMALL, Path(out) / "ddp")
    emulate_fsdp_launch()
    AcceleratorState._reset_state(reset_partial_state=True)
    training_step = train_module._LlavaTrainer.training_step
    steps = 0

    def interrupted_step(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        inner = model.get_decoder() if hasattr(model, "get_decoder") else model
        assert isinstance(model, FSDPModule)
        assert isinstance(inner.layers[0], FSDPModule)
        steps += 1
        if steps in (3, 8):  # after a checkpoint of each stage
            raise Killed
        return training_step(self, model, *args, **kwargs)

    train_module._LlavaTrainer.training_step = interrupted_step  # type: ignore[method-assign]
    for _ in range(2):
        with pytest.raises(Killed):
            train(source, conversations, conversations, SMALL, Path(out) / "fsdp2")
    train(source, conversations, conversations, SMALL, Path(out) / "fsdp2")


def test_two_processes_match_one(tiny_llava: Path, conversations: list[Conversation], tmp_path: Path) -> None:
    """Includes batches without an image on one of the ranks. Under FSDP2, the run is also interrupted and resumed."""
    text_only = [Conversation(f"t{n}", None, (("Hello?" * n, "Hi."),)) for n in range(1, 9)]
    mixed = [*conversations[:12], *text_only]
    run_distributed(2, _train_with_ddp_and_fsdp, str(tiny_llava), mixed, str(tmp_path))
    expected = load_weights(train(tiny_llava, mixed, mixed, SMALL, tmp_path / "one"))
    for kind in ("ddp", "fsdp2"):
        for name, tensor in load_weights(tmp_path / kind / "model").items():
            torch.testing.assert_close(tensor, expected[name], atol=2e-4, rtol=0, msg=f"{kind}: {name} differs")


# ---- commands -------------------------------------------------------------------------------------------------------


def test_train_command_reads_records_and_llava_json(
    tiny_llava: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    messages = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "It is red."}]
    rows = [{"id": n, "image": f"{n}.png", "conversations": messages} for n in range(8)]
    file = tmp_path / "mix.json"
    file.write_text(json.dumps(rows))
    command = ["llava", "train", str(tiny_llava), "--out", str(tmp_path / "run"), "--images", str(image_folder)]
    command += ["--pretrain", f"{image_folder}/captions.jsonl@train", "--instruct", str(file)]
    command += ["--llava.micro_batch_size", "4", "--llava.pretrain_batch_size", "16", "--llava.batch_size", "4"]
    assert main(command) == 0
    assert "105 conversations to train the projector, 8 to train the projector and the LLM" in capsys.readouterr().out
    assert load_model(tmp_path / "run/model")[0].config.model_type == "fast_vlm"
    training_images = load_training_image_hashes(tmp_path / "run/model")
    assert training_images is not None and len(training_images) == 32, "30 of the split train, and two others"

    assert main(command) == 0, "repeating the command must find the result"
    assert main([*command, "--llava.lr", "1"]) == 1
    assert "different settings" in capsys.readouterr().err
    assert main(["llava", "train", str(tiny_llava), "--out", str(tmp_path / "none")]) == 1
    assert "no conversations" in capsys.readouterr().err
