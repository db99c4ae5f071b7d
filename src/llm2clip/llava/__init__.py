"""Build, train, run and evaluate LLaVA-1.5 models (arXiv 2310.03744) with any vision tower and causal LLM."""

from dataclasses import dataclass
from typing import Literal

from llm2clip.config import require_at_least, require_fraction


@dataclass
class LlavaConfig:
    """Settings for training a multimodal LLM in two stages: first the projector alone, then the projector and the LLM.

    The defaults follow LLaVA-1.5 (arXiv 2310.03744).
    """

    pretrain_epochs: float = 1
    """Number of epochs of the first stage, which trains only the projector."""
    pretrain_lr: float = 1e-3
    """Peak learning rate of the projector in the first stage."""
    pretrain_batch_size: int = 256
    """Conversations per optimizer step in the first stage, summed over all devices."""
    epochs: float = 1
    """Number of epochs of the second stage, which trains on the instruction data."""
    lr: float = 2e-5
    """Peak learning rate of the LLM and the projector in the second stage. 2e-4 is common with LoRA."""
    batch_size: int = 128
    """Conversations per optimizer step in the second stage, summed over all devices."""
    micro_batch_size: int = 16
    """Maximum conversations per forward pass on each device. Gradients are accumulated to reach the batch size."""
    lora_r: int = 0
    """LoRA rank for the LLM. LoRA weights are merged after training. 0 disables LoRA and trains all weights."""
    lora_alpha: int = 256
    """LoRA alpha. The output of the LoRA layers is scaled by alpha divided by the rank."""
    max_length: int = 2048
    """Maximum conversation length in tokens, including image tokens. Longer conversations are truncated."""
    group_by_length: bool = True
    """Batch conversations of similar length to reduce padding."""
    cache_gb: float = 20.0
    """Maximum cache size in GB for the frozen tower's patch features. If they do not fit, they are recomputed in every
    step. 0 disables caching."""
    warmup_ratio: float = 0.03
    """Fraction of steps spent on linear warm-up. The learning rate then decays to zero on a cosine schedule."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Training precision. auto means bf16 if the hardware supports it, and fp32 otherwise."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    workers: int = 0
    """Number of worker processes that decode images."""
    save_steps: int = 200
    """Steps between checkpoints."""
    seed: int = 0
    """Seed for the data order, generated questions and LoRA initialisation."""

    def __post_init__(self) -> None:
        """Raise ValueError if a value is out of range."""
        require_at_least(1, self, "llava", "pretrain_batch_size", "batch_size", "micro_batch_size", "lora_alpha")
        require_at_least(1, self, "llava", "max_length", "save_steps")
        require_at_least(0, self, "llava", "pretrain_epochs", "epochs", "pretrain_lr", "lr", "lora_r", "cache_gb")
        require_at_least(0, self, "llava", "workers", "seed")
        require_fraction(self, "llava", "warmup_ratio")
