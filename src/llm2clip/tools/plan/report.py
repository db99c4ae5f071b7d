"""Text output of the `plan` command."""

from collections.abc import Iterable
from io import StringIO

from rich.console import Console
from rich.table import Table

from llm2clip.io_utils import format_bytes
from llm2clip.runs.checkpoint import MAX_CHECKPOINTS
from llm2clip.tools.plan.devices import USABLE_FRACTION, compute_peak_memory
from llm2clip.tools.plan.plan import MEMORY_ADVICE, Plan


def format_plan(plan: Plan, width: int = 110) -> str:
    """Format a plan as text with at most `width` characters per line."""
    page = StringIO()
    console = Console(file=page, width=width, highlight=False)
    for table in (
        _make_parameter_table(plan),
        _make_flops_table(plan),
        _make_memory_table(plan),
        _make_time_table(plan),
    ):
        console.print(table)
        console.print()
    for line in (
        *_format_store_sizes(plan),
        _format_caching_gain(plan),
        *_format_advice(plan),
        _format_assumptions(plan),
    ):
        console.print(line, markup=False)
    return "\n".join(line.rstrip() for line in page.getvalue().splitlines())


def format_hours(hours: float) -> str:
    """Format a duration in days, hours or minutes."""
    if hours >= 48:
        return f"{hours / 24:,.1f} days"
    return f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:,.1f} minutes"


