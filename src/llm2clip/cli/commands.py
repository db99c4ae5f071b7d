"""Parser classes and arguments shared by all commands: subcommands, help formatting and the `--config` option."""

from __future__ import annotations

import dataclasses
import difflib
import re
import shlex
import sys
from argparse import SUPPRESS, Action, RawDescriptionHelpFormatter
from collections.abc import Callable, Collection, Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import jsonargparse
import yaml
from jsonargparse import ActionConfigFile, DefaultHelpFormatter, Namespace, set_parsing_settings
from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    register_type,
    restricted_number_type,
)

from llm2clip.config import FitConfig
from llm2clip.io_utils import hide_url_secrets

DATA_HELP = "Image-caption sources: PATH, or PATH@split+split to use only some splits."

# Default values of all config settings, grouped by section.
FIT_SETTINGS: dict[str, Any] = dataclasses.asdict(FitConfig())
# Names of config file sections. Other command modules add sections, such as llava, that `fit` does not have.
SECTIONS = {name for name, value in FIT_SETTINGS.items() if isinstance(value, dict) and value}

# Function that runs a command and returns the lines to print at the end, such as the next command to run.
CommandFunction = Callable[[Namespace], list[str]]
Options = TypeVar("Options")  # a dataclass

set_parsing_settings(docstring_parse_attribute_docstrings=True)  # use dataclass field docstrings as help texts


