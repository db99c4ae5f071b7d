"""Text tables that show a plan."""

from __future__ import annotations

from io import StringIO

from rich.console import Console
from rich.table import Table

from llm2clip.tools.plan.memory import USABLE_FRACTION, peak_memory
from llm2clip.tools.plan.plan import STAGES, Plan


def format_plan(plan: Plan, width: int = 110) -> str:
    """Format a plan as text that is at most `width` characters wide."""
    page = StringIO()
    console = Console(file=page, width=width, highlight=False)
    for table in (_parameter_table(plan), _flop(plan), _memory(plan), _hours(plan)):
        console.print(table)
        console.print()
    for line in (*_stores(plan), _caching_section(plan), *_suggestions(plan), _assumptions(plan)):
        console.print(line, markup=False)
    return "\n".join(line.rstrip() for line in page.getvalue().splitlines())


def _table(*columns: str, right_align: bool = True) -> Table:
    """Create a table. All columns except the first are right-aligned, unless `right_align` is False."""
    table = Table(box=None, pad_edge=False)
    for n, name in enumerate(columns):
        table.add_column(name, justify="right" if n and right_align else "left", overflow="fold")
    return table


def _parameter_table(plan: Plan) -> Table:
    parameters = plan.parameters
    align_total = parameters["vision tower"] + parameters["projection"] + parameters["adapter"]
    table = _table("Parameters", "all", "trained")
    table.add_row(
        f"caption encoder {plan.config.encoder.path}",
        _count(parameters["caption encoder"]),
        _count(parameters["trained by tune"]),
    )
    table.add_row(f"vision tower {plan.config.align.tower}", _count(parameters["vision tower"]), "")
    table.add_row("projection", _count(parameters["projection"]), "")
    table.add_row("adapter", _count(parameters["adapter"]), "")
    table.add_row("tower, projection and adapter", _count(align_total), _count(parameters["trained by align"]))
    return table


def _flop(plan: Plan) -> Table:
    flop, align = plan.flop, plan.config.align
    table = _table("GFLOPs (10^9 FLOPs; a multiply-add counts as 2)", "")
    caption = f"caption of {plan.tokens_per_caption:g} tokens"
    table.add_row(f"{caption}, forward", _format_giga(flop["caption forward"]))
    if "tune" in plan.memory:
        table.add_row(f"{caption}, in a tuning step", _format_giga(flop["caption tune"]))
    table.add_row("image through the tower", _format_giga(flop["tower forward"]))
    captions = "its caption" if plan.captions == 1 else f"its {plan.captions:g} captions"
    table.add_row(f"image and {captions} in an align step", _format_giga(flop["step"]))
    source = ", from cached features" if align.tower_lr == 0 else ""
    table.add_row(f"  forward and backward{source}", _format_giga(flop["image once"]))
    if flop["image again"]:
        reasons = [name for name in ("gradient_checkpointing", "micro_batch_size") if getattr(align, name)]
        table.add_row(f"  repeated forward ({', '.join(reasons)})", _format_giga(flop["image again"]))
    table.add_row("  loss", _format_giga(flop["image loss"]))
    return table


def _memory(plan: Plan) -> Table:
    stages = [stage for stage in STAGES if stage in plan.memory]
    device = plan.machine.device_spec
    table = _table(f"Memory per device, GB (10^9 bytes; {device.name} has {device.memory:g} GB)", *stages)
    parts = dict.fromkeys(part for stage in stages for part in plan.memory[stage])
    for part in [*(part for part in parts if part not in ("libraries", "loading")), "libraries"]:
        sizes = [plan.memory[stage].get(part) for stage in stages]
        table.add_row(part, *("" if size is None else f"{size / 1e9:.1f}" for size in sizes))
    loading = [plan.memory[stage]["loading"] for stage in stages]
    if any(loading):
        table.add_row("loading (before training)", *(f"{size / 1e9:.1f}" if size else "" for size in loading))
    table.add_row("peak", *(f"{peak_memory(plan.memory[stage]) / 1e9:.1f}" for stage in stages))
    table.add_row("fits", *("yes" if plan.fits[stage] else "NO" for stage in stages))
    return table


def _hours(plan: Plan) -> Table:
    config, count = plan.config, plan.machine.count
    table = _table(f"Time on {count} x {plan.machine.device_spec.name}", "", "", right_align=False)
    if "tune" in plan.memory:
        pairs = config.tune.batch_size * count
        table.add_row("tune", _time(plan.hours["tune"]), f"{config.tune.steps:,} steps of {pairs:,} pairs")
    captions = plan.images * plan.captions_per_image
    table.add_row("embed", _time(plan.hours["embed"]), f"{captions:,.0f} captions")
    images = config.align.batch_size * count
    details = f"{config.align.epochs:g} epochs of {plan.images:,} images, {images:,} per step"
    if plan.images_per_second:
        details += f"; {plan.images_per_second:,.0f} images/s to decode per device"
    table.add_row("align", _time(plan.hours["align"]), details)
    return table


def _stores(plan: Plan) -> list[str]:
    lines = [f"Embedding store ({plan.config.embed.dtype}): {_format_bytes(plan.store)} on disk."]
    if plan.features:
        lines.append(f"Cached tower features (float16): {_format_bytes(plan.features)} on disk.")
    return lines


def _caching_section(plan: Plan) -> str:
    online = plan.online
    return (
        f"Without the store, running the LLM in every `align` step: {online['step']:.2f} times the FLOPs per step, "
        f"{online['hours']:.2f} times the total time of `embed` plus `align`, "
        f"and {_format_bytes(online['weights'])} more memory per device for the weights."
    )


def _suggestions(plan: Plan) -> list[str]:
    lines = []
    for stage in (stage for stage, stage_fits in plan.fits.items() if not stage_fits):
        lines.append(f"OUT OF MEMORY in {stage}.")
        suggestions = plan.suggestions.get(stage, [])
        lines += [f"  would fit: {flags} ({size / 1e9:.1f} GB)" for flags, size in suggestions]
        if any("--use_fsdp" in flags for flags, _ in suggestions):
            lines.append("  --use_fsdp shards the weights: accelerate launch --use_fsdp --fsdp_version 2")
        if not suggestions:
            lines.append("  None of the settings tried fits: use a smaller model, fewer layers, or a larger device.")
    return lines


def _assumptions(plan: Plan) -> str:
    mfu = ", ".join(f"{stage} {plan.machine.stage_mfu(stage):.0%}" for stage in STAGES)
    return (
        f"Estimated, not measured. Assumptions: {mfu} of the peak throughput (MFU), "
        f"{1 - USABLE_FRACTION:.0%} of the memory lost to fragmentation, no duplicate captions, and image decoding "
        "that is never the bottleneck."
    )


# ---- number formats ------------------------------------------------------------------------------------------------


def _count(count: float) -> str:
    return f"{count:,.0f}" if count else "0"


def _format_giga(flop: float) -> str:
    return f"{flop / 1e9:,.0f}" if flop >= 1e11 else f"{flop / 1e9:,.2f}"


def _format_bytes(size: float) -> str:
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= factor:
            return f"{size / factor:,.1f} {unit}"
    return f"{size / 1e3:,.1f} kB"


def _time(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:,.1f} days"
    return f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:,.1f} minutes"
