"""Settings for all stages, one dataclass per stage. Each field is documented below its definition.

A YAML config uses the same names, e.g. `align: {epochs: 4}`. Command-line options, e.g. `--align.epochs 4`, override
the YAML config. This module imports only the standard library to keep `llm2clip --help` fast.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

# Stages with a configurable precision.
Stage = Literal["caption", "tune", "embed", "align", "distill", "llava", "evaluate", "serve"]
POOLING_MODES = ("mean", "weightedmean", "lasttoken", "cls", "max")  # names used by sentence-transformers
AUTO = "auto"  # value of `--encoder.path` that makes `fit` choose an encoder (see `evaluate/encoder_choice.py`)
MIN_IMAGE_SIZE = 16  # in pixels: the patch size of common vision transformers

# Settings that may change when a run is resumed, because they do not affect the result.
RESUME_SAFE = (
    "workers",
    "save_steps",
    "batch_tokens",
    "max_skipped",
    "grad_cache",
    "micro_batch_size",
    "gradient_checkpointing",
    "report_to",
)


@dataclass
class EncoderConfig:
    """Settings for the language model that encodes captions."""

    path: str = "smollm2-135m"
    """Decoder LLM or sentence-transformers model: a local folder, a Hugging Face hub id, a .gguf file, or one of the
    built-in models smollm2-135m, all-minilm-l6-v2 and gemma3-270m, which are downloaded. With auto, the
    default of `fit`, small encoders are compared on a sample of the images and captions, and the best encoder is used
    without tuning."""
    bidirectional: bool | None = None
    """Use bidirectional instead of causal attention. Default: as saved with the encoder, or true for a plain LLM."""
    layers: int | None = None
    """Keep only the first N transformer layers. Encoders with fewer layers are not changed. Default: all layers."""
    template: str | None = None
    """Template into which each caption is inserted, e.g. "<s>{caption}</s>". At most one special token may follow
    {caption}. Default: no template."""
    pooling: str | None = None
    """Token pooling: mean, weightedmean, lasttoken, cls or max. Default: as saved with the encoder, or mean for a plain
    LLM."""
    max_length: int | None = None
    """Maximum caption length in tokens. Longer captions are truncated. Default: as saved with the encoder, or 512 for a
    plain LLM."""
    truncate_dim: int | None = None
    """Keep only the first N dimensions of each embedding. Intended for encoders trained with Matryoshka dimensions.
    Default: all dimensions."""

    def __post_init__(self) -> None:
        if not self.path.strip():
            raise ValueError("--encoder.path is empty: set it to a folder, a hub id or a model name")
        others = [f"--encoder.{name}" for name, value in vars(self).items() if name != "path" and value is not None]
        if self.path == AUTO and others:
            raise ValueError(f"{', '.join(others)} requires --encoder.path, for example smollm2-135m")
        require_at_least(1, self, "encoder", "layers", "max_length", "truncate_dim")
        if self.pooling is not None and self.pooling not in POOLING_MODES:
            raise ValueError(f"--encoder.pooling must be one of {', '.join(POOLING_MODES)} (got {self.pooling!r})")
        if self.template is not None and self.template.count("{caption}") != 1:
            raise ValueError(f"--encoder.template must contain {{caption}} exactly once (got {self.template!r})")


@dataclass
class TuneConfig:
    """Settings for contrastive tuning of the LLM on captions, with LoRA or full fine-tuning."""

    data: list[str] = field(default_factory=list)
    """Caption sources; images are not needed. PATH alone selects rows in the training split and rows without a split.
    PATH@split+split selects rows in the named splits. Default: the captions in the training data."""
    text_pairs: list[str] = field(default_factory=list)
    """Sources of general text pairs. Each row must have a query and a positive text, and may have negatives and an
    instruction. If --tune.text_pairs is set but --tune.data is not, the captions in the training data are not used."""
    exclude: list[str] = field(default_factory=list)
    """Sources of images whose captions are excluded from tuning. The captions of the run's held-out images are always
    excluded."""
    steps: int = 150
    """Number of optimizer steps. 0 disables tuning. With --encoder.path auto, `fit` never tunes."""
    batch_size: int = 128
    """Number of text pairs per step and device. All other pairs in the batch, across all devices, provide negatives. If
    there is too little data for such a batch, the number is reduced."""
    hard_negative_group_size: int = 1
    """Number of images with similar captions that form a group of hard negatives in a batch. 32 works well for tens of
    thousands of images. With millions of images, a group would contain near-duplicates that are used as negatives of
    each other. 1 disables hard negatives: images are sampled at random."""
    lr: float = 1e-3
    """Peak learning rate."""
    lr_scheduler_type: Literal["cosine", "linear"] = "cosine"
    """Learning rate schedule after warm-up: linear (as in the paper) or cosine decay to zero."""
    warmup_ratio: float = 0.1
    """Fraction of steps used for linear warm-up."""
    temperature: float = 0.05
    """Softmax temperature by which cosine similarities are divided."""
    symmetric: bool = True
    """Also train each positive to retrieve its query. The paper trains only the query-to-positive direction."""
    lora_r: int = 16
    """LoRA rank for all linear layers. LoRA alpha is twice the rank. 0 disables LoRA and trains all weights except the
    token embeddings."""
    lora_dropout: float = 0.0
    """Dropout probability for LoRA layer inputs."""
    qlora: bool = False
    """Quantise the frozen weight matrices to 4 bits during LoRA training, which cuts their device memory to an eighth.
    Requires bitsandbytes. After training, LoRA is merged into the original, unquantised weights. With QLoRA, `fit` does
    not measure caption retrieval accuracy."""
    grad_cache: bool = False
    """Use gradient caching, which makes memory use independent of the batch size. Training takes about a third longer.
    Batches that fit in a single forward pass (see --tune.batch_tokens) are unaffected."""
    gradient_checkpointing: bool = False
    """Use gradient checkpointing, which saves memory by recomputing activations in the backward pass. Useful for long
    captions and large LLMs."""
    batch_tokens: int | None = None
    """Maximum number of tokens per forward pass, including padding. The default depends on the device."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Training precision. auto selects bf16 on devices with bf16 hardware support and fp32 on others. With LoRA, the
    frozen weight matrices are stored in this precision."""
    save_steps: int = 25
    """Number of steps between checkpoints."""
    seed: int = 0
    """Seed for pair sampling, LoRA initialisation and dropout."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "tune", "batch_size", "hard_negative_group_size", "batch_tokens", "save_steps")
        require_at_least(0, self, "tune", "steps", "lr", "lora_r", "seed")
        require_fraction(self, "tune", "warmup_ratio", "lora_dropout")
        require_positive(self, "tune", "temperature")
        if self.qlora and not self.lora_r:
            raise ValueError("--tune.qlora requires LoRA: set --tune.lora_r to 1 or more")


