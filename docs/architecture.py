"""The drawn parts of `architecture.md`, from the imports and the docstrings: `python docs/architecture.py`."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import grimp

from llm2clip.evaluate.reporting import plots
from llm2clip.evaluate.reporting.plots import COLOURS, GREY

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src/llm2clip"
PAGE, FIGURE = ROOT / "docs/architecture.md", ROOT / "docs/figures/rooms.svg"
BEGIN, END = "<!-- files: made by docs/architecture.py -->\n", "<!-- end of files -->\n"


def floors() -> list[list[str]]:
    """The rooms, floor by floor from the top, as the contract in pyproject.toml has them."""
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    return [[room.strip() for room in floor.split("|")] for floor in contract["layers"]]


def imports() -> dict[str, set[str]]:
    """Which rooms each room imports."""
    graph, found = grimp.build_graph("llm2clip"), dict[str, set[str]]()
    for module in graph.modules:
        for other in graph.find_modules_directly_imported_by(module):
            here, there = (name.split(".")[1] if "." in name else "" for name in (module, other))
            if here != there and here and there:
                found.setdefault(here, set()).add(there)
    return found


def needed(edges: dict[str, set[str]]) -> list[tuple[str, str]]:
    """The imports that do not follow from others: drawing all would show nothing."""

    def reach(room: str) -> set[str]:
        return edges.get(room, set()).union(*(reach(other) for other in edges.get(room, set())))

    return sorted(  # sets have another order in each run, and the drawing is to be the same
        (room, other)
        for room, others in edges.items()
        for other in others
        if not any(other in reach(between) for between in others - {other})
    )


def drawing() -> str:
    """Rooms on their floors, each arrow an import; SVG."""
    rows = floors()
    figure, axes = plots.new_axes(9.5, 0.72 * len(rows))
    axes.axis("off")
    place = {
        room: ((n + 0.5) / len(row) if len(row) > 1 else 0.5, -y)
        for y, row in enumerate(rows)
        for n, room in enumerate(row)
    }
    axes.set(xlim=(0, 1), ylim=(-len(rows) + 0.5, 0.5))
    for room, other in needed(imports()):
        if room in place and other in place:
            arrow = {"arrowstyle": "->", "color": GREY, "shrinkA": 12, "shrinkB": 12, "linewidth": 0.7, "alpha": 0.7}
            axes.annotate("", place[other], place[room], arrowprops=arrow)
    for room, (x, y) in place.items():
        folder = (SOURCE / room).is_dir()
        box = {
            "boxstyle": "round,pad=0.35",
            "facecolor": "white",
            "edgecolor": COLOURS[0 if folder else 2],
            "alpha": 1.0,
        }
        axes.text(x, y, f"{room}/" if folder else room, ha="center", va="center", fontsize=9, color="#333", bbox=box)
    return plots.to_svg(figure)


def files() -> str:
    """A table a room, from the top: each file, and the first sentence of its docstring."""
    parts = []
    for room in (room for floor in floors() for room in floor):
        place = SOURCE / room
        paths = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
        lines = [f"| `{path.relative_to(SOURCE)}` | {_sentence(path)} |" for path in paths if _sentence(path)]
        parts.append("\n".join([f"### {room}", "", "| file | what it is |", "|---|---|", *lines]))
    return "\n\n".join(parts) + "\n"


def _sentence(path: Path) -> str:
    said = " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0].split())
    return (said.split(". ")[0].rstrip(".") + ".").replace("|", "\\|") if said else ""


def written(page: str) -> str:
    """The page with its table of files made anew."""
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + "\n" + files() + "\n" + END + rest.partition(END)[2]


if __name__ == "__main__":
    FIGURE.write_text(drawing())
    PAGE.write_text(written(PAGE.read_text()))
