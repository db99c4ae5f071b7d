"""Compilation of the vision tower's blocks with torch.compile, which fuses elementwise operations on GPUs.

Each block is compiled separately ("regional compilation"). All blocks of a vision transformer have the same code and
shapes, so PyTorch compiles the first block and reuses the result for the others. Compiling the complete tower would
take many times as long. The names and values of the weights do not change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
from torch import nn

from llm2clip.models.vision.vision_tower import VisionTower
from llm2clip.runs.ranks import print_once

# Compilation takes one to two minutes. The elementwise operations that it fuses are estimated to take about 0.1 s per
# 64 images of ViT-L/14-336 on an H100, and much less for a small tower (see docs/results/speed.md). In shorter runs,
# compilation may take more time than it saves.
MIN_STEPS = 1000
BACKEND = "inductor"


def should_compile(tower: VisionTower, device: torch.device, steps: int) -> bool:
    """Return True if compilation is likely to save time over the remaining steps of a run.

    The tower must be trained on a GPU and consist of identical blocks. The blocks of a convolutional network have
    different shapes, so all of them would have to be compiled. TORCH_COMPILE_DISABLE=1 disables all compilation in
    PyTorch.
    """
    if device.type != "cuda" or steps < MIN_STEPS or torch._dynamo.config.disable:
        return False
    is_trained = any(parameter.requires_grad for parameter in tower.parameters())
    return is_trained and has_equal_blocks(tower)


def has_equal_blocks(tower: VisionTower) -> bool:
    """Return True if all blocks of the tower have the same class and the same parameter shapes."""
    kinds = {(type(block), tuple(tuple(p.shape) for p in block.parameters())) for block in tower.blocks()}
    return len(kinds) == 1


def compile_blocks(tower: VisionTower) -> None:
    """Compile the tower's blocks in place for training. In eval mode, the blocks still run uncompiled.

    The blocks are compiled in the first step. If that fails, they run uncompiled, and PyTorch logs a warning.
    """
    print_once(
        "Compiling the vision tower: the first step takes about one to two minutes longer, and later steps are faster. "
        "TORCH_COMPILE_DISABLE=1 turns this off."
    )
    torch._dynamo.config.suppress_errors = True
    for block in tower.blocks():
        # Replace `forward` instead of calling `block.compile()`, so that the hooks of FSDP are not compiled.
        block.forward = _in_training_only(block, torch.compile(block.forward, backend=BACKEND))


def restore_blocks(tower: VisionTower) -> None:
    """Undo `compile_blocks`."""
    for block in tower.blocks():
        block.__dict__.pop("forward", None)


def _in_training_only(block: nn.Module, compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls the compiled function in training mode and the block's own method in eval mode.

    Evaluation uses other batch sizes and precisions, each of which would require another compilation.
    """
    eager = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return compiled(*args, **kwargs) if block.training else eager(*args, **kwargs)

    return forward
