"""Estimates of the parameters, FLOPs, memory and hours of a `fit` run, and checks of free memory and disk space.

Time is computed as FLOPs / (peak throughput * assumed model FLOPs utilisation); see `devices.MFU`. Small models, small
batches and slow image decoding lower the actual utilisation.
"""

import dataclasses
import os
import shutil
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch

from llm2clip.config import AlignConfig, DistillConfig, FitConfig
from llm2clip.data.columns import CAPTION_FIELDS
from llm2clip.data.table import RecordTable
from llm2clip.runs.checkpoint import MAX_CHECKPOINTS
from llm2clip.runs.fsdp import is_fsdp_enabled
from llm2clip.runs.ranks import process_state
from llm2clip.store.store import get_available_memory
from llm2clip.tools.plan.costs import ImageCosts, TextCosts, measure_image_costs, measure_text_costs
from llm2clip.tools.plan.devices import Machine
from llm2clip.tools.plan.memory import (
    Parts,
    compute_peak_memory,
    estimate_align_memory,
    estimate_embed_memory,
    estimate_tune_memory,
    fits_in_memory,
    suggest_flags,
)
from llm2clip.tools.plan.student import StudentPlan, plan_student
from llm2clip.train.losses import get_loss
from llm2clip.train.sampling import resolve_images_per_step

CHARACTERS_PER_TOKEN = 4  # approximate value for English text
SAMPLED_RECORDS = 1000  # number of records used to estimate caption counts and lengths


@dataclass(frozen=True)
class Plan:
    """Resource estimates for a `fit` run.

    Attributes:
        config: Run settings. Precisions are resolved for the device, and the `align` batch size is reduced if there are
            too few images.
        machine, images, captions_per_image, tokens_per_caption: See `plan_fit`.
        text, image: Costs of the caption encoder and of the model trained by `align`.
        student: Estimates for `distill` after the run, or None if it is not planned.
    """

    config: FitConfig
    machine: Machine
    images: int
    captions_per_image: float
    tokens_per_caption: float
    text: TextCosts
    image: ImageCosts
    student: StudentPlan | None = None

    @cached_property
    def step_flops(self) -> dict[str, float]:
        """FLOPs per image in an `align` step.

        The keys are "once" (forward and backward passes), "repeated" (additional forward passes), "loss" and "total".
        With self-distillation on random crops, "once" includes the pretrained tower's forward pass.
        """
        align, image, count = self.config.align, self.image, self.machine.count
        recomputes = align.gradient_checkpointing and image.saved > image.layer_inputs > 0
        uses_grad_cache = (align.micro_batch_size or align.batch_size) < align.batch_size
        teacher = image.tower_forward if align.distill_weight and not align.caches_features else 0.0
        once = image.forward + teacher + image.backward
        repeated = (image.tower_forward if recomputes else 0.0) + (image.forward if uses_grad_cache else 0.0)
        texts = align.batch_size * count * image.captions
        loss_dims = image.embed_dim + sum(align.matryoshka_dims)
        loss = 2 * get_loss(align.loss).matmuls[count > 1] * texts * loss_dims
        return {"once": once, "repeated": repeated, "loss": loss, "total": once + repeated + loss}

    @cached_property
    def stage_hours(self) -> dict[str, float]:
        """Duration of each stage, in hours."""
        tune, align, machine = self.config.tune, self.config.align, self.machine
        tune_texts = 2 * tune.steps * tune.batch_size * machine.count  # two texts per pair
        embed_flops = self.images * self.captions_per_image * self.text.forward
        feature_flops = self.images * self.image.tower_forward if align.caches_features else 0.0
        align_flops = feature_flops + self.images * align.epochs * self.step_flops["total"]
        hours = {
            "tune": machine.estimate_hours(tune_texts * self.text.count_tune_flops(tune), tune.precision, "tune"),
            "embed": machine.estimate_hours(embed_flops, self.config.embed.precision, "embed"),
            "align": machine.estimate_hours(align_flops, align.precision, "align"),
        }
        if self.student is not None:
            precision = self.config.embed.precision
            hours["distill"] = self.student.estimate_hours(self.text, self.image, precision, machine)
        return hours

    @cached_property
    def memory(self) -> dict[str, Parts]:
        """Memory per device in bytes, keyed by stage and then by component. `tune` is omitted if it has no steps."""
        memory = {
            "tune": estimate_tune_memory(self.text, self.config.tune, self.machine),
            "embed": estimate_embed_memory(self.text, self.config.embed.precision, self.machine),
            "align": estimate_align_memory(self.image, self.text, self.config.align, self.machine),
        }
        if self.config.tune.steps == 0:
            del memory["tune"]
        if self.student is not None:
            memory["distill"] = self.student.estimate_memory(self.image, self.machine)
        return memory

    @property
    def fits(self) -> dict[str, bool]:
        """For each stage, True if it fits in the device's memory."""
        return {stage: fits_in_memory(parts, self.machine.device_spec.memory) for stage, parts in self.memory.items()}

    def suggest_flags(self, stage: str) -> list[tuple[str, float]]:
        """Return sets of flags that make `tune` or `align` fit in memory, each with the resulting peak in bytes."""
        if stage == "tune":
            return suggest_flags(self.config.tune, self.machine, partial(estimate_tune_memory, self.text))
        if stage == "align":
            return suggest_flags(self.config.align, self.machine, self._estimate_align_memory_for)
        return []

    @property
    def store_bytes(self) -> float:
        """Size of the embedding store in bytes."""
        dim = self.text.embed_dim
        bytes_per_caption = (2 * dim if self.config.embed.dtype == "float16" else dim + 4) + 16
        return self.images * self.captions_per_image * bytes_per_caption

    @property
    def feature_bytes(self) -> float:
        """Size of the cached tower features in bytes; 0 if features are not cached."""
        return self.images * (2 * self.image.feature_dim + 16) if self.config.align.caches_features else 0.0

    @property
    def images_per_second(self) -> float:
        """Number of images that each device must decode per second in `align`; 0 if the tower is frozen."""
        align = self.config.align
        if align.tower_lr == 0:
            return 0.0
        return self.images * align.epochs / (self.stage_hours["align"] * 3600 * self.machine.count)

    @property
    def online_cost_ratios(self) -> tuple[float, float]:
        """Costs of running the LLM in every `align` step, relative to using an embedding store.

        The first ratio compares FLOPs per step, and the second compares the total time of `embed` and `align`.
        """
        text_flops, step_flops = self.image.captions * self.text.forward, self.step_flops["total"]
        all_flops = self.images * self.config.align.epochs * text_flops
        hours = self.stage_hours["align"] + self.machine.estimate_hours(all_flops, self.config.embed.precision, "embed")
        return (step_flops + text_flops) / step_flops, hours / (self.stage_hours["embed"] + self.stage_hours["align"])

    def _estimate_align_memory_for(self, config: AlignConfig, machine: Machine) -> Parts:
        same_model = config.lora_r == self.config.align.lora_r
        image = self.image if same_model else measure_image_costs(config, self.text.embed_dim, self.image.captions)
        return estimate_align_memory(image, self.text, config, machine)


