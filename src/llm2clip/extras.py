"""Names of the package's optional features (extras) in messages."""

from __future__ import annotations


def install_command(*extras: str) -> str:
    """Return the command that installs extras. It must be run in the folder of llm2clip's source code.

    llm2clip is not on a package index, so it cannot be installed by name.
    """
    return f"pip install -e '.[{','.join(extras)}]'" if extras else "pip install -e ."
