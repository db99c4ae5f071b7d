"""Estimates of the parameters, FLOPs, memory and hours of a `fit` run, and checks of free memory and disk space.

The duration of a stage is FLOPs / (peak throughput * MFU). The model FLOPs utilisation (MFU) is an assumption from
`plan_memory.MFU`. Small models, small batches and slow image decoding reduce the actual MFU.
"""

import dataclasses
import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch

from llm2clip.config import FitConfig
from llm2clip.cpu_tuning import get_available_memory
from llm2clip.data.records import CAPTION_FIELDS
from llm2clip.data.table import RecordTable
from llm2clip.evaluate.encoder_choice import describe_encoder, resolve_auto_encoder
from llm2clip.io_utils import format_bytes, format_count
from llm2clip.reports import Paragraph, Table, render_plain_text
from llm2clip.runs.output_folder import MAX_CHECKPOINTS
from llm2clip.runs.ranks import is_fsdp_enabled, process_state
from llm2clip.tools.plan_costs import ImageCosts, TextCosts, measure_image_costs, measure_text_costs
from llm2clip.tools.plan_memory import (
    USABLE_FRACTION,
    Machine,
    Parts,
    compute_peak_memory,
    estimate_align_memory,
    estimate_embed_memory,
    estimate_tune_memory,
    fits_in_memory,
)
from llm2clip.train.losses import get_loss
from llm2clip.train.sampling import resolve_images_per_step

CHARACTERS_PER_TOKEN = 4  # approximate value for English text
MEMORY_ADVICE = {
    "tune": "To reduce memory use, set --tune.gradient_checkpointing true, --tune.grad_cache true with a lower "
    "--tune.batch_tokens, --tune.qlora true, or --use_fsdp with several devices.",
    "embed": "To reduce memory use, choose a smaller model, or use fewer layers with --encoder.layers.",
    "align": "To reduce memory use, set a lower --align.micro_batch_size, --align.lora_r 16, or --use_fsdp with "
    "several devices.",
}
SAMPLED_RECORDS = 1000  # maximum number of records for estimating caption counts and lengths


@dataclass(frozen=True)
class FitPlan:
    """Resource estimates for a `fit` run.

    The precisions in `config` are resolved for the device, and `align.batch_size` is reduced if there are too few
    images. `text` contains the costs of the caption encoder, and `image` the costs of the model that `align` trains.
    """

    config: FitConfig
    machine: Machine
    images: int
    captions_per_image: float
    tokens_per_caption: float
    text: TextCosts
    image: ImageCosts

    @cached_property
    def step_flops(self) -> dict[str, float]:
        """FLOPs per image in an `align` step.

        The keys are "once" (forward and backward pass), "repeated" (forward pass that gradient caching repeats), "loss"
        and "total". With self-distillation, "once" includes the forward pass of the pretrained tower.
        """
        align, image, count = self.config.align, self.image, self.machine.count
        uses_grad_cache = (align.micro_batch_size or align.batch_size) < align.batch_size
        teacher = image.tower_forward if align.distill_weight else 0.0
        once = image.forward + teacher + image.backward
        repeated = image.forward if uses_grad_cache else 0.0
        texts = align.batch_size * count * image.captions
        loss_dims = image.embed_dim + sum(align.matryoshka_dims)
        loss = 2 * get_loss(align.loss).matmuls[count > 1] * texts * loss_dims
        return {"once": once, "repeated": repeated, "loss": loss, "total": once + repeated + loss}

    @cached_property
    def stage_hours(self) -> dict[str, float]:
        tune, align, machine = self.config.tune, self.config.align, self.machine
        tune_texts = 2 * tune.steps * tune.batch_size * machine.count  # two texts per pair
        embed_flops = self.images * self.captions_per_image * self.text.forward
        feature_flops = self.images * self.image.tower_forward if align.tower_lr == 0 else 0.0
        align_flops = feature_flops + self.images * align.epochs * self.step_flops["total"]
        return {
            "tune": machine.estimate_hours(tune_texts * self.text.count_tune_flops(tune), tune.precision, "tune"),
            "embed": machine.estimate_hours(embed_flops, self.config.embed.precision, "embed"),
            "align": machine.estimate_hours(align_flops, align.precision, "align"),
        }

    @cached_property
    def stage_memory(self) -> dict[str, Parts]:
        """Memory per device in bytes, keyed by stage and then by component. `tune` is omitted if it has no steps."""
        memory = {
            "tune": estimate_tune_memory(self.text, self.config.tune, self.machine),
            "embed": estimate_embed_memory(self.text, self.config.embed.precision, self.machine),
            "align": estimate_align_memory(self.image, self.text, self.config.align, self.machine),
        }
        if self.config.tune.steps == 0:
            del memory["tune"]
        return memory

    @property
    def stage_fits_in_memory(self) -> dict[str, bool]:
        memory = self.machine.device_spec.memory
        return {stage: fits_in_memory(parts, memory) for stage, parts in self.stage_memory.items()}

    @property
    def store_bytes(self) -> float:
        dim = self.text.embed_dim
        bytes_per_caption = (2 * dim if self.config.embed.dtype == "float16" else dim + 4) + 16
        return self.images * self.captions_per_image * bytes_per_caption

    @property
    def feature_bytes(self) -> float:
        return self.images * (2 * self.image.feature_dim + 16) if self.config.align.tower_lr == 0 else 0.0

    @property
    def images_per_second(self) -> float:
        """Image decoding rate that `align` requires, in images per second per device. 0 if the tower is frozen."""
        align = self.config.align
        if align.tower_lr == 0:
            return 0.0
        return self.images * align.epochs / (self.stage_hours["align"] * 3600 * self.machine.count)


