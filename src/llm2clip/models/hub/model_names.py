"""Model names: a check before a library looks up a name on the hub, and short names for tables.

Without the check, a library would look up a mistyped path on the hub, and retry for a minute if the machine is offline.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

TIMEOUT = 5  # for reaching the hub, in seconds
_HUB_ID = re.compile(r"[a-z0-9][\w.-]*/[a-z0-9][\w.-]*", re.ASCII | re.IGNORECASE)
_FILE_SUFFIXES = (
    *(".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".gguf", ".onnx", ".npz", ".npy", ".pkl"),
    *(".json", ".jsonl", ".yaml", ".yml", ".txt", ".csv", ".zip", ".tar", ".gz"),
)


def is_hub_id(name: str) -> bool:
    """Return True if a name has the form OWNER/NAME and does not end with the suffix of a weight or data file."""
    return _HUB_ID.fullmatch(name) is not None and not name.lower().endswith(_FILE_SUFFIXES)


def check_model_source(source: str | Path) -> None:
    """Check that a model is a local file or folder, or that it can be looked up on the hub or in the hub's cache.

    If the hub cannot be reached, huggingface_hub is switched to offline mode, in which it does not retry.

    Raises:
        FileNotFoundError: The source does not exist and is not a hub id, or it is a hub id, but the hub cannot be
            reached and the model is not in the cache.
    """
    name = str(source)
    if Path(name).exists():
        return
    if not is_hub_id(name):
        raise FileNotFoundError(f"{name} is neither a folder nor a file, and it is not a hub id (OWNER/NAME)")
    problem = find_hub_problem()
    if problem and not _is_cached(name):
        raise FileNotFoundError(f"{name} is neither a folder nor a model in the hub's cache, and {problem}")


@lru_cache(maxsize=1)
def find_hub_problem() -> str:
    """Return the reason why the hub cannot be used, or an empty string. Each process sends only one request."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "the hub is not used in offline mode (HF_HUB_OFFLINE)"
    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
    except Exception as error:  # the HTTP library depends on the version of huggingface_hub
        constants.HF_HUB_OFFLINE = True
        return f"the hub cannot be reached ({constants.ENDPOINT}: {error})"
    return ""


def _is_cached(hub_id: str) -> bool:
    from huggingface_hub import constants

    return (Path(constants.HF_HUB_CACHE) / f"models--{hub_id.replace('/', '--')}").is_dir()


def display_names(models: Sequence[str]) -> list[str]:
    """Return a short, unique name for each model, in the same order.

    Existing paths are shortened to their last component, and RUN/model and RUN/encoder to the folder name of RUN. Hub
    ids are not shortened. If two short names are equal, no name is shortened. If a model is listed repeatedly, the
    repetitions are numbered, e.g. "NAME (2)".
    """
    names = [_shorten_name(model) for model in models]
    if len(set(names)) < len(names):
        names = list(models)
    unique_names = []
    for n, name in enumerate(names):
        earlier = names[:n].count(name)
        unique_names.append(f"{name} ({earlier + 1})" if earlier else name)
    return unique_names


def _shorten_name(model: str) -> str:
    path = Path(model)
    if not path.exists():
        return model
    folder = path.resolve()
    name = folder.parent.name if path.name in ("model", "encoder") else folder.name
    return name or model
