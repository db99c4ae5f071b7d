"""Estimate the time of llm2clip's main steps on a GPU, from the operations that its code runs at full size (roofline).

    python benchmarks/roofline.py

These are estimates, not measurements. No GPU is used: the code runs on fake tensors, which have shapes but no values.
The estimated time of an operation is the largest of

- its FLOPs, divided by the rate that good kernels reach in its precision,
- the bytes that it reads and writes, divided by the memory bandwidth that good kernels reach,
- LAUNCH, the minimum time of a kernel.

The assumed rates are about 70% of the data sheet's rates for matmuls, about 85% for memory, and published results for
flash attention. The estimates do not include data loading, communication between GPUs, and the contrastive loss.

The script requires g++ and a CPU build of PyTorch (see tests/pretended_gpu).
"""

import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import pretended_gpu  # isort: skip  # must be imported before torch
import torch  # isort: skip
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim.optimizer import _foreach_supported_types
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from pretended_gpu.tensors import REPLACED
from shared import print_header, print_row

# Rates that good kernels reach on an H100, in FLOP/s, and its memory bandwidth in bytes/s.
SHEET_RATE = 989e12  # bf16 rate in the data sheet
HALF_RATE, FULL_RATE = 680e12, 52e12  # matmuls in 16 bits and in fp32
ATTENTION_RATE, ATTENTION_BACKWARD_RATE = 380e12, 300e12
BANDWIDTH = 2.85e12
# Operations of variable-length attention -> name, argument positions of queries and maximum length, and FLOP factor.
VARLEN = {
    "torch_attn._varlen_attn": ("varlen_attention", 0, 5, 4),
    "torch_attn._varlen_attn_backward": ("varlen_attention_backward", 1, 8, 10),
}
LAUNCH = 4e-6  # seconds that the GPU needs for the smallest kernel


