"""The public API still has the names and arguments in public_api.txt, the options in public_cli.txt, and the fields of
requests and responses in public_http.txt.

    PYTHONPATH=src:tests python tests/test_public_api.py

adds new names, arguments, options and fields to the lists. Remove a line or an argument from a list only when its
deprecation period has ended; see docs/reference/api.md.
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
from unittest.mock import MagicMock, patch

import pytest
from fastapi.routing import APIRoute

from llm2clip import CaptionEncoder
from llm2clip.cli import build_parser
from llm2clip.search.immich import add_immich_routes
from llm2clip.search.metadata import CONDITIONS
from llm2clip.search.server import create_app

LIST = Path(__file__).with_name("public_api.txt")
CLI_LIST = Path(__file__).with_name("public_cli.txt")
HTTP_LIST = Path(__file__).with_name("public_http.txt")
UPDATE_ADVICE = f"run `python {Path(__file__).name}` to update the list"
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


def test_public_names_and_arguments_are_listed() -> None:
    assert LIST.read_text().splitlines() == list(list_api()), UPDATE_ADVICE


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


# ---- commands and HTTP ----------------------------------------------------------------------------------------------


def list_commands(parser: Any, command: str = "llm2clip") -> Iterator[str]:
    """Yield a line for each argument of each command, such as `llm2clip fit --out: required`."""
    required_args = getattr(parser, "required_args", ())  # attribute of old versions of jsonargparse
    for action in parser._actions:
        if action is parser._subcommands_action:
            for name, subparser in action.choices.items():
                yield from list_commands(subparser, f"{command} {name}")
            continue
        if action.dest == "print_shtab":  # exists only if a module has imported shtab
            continue
        is_required = action.required or action.dest in required_args
        for name in action.option_strings or [action.dest.upper()]:
            yield f"{command} {name}{': required' if is_required else ''}"


def list_routes(openapi: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each route and for each field of its requests and responses."""
    for path, operations in openapi["paths"].items():
        for method, operation in operations.items():
            route = f"{method.upper()} {path}"
            yield route
            for field in list_fields(operation.get("requestBody", {}), openapi):
                yield f"{route} request {field}"
            for field in list_fields(operation["responses"]["200"], openapi):
                yield f"{route} response {field.removesuffix(': required')}"


def list_fields(schema: Mapping[str, Any], openapi: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of the fields in a request, response or JSON schema, such as `hits.score` or `id: required`."""
    for content in schema.get("content", {}).values():
        schema = content.get("schema", schema)
    if "$ref" in schema:
        schema = openapi["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    for name, value in schema.get("properties", {}).items():
        yield f"{name}: required" if name in schema.get("required", ()) else name
        yield from (f"{name}.{field}" for field in list_fields(value, openapi))
    for part in [schema["items"]] if "items" in schema else schema.get("anyOf", schema.get("oneOf", ())):
        yield from list_fields(part, openapi)


def list_cli() -> list[str]:
    return sorted(set(list_commands(build_parser()[0])))


def list_http() -> list[str]:
    with patch("llm2clip.search.server.InferenceService") as service:
        service.return_value.encoder.model.embed_dim = 512
        app = create_app(MagicMock())
        immich = create_app(MagicMock(), add_routes=add_immich_routes)
    routes = [route for route in app.routes if isinstance(route, APIRoute) and "/v1/" in route.path]
    openai_routes = [f"{method} {route.path}" for route in routes for method in route.methods]
    immich_lines = [f"--immich {line}" for line in list_routes(immich.openapi())]
    return sorted({*list_routes(app.openapi()), *openai_routes, *immich_lines})


def find_removals(old: list[str], new: list[str]) -> list[str]:
    """Return the missing lines, and the new required arguments and fields of commands, routes and fields in `old`."""
    missing = [line for line in old if line not in new and line.removesuffix(": required") not in new]
    known = {line.removesuffix(": required") for line in old}
    known |= {line.rpartition(" ")[0] for line in known}
    added = [line.removesuffix(": required") for line in new if line.endswith(": required") and line not in old]
    return missing + [f"{line}: required" for line in added if get_parent(line) in known]


def get_parent(line: str) -> str:
    """Return the command or route of an argument or field, or the parent of a nested field."""
    parent, _, name = line.rpartition(" ")
    return line.rpartition(".")[0] if "." in name and " request " in line else parent


@pytest.mark.parametrize(("file", "list_names"), [(CLI_LIST, list_cli), (HTTP_LIST, list_http)])
def test_public_options_and_fields_are_listed_and_still_exist(file: Path, list_names: Callable[[], list[str]]) -> None:
    old, new = file.read_text().splitlines(), list_names()
    assert find_removals(old, new) == []
    assert old == new, UPDATE_ADVICE


def test_removed_options_and_fields_are_found() -> None:
    old = ["a b --x", "a b --y: required", "POST /r request q", "POST /r response s"]
    assert find_removals(old, [*old, "a b --z", "a c --z: required", "POST /r response t"]) == []
    assert find_removals(old, [*old, "POST /r request p", "POST /r request p.x: required"]) == []
    assert find_removals(old, [*old, "POST /r request q.x: required"]) == ["POST /r request q.x: required"]
    assert find_removals(old, [*old, "a b --x.z: required"]) == ["a b --x.z: required"]
    assert find_removals(old, ["a b --x: required", "a b --y", "a b --z: required"]) == [
        "a b --x", "POST /r request q", "POST /r response s", "a b --x: required", "a b --z: required"
    ]  # fmt: skip


if __name__ == "__main__":
    test_public_names_and_arguments_still_exist()
    LIST.write_text("".join(f"{line}\n" for line in list_api()))
    for file, names in ((CLI_LIST, list_cli()), (HTTP_LIST, list_http())):
        removals = find_removals(file.read_text().splitlines() if file.exists() else [], names)
        assert not removals, removals
        file.write_text("".join(f"{name}\n" for name in names))
