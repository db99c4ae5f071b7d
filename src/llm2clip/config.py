"""Settings of every stage: one dataclass per stage, each field documented below it.

A YAML config holds the same names (`align: {epochs: 4}`), and `--align.epochs 4` overrides it on the command line.
This module imports nothing heavy, so that `llm2clip --help` is instant and any module can use the types.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class EncoderConfig:
    """Caption encoder: which language model to use and how it reads text."""

    path: str = "smollm2-135m"
    """Folder or hub id of a decoder LLM or a sentence-transformers model, a .gguf file, or a name that `llm2clip`
    downloads: smollm2-135m, all-minilm-l6-v2, gemma3-270m."""
    bidirectional: bool | None = None
    """Let every token attend to every other token. Default: as saved in the model folder; on for a plain LLM."""
    layers: int | None = None
    """Keep only the first N transformer layers. Default: all."""
    template: str | None = None
    """Text around the caption, e.g. "<s>{caption}</s>"; at most one special token may follow {caption}.
    Default: none."""
    pooling: str | None = None
    """mean, weightedmean, lasttoken, cls or max. Default: as saved in the model folder; mean for a plain LLM."""
    max_length: int | None = None
    """Maximum caption length in tokens; longer captions are truncated. Default: as saved in the model folder; 512 for
    a plain LLM."""
    truncate_dim: int | None = None
    """Keep only the first N dimensions of each embedding; for encoders tuned with --tune.matryoshka_dims.
    Default: all."""


@dataclass
class TuneConfig:
    """Contrastive tuning of the LLM on captions, with LoRA or of all weights."""

    data: list[str] = field(default_factory=list)
    """Caption sources; images are not needed. PATH (its training rows and rows without a split) or PATH@split+split.
    Default: the captions of the training data."""
    text_pairs: list[str] = field(default_factory=list)
    """Sources of general text pairs: rows with a query, a positive, and optionally negatives and an instruction. If
    set without --tune.data, the captions of the training data are not used."""
    source_weights: list[float] = field(default_factory=list)
    """Sampling weight of each source of --tune.data, then of --tune.text_pairs. A batch comes from a single source.
    Default: proportional to the number of items; the captions of all sources are mixed."""
    exclude: list[str] = field(default_factory=list)
    """Sources whose images must not be tuned on. Held-out images of the run are always excluded."""
    steps: int = 150
    """Optimizer steps. 0 leaves the LLM untouched."""
    batch_size: int = 128
    """Text pairs per step and device. All other texts of the step, on all devices, are negatives."""
    hard_negative_group_size: int = 1
    """Number of images with similar captions that are drawn into a batch together, as hard negatives. 32 suits tens of
    thousands of images; with millions, near-duplicates would become each other's negatives. 1 draws all at random."""
    lr: float = 1e-3
    """Peak learning rate. It falls to zero along a cosine."""
    warmup_ratio: float = 0.1
    """Fraction of the steps spent on linear warm-up."""
    temperature: float = 0.05
    """Cosine similarities are divided by this temperature."""
    symmetric: bool = True
    """Also train the positive to retrieve its query. The paper trains only query to positive."""
    matryoshka_dims: list[int] = field(default_factory=list)
    """Also train these truncated embedding sizes, e.g. [256, 512]."""
    lora_r: int = 16
    """LoRA rank, on all linear layers; alpha is twice the rank. 0 trains all weights except the token embeddings."""
    lora_dropout: float = 0.0
    """Dropout before the LoRA layers."""
    qlora: bool = False
    """Keep the frozen matrices in 4 bits during LoRA training (needs bitsandbytes): an eighth of their memory on the
    device. The result is merged into the original weights. `fit` then skips caption retrieval with the raw LLM."""
    grad_cache: bool = False
    """Gradient caching: memory of a single forward pass at any batch size, for about a third more time."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, for long captions and large LLMs."""
    batch_tokens: int | None = None
    """Tokens per forward pass, padding included. Default: chosen for the device."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto is bf16 where the device multiplies it in hardware, otherwise fp32. With LoRA, the frozen matrices are
    stored in this precision."""
    save_steps: int = 25
    """Steps between checkpoints."""
    seed: int = 0
    """Seed of pair sampling, LoRA initialisation and dropout."""

    def __post_init__(self) -> None:
        """Raise ValueError for values out of range and for settings that contradict each other."""
        require_at_least(1, self, "tune", "batch_size", "hard_negative_group_size", "batch_tokens", "save_steps")
        require_at_least(0, self, "tune", "steps", "lr", "lora_r")
        require_fraction(self, "tune", "warmup_ratio", "lora_dropout")
        if self.temperature <= 0:
            raise ValueError(f"--tune.temperature must be greater than 0 (got {self.temperature})")
        if self.qlora and not self.lora_r:
            raise ValueError("--tune.qlora needs LoRA: set --tune.lora_r to 1 or more")


