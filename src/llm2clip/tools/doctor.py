"""`llm2clip doctor`: is this environment fit for the work, and what to do where it is not.

Each check is a line: what was looked at, what is there, and a way out where something is amiss. A check that fails is
one that `llm2clip fit` would stumble over; a note is something that only some of the work needs.
"""

from __future__ import annotations

import http.client
import os
import platform
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from packaging.requirements import Requirement

if TYPE_CHECKING:
    import torch

Verdict = Literal["ok", "note", "bad"]
FOR_DEVELOPERS = ("dev", "docs", "peers")  # extras that no use of the package needs
LEAST_GB = 5.0  # free on a disk: weights, a store and checkpoints of a small fit
LEAST_MEMORY = 4.0  # GB that a small fit takes
WORKERS_MB = 64  # of shared memory: a batch of decoded pictures for each worker


@dataclass(frozen=True)
class Check:
    """What was looked at, how it stands, what is there, and what to do."""

    name: str
    verdict: Verdict
    found: str
    do: str = ""


def doctor(folder: Path, offline: bool = False) -> list[Check]:
    """All checks.

    Args:
        folder: where runs are to be written.
        offline: ask no other machine.
    """
    checks: list[Callable[[], Iterator[Check]]] = [
        check_packages,
        check_extras,
        check_compute,
        check_memory,
        lambda: check_disks(folder),
    ]
    if not offline:
        checks.append(check_hub)
    return [check for some in checks for check in some()]


def format_checks(checks: list[Check]) -> list[str]:
    """The checks as a table, and what they come to."""
    marks = {"ok": "ok  ", "note": "note", "bad": "BAD "}
    width = max(len(check.name) for check in checks)
    shown = []
    for check in checks:
        shown.append(f"{marks[check.verdict]}  {check.name:<{width}}  {check.found}")
        if check.do:
            shown.append(f"{'':<{width + 8}}-> {check.do}")
    bad = sum(check.verdict == "bad" for check in checks)
    return [*shown, "", f"{bad} of {len(checks)} checks failed" if bad else "Nothing is in the way."]


def requirements() -> dict[str, list[Requirement]]:
    """What the package asks for, by extra; "" is what every use of it needs."""
    found: dict[str, list[Requirement]] = {}
    for line in metadata.requires("llm2clip") or []:
        requirement = Requirement(line)
        extra = str(requirement.marker).rpartition("extra == ")[2].strip("\"'") if requirement.marker else ""
        if requirement.name != "llm2clip":  # an extra made of others
            found.setdefault(extra, []).append(requirement)
    return found


def version_problem(requirement: Requirement) -> str | None:
    """What is wrong with an installed package: that it is not there, or its version; None is nothing."""
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return f"{requirement.name} is missing"
    if not requirement.specifier.contains(version, prereleases=True):
        return f"{requirement.name} {version} is not {requirement.specifier}"
    return None


def check_packages() -> Iterator[Check]:
    """What every use needs: versions within their ranges."""
    about = f"llm2clip {metadata.version('llm2clip')}, Python {platform.python_version()}"
    wrong = [text for one in requirements().get("", []) if (text := version_problem(one))]
    if wrong:
        yield Check("packages", "bad", f"{about}; {', '.join(wrong)}", f"{sys.executable} -m pip install -U llm2clip")
    else:
        yield Check("packages", "ok", f"{about}; torch {metadata.version('torch')}, all within their ranges")


def check_extras() -> Iterator[Check]:
    """What some verbs need: installed or not."""
    for extra, some in sorted(requirements().items()):
        if not extra or extra in FOR_DEVELOPERS:
            continue
        wrong = [text for one in some if (text := version_problem(one))]
        if wrong:
            way = f"{sys.executable} -m pip install 'llm2clip[{extra}]'"
            yield Check(f"extra: {extra}", "note", ", ".join(wrong), way)
        else:
            yield Check(f"extra: {extra}", "ok", ", ".join(one.name for one in some))


