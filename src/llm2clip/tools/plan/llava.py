"""Memory and time estimates for `llm2clip llava train`, computed with the same methods as in the `plan` command."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from llm2clip.config import AlignConfig, EncoderConfig, TuneConfig
from llm2clip.llava.config import LlavaConfig
from llm2clip.tools.plan.devices import Machine
from llm2clip.tools.plan.flops import TextCosts, count_flops, text_costs
from llm2clip.tools.plan.memory import FRAMEWORK_OVERHEAD, bytes_per_value, fits, optimizer_memory, peak_memory
from llm2clip.tools.plan.model_configs import build_tower, get_llm_config

STAGES = ("pretrain", "instruct")


@dataclass(frozen=True)
class LlavaPlan:
    """Estimates for both training stages.

    Args:
        machine: devices on which the estimates are based.
        image_tokens: number of tokens per image.
        parameters: number of parameters in each part of the model.
        flop: FLOP per conversation in each stage. The key "image" contains the vision tower's FLOP per image.
        feature_bytes: size of the cached patch features for each stage's images, in bytes.
        memory: memory per device and component in each stage, in bytes.
        fits: True for each stage that fits into a device's memory.
        hours: wall-clock hours per stage, using all devices.
    """

    machine: Machine
    image_tokens: int
    parameters: dict[str, int]
    flop: dict[str, float]
    feature_bytes: dict[str, float]
    memory: dict[str, dict[str, float]]
    fits: dict[str, bool]
    hours: dict[str, float]


def plan_llava(
    config: LlavaConfig,
    machine: Machine,
    *,
    llm: str,
    vision: str,
    image_size: int | None,
    conversations: dict[str, int],
    text_tokens: dict[str, float],
) -> LlavaPlan:
    """Estimate the cost of both training stages.

    Args:
        config: training settings.
        machine: devices to train on.
        llm: causal LLM. No network access is required if `model_configs.py` lists the LLM.
        vision: vision tower. No network access is required if `model_configs.py` lists the tower.
        image_size: image size in pixels. Default: the size on which the tower was trained.
        conversations: number of conversations in each stage. Each conversation is assumed to have a different image.
        text_tokens: mean number of text tokens per conversation in each stage.

    Raises:
        ValueError: a model is unknown, or the device does not support the precision.
    """
    precision = machine.device_spec.precision(config.precision)
    model = _count_model(config, llm, vision, image_size, precision)
    epochs = {"pretrain": config.pretrain_epochs, "instruct": config.epochs}
    feature_bytes = {stage: 2.0 * conversations[stage] * model.image_tokens * model.feature_size for stage in STAGES}
    # Features are cached for both stages or for neither. The stages are assumed to use different images.
    total_bytes = sum(feature_bytes[stage] for stage in STAGES if epochs[stage])
    cached = 0 < total_bytes <= config.cache_gb * 1e9
    flop = {"image": model.tower_flop}
    hours = {}
    memory = {}
    for stage in STAGES:
        length = min(config.max_length, model.image_tokens + text_tokens[stage])
        trained_on = conversations[stage] * epochs[stage]
        encoded_images = conversations[stage] if cached else trained_on
        flop[stage] = _conversation_flop(model, config, stage, length)
        hours[stage] = machine.hours(trained_on * flop[stage] + encoded_images * model.tower_flop, precision, "tune")
        memory[stage] = _stage_memory(model, config, stage, length, precision, machine, cached)
    return LlavaPlan(
        machine=machine,
        image_tokens=model.image_tokens,
        parameters={
            "vision tower": model.tower_parameters,
            "projector": model.projector_parameters,
            "language model": model.llm_parameters,
        },
        flop=flop,
        feature_bytes=feature_bytes,
        memory=memory,
        fits={stage: fits(parts, machine.device_spec.memory) for stage, parts in memory.items()},
        hours=hours,
    )


def format_llava_plan(plan: LlavaPlan, conversations: dict[str, int]) -> list[str]:
    """Format the plan as lines of text."""
    parameters = ", ".join(f"{name} {count / 1e9:.2f}B" for name, count in plan.parameters.items())
    lines = [f"Parameters: {parameters}; {plan.image_tokens} tokens per image"]
    machine = plan.machine
    for stage in STAGES:
        memory = plan.memory[stage]
        does_not_fit = f"does not fit into {machine.device_spec.memory:.0f} GB: try --use_fsdp"
        verdict = "fits" if plan.fits[stage] else does_not_fit
        largest_parts = sorted(memory.items(), key=lambda part: -part[1])[:4]
        parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in largest_parts)
        lines += [
            f"{stage}: {plan.hours[stage]:.1f} hours on {machine.count} x {machine.device} for "
            f"{conversations[stage]:,} conversations, {plan.flop[stage] / 1e12:.1f} TFLOP each",
            f"  {peak_memory(memory) / 1e9:.0f} GB per device ({verdict}): {parts}",
            f"  cached patch features would take {plan.feature_bytes[stage] / 1e9:,.0f} GB",
        ]
    lines.append(
        f"Assumed: {machine.stage_mfu('tune'):.0%} of the device's peak FLOP/s. These are estimates, not measurements."
    )
    return lines


@dataclass(frozen=True)
class _ModelCosts:
    """Sizes and costs of the model's components.

    Args:
        llm: costs of the LLM's blocks.
        llm_parameters: number of parameters in the LLM, including its head.
        head: number of weights in the LLM's head, counted even if they are tied to the input embeddings.
        projector_parameters: number of parameters in the projector.
        tower_parameters: number of parameters in the vision tower.
        tower_flop: FLOP per image in the vision tower.
        image_tokens: number of tokens per image.
        feature_size: dimension of a patch feature.
    """

    llm: TextCosts
    llm_parameters: int
    head: int
    projector_parameters: int
    tower_parameters: int
    tower_flop: float
    image_tokens: int
    feature_size: int


def _count_model(config: LlavaConfig, llm: str, vision: str, image_size: int | None, precision: str) -> _ModelCosts:
    encoder = EncoderConfig(path=llm)
    llm_config = get_llm_config(encoder)
    tune = TuneConfig(lora_r=config.lora_r, gradient_checkpointing=config.gradient_checkpointing)
    costs = text_costs(encoder, tune, precision)
    head = llm_config.vocab_size * llm_config.hidden_size
    tower = build_tower(AlignConfig(tower=vision, image_size=image_size))
    image_tokens, feature_size = _patch_shape(tower)
    size = tower.preprocess.size
    pixels = torch.zeros(1, 3, size, size, dtype=torch.uint8, device="meta")
    with torch.no_grad():
        tower_flop = count_flops(lambda: tower(pixels))
    return _ModelCosts(
        llm=costs,
        llm_parameters=costs.parameters + (0 if llm_config.tie_word_embeddings else head),
        head=head,
        projector_parameters=(feature_size + 1 + llm_config.hidden_size + 1) * llm_config.hidden_size,
        tower_parameters=sum(parameter.numel() for parameter in tower.parameters()),
        tower_flop=tower_flop,
        image_tokens=image_tokens,
        feature_size=feature_size,
    )


def _patch_shape(tower: Any) -> tuple[int, int]:
    """Return the number of patch features per image and the dimension of a patch feature.

    Raises:
        ValueError: `llava build` does not support the tower.
    """
    size = tower.preprocess.size
    backbone = tower.backbone
    if tower.config["library"] == "transformers":
        return (size // backbone.config.patch_size) ** 2, backbone.config.hidden_size
    if hasattr(getattr(backbone, "patch_embed", None), "num_patches"):
        return int(backbone.patch_embed.num_patches), tower.feature_dim
    with torch.no_grad():
        features = backbone.forward_features(torch.zeros(1, 3, size, size, device="meta"))
    if features.ndim != 4 or features.shape[1] != backbone.num_features:
        raise ValueError(
            f"{tower.config['architecture']} cannot be used in LLaVA: it does not return a channels-first feature map"
        )
    return features.shape[2] * features.shape[3], features.shape[1]


def _conversation_flop(model: _ModelCosts, config: LlavaConfig, stage: str, length: float) -> float:
    """Return the FLOP per conversation in a training step.

    The forward and backward passes go through the LLM, its head and the projector. The backward pass also computes the
    gradients of the trained weights. With fused kernels, causal attention takes half the FLOP of full attention.

    Args:
        model: sizes and costs of the model's components.
        config: training settings.
        stage: `pretrain` or `instruct`.
        length: number of tokens per conversation, including image tokens.
    """
    llm = model.llm
    linear = 2 * llm.linear * length
    attention = llm.forward(length) - linear
    head = 2 * model.head * (length - model.image_tokens)  # no logits are computed for image tokens
    projector = 2 * model.projector_parameters * model.image_tokens
    forward = linear + attention / 2 + head + projector
    backward = linear + attention + head + 2 * projector
    if stage == "instruct" and config.lora_r:
        forward += 2 * llm.trained * length
        backward += 4 * llm.trained * length
    elif stage == "instruct":
        backward += linear + head
    return forward * (1 + config.gradient_checkpointing) + backward


def _stage_memory(
    model: _ModelCosts, config: LlavaConfig, stage: str, length: float, precision: str, machine: Machine, cached: bool
) -> dict[str, float]:
    """Return the memory per device and component, in bytes.

    Weights are in fp32, or in half precision if LoRA is used. In addition, each trained parameter needs 4 bytes for its
    gradient (8 bytes with several processes) and 8 bytes for AdamW.

    Args:
        model: sizes and costs of the model's components.
        config: training settings.
        stage: `pretrain` or `instruct`.
        length: number of tokens per conversation, including image tokens.
        precision: fp32, bf16 or fp16.
        machine: devices to train on.
        cached: if True, patch features are cached, and the tower is not needed.
    """
    llm = model.llm
    sharded, count = machine.use_fsdp, machine.count
    shards = count if sharded else 1
    compute_bytes = bytes_per_value(precision)
    weight_bytes = compute_bytes if config.lora_r else 4
    lora = bool(config.lora_r) and stage == "instruct"
    trained = model.projector_parameters
    if stage == "instruct":
        trained += llm.trained if config.lora_r else model.llm_parameters
    parts = {"LLM": weight_bytes * model.llm_parameters / shards}
    if lora:
        parts["LoRA"] = 4.0 * llm.trained / shards
    if weight_bytes > compute_bytes:
        copied = llm.largest_linear if sharded else llm.linear + model.head
        parts["copies in half precision"] = compute_bytes * copied
    if sharded:
        parts["gathered"] = 2.0 * compute_bytes * llm.largest_linear  # the current block and the next one
    parts |= optimizer_memory(trained, count, sharded)
    if not cached:
        parts["tower"] = 4.0 * model.tower_parameters
    batch_size = config.pretrain_batch_size if stage == "pretrain" else config.batch_size
    micro_batch_size = max(1, math.ceil(min(config.micro_batch_size, batch_size / count)))
    per_token = llm.layers * llm.saved_per_token
    if config.gradient_checkpointing:
        per_token = llm.layers * llm.input_per_token + llm.saved_per_token
    per_token += llm.saved_per_token + llm.saved_outside  # gradients during the backward pass of one block
    vocabulary = model.head // llm.embed_dim
    logits = vocabulary * (compute_bytes + 4 + 4)  # logits, their fp32 copy and their gradient
    text_tokens = length - model.image_tokens
    parts["activations"] = micro_batch_size * (length * per_token + text_tokens * logits)
    return {**parts, "libraries": FRAMEWORK_OVERHEAD, "loading": 0.0}