def _make_table(columns: Iterable[str], rows: Iterable[Iterable[str]], right_align: bool = True) -> Table:
    """Create a table. If `right_align` is True, right-align all columns except the first."""
    table = Table(box=None, pad_edge=False)
    for n, name in enumerate(columns):
        table.add_column(name, justify="right" if n and right_align else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _make_parameter_table(plan: Plan) -> Table:
    text, image = plan.text, plan.image
    tuned = text.trained if plan.config.tune.steps else 0
    rows = [
        (f"caption encoder {plan.config.encoder.path}", f"{text.parameters:,}", f"{tuned:,}"),
        (f"vision tower {plan.config.align.tower}", f"{image.tower:,}", ""),
        ("projection", f"{image.projection:,}", ""),
        ("adapter", f"{image.adapter:,}", ""),
        ("tower, projection and adapter", f"{image.parameters:,}", f"{image.trained:,}"),
    ]
    if plan.student is not None:
        student = plan.student.costs
        rows.append((f"student {plan.student.name}", f"{student.parameters:,}", f"{student.trained:,}"))
    return _make_table(("Parameters", "all", "trained"), rows)


def _make_flops_table(plan: Plan) -> Table:
    flops, align = plan.step_flops, plan.config.align
    caption = f"caption of {plan.tokens_per_caption:g} tokens"
    captions = "its caption" if plan.image.captions == 1 else f"its {plan.image.captions:g} captions"
    source = ", from cached features" if align.tower_lr == 0 else ""
    counts = {f"{caption}, forward": plan.text.forward}
    if "tune" in plan.memory:
        counts[f"{caption}, in a tuning step"] = plan.text.count_tune_flops(plan.config.tune)
    counts["image through the tower"] = plan.image.tower_forward
    counts[f"image and {captions} in an align step"] = flops["total"]
    counts[f"  forward and backward{source}"] = flops["once"]
    if flops["repeated"]:
        counts["  repeated forward (micro_batch_size)"] = flops["repeated"]
    counts["  loss"] = flops["loss"]
    if plan.student is not None:
        counts["text in a distill step"] = plan.student.step_flops
    rows = [(name, f"{count / 1e9:,.0f}" if count >= 1e11 else f"{count / 1e9:,.2f}") for name, count in counts.items()]
    return _make_table(("GFLOPs (10^9 FLOPs; a multiply-add counts as 2)", ""), rows)


def _make_memory_table(plan: Plan) -> Table:
    stages, device = list(plan.memory), plan.machine.device_spec
    parts = dict.fromkeys(part for memory in plan.memory.values() for part in memory)  # unique names, in original order
    ordered = sorted(parts, key=("libraries", "loading").__contains__)  # libraries and loading come last
    rows = []
    for part in ordered:
        name = "loading (before training)" if part == "loading" else part
        sizes = [plan.memory[stage].get(part) for stage in stages]
        rows.append([name, *("" if size is None else f"{size / 1e9:.1f}" for size in sizes)])
    rows.append(["peak", *(f"{compute_peak_memory(memory) / 1e9:.1f}" for memory in plan.memory.values())])
    rows.append(["fits", *("yes" if stage_fits else "NO" for stage_fits in plan.fits.values())])
    title = f"Memory per device, GB (10^9 bytes; {device.name} has {device.memory:g} GB)"
    return _make_table((title, *stages), rows)


def _make_time_table(plan: Plan) -> Table:
    config, count = plan.config, plan.machine.count
    images_per_step = config.align.batch_size * count
    align = f"{config.align.epochs:g} epochs of {plan.images:,} images, {images_per_step:,} per step"
    if plan.images_per_second:
        align += f"; {plan.images_per_second:,.0f} images/s to decode per device"
    details = {
        "tune": f"{config.tune.steps:,} steps of {config.tune.batch_size * count:,} pairs",
        "embed": f"{plan.images * plan.captions_per_image:,.0f} captions",
        "align": align,
    }
    if plan.student is not None:
        student = plan.student
        details["distill"] = f"{student.config.epochs:g} epochs of {student.learned_texts:,.0f} texts"
        if student.new_texts:
            details["distill"] += f", after the LLM has encoded {student.new_texts:,.0f} texts"
    rows = [(stage, format_hours(plan.stage_hours[stage]), details[stage]) for stage in plan.memory]
    return _make_table((f"Time on {count} x {plan.machine.device_spec.name}", "", ""), rows, right_align=False)


def _format_store_sizes(plan: Plan) -> list[str]:
    lines = [f"Embedding store ({plan.config.embed.dtype}): {format_bytes(plan.store_bytes)} on disk."]
    if plan.feature_bytes:
        lines.append(f"Cached tower features (float16): {format_bytes(plan.feature_bytes)} on disk.")
    if plan.student is not None:
        checkpoints = 12 * MAX_CHECKPOINTS * plan.student.costs.trained
        new_store = plan.student.new_texts * (2 * plan.text.embed_dim + 16)
        lines.append(
            f"Distill: {format_bytes(plan.student.target_bytes)} on disk for the teacher's embeddings (float16), "
            f"{format_bytes(new_store)} for the store of new texts, up to "
            f"{format_bytes(checkpoints)} for checkpoints. Phrases from the captions are not counted."
        )
    return lines


def _format_caching_gain(plan: Plan) -> str:
    (step, hours), weights = plan.online_cost_ratios, 2.0 * plan.text.parameters  # bytes in half precision
    return (
        f"Without the store, running the LLM in every `align` step would take {step:.2f} times the FLOPs per step, "
        f"{hours:.2f} times the total time of `embed` and `align`, and {format_bytes(weights)} more memory per device "
        "for the weights."
    )


def _format_advice(plan: Plan) -> list[str]:
    stages = [stage for stage, stage_fits in plan.fits.items() if not stage_fits]
    return [f"OUT OF MEMORY in {stage}. {MEMORY_ADVICE[stage]}" for stage in stages]


def _format_assumptions(plan: Plan) -> str:
    mfu = ", ".join(f"{stage} {plan.machine.get_mfu(stage):.0%}" for stage in plan.stage_hours)
    return (
        f"Estimated, not measured. Assumptions: {mfu} of peak throughput (MFU), "
        f"{1 - USABLE_FRACTION:.0%} of memory lost to fragmentation, no duplicate captions, and image decoding that is "
        "never the bottleneck."
    )