def check_compute() -> Iterator[Check]:
    """The device, whether it multiplies bf16 in hardware, its threads; and a step on it beside float64."""
    import torch

    from llm2clip.models.precision import resolve_device_precision

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    assert device is not None
    if device.type == "cuda":
        cards = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
        about = ", ".join(f"{card.name} ({card.total_memory / 1e9:.0f} GB)" for card in cards)
    else:
        about = f"{device.type}, {torch.get_num_threads()} threads of {os.cpu_count()} processors"
    fast = resolve_device_precision("auto", device)
    way = "" if fast == "bf16" else "this device has no bf16: the work is done in fp32, at about half the speed"
    yield Check("device", "ok", f"{about}; where precision is auto, it is {fast}", way)
    if shutil.which("nvidia-smi") and device.type != "cuda":
        yield Check("torch", "bad", f"torch {torch.__version__} sees no GPU, but there is a driver for one",
                    "install the torch that fits the driver: pytorch.org/get-started")  # fmt: skip
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if device.type == "cpu" and torch.get_num_threads() != cores and torch.get_num_threads() != cores // 2:
        yield Check("threads", "note", f"{torch.get_num_threads()} threads on {cores} cores",
                    f"OMP_NUM_THREADS={cores} is usually fastest")  # fmt: skip
    yield check_gradient(device)


def check_gradient(device: torch.device) -> Check:
    """The contrastive loss and its gradient on the device, beside the same written out in float64."""
    import torch
    import torch.nn.functional as F

    from llm2clip.train.losses import info_nce

    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(64, 32, generator=generator), dim=1) for _ in range(2))
    exact = image.double().requires_grad_()
    logits = 20 * exact @ text.double().T
    truth = torch.arange(64)
    (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)).div(2).backward()
    found = image.to(device).requires_grad_()
    try:
        info_nce(found, text.to(device), 20.0, gather=False).backward()
    except RuntimeError as error:
        return Check(
            "training", "bad", f"a step on {device} fails: {error}", "see the lines above, and reinstall torch"
        )
    assert exact.grad is not None and found.grad is not None
    off = float((found.grad.cpu().double() - exact.grad).norm() / exact.grad.norm())
    if not off < 1e-2:
        return Check("training", "bad", f"a gradient on {device} is {off:.0%} off", "reinstall torch for this device")
    return Check("training", "ok", f"a step's gradient on {device} is float64's, to {off:.0e}")


def check_memory() -> Iterator[Check]:
    """Memory, and the shared memory through which workers hand over pictures."""
    import psutil

    free = psutil.virtual_memory().available / 1e9
    verdict: Verdict = "ok" if free >= LEAST_MEMORY else "note"
    way = "" if verdict == "ok" else "smaller batches: --align.batch_size, --tune.batch_size, --embed.batch_tokens"
    yield Check("memory", verdict, f"{free:.1f} GB free of {psutil.virtual_memory().total / 1e9:.1f}", way)
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free / 1e6
        if free < WORKERS_MB:
            yield Check("shared memory", "note", f"{free:.0f} MB free in {shared}",
                        "--align.workers 0, or a container with more: docker run --shm-size 2g")  # fmt: skip
        else:
            yield Check("shared memory", "ok", f"{free:,.0f} MB free in {shared}")


def check_disks(folder: Path) -> Iterator[Check]:
    """Where runs and fetched weights go: that one may write there, and that there is room."""
    from llm2clip.models.pretrained import cache_dir

    for name, place in (("runs", folder), ("cache", cache_dir())):
        there = next(one for one in (place, *place.absolute().parents) if one.exists())
        free = shutil.disk_usage(there).free / 1e9
        if not there.is_dir() or not os.access(there, os.W_OK):
            way = "name another with --out" if name == "runs" else "name another with the variable LLM2CLIP_CACHE"
            yield Check(name, "bad", f"{there} takes no files", way)
        elif free < LEAST_GB:
            yield Check(name, "note", f"{free:.1f} GB free at {there}", "weights, a store and checkpoints want more")
        else:
            yield Check(name, "ok", f"{free:,.0f} GB free at {there}")


def check_hub() -> Iterator[Check]:
    """Whether the model hub answers."""
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        yield Check("hub", "note", "HF_HUB_OFFLINE is set", "hub ids are taken from the cache alone")
        return
    try:
        urllib.request.urlopen(urllib.request.Request(ENDPOINT, method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError as error:
        yield Check("hub", "ok", f"{ENDPOINT} answers, with {error.code}")
    except (OSError, ValueError, http.client.HTTPException) as error:
        way = "models by folder, or by our names (smollm2-135m), still work; HF_ENDPOINT names a mirror"
        yield Check("hub", "note", f"{ENDPOINT} does not answer: {error}", way)
    else:
        yield Check("hub", "ok", f"{ENDPOINT} answers")
