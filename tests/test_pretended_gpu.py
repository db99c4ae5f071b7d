"""Runs the tests of gpu_cases.py and test_gpu.py on the pretended GPU of pretended_gpu, in processes of their own.

The pretended GPU changes PyTorch for the whole process, so it must not be loaded into this one.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
# The defaults of `fit` are tested by both files.
GROUPS = {"fit": "test_fit and not finite_losses", "all other tests": "not test_fit"}


@pytest.mark.skipif(shutil.which("g++") is None, reason="the pretended GPU needs g++")
@pytest.mark.skipif(torch.version.cuda is not None, reason="the pretended GPU needs a CPU build of PyTorch")
@pytest.mark.parametrize("group", GROUPS)
def test_pretended_gpu(group: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "pretended_gpu", "-p", "no:xdist", "-p", "no:cacheprovider"]
    command += ["-q", "-rxX", "--tb=short", "--basetemp", str(tmp_path / "pytest"), "-k", GROUPS[group]]
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    environment.pop("PYTEST_ADDOPTS", None)
    result = subprocess.run(
        [*command, str(TESTS / "gpu_cases.py"), str(TESTS / "test_gpu.py")],
        env=environment,
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    print(result.stdout)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
