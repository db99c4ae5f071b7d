"""The files of a published checkpoint: a folder, a file or a hub repository to tensors by name. No code is run."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from llm2clip.data.images import Preprocess


def read_checkpoint(source: str | Path) -> tuple[dict[str, Any], dict[str, Any], Preprocess | None]:
    """What a checkpoint holds by name, its config.json, and its preprocessor_config.json where there is one.

    Args:
        source: a folder or hub id with model.safetensors (also in shards), pytorch_model.bin, or one .pt file; or one
            such file of weights, beside which nothing is read.

    Raises:
        FileNotFoundError: there is no such file, folder or repository.
        ValueError: it holds no weights, or more than tensors.
    """
    path = Path(source)
    if path.is_file():
        return _load(path), {}, None
    folder = path if path.is_dir() else _download(str(source))
    name = select_weights_file([p.name for p in folder.iterdir()], str(source))
    tensors = _load_shards(folder / name) if name.endswith(".index.json") else _load(folder / name)
    preprocess = read_json(folder / "preprocessor_config.json")
    return tensors, read_json(folder / "config.json"), Preprocess.from_dict(preprocess) if preprocess else None


def select_weights_file(names: list[str], where: str) -> str:
    """The file of weights, or their index, among the files of a folder.

    The repositories of EVA towers hold a .pt file beside another form, whose text half is not LLM2CLIP's.
    """
    pickles = [name for name in names if name.endswith(".pt")]
    if len(eva := [name for name in pickles if "EVA" in name]) == 1:
        return eva[0]
    whole = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    for name in whole:
        if name in names:
            return name
    if len(pickles) == 1:
        return pickles[0]
    raise ValueError(
        f"{where} holds none of {', '.join(whole)}, nor a single .pt file; name the file of weights instead"
    )


def _load(path: Path) -> dict[str, Any]:
    """Tensors by name, out of what they may be wrapped in."""
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is damaged, or was not fetched whole ({reason})") from error
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, and to read that is to run it. If you trust it, keep its state dict "
            f"alone, with safetensors.torch.save_file or torch.save, where you made it ({str(error).splitlines()[0]})"
        ) from error
    for wrapper in ("state_dict", "module", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"{path} holds a {type(content).__name__}, not tensors by name")
    return dict(content)


def read_safetensors(path: Path) -> dict[str, Any]:
    """What a file of safetensors holds.

    Raises:
        ValueError: it is damaged.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or was not fetched whole ({error})") from error


def _load_shards(index: Path) -> dict[str, Any]:
    placed: dict[str, str] = read_json(index)["weight_map"]
    tensors: dict[str, Any] = {}
    for name in sorted(set(placed.values())):
        if Path(name).name != name:
            raise ValueError(f"{index} names a shard {name!r} outside its folder")
        tensors |= _load(index.parent / name)
    if odd := sorted(tensors.keys() ^ placed.keys()):
        raise ValueError(f"{index} and its shards do not agree on {odd[:8]}")
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is no file."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _download(name: str) -> Path:
    """A hub repository: the files that are read and no others."""
    from huggingface_hub import list_repo_files, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    beside = ["config.json", "preprocessor_config.json"]
    try:
        chosen = select_weights_file(list_repo_files(name), name)
        shards = chosen.removesuffix(".index.json").replace(".", "-*.") if chosen.endswith(".index.json") else chosen
        return Path(snapshot_download(name, allow_patterns=[chosen, shards, *beside]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        try:
            return Path(snapshot_download(name, local_files_only=True))
        except (HFValidationError, LocalEntryNotFoundError, OSError):
            raise FileNotFoundError(f"{name} is neither a file or folder here nor on the hub ({error})") from error
