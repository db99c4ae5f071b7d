"""Building blocks of the command-line interface: subcommands, help formatting and the option `--config`."""

from __future__ import annotations

import dataclasses
import re
from argparse import SUPPRESS, Action, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter, Namespace, set_parsing_settings

from llm2clip.config import FitConfig

DATA_HELP = "Image-caption sources: PATH, or PATH@split+split to use only some splits."

# Default value of each setting in a config file, grouped by section.
FIT_SETTINGS: dict[str, Any] = dataclasses.asdict(FitConfig())
SECTIONS = {name for name, value in FIT_SETTINGS.items() if isinstance(value, dict) and value} | {"llava", "reproduce"}

# Function that runs a command. It takes the parsed arguments and returns the lines to print at the end, such as the
# path of the result and the next command to run.
Run = Callable[[Namespace], list[str]]

set_parsing_settings(docstring_parse_attribute_docstrings=True)  # use the docstrings of dataclass fields as help texts


class Commands:
    """Subcommands of a parser, and the functions that run them."""

    def __init__(self, parser: ArgumentParser, metavar: str) -> None:
        self._subparsers = parser.add_subcommands(metavar=metavar)
        self.run = dict[str, Run]()

    def add(self, name: str, run: Run, description: str) -> ArgumentParser:
        """Add a command and return its parser."""
        parser = ArgumentParser(description=description)
        parser.add_argument(
            "--config",
            action=ConfigFileAction,
            help="YAML file, or the name of a built-in config (see `llm2clip configs`). May be given more than "
            "once; later configs and flags override earlier ones.",
        )
        self._subparsers.add_subcommand(name, parser, help=description)
        self.run[name] = run
        return parser

    def group(self, name: str, description: str) -> Commands:
        """Add a command with subcommands. Return an object to which the subcommands can be added."""
        parser = ArgumentParser(description=description)
        self._subparsers.add_subcommand(name, parser, help=description)
        group = Commands(parser, "COMMAND")
        self.run[name] = lambda args: group.run[args.subcommand](args[args.subcommand])
        return group


class ConfigFileAction(ActionConfigFile):
    """Action for `--config FILE_OR_NAME`.

    A command ignores `fit` settings that do not apply to it, so that one config works for all stages. Unknown settings
    raise an error.
    """

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        try:
            settings = yaml.safe_load(_config_text(values)) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise TypeError(f"{values}: {error}") from error
        if isinstance(settings, dict):
            settings = _relevant_settings(settings, {action.dest for action in parser._actions})
        self.apply_config(parser, cfg, self.dest, yaml.safe_dump(settings))


def builtin_configs() -> dict[str, str]:
    """Return the configs included in the package, as a dict {name: YAML text}."""
    folder = files("llm2clip") / "configs"
    entries = [entry for entry in folder.iterdir() if entry.name.endswith(".yaml")]
    entries.sort(key=lambda entry: entry.name)
    return {entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8") for entry in entries}


def _config_text(file_or_name: str) -> str:
    """Return the text of a config file or a built-in config."""
    path = Path(file_or_name)
    if path.is_file():
        return path.read_text(encoding="utf-8")
    builtin = builtin_configs()
    if file_or_name in builtin:
        return builtin[file_or_name]
    raise FileNotFoundError(
        f"No such file, and no built-in config has this name. Built-in configs: {', '.join(builtin)}"
    )


def _relevant_settings(settings: dict[str, Any], known: set[str]) -> dict[str, Any]:
    """Return `settings` without the `fit` settings that this command does not have.

    Unknown settings are kept, so that the parser reports an error.

    Args:
        settings: contents of a config file.
        known: names of the command's settings.
    """
    relevant: dict[str, Any] = {}
    for name, value in settings.items():
        section = FIT_SETTINGS.get(name)
        if isinstance(section, dict) and section and isinstance(value, dict):
            fields = {key: v for key, v in value.items() if f"{name}.{key}" in known or key not in section}
            if fields:
                relevant[name] = fields
        elif name in known or name not in FIT_SETTINGS:
            relevant[name] = value
    return relevant


class HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Plain help formatter: prints a short usage line, followed by the description and default of each argument.

    Argument types are not shown.
    """

    def add_usage(self, usage: Any, actions: Iterable[Action], *args: Any, **kwargs: Any) -> None:
        """Add a usage line that shows only the command's own arguments and omits the stages' settings."""
        shown = [action for action in actions if "." not in action.dest and action.dest not in SECTIONS]
        super().add_usage(usage, shown, *args, **kwargs)

    def add_argument(self, action: Action) -> None:
        if action.dest not in SECTIONS:  # hide options such as `--align CONFIG`, which duplicate --config
            super().add_argument(action)

    def _format_action_invocation(self, action: Action) -> str:
        text = super()._format_action_invocation(action)
        text = re.sub(r", --[\w.]+\+( \[.*\])?$", "", text)  # remove the append form, such as `--tune.data+`
        return text.replace(",null}", "}").replace("[=flags]", "")

    def _get_help_string(self, action: Action) -> str:
        text = action.help or ""
        if getattr(action, "_jsonargparse_preexpanded_help", False):
            return text
        if action.required and action.option_strings:
            return f"{text} (required)"
        shows_default = action.option_strings and action.nargs != 0 and not isinstance(action, ActionConfigFile)
        if shows_default and action.default not in (None, SUPPRESS, [], {}):
            return f"{text} (default: %(default)s)"
        return text


def add_reading_arguments(parser: ArgumentParser, max_skipped: float = 0.05) -> None:
    """Add the arguments shared by all commands that read records."""
    parser.add_argument(
        "--columns",
        type=dict[str, str],
        default={},
        help='Column name in the source for each field, e.g. \'{"captions": "text"}\'.',
    )
    parser.add_argument(
        "--max_skipped",
        type=float,
        default=max_skipped,
        help="Stop if more than this fraction of the rows cannot be used.",
    )


def select(args: Namespace, *names: str) -> dict[str, Any]:
    """Return the arguments with the given names as a dict, for example to pass as keyword arguments."""
    return {name: args[name] for name in names}