class ArgumentParser(jsonargparse.ArgumentParser):
    """Argument parser whose error messages name the option, its valid values, and similar names."""

    _words: Sequence[str] = ()  # command-line arguments, set only in the root parser
    config_file: str | None = None  # config file currently being read

    def parse_args(self, args: Sequence[str] | None = None, *others: Any, **options: Any) -> Any:  # type: ignore[override]
        self._words = sys.argv[1:] if args is None else args
        return super().parse_args(args, *others, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        parser: Any = self
        words = list(self._words)
        while words and parser._subcommands_action is not None and words[0] in parser._subcommands_action.choices:
            parser = parser._subcommands_action.choices[words.pop(0)]  # the root parser reports subcommand errors
        if parser._subcommands_action is None or (words and words[0].startswith("-")):
            message = _explain_jsonargparse_error(message, parser)
        else:
            commands = list(parser._subcommands_action.choices)
            problem = (
                f"no command {words[0]!r}{suggest_similar_names(words[0], commands)}"
                if words
                else "a COMMAND is missing"
            )
            message = f"{problem}. Commands: {', '.join(commands)}"
        command = parser.prog.replace(" [options]", "")
        print(f"{command}: {message}\nFor help, run: {command} --help", file=sys.stderr)
        sys.exit(2)


def _explain_jsonargparse_error(message: str, parser: Any) -> str:
    """Rewrite a jsonargparse error message without Python type names. Return unknown messages unchanged."""
    actions = {action.dest: action for action in parser._actions}
    flags = {dest: action.option_strings[0] for dest, action in actions.items() if action.option_strings}
    required, unknown = "the following arguments are required: ", "unrecognized arguments: "
    if message.startswith(required):
        dests = [name.rpartition(".")[2] for name in message.removeprefix(required).split(", ")]
        return f"required arguments are missing: {', '.join(flags.get(dest, dest.upper()) for dest in dests)}"
    if message.startswith(unknown):
        words = message.removeprefix(unknown)
        name = next((word for word in words.split() if word.startswith("-")), words).partition("=")[0]
        return f"unknown argument {name}{suggest_similar_names(name, flags.values())}"
    if (match := re.match(r'Parser key "([^"]+)"', message)) and match[1] in actions:
        name = f"{parser.config_file}: {match[1]}" if parser.config_file else flags[match[1]]
        value = re.search(r"(?:Got value|Given value): (.*)|Not of type \w+: (.*) does not conform", message)
        got = f" (got {value[1] or value[2]})" if value else ""
        return f"{name} must be {_describe_argument_type(actions[match[1]]._typehint)}{got}"
    return message


def suggest_similar_names(name: str, known: Iterable[str]) -> str:
    """Return " (did you mean X?)" with the most similar known names, or "" if no name is similar."""
    names = {other.lstrip("-"): other for other in known}  # leading dashes would inflate the similarity
    prefix, _, last_part = name.lstrip("-").rpartition(".")
    initials = "".join(word[:1] for word in last_part.split("_"))  # `learning_rate` may mean `lr`
    last_parts = {other: other.rpartition(".")[2] for other in names}  # `--lr` may mean `--align.lr` or `--tune.lr`
    if prefix and any(other.startswith(f"{prefix}.") for other in names):
        last_parts = {other: last for other, last in last_parts.items() if other.startswith(f"{prefix}.")}
    closest = {last_part, initials} & set(last_parts.values())
    if not closest:
        closest = set(difflib.get_close_matches(last_part, set(last_parts.values()), n=1))
    similar = [other for other, last in last_parts.items() if last in closest]
    similar = [names[other] for other in similar]
    return f" (did you mean {' or '.join(similar)}?)" if similar else ""


def _describe_argument_type(typehint: Any) -> str:
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
    if typehint in names:
        return names[typehint]
    if typehint in TYPE_DESCRIPTIONS:
        return TYPE_DESCRIPTIONS[typehint]
    if get_origin(typehint) is Literal:
        return "one of " + ", ".join(map(str, get_args(typehint)))
    if get_origin(typehint) is list:
        return "a list, such as '[a, b]'"
    if get_origin(typehint) is dict:
        return "a mapping, such as '{a: 1, b: 2}'"
    parts = [_describe_argument_type(part) for part in get_args(typehint) if part is not NoneType]
    return " or ".join(dict.fromkeys(parts)) or str(typehint)


class CommandGroup:
    """Subcommands of a parser, with the functions that run the subcommands."""

    def __init__(self, parser: ArgumentParser, is_listed: bool = True) -> None:
        shown: dict[str, Any] = {"title": "commands"} if is_listed else {"title": SUPPRESS, "help": SUPPRESS}
        self._subparsers = parser.add_subcommands(metavar="COMMAND", description="", **shown)
        self.run = dict[str, CommandFunction]()

    def add(self, name: str, run: CommandFunction, description: str) -> ArgumentParser:
        parser = ArgumentParser(description=description)
        parser.add_argument(
            "--config",
            action=ConfigFileAction,
            help="YAML file, or the name of a built-in config (see `llm2clip configs`). May be repeated; later configs "
            "and flags override earlier ones.",
        )
        parser._option_string_actions["--print_config"].help = "Print the settings and exit."
        self._subparsers.add_subcommand(name, parser, help=description)
        self.run[name] = run
        return parser

    def add_group(self, name: str, description: str) -> CommandGroup:
        """Add and return a group of subcommands."""
        parser = ArgumentParser(description=description)
        self._subparsers.add_subcommand(name, parser, help=description)
        group = CommandGroup(parser)
        self.run[name] = lambda args: group.run[args.subcommand](args[args.subcommand])
        return group


class ConfigFileAction(ActionConfigFile):
    """Action for `--config FILE_OR_NAME`. Settings of other stages are ignored, so a config works for all commands."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        known = {action.dest for action in parser._actions}
        try:
            settings = _select_relevant_settings(_read_config_file(values), known)
        except (OSError, ValueError) as error:
            raise TypeError(f"{values}: {error}") from error
        parser.config_file = values
        try:
            self.apply_config(parser, cfg, self.dest, yaml.safe_dump(settings))
        finally:
            parser.config_file = None


def read_builtin_configs() -> dict[str, str]:
    """Return the YAML text of each built-in config, keyed by name."""
    folder = files("llm2clip") / "configs"
    entries = [entry for entry in folder.iterdir() if entry.name.endswith(".yaml")]
    entries.sort(key=lambda entry: entry.name)
    return {entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8") for entry in entries}


def _read_config_file(file_or_name: str) -> dict[str, Any]:
    path = Path(file_or_name)
    builtin = read_builtin_configs()
    if not path.is_file() and file_or_name not in builtin:
        raise FileNotFoundError(
            f"no such file or built-in config{suggest_similar_names(file_or_name, builtin)}. Built-in configs: "
            f"{', '.join(builtin)}"
        )
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8") if path.is_file() else builtin[file_or_name])
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{line}not valid YAML: {getattr(error, 'problem', error)}") from error
    if not isinstance(settings, dict | None):
        raise ValueError(f"the file must contain settings of the form `name: value` (got {settings!r})")
    return settings or {}


def _select_relevant_settings(settings: dict[str, Any], known: set[str]) -> dict[str, Any]:
    """Return the settings in `known`. Raise ValueError for settings that neither `known` nor `fit` contains."""
    relevant: dict[str, Any] = {}
    for name, value in settings.items():
        if name not in SECTIONS:
            _check_setting_name(name, known | FIT_SETTINGS.keys())
            if name in known:
                relevant[name] = value
            continue
        if not isinstance(value, dict):
            raise ValueError(f"{name} must contain settings of the form `name: value` (got {value!r})")
        fields = FIT_SETTINGS.get(name, {})
        for key in value:
            _check_setting_name(f"{name}.{key}", known | {f"{name}.{field}" for field in fields})
        chosen = {key: v for key, v in value.items() if f"{name}.{key}" in known}
        if chosen:
            relevant[name] = chosen
    return relevant


def _check_setting_name(name: str, known: set[str]) -> None:
    if name not in known:
        raise ValueError(f"unknown setting {name}{suggest_similar_names(name, known)}")


class HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Help formatter that prints a short usage line, and each argument's description and default, but not its type."""

    def add_usage(self, usage: Any, actions: Iterable[Action], *args: Any, **kwargs: Any) -> None:
        """Add a usage line with the command's own arguments, without stage settings."""
        shown = [action for action in actions if "." not in action.dest and action.dest not in SECTIONS]
        super().add_usage(usage, shown, *args, **kwargs)

    def add_argument(self, action: Action) -> None:
        if action.dest not in SECTIONS:  # hides options such as `--align CONFIG`, which duplicate --config
            super().add_argument(action)

    def _format_action_invocation(self, action: Action) -> str:
        text = super()._format_action_invocation(action)
        text = re.sub(r", --[\w.]+\+( \[.*\])?$", "", text)  # removes the append form, such as `--tune.data+`
        return text.replace(",null}", "}").replace(" \b[=flags]", "")

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


class ColumnMapping:
    """Argument type of --columns, whose parsed value is a dict that maps field names to column names."""


def parse_column_mapping(value: str | dict[str, str]) -> dict[str, str]:
    """Convert `field=column,field=column` to a dict, or raise ValueError. A dict is returned unchanged."""
    if isinstance(value, dict):
        return value
    pairs = [part.partition("=") for part in value.split(",")]
    if not all(name and equals for name, equals, _ in pairs):
        raise ValueError("not of the form field=column")
    return {name.strip(): column.strip() for name, _, column in pairs}


Port = restricted_number_type("Port", int, [(">=", 0), ("<=", 65535)])
register_type(
    ColumnMapping, serializer=dict, deserializer=parse_column_mapping, type_check=lambda value, _: type(value) is dict
)

# Descriptions of restricted argument types for error messages.
TYPE_DESCRIPTIONS: dict[type, str] = {
    ColumnMapping: "of the form field=column,field=column, such as captions=text,image=file",
    Port: "an integer between 0 and 65535",
    PositiveInt: "an integer of at least 1",
    NonNegativeInt: "an integer of at least 0",
    PositiveFloat: "a number greater than 0",
    ClosedUnitInterval: "a number between 0 and 1",
}


def add_data_reading_arguments(parser: ArgumentParser, max_skipped: float = 0.05) -> None:
    parser.add_argument(
        "--columns",
        type=ColumnMapping,
        default={},
        help="Source column of each field, e.g. captions=text,image=file.",
    )
    parser.add_argument(
        "--max_skipped",
        type=ClosedUnitInterval,
        default=max_skipped,
        help="Stop if more than this fraction of the rows cannot be used.",
    )


def add_dataclass_flags(parser: ArgumentParser, options: type, skip: Collection[str] = ()) -> None:
    """Add a flag for each field of a dataclass, with the docstring of the field as the help text.

    Booleans must default to False and become switches without a value. Lists take one or more values, separated by
    spaces. Optional lists may also be empty.
    """
    described_parser = ArgumentParser(add_help=False)
    described_parser.add_class_arguments(options)
    help_texts = {action.dest: action.help or "" for action in described_parser._actions}
    types = get_type_hints(options)
    for field in dataclasses.fields(options):
        if field.name in skip:
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        help_text = " ".join(help_texts[field.name].split())
        if types[field.name] is bool:
            settings: dict[str, Any] = {"action": "store_true"}
        elif types[field.name] in (list[str], list[int]):
            [item_type] = get_args(types[field.name])
            settings = {"nargs": "+", "type": item_type, "default": default}
        elif types[field.name] == list[str] | None:
            settings = {"nargs": "*", "type": str, "default": default}
        else:
            settings = {"type": types[field.name], "default": default}
        parser.add_argument(f"--{field.name}", help=help_text, **settings)


def format_command(*words: object) -> str:
    """Return a printable, shell-quoted `llm2clip` command, with secrets removed from URLs."""
    return shlex.join(["llm2clip", *(hide_url_secrets(str(word)) for word in words)])


def format_column_flags(columns: dict[str, str]) -> list[str]:
    return ["--columns", ",".join(f"{field}={column}" for field, column in columns.items())] if columns else []


def make_options_from_args(options: type[Options], args: Namespace) -> Options:
    """Create a dataclass instance from the arguments that match its field names. Other fields keep their defaults."""
    fields = dataclasses.fields(options)  # type: ignore[arg-type]
    return options(**{field.name: args[field.name] for field in fields if field.name in args})
