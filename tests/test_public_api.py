"""The names and arguments of the public API, which public_api.txt lists, are still there.

    PYTHONPATH=src:tests python tests/test_public_api.py

adds new names and arguments to the list. Remove a line or an argument from the list only when its deprecation period
has ended; see docs/reference/api.md.
"""

import dataclasses
import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any

import pytest

from llm2clip import CaptionEncoder
from llm2clip.search.metadata import CONDITIONS

LIST = Path(__file__).with_name("public_api.txt")
PAGE = Path(__file__).parent.parent / "docs/reference/api.md"
# Functions with arguments of the form `**values` -> names of these arguments.
KEYWORDS: dict[str, list[str]] = {
    "llm2clip.CaptionEncoder.from_pretrained": list(inspect.signature(CaptionEncoder._set_options).parameters)[2:],
    "llm2clip.search.metadata.Filter": list(CONDITIONS),
}


def read_page() -> list[str]:
    """Return the full names of the objects in the table of the page."""
    rows = re.findall(r"^\| `(llm2clip[\w.]*)` \| (.+?) \|", PAGE.read_text(), re.MULTILINE)
    return [f"{module}.{name}" for module, names in rows for name in re.findall(r"`(\w+)`", names)]


def import_object(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def list_api() -> Iterator[str]:
    """Yield a line for each public function, class, method and property, such as `llm2clip.Index.open(location)`."""
    for name in read_page():
        value = import_object(name)
        yield describe_function(name, value)
        if not inspect.isclass(value):
            continue
        fields = {field.name for field in dataclasses.fields(value)} if dataclasses.is_dataclass(value) else set()
        for member in sorted(set(dir(value)) - fields):
            owner = next(base for base in value.__mro__ if member in vars(base) or base is object)
            if member.startswith("_") or not owner.__module__.startswith("llm2clip."):
                continue
            static = inspect.getattr_static(value, member)
            if isinstance(static, property | cached_property):
                yield f"{name}.{member}"
            elif isinstance(static, classmethod) or inspect.isfunction(static):
                yield describe_function(f"{name}.{member}", getattr(value, member))


def describe_function(name: str, function: Callable[..., Any]) -> str:
    parameters = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is Parameter.VAR_KEYWORD and name in KEYWORDS:
            parameters += [Parameter(key, Parameter.KEYWORD_ONLY, default=...) for key in KEYWORDS[name]]
        elif parameter.name != "self":
            default = parameter.default if parameter.default is Parameter.empty else ...
            parameters.append(parameter.replace(default=default, annotation=Parameter.empty))
    return name + str(Signature(parameters)).replace("=Ellipsis", "=...")


def parse_lines(lines: Iterator[str] | list[str]) -> dict[str, Mapping[str, Parameter] | None]:
    """Return the parameters of each function, keyed by its full name. The value of a property is None."""
    api: dict[str, Mapping[str, Parameter] | None] = {}
    for line in lines:
        name, bracket, parameters = line.removesuffix(")").partition("(")
        api[name] = inspect.signature(eval(f"lambda {parameters}: None")).parameters if bracket else None
    return api


def find_breaking_changes(old: Mapping[str, Parameter] | None, new: Mapping[str, Parameter] | None) -> list[str]:
    """Describe the differences that can break calls of a function."""
    if old is None or new is None:
        return [] if old is new else ["is no longer a property" if old is None else "is no longer a function"]
    problems = [f"{name} is new and required" for name in new.keys() - old.keys() if is_required(new[name])]
    for position, (name, parameter) in enumerate(old.items()):
        if name not in new:
            problems.append(f"{name} is missing")
        elif is_required(new[name]) and not is_required(parameter):
            problems.append(f"{name} has become required")
        elif parameter.kind is Parameter.POSITIONAL_OR_KEYWORD and (
            new[name].kind is not parameter.kind or list(new).index(name) != position
        ):
            problems.append(f"{name} cannot be passed at its position")
    return problems


def is_required(parameter: Parameter) -> bool:
    is_variadic = parameter.kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    return parameter.default is Parameter.empty and not is_variadic


def test_public_names_and_arguments_still_exist() -> None:
    new = parse_lines(list_api())
    problems = []
    for name, parameters in parse_lines(LIST.read_text().splitlines()).items():
        changes = find_breaking_changes(parameters, new[name]) if name in new else ["is missing"]
        problems += [f"{name}: {change}" for change in changes]
    assert problems == []


def test_public_names_are_documented() -> None:
    reference = "".join(page.read_text() for page in PAGE.parent.glob("*.md"))
    documented = set(re.findall(r"^::: ([\w.]+)$", reference, re.MULTILINE))
    for name in read_page():
        value = import_object(name)
        assert {value.__module__, f"{value.__module__}.{value.__name__}"} & documented, name


def test_public_names_are_listed() -> None:
    assert parse_lines(LIST.read_text().splitlines()).keys() == parse_lines(list_api()).keys(), (
        f"run `python {Path(__file__).name}` to update {LIST.name}"
    )


@pytest.mark.parametrize(
    ("new", "problems"),
    [
        ("a, b=..., *, c=..., d=...", []),
        ("a, b=..., d=..., *, c=...", []),
        ("a=..., b=..., *values, c=..., **others", []),
        ("a, *, c=...", ["b is missing"]),
        ("a, renamed=..., *, c=...", ["b is missing"]),
        ("a, b, *, c=...", ["b has become required"]),
        ("a, b=..., *, c", ["c has become required"]),
        ("a, b=..., *, c=..., d", ["d is new and required"]),
        ("a, d=..., b=..., *, c=...", ["b cannot be passed at its position"]),
        ("a, *, b=..., c=...", ["b cannot be passed at its position"]),
    ],
)
def test_breaking_changes_are_found(new: str, problems: list[str]) -> None:
    api = parse_lines(["old(a, b=..., *, c=...)", f"new({new})", "value"])
    assert find_breaking_changes(api["old"], api["new"]) == problems
    assert find_breaking_changes(None, None) == []
    assert len(find_breaking_changes(None, api["new"])) == len(find_breaking_changes(api["new"], None)) == 1


if __name__ == "__main__":
    test_public_names_and_arguments_still_exist()
    LIST.write_text("".join(f"{line}\n" for line in list_api()))
