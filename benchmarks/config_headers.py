"""Write the estimates of `llm2clip plan` into the comments at the top of the built-in configs.

    python benchmarks/config_headers.py

A line such as `# - 8 x h100 --config llama-3-8b: ...` states the number of devices, the device and additional flags of
`llm2clip plan`. This script replaces the text after the colon; tests/test_configs.py checks it.
"""

import dataclasses
import re
import shlex
import textwrap
from importlib.resources import files
from pathlib import Path

import yaml

from llm2clip.cli import build_parser
from llm2clip.cli.commands import read_builtin_configs
from llm2clip.cli.tools import make_plan_from_args
from llm2clip.tools.plan import FitPlan, format_hours
from llm2clip.tools.plan_memory import compute_peak_memory

PARSER = build_parser()[0]
IMAGES = 3_000_000  # each with two captions of 84 tokens, the defaults of `llm2clip plan`
# The first line of an estimate, and its continuation lines, which are indented.
ESTIMATE = re.compile(r"^# - (?P<count>\d+) x (?P<device>[\w-]+)(?P<rest>.*\n(?:#   .*\n)*)", re.MULTILINE)


def main() -> None:
    folder = Path(str(files("llm2clip") / "configs"))
    for name, text in read_builtin_configs().items():
        (folder / f"{name}.yaml").write_text(update_header(name, text), encoding="utf-8")


def update_header(name: str, text: str, count: int = 0) -> str:
    """Return the text of the built-in config `name` with current estimates.

    Only the first `count` estimates are updated, or all of them if `count` is 0.
    """
    stages = yaml.safe_load(text).keys()

    def replace_estimate(match: re.Match[str]) -> str:
        rest = " ".join(line.removeprefix("#").strip() for line in match["rest"].splitlines())
        flags = rest.partition(":")[0]
        command = ["plan", "--images", str(IMAGES), "--count", match["count"], "--device", match["device"]]
        command += ["--config", name, *shlex.split(flags)]
        plan = make_plan_from_args(PARSER.instantiate(PARSER.parse_args(command)).plan)
        parts = []
        if "encoder" in stages:
            parts = [describe_stage(plan, stage) for stage in ("tune", "embed") if stage in plan.stage_memory]
            parts.append(f"store {plan.store_bytes / 1e9:.0f} GB")
        if "align" in stages:
            parts.append(describe_stage(plan, "align"))
        line = f"- {match['count']} x {match['device']} {flags}".rstrip() + f": {'; '.join(parts)}."
        return textwrap.fill(line, 120, initial_indent="# ", subsequent_indent="#   ", break_on_hyphens=False) + "\n"

    return ESTIMATE.sub(replace_estimate, text, count=count)


def describe_stage(plan: FitPlan, stage: str) -> str:
    """Describe the duration of a stage and its memory per device."""
    size = f"{compute_peak_memory(plan.stage_memory[stage]) / 1e9:.0f} GB"
    if not plan.stage_fits_in_memory[stage]:
        return f"{stage} does not fit ({size})"
    if stage == "tune":
        longest = plan.config.encoder.max_length or 512
        long_plan = dataclasses.replace(plan, text=dataclasses.replace(plan.text, tokens=longest))
        long_size = f"{compute_peak_memory(long_plan.stage_memory['tune']) / 1e9:.0f} GB"
        if long_size != size:
            size += f" ({long_size} if all captions have {longest} tokens)"
    if stage == "align" and plan.images_per_second:
        size += f", {plan.images_per_second:,.0f} images/s to decode"
    return f"{stage} {format_hours(plan.stage_hours[stage])}, {size}"


if __name__ == "__main__":
    main()
