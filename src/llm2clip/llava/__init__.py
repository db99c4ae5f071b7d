"""LLaVA-1.5 models (arXiv 2310.03744) with any vision tower and causal LLM: building, training and evaluation."""

from dataclasses import dataclass
from typing import Literal

from llm2clip.config import require_at_least, require_fraction


@dataclass
class LlavaConfig:
    """Settings of both training stages: the projector alone, then the projector and the LLM.

    The defaults follow LLaVA-1.5 (arXiv 2310.03744).
    """

    pretrain_epochs: float = 1
    """Number of epochs of the first stage, which trains only the projector."""
    pretrain_lr: float = 1e-3
    """Peak learning rate of the projector in the first stage."""
    pretrain_batch_size: int = 256
    """Number of conversations per optimizer step in the first stage, over all devices."""
    epochs: float = 1
    """Number of epochs in the second stage, which trains on the instruction data."""
    lr: float = 2e-5
    """Peak learning rate of the LLM and the projector in the second stage. With LoRA, 2e-4 is common."""
    batch_size: int = 128
    """Number of conversations per optimizer step in the second stage, over all devices."""
    micro_batch_size: int = 16
    """Maximum number of conversations per forward pass and device. Gradients of several passes are accumulated."""
    lora_r: int = 0
    """LoRA rank for the LLM, or 0 for full fine-tuning. LoRA weights are merged after training."""
    lora_alpha: int = 256
    """LoRA alpha. The outputs of LoRA layers are scaled by alpha divided by the rank."""
    max_length: int = 2048
    """Maximum conversation length in tokens, including image tokens. Longer conversations are truncated."""
    group_by_length: bool = True
    """Batch conversations of similar length to reduce padding."""
    cache_gb: float = 20.0
    """Maximum size in GB of the cache for the frozen tower's patch features. If the features do not fit, they are
    recomputed in every step. 0 disables caching."""
    warmup_ratio: float = 0.03
    """Fraction of training steps for linear warm-up, followed by cosine decay of the learning rate to 0."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Training precision: fp32, bf16, or auto for bf16 if the hardware supports it."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    workers: int = 0
    """Number of image decoding processes."""
    save_steps: int = 200
    """Number of steps between checkpoints."""
    seed: int = 0
    """Random seed for the data order, generated questions and LoRA initialisation."""

    def __post_init__(self) -> None:
        """Raise ValueError if a value is out of range."""
        require_at_least(1, self, "llava", "pretrain_batch_size", "batch_size", "micro_batch_size", "lora_alpha")
        require_at_least(1, self, "llava", "max_length", "save_steps")
        require_at_least(0, self, "llava", "pretrain_epochs", "epochs", "pretrain_lr", "lr", "lora_r", "cache_gb")
        require_at_least(0, self, "llava", "workers", "seed")
        require_fraction(self, "llava", "warmup_ratio")