def plan_fit(
    config: FitConfig,
    machine: Machine,
    images: int,
    captions_per_image: float,
    tokens_per_caption: float,
    *,
    student: str | None = None,
    student_texts: int = 0,
    distill: DistillConfig | None = None,
) -> Plan:
    """Estimate the parameters, FLOPs, memory and hours of a `fit` run, and of `distill` after it.

    Args:
        captions_per_image: Mean number of captions per image. All captions are assumed to be distinct.
        tokens_per_caption: Mean number of tokens per caption, including the template.
        student: Student of `distill`; see `train.distill.open_student`. Default: `distill` is not planned.
        student_texts: Number of texts that only the student learns from.
        distill: Settings of `distill`.

    Raises:
        ValueError: A model is unknown, a number is not positive, or there are too few images for one step.
    """
    data = {"images": images, "captions_per_image": captions_per_image, "tokens_per_caption": tokens_per_caption}
    for name, value in data.items():
        if value <= 0:
            raise ValueError(f"--{name} must be greater than 0 (got {value})")
    device, align = machine.device_spec, config.align
    align = dataclasses.replace(
        align,
        precision=cast(Any, device.resolve_precision(align.precision, "align")),
        batch_size=resolve_images_per_step(images, align, machine.count) // machine.count,
    )
    tune = dataclasses.replace(
        config.tune, precision=cast(Any, device.resolve_precision(config.tune.precision, "tune"))
    )
    embed = dataclasses.replace(config.embed, precision=device.resolve_precision(config.embed.precision, "embed"))
    text = measure_text_costs(
        config.encoder, tune, min(tokens_per_caption, config.encoder.max_length or 512), machine.is_cpu
    )
    captions = min(align.captions_per_image or captions_per_image, captions_per_image)
    image = measure_image_costs(align, text.embed_dim, captions)
    student_plan = None
    if student is not None:
        student_plan = plan_student(
            student,
            distill or DistillConfig(),
            config.encoder,
            image,
            machine,
            captions=images * captions_per_image,
            tokens=tokens_per_caption,
            other_texts=student_texts,
        )
    elif student_texts:
        raise ValueError("--student_texts requires --student")
    return Plan(
        config=dataclasses.replace(config, tune=tune, embed=embed, align=align),
        machine=machine,
        images=images,
        captions_per_image=captions_per_image,
        tokens_per_caption=tokens_per_caption,
        text=text,
        image=image,
        student=student_plan,
    )