@dataclass
class EmbedConfig:
    """Settings for encoding captions into the embedding store."""

    precision: str = "auto"
    """Encoding precision: fp32, bf16, bf16+N (bf16 with the first N layers in fp32) or auto. On devices with bf16
    hardware support, auto selects the fastest precision in which the embeddings of sixteen test captions have a cosine
    similarity of at least 0.999 to their fp32 embeddings. On other devices, auto selects fp32."""
    dtype: Literal["float16", "int8"] = "float16"
    """Data type of the stored embeddings. int8 uses one scale factor per embedding and halves the size of the store."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"auto|fp32|bf16(\+\d+)?", self.precision):
            raise ValueError(f"--embed.precision must be auto, fp32, bf16 or bf16+N (got {self.precision!r})")


@dataclass
class AlignConfig:
    """Settings for training a pretrained vision tower and a small adapter against the cached caption embeddings."""

    tower: str = "efficientnet-lite0"
    """Vision tower: a timm model name, a Hugging Face hub id, a local folder, or one of the built-in models
    efficientnet-lite0 and efficientnet-lite2, which are downloaded."""
    image_size: int | None = None
    """Input image size in pixels. Default: the tower's training resolution."""
    embed_dim: int = 512
    """Dimension of the shared embedding space. 0 removes the image projection, so that the tower's output is the image
    embedding, as in the authors' SigLIP 2 model. With --align.adapter_depth 0, the caption encoder's dimension is used
    instead."""
    adapter_depth: int = 1
    """Number of residual blocks in the adapter (4 in the paper). With 0, there is no adapter: images are embedded
    directly in the caption encoder's space, so that an index of text embeddings can also contain images."""
    normalize_input: bool = True
    """L2-normalise the cached embeddings before the adapter, as the paper does."""
    loss: str = "infonce"
    """Contrastive loss: infonce (used by CLIP and the paper) or sigmoid (used by SigLIP). See `train/losses.py`."""
    matryoshka_dims: list[int] = field(default_factory=list)
    """Also train embeddings truncated to these sizes, e.g. [64, 128, 256]. The loss is the mean over these sizes and
    the full size. Intended for --align.adapter_depth 0. Other models can be truncated without this setting, because
    their first dimensions are principal components."""
    logit_scale: float | Literal["inherit"] | None = None
    """Initial factor by which cosine similarities are multiplied, at most 100. inherit uses the value from the tower's
    CLIP model, as in the authors' code. With the sigmoid loss, the logit bias is also inherited. Default: 14.3 for
    infonce and 10 for sigmoid, which suit newly initialised heads and higher learning rates."""
    inherit: bool | str = False
    """Start from the embedding space of the tower's CLIP model, as in ProCLIP. The adapter first learns to reproduce
    the CLIP text tower's embeddings of captions and of short phrases such as "red hat". CLIP's own image projection is
    used, and --align.embed_dim has no effect. If the tower's checkpoint has no text tower, set this to the name of the
    CLIP model instead of true."""
    epochs: float = 4
    """Number of epochs. Fractions are allowed."""
    captions_per_image: int = 6
    """Maximum number of captions and phrases sampled per image and step, without replacement. Each draw first selects a
    kind of caption, and adds nothing if no captions of that kind are left. 0 uses all captions and phrases. Additional
    captions cost almost nothing, because their embeddings are read from the store."""
    caption_mix: dict[str, float] = field(
        default_factory=lambda: {"captions": 1, "short_captions": 1, "long_captions": 1, "phrases": 0.5}
    )
    """Sampling weight of each kind of caption. Kinds that an image does not have are ignored for that image. Phrases
    are short texts such as "red hat", which improve retrieval with short queries. Phrases are read from the phrases
    column or, if there is none, extracted from the English captions."""
    batch_size: int = 128
    """Number of images per step and device. If there are too few images to fill a step, each step uses all images."""
    micro_batch_size: int | None = None
    """Number of images per forward pass. Values below the batch size enable gradient caching: the gradients are still
    exactly those of the complete batch, but each image needs a second forward pass. Default: the batch size."""
    lr: float = 1e-3
    """Peak learning rate for the projection, adapter and logit scale, followed by cosine decay to zero."""
    tower_lr: float = 1e-4
    """Peak learning rate for the vision tower. 0 freezes the tower: each image is encoded only once, without random
    crops, and all epochs train on the cached features, which is fast."""
    layer_decay: float = 1.0
    """Layer-wise learning rate decay: the tower's learning rate is multiplied by this factor once for each layer below
    the top layer. The paper uses 0.85."""
    distill_weight: float = 0.0
    """Weight of the self-distillation loss, which keeps the vision tower's features close to the pretrained tower's
    features, as in ProCLIP. 0 disables self-distillation."""
    lora_r: int = 0
    """LoRA rank for the tower's linear layers. LoRA alpha is twice the rank. LoRA is merged into the tower after
    training. 0 disables LoRA and trains all tower weights."""
    warmup_ratio: float = 0.1
    """Fraction of steps used for linear warm-up."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Training precision. auto selects bf16 on GPUs that support it and fp32 otherwise. Logits are always fp32."""
    workers: int | None = None
    """Number of worker processes that decode images. The default depends on the number of CPU cores and devices."""
    eval_steps: int | None = None
    """Number of steps between evaluations on the held-out images. Default: once per epoch. 0 disables evaluation."""
    report_to: list[str] = field(default_factory=list)
    """Experiment trackers that receive the metrics: tensorboard, wandb or trackio. In addition, metrics are
    always written to metrics.jsonl."""
    save_steps: int = 50
    """Number of steps between checkpoints."""
    seed: int = 0
    """Seed for the image order, caption sampling, crops and weight initialisation."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "align", "matryoshka_dims", "batch_size", "micro_batch_size", "save_steps")
        require_at_least(0, self, "align", "embed_dim", "adapter_depth", "captions_per_image", "lora_r", "lr")
        require_at_least(0, self, "align", "tower_lr", "eval_steps")
        require_at_least(0, self, "align", "workers", "distill_weight", "caption_mix", "seed")
        require_at_least(MIN_IMAGE_SIZE, self, "align", "image_size")
        require_fraction(self, "align", "warmup_ratio", "layer_decay")
        require_positive(self, "align", "epochs", "layer_decay")
        if isinstance(self.logit_scale, float | int) and not 1 <= self.logit_scale <= 100:
            raise ValueError(f"--align.logit_scale must be between 1 and 100, or inherit (got {self.logit_scale})")
        has_fixed_dim = self.embed_dim > 0 and self.adapter_depth > 0 and not self.inherit
        if has_fixed_dim and any(dim >= self.embed_dim for dim in self.matryoshka_dims):
            raise ValueError(
                f"--align.matryoshka_dims must be less than --align.embed_dim ({self.embed_dim}), but the value is "
                f"{self.matryoshka_dims}"
            )
        if self.inherit and self.adapter_depth == 0:
            raise ValueError("--align.inherit requires an adapter: set --align.adapter_depth to 1 or more")
        if self.lora_r and self.tower_lr == 0:
            raise ValueError("--align.lora_r requires a trainable tower: set --align.tower_lr greater than 0")
        if self.distill_weight and self.tower_lr == 0:
            raise ValueError("--align.distill_weight requires a trainable tower: set --align.tower_lr greater than 0")

    @property
    def samples_phrases(self) -> bool:
        """True if phrases have a positive weight in the caption mix."""
        return self.caption_mix.get("phrases", 0) > 0

    @property
    def uses_phrases(self) -> bool:
        """True if `align` requires phrase embeddings in the store, for sampling or for --align.inherit."""
        return self.samples_phrases or bool(self.inherit)


@dataclass
class DistillConfig:
    """Settings for training a small text encoder to reproduce a model's text embeddings (`distill`)."""

    epochs: float = 2
    """Number of epochs. Fractions are allowed. In each epoch, phrases are repeated (at most 16 times) until they make
    up about half of the texts."""
    batch_size: int = 128
    """Number of texts per step and device."""
    lr: float | None = None
    """Peak learning rate, followed by cosine decay to zero. Default: 5e-4, or 1e-2 for static students."""
    warmup_ratio: float = 0.05
    """Fraction of steps used for linear warm-up."""
    max_length: int | None = None
    """Maximum text length in tokens for the student. Longer texts are truncated. Default: as saved with the student, or
    512 for a plain LLM. Static students have no limit."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Training precision. auto selects bf16 on GPUs that support it and fp32 otherwise."""
    save_steps: int = 100
    """Number of steps between checkpoints."""
    seed: int = 0
    """Seed for the order of the texts and for weight initialisation."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "distill", "batch_size", "max_length", "save_steps")
        require_at_least(0, self, "distill", "seed")
        require_positive(self, "distill", "epochs", "lr")
        require_fraction(self, "distill", "warmup_ratio")


@dataclass
class EvaluateConfig:
    """Settings for evaluating on held-out images at the end of a `fit` run."""

    data: list[str] = field(default_factory=list)
    """Sources to evaluate on. Default: the held-out part of the training data."""
    fields: list[str] = field(default_factory=list)
    """Additional caption columns to evaluate separately, e.g. captions_zh. The main captions are always evaluated."""


@dataclass
class EvaluateOptions:
    """Options of the `evaluate` command. The help text of each option is the docstring of its field."""

    benchmarks: list[str] = field(default_factory=list)
    """Names of public benchmarks (see `llm2clip benchmarks`), `all`, or your own data: folder:PATH (one subfolder per
    class), boxes:FILE.json or detection:FILE.json (COCO format), segmentation:PATH (COCO format, or a folder with
    images/, masks/ and classes.txt). Pass captioned images as DATA instead."""
    root: str = "data/benchmarks"
    """Folder with one subfolder per benchmark."""
    out: str | None = None
    """Output folder for report.html, results.json and the embeddings. Later runs reuse the embeddings."""
    dims: list[int] = field(default_factory=list)
    """Also evaluate embeddings truncated to these sizes. Without --out, the data is encoded again for each size."""
    dense_variants: list[str] = field(default_factory=lambda: ["plain"])
    """Methods for computing patch embeddings in region, segmentation and detection benchmarks: `plain`, `maskclip`,
    `sclip`, `clearclip` or `naclip`."""
    short_queries: bool = False
    """For captioned images, also report retrieval metrics by query length, from one word to full captions."""
    templates: list[str] | None = None
    """Prompt templates, such as 'a photo of a {}', over which text embeddings are averaged. Used for the class names of
    your own images, such as boxes:FILE.json, and with --short_queries for queries of up to three words (default: the
    templates saved with the model)."""
    proposals: str | None = None
    """Source of the boxes to classify in detection benchmarks: a JSON file in COCO results format, a transformers
    detector (folder or hub id), or `ground-truth`."""
    crop_proposals: bool = False
    """In detection benchmarks, also classify each box by encoding its crop, which takes one forward pass per box."""
    trust_remote_code: bool = False
    """Run the Python code that ships with models such as Jina-CLIP. Use this only for models that you trust."""
    captions: list[str] = field(default_factory=list)
    """Sources of captions for measuring caption retrieval accuracy (CRA)."""
    columns: dict[str, str] = field(default_factory=dict)
    """Source column for each field, e.g. captions=text,image=file."""
    max_skipped: float = 0.05
    """Stop if more than this fraction of the rows or of a benchmark's images cannot be used."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "", "dims")
        require_fraction(self, "", "max_skipped")


