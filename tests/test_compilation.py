"""Compilation of the tower's blocks: when it is used, and that a compiled run equals an uncompiled run."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounterWithBackend

from align_fixtures import ALIGN, fresh_model, killed_after, run_align
from conftest import emulate_fsdp_launch, run_distributed
from llm2clip.data.records import Record
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.store.store import EmbeddingStore
from llm2clip.train import align as align_module
from llm2clip.train import optim
from llm2clip.train.optim import MIN_COMPILED_STEPS, compile_blocks, should_compile, uncompile_blocks

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
TWO_STEPS = dataclasses.replace(ALIGN, epochs=2 / 3)


@pytest.fixture(autouse=True)
def restore_dynamo_config() -> Iterator[None]:
    with torch._dynamo.config.patch(suppress_errors=False):
        yield


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """Compile all runs of align, and count the compiled functions. The backend computes the same values as PyTorch."""
    return always_compile(monkeypatch)


def always_compile(patch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    patch.setattr(optim, "COMPILE_BACKEND", counter)
    patch.setattr(align_module, "should_compile", lambda *args: True)
    return counter


def test_only_long_runs_on_gpus_with_equal_blocks_are_compiled() -> None:
    tower = fresh_model().tower
    assert should_compile(tower, CUDA, MIN_COMPILED_STEPS)
    assert not should_compile(tower, CUDA, MIN_COMPILED_STEPS - 1)
    assert not should_compile(tower, CPU, MIN_COMPILED_STEPS)
    assert not should_compile(fresh_model(tower="test_efficientnet").tower, CUDA, MIN_COMPILED_STEPS)
    assert not should_compile(tower.requires_grad_(False), CUDA, MIN_COMPILED_STEPS)
    with torch._dynamo.config.patch(disable=True):  # as with TORCH_COMPILE_DISABLE=1
        assert not should_compile(tower.requires_grad_(True), CUDA, MIN_COMPILED_STEPS)


def test_compiled_blocks_are_announced_run_in_training_only_and_are_restored(
    counter: CompileCounterWithBackend, capsys: pytest.CaptureFixture[str]
) -> None:
    tower = fresh_model().tower
    names, pixels = list(tower.state_dict()), torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    compile_blocks(tower)
    assert "Compiling the vision tower" in capsys.readouterr().out
    assert list(tower.state_dict()) == names
    tower.eval()(pixels)
    assert counter.frame_count == 0
    tower.train()(pixels)
    assert counter.frame_count == 1  # one for all blocks
    uncompile_blocks(tower)
    tower(torch.zeros(3, 3, 64, 64, dtype=torch.uint8))
    assert counter.frame_count == 1


def test_blocks_run_uncompiled_if_compilation_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        raise RuntimeError("there is no C compiler")

    torch._dynamo.reset()
    monkeypatch.setattr(optim, "COMPILE_BACKEND", fail)
    tower = fresh_model().tower.train()
    pixels = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    expected = tower(pixels)
    compile_blocks(tower)
    torch.testing.assert_close(tower(pixels), expected)


@pytest.mark.parametrize("change", [{"micro_batch_size": 4}, {"lora_r": 2}], ids=lambda change: str(change))
def test_compiled_run_equals_uncompiled_run(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    """The compiled run is killed in the middle and resumed. The same checkpoints continue without compilation."""
    config = dataclasses.replace(ALIGN, **change)
    expected = train(tmp_path / "uncompiled", config)
    with monkeypatch.context() as patch:
        counter = always_compile(patch)
        with killed_after(3):
            train(tmp_path / "compiled", config)
        compiled_functions = counter.frame_count
        assert compiled_functions > 0
        with killed_after(5):
            train(tmp_path / "compiled", config)
        assert counter.frame_count == compiled_functions  # nothing is compiled again for later batches
    model = train(tmp_path / "compiled", config)
    assert_equal_weights(model, expected.state_dict())


def test_compiled_runs_on_two_ranks_equal_one_process(
    records: list[Record], store: EmbeddingStore, tmp_path: Path
) -> None:
    run_distributed(2, _align_on_rank, records, str(store.folder), tmp_path)
    expected = run_align(records, store, tmp_path / "one", TWO_STEPS)
    for launch in ("ddp", "fsdp"):
        assert_equal_weights(expected, load_file(tmp_path / launch / "trained.safetensors"))


def _align_on_rank(records: list[Record], store: str, folder: Path) -> None:
    """Train with DDP and then with FSDP, in the same processes."""
    half = dataclasses.replace(TWO_STEPS, batch_size=ALIGN.batch_size // 2)
    for launch in ("ddp", "fsdp"):
        if launch == "fsdp":
            emulate_fsdp_launch()
        with pytest.MonkeyPatch.context() as patch:
            counter = always_compile(patch)
            model = run_align(records, EmbeddingStore(store), folder / launch, half)
        assert counter.frame_count > 0
        if torch.distributed.get_rank() == 0:
            save_file(model.state_dict(), folder / launch / "trained.safetensors")
        torch.distributed.barrier()


def assert_equal_weights(model: LLM2CLIP, expected: dict[str, torch.Tensor]) -> None:
    actual = model.state_dict()
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, atol=1e-4, rtol=0, msg=name)
