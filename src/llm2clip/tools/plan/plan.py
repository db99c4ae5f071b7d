"""What a recipe costs before anything runs: parameters, FLOP, bytes and hours, by arithmetic.

Hours are FLOP over what the device could do, times a share that is assumed (MFU): 0.4 is good practice for large
matrices. Small models, short batches and slow decoding of images stay below it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from llm2clip.config import AlignConfig, FitConfig, TuneConfig
from llm2clip.tools.plan.devices import Device, Machine
from llm2clip.tools.plan.flops import ImageCosts, TextCosts, image_costs, text_costs
from llm2clip.tools.plan.memory import align_memory, embed_memory, fits, peak_memory, tune_memory

STAGES = ("tune", "embed", "align")
# Products of the images' and the texts' vectors in the loss and its gradient: alone, and among processes.
PRODUCTS = {"infonce": (4, 5), "sigmoid": (3, 4)}


@dataclass
class Plan:
    """What comes out. Parameters are counts, FLOP are per image or per caption, memory is bytes of a device by part,
    hours are on all devices together.

    Args:
        config, machine, images, captions_per_image, tokens_per_caption: what was asked.
        captions: of an image in a step.
        parameters: of each part, and those that learn in each stage.
        flop: of one caption or image in each kind of pass.
        store: bytes of the embedded captions.
        features: bytes of the tower's features, where they are cached.
        memory: of each stage, by part.
        fits: whether a device holds each stage.
        ways_out: of a stage that does not fit, settings with which it would, and what it then takes.
        hours: of each stage.
        decoded: images that each device must be given in a second of align.
        online: the same with the language model in the training step: FLOP of a step's image, times as much as ours;
            hours of all stages after tune, times ours; bytes of its weights in half precision.
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
    ways_out: dict[str, list[tuple[str, float]]] = field(default_factory=dict)
    hours: dict[str, float] = field(default_factory=dict)
    decoded: float = 0.0
    online: dict[str, float] = field(default_factory=dict)


def plan_fit(
    config: FitConfig, machine: Machine, images: int, captions_per_image: float, tokens_per_caption: float
) -> Plan:
    """Work out what a fit takes.

    Args:
        recipe: of all stages.
        machine: that it would run on.
        images: that align trains on.
        captions_per_image: on average; each is taken to be another, and is encoded once.
        tokens_per_caption: on average, the template's among them.

    Raises:
        ValueError: an unknown model, or numbers that make no sense.
    """
    given = {"images": images, "captions_per_image": captions_per_image, "tokens_per_caption": tokens_per_caption}
    for name, value in given.items():
        if value <= 0:
            raise ValueError(f"--{name} is more than 0; got {value}")
    device, count, shared_out = machine.each, machine.count, machine.use_fsdp
    tokens = min(tokens_per_caption, config.encoder.max_length or 512)
    tuned = device.precision(config.tune.precision)
    text = text_costs(config.encoder, config.tune, tuned)
    align = dataclasses.replace(config.align, precision=device.precision(config.align.precision))
    features_cached = align.tower_lr == 0
    captions = min(align.captions_per_image or captions_per_image, captions_per_image)
    image = image_costs(align, text.width, captions)

    steps = _align_flop(image, align, captions, count)
    tune_step = text.step(tokens, config.tune)
    passes = images * align.epochs
    once = images * image.tower_forward if features_cached else 0.0
    rows = images * captions_per_image
    forward = text.forward(tokens)

    texts = 2 * config.tune.steps  # of each device, times its batch
    parts = {
        "tune": tune_memory(text, config.tune, tokens, tuned, count, shared_out),
        "embed": embed_memory(text, device.precision(config.embed.precision)),
        "align": align_memory(image, align, captions, text.width, count, shared_out),
    }
    if texts == 0:
        del parts["tune"]
    took = {
        "tune": machine.hours(texts * config.tune.batch_size * count * tune_step, tuned),
        "embed": machine.hours(rows * forward, config.embed.precision),
        "align": machine.hours(once + passes * steps["step"], align.precision),
    }
    step_online = steps["step"] + captions * forward
    online = machine.hours(once + passes * steps["step"], align.precision) + machine.hours(
        passes * captions * forward, config.embed.precision
    )
    found = Plan(
        config, machine, images, captions_per_image, tokens_per_caption, captions,
        parameters={
            "caption encoder": text.parameters,
            "tune learns": text.trained if texts else 0,
            "vision tower": image.tower,
            "projection": image.projection,
            "adapter": image.adapter,
            "align learns": image.trained,
        },
        flop={"caption forward": forward, "caption tune": tune_step, "tower forward": image.tower_forward, **steps},
        store=rows * (text.width * 2 if config.embed.dtype == "float16" else text.width + 4) + 16 * rows,
        features=images * (2 * image.feature + 16) if once else 0.0,
        memory=parts,
        fits={stage: fits(part, device.memory) for stage, part in parts.items()},
        hours=took,
        decoded=0.0 if features_cached else passes / (took["align"] * 3600 * count),
        online={
            "step": step_online / steps["step"],
            "hours": online / (took["embed"] + took["align"]),
            "weights": 2.0 * text.parameters,
        },
    )  # fmt: skip
    if not found.fits.get("tune", True):
        found.ways_out["tune"] = _fitting(_tune_settings(config.tune, text, tokens, tuned, count), device)
    if not found.fits["align"]:
        found.ways_out["align"] = _fitting(_align_settings(align, image, text.width, captions, count), device)
    return found


