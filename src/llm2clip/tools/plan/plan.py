"""Estimates of the parameters, FLOPs, memory and hours of a `fit` run, without running it.

Hours are FLOPs divided by the product of the peak throughput and an assumed model FLOPs utilisation (MFU); see
`devices.MFU`. Small models, small batches and slow image decoding reduce the MFU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

from llm2clip.config import AlignConfig, FitConfig, TuneConfig
from llm2clip.tools.plan.devices import Device, Machine
from llm2clip.tools.plan.flops import ImageCosts, TextCosts, image_costs, text_costs
from llm2clip.tools.plan.memory import align_memory, embed_memory, fits, loading_memory, peak_memory, tune_memory

STAGES = ("tune", "embed", "align")

# Number of matmuls between image and text embeddings in the loss and its gradient, as (one process, several processes).
LOSS_MATMULS = {"infonce": (4, 5), "sigmoid": (3, 4)}

# Command-line flags, and the resulting memory per component in bytes.
Suggestion = tuple[str, dict[str, float]]


@dataclass
class Plan:
    """Resource estimates for a `fit` run.

    Attributes:
        config, machine, images, captions_per_image, tokens_per_caption: see `plan_fit`.
        captions: number of captions used per image in each `align` step.
        parameters: number of parameters in each component, and number of parameters trained by each stage.
        flop: FLOPs per caption or image for each type of pass.
        store: size of the embedding store, in bytes.
        features: size of the pretrained tower's cached features, in bytes; 0 if they are not cached.
        memory: memory per device for each stage and component, in bytes.
        fits: True for each stage that fits into the device's memory.
        suggestions: for each stage that does not fit, command-line flags that would make it fit, and the resulting peak
            memory in bytes.
        hours: duration of each stage, in hours.
        images_per_second: number of images that must be decoded per second and device in the `align` stage.
        online: costs of running the LLM in every `align` step, relative to training with an embedding store. "step" is
            the ratio of FLOPs per image. "hours" is the ratio of the total time for `embed` and `align`. "weights" is
            the size of the LLM in half precision, in bytes.
    """

    config: FitConfig
    machine: Machine
    images: int
    captions_per_image: float
    tokens_per_caption: float
    captions: float
    parameters: dict[str, int]
    flop: dict[str, float]
    store: float
    features: float
    memory: dict[str, dict[str, float]]
    fits: dict[str, bool]
    suggestions: dict[str, list[tuple[str, float]]] = field(default_factory=dict)
    hours: dict[str, float] = field(default_factory=dict)
    images_per_second: float = 0.0
    online: dict[str, float] = field(default_factory=dict)


def plan_fit(
    config: FitConfig, machine: Machine, images: int, captions_per_image: float, tokens_per_caption: float
) -> Plan:
    """Estimate the parameters, FLOPs, memory and hours of a `fit` run.

    Args:
        config: settings for all stages.
        machine: devices on which to run.
        images: number of training images.
        captions_per_image: average number of captions per image. All captions are assumed to be distinct.
        tokens_per_caption: average number of tokens per caption, including the template.

    Raises:
        ValueError: a model is unknown, or a number is not positive.
    """
    data = {"images": images, "captions_per_image": captions_per_image, "tokens_per_caption": tokens_per_caption}
    for name, value in data.items():
        if value <= 0:
            raise ValueError(f"--{name} must be greater than 0 (got {value})")
    device, count, use_fsdp, is_cpu = machine.device_spec, machine.count, machine.use_fsdp, machine.is_cpu
    align_precision = device.precision(config.align.precision, "align")
    align = dataclasses.replace(config.align, precision=cast(Any, align_precision))
    tune_precision = device.precision(config.tune.precision)
    tokens = min(tokens_per_caption, config.encoder.max_length or 512)
    captions = min(align.captions_per_image or captions_per_image, captions_per_image)
    text = text_costs(config.encoder, config.tune, tune_precision, tokens_on_cpu=round(tokens) if is_cpu else None)
    image = image_costs(align, text.embed_dim, captions)

    # FLOPs.
    caption_forward = text.forward(tokens)
    caption_tune = text.step(tokens, config.tune)
    step = _align_flop(image, align, captions, count)
    tune_texts = 2 * config.tune.steps * config.tune.batch_size * count
    all_captions = images * captions_per_image
    image_passes = images * align.epochs
    feature_pass = images * image.tower_forward if align.caches_features else 0.0

    # Hours.
    align_hours = machine.hours(feature_pass + image_passes * step["step"], align.precision, "align")
    online_hours = align_hours + machine.hours(
        image_passes * captions * caption_forward, config.embed.precision, "embed"
    )
    hours = {
        "tune": machine.hours(tune_texts * caption_tune, tune_precision, "tune"),
        "embed": machine.hours(all_captions * caption_forward, config.embed.precision, "embed"),
        "align": align_hours,
    }

    # Memory. `align` loads the LLM on the CPU to check that the store was created with it.
    llm_loading = loading_memory(text) if is_cpu else 0.0
    memory = {
        "tune": tune_memory(text, config.tune, tokens, tune_precision, count, use_fsdp, is_cpu),
        "embed": embed_memory(text, device.precision(config.embed.precision), is_cpu),
        "align": align_memory(image, align, captions, text.embed_dim, count, use_fsdp, llm_loading, is_cpu),
    }
    if config.tune.steps == 0:
        del memory["tune"]
    bytes_per_caption = text.embed_dim * 2 if config.embed.dtype == "float16" else text.embed_dim + 4

    plan = Plan(
        config,
        machine,
        images,
        captions_per_image,
        tokens_per_caption,
        captions,
        parameters={
            "caption encoder": text.parameters,
            "trained by tune": text.trained if config.tune.steps else 0,
            "vision tower": image.tower,
            "projection": image.projection,
            "adapter": image.adapter,
            "trained by align": image.trained,
        },
        flop={
            "caption forward": caption_forward,
            "caption tune": caption_tune,
            "tower forward": image.tower_forward,
            **step,
        },
        store=all_captions * bytes_per_caption + 16 * all_captions,
        features=images * (2 * image.feature_dim + 16) if align.caches_features else 0.0,
        memory=memory,
        fits={stage: fits(parts, device.memory) for stage, parts in memory.items()},
        hours=hours,
        images_per_second=0.0 if align.tower_lr == 0 else image_passes / (align_hours * 3600 * count),
        online={
            "step": (step["step"] + captions * caption_forward) / step["step"],
            "hours": online_hours / (hours["embed"] + align_hours),
            "weights": 2.0 * text.parameters,
        },
    )
    if not plan.fits.get("tune", True):
        candidates = _tune_candidates(config.tune, text, tokens, tune_precision, count, is_cpu)
        plan.suggestions["tune"] = _select_fitting(candidates, device)
    if not plan.fits["align"]:
        candidates = _align_candidates(align, image, text.embed_dim, captions, count, is_cpu)
        plan.suggestions["align"] = _select_fitting(candidates, device)
    return plan


def _align_flop(image: ImageCosts, config: AlignConfig, captions: float, count: int) -> dict[str, float]:
    """Return the FLOPs per image in an `align` step: forward and backward, repeated forward passes, loss, and total.

    With self-distillation and random crops, the forward pass through the pretrained tower is part of "image once".
    """
    tower = 0.0 if config.tower_lr == 0 else image.tower_forward
    forward = tower + image.heads_forward
    recomputes = config.gradient_checkpointing and image.saved > image.layer_inputs > 0
    uses_grad_cache = (config.micro_batch_size or config.batch_size) < config.batch_size
    teacher = image.tower_forward if config.distill_weight and not config.caches_features else 0.0
    once = forward + teacher + image.backward
    again = (tower if recomputes else 0.0) + (forward if uses_grad_cache else 0.0)
    texts = config.batch_size * count * captions
    loss = 2 * LOSS_MATMULS[config.loss][count > 1] * texts * image.embed_dim
    return {"image once": once, "image again": again, "image loss": loss, "step": once + again + loss}


# ---- settings that fit into memory -----------------------------------------------------------------------------------


def _select_fitting(candidates: Iterator[Suggestion], device: Device) -> list[tuple[str, float]]:
    """Return the candidates that fit, except those that only add flags to an earlier candidate that fits."""
    selected: list[tuple[str, float]] = []
    for flags, parts in candidates:
        names = _flag_names(flags)
        if fits(parts, device.memory) and not any(_flag_names(earlier) <= names for earlier, _ in selected):
            selected.append((flags, peak_memory(parts)))
    return selected


def _flag_names(flags: str) -> set[str]:
    return {word for word in flags.split() if word.startswith("--")}


def _tune_candidates(
    config: TuneConfig, text: TextCosts, tokens: float, precision: str, count: int, is_cpu: bool
) -> Iterator[Suggestion]:
    small: dict[str, Any] = {"gradient_checkpointing": True, "grad_cache": True}
    changes: list[dict[str, Any]] = [{"gradient_checkpointing": True}, {"grad_cache": True}]
    changes += [{**small, "batch_tokens": n} for n in (32768, 16384, 8192, 4096)]
    if config.lora_r:
        changes.append({"qlora": True})
        changes += [{**small, "qlora": True, "batch_tokens": n} for n in (16384, 4096)]
    for change in changes:
        changed = dataclasses.replace(config, **change)
        yield _flags("tune", config, change), tune_memory(text, changed, tokens, precision, count, is_cpu=is_cpu)
    if count > 1:  # FSDP2 does not support 4-bit weights
        for change in ({}, {**small, "batch_tokens": 8192}):
            changed = dataclasses.replace(config, **{**change, "qlora": False})
            flags = f"--use_fsdp {_flags('tune', config, change)}".rstrip()
            yield flags, tune_memory(text, changed, tokens, precision, count, use_fsdp=True)


def _align_candidates(
    config: AlignConfig, image: ImageCosts, text_dim: int, captions: float, count: int, is_cpu: bool
) -> Iterator[Suggestion]:
    largest = config.micro_batch_size or config.batch_size
    sizes = [2**n for n in range(16, -1, -1) if 2**n < largest]
    changes: list[dict[str, Any]] = [{"gradient_checkpointing": True}]
    changes += [{"micro_batch_size": n} for n in sizes]
    changes += [{"gradient_checkpointing": True, "micro_batch_size": n} for n in sizes]
    for change in changes:
        changed = dataclasses.replace(config, **change)
        yield _flags("align", config, change), align_memory(image, changed, captions, text_dim, count, is_cpu=is_cpu)
    small: dict[str, Any] = {"gradient_checkpointing": True, "micro_batch_size": min(16, largest)}
    if count > 1:
        for change in ({}, small):
            changed = dataclasses.replace(config, **change)
            flags = f"--use_fsdp {_flags('align', config, change)}".rstrip()
            yield flags, align_memory(image, changed, captions, text_dim, count, use_fsdp=True)
    if config.tower_lr > 0 and not config.lora_r:
        small["lora_r"] = 16
        changed = dataclasses.replace(config, **small)
        lora_costs = image_costs(changed, text_dim, captions)
        yield (
            _flags("align", config, small),
            align_memory(lora_costs, changed, captions, text_dim, count, is_cpu=is_cpu),
        )


def _flags(stage: str, config: TuneConfig | AlignConfig, change: dict[str, Any]) -> str:
    """Return the command-line flags for a change, omitting settings that already have the new value."""
    changed = {name: value for name, value in change.items() if getattr(config, name) != value}
    return " ".join(f"--{stage}.{name} {str(value).lower()}" for name, value in changed.items())
