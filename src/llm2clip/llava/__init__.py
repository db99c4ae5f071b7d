"""Building, training and evaluation of LLaVA-1.5 models (arXiv 2310.03744) with any vision tower and causal LLM."""

from dataclasses import dataclass
from typing import Literal

from llm2clip.config import require_at_least, require_fraction


@dataclass
class LlavaConfig:
    """Settings of both training stages. The first stage trains the projector, and the second also trains the LLM.

    The defaults follow LLaVA-1.5 (arXiv 2310.03744).
    """

    pretrain_epochs: float = 1
    """Number of epochs in the first stage, which trains only the projector."""
    pretrain_lr: float = 1e-3
    """Peak learning rate of the projector in the first stage."""
    pretrain_batch_size: int = 256
    """Number of conversations per optimizer step in the first stage, over all devices."""
    epochs: float = 1
    """Number of epochs in the second stage, which trains the projector and the LLM on instruction data."""
    lr: float = 2e-5
    """Peak learning rate of the projector and the LLM in the second stage. With LoRA, 2e-4 is common."""
    batch_size: int = 128
    """Number of conversations per optimizer step in the second stage, over all devices."""
    micro_batch_size: int = 16
    """Maximum number of conversations per device in each forward pass. Gradients are accumulated over passes."""
    lora_r: int = 0
    """LoRA rank for the LLM, or 0 for full fine-tuning. LoRA weights are merged after training."""
    lora_alpha: int = 256
    """LoRA alpha. The outputs of LoRA adapters are multiplied by alpha / rank."""
    max_length: int = 2048
    """Maximum conversation length in tokens, including image tokens. Longer conversations are truncated."""
    group_by_length: bool = True
    """Batch conversations of similar length to reduce padding."""
    cache_gb: float = 20.0
    """Maximum size in GB of the patch feature cache of the frozen vision tower. If the features would not fit, they are
    recomputed in every step. 0 disables caching."""
    warmup_ratio: float = 0.03
    """Fraction of training steps with linear warm-up of the learning rate, followed by cosine decay to 0."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Training precision: fp32, bf16, or auto (bf16 if the hardware supports it)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    workers: int = 0
    """Number of processes that decode images."""
    save_steps: int = 200
    """Number of steps between checkpoints."""
    seed: int = 0
    """Random seed for the order of the data, generated questions and the initialisation of LoRA weights."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "llava", "pretrain_batch_size", "batch_size", "micro_batch_size", "lora_alpha")
        require_at_least(1, self, "llava", "max_length", "save_steps")
        require_at_least(0, self, "llava", "pretrain_epochs", "epochs", "pretrain_lr", "lr", "lora_r", "cache_gb")
        require_at_least(0, self, "llava", "workers", "seed")
        require_fraction(self, "llava", "warmup_ratio")
