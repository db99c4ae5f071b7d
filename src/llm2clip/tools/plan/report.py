"""A plan in tables."""

from __future__ import annotations

from io import StringIO

from rich.console import Console
from rich.table import Table

from llm2clip.tools.plan.memory import USABLE_FRACTION, peak_memory
from llm2clip.tools.plan.plan import STAGES, Plan


def format_plan(found: Plan, width: int = 110) -> str:
    """The plan as text."""
    page = StringIO()
    console = Console(file=page, width=width, highlight=False)
    for table in (_parameters(found), _flop(found), _memory(found), _hours(found)):
        console.print(table)
        console.print()
    for line in (*_stores(found), *_caching(found), *_ways_out(found), _assumptions(found)):
        console.print(line, markup=False)
    return "\n".join(line.rstrip() for line in page.getvalue().splitlines())


def _table(*columns: str, words: bool = False) -> Table:
    """Of numbers, flush right after the first column, or of words."""
    table = Table(box=None, pad_edge=False)
    for n, name in enumerate(columns):
        table.add_column(name, justify="right" if n and not words else "left", overflow="fold")
    return table


def _parameters(found: Plan) -> Table:
    p = found.parameters
    table = _table("Parameters", "all", "learn")
    table.add_row(f"caption encoder {found.config.encoder.path}", _many(p["caption encoder"]), _many(p["tune learns"]))
    table.add_row(f"vision tower {found.config.align.tower}", _many(p["vision tower"]), "")
    table.add_row("projection", _many(p["projection"]), "")
    table.add_row("adapter", _many(p["adapter"]), "")
    both = p["vision tower"] + p["projection"] + p["adapter"]
    table.add_row("tower, projection and adapter", _many(both), _many(p["align learns"]))
    return table


def _flop(found: Plan) -> Table:
    flop, align = found.flop, found.config.align
    table = _table("GFLOP (10^9; a multiplication and its addition are 2)", "")
    tokens = f"a caption of {found.tokens_per_caption:g} tokens"
    table.add_row(f"{tokens}, forward", _giga(flop["caption forward"]))
    if "tune" in found.memory:
        table.add_row(f"{tokens}, in a step of tune", _giga(flop["caption tune"]))
    table.add_row("an image through the tower", _giga(flop["tower forward"]))
    captions = "its caption" if found.captions == 1 else f"its {found.captions:g} captions"
    table.add_row(f"an image and {captions} in a step of align", _giga(flop["step"]))
    table.add_row(
        "  forward and backward" + (", from features" if align.tower_lr == 0 else ""), _giga(flop["image once"])
    )
    if flop["image again"]:
        why = [name for name in ("gradient_checkpointing", "micro_batch_size") if getattr(align, name)]
        table.add_row(f"  forward again ({', '.join(why)})", _giga(flop["image again"]))
    table.add_row("  loss", _giga(flop["image loss"]))
    return table


def _memory(found: Plan) -> Table:
    stages = [stage for stage in STAGES if stage in found.memory]
    table = _table(
        f"GB on each device (10^9 bytes; {found.machine.each.name} has {found.machine.each.memory:g})", *stages
    )
    parts = dict.fromkeys(
        part for stage in stages for part in found.memory[stage] if part not in ("libraries", "loading")
    )
    for part in [*parts, "libraries"]:
        sizes = [found.memory[stage].get(part) for stage in stages]
        table.add_row(part, *("" if size is None else f"{size / 1e9:.1f}" for size in sizes))
    loading = [found.memory[stage]["loading"] for stage in stages]
    if any(loading):
        table.add_row("before it: weights come in", *(f"{size / 1e9:.1f}" if size else "" for size in loading))
    table.add_row("most at once", *(f"{peak_memory(found.memory[stage]) / 1e9:.1f}" for stage in stages))
    table.add_row("fits", *("yes" if found.fits[stage] else "NO" for stage in stages))
    return table


def _hours(found: Plan) -> Table:
    config, count = found.config, found.machine.count
    table = _table(f"Time on {count} x {found.machine.each.name}", "", "", words=True)
    if "tune" in found.memory:
        steps, batch = config.tune.steps, config.tune.batch_size * count
        table.add_row("tune", _time(found.hours["tune"]), f"{steps:,} steps of {batch:,} pairs")
    rows = found.images * found.captions_per_image
    table.add_row("embed", _time(found.hours["embed"]), f"{rows:,.0f} captions")
    batch = config.align.batch_size * count
    about = f"{config.align.epochs:g} epochs of {found.images:,} images, {batch:,} in a step"
    if found.decoded:
        about += f"; {found.decoded:,.0f} images/s to be decoded for each device"
    table.add_row("align", _time(found.hours["align"]), about)
    return table


def _stores(found: Plan) -> list[str]:
    lines = [f"Store of embedded captions ({found.config.embed.dtype}): {_bytes(found.store)} on the disk."]
    if found.features:
        lines.append(f"Store of the tower's features (float16): {_bytes(found.features)} on the disk.")
    return lines


def _caching(found: Plan) -> list[str]:
    online, weights = found.online, _bytes(found.online["weights"])
    return [
        f"With the language model in every step of align instead of a store: {online['step']:.2f} times the FLOP of a "
        f"step, {online['hours']:.2f} times the hours of embed and align together, and {weights} more of weights on "
        "each device."
    ]


def _ways_out(found: Plan) -> list[str]:
    lines = []
    for stage in (stage for stage, fits in found.fits.items() if not fits):
        lines.append(f"OUT OF MEMORY in {stage}.")
        ways = found.ways_out.get(stage, [])
        lines += [f"  would fit: {name} ({size / 1e9:.1f} GB)" for name, size in ways]
        if any("--use_fsdp" in name for name, _ in ways):
            lines.append(
                "  --use_fsdp shares weights out over the devices: accelerate launch --use_fsdp --fsdp_version 2"
            )
        if not ways:
            lines.append("  nothing tried here fits: a smaller model, fewer of its layers, or a larger device")
    return lines


def _assumptions(found: Plan) -> str:
    return (
        "Arithmetic, not measured. "
        f"Assumed: {found.machine.mfu:.0%} of the device's products per second are reached (MFU), "
        f"{1 - USABLE_FRACTION:.0%} of its memory is lost between pieces, every caption differs, and images are decoded in time."
    )


# ---- numbers to read ------------------------------------------------------------------------------------------------


def _many(count: float) -> str:
    return f"{count:,.0f}" if count else "0"


def _giga(flop: float) -> str:
    return f"{flop / 1e9:,.0f}" if flop >= 1e11 else f"{flop / 1e9:,.2f}"


def _bytes(size: float) -> str:
    for unit, of in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= of:
            return f"{size / of:,.1f} {unit}"
    return f"{size / 1e3:,.1f} kB"


def _time(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:,.1f} days"
    return f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:,.1f} minutes"
