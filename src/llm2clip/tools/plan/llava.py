"""What `llm2clip llava train` takes before it runs: parameters, memory and hours, by the same arithmetic as `plan`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from llm2clip.config import AlignConfig, EncoderConfig, LlavaConfig, TuneConfig
from llm2clip.tools.plan.devices import Machine
from llm2clip.tools.plan.flops import TextCosts, count_flops, text_costs
from llm2clip.tools.plan.memory import FRAMEWORK_OVERHEAD, fits, optimizer_memory, peak_memory, tensor_bytes
from llm2clip.tools.plan.model_configs import build_tower, get_llm_config

STAGES = ("pretrain", "instruct")


@dataclass(frozen=True)
class LlavaPlan:
    """What comes out; bytes of a device by part, hours on all devices together, by stage.

    Args:
        machine: what was asked.
        image_tokens: of a picture.
        parameters: of each part.
        flop: of a conversation in each stage, and of a picture through the tower.
        features: bytes of the tower's features of the pictures of a stage, were they kept.
        memory, fits, hours: of each stage.
    """

    machine: Machine
    image_tokens: int
    parameters: dict[str, int]
    flop: dict[str, float]
    features: dict[str, float]
    memory: dict[str, dict[str, float]]
    fits: dict[str, bool]
    hours: dict[str, float]


def plan_llava(
    recipe: LlavaConfig,
    machine: Machine,
    llm: str,
    vision: str,
    image_size: int | None,
    conversations: dict[str, int],
    text_tokens: dict[str, float],
) -> LlavaPlan:
    """Work out what both stages take.

    Args:
        recipe: of the training.
        machine: that it would run on.
        llm, vision, image_size: as of `llava build`; known ones need no network.
        conversations: of each stage, each with a picture.
        text_tokens: of a conversation, beside its picture's, on average.

    Raises:
        ValueError: an unknown model, or a precision that the device has not.
    """
    device, count, shared_out = machine.each, machine.count, machine.use_fsdp
    precision = device.precision(recipe.precision)
    encoder = EncoderConfig(path=llm)
    config = get_llm_config(encoder)
    work = text_costs(
        encoder, TuneConfig(lora_r=recipe.lora_r, gradient_checkpointing=recipe.gradient_checkpointing), precision
    )
    tower = build_tower(AlignConfig(tower=vision, image_size=image_size))
    tokens, width = _patches(tower)
    size = tower.preprocess.size
    pixels = torch.zeros(1, 3, size, size, dtype=torch.uint8, device="meta")
    with torch.no_grad():
        seeing = count_flops(lambda: tower(pixels))
    head = config.vocab_size * config.hidden_size
    projector = (width + 1 + config.hidden_size + 1) * config.hidden_size
    parameters = {
        "vision tower": sum(p.numel() for p in tower.parameters()),
        "projector": projector,
        "language model": work.parameters + (0 if config.tie_word_embeddings else head),
    }
    flop, hours, parts = {"picture": seeing}, {}, {}
    epochs = {"pretrain": recipe.pretrain_epochs, "instruct": recipe.epochs}
    features = {stage: 2.0 * conversations[stage] * tokens * width for stage in STAGES}
    # Kept for both stages or for none; that the pictures of one are not those of the other is assumed.
    kept = 0 < sum(features[stage] for stage in STAGES if epochs[stage]) <= recipe.cache_gb * 1e9
    for stage in STAGES:
        length = min(recipe.max_length, tokens + text_tokens[stage])
        passes = conversations[stage] * epochs[stage]
        flop[stage] = _conversation(work, head, projector, tokens, length, stage, recipe)
        total = passes * flop[stage] + (conversations[stage] if kept else passes) * seeing
        hours[stage] = machine.hours(total, precision)
        parts[stage] = _memory(
            work, parameters, head, tokens, length, stage, recipe, precision, count, shared_out, kept
        )
    return LlavaPlan(
        machine, tokens, parameters, flop, features, parts,
        {stage: fits(some, device.memory) for stage, some in parts.items()}, hours,
    )  # fmt: skip


def _patches(tower: Any) -> tuple[int, int]:
    """Patch features of a picture, and their width.

    Raises:
        ValueError: the tower gives none that `llava build` takes.
    """
    size = tower.preprocess.size
    backbone = tower.backbone
    if tower.config["library"] == "transformers":
        return (size // backbone.config.patch_size) ** 2, backbone.config.hidden_size
    if hasattr(getattr(backbone, "patch_embed", None), "num_patches"):
        return int(backbone.patch_embed.num_patches), tower.feature_dim
    with torch.no_grad():
        last = backbone.forward_features(torch.zeros(1, 3, size, size, device="meta"))
    if last.ndim != 4 or last.shape[1] != backbone.num_features:
        raise ValueError(f"{tower.config['architecture']} gives no map of features, channels first: no LLaVA of it")
    return last.shape[2] * last.shape[3], last.shape[1]


def _conversation(
    work: TextCosts, head: int, projector: int, tokens: int, length: float, stage: str, recipe: LlavaConfig
) -> float:
    """FLOP of a conversation in a step: forward through LLM, head and projector; back through all of it, with the
    gradients of the weights that learn. Attention looks back only, which kernels for it make half the work."""
    attention = work.forward(length) - 2 * work.linear * length
    outside = 2 * head * (length - tokens) + 2 * projector * tokens  # a picture's tokens have no logits
    forward = 2 * work.linear * length + attention / 2 + outside
    back = 2 * work.linear * length + attention + outside + 2 * projector * tokens
    if stage == "instruct":
        whole = 2 * work.linear * length + 2 * head * (length - tokens)
        back += 4 * work.trained * length if recipe.lora_r else whole
        forward += 2 * work.trained * length if recipe.lora_r else 0
    return forward * (1 + recipe.gradient_checkpointing) + back


def _memory(
    work: TextCosts,
    parameters: dict[str, int],
    head: int,
    tokens: int,
    length: float,
    stage: str,
    recipe: LlavaConfig,
    precision: str,
    count: int,
    shared_out: bool,
    kept: bool,
) -> dict[str, float]:
    """Bytes by part. Weights are fp32, under LoRA in half precision; what learns takes 4 for its gradient, twice among
    several processes, and 8 for AdamW."""
    low, shares = tensor_bytes(precision), count if shared_out else 1
    whole = low if recipe.lora_r else 4
    llm, projector = parameters["language model"], parameters["projector"]
    learned = projector
    if stage == "instruct":
        learned += work.trained if recipe.lora_r else llm
    parts = {"LLM": whole * llm / shares}
    if recipe.lora_r and stage == "instruct":
        parts["LoRA"] = 4.0 * work.trained / shares
    if whole > low:
        parts["copies in half precision"] = low * (work.largest_linear if shared_out else work.linear + head)
    if shared_out:
        parts["gathered"] = 2.0 * low * work.largest_linear
    parts |= optimizer_memory(learned, count, shared_out)
    if not kept:
        parts["tower"] = 4.0 * parameters["vision tower"]
    micro = max(1, math.ceil(min(recipe.micro_batch_size, (recipe.pretrain_batch_size if stage == "pretrain" else recipe.batch_size)
                                 / count)))  # fmt: skip
    block = work.kept_per_token
    through = work.layers * work.input_per_token + block if recipe.gradient_checkpointing else work.layers * block
    vocabulary = head // work.width * (low + 4 + 4)  # logits, the same in fp32, and their gradient
    parts["activations"] = micro * (length * (through + block + work.kept_outside) + (length - tokens) * vocabulary)
    return {**parts, "libraries": FRAMEWORK_OVERHEAD, "loading": 0.0}


def format_llava_plan(found: LlavaPlan, conversations: dict[str, int]) -> list[str]:
    """The plan in lines to print."""
    billions = ", ".join(f"{name} {n / 1e9:.2f}B" for name, n in found.parameters.items())
    lines = [f"Parameters: {billions}; {found.image_tokens} tokens a picture"]
    for stage in STAGES:
        most = peak_memory(found.memory[stage])
        fit = "fits" if found.fits[stage] else f"does not fit into {found.machine.each.memory:.0f} GB: try --use_fsdp"
        largest = sorted(found.memory[stage].items(), key=lambda part: -part[1])[:4]
        parts = ", ".join(f"{part} {size / 1e9:.1f}" for part, size in largest)
        lines += [
            f"{stage}: {found.hours[stage]:.1f} hours on {found.machine.count} x {found.machine.device} for "
            f"{conversations[stage]:,} conversations of {found.flop[stage] / 1e12:.1f} TFLOP",
            f"  {most / 1e9:.0f} GB of each device ({fit}): {parts}",
        ]
        lines.append(f"  the tower's features, were they kept: {found.features[stage] / 1e9:,.0f} GB")
    lines.append(f"Assumed: {found.machine.mfu:.0%} of the device's products a second. Estimates, not measurements.")
    return lines