def plan_fit(
    config: FitConfig,
    machine: Machine,
    images: int,
    captions_per_image: float,
    tokens_per_caption: float,
) -> FitPlan:
    """Estimate the parameters, FLOPs, memory and hours of a `fit` run.

    For `--encoder.path auto`, the estimates are for the largest candidate encoder.

    Args:
        captions_per_image: Mean number of captions per image. All captions are assumed to be distinct.
        tokens_per_caption: Mean number of tokens per caption, including the template.

    Raises:
        ValueError: A model is unknown, a number is not positive, or there are too few images for one step.
    """
    data = {"images": images, "captions_per_image": captions_per_image, "tokens_per_caption": tokens_per_caption}
    for name, value in data.items():
        if value <= 0:
            raise ValueError(f"--{name} must be greater than 0 (got {value})")
    config = resolve_auto_encoder(config)
    stages: dict[str, Any] = {}
    for stage in ("tune", "embed", "align"):
        settings = getattr(config, stage)
        precision = machine.device_spec.resolve_precision(settings.precision, cast(Any, stage))
        stages[stage] = dataclasses.replace(settings, precision=precision)
    batch_size = resolve_images_per_step(images, config.align, machine.count) // machine.count
    stages["align"] = dataclasses.replace(stages["align"], batch_size=batch_size)
    config = dataclasses.replace(config, **stages)
    max_length = config.encoder.max_length or 512
    text = measure_text_costs(config.encoder, config.tune, min(tokens_per_caption, max_length), machine.is_cpu)
    captions = min(config.align.captions_per_image or captions_per_image, captions_per_image)
    return FitPlan(
        config=config,
        machine=machine,
        images=images,
        captions_per_image=captions_per_image,
        tokens_per_caption=tokens_per_caption,
        text=text,
        image=measure_image_costs(config.align, text.embed_dim, captions),
    )


# ---- report ----------------------------------------------------------------------------------------------------------


