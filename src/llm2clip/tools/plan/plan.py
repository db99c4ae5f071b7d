"""Estimates of the parameters, FLOPs, memory and hours of a `fit` run, and checks of free memory and disk space.

Time is computed as FLOPs / (peak throughput * assumed model FLOPs utilisation); see `devices.MFU`. Small models, small
batches and slow image decoding lower the actual utilisation.
"""

import dataclasses
import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch

from llm2clip.config import DistillConfig, EncoderConfig, FitConfig, TuneConfig
from llm2clip.data.columns import CAPTION_FIELDS
from llm2clip.data.table import RecordTable
from llm2clip.runs.checkpoint import MAX_CHECKPOINTS
from llm2clip.runs.fsdp import is_fsdp_enabled
from llm2clip.runs.ranks import process_state
from llm2clip.store.store import get_available_memory
from llm2clip.tools.plan.costs import (
    ImageCosts,
    TextCosts,
    get_llm_config,
    measure_image_costs,
    measure_text_costs,
)
from llm2clip.tools.plan.devices import (
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
ROW_BYTES = 60  # memory of `distill` per distinct text; see `train.distill.prepare_texts`
# Settings that reduce the memory of each stage.
MEMORY_ADVICE = {
    "tune": "To reduce it: --tune.gradient_checkpointing true, --tune.grad_cache true, a lower --tune.batch_tokens, "
    "--tune.qlora true, or --use_fsdp with several devices.",
    "embed": "To reduce it: use a smaller model or fewer layers (--encoder.layers).",
    "align": "To reduce it: a lower --align.micro_batch_size, --align.lora_r 16, or --use_fsdp with several devices.",
    "distill": "To reduce it: use a smaller student, or a lower --distill.batch_size.",
}
SAMPLED_RECORDS = 1000  # number of records used to estimate caption counts and lengths


@dataclass(frozen=True)
class StudentPlan:
    """Estimates for `llm2clip distill`, which teaches a small text encoder (the student) after a `fit` run."""

    name: str  # see `train.distill.open_student`
    config: DistillConfig  # settings, with the precision resolved for the device
    costs: TextCosts  # costs of the student, including its new layers
    new_texts: float  # number of texts that the LLM must encode; for a static student, its vocabulary is included
    learned_texts: float  # number of texts that the student learns from: the captions and the additional texts
    embed_dim: int  # dimension of the shared embedding space

    @property
    def step_flops(self) -> float:
        """FLOPs per text of a training step."""
        return self.costs.tune_forward + self.costs.tune_backward

    @property
    def target_bytes(self) -> float:
        """Size on disk of the teacher's embeddings, which the student learns."""
        return self.learned_texts * (2 * self.embed_dim + 16)

    def estimate_hours(self, text: TextCosts, image: ImageCosts, embed_precision: str, machine: Machine) -> float:
        """Return the hours for encoding new texts with the LLM, applying the adapter, and training the student."""
        encoding = machine.estimate_hours(self.new_texts * text.forward, embed_precision, "embed")
        adapter = machine.estimate_hours(self.learned_texts * 2 * image.adapter, "fp32", "distill")
        training_flops = self.learned_texts * self.config.epochs * self.step_flops
        return encoding + adapter + machine.estimate_hours(training_flops, self.config.precision, "distill")

    def estimate_memory(self, image: ImageCosts, machine: Machine) -> Parts:
        """Return the bytes per device that each component needs while the student is trained."""
        # Like the `tune` stage without LoRA. Large batches are split, and two texts count as a pair.
        settings = TuneConfig(
            batch_size=max(1, self.config.batch_size // 2),
            lora_r=0,
            grad_cache=True,
            precision=cast(Any, self.config.precision),
        )
        parts = estimate_tune_memory(self.costs, settings, dataclasses.replace(machine, use_fsdp=False))
        parts["student"] = parts.pop("LLM")
        texts = {"texts": ROW_BYTES * self.learned_texts} if machine.is_cpu else {}  # they stay in the host's memory
        return {"model": 4.0 * image.parameters, **texts, **parts}


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
        With self-distillation, "once" includes the pretrained tower's forward pass.
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
        """Duration of each stage, in hours."""
        tune, align, machine = self.config.tune, self.config.align, self.machine
        tune_texts = 2 * tune.steps * tune.batch_size * machine.count  # two texts per pair
        embed_flops = self.images * self.captions_per_image * self.text.forward
        feature_flops = self.images * self.image.tower_forward if align.tower_lr == 0 else 0.0
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

    @property
    def store_bytes(self) -> float:
        """Size of the embedding store in bytes."""
        dim = self.text.embed_dim
        bytes_per_caption = (2 * dim if self.config.embed.dtype == "float16" else dim + 4) + 16
        return self.images * self.captions_per_image * bytes_per_caption

    @property
    def feature_bytes(self) -> float:
        """Size of the cached tower features in bytes; 0 if features are not cached."""
        return self.images * (2 * self.image.feature_dim + 16) if self.config.align.tower_lr == 0 else 0.0

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
    if student_texts and student is None:
        raise ValueError("--student_texts requires --student")
    config = _resolve_settings(config, machine, images)
    max_length = config.encoder.max_length or 512
    text = measure_text_costs(config.encoder, config.tune, min(tokens_per_caption, max_length), machine.is_cpu)
    captions = min(config.align.captions_per_image or captions_per_image, captions_per_image)
    plan = Plan(
        config=config,
        machine=machine,
        images=images,
        captions_per_image=captions_per_image,
        tokens_per_caption=tokens_per_caption,
        text=text,
        image=measure_image_costs(config.align, text.embed_dim, captions),
    )
    if student is None:
        return plan
    return dataclasses.replace(plan, student=_plan_student(plan, student, distill or DistillConfig(), student_texts))


def _resolve_settings(config: FitConfig, machine: Machine, images: int) -> FitConfig:
    """Resolve the precisions for the device, and reduce the `align` batch size if there are too few images."""
    stages: dict[str, Any] = {}
    for stage in ("tune", "embed", "align"):
        settings = getattr(config, stage)
        precision = machine.device_spec.resolve_precision(settings.precision, cast(Any, stage))
        stages[stage] = dataclasses.replace(settings, precision=precision)
    batch_size = resolve_images_per_step(images, config.align, machine.count) // machine.count
    stages["align"] = dataclasses.replace(stages["align"], batch_size=batch_size)
    return dataclasses.replace(config, **stages)


def _plan_student(plan: Plan, name: str, config: DistillConfig, other_texts: int) -> StudentPlan:
    """Estimate the costs of teaching a student, which learns from the captions of a run and from `other_texts` texts.

    Raises:
        ValueError: The student is unknown.
    """
    encoder, machine, tokens = plan.config.encoder, plan.machine, plan.tokens_per_caption
    embed_dim = plan.image.embed_dim
    precision = machine.device_spec.resolve_precision(config.precision, "distill")
    config = dataclasses.replace(config, precision=cast(Any, precision))
    kind, _, argument = name.partition(":")
    new_texts = other_texts
    if kind == "static":
        vocabulary = get_llm_config(EncoderConfig(path=argument) if argument else encoder).vocab_size
        costs = _compute_static_costs(vocabulary, embed_dim, tokens)
        new_texts += vocabulary
    else:
        student = EncoderConfig(path=name)
        if kind == "layers":
            if not argument.isdecimal() or int(argument) < 1:
                raise ValueError(
                    f"--student layers:N requires a number of layers of at least 1, such as layers:4 (got {name!r})"
                )
            student = dataclasses.replace(encoder, layers=int(argument))
        tokens = min(tokens, config.max_length or 512)
        settings = TuneConfig(lora_r=0, precision=cast(Any, precision))
        costs = measure_text_costs(student, settings, tokens, machine.is_cpu)
        costs = _add_last_layer(costs, embed_dim)
    learned_texts = plan.images * plan.captions_per_image + other_texts
    return StudentPlan(name, config, costs, new_texts, learned_texts, embed_dim)


def _add_last_layer(costs: TextCosts, embed_dim: int) -> TextCosts:
    weights = costs.embed_dim * embed_dim
    return dataclasses.replace(
        costs,
        parameters=costs.parameters + weights,
        linear=costs.linear + weights,
        trained=costs.trained + weights,
        tune_forward=costs.tune_forward + 2 * weights,
        tune_backward=costs.tune_backward + 4 * weights,
    )


def _compute_static_costs(vocabulary: int, dim: int, tokens: float) -> TextCosts:
    """Return the costs of a static student: an embedding of size `dim` per token, and two linear layers."""
    linear = 2 * dim * dim
    parameters = vocabulary * dim + linear
    return TextCosts(
        tokens=tokens,
        embed_dim=dim,
        parameters=parameters,
        linear=linear,
        largest_linear=dim * dim,
        largest_matrix=dim * dim,
        layers=0,
        trained=parameters,
        forward=2 * linear,
        tune_forward=2 * linear,
        tune_backward=4 * linear,
        saved_per_token=0.0,
        input_per_token=0.0,
        saved_outside=4 * 6 * dim / tokens,  # input, output and intermediate results of both layers
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
        warnings.append(f"  {MEMORY_ADVICE[stage]}")
    return warnings


def _detect_machine() -> Machine:
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
