"""Results published by the LLM2CLIP authors, for comparison. The values are in `published_results.yaml`."""

from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import yaml

Cell = tuple[float, ...] | None
"""Values in a table cell, or None if the authors published no value."""


@dataclass(frozen=True)
class PublishedTable:
    """Table of published results."""

    title: str
    year: int  # year of the project page version that contains the table
    source: str  # project page version, with commit and date
    columns: tuple[str, ...]
    rows: dict[str, tuple[Cell, ...]]  # one cell per column, keyed by row name
    heading: str = ""  # heading of the table in the documentation, or empty if the table is not shown
    note: str = ""

    def get_cell(self, row: str, column: str) -> Cell:
        return self.rows[row][self.columns.index(column)]


def _build_published_tables() -> dict[str, PublishedTable]:
    tables = {}
    for name, table in _CONTENT["tables"].items():
        rows = {row: tuple(map(_parse_published_cell, cells)) for row, cells in table["rows"].items()}
        fields = {**table, "rows": rows, "columns": tuple(table["columns"])}
        tables[name] = PublishedTable(source=_CONTENT["sources"][table["year"]], **fields)
    return tables


def _parse_published_cell(value: Any) -> Cell:
    if value is None:
        return None
    return tuple(value) if isinstance(value, list) else (value,)


_CONTENT = yaml.safe_load((files("llm2clip") / "published_results.yaml").read_text(encoding="utf-8"))
PUBLISHED_NAMES: dict[str, str] = _CONTENT["retrieval columns"]
VISION_TRANSFER_METRICS: dict[str, tuple[str, list[str]]] = _CONTENT["vision transfer columns"]
RETRIEVAL_TABLES = ("eva02_text_towers", "clip_text_encoders", "chinese_retrieval", "multilingual_retrieval")
TABLES = _build_published_tables()
CRA = {model: cell[0] for model, (cell,) in TABLES["cra"].rows.items() if cell}
CRA_NOTE = TABLES["cra"].note


def get_published_metrics(benchmark: str) -> dict[str, dict[str, float]]:
    """Return the authors' segmentation or detection metrics, keyed by model ("YEAR: MODEL") and then by metric."""
    if benchmark not in VISION_TRANSFER_METRICS:
        return {}
    column, metrics = VISION_TRANSFER_METRICS[benchmark]
    table = TABLES["vision_transfer"]
    rows = {}
    for model in table.rows:
        rows[f"{table.year}: {model}"] = dict(zip(metrics, table.get_cell(model, column) or (), strict=True))
    return rows


def get_published_recalls(benchmark: str) -> dict[str, tuple[float | None, ...]]:
    """Return the authors' results on a retrieval benchmark. For xm3600, the results are means over all languages.

    Returns:
        Image-to-text and then text-to-image R@1, R@5 and R@10, keyed by "YEAR: MODEL", such as "2026: Llama-3-8B-CC".
            R@5 and R@10 are None if only R@1 was published. The dict may be empty.
    """
    rows: dict[str, tuple[float | None, ...]] = {}
    for table in _find_retrieval_tables(benchmark):
        for model in table.rows:
            values = table.get_cell(model, PUBLISHED_NAMES[benchmark])
            if values is not None and len(values) == 2:
                rows[f"{table.year}: {model}"] = (values[0], None, None, values[1], None, None)
            elif values is not None:
                rows[f"{table.year}: {model}"] = values
    return rows


def get_published_notes(benchmark: str) -> list[str]:
    """Return the year, title, source and note of each published table that covers a benchmark, one line per table."""
    tables = _find_retrieval_tables(benchmark)
    if benchmark in VISION_TRANSFER_METRICS:
        tables = [TABLES["vision_transfer"]]
    return [f"Paper {table.year}: {table.title} ({table.source}). {table.note}".rstrip() for table in tables]


def _find_retrieval_tables(benchmark: str) -> list[PublishedTable]:
    column = PUBLISHED_NAMES.get(benchmark)
    return [TABLES[name] for name in RETRIEVAL_TABLES if column in TABLES[name].columns]
