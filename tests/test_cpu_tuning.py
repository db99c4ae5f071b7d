"""Tests that the CPU settings change neither results nor global state."""

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llm2clip import cpu_tuning


@pytest.fixture
def clear_cache() -> Iterator[None]:
    """Let `is_onednn_faster` decide anew, before and after the test."""
    cpu_tuning.is_onednn_faster.cache_clear()
    yield
    cpu_tuning.is_onednn_faster.cache_clear()


@pytest.fixture
def precision(clear_cache: None, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """PyTorch's matmul precision on a simulated AMD CPU with AVX-512, under the key "name"."""
    state = {"name": "highest"}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": "AMD", "avx512_f": True}, raising=False)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda name: state.update(name=name))
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: state["name"])
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    return state


def test_onednn_matmul_has_float32_accuracy(clear_cache: None) -> None:
    a, b = torch.randn(300, 400), torch.randn(400, 500)
    before = torch.get_float32_matmul_precision()
    with cpu_tuning.use_onednn_matmul():
        result = a @ b
    assert torch.get_float32_matmul_precision() == before
    exact = a.double() @ b.double()
    assert (result - exact).norm() / exact.norm() < cpu_tuning.FLOAT32_TOLERANCE


@pytest.mark.parametrize(
    ("cpu_name", "avx512", "expected"),
    [("AMD EPYC", True, "medium"), ("AMD", False, "highest"), ("Intel", True, "highest")],
)
def test_onednn_matmul_is_used_on_amd_with_avx512(
    cpu_name: str, avx512: bool, expected: str, precision: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": cpu_name, "avx512_f": avx512})
    precisions = []
    with pytest.raises(KeyError), cpu_tuning.use_onednn_matmul():
        precisions.append(precision["name"])
        raise KeyError
    assert precisions == [expected] and precision["name"] == "highest"


def test_onednn_is_not_used_if_it_rounds_to_bfloat16(
    precision: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    matmul = torch.Tensor.__matmul__

    def round_and_multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if precision["name"] == "medium" and a.dtype == torch.float32:
            a, b = a.bfloat16().float(), b.bfloat16().float()
        return matmul(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", round_and_multiply)
    assert not cpu_tuning.is_onednn_faster()


LIBGOMP = Path(torch.__file__).parent / "lib/libgomp.so.1"  # the OpenMP library of PyTorch's wheels for Linux


@pytest.mark.skipif(not LIBGOMP.exists(), reason="this build of PyTorch uses another OpenMP library than libgomp")
@pytest.mark.parametrize(
    ("variables", "spin_count"),
    [
        ({}, "0"),
        ({"OMP_WAIT_POLICY": "active"}, "30000000000"),
        ({"KMP_BLOCKTIME": "1"}, "300000"),  # for another OpenMP library, so libgomp keeps its default
    ],
    ids=str,
)
def test_import_disables_spinning_of_openmp_threads_unless_the_user_sets_it(
    variables: dict[str, str], spin_count: str
) -> None:
    """libgomp, loaded after the package as `import torch` does, prints the number of spins that it uses."""
    prefixes = ("OMP_", "GOMP_", "KMP_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
    code = f"import sys, ctypes, llm2clip; assert 'torch' not in sys.modules; ctypes.CDLL({str(LIBGOMP)!r})"
    output = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, **variables, "OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"GOMP_SPINCOUNT = '{spin_count}'" in output.stderr


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps freed memory")
def test_free_memory_returns_memory_that_malloc_keeps() -> None:
    script = """
import psutil, torch
from llm2clip.cpu_tuning import free_memory, keep_freed_memory

def memory():
    return psutil.Process().memory_info().rss / 2**20

keep_freed_memory(torch.device("cpu"))
blocks = [torch.ones(4, 2**20) for _ in range(16)]  # 16 MiB each
last = torch.ones(1)  # prevents malloc from shrinking its heap
used = memory()
del blocks
kept = memory()
free_memory()
print(used - kept, kept - memory())
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(cpu_tuning.__file__).parents[1])}
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    released_by_malloc, released_by_free_memory = map(float, output.stdout.split())
    assert released_by_malloc < 64
    assert released_by_free_memory > 192


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has arenas")
@pytest.mark.parametrize("limited", [True, False])
def test_limit_malloc_arenas_lets_threads_share_arenas(limited: bool, tmp_path: Path) -> None:
    script = f"""
import ctypes, threading
from llm2clip.cpu_tuning import limit_malloc_arenas

if {limited}:
    limit_malloc_arenas()
libc, barrier = ctypes.CDLL("libc.so.6"), threading.Barrier(16)
libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
libc.fopen.restype, libc.malloc_info.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
libc.fclose.argtypes = [ctypes.c_void_p]
threads = [threading.Thread(target=lambda: (libc.malloc(1000), barrier.wait())) for _ in range(16)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
file = libc.fopen({str(tmp_path / "info.xml").encode()!r}, b"w")
libc.malloc_info(0, file)
libc.fclose(file)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(cpu_tuning.__file__).parents[1])}
    environment.pop("MALLOC_ARENA_MAX", None)
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
    arenas = (tmp_path / "info.xml").read_text().count("<heap nr=")
    assert arenas <= 3 if limited else arenas > 3
