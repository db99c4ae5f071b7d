"""Optimizer, learning rates, trainable parameters, gradient caching and compilation."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from llm2clip.config import AlignConfig
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.vision.vision_tower import VisionTower, add_tower_lora
from llm2clip.runs.ranks import print_once

# Weight decay and gradient clipping values from the LLM2CLIP authors' training script (arXiv 2411.04997).
WEIGHT_DECAY = 0.05
MAX_GRAD_NORM = 5.0
ADAM_BETAS = (0.9, 0.999)
# Position embeddings, class tokens and register tokens of timm and transformers towers have no weight decay.
_NO_DECAY = re.compile(r"^tower\..*(pos_embed|position_embedding|cls_token|class_embedding|reg_token|register_token)")


def select_trainable_weights(model: LLM2CLIP, config: AlignConfig) -> None:
    """Freeze the tower, add LoRA layers, or unfreeze all tower weights. All other parameters are always trained.

    Raises:
        ValueError: The tower has no layers to which LoRA can be applied.
    """
    tower = model.tower
    tower.requires_grad_(config.tower_lr > 0)
    if config.lora_r:
        add_tower_lora(tower, config.lora_r, 2 * config.lora_r)
    for name, parameter in tower.named_parameters():
        if name.endswith("mask_token"):  # has no gradient, because only DINO pretraining uses mask tokens
            parameter.requires_grad_(False)


def make_optimizer(model: LLM2CLIP, config: AlignConfig, device: torch.device) -> torch.optim.AdamW:
    fused = True if device.type == "cuda" else None
    return torch.optim.AdamW(make_parameter_groups(model, config), betas=ADAM_BETAS, fused=fused)


def make_parameter_groups(model: LLM2CLIP, config: AlignConfig) -> list[dict[str, Any]]:
    """Group the trainable parameters by learning rate and weight decay.

    The learning rate of a tower parameter is `tower_lr`, multiplied by `layer_decay` once for each layer above the
    parameter. As in the authors' code, weight decay is not applied to vectors and scalars (such as biases, norms and
    the logit scale) or to the tower's position embeddings and class tokens.

    Raises:
        ValueError: `layer_decay` is less than 1, but the order of the tower's layers is unknown.
    """
    layers = _index_tower_layers(model.tower)
    top = max(layers.values())
    if config.layer_decay < 1 and top == 0:
        raise ValueError("--align.layer_decay cannot be less than 1: timm does not list this tower's layers in order")
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        lr = config.lr
        if name.startswith("tower."):
            layers_below_top = top - layers[name.removeprefix("tower.")]
            lr = config.tower_lr * config.layer_decay**layers_below_top
        is_decayed = parameter.ndim > 1 and not _NO_DECAY.search(name)
        weight_decay = WEIGHT_DECAY if is_decayed else 0.0
        groups.setdefault((lr, weight_decay), []).append(parameter)
    return [
        {"params": parameters, "lr": lr, "weight_decay": weight_decay}
        for (lr, weight_decay), parameters in groups.items()
    ]


def make_cosine_schedule(steps: int, warmup_ratio: float) -> Callable[[int], float]:
    """Return a function from the step (from 0) to the learning rate factor: linear warm-up, then cosine decay to zero.

    The schedule is taken from the LLM2CLIP authors' code (training/scheduler.py). Unlike in transformers' cosine
    schedule, the first step has a learning rate greater than 0.
    """
    warmup = round(steps * warmup_ratio)

    def compute_lr_factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        return 0.5 * (1 + math.cos(math.pi * progress))

    return compute_lr_factor


def _index_tower_layers(tower: VisionTower) -> dict[str, int]:
    """Return the layer index of each tower parameter: 0 for the stem, then the blocks, then the final norm.

    timm assigns the final norm and the last block to the same layer. Here, as in the paper, the norm is a separate
    layer with the full learning rate, and the last block has `layer_decay` times the full learning rate.
    """
    layers = tower.get_parameter_depths()
    top_block = max((layer for name, layer in layers.items() if tower.is_in_block(name)), default=0)
    if top_block == 0:  # the order of the layers is unknown
        return layers
    return {
        name: layer if tower.is_in_block(name) or layer < top_block else top_block + 1 for name, layer in layers.items()
    }


# ---- gradient caching ------------------------------------------------------------------------------------------------

ForwardPass = Callable[[], tuple[Tensor, ...]]


def compute_cached_loss(
    passes: Sequence[ForwardPass], loss_function: Callable[..., Tensor], model: nn.Module, device: torch.device
) -> Tensor:
    """Compute a contrastive loss over a batch that is too large for one forward pass (GradCache, arXiv 2101.06983).

    The parameter gradients are computed in three steps:

    1. Run the model on each part of the batch in turn, without storing activations.
    2. Compute the loss over the embeddings of all parts, and its gradient with respect to these embeddings.
    3. Run the model on each part again and backpropagate the gradient of the part's embeddings through the model.

    The gradients equal those of a single pass over the complete batch. Only one part's activations are in memory at a
    time, at the cost of a second forward pass over the batch.

    Args:
        passes: One function per part of the batch. Each function runs `model` on its part and returns a tuple of
            tensors with one row per item. All tuples must have the same length.
        loss_function: Function that returns the scalar loss. Its n-th argument is the concatenation of the n-th tensors
            from all passes.
        model: The model, including its DDP or FSDP wrapper. Gradients are reduced only once, in the last pass.
        device: Device of the model. Its random state is saved and restored, so that repeated passes use the same
            dropout masks.

    Returns:
        The loss. Calling backward() on the loss runs the third step.
    """
    # 1. Forward passes, without storing activations.
    random_states, outputs = [], []
    with torch.no_grad():
        for run in passes:
            random_states.append(_get_random_state(device))
            # An output that is a view of a parameter, such as the logit scale, requires a gradient even under no_grad.
            outputs.append(tuple(x.detach() for x in run()))

    # 2. Loss, and its gradient with respect to the outputs.
    joined = [torch.cat(parts).requires_grad_() for parts in zip(*outputs, strict=True)]
    loss = loss_function(*joined)
    loss.backward()
    gradients = []  # gradient of each output tensor, split into one part per pass
    for x, parts in zip(joined, zip(*outputs, strict=True), strict=True):
        gradient = torch.zeros_like(x) if x.grad is None else x.grad
        gradients.append(gradient.split([len(part) for part in parts]))

    # 3. Forward and backward passes, which run when backward() is called on the loss.
    def backpropagate_each_pass(grad_output: Tensor) -> None:
        state_after = _get_random_state(device)
        for n, (run, state) in enumerate(zip(passes, random_states, strict=True)):
            with torch.enable_grad(), _sync_gradients(model, n == len(passes) - 1):
                _set_random_state(state)  # restores the dropout masks of the first forward pass
                products = [(x * parts[n]).sum() for x, parts in zip(run(), gradients, strict=True)]
                torch.stack(products).sum().mul(grad_output).backward()
        _set_random_state(state_after)

    loss = loss.detach().requires_grad_()
    loss.register_hook(backpropagate_each_pass)
    return loss


@contextmanager
def _sync_gradients(model: nn.Module, sync: bool) -> Iterator[None]:
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(sync)
    with model.no_sync() if isinstance(model, DistributedDataParallel) and not sync else nullcontext():
        yield


def _get_random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])


# ---- compilation -----------------------------------------------------------------------------------------------------

MIN_COMPILED_STEPS = 1000
COMPILE_BACKEND = "inductor"


def should_compile(tower: VisionTower, device: torch.device, steps: int) -> bool:
    """Return True if compilation, which takes one to two minutes, is likely to save time over the remaining steps.

    Only towers with identical blocks that are trained on a GPU are compiled. Convolutional networks are not compiled.
    """
    if device.type != "cuda" or steps < MIN_COMPILED_STEPS or torch._dynamo.config.disable:
        return False
    is_trained = any(parameter.requires_grad for parameter in tower.parameters())
    kinds = {(type(block), tuple(tuple(p.shape) for p in block.parameters())) for block in tower.get_blocks()}
    return is_trained and len(kinds) == 1


def compile_blocks(tower: VisionTower) -> None:
    """Compile the tower's blocks in place for training. In eval mode, the blocks still run uncompiled.

    torch.compile fuses elementwise operations. Each block is a separate compilation unit. If all blocks have the same
    code and shapes, as in a vision transformer, PyTorch compiles the first block and reuses the result for the others.
    If compilation fails in the first step, the blocks run uncompiled, and PyTorch logs a warning.
    """
    print_once(
        "Compiling the vision tower: the first step takes about one to two minutes longer, and later steps are faster. "
        "To disable compilation, set TORCH_COMPILE_DISABLE=1."
    )
    torch._dynamo.config.suppress_errors = True
    for block in tower.get_blocks():
        # `block.compile()` would also compile FSDP hooks, so only `forward` is compiled.
        block.forward = _make_mode_dependent_forward(block, torch.compile(block.forward, backend=COMPILE_BACKEND))


def uncompile_blocks(tower: VisionTower) -> None:
    for block in tower.get_blocks():
        block.__dict__.pop("forward", None)


def _make_mode_dependent_forward(block: nn.Module, compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `forward` that runs the compiled function in training mode and the uncompiled method in eval mode.

    In eval mode, each batch size and precision would require recompilation.
    """
    eager = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return compiled(*args, **kwargs) if block.training else eager(*args, **kwargs)

    return forward
