"""The command `doctor`, which checks the machine and the Python environment.

A check's verdict is "bad" if `llm2clip fit` would fail, "note" if some features are missing or slow, or "ok" otherwise.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from llm2clip.io_utils import format_install_command, hide_url_secrets

if TYPE_CHECKING:
    import torch

DEVELOPER_EXTRAS = ("dev", "docs", "peers")  # extras that `doctor` does not check
# Package name, version bounds and extra in a requirement such as "ray[data]<2.64,>=2.59; extra == 'ray'".
REQUIREMENT = re.compile(r"([\w.-]+)(?:\[.*?\])?([^;]*)(?:;.*extra == ['\"]([\w-]+))?")
MIN_DISK_GB = 5.0  # free disk space for the weights, embedding store and checkpoints of a small `fit` run
MIN_MEMORY_GB = 4.0  # free memory that a small `fit` run requires
MIN_SHARED_MEMORY_MB = 64  # shared memory for one batch of decoded images per worker


@dataclass(frozen=True)
class CheckResult:
    name: str
    result: str  # measured values, or a description of the problem
    fix: str = ""  # how to fix the problem, or "" if there is no problem
    failed: bool = False  # True if the problem makes `llm2clip fit` fail

    @property
    def verdict(self) -> str:
        return "bad" if self.failed else "note" if self.fix else "ok"


def run_doctor(run_dir: Path, offline: bool = False) -> list[str]:
    """Run all checks, without network checks if `offline` is True. Return the lines of a result table and a summary.

    Raises:
        OSError: A check failed. The error message contains the table.
    """
    checks = [*check_package_versions(), *check_device(), *check_memory(), *check_disk_space(run_dir)]
    if not offline:
        checks += [*check_package_registry(), *check_model_hub()]
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        mark = "BAD" if check.failed else check.verdict
        lines.append(f"{mark:<4}  {check.name:<{width}}  {check.result}")
        if check.fix:
            lines.append(f"{'':<{width + 8}}-> {check.fix}")
    failures = sum(check.failed for check in checks)
    if failures:
        raise OSError("\n".join(["", *lines, "", f"{failures} of {len(checks)} checks failed."]))
    return [*lines, "", "All checks passed."]


def read_requirements() -> dict[str, dict[str, str]]:
    """Return the version bounds of dependencies, keyed by extra ("" for required dependencies) and package name."""
    by_extra: dict[str, dict[str, str]] = {}
    for line in metadata.requires("llm2clip") or []:
        name, bounds, extra = REQUIREMENT.findall(line)[0]
        if name != "llm2clip":  # an extra that combines other extras requires llm2clip itself
            by_extra.setdefault(extra, {})[name] = bounds
    return by_extra


def find_version_problem(name: str, bounds: str) -> str | None:
    from accelerate.utils import compare_versions

    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return f"{name} is not installed"
    operators_and_versions = re.findall(r"([<>=]+)([\w.]+)", bounds)
    # According to PEP 440, <2 excludes the pre-releases of version 2. The first pre-release is 2.dev0.
    satisfied = all(compare_versions(name, op, f"{v}.dev0" if op == "<" else v) for op, v in operators_and_versions)
    return None if satisfied else f"{name} {version} does not satisfy {bounds}"


def check_package_versions() -> Iterator[CheckResult]:
    for extra, packages in sorted(read_requirements().items()):
        if extra in DEVELOPER_EXTRAS:
            continue
        problems = [problem for item in packages.items() if (problem := find_version_problem(*item))]
        command = format_install_command(extra) if extra else format_install_command()
        fix = f"{sys.executable} -m {command}" if problems else ""
        if extra:
            yield CheckResult(f"extra: {extra}", ", ".join(problems or packages), fix)
            continue
        versions = f"llm2clip {metadata.version('llm2clip')}, Python {platform.python_version()}"
        if not problems:
            problems = [f"torch {metadata.version('torch')}", "all versions supported"]
        yield CheckResult("packages", f"{versions}; {', '.join(problems)}", fix, failed=bool(fix))


def check_device() -> Iterator[CheckResult]:
    import torch

    from llm2clip.models.precision import has_native_bf16
    from llm2clip.runs.run_description import describe_device

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    assert device is not None
    precision = "bf16" if has_native_bf16(device) else "fp32"
    fix = "" if precision == "bf16" else "bf16 is not supported: training and encoding run in fp32, about half as fast"
    yield CheckResult("device", f"{describe_device(device)}; precision auto selects {precision}", fix)

    if shutil.which("nvidia-smi") and device.type != "cuda":
        yield CheckResult(
            "torch",
            f"an NVIDIA driver is installed, but torch {torch.__version__} cannot find a GPU",
            "install the torch build for your driver version (pytorch.org/get-started)",
            failed=True,
        )
    yield check_gradient(device)


def check_gradient(device: torch.device) -> CheckResult:
    """Check that the gradient of the contrastive loss on the device matches the float64 gradient on the CPU."""
    import torch
    import torch.nn.functional as F

    from llm2clip.train.losses import info_nce

    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(64, 32, generator=generator), dim=1) for _ in range(2))

    exact_image = image.double().requires_grad_()
    logits = 20 * exact_image @ text.double().T  # (images, texts)
    labels = torch.arange(64)
    (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)).div(2).backward()

    device_image = image.to(device).requires_grad_()
    try:
        info_nce(device_image, text.to(device), 20.0, gather=False).backward()
    except RuntimeError as error:
        return CheckResult("training", f"a training step on {device} failed: {error}", "reinstall torch", failed=True)
    assert exact_image.grad is not None and device_image.grad is not None
    difference = device_image.grad.cpu().double() - exact_image.grad
    error_ratio = float(difference.norm() / exact_image.grad.norm())
    if not error_ratio < 1e-2:
        result = f"the gradient on {device} differs from the float64 gradient by {error_ratio:.0%}"
        return CheckResult("training", result, "reinstall the torch build for this device", failed=True)
    return CheckResult("training", f"the gradient on {device} matches the float64 gradient (error {error_ratio:.0e})")


def check_memory() -> Iterator[CheckResult]:
    from llm2clip.cpu_tuning import get_available_memory

    free = get_available_memory() / 1e9
    fix = "use a lower --align.batch_size and --tune.batch_size" if free < MIN_MEMORY_GB else ""
    yield CheckResult("memory", f"{free:.1f} GB free", fix)

    shared = Path("/dev/shm")
    if shared.is_dir():
        free, fix = shutil.disk_usage(shared).free / 1e6, ""
        if free < MIN_SHARED_MEMORY_MB:
            fix = "set --align.workers 0, or start the container with more shared memory (docker run --shm-size 2g)"
        yield CheckResult("shared memory", f"{free:,.0f} MB free in {shared}", fix)


def check_disk_space(run_dir: Path) -> Iterator[CheckResult]:
    from llm2clip.io_utils import get_cache_dir

    for name, folder in (("runs", run_dir), ("cache", get_cache_dir())):
        existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        free = shutil.disk_usage(existing).free / 1e9
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            fix = "choose another folder with --out" if name == "runs" else "set LLM2CLIP_CACHE to another folder"
            yield CheckResult(name, f"{existing} is not a writable folder", fix, failed=True)
        else:
            fix = "free up disk space for the weights, embedding store and checkpoints" if free < MIN_DISK_GB else ""
            yield CheckResult(name, f"{free:,.1f} GB free at {existing}", fix)


def check_package_registry() -> Iterator[CheckResult]:
    url = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple/")
    fix = "pip and `llm2clip quickstart` download from this URL. Check the network, or set PIP_INDEX_URL to a mirror"
    yield _check_url("registry", url, fix)


def check_model_hub() -> Iterator[CheckResult]:
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        yield CheckResult("hub", "HF_HUB_OFFLINE is set", "hub models must already be in the local cache")
        return
    fix = "use model folders or built-in names such as smollm2-135m, or set HF_ENDPOINT to a mirror of the hub"
    yield _check_url("hub", ENDPOINT, fix)


def _check_url(name: str, url: str, fix: str) -> CheckResult:
    shown = hide_url_secrets(url)
    try:
        with urlopen(Request(url, method="HEAD"), timeout=5) as response:
            return CheckResult(name, f"{shown} is reachable (HTTP {response.status})")
    except HTTPError as error:
        return CheckResult(name, f"{shown} is reachable (HTTP {error.code})")
    except Exception as error:  # some errors of http.client are not OSErrors
        return CheckResult(name, f"{shown} did not respond: {str(error).replace(url, shown)}", fix)
