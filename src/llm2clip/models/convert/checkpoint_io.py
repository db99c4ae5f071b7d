"""Utilities for reading checkpoint weights and configuration from folders and hub repositories.

Code in a checkpoint is never executed. Weights are read from safetensors files, or from pickle files with
`weights_only=True`.
"""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llm2clip.data.transforms import Preprocess
from llm2clip.io_utils import DataFormatError, describe_error, read_json_object
from llm2clip.models.hub.loading import check_model_source, read_safetensors

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
CONFIG_FILE = "config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"


def read_checkpoint(source: str | Path) -> tuple[dict[str, Any], dict[str, Any], Preprocess | None]:
    """Read the tensors and configuration of a checkpoint.

    Args:
        source: folder, hub id or weight file. A folder or repository must contain model.safetensors or
            pytorch_model.bin (either may be sharded), or a single .pt file. No configuration is read for a weight file.

    Returns:
        (tensors, config, preprocessing): a dict from tensor name to tensor; the contents of config.json, or {} if it is
        missing; and the preprocessing from preprocessor_config.json, or None if it is missing.

    Raises:
        FileNotFoundError: the file, folder or repository does not exist.
        ValueError: no unique weight file exists, or the file is corrupt or contains objects other than tensors.
    """
    path = Path(source)
    if path.is_file():
        return _load_weights(path), {}, None
    folder = path if path.is_dir() else _download_checkpoint(str(source))
    weights = folder / select_weights_file([file.name for file in folder.iterdir()], str(source))
    tensors = _load_shards(weights) if weights.name.endswith(".index.json") else _load_weights(weights)
    preprocess = _read_optional_json(folder / PREPROCESSOR_FILE)
    return tensors, _read_optional_json(folder / CONFIG_FILE), Preprocess.from_dict(preprocess) if preprocess else None


def select_weights_file(names: list[str], source: str) -> str:
    """Return the name of the weight file, or of the index file if the weights are sharded.

    A .pt file with "EVA" in its name takes precedence, because repositories with such a file also contain another
    weight file with a different text tower.

    Raises:
        ValueError: there is no weight file, or there are several .pt files to choose from.
    """
    pt_files = [name for name in names if name.endswith(".pt") and "/" not in name]
    eva_files = [name for name in pt_files if "EVA" in name]
    if len(eva_files) == 1:
        return eva_files[0]
    for name in WEIGHT_FILES:
        if name in names:
            return name
    if len(pt_files) == 1:
        return pt_files[0]
    raise ValueError(
        f"{source} must contain one of {', '.join(WEIGHT_FILES)}, or a single .pt file. If it contains several .pt "
        "files, pass the path of one of them"
    )


def _load_weights(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if _is_torchscript(path):
        raise ValueError(
            f"{path} is a TorchScript archive, which contains code. If you trust the file, extract the tensors: "
            f"safetensors.torch.save_file(torch.jit.load({str(path)!r}, map_location='cpu').state_dict(), "
            "'model.safetensors')"
        )
    try:
        # Some checkpoints also contain an LLM. With mmap, tensors that are not needed are never read from disk.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} contains objects other than tensors, and loading it could run code. If you trust the file, "
            f"extract the state dict and save it with safetensors.torch.save_file ({_get_first_line(error)})"
        ) from error
    except Exception as error:  # for a corrupt file, torch can raise almost any type of exception
        raise ValueError(f"{path} is corrupt or incomplete ({_get_first_line(error)})") from error
    for key in ("state_dict", "module", "model"):  # keys under which training scripts save the state dict
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"{path} contains a {type(content).__name__}, not a mapping from names to tensors")
    return dict(content)


def _is_torchscript(path: Path) -> bool:
    """Return True for archives written by `torch.jit.save`, such as the original checkpoints of CLIP."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        return False


def _get_first_line(error: Exception) -> str:
    return (str(error).splitlines() or [describe_error(error)])[0]


def _load_shards(index: Path) -> dict[str, Any]:
    shard_of = read_weight_map(index)
    tensors: dict[str, Any] = {}
    for shard in sorted(set(shard_of.values())):
        if Path(shard).name != shard:
            raise ValueError(f"{index} lists a shard outside its folder: {shard!r}")
        tensors |= _load_weights(index.parent / shard)
    differing = sorted(tensors.keys() ^ shard_of.keys())
    if differing:
        raise ValueError(
            f"{index} does not match its shards. Tensors only in the index or only in a shard: {differing[:8]}"
        )
    return tensors


def read_weight_map(index: Path) -> dict[str, str]:
    """Return an index file's mapping from tensor name to shard file name. Raise DataFormatError if it is invalid."""
    shard_of = read_json_object(index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
        raise DataFormatError(f'{index} must have the form {{"weight_map": {{"TENSOR": "SHARD.safetensors"}}}}')
    return shard_of


def _read_optional_json(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}


def _download_checkpoint(name: str) -> Path:
    """Download the weights and configuration of a hub repository. If the download fails, use a cached copy."""
    from huggingface_hub import list_repo_files, snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError

    check_model_source(name)
    try:
        weights = select_weights_file(list_repo_files(name), name)
        patterns = [weights, CONFIG_FILE, PREPROCESSOR_FILE]
        if weights.endswith(".index.json"):
            patterns.append(weights.removesuffix(".index.json").replace(".", "-*."))  # model-*.safetensors
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HFValidationError, HTTPError, LocalEntryNotFoundError, OSError) as error:
        try:
            return Path(snapshot_download(name, local_files_only=True))
        except (HFValidationError, LocalEntryNotFoundError, OSError):
            raise FileNotFoundError(f"{name} is not a file, a folder or a model on the hub ({error})") from error
