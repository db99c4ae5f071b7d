"""Writes the tables of published results in method.md from `llm2clip/published_results.yaml`.

Run this script after each change of the YAML file: python docs/published_tables.py
"""

from pathlib import Path

from llm2clip.published_results import TABLES, PublishedTable

METHOD = Path(__file__).parent / "method.md"
START = "<!-- The rest of this page is written by docs/published_tables.py. -->"


def render_page(page: str) -> str:
    """Return the text of method.md with the current tables."""
    before, start, _ = page.partition(START)
    if not start:
        raise ValueError(f"{METHOD} does not contain the line {START}")
    tables = [table for table in TABLES.values() if table.heading]
    (source,) = {table.source for table in tables}
    return "\n\n".join([before + START, f"Source: {source}.", *map(_render_section, tables)]) + "\n"


def _render_section(table: PublishedTable) -> str:
    parts = [f"### {table.heading}", f"{table.title}."]
    if table.note:
        parts.append(table.note)
    lines = [f"| | {' | '.join(table.columns)} |", "|---|" + "---|" * len(table.columns)]
    for name, cells in table.rows.items():
        values = [" / ".join(map(str, cell)) if cell else "–" for cell in cells]
        lines.append(f"| {name} | {' | '.join(values)} |")
    return "\n\n".join([*parts, "\n".join(lines)])


if __name__ == "__main__":
    METHOD.write_text(render_page(METHOD.read_text(encoding="utf-8")), encoding="utf-8")