def format_plan(plan: FitPlan) -> str:
    device = plan.machine.device_spec
    problems = [
        f"OUT OF MEMORY in {s}. {MEMORY_ADVICE[s]}" for s, fits in plan.stage_fits_in_memory.items() if not fits
    ]
    verdict = " ".join(problems) or f"Every stage fits in the memory of each {device.name} ({device.memory:g} GB)."
    tables = [_make_parameter_table(plan), _make_flops_table(plan), _make_memory_table(plan), _make_time_table(plan)]
    lines = [f"Embedding store ({plan.config.embed.dtype}): {format_bytes(plan.store_bytes)} on disk."]
    if plan.feature_bytes:
        lines.append(f"Cached tower features (float16): {format_bytes(plan.feature_bytes)} on disk.")
    mfu = ", ".join(f"{stage} {plan.machine.get_model_flops_utilization(stage):.0%}" for stage in plan.stage_hours)
    lines.append(
        f"All values are estimates. Assumed model FLOPs utilisation (MFU): {mfu}. Other assumptions: "
        f"{1 - USABLE_FRACTION:.0%} of memory lost to fragmentation, captions of {plan.tokens_per_caption:.0f} tokens, "
        "no duplicate captions, and fast image decoding. To estimate the caption length from your captions, pass DATA."
    )
    return render_plain_text([*tables, Paragraph("\n".join(lines))], verdict)


def format_hours(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:,.1f} days"
    return f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:,.1f} minutes"


def _make_parameter_table(plan: FitPlan) -> Table:
    text, image = plan.text, plan.image
    tuned = text.trained if plan.config.tune.steps else 0
    rows = [
        (f"caption encoder {describe_encoder(plan.config.encoder)}", f"{text.parameters:,}", f"{tuned:,}"),
        (f"vision tower {plan.config.align.tower}", f"{image.tower:,}", None),
        ("projection", f"{image.projection:,}", None),
        ("adapter", f"{image.adapter:,}", None),
        ("tower, projection and adapter", f"{image.parameters:,}", f"{image.trained:,}"),
    ]
    return Table(("Parameters", "all", "trained"), rows)


def _make_flops_table(plan: FitPlan) -> Table:
    flops, align = plan.step_flops, plan.config.align
    caption = f"caption of {round(plan.tokens_per_caption, 1):g} tokens"
    captions = "its caption" if plan.image.captions == 1 else f"its {round(plan.image.captions, 1):g} captions"
    source = ", from cached features" if align.tower_lr == 0 else ""
    counts = {f"{caption}, forward": plan.text.forward}
    if "tune" in plan.stage_memory:
        counts[f"{caption}, tune step"] = plan.text.count_tune_flops(plan.config.tune)
    counts["image through the tower"] = plan.image.tower_forward
    counts[f"image and {captions} in an align step"] = flops["total"]
    counts[f"  forward and backward{source}"] = flops["once"]
    if flops["repeated"]:
        counts["  repeated forward (micro_batch_size)"] = flops["repeated"]
    counts["  loss"] = flops["loss"]
    rows = [(name, f"{count / 1e9:,.0f}" if count >= 1e11 else f"{count / 1e9:,.2f}") for name, count in counts.items()]
    return Table(("GFLOPs (a multiply-add counts as 2 FLOPs)", "number"), rows)


def _make_memory_table(plan: FitPlan) -> Table:
    parts = dict.fromkeys(part for memory in plan.stage_memory.values() for part in memory)  # without duplicates
    ordered = sorted(parts, key=("libraries", "loading").__contains__)  # moves libraries and loading to the end
    rows: list[list[str | None]] = []
    for part in ordered:
        name = "loading (before training)" if part == "loading" else part
        sizes = [memory.get(part) for memory in plan.stage_memory.values()]
        rows.append([name, *(None if size is None else f"{size / 1e9:.1f}" for size in sizes)])
    rows.append(["peak", *(f"{compute_peak_memory(memory) / 1e9:.1f}" for memory in plan.stage_memory.values())])
    return Table(("Memory per device, GB (10^9 bytes)", *plan.stage_memory), rows)