class Roofline(TorchDispatchMode):
    """Dispatch mode that records the estimated time of every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        name = str(func).rpartition(".")[0]
        if func.is_view or name in pretended_gpu.WITHOUT_KERNEL or not name.startswith(("aten.", "torch_attn.")):
            return output
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
        if any(x.device.type == "cuda" for x in [*inputs, *outputs]):
            flops = 0
            if name in VARLEN:
                name, query, max_length, factor = VARLEN[name]
                flops = factor * args[query].numel() * args[max_length]  # as if all captions had the maximum length
            elif func._overloadpacket in flop_registry:
                flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=output)
            self._add(name.removeprefix("aten."), flops, inputs, outputs)
        return output

    def _add(self, name: str, flops: int, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        launches = max(1, len(inputs) // pretended_gpu.FOREACH_CHUNK) if name.startswith("_foreach") else 1
        if name in ("embedding", "index"):  # reads only the selected rows
            size = 2 * sum(map(stored_bytes, outputs))
        else:
            size = sum(map(stored_bytes, inputs)) + sum(map(stored_bytes, outputs))
        seconds = max(flops / get_rate(name, outputs), size / BANDWIDTH, launches * LAUNCH)
        kind = "attention" if "attention" in name else "matmul" if flops else f"memory: {name}"
        self.seconds[kind] += seconds


def get_rate(name: str, outputs: list[Tensor]) -> float:
    if not any(x.dtype in (torch.bfloat16, torch.float16) for x in outputs):
        return FULL_RATE
    if "attention" in name:
        return ATTENTION_BACKWARD_RATE if "backward" in name else ATTENTION_RATE
    return HALF_RATE


def stored_bytes(x: Tensor) -> int:
    """Return a tensor's size in memory, in bytes. Expanded dimensions take no memory."""
    count = x.element_size()
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride else 1
    return count


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute attention in place of `F.scaled_dot_product_attention`, which cannot choose a kernel for fake tensors."""
    if torch.is_autocast_enabled("cuda"):
        query, key, value = query.bfloat16(), key.bfloat16(), value.bfloat16()
    if query.shape[1] != key.shape[1]:  # the kernel reads shared heads in place: expanded dimensions take no memory
        copies = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(copies, 1, output_size=query.shape[1]) for x in (key, value))
    kernel = torch.ops.aten._scaled_dot_product_flash_attention
    output: Tensor = kernel(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    return output


def move_to_gpu(model: torch.nn.Module) -> None:
    """Replace all parameters and buffers on the meta device with fake tensors on the GPU."""
    moved: dict[int, Any] = {}  # keyed by the id of the original parameter, because modules may share it
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in moved:
                    empty = torch.empty_like(parameter, device="cuda")
                    moved[id(parameter)] = torch.nn.Parameter(empty, parameter.requires_grad)
                module._parameters[name] = moved[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cuda")


# ---- steps -----------------------------------------------------------------------------------------------------------

Step = tuple[str, Callable[[], None], float, float, str]  # name, function, model FLOPs, items per step, unit


def make_align_step(fake_tensors: FakeTensorMode) -> Step:
    """Return a training step of ViT-L/14-336 on 64 images."""
    from gpu_parts import TOWERS, align_step
    from llm2clip.config import AlignConfig
    from llm2clip.tools.plan_costs import build_tower_on_meta_device

    tower = build_tower_on_meta_device(AlignConfig(tower=f"timm:{TOWERS['ViT-L/14-336'][0]}"))
    with fake_tensors:
        move_to_gpu(tower)
        step = align_step(tower, 64, "eager", loss_function=simple_clip_loss)
    return "align, ViT-L/14-336", step.run, step.flops, 64.0, "images"


def simple_clip_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    logits = scale.mean() * image @ text.T
    return F.cross_entropy(logits, torch.arange(len(image), device=logits.device))


def make_llm_step(fake_tensors: FakeTensorMode, train: bool) -> Step:
    """Return a step that encodes 448 captions of 20 to 51 tokens with Llama-3-8B and, if `train`, backpropagates."""
    from transformers import AutoConfig

    from llm2clip.models.text.packing import PACKED, pack_captions
    from llm2clip.tools.plan_costs import LLMS, build_llm_on_meta_device

    lengths = sorted(20 + n % 32 for n in range(448))
    tokens = sum(lengths)
    config = AutoConfig.for_model(**LLMS["meta-llama/meta-llama-3-8b"], use_cache=False, is_causal=False)
    model = build_llm_on_meta_device(config).to(torch.bfloat16).requires_grad_(False)
    model.set_attn_implementation(PACKED)
    with fake_tensors:
        move_to_gpu(model)
        batch = pack_captions([[1] * length for length in lengths], PACKED, torch.device("cuda"))
    ids = batch.pop("input_ids")

    def run() -> None:
        with torch.autocast("cuda", torch.bfloat16), torch.set_grad_enabled(train):
            embeddings = model.embed_tokens(ids).requires_grad_(train)
            output = model(inputs_embeds=embeddings, **batch).last_hidden_state
        if train:
            output.float().mean().backward()

    matrices = sum(p.numel() for layer in model.layers for p in layer.parameters() if p.ndim > 1)
    flops = (4 if train else 2) * matrices * tokens
    return f"{'tune' if train else 'embed'}, Llama-3-8B", run, float(flops), float(tokens), "tokens"


def main() -> None:
    F.scaled_dot_product_attention = flash_attention  # type: ignore[assignment]
    Tensor.pin_memory = lambda tensor: tensor  # type: ignore[assignment, method-assign]  # fake tensors are not pinned
    REPLACED.clear()  # operations on fake tensors only compute shapes
    _foreach_supported_types.append(FakeTensor)
    print_header("step", "GPU time, ms", "per second", "MFU, %", "largest shares of GPU time")
    for make_step in (make_align_step, partial(make_llm_step, train=False), partial(make_llm_step, train=True)):
        fake_tensors = FakeTensorMode(allow_non_fake_inputs=True)
        name, run, flops, items, unit = make_step(fake_tensors)
        with fake_tensors, Roofline() as roofline:
            run()
        seconds = roofline.seconds.total()
        shares = ", ".join(f"{kind} {time / seconds:.0%}" for kind, time in roofline.seconds.most_common(5))
        mfu = 100 * flops / seconds / SHEET_RATE
        print_row(name, f"{1e3 * seconds:.1f}", f"{items / seconds:,.0f} {unit}", f"{mfu:.0f}", shares)


if __name__ == "__main__":
    main()
