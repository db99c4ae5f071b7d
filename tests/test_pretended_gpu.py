"""Runs the tests of gpu_cases.py and test_gpu.py on the pretended GPU of pretended_gpu, in a process of their own.

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


@pytest.mark.skipif(shutil.which("g++") is None, reason="the pretended GPU needs g++")
@pytest.mark.skipif(torch.version.cuda is not None, reason="the pretended GPU needs a CPU build of PyTorch")
def test_pretended_gpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "pretended_gpu", "-p", "no:cacheprovider"]
    command += ["-q", "-rxX", "--tb=short", "--basetemp", str(tmp_path / "pytest")]
    # gpu_cases.py tests the defaults of `fit`, and both precisions of dense features take the same path.
    command += ["-k", "not finite_losses and not (dense_embeddings and bf16)"]
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    environment.pop("PYTEST_ADDOPTS", None)
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # importing the other plugins takes seconds
    result = subprocess.run(
        [*command, str(TESTS / "gpu_cases.py"), str(TESTS / "test_gpu.py")],
        env=environment,
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    print(result.stdout)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