@dataclass
class EmbedConfig:
    """Encoding of every caption into the embedding store."""

    batch_tokens: int | None = None
    """Tokens per batch, padding included. Default: measured once, the fastest on this device."""
    precision: str = "auto"
    """fp32, bf16, or bf16+N (the first N layers in fp32). auto is fp32 where the device does not multiply bf16 in
    hardware; otherwise the fastest that keeps a cosine similarity of 0.999 to fp32 on sixteen captions."""
    dtype: Literal["float16", "int8"] = "float16"
    """Type of the stored embeddings. int8 stores a scale per embedding and halves the store."""

    def __post_init__(self) -> None:
        """Raise ValueError for values out of range and for an unknown precision."""
        require_at_least(1, self, "embed", "batch_tokens")
        if not re.fullmatch(r"auto|fp32|bf16(\+\d+)?", self.precision):
            raise ValueError(f"--embed.precision must be auto, fp32, bf16 or bf16+N (got {self.precision!r})")


@dataclass
class AlignConfig:
    """Training of a pretrained vision tower and a small adapter against the cached embeddings."""

    tower: str = "efficientnet-lite0"
    """Vision tower: a timm name, a hub id, a folder, or a name that `llm2clip` downloads: efficientnet-lite0,
    efficientnet-lite2."""
    image_size: int | None = None
    """Image size in pixels. Default: the size the tower was trained with."""
    embed_dim: int = 512
    """Dimension of the shared embedding space."""
    adapter_depth: int = 1
    """Residual blocks in the adapter. The paper uses 4."""
    normalize_input: bool = True
    """L2-normalise the cached embeddings before the adapter, as the paper does."""
    loss: Literal["infonce", "sigmoid"] = "infonce"
    """infonce (CLIP, the paper) or sigmoid (SigLIP)."""
    epochs: float = 4
    """Passes over the images; may be fractional."""
    captions_per_image: int = 4
    """Captions drawn for each image and step, without repetition. 0 uses all. They are rows of the store, so more of
    them cost almost nothing."""
    caption_mix: dict[str, float] = field(
        default_factory=lambda: {"captions": 1, "short_captions": 1, "long_captions": 1}
    )
    """Sampling weight of each kind of caption. Kinds that an image lacks are ignored."""
    batch_size: int = 128
    """Images per step and device."""
    micro_batch_size: int | None = None
    """Images per forward pass. The gradients are still exactly those of the whole batch (gradient caching), for one
    more forward pass of the tower. Default: the batch size, in a single pass."""
    lr: float = 1e-3
    """Peak learning rate of the projection, the adapter and the logit scale. It falls to zero along a cosine."""
    tower_lr: float = 1e-4
    """Peak learning rate of the vision tower. 0 freezes the tower: it then sees each image once, without random
    crops, and the remaining epochs train on its cached features in seconds."""
    layer_decay: float = 1.0
    """Factor on the learning rate per tower layer, counted from the top. The paper uses 0.85."""
    lora_r: int = 0
    """LoRA rank on the tower's linear layers; alpha is twice the rank. The result is merged. 0 trains the weights
    themselves."""
    warmup_ratio: float = 0.1
    """Fraction of the steps spent on linear warm-up."""
    min_crop_scale: float = 0.9
    """Smallest area fraction of RandomResizedCrop. 1 uses the whole image, as evaluation does."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto is bf16 on GPUs that support it, otherwise fp32. Logits are always fp32."""
    gradient_checkpointing: bool = False
    """Recompute the tower's activations in the backward pass, to save memory."""
    workers: int | None = None
    """Processes that decode images. Default: chosen for the number of CPU cores and devices."""
    eval_steps: int | None = None
    """Steps between evaluations on the held-out images. Default: once per epoch. 0 never evaluates."""
    load_best_at_end: bool = False
    """Keep the weights with the best mean of I2T and T2I R@1 instead of the last ones. They are selected on the
    held-out images, so the metrics on those images are then slightly too high."""
    report_to: list[str] = field(default_factory=list)
    """Where to send metrics in addition to metrics.jsonl: tensorboard, wandb, trackio."""
    save_steps: int = 50
    """Steps between checkpoints."""
    seed: int = 0
    """Seed of the order of images, captions, crops and initial weights."""

    def __post_init__(self) -> None:
        """Raise ValueError for values out of range and for settings that contradict each other."""
        require_at_least(1, self, "align", "embed_dim", "adapter_depth", "batch_size", "micro_batch_size", "save_steps")
        require_at_least(0, self, "align", "captions_per_image", "lora_r", "tower_lr", "eval_steps", "workers")
        require_fraction(self, "align", "warmup_ratio")
        if self.epochs <= 0:
            raise ValueError(f"--align.epochs must be greater than 0 (got {self.epochs})")
        for name in ("min_crop_scale", "layer_decay"):
            if not 0 < (value := getattr(self, name)) <= 1:
                raise ValueError(f"--align.{name} must be greater than 0 and at most 1 (got {value})")
        if self.lora_r and self.tower_lr == 0:
            raise ValueError("--align.lora_r trains the tower: set --align.tower_lr greater than 0")
        if self.load_best_at_end and self.eval_steps == 0:
            raise ValueError("--align.load_best_at_end needs evaluations: remove --align.eval_steps 0")


