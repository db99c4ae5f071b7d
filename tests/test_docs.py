"""The commands of the README and the documentation are ones that the command understands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from llm2clip.cli import build

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands() -> list[tuple[str, str]]:
    """Lines of code blocks that begin with our command, and on which page they are."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL):
            whole = re.sub(r"\\\n\s*", "", block)
            found += [(page.name, line) for line in whole.splitlines() if re.match(r"llm2clip [a-z]", line)]
    return found


@pytest.mark.parametrize(("page", "line"), commands())
def test_it_is_understood(page: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    parser, verbs = build()
    try:
        given = parser.parse_args(shlex.split(line, comments=True)[1:])
    except SystemExit as error:
        raise AssertionError(f"{page}: {line}") from error
    assert given.subcommand in verbs


def test_there_are_some_and_their_files_exist() -> None:
    assert len(commands()) > 40
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
