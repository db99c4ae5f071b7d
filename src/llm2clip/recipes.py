"""The settings of every stage, one dataclass each: what a YAML file holds and what `--stage.name value` overrides.

This is the bottom of the house: it imports nothing heavy, so that `llm2clip --help` is instant and
any stage can be typed by its recipe. `recipes/two-cores.yaml` in the repository is for a machine without a GPU.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from llm2clip.files import write_whole


def at_least(recipe: Any, section: str, least: int, *names: str) -> None:
    """Raises ValueError if one of these settings is a number below the least; None is none."""
    for name in names:
        if (value := getattr(recipe, name)) is not None and value < least:
            raise ValueError(f"--{section}.{name} is {least} or more, not {value}")


@dataclass
class EncoderRecipe:
    """The caption encoder: which language model, and how its text is read.

    Args:
        path: folder or hub id of a decoder LLM or a sentence-transformers model, a .gguf file, or a name that
            `llm2clip` fetches: smollm2-135m, all-minilm-l6-v2, gemma3-270m.
        bidirectional: every token sees every token; null leaves it as the folder says, and on for a bare LLM.
        layers: keep only the first N blocks; null keeps all.
        template: text before the caption, {caption}, and after it nothing or one special token; null is none.
        pooling: mean, weightedmean, lasttoken; null leaves it as the folder says, and mean for a bare LLM.
        max_length: longest caption in tokens; null leaves it as the folder says, and 512 for a bare LLM.
        width: keep only the first so many numbers of a vector, as an encoder tuned for it (--tune.widths) allows.
        attention: how it is computed: sdpa, eager, flex_attention, flash_attention_2 or another name that transformers
            knows; null is captions end to end without padding, for decoders.
    """

    path: str = "smollm2-135m"
    bidirectional: bool | None = None
    layers: int | None = None
    template: str | None = None
    pooling: str | None = None
    max_length: int | None = None
    width: int | None = None
    attention: str | None = None


@dataclass
class TuneRecipe:
    """Stage 1: caption-contrastive tuning of the LLM, with LoRA or of all its weights.

    Args:
        data: sources of captions, images not needed: PATH (its training rows, and those of no split) or
            PATH@split+split; empty takes the training data's.
        pairs: sources of general text pairs, rows of query and positive, and perhaps negatives and instruction. Where
            there are some and no `data`, the training data's captions are left out.
        weights: how often a batch is of each source of captions and then of each of pairs, all its pairs of that one;
            empty mixes all captions, and takes as many batches of a source as it has items.
        lengths: how often a pair of captions is of two short ones, a short and a long one, two long ones, where an
            image has such pairs.
        exclude: sources whose images must not be tuned on, as those that the run holds out never are.
        steps: optimizer steps; 0 leaves the LLM raw.
        mntp_steps: steps of masked next-token prediction before, on the same texts.
        batch: pairs in a step and on each device; every other caption of the step is a negative.
        alike: images that come into a batch together since their captions are alike, as harder negatives: 32 suits
            tens of thousands of images; among millions, near-duplicates would meet. 1 draws all at random.
        lr: peak learning rate, reached after `warmup` and falling to zero along a cosine.
        warmup: share of the steps.
        temperature: of the contrastive loss; cosines are divided by it.
        symmetric: the second text of a pair must find the first, too.
        widths: also train the first so many numbers of a vector to do alone (Matryoshka), such as [256, 512].
        lora_r: rank of LoRA on all linear layers; 0 tunes all weights instead, but for the table of token embeddings.
        lora_alpha: scale of LoRA.
        lora_dropout: dropout before LoRA.
        lora_targets: names of the layers that get LoRA, or all-linear.
        merge: add LoRA's changes to the weights; else the encoder's folder keeps them apart, a few MB, with the name of
            the LLM that they belong to: after masked prediction, the one in the run's folder.
        quantize: hold the LLM's matrices in 4 bits while LoRA trains (QLoRA, needs bitsandbytes): an eighth of their
            memory on the device, and all of it on the host, for each process. LoRA is merged into the LLM as it was;
            `fit` does without CRA.
        grad_cache: keep no activations: any batch of pairs in the memory of one forward pass, for a third more time;
            masked prediction does without.
        recompute: recompute activations in the backward pass (gradient checkpointing): long captions, large LLMs.
        batch_tokens: tokens in a forward pass, padding included; null chooses for the device.
        precision: fp32, bf16 or fp16; auto is bf16 where the device multiplies it in hardware, else fp32. Under LoRA
            the matrices that it leaves alone are rounded to it, as those of an LLM published in bf16 are already.
        checkpoint_every: steps between checkpoints.
        seed: of pairs, LoRA and dropout.
    """

    data: list[str] = field(default_factory=list)
    pairs: list[str] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    lengths: list[float] = field(default_factory=lambda: [1.0, 1.0, 1.0])
    exclude: list[str] = field(default_factory=list)
    steps: int = 150
    mntp_steps: int = 0
    batch: int = 128
    alike: int = 1
    lr: float = 1e-3
    warmup: float = 0.1
    temperature: float = 0.05
    symmetric: bool = True
    widths: list[int] = field(default_factory=list)
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    lora_targets: str | list[str] = "all-linear"
    merge: bool = True
    quantize: bool = False
    grad_cache: bool = False
    recompute: bool = False
    batch_tokens: int | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    checkpoint_every: int = 25
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that make no sense."""
        at_least(self, "tune", 1, "batch", "alike", "batch_tokens", "checkpoint_every")
        at_least(self, "tune", 0, "steps", "mntp_steps", "lr", "lora_r")
        if self.temperature <= 0:
            raise ValueError(f"--tune.temperature is above 0, not {self.temperature}")
        if not self.lora_r and (self.quantize or not self.merge):
            raise ValueError("--tune.quantize and --tune.merge are LoRA's, which --tune.lora_r 0 does without")


