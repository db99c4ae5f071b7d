"""Estimates of the memory that each component needs per device, in bytes, based on what the code allocates.

The sizes of weights and activations are measured (see `costs.py`) and summed here. Running a complete step on fake
tensors would not be enough: the report lists each component and compares many settings, and fake tensors on one device
do not account for sharded weights, communication buffers or 4-bit weights.

A trained fp32 weight takes 4 bytes, its gradient 4 bytes, and AdamW's two moments 8 bytes. With several processes,
DistributedDataParallel keeps a second copy of the gradients in its communication buckets. The backward pass frees
activations as it creates gradients, so if a step has a single pass, only the larger of the two counts. With gradient
caching, the gradients of earlier passes are in memory at the same time as the activations of the current pass.

On a CPU, memory use can also peak before training, while the LLM is being loaded. The `loading` component is this peak:
the fp32 weights plus the memory-mapped 16-bit files that they are converted from.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from llm2clip.config import AlignConfig, TuneConfig
from llm2clip.models.text.batching import CPU_BATCH_TOKENS, GPU_BATCH_TOKENS
from llm2clip.tools.plan.costs import ImageCosts, TextCosts
from llm2clip.tools.plan.devices import Machine
from llm2clip.train.losses import LOGITS_PER_CHUNK, get_loss

FRAMEWORK_OVERHEAD = 1e9  # bytes per device for the CUDA context and PyTorch's libraries
CPU_FRAMEWORK_OVERHEAD = 0.75e9  # bytes per process for PyTorch, transformers and the interpreter
USABLE_FRACTION = 0.93  # fraction of a device's memory that is usable; the rest is lost to fragmentation
NF4_BYTES = 0.5 + (1 + 4 / 256) / 64  # bytes per weight: 4 bits, plus a double-quantised 8-bit scale per 64 weights
MIN_EMBED_TOKENS = 8192  # smallest batch, in tokens, that `embed` tries on GPUs

Parts = dict[str, float]  # component name -> bytes


def estimate_tune_memory(text: TextCosts, config: TuneConfig, machine: Machine) -> Parts:
    """Return the bytes that each component needs in the `tune` stage. `config.precision` must be fp32, bf16 or fp16."""
    value_bytes, num_shards = get_bytes_per_value(config.precision), machine.num_shards
    tokens_per_step = 2 * config.batch_size * text.tokens  # two texts per pair
    tokens_per_pass = tokens_per_step
    if config.grad_cache:
        default = CPU_BATCH_TOKENS if machine.is_cpu else GPU_BATCH_TOKENS
        tokens_per_pass = min(tokens_per_step, config.batch_tokens or default)

    parts: Parts = {}
    if config.lora_r:
        linear_bytes = NF4_BYTES if config.qlora else value_bytes
        parts["LLM"] = (linear_bytes * text.linear + 4 * (text.parameters - text.linear)) / num_shards
        parts["LoRA"] = 4 * text.trained / num_shards
        if config.qlora:
            parts["dequantised matrix"] = value_bytes * text.largest_matrix
    else:
        parts["LLM"] = 4 * text.parameters / num_shards
        if value_bytes == 2:
            parts["half-precision copies"] = 2 * (text.largest_linear if machine.use_fsdp else text.linear)
    if machine.use_fsdp:
        parts["gathered"] = 2 * value_bytes * text.largest_linear  # weights of the current and next layer
    parts |= estimate_optimizer_memory(text.trained, machine)
    saved = tokens_per_pass * count_saved_bytes(text, config.gradient_checkpointing)
    parts["activations"] = _subtract_gradients(saved, text.trained / num_shards, tokens_per_pass < tokens_per_step)
    return parts | _estimate_fixed_parts(text, machine)


def estimate_embed_memory(text: TextCosts, precision: str, machine: Machine) -> Parts:
    """Return the bytes that each component needs in the `embed` stage.

    On GPUs, the estimate is for the smallest batch, because `embed` uses larger batches only if they fit in memory. The
    LLM is loaded on the CPU, and the device holds linear weights only in the matmul precision.
    """
    parts = {"LLM": get_bytes_per_value(precision) * text.linear + 4.0 * (text.parameters - text.linear)}
    parts["activations"] = (CPU_BATCH_TOKENS if machine.is_cpu else MIN_EMBED_TOKENS) * text.saved_per_token
    return parts | _estimate_fixed_parts(text, machine)


def estimate_align_memory(image: ImageCosts, text: TextCosts, config: AlignConfig, machine: Machine) -> Parts:
    """Return the bytes that each component needs in the `align` stage. `config.precision` must be fp32, bf16 or fp16.

    `align` loads the LLM on the CPU to check that this LLM created the store.
    """
    micro_batch = min(config.micro_batch_size or config.batch_size, config.batch_size)
    images = config.batch_size * machine.count
    texts = images * image.captions
    saved = image.saved
    if config.gradient_checkpointing and image.saved > image.layer_inputs:
        saved = image.layer_inputs + image.saved_per_layer

    parts = {"model": 4 * image.parameters / machine.num_shards} | estimate_optimizer_memory(image.trained, machine)
    if config.precision != "fp32":
        parts["half-precision copies"] = image.copies / machine.num_shards
    # One additional layer accounts for gradients, as in `count_saved_bytes`.
    activations = micro_batch * (saved + image.saved_per_layer)
    several_passes = micro_batch < config.batch_size
    parts["activations"] = _subtract_gradients(activations, image.trained / machine.num_shards, several_passes)
    # Embeddings, gathered embeddings and their gradients, plus the tensors for a chunk of logits.
    chunk = min(LOGITS_PER_CHUNK["cpu" if machine.is_cpu else "cuda"], config.batch_size * texts)
    dims = image.embed_dim + sum(config.matryoshka_dims)
    parts["loss"] = 12 * dims * (images + texts) + 4 * chunk * get_loss(config.loss).chunk_tensors
    parts["captions"] = 4 * text.embed_dim * micro_batch * image.captions
    if config.distill_weight:
        # For both towers: distances from this rank's features to the features of all images, with intermediate results
        # and gradients.
        parts["loss"] += 24 * config.batch_size * images
        parts["pretrained tower"] = 0.0 if config.caches_features else 4.0 * image.tower
    return parts | _estimate_fixed_parts(text, machine)


def count_saved_bytes(text: TextCosts, gradient_checkpointing: bool) -> float:
    """Return the bytes of activations that a training pass through the LLM saves per token.

    One additional layer accounts for gradients in the layer that the backward pass is currently processing.
    """
    saved = text.layers * text.saved_per_token
    if gradient_checkpointing:
        saved = text.layers * text.input_per_token + text.saved_per_token
    return saved + text.saved_per_token + text.saved_outside


def estimate_optimizer_memory(trained: float, machine: Machine) -> Parts:
    """Return the bytes of gradients and AdamW state for `trained` weights, excluding the weights themselves."""
    if machine.use_fsdp:
        return {"gradients": 4 * trained / machine.count, "AdamW": 8 * trained / machine.count}
    return {"gradients": 4 * trained * (2 if machine.count > 1 else 1), "AdamW": 8 * trained}


def get_bytes_per_value(precision: str) -> int:
    """Return the size in bytes of each value in a matmul input."""
    return 4 if precision == "fp32" else 2


def compute_peak_memory(parts: Parts) -> float:
    """Return the peak memory in bytes, which is reached either in training or while loading the LLM."""
    training = sum(size for part, size in parts.items() if part != "loading")
    return max(training, parts.get("loading", 0.0))


def fits_in_memory(parts: Parts, memory: float) -> bool:
    """Return True if the peak memory fits on a device with `memory` GB."""
    return compute_peak_memory(parts) <= USABLE_FRACTION * memory * 1e9


def _subtract_gradients(activations: float, trained: float, several_passes: bool) -> float:
    """Return the bytes that activations need beyond the gradients of `trained` weights (see the module docstring)."""
    return activations if several_passes else max(0.0, activations - 4 * trained)


def _estimate_fixed_parts(text: TextCosts, machine: Machine) -> Parts:
    if not machine.is_cpu:
        return {"libraries": FRAMEWORK_OVERHEAD}
    # Until the conversion ends, the fp32 weights (4 bytes) and the memory-mapped 16-bit files (2 bytes) are in memory.
    return {"libraries": CPU_FRAMEWORK_OVERHEAD, "loading": 6.0 * text.parameters + CPU_FRAMEWORK_OVERHEAD}


# ---- settings that fit in memory -------------------------------------------------------------------------------------

Changes = dict[str, Any]  # setting -> new value; use_fsdp is a `Machine` setting


def suggest_flags(
    config: TuneConfig | AlignConfig, machine: Machine, memory: Callable[[Any, Machine], Parts]
) -> list[tuple[str, float]]:
    """Return sets of command-line flags that make a stage fit in memory, each with the resulting peak in bytes.

    A set is omitted if it only adds flags to an earlier set.

    Args:
        memory: Function that estimates the memory of each component, given a config and a machine.
    """
    if isinstance(config, TuneConfig):
        stage, changes = "tune", _list_tune_changes(config)
    else:
        stage, changes = "align", _list_align_changes(config)
    suggestions: list[tuple[str, float]] = []
    selected: list[set[str]] = []
    for change in changes:
        use_fsdp = change.pop("use_fsdp", False)
        if use_fsdp and machine.count == 1:
            continue
        settings = {name: value for name, value in change.items() if getattr(config, name) != value}
        flags = ["--use_fsdp"] if use_fsdp else []
        flags += [f"--{stage}.{name} {str(value).lower()}" for name, value in settings.items()]
        names = {flag.split()[0] for flag in flags}
        if any(earlier <= names for earlier in selected):
            continue
        try:
            parts = memory(dataclasses.replace(config, **settings), dataclasses.replace(machine, use_fsdp=use_fsdp))
        except ValueError:  # the tower has no layers that support LoRA
            continue
        if fits_in_memory(parts, machine.device_spec.memory):
            suggestions.append((" ".join(flags), compute_peak_memory(parts)))
            selected.append(names)
    return suggestions


def _list_tune_changes(config: TuneConfig) -> Iterable[Changes]:
    small = {"gradient_checkpointing": True, "grad_cache": True}
    yield {"gradient_checkpointing": True}
    yield {"grad_cache": True}
    for tokens in (32768, 16384, 8192, 4096):
        yield small | {"batch_tokens": tokens}
    if config.lora_r:
        yield {"qlora": True}
        for tokens in (16384, 4096):
            yield small | {"qlora": True, "batch_tokens": tokens}
    yield {"use_fsdp": True, "qlora": False}  # FSDP2 does not support 4-bit weights
    yield {"use_fsdp": True, "qlora": False, **small, "batch_tokens": 8192}


def _list_align_changes(config: AlignConfig) -> Iterable[Changes]:
    largest = config.micro_batch_size or config.batch_size
    sizes = [2**n for n in range(16, -1, -1) if 2**n < largest]
    yield {"gradient_checkpointing": True}
    for size in sizes:
        yield {"micro_batch_size": size}
    for size in sizes:
        yield {"gradient_checkpointing": True, "micro_batch_size": size}
    small = {"gradient_checkpointing": True, "micro_batch_size": min(16, largest)}
    yield {"use_fsdp": True}
    yield {"use_fsdp": True, **small}
    if config.tower_lr > 0 and not config.lora_r:
        yield {**small, "lora_r": 16}
