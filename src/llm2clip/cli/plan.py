"""The `plan` command, and the machine arguments that it shares with `llava plan`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from jsonargparse import Namespace

from llm2clip.cli.commands import ArgumentParser, Commands, select_arguments
from llm2clip.cli.train import add_stage_settings
from llm2clip.config import FitConfig
from llm2clip.tools.plan.devices import Machine

if TYPE_CHECKING:
    from llm2clip.tools.plan.plan import Plan


def add_commands(commands: Commands) -> None:
    """Add the `plan` command."""
    parser = commands.add(
        "plan", _plan, "Estimate the parameters, FLOPs, memory and hours of a `fit` run, without downloading anything."
    )
    parser.add_argument("--images", type=int, required=True, help="Number of training images.")
    parser.add_argument("--captions_per_image", type=float, default=2.0, help="Average number of captions per image.")
    parser.add_argument("--tokens_per_caption", type=float, default=84.0, help="Average caption length in tokens.")
    add_machine_arguments(parser)
    add_stage_settings(parser)


def add_machine_arguments(parser: ArgumentParser) -> None:
    """Add the arguments that describe the machine on which to train."""
    parser.add_class_arguments(Machine, skip={"use_fsdp"})
    parser.add_argument(
        "--use_fsdp", action="store_true", help="Shard the weights, as `accelerate launch --use_fsdp` does."
    )


def machine_from_args(args: Namespace) -> Machine:
    """Return the machine that the arguments describe.

    Raises:
        ValueError: The device is unknown, or a value is out of range.
    """
    return Machine(**select_arguments(args, *(field.name for field in dataclasses.fields(Machine))))


def plan_from_args(args: Namespace) -> Plan:
    """Return the plan of a `fit` run that the arguments of the `plan` command describe."""
    from llm2clip.tools.plan.plan import plan_fit

    config = FitConfig(**select_arguments(args, "encoder", "tune", "embed", "align"))
    data = select_arguments(args, "images", "captions_per_image", "tokens_per_caption")
    return plan_fit(config, machine_from_args(args), **data)


def _plan(args: Namespace) -> list[str]:
    from llm2clip.tools.plan.report import format_plan

    return format_plan(plan_from_args(args)).splitlines()
