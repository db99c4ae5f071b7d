"""Checks of the free memory and disk space before a `fit` run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch

from llm2clip.config import FitConfig
from llm2clip.data.records import Record
from llm2clip.runs.checkpoint import MAX_CHECKPOINTS
from llm2clip.runs.fsdp import fsdp_enabled
from llm2clip.runs.ranks import process_state
from llm2clip.store.store import available_memory
from llm2clip.tools.plan.devices import Machine
from llm2clip.tools.plan.memory import peak_memory
from llm2clip.tools.plan.plan import Plan, plan_fit

CHARACTERS_PER_TOKEN = 4  # of English text
SAMPLED_RECORDS = 1000


def check_resources(config: FitConfig, run_dir: Path, records: Sequence[Record]) -> list[str]:
    """Check that the disk and the free memory are large enough for a run, before it starts.

    Returns:
        Warnings about stages that need more memory than is free. These are not errors, because the required memory is
        only an estimate.

    Raises:
        OSError: The disk has too little free space.
    """
    images = sum(record.image is not None for record in records)
    texts = [text for record in islice(records, SAMPLED_RECORDS) for text in record.texts]
    if not images or not texts:
        return []
    try:
        plan = plan_fit(
            config,
            _describe_this_machine(),
            images,
            captions_per_image=len(texts) / min(len(records), SAMPLED_RECORDS),
            tokens_per_caption=max(1.0, sum(map(len, texts)) / len(texts) / CHARACTERS_PER_TOKEN),
        )
        warnings = _list_memory_warnings(plan)
    except (ValueError, RuntimeError) as error:  # an operation of the model may not support the planner's fake tensors
        return [f"Memory and disk space were not checked: {error}"]
    _check_disk(plan, run_dir)
    return warnings


def _list_memory_warnings(plan: Plan) -> list[str]:
    warnings = []
    for stage, parts in plan.memory.items():
        if not plan.fits[stage]:
            needed, free = peak_memory(parts) / 1e9, plan.machine.device_spec.memory
            warnings.append(f"Warning: {stage} needs about {needed:.1f} GB of memory, but {free:.1f} GB are free.")
            warnings += [f"  {flags} reduces this to {size / 1e9:.1f} GB" for flags, size in plan.suggest(stage)]
    return warnings


def _describe_this_machine() -> Machine:
    """Describe the devices of this run, with their free memory."""
    state = process_state()
    if state.device.type == "cuda":
        memory, name = torch.cuda.mem_get_info(state.device)[0], "gpu"
    else:
        memory, name = available_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), "cpu"
    return Machine(name, state.num_processes, tflops=1, memory=memory / 1e9, use_fsdp=fsdp_enabled())


def _check_disk(plan: Plan, run_dir: Path) -> None:
    """Raise OSError if the files of a run do not fit on the disk. Files that already exist need no additional space."""
    trained = plan.image.trained + (plan.text.trained if plan.config.tune.steps else 0)
    # Checkpoints contain each trained weight and AdamW's two moments. The encoder is stored in tune/ and in model/.
    sizes = {
        "caption encoder": 2 * 4 * plan.text.parameters,
        "model": 4 * plan.image.parameters,
        "checkpoints": 12 * MAX_CHECKPOINTS * trained,
        "embedding store": plan.store,
        "image features": plan.features,
    }
    existing = sum(file.stat().st_size for file in run_dir.rglob("*") if file.is_file())
    needed = (sum(sizes.values()) - existing) / 1e9
    folder = next(parent for parent in (run_dir, *run_dir.absolute().parents) if parent.exists())
    free = shutil.disk_usage(folder).free / 1e9
    if needed > free:
        parts = ", ".join(f"{name} {size / 1e9:.1f} GB" for name, size in sizes.items())
        raise OSError(
            f"the run needs about {needed:.1f} GB of disk space ({parts}), but only {free:.1f} GB are free at "
            f"{folder}: free up space, or choose another folder with --out"
        )
