"""Short model names for tables and reports."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def display_names(models: Sequence[str]) -> list[str]:
    """Return a short, unique name for each model, in the same order.

    Existing paths are shortened to their last component, and RUN/model and RUN/encoder to the folder name of RUN. Hub
    ids are not shortened. If two short names are identical, no name is shortened. If a model is listed more than once,
    repeated names are numbered, e.g. "NAME (2)".
    """
    names = [_short_name(model) for model in models]
    if len(set(names)) < len(names):
        names = list(models)
    unique_names = []
    for n, name in enumerate(names):
        earlier = names[:n].count(name)
        unique_names.append(f"{name} ({earlier + 1})" if earlier else name)
    return unique_names


def _short_name(model: str) -> str:
    path = Path(model)
    if not path.exists():
        return model
    folder = path.resolve()
    name = folder.parent.name if path.name in ("model", "encoder") else folder.name
    return name or model