@dataclass
class EmbedRecipe:
    """Captions to the store.

    Args:
        shard_size: captions in a shard, the unit of resuming, and of batching by length.
        batch_tokens: tokens in a batch, padding included; null tries which number is the fastest here.
        precision: fp32; bf16; bf16+N, where the first N blocks are in fp32; auto measures once which of them is the
            fastest that keeps a cosine of 0.999 on sixteen captions, where the device multiplies bf16 in hardware,
            else fp32.
        dtype: of the store: float16, or int8 with a scale for each vector, half the size.
        engine: local is this process and those that torchrun or accelerate started with it; ray is a Ray cluster.
        workers: of Ray; 0 is one for each GPU, or for each two CPUs.
    """

    shard_size: int = 8192
    batch_tokens: int | None = None
    precision: str = "auto"
    dtype: Literal["float16", "int8"] = "float16"
    engine: Literal["local", "ray"] = "local"
    workers: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that make no sense, and for a precision that there is not."""
        at_least(self, "embed", 1, "shard_size", "batch_tokens")
        at_least(self, "embed", 0, "workers")
        if not re.fullmatch(r"auto|fp32|bf16(\+\d+)?", self.precision):
            raise ValueError(f"--embed.precision is auto, fp32, bf16 or bf16+N, not {self.precision!r}")


@dataclass
class AlignRecipe:
    """Stage 2: a pretrained vision tower and a small adapter learn from the cached embeddings.

    Args:
        tower: vision tower: a timm name, a hub id, a folder, or a name that `llm2clip` fetches: efficientnet-lite0,
            efficientnet-lite2.
        pretrained: start from the tower's trained weights; false draws them at random.
        image_size: pixels; null is what the tower was trained with.
        width: of the shared space.
        adapter: text head: residual blocks as in the paper, one gated layer (glu) as in SAIL, or none, which makes the
            shared space that of the texts.
        adapter_depth: blocks of the residual adapter.
        adapter_expansion: hidden width of a block, or of the gated layer, over its width.
        normalize_input: L2-normalise cached embeddings before the adapter, as the paper does.
        projection: image head: linear, as in the paper, or glu.
        loss: infonce (CLIP's, and the paper's), sigmoid (SigLIP's), or cosine (LIFT's: positives only, adapter none).
        epochs: passes over the images; may be a part of one.
        captions: captions of each image in a step, drawn at random without repetition; 0 is all of them. They are rows
            of the store, so more of them cost next to nothing.
        mix: how often a caption of a step is of each kind (captions, short_captions, long_captions); only the kinds
            that an image has count.
        batch: images in a step on each device.
        micro_batch: images in a forward pass. Gradients are still those of the whole batch, exactly (gradient caching),
            for one more forward pass of the tower; null is `batch`, in one pass.
        accumulate: batches whose gradients make one step; each has its own negatives.
        head_epochs: passes of the projection and the adapter alone, before the rest, over vectors that the tower gives
            as it is: each image goes through it once, so these passes take seconds.
        head_batch: images in a step of those on each device, or as many as there are.
        cache_features: the tower stays as it is and sees each image once, uncropped; the heads learn on its features in
            all epochs, seconds each.
        tower_lr: peak learning rate of the vision tower; 0 freezes it.
        lr: peak learning rate of the projection and the adapter.
        projection_lr: of the projection, if it is to be another.
        scale_lr: of the logit scale (and the sigmoid's bias); null is `lr`.
        layer_decay: each layer of the tower learns this much slower than the one above it.
        train_layers: only the tower's last so many blocks and what follows them learn; null is all.
        lora_r: rank of LoRA on the tower's linear layers, which alone learn there, with `tower_lr`; 0 is none. It is
            merged into the weights at the end.
        lora_alpha: scale of LoRA.
        weight_decay: of AdamW, on matrices only.
        warmup: share of the steps; then a cosine to zero.
        max_grad_norm: gradients are clipped to this norm.
        ema: decay of a running mean of the weights, such as 0.999, which is evaluated and saved in their place; 0 is
            none.
        crop: smallest area share of RandomResizedCrop, whose sides are 3 to 4 at most: at 0.9 it is always the middle
            of a wider photograph. 1 takes the whole picture, as evaluation does.
        hflip: mirror at random; off, since captions name left and right.
        augment: of the colours (color), or torchvision's randaugment or trivialaugment, after the crop.
        precision: fp32, bf16 or fp16; the logits are fp32 in all.
        recompute: recompute the tower's activations in the backward pass (gradient checkpointing).
        compile: run the tower through torch.compile.
        workers: processes that decode images.
        evaluate_every: steps between evaluations on the held-out images; null is once an epoch, 0 never.
        keep: which weights are the result: the last, or the best by the mean of I2T and T2I R@1 in those evaluations.
            The best were chosen on these images, so figures on them are then a little too good.
        track: where metrics go beside metrics.jsonl: tensorboard, wandb, trackio.
        checkpoint_every: steps between checkpoints.
        seed: of order, captions, crops and initial weights.
    """

    tower: str = "efficientnet-lite0"
    pretrained: bool = True
    image_size: int | None = None
    width: int = 512
    adapter: Literal["residual", "glu", "none"] = "residual"
    adapter_depth: int = 1
    adapter_expansion: int = 2
    normalize_input: bool = True
    projection: Literal["linear", "glu"] = "linear"
    loss: Literal["infonce", "sigmoid", "cosine"] = "infonce"
    epochs: float = 4
    captions: int = 4
    mix: dict[str, float] = field(default_factory=lambda: {"captions": 1, "short_captions": 1, "long_captions": 1})
    batch: int = 128
    micro_batch: int | None = None
    accumulate: int = 1
    head_epochs: int = 0
    head_batch: int = 512
    cache_features: bool = False
    tower_lr: float = 1e-4
    lr: float = 1e-3
    projection_lr: float | None = None
    scale_lr: float | None = None
    layer_decay: float = 1.0
    train_layers: int | None = None
    lora_r: int = 0
    lora_alpha: int = 32
    weight_decay: float = 0.05
    warmup: float = 0.1
    max_grad_norm: float = 5.0
    ema: float = 0.0
    crop: float = 0.9
    hflip: bool = False
    augment: Literal["color", "randaugment", "trivialaugment"] | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    recompute: bool = False
    compile: bool = False
    workers: int = 1
    evaluate_every: int | None = None
    keep: Literal["last", "best"] = "last"
    track: list[str] = field(default_factory=list)
    checkpoint_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that make no sense, and for settings that contradict each other."""
        at_least(self, "align", 1, "width", "batch", "accumulate", "head_batch", "checkpoint_every", "micro_batch")
        at_least(self, "align", 1, "train_layers")
        at_least(self, "align", 0, "captions", "head_epochs", "lora_r", "tower_lr", "evaluate_every", "workers")
        if self.epochs <= 0:
            raise ValueError(f"--align.epochs is above 0, not {self.epochs}")
        for name, high in (("crop", True), ("layer_decay", True), ("warmup", True), ("ema", False)):
            value = getattr(self, name)
            if not 0 <= value <= 1 or (value == 0 and name in ("crop", "layer_decay")) or (value == 1 and not high):
                raise ValueError(f"--align.{name} is a share between 0 and 1, not {value}")
        frozen = self.tower_lr == 0
        if self.lora_r and (frozen or self.train_layers is not None):
            raise ValueError("--align.lora_r is for the tower: it needs --align.tower_lr, and no --align.train_layers")
        if self.train_layers is not None and frozen:
            raise ValueError("--align.train_layers is for a tower that learns: it needs --align.tower_lr")
        if self.cache_features and not frozen:
            raise ValueError("--align.cache_features keeps the tower as it is: it needs --align.tower_lr 0")
        if self.loss == "cosine" and self.adapter != "none":
            # With a text side that learns, too, all vectors could become one, which has no loss at all.
            raise ValueError("--align.loss cosine has no negatives: it needs texts that stay, --align.adapter none")
        if self.keep == "best" and self.evaluate_every == 0:
            raise ValueError("--align.keep best needs evaluations: leave out --align.evaluate_every 0")

    def heads(self) -> AlignRecipe:
        """The recipe of the passes in which the heads learn alone, `head_epochs`."""
        return dataclasses.replace(
            self, epochs=self.head_epochs, batch=self.head_batch, micro_batch=None, accumulate=1, cache_features=True,
            tower_lr=0.0, lora_r=0, train_layers=None, ema=0.0, evaluate_every=0, keep="last",
            checkpoint_every=1 << 30,  # at the end alone: they take seconds
        )  # fmt: skip


@dataclass
class EvaluateRecipe:
    """What is measured at the end.

    Args:
        data: sources to test on; empty takes the held-out part of the training data.
        fields: caption columns to test, each on its own, such as captions_zh; `captions` always is.
        batch: images in a forward pass.
    """

    data: list[str] = field(default_factory=list)
    fields: list[str] = field(default_factory=list)
    batch: int = 64


@dataclass
class FitRecipe:
    """The whole path: tune, embed, align, evaluate.

    Args:
        columns: our field (id, image, captions, short_captions, long_captions, split) to the source's column.
        max_skipped: largest share of bad rows that is put up with.
        encoder: the caption encoder.
        tune: stage 1.
        embed: captions to store.
        align: stage 2.
        evaluate: the report.
    """

    columns: dict[str, str] = field(default_factory=dict)
    max_skipped: float = 0.05
    encoder: EncoderRecipe = field(default_factory=EncoderRecipe)
    tune: TuneRecipe = field(default_factory=TuneRecipe)
    embed: EmbedRecipe = field(default_factory=EmbedRecipe)
    align: AlignRecipe = field(default_factory=AlignRecipe)
    evaluate: EvaluateRecipe = field(default_factory=EvaluateRecipe)


@dataclass
class ReproduceRecipe:
    """The paper's claims at the scale of this machine. Sources are relative to the data folder; PATH@split+split.

    Args:
        tune: sources of captions that the LLMs are tuned on, images not needed.
        exclude: sources whose images must not be tuned on.
        pairs: sources of general text pairs (TC); empty takes WordNet's glosses, where Debian's wordnet-base is.
        cra: sources for caption retrieval.
        train: sources of images and captions to align with.
        test: sources of images and captions to retrieve.
        foreign: column of `test`'s captions in a language that nothing was trained on.
        dense: sources of images with one long caption, none of them trained on.
        llm: language model of the claims; any caption encoder, as --encoder.path.
        layers: keep only its first N blocks; null keeps all.
        plain: text encoder that is no LLM.
        larger: larger language model, which knows the foreign language.
        tower: vision tower, as --align.tower; it stays as it is, and heads learn on its features.
        image_size: pixels.
        width: of the shared space.
        steps: of tuning, each.
        batch: pairs in a step of tuning.
        lr: of tuning all the LLM's weights.
        larger_lr: of tuning the larger one with LoRA.
        epochs: passes over the images that the heads learn in.
        seeds: runs of each alignment.
        cost_images: images of a step whose time is measured.
        cost_steps: steps of each kind that are timed.
    """

    tune: list[str] = field(default_factory=lambda: ["flickr30k_text/captions.jsonl@train"])
    exclude: list[str] = field(default_factory=lambda: ["flickr8k/captions.jsonl@val", "flickr8k_text/captions.jsonl"])
    pairs: list[str] = field(default_factory=list)
    cra: list[str] = field(default_factory=lambda: ["coco_text/captions.jsonl@karpathy_test"])
    train: list[str] = field(default_factory=lambda: ["flickr8k/captions.jsonl@train+none", "coco_img/captions.jsonl"])
    test: list[str] = field(default_factory=lambda: ["flickr8k/captions.jsonl@val"])
    foreign: str = "captions_zh"
    dense: list[str] = field(default_factory=lambda: ["ade20k_ids/captions.jsonl"])
    llm: str = "smollm2-135m"
    layers: int | None = 12
    plain: str = "all-minilm-l6-v2"
    larger: str = "gemma3-270m"
    tower: str = "efficientnet-lite0"
    image_size: int = 160
    width: int = 256
    steps: int = 60
    batch: int = 128
    lr: float = 4e-4
    larger_lr: float = 1e-3
    epochs: float = 10
    seeds: int = 3
    cost_images: int = 64
    cost_steps: int = 8


@dataclass
class LlavaRecipe:
    """Training a multimodal model: first the projector alone, then the LLM with it.

    The settings are LLaVA-1.5's (arXiv 2310.03744).

    Args:
        pretrain_epochs: passes over what the projector alone learns from.
        pretrain_lr: its peak learning rate then.
        pretrain_batch: conversations in a step then, over all devices.
        epochs: passes over the instructions.
        lr: peak learning rate of the language model and the projector; of LoRA 2e-4 is usual.
        batch: conversations in a step, over all devices.
        micro_batch: conversations in a forward pass of a device; gradients are added up to the batch.
        lora_r: rank of LoRA on the language model; 0 trains all its weights. It is merged at the end.
        lora_alpha: scale of LoRA.
        max_length: longest conversation in tokens, those of the picture among them; longer ones lose their end.
        grouped: conversations of similar length in a batch, so that little of it is padding.
        cache_gb: the frozen tower sees each picture once, and its patch features are kept, if all take at most so many
            GB; 0 lets it see them in every pass.
        warmup: share of the steps; then a cosine to zero.
        precision: fp32, bf16, or auto: bf16 where the device multiplies it in hardware.
        recompute: recompute activations in the backward pass (gradient checkpointing).
        workers: processes that decode pictures.
        checkpoint_every: steps between checkpoints.
        seed: of order, questions, and LoRA.
    """

    pretrain_epochs: float = 1
    pretrain_lr: float = 1e-3
    pretrain_batch: int = 256
    epochs: float = 1
    lr: float = 2e-5
    batch: int = 128
    micro_batch: int = 16
    lora_r: int = 0
    lora_alpha: int = 256
    max_length: int = 2048
    grouped: bool = True
    cache_gb: float = 20.0
    warmup: float = 0.03
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    recompute: bool = False
    workers: int = 0
    checkpoint_every: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that make no sense."""
        at_least(self, "llava", 1, "pretrain_batch", "batch", "micro_batch", "max_length", "checkpoint_every")
        at_least(self, "llava", 0, "pretrain_epochs", "epochs", "pretrain_lr", "lr", "lora_r", "cache_gb", "workers")


class RecipeChanged(ValueError):
    """A run folder was begun with other settings."""


# Settings that few ever change: help leaves them out, --print_config and the reference have them.
RARE = {
    *(f"encoder.{name}" for name in ("bidirectional", "width", "attention")),
    *(f"tune.{name}" for name in ("weights", "lengths", "mntp_steps", "alike", "warmup", "lora_alpha", "lora_dropout")),
    *(f"tune.{name}" for name in ("lora_targets", "symmetric", "widths", "merge", "checkpoint_every", "seed")),
    *(f"embed.{name}" for name in ("shard_size", "batch_tokens", "workers")),
    *(f"align.{name}" for name in ("pretrained", "adapter_depth", "adapter_expansion", "normalize_input")),
    *(
        f"align.{name}"
        for name in ("projection", "mix", "accumulate", "head_epochs", "head_batch", "projection_lr", "scale_lr")
    ),
    *(f"align.{name}" for name in ("layer_decay", "train_layers", "lora_alpha", "weight_decay", "warmup", "ema")),
    *(f"align.{name}" for name in ("max_grad_norm", "crop", "hflip", "augment", "compile", "evaluate_every", "keep")),
    *(f"align.{name}" for name in ("track", "checkpoint_every", "seed")),
    *(f"llava.{name}" for name in ("lora_alpha", "grouped", "warmup", "checkpoint_every", "seed")),
    *("evaluate.batch", "reproduce.cost_images", "reproduce.cost_steps"),
}


# What may differ when a run goes on: it changes how long the work takes, not what comes out.
FREE = (
    *("workers", "checkpoint_every", "batch_tokens", "shard_size", "max_skipped", "grad_cache", "micro_batch"),
    *("recompute", "compile", "track", "cost_images", "cost_steps"),
)


# What the last stage leaves: until there is some of it, its settings may be mended without losing the others' work.
LAST_STAGE, ITS_TRACES = "align", ("align/checkpoints", "checkpoints", "model")


def keep(settings: dict[str, Any], file: Path) -> None:
    """Save the settings of a run in its folder, or check that they are those it was begun with.

    A folder in which no stage has left anything yet takes new settings, so that a mistake can be mended; so does the
    last stage in a folder where only earlier ones have.

    Args:
        settings: names to values; recipes among the values are written out.
        file: the YAML file.

    Raises:
        RecipeChanged: naming each setting that differs.
    """
    plain = _plain(settings)
    begun = file.exists() and any(p.name not in (file.name, "skipped.jsonl", ".lock") for p in file.parent.iterdir())
    if begun:
        there = yaml.safe_load(file.read_text(encoding="utf-8"))
        differences = [d for d in _differences(there, plain) if d[0].rsplit(".", 1)[-1] not in FREE]
        if not any((file.parent / trace).exists() for trace in ITS_TRACES):
            differences = [d for d in differences if not d[0].startswith(f"{LAST_STAGE}.")]
        if differences:
            changed = [f"{k}: {a!r} there, {b!r} now" for k, a, b in differences]
            raise RecipeChanged(
                f"{file} was begun with other settings ({'; '.join(changed)}). "
                "Use another --out, or delete this folder to begin again"
            )
    write_whole(file, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def _differences(a: Any, b: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(a, dict) and isinstance(b, dict):
        return [
            d
            for k in [*a, *(k for k in b if k not in a)]
            for d in _differences(a.get(k), b.get(k), f"{name}.{k}" if name else k)
        ]
    return [] if a == b else [(name, a, b)]