def _make_time_table(plan: FitPlan) -> Table:
    config, count = plan.config, plan.machine.count
    epochs = f"{config.align.epochs:g} epoch{'' if config.align.epochs == 1 else 's'}"
    align = f"{epochs} of {format_count(plan.images, 'image')}, {config.align.batch_size * count:,} per step"
    if plan.images_per_second:
        align += f"; {plan.images_per_second:,.0f} images/s to decode per device"
    details = {
        "tune": f"{format_count(config.tune.steps, 'step')} of {config.tune.batch_size * count:,} pairs",
        "embed": f"{plan.images * plan.captions_per_image:,.0f} captions",
        "align": align,
    }
    rows = [(stage, format_hours(plan.stage_hours[stage]), details[stage]) for stage in plan.stage_memory]
    return Table((f"Time on {count} x {plan.machine.device_spec.name}", "duration", "work"), rows)


# ---- checks before a run -------------------------------------------------------------------------------------------


def check_resources(config: FitConfig, run_dir: Path, records: RecordTable | None) -> list[str]:
    """Check that there is enough free disk space for a run. Return warnings if there is not enough memory.

    Args:
        records: Training records. If None, only the disk space for models and checkpoints is checked.

    Raises:
        OSError: There is not enough free disk space.
    """
    if records is None:
        images = config.align.batch_size * process_state().num_processes  # a single step
        data = {"images": images, "captions_per_image": 1.0, "tokens_per_caption": 1.0}
    else:
        data = estimate_data_size(records)
        if not data:
            return []
    try:
        plan = plan_fit(config, _detect_machine(), **data)
        fits = {} if records is None else plan.stage_fits_in_memory
    except (ValueError, RuntimeError) as error:  # for example, if fake tensors do not support an operation
        return [f"Could not check memory and disk space: {error}"]
    _check_disk_space(plan, run_dir)
    warnings = []
    for stage in [stage for stage, is_enough in fits.items() if not is_enough]:
        needed = format_bytes(compute_peak_memory(plan.stage_memory[stage]))
        free = format_bytes(plan.machine.device_spec.memory * 1e9)
        warnings.append(f"Warning: {stage} needs about {needed} of memory, but only {free} is free.")
        warnings.append(f"  {MEMORY_ADVICE[stage]}")
    return warnings


def estimate_data_size(records: RecordTable) -> dict[str, Any]:
    """Return the arguments of `plan_fit` that describe the data, or {} if there are no images or no captions."""
    images = int(records.has_image.sum())
    texts = list(records[:SAMPLED_RECORDS].iterate_texts(CAPTION_FIELDS))
    if not images or not texts:
        return {}
    return {
        "images": images,
        "captions_per_image": len(texts) / min(len(records), SAMPLED_RECORDS),
        "tokens_per_caption": max(1.0, sum(map(len, texts)) / len(texts) / CHARACTERS_PER_TOKEN),
    }


def _detect_machine() -> Machine:
    state = process_state()
    if state.device.type == "cuda":
        memory, name = torch.cuda.mem_get_info(state.device)[0], "gpu"
    else:
        memory, name = get_available_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), "cpu"
    return Machine(name, state.num_processes, tflops=1, memory=memory / 1e9, use_fsdp=is_fsdp_enabled())


def _check_disk_space(plan: FitPlan, run_dir: Path) -> None:
    """Raise OSError if there is not enough disk space for the files that the run has not written yet."""
    trained = plan.image.trained + (plan.text.trained if plan.config.tune.steps else 0)
    # Checkpoints contain trained weights and AdamW's two moments. The encoder is saved in both tune/ and model/.
    sizes = {
        "caption encoder": 2 * 4 * plan.text.parameters,
        "model": 4 * plan.image.parameters,
        "checkpoints": 12 * MAX_CHECKPOINTS * trained,
        "embedding store": plan.store_bytes,
        "image features": plan.feature_bytes,
    }
    existing = sum(file.stat().st_size for file in run_dir.rglob("*") if file.is_file())
    needed = sum(sizes.values()) - existing
    folder = next(parent for parent in (run_dir, *run_dir.absolute().parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in sizes.items())
        raise OSError(
            f"the run needs about {format_bytes(needed)} of disk space ({parts}), but only {format_bytes(free)} is "
            f"free at {folder}. Free up space, or choose another folder with --out"
        )
