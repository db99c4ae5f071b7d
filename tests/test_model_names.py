"""Tests of the check of model names before the hub is asked."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from llm2clip.cli import main
from llm2clip.models.clip_models import load_clip_text_encoder
from llm2clip.models.dual_encoder import open_dual_encoder
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.loading import (
    check_model_source,
    find_hub_problem,
    is_hub_id,
    load_transformers_config,
    read_config,
)
from llm2clip.models.official_checkpoint import load_official_checkpoint
from llm2clip.models.text.caption_encoder import CaptionEncoder
from llm2clip.models.vision.vision_tower import VisionTower

PATHS = (
    *("model", "./runs/model", "../model", "/runs/model", "~/model", "runs/mine/model", "runs\\model"),
    *("runs/model.pt", "runs/m.safetensors", "runs/m.GGUF", "runs/m.bin", "runs/", "/model", "runs/ model"),
)
LOADERS: dict[str, Callable[[str], Any]] = {
    "encoder": CaptionEncoder.from_pretrained,
    "tower": lambda name: VisionTower.from_pretrained(f"hf:{name}"),
    "model": LLM2CLIP.from_pretrained,
    "dual encoder": open_dual_encoder,
    "text encoder": load_clip_text_encoder,
    "checkpoint": load_official_checkpoint,
    "config": load_transformers_config,
}


@pytest.fixture
def hub_requests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """Requests to the hub, which cannot be reached. The hub's cache and the current folder are empty."""
    monkeypatch.chdir(tmp_path)
    requests: list[str] = []

    class Session:
        def head(self, url: str, **_: Any) -> None:
            requests.append(url)
            raise RuntimeError("no route to host")

    monkeypatch.setattr("huggingface_hub.get_session", Session)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    find_hub_problem.cache_clear()
    yield requests
    find_hub_problem.cache_clear()


def test_hub_ids_are_told_from_paths() -> None:
    for name in ("openai/clip-vit-base-patch16", "meta-llama/Llama-3.2-1B", "timm/vit_base_patch16_clip_224.openai"):
        assert is_hub_id(name)
    assert not any(is_hub_id(name) for name in PATHS)


@pytest.mark.parametrize("loader", LOADERS)
def test_paths_that_do_not_exist_are_not_sent_to_the_hub(loader: str, hub_requests: list[str]) -> None:
    for name in PATHS:
        with pytest.raises(FileNotFoundError, match="is neither an existing path nor a hub id"):
            LOADERS[loader](name)
    assert not hub_requests


@pytest.mark.parametrize("loader", LOADERS)
def test_without_a_network_the_hub_is_asked_once(loader: str, hub_requests: list[str]) -> None:
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match=r"^runs/model is neither .* cannot be reached .*no route to host"):
            LOADERS[loader]("runs/model")
    assert len(hub_requests) == 1
    assert constants.HF_HUB_OFFLINE  # the libraries do not retry


def test_models_in_the_cache_need_no_network(hub_requests: list[str], tmp_path: Path) -> None:
    (tmp_path / "hub/models--runs--model").mkdir(parents=True)
    check_model_source("runs/model")
    check_model_source(tmp_path)
    constants.HF_HUB_OFFLINE = True
    find_hub_problem.cache_clear()
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE"):
        check_model_source("runs/other")


def test_names_of_files_are_not_sent_to_the_hub(
    hub_requests: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("model.pt", "model"):
        (tmp_path / "runs" / name).write_bytes(b"x")
        assert read_config(f"runs/{name}") == {}
        assert main(["convert", f"runs/{name}", "--out", "out"]) == 1
    assert main(["convert", "runs/missing.pt", "--out", "out"]) == 1
    assert "neither an existing path nor a hub id" in capsys.readouterr().err
    assert not hub_requests


def test_push_without_a_network_is_an_error(
    hub_requests: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert main(["push", str(tmp_path), "me/model"]) == 1
    assert "cannot push to me/model: the hub cannot be reached" in capsys.readouterr().err


def test_weights_of_a_timm_model_name_are_looked_for_on_the_hub_once(hub_requests: list[str]) -> None:
    with pytest.raises(FileNotFoundError, match=r"^timm/resnet18\.a1_in1k is neither .* cannot be reached"):
        VisionTower.from_pretrained("timm:resnet18")
    assert len(hub_requests) == 1
    VisionTower.from_pretrained("timm:resnet18", pretrained=False)