@dataclass
class FitConfig:
    """Settings for all stages: `tune`, `embed`, `align` and `evaluate`."""

    columns: dict[str, str] = field(default_factory=dict)
    """Source column for each of the fields id, image, captions, short_captions, long_captions, phrases and split."""
    max_skipped: float = 0.05
    """Stop if more than this fraction of the rows cannot be used."""
    encoder: EncoderConfig = field(default_factory=lambda: EncoderConfig(AUTO))
    tune: TuneConfig = field(default_factory=TuneConfig)
    embed: EmbedConfig = field(default_factory=EmbedConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def __post_init__(self) -> None:
        require_fraction(self, "", "max_skipped")
        if self.encoder.path == AUTO:
            if self.tune not in (TuneConfig(), TuneConfig(steps=0)):
                raise ValueError(
                    "--tune settings require --encoder.path, for example smollm2-135m. By default, `fit` chooses an "
                    "encoder and does not tune it"
                )
            self.tune = TuneConfig(steps=0)


def require_at_least(minimum: int, config: Any, section: str, *names: str) -> None:
    """Raise ValueError if any of the named settings is NaN, infinite or less than the minimum.

    `None` is accepted. For a list or dict, each value is checked.
    """
    _require_valid_settings(lambda value: value >= minimum, f"at least {minimum}", config, section, names)


def require_positive(config: Any, section: str, *names: str) -> None:
    """Raise ValueError if any of the named settings is not a finite number greater than 0. `None` is accepted."""
    _require_valid_settings(lambda value: value > 0, "greater than 0", config, section, names)


def require_fraction(config: Any, section: str, *names: str) -> None:
    """Raise ValueError if any of the named settings is not between 0 and 1."""
    _require_valid_settings(lambda value: 0 <= value <= 1, "between 0 and 1", config, section, names)


def _require_valid_settings(
    is_valid: Callable[[float], bool], rule: str, config: Any, section: str, names: Iterable[str]
) -> None:
    for name in names:
        setting = getattr(config, name)
        values = setting.values() if isinstance(setting, dict) else setting if isinstance(setting, list) else [setting]
        if not all(value is None or (math.isfinite(value) and is_valid(value)) for value in values):
            raise ValueError(f"--{f'{section}.' if section else ''}{name} must be {rule} (got {setting})")