@dataclass
class EvaluateConfig:
    """Evaluation on held-out images at the end of `fit`."""

    data: list[str] = field(default_factory=list)
    """Sources to test on. Default: the held-out part of the training data."""
    fields: list[str] = field(default_factory=list)
    """More caption columns to test, each on its own, e.g. captions_zh. `captions` is always tested."""


@dataclass
class FitConfig:
    """All stages: tune, embed, align, evaluate."""

    columns: dict[str, str] = field(default_factory=dict)
    """Column of the source for each of our fields: id, image, captions, short_captions, long_captions, split."""
    max_skipped: float = 0.05
    """Stop if more than this fraction of the rows cannot be used."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    embed: EmbedConfig = field(default_factory=EmbedConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


@dataclass
class ReproduceConfig:
    """Tests of the paper's claims at the scale of this machine. Sources are relative to the data folder."""

    tune: list[str] = field(default_factory=lambda: ["flickr30k_text/captions.jsonl@train"])
    """Caption sources for tuning the LLMs; images are not needed."""
    exclude: list[str] = field(default_factory=lambda: ["flickr8k/captions.jsonl@val", "flickr8k_text/captions.jsonl"])
    """Sources whose images must not be tuned on."""
    text_pairs: list[str] = field(default_factory=list)
    """Sources of general text pairs (TC). Default: WordNet's glosses, where Debian's wordnet-base is installed."""
    cra: list[str] = field(default_factory=lambda: ["coco_text/captions.jsonl@karpathy_test"])
    """Sources for caption retrieval accuracy (CRA)."""
    train: list[str] = field(default_factory=lambda: ["flickr8k/captions.jsonl@train+none", "coco_img/captions.jsonl"])
    """Sources of images and captions to align on."""
    test: list[str] = field(default_factory=lambda: ["flickr8k/captions.jsonl@val"])
    """Sources of images and captions to test retrieval on."""
    foreign_column: str = "captions_zh"
    """Column of the test captions in a language that was not trained on."""
    long_caption_sources: list[str] = field(default_factory=lambda: ["ade20k_ids/captions.jsonl"])
    """Sources of images with one long caption each, not trained on."""
    llm: str = "smollm2-135m"
    """Language model of the claims: any caption encoder, as --encoder.path."""
    layers: int | None = 12
    """Keep only the first N layers of the LLM. Default of the field null: all."""
    baseline_encoder: str = "all-minilm-l6-v2"
    """Text encoder that is not an LLM, for comparison."""
    multilingual_llm: str = "gemma3-270m"
    """Larger language model that knows the foreign language."""
    tower: str = "efficientnet-lite0"
    """Vision tower, as --align.tower. It is frozen; only the heads are trained, on its features."""
    image_size: int = 160
    """Image size in pixels."""
    embed_dim: int = 256
    """Dimension of the shared embedding space."""
    steps: int = 60
    """Tuning steps of each LLM."""
    batch_size: int = 128
    """Text pairs per tuning step."""
    lr: float = 4e-4
    """Learning rate for tuning all weights of the LLM."""
    multilingual_lr: float = 1e-3
    """Learning rate for tuning the multilingual LLM with LoRA."""
    epochs: float = 10
    """Epochs of training the heads."""
    seeds: int = 3
    """Alignment runs per encoder."""
    cost_images: int = 64
    """Images per step when the time of a step is measured."""
    cost_steps: int = 8
    """Steps of each kind that are timed."""