def _align_flop(work: ImageCosts, config: AlignConfig, captions: float, count: int) -> dict[str, float]:
    """FLOP of an image and its captions in a step of align: the forward and backward pass, the passes that are made
    again, the loss, and all of it."""
    tower = 0.0 if config.tower_lr == 0 else work.tower_forward
    forward = tower + work.heads_forward
    again = tower if config.gradient_checkpointing and work.kept > work.block_input > 0 else 0.0
    cached = forward if (config.micro_batch_size or config.batch_size) < config.batch_size else 0.0
    loss = 2 * PRODUCTS[config.loss][count > 1] * config.batch_size * count * captions * work.shared
    once = forward + work.backward
    return {"image once": once, "image again": again + cached, "image loss": loss, "step": once + again + cached + loss}


# ---- what would fit -------------------------------------------------------------------------------------------------

Suggestion = tuple[str, dict[str, float]]


def _fitting(ways: Iterator[Suggestion], device: Device) -> list[tuple[str, float]]:
    """Those that fit, the gentlest first, without those that change more than one before them does."""
    found: list[tuple[str, float]] = []
    for name, parts in ways:
        options = _options(name)
        if fits(parts, device.memory) and not any(_options(before) <= options for before, _ in found):
            found.append((name, peak_memory(parts)))
    return found


def _options(name: str) -> set[str]:
    return {word for word in name.split() if word.startswith("--")}


def _tune_settings(
    config: TuneConfig, work: TextCosts, tokens: float, precision: str, count: int
) -> Iterator[Suggestion]:
    changes: list[dict[str, Any]] = [{"gradient_checkpointing": True}, {"grad_cache": True}]
    small: dict[str, Any] = {"gradient_checkpointing": True, "grad_cache": True}
    changes += [{**small, "batch_tokens": n} for n in (32768, 16384, 8192, 4096)]
    if config.lora_r:
        changes += [{"qlora": True}, *({**small, "qlora": True, "batch_tokens": n} for n in (16384, 4096))]
    for change in changes:
        changed = dataclasses.replace(config, **change)
        yield _named("tune", config, change), tune_memory(work, changed, tokens, precision, count)
    if count > 1:  # FSDP2 and 4 bits do not go together
        for change in ({}, {**small, "batch_tokens": 8192}):
            changed = dataclasses.replace(config, **{**change, "qlora": False})
            name = _named("tune", config, change)
            yield f"--use_fsdp {name}".rstrip(), tune_memory(work, changed, tokens, precision, count, True)


def _align_settings(
    config: AlignConfig, work: ImageCosts, text_width: int, captions: float, count: int
) -> Iterator[Suggestion]:
    sizes = [2**n for n in range(16, -1, -1) if 2**n < (config.micro_batch_size or config.batch_size)]
    changes: list[dict[str, Any]] = [{"gradient_checkpointing": True}, *({"micro_batch_size": n} for n in sizes)]
    changes += [{"gradient_checkpointing": True, "micro_batch_size": n} for n in sizes]
    for change in changes:
        changed = dataclasses.replace(config, **change)
        yield _named("align", config, change), align_memory(work, changed, captions, text_width, count)
    small: dict[str, Any] = {
        "gradient_checkpointing": True,
        "micro_batch_size": min(16, config.micro_batch_size or config.batch_size),
    }
    if count > 1:
        for change in ({}, small):
            changed = dataclasses.replace(config, **change)
            name = _named("align", config, change)
            yield f"--use_fsdp {name}".rstrip(), align_memory(work, changed, captions, text_width, count, True)
    if config.tower_lr > 0 and not config.lora_r:
        small["lora_r"] = 16
        changed = dataclasses.replace(config, **small)
        of = image_costs(changed, text_width, captions)
        yield _named("align", config, small), align_memory(of, changed, captions, text_width, count)


def _named(stage: str, recipe: Any, change: dict[str, Any]) -> str:
    """The options of a change, without what is so already."""
    new = {k: v for k, v in change.items() if getattr(recipe, k) != v}
    return " ".join(f"--{stage}.{k} {str(v).lower()}" for k, v in new.items())
