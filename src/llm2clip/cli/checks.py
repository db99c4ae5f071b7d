"""Path and model name checks that avoid heavy imports, so commands report mistakes within a second."""

import os
import socket
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from llm2clip.models.loading import is_hub_id

# Prefixes of model names (see `models/dual_encoder.py` and `models/vision/vision_tower.py`).
PREFIXES = ("open_clip:", "timm:", "st:", "hf:")
ENCODERS = (
    "smollm2-135m",
    "all-minilm-l6-v2",
    "gemma3-270m",
)  # names of caption encoders in `models/pretrained.py`


def check_sources(*groups: Iterable[str] | None) -> None:
    """Check that all data sources exist.

    Args:
        groups: Lists of sources of the form PATH or PATH@split+split.

    Raises:
        FileNotFoundError: A path does not exist, or a pattern matches no file. The message suggests similar names.
    """
    from llm2clip.data.formats import find_files
    from llm2clip.data.records import Source

    for source in (source for group in groups for source in group or []):
        path = Source.parse(source).path
        if not path.startswith("hf:") and not os.path.exists(os.path.expanduser(path)):
            find_files(path)  # expands patterns; raises an error if no file matches


def check_index(location: str | None) -> None:
    """Raise FileNotFoundError if a local folder contains no index. URLs are not checked."""
    from llm2clip.search.backends import INDEX_FILE, format_missing_index_message

    if location is not None and "://" not in location and not (Path(location) / INDEX_FILE).is_file():
        raise FileNotFoundError(format_missing_index_message(location))


def check_stores(*folders: str) -> None:
    """Raise FileNotFoundError if an embedding store's folder does not exist."""
    for folder in folders:
        if not os.path.isdir(folder):
            from llm2clip.data.formats import suggest_paths

            raise FileNotFoundError(
                f"{folder} is not a store: no such folder; {suggest_paths(folder)}. To create a store, run "
                "`llm2clip embed`"
            )


def check_port(host: str, port: int) -> None:
    """Raise OSError if a server cannot listen on a port, for example because another program is using it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise OSError(
            f"cannot listen on port {port} of {host}: {error.strerror}. Stop the program that is using the port, or "
            "choose another port with --port (0 means any free port)"
        ) from error


def resolve_model(name: str) -> str:
    """Return a run directory's model folder, or return `name` unchanged if it already refers to an image-text model.

    Raises:
        FileNotFoundError: The name is neither an existing path nor a valid model name.
    """
    return _resolve_name(name, "config.json", ("model",), ())


def resolve_encoder(path: str) -> str:
    """Return a run directory's tuned encoder, or return `path` unchanged if it already refers to a caption encoder.

    Raises:
        FileNotFoundError: The path does not exist and is not a valid encoder name.
    """
    return _resolve_name(path, "modules.json", ("encoder", "tune/encoder"), ENCODERS)


def check_pretrained(*names: str) -> None:
    """Raise FileNotFoundError if a vision tower or LLM name looks like a path that does not exist."""
    for name in names:
        if "/" in name or "\\" in name:  # names without slashes refer to timm models and built-in models
            _resolve_name(name, "config.json", (), ())


def _resolve_name(name: str, config_file: str, subfolders: tuple[str, ...], known: tuple[str, ...]) -> str:
    """Return `name` or, if it is a folder without `config_file`, the first of `subfolders` that contains this file."""
    path = Path(name).expanduser()
    if path.is_dir() and not (path / config_file).exists():
        for subfolder in subfolders:
            if (path / subfolder / config_file).is_file():
                if os.environ.get("RANK", "0") == "0":
                    print(f"{name}: using {path / subfolder}", file=sys.stderr)
                return str(path / subfolder)
    if name in known or name.startswith(PREFIXES) or path.exists():
        return name
    from llm2clip.data.formats import suggest_paths

    if name.endswith((".npz", ".gguf")):
        raise FileNotFoundError(f"{name}: no such file; {suggest_paths(name)}")
    if not is_hub_id(name):
        names = f", nor one of {', '.join(known)}" if known else ""
        raise FileNotFoundError(f"{name} is neither a folder nor a hub id (OWNER/NAME){names}; {suggest_paths(name)}")
    return name


def list_local_sources(sources: Sequence[str]) -> list[str]:
    """Return the sources that `index` can read, or a placeholder if there are none, for a command to run next."""
    from llm2clip.data.storage import is_remote

    return [source for source in sources if not is_remote(source)] or ["PHOTOS"]