@dataclass
class LlavaConfig:
    """Training of a multimodal LLM: first the projector alone, then the LLM too. Defaults: LLaVA-1.5 (2310.03744)."""

    pretrain_epochs: float = 1
    """Epochs over the data that only the projector is trained on."""
    pretrain_lr: float = 1e-3
    """Peak learning rate of the projector in that stage."""
    pretrain_batch_size: int = 256
    """Conversations per step in that stage, over all devices."""
    epochs: float = 1
    """Epochs over the instruction data."""
    lr: float = 2e-5
    """Peak learning rate of the LLM and the projector. 2e-4 is common with LoRA."""
    batch_size: int = 128
    """Conversations per step, over all devices."""
    micro_batch_size: int = 16
    """Conversations per forward pass and device; gradients are accumulated up to the batch size."""
    lora_r: int = 0
    """LoRA rank on the LLM; the result is merged. 0 trains all weights."""
    lora_alpha: int = 256
    """LoRA alpha."""
    max_length: int = 2048
    """Maximum conversation length in tokens, image tokens included; longer conversations are truncated."""
    group_by_length: bool = True
    """Batch conversations of similar length, to reduce padding."""
    cache_gb: float = 20.0
    """Compute the frozen tower's patch features once and cache them if they fit in this many GB. 0 never caches."""
    warmup_ratio: float = 0.03
    """Fraction of the steps spent on linear warm-up; a cosine to zero follows."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto is bf16 where the device multiplies it in hardware, otherwise fp32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, to save memory."""
    workers: int = 0
    """Processes that decode images."""
    save_steps: int = 200
    """Steps between checkpoints."""
    seed: int = 0
    """Seed of the data order, generated questions and LoRA."""

    def __post_init__(self) -> None:
        """Raise ValueError for values out of range."""
        require_at_least(
            1, self, "llava", "pretrain_batch_size", "batch_size", "micro_batch_size", "max_length", "save_steps"
        )
        require_at_least(
            0, self, "llava", "pretrain_epochs", "epochs", "pretrain_lr", "lr", "lora_r", "cache_gb", "workers"
        )


def require_at_least(minimum: int, config: Any, section: str, *names: str) -> None:
    """Raise ValueError if one of these settings is below the minimum. None is allowed."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < minimum:
            raise ValueError(f"--{section}.{name} must be at least {minimum} (got {value})")


def require_fraction(config: Any, section: str, *names: str) -> None:
    """Raise ValueError if one of these settings is not between 0 and 1."""
    for name in names:
        value = getattr(config, name)
        if not 0 <= value <= 1:
            raise ValueError(f"--{section}.{name} must be between 0 and 1 (got {value})")