# ---- checks before a run -------------------------------------------------------------------------------------------


def check_resources(config: FitConfig, run_dir: Path, records: RecordTable | None) -> list[str]:
    """Check before a run starts that there is enough free disk space and memory.

    Args:
        records: Training records. None if they do not exist yet: then only the disk space for the models is checked.

    Returns:
        Warnings about stages that need more memory than is free. They are not errors, because the memory needed is
        only estimated.

    Raises:
        OSError: There is not enough free disk space.
    """
    if records is None:
        images = config.align.batch_size * process_state().num_processes  # a single step
        captions_per_image = tokens_per_caption = 1.0
    else:
        images = int(records.has_image.sum())
        texts = list(records[:SAMPLED_RECORDS].iterate_texts(CAPTION_FIELDS))
        if not images or not texts:
            return []
        captions_per_image = len(texts) / min(len(records), SAMPLED_RECORDS)
        tokens_per_caption = max(1.0, sum(map(len, texts)) / len(texts) / CHARACTERS_PER_TOKEN)
    try:
        plan = plan_fit(config, _detect_machine(), images, captions_per_image, tokens_per_caption)
        warnings = [] if records is None else _list_memory_warnings(plan)
    except (ValueError, RuntimeError) as error:  # fake tensors may not support all of the model's operations
        return [f"Could not check memory and disk space: {error}"]
    _check_disk_space(plan, run_dir)
    return warnings


def _list_memory_warnings(plan: Plan) -> list[str]:
    warnings = []
    for stage in (stage for stage, stage_fits in plan.fits.items() if not stage_fits):
        needed, free = compute_peak_memory(plan.memory[stage]) / 1e9, plan.machine.device_spec.memory
        warnings.append(f"Warning: {stage} needs about {needed:.1f} GB of memory, but only {free:.1f} GB is free.")
        warnings += [f"  with {flags}: {size / 1e9:.1f} GB" for flags, size in plan.suggest_flags(stage)]
    return warnings


def _detect_machine() -> Machine:
    """Return the number, type and free memory of this run's devices."""
    state = process_state()
    if state.device.type == "cuda":
        memory, name = torch.cuda.mem_get_info(state.device)[0], "gpu"
    else:
        memory, name = get_available_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), "cpu"
    return Machine(name, state.num_processes, tflops=1, memory=memory / 1e9, use_fsdp=is_fsdp_enabled())


def _check_disk_space(plan: Plan, run_dir: Path) -> None:
    """Raise OSError if the files that a run has not yet written do not fit on the disk."""
    trained = plan.image.trained + (plan.text.trained if plan.config.tune.steps else 0)
    # Checkpoints contain each trained weight and AdamW's two moments. The encoder is saved in both tune/ and model/.
    sizes = {
        "caption encoder": 2 * 4 * plan.text.parameters,
        "model": 4 * plan.image.parameters,
        "checkpoints": 12 * MAX_CHECKPOINTS * trained,
        "embedding store": plan.store_bytes,
        "image features": plan.feature_bytes,
    }
    existing = sum(file.stat().st_size for file in run_dir.rglob("*") if file.is_file())
    needed = (sum(sizes.values()) - existing) / 1e9
    folder = next(parent for parent in (run_dir, *run_dir.absolute().parents) if parent.exists())
    free = shutil.disk_usage(folder).free / 1e9
    if needed > free:
        parts = ", ".join(f"{name} {size / 1e9:.1f} GB" for name, size in sizes.items())
        raise OSError(
            f"the run needs about {needed:.1f} GB of disk space ({parts}), but only {free:.1f} GB is free at "
            f"{folder}: free up space, or choose another folder with --out"
        )
