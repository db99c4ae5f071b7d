"""Makes PyTorch believe that there is a CUDA device, by means of the C++ code in hooks.cpp."""

import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

CPP_FILE = Path(__file__).with_suffix(".cpp")


def _compile_hooks() -> Path:
    """Compile CPP_FILE for the installed version of PyTorch, unless the library is already cached."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    torch_folder = Path(spec.origin).parent
    version = (torch_folder / "version.py").read_text()
    key = hashlib.sha256((CPP_FILE.read_text() + version).encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"pretended-gpu-{os.getuid()}-{key}.so"
    if library.exists():
        return library
    include, lib = torch_folder / "include", torch_folder / "lib"
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        output = Path(folder) / "hooks.so"
        command = ["g++", "-O0", "-w", "-shared", "-fPIC", "-std=c++20", str(CPP_FILE), "-o", str(output)]
        command += [f"-I{include}", f"-I{include}/torch/csrc/api/include"]
        command += [f"-L{lib}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{lib}"]
        subprocess.run(command, check=True)
        os.replace(output, library)
    return library


def install_hooks() -> None:
    """Load the hooks. Must be called before torch is imported.

    Raises:
        ImportError: torch has been imported, or is a build with CUDA.
    """
    if "torch" in sys.modules:
        raise ImportError("pretended_gpu must be imported before torch")
    library = ctypes.CDLL(str(_compile_hooks()))
    import torch

    if torch.version.cuda is not None or not library.install_pretended_gpu():
        raise ImportError("pretended_gpu needs a build of PyTorch without CUDA")
