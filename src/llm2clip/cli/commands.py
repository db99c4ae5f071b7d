"""What the verbs share: how one is added, how its help looks, and how it reads a file of settings."""

from __future__ import annotations

import dataclasses
from argparse import Action, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter, Namespace

from llm2clip.config import FitConfig
from llm2clip.tools.plan.devices import Machine

DATA_HELP = "sources of images and captions: PATH, or PATH@split+split"
FIT: dict[str, Any] = dataclasses.asdict(FitConfig())  # the sections of a recipe file, and what each may hold
SECTIONS = {name for name, value in FIT.items() if isinstance(value, dict) and value} | {"llava", "reproduce"}
Run = Callable[[Namespace], list[str]]


class Commands:
    """The verbs of a parser, and what each runs; it returns lines to end with: where the result is, what to do next."""

    def __init__(self, parser: ArgumentParser, metavar: str) -> None:
        self._parsers, self.run = parser.add_subcommands(metavar=metavar), dict[str, Run]()

    def add(self, name: str, run: Run, about: str) -> ArgumentParser:
        """A verb; its parser."""
        parser = ArgumentParser(description=about)
        parser.add_argument(
            "--config", action=ConfigFileAction, help="YAML file of settings; later arguments override it"
        )
        self._parsers.add_subcommand(name, parser, help=about)
        self.run[name] = run
        return parser

    def group(self, name: str, about: str) -> Commands:
        """A verb that has others below it; those."""
        parser = ArgumentParser(description=about)
        self._parsers.add_subcommand(name, parser, help=about)
        below = Commands(parser, "WHAT")
        self.run[name] = lambda given: below.run[given.subcommand](given[given.subcommand])
        return below


class ConfigFileAction(ActionConfigFile):
    """A file of settings. What is `fit`'s and not this verb's is left out, so that one file serves all stages."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        try:
            found = yaml.safe_load(Path(values).read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise TypeError(f"{values}: {error}") from error
        if isinstance(found, dict):
            found = _own(found, {action.dest for action in parser._actions})
        self.apply_config(parser, cfg, self.dest, yaml.safe_dump(found))


def _own(found: dict[str, Any], known: set[str]) -> dict[str, Any]:
    """Of a file's settings those that a verb knows, and those that nobody does, which it will refuse."""
    kept: dict[str, Any] = {}
    for name, value in found.items():
        fields = FIT.get(name)
        if isinstance(fields, dict) and fields and isinstance(value, dict):
            if some := {k: v for k, v in value.items() if f"{name}.{k}" in known or k not in fields}:
                kept[name] = some
        elif name in known or name not in FIT:
            kept[name] = value
    return kept


class HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Help that keeps the line breaks of a description, and leaves out settings that few ever change; they are typed
    like the others."""

    def add_usage(self, usage: Any, actions: Iterable[Action], *more: Any, **named: Any) -> None:
        """What must be given, not a hundred settings."""
        shown = [action for action in actions if "." not in action.dest and action.dest not in SECTIONS]
        super().add_usage(usage, shown, *more, **named)

    def add_argument(self, action: Action) -> None:
        if action.dest not in SECTIONS:
            super().add_argument(action)


def add_reading_arguments(parser: ArgumentParser) -> None:
    """The arguments of whatever reads records."""
    parser.add_argument("--columns", type=dict[str, str], default={}, help="our field to the source's column")
    parser.add_argument("--max_skipped", type=float, default=0.05, help="largest share of bad rows put up with")


def add_machine_arguments(parser: ArgumentParser) -> None:
    """The arguments of a plan: what it would run on."""
    parser.add_class_arguments(Machine, skip={"use_fsdp"})
    parser.add_argument("--use_fsdp", action="store_true", help="weights shared out, as accelerate launch does it")


def machine_from_args(given: Namespace) -> Machine:
    """Raises ValueError for a device that is not known, or numbers that make no sense."""
    return Machine(**select(given, *(f.name for f in dataclasses.fields(Machine))))


def select(given: Namespace, *names: str) -> dict[str, Any]:
    """Some of the arguments, by name."""
    return {name: given[name] for name in names}
