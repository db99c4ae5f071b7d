"""Where metrics go beside metrics.jsonl: TensorBoard, Weights & Biases, trackio."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llm2clip.checkpoint import hash_texts


def trackers(names: list[str], folder: Path) -> dict[str, Any]:
    """Accelerate's options of each tracker, by its name, for a run in `folder` that may be gone on with.

    Raises:
        ValueError: there is no such tracker.
        ImportError: its package is missing.
    """
    run = hash_texts([str(folder.resolve())])
    options: dict[str, Any] = {
        "tensorboard": {},
        "wandb": {"id": run, "resume": "allow"},
        "trackio": {"name": f"{folder.parent.name}-{run}", "resume": "allow"},
    }
    for name in names:
        if name not in options:
            raise ValueError(f"--align.report_to knows {', '.join(options)}, not {name!r}")
        if find_spec(name) is None:
            raise ModuleNotFoundError(f"--align.report_to {name} needs the package {name}: pip install {name}")
    return {name: options[name] for name in names}
