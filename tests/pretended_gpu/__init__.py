"""A pretended GPU: `cuda:0` on a CPU build of PyTorch, for tests of the code that runs on GPUs.

Tensors on the pretended GPU report the device `cuda:0`, but hold their values in an ordinary CPU tensor. The package
therefore takes every branch for `device.type == "cuda"` and computes real values, and each operation can be observed:

- An operation on tensors from both devices raises `MixedDevicesError`, where a real GPU would raise an error as well.
- Synchronisations are counted, with the line that caused them. These are the places where the host waits for the GPU:
  `.item()`, `.tolist()`, blocking copies, and operations whose output shape depends on values, such as
  `nonzero`.
- Kernel launches are counted, as the minimum that a GPU needs: one per operation that is not a view.
- Attention calls are counted by the kernel that a GPU of compute capability 8.0 or later would use.
- Copies between host and GPU are counted in bytes.

Times and memory use are those of the CPU and mean nothing.

PyTorch asks only once whether CUDA exists, so this package must be imported before torch, in a process of its own:

    PYTHONPATH=tests python -m pytest -p pretended_gpu tests/gpu_cases.py

It needs g++ (a few seconds for the first call; the compiled library is cached) and a PyTorch build without CUDA.
"""

from pretended_gpu.hooks import install_hooks

install_hooks()  # before torch is imported

from pretended_gpu.counts import FOREACH_CHUNK, WITHOUT_KERNEL, Counts, count  # noqa: E402
from pretended_gpu.cuda_api import install  # noqa: E402
from pretended_gpu.tensors import GpuTensor, MixedDevicesError  # noqa: E402

install()

__all__ = ["FOREACH_CHUNK", "WITHOUT_KERNEL", "Counts", "GpuTensor", "MixedDevicesError", "count"]
