"""Memory and time estimates for `llm2clip llava train`, using the same methods as the `plan` command."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, cast

import torch

from llm2clip.config import AlignConfig, EncoderConfig, TuneConfig
from llm2clip.llava import LlavaConfig
from llm2clip.tools.plan_costs import (
    TextCosts,
    build_tower,
    count_flops,
    count_parameters,
    get_llm_config,
    measure_text_costs,
)
from llm2clip.tools.plan_memory import (
    FRAMEWORK_OVERHEAD,
    Machine,
    Parts,
    compute_peak_memory,
    count_saved_bytes,
    estimate_optimizer_memory,
    fits_in_memory,
    get_bytes_per_value,
)

STAGES = ("pretrain", "instruct")


@dataclass(frozen=True)
class LlavaStage:
    """Estimates for a training stage."""

    name: str  # pretrain or instruct
    config: LlavaConfig  # with the precision resolved for the device
    machine: Machine
    llm: TextCosts  # costs per conversation of the LLM's layers; the tokens include image tokens
    head: int  # number of weights in the language modelling head, even if they are tied to the input embeddings
    parameters: dict[str, int]  # number of parameters in each part of the model
    image_tokens: int  # number of tokens per image
    tower_flops: float  # FLOPs per image of the vision tower's forward pass
    conversations: int  # number of conversations, each with a different image
    feature_bytes: float  # size of the cached patch features of all images
    cached: bool  # True if patch features are cached, so training does not run the tower

    @property
    def flops(self) -> float:
        """FLOPs per conversation in a training step, excluding the vision tower.

        Counts forward and backward passes through the LLM, its head and the projector, plus the gradients of the
        trained weights. With fused kernels, causal attention takes half the FLOPs of full attention.
        """
        llm, length = self.llm, self.llm.tokens
        linear = 2 * llm.linear * length
        attention = llm.forward - linear
        head = 2 * self.head * (length - self.image_tokens)  # no logits are computed for image tokens
        projector = 2 * self.parameters["projector"] * self.image_tokens
        forward = linear + attention / 2 + head + projector
        backward = linear + attention + head + 2 * projector
        if self.name == "instruct" and self.config.lora_r:
            forward += 2 * llm.trained * length
            backward += 4 * llm.trained * length
        elif self.name == "instruct":
            backward += linear + head
        return forward * (1 + self.config.gradient_checkpointing) + backward

    @property
    def hours(self) -> float:
        epochs = self.config.pretrain_epochs if self.name == "pretrain" else self.config.epochs
        trained_on = self.conversations * epochs
        encoded_images = self.conversations if self.cached else trained_on
        total_flops = trained_on * self.flops + encoded_images * self.tower_flops
        return self.machine.estimate_hours(total_flops, self.config.precision, "tune")

    @property
    def memory(self) -> Parts:
        """Bytes per component and device. LLM weights use fp32 or, with LoRA, the compute precision."""
        llm, config, machine, parameters = self.llm, self.config, self.machine, self.parameters
        compute_bytes = get_bytes_per_value(config.precision)
        weight_bytes = compute_bytes if config.lora_r else 4
        trained = parameters["projector"]
        parts = {"LLM": weight_bytes * parameters["language model"] / machine.num_shards}
        if self.name == "instruct":
            trained += llm.trained if config.lora_r else parameters["language model"]
            if config.lora_r:
                parts["LoRA"] = 4.0 * llm.trained / machine.num_shards
        if weight_bytes > compute_bytes:
            copied = llm.largest_linear if machine.use_fsdp else llm.linear + self.head
            parts["copies in half precision"] = compute_bytes * copied
        if machine.use_fsdp:
            parts["gathered"] = 2.0 * compute_bytes * llm.largest_linear  # weights of the current and next layer
        parts |= estimate_optimizer_memory(trained, machine)
        if not self.cached:
            parts["tower"] = 4.0 * parameters["vision tower"]
        batch_size = config.pretrain_batch_size if self.name == "pretrain" else config.batch_size
        micro_batch_size = max(1, math.ceil(min(config.micro_batch_size, batch_size / machine.count)))
        vocabulary = self.head // llm.embed_dim
        logits = vocabulary * (compute_bytes + 4 + 4)  # bytes per token: logits, their fp32 copy and gradient
        text_tokens = llm.tokens - self.image_tokens
        per_conversation = llm.tokens * count_saved_bytes(llm, config.gradient_checkpointing) + text_tokens * logits
        parts["activations"] = micro_batch_size * per_conversation
        return {**parts, "libraries": FRAMEWORK_OVERHEAD, "loading": 0.0}


def plan_llava(
    config: LlavaConfig,
    machine: Machine,
    *,
    llm: str,
    vision: str,
    image_size: int | None,
    conversations: dict[str, int],
    text_tokens: dict[str, float],
) -> dict[str, LlavaStage]:
    """Estimate the costs of both training stages.

    Args:
        llm, vision: Names of the causal LLM and the vision tower. Names in `plan_costs.py` need no network access.
        conversations: Number of conversations in each stage, each assumed to have a different image.
        text_tokens: Mean number of text tokens per conversation in each stage.

    Raises:
        ValueError: A model is unknown, or the device does not support the precision.
    """
    config = dataclasses.replace(
        config, precision=cast(Any, machine.device_spec.resolve_precision(config.precision, "llava"))
    )
    tower = build_tower(AlignConfig(tower=vision, image_size=image_size)).requires_grad_(False)
    image_tokens, feature_size = _measure_patches(tower)
    size = tower.preprocess.size
    tower_flops = count_flops(lambda: tower(torch.zeros(1, 3, size, size, dtype=torch.uint8, device="meta")))
    encoder, llm_config = EncoderConfig(path=llm), get_llm_config(EncoderConfig(path=llm))
    tune = TuneConfig(lora_r=config.lora_r, precision=config.precision)
    head = llm_config.vocab_size * llm_config.hidden_size

    # Features are cached either for both stages or for neither. The two stages are assumed to use different images.
    epochs = {"pretrain": config.pretrain_epochs, "instruct": config.epochs}
    feature_bytes = {stage: 2.0 * conversations[stage] * image_tokens * feature_size for stage in STAGES}
    total_bytes = sum(feature_bytes[stage] for stage in STAGES if epochs[stage])
    stages = {}
    for name in STAGES:
        costs = measure_text_costs(encoder, tune, min(config.max_length, image_tokens + text_tokens[name]))
        parameters = {
            "vision tower": count_parameters(tower),
            "projector": (feature_size + 1 + llm_config.hidden_size + 1) * llm_config.hidden_size,
            "language model": costs.parameters + (0 if llm_config.tie_word_embeddings else head),
        }
        stages[name] = LlavaStage(
            name=name,
            config=config,
            machine=machine,
            llm=costs,
            head=head,
            parameters=parameters,
            image_tokens=image_tokens,
            tower_flops=tower_flops,
            conversations=conversations[name],
            feature_bytes=feature_bytes[name],
            cached=0 < total_bytes <= config.cache_gb * 1e9,
        )
    return stages


def format_llava_plan(stages: dict[str, LlavaStage]) -> list[str]:
    first = stages["pretrain"]
    machine = first.machine
    parameters = ", ".join(f"{name} {count / 1e9:.2f}B" for name, count in first.parameters.items())
    lines = [f"Parameters: {parameters}; {first.image_tokens} tokens per image"]
    for name, stage in stages.items():
        memory, limit = stage.memory, machine.device_spec.memory
        verdict = "fits" if fits_in_memory(memory, limit) else f"does not fit in {limit:.0f} GB: try --use_fsdp"
        largest_parts = sorted(memory.items(), key=lambda part: -part[1])[:4]
        parts = ", ".join(f"{part} {size / 1e9:.1f}" for part, size in largest_parts)
        lines += [
            f"{name}: {stage.hours:.1f} hours on {machine.count} x {machine.device} for "
            f"{stage.conversations:,} conversations, {stage.flops / 1e12:.1f} TFLOP each",
            f"  {compute_peak_memory(memory) / 1e9:.0f} GB per device ({verdict}): {parts}",
            f"  cached patch features would take {stage.feature_bytes / 1e9:,.0f} GB",
        ]
    lines.append(
        f"Assumed: {machine.get_mfu('tune'):.0%} of the device's peak FLOP/s. These are estimates, not measurements."
    )
    return lines


def _measure_patches(tower: Any) -> tuple[int, int]:
    """Return the number of patches per image and the dimension of their features.

    Raises:
        ValueError: `llava build` does not support the tower.
    """
    size, backbone = tower.preprocess.size, tower.backbone
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
