"""Hook of mkdocs that adds the request and response fields to reference/http.md, from `llm2clip/search/schemas.py`."""

from typing import Any

from pydantic import BaseModel

from llm2clip.search import schemas

PAGE = "reference/http.md"
SECTIONS: list[tuple[str, str, type[BaseModel]]] = [
    ("Query", "Fields of `/search`, `/heatmap` and `/explain`:", schemas.QueryRequest),
    ("Search", "Additional fields of `/search`:", schemas.SearchRequest),
    ("Filter", "Fields of `filter` in `/search`, and of `filters` in the tool `search_photos`:", schemas.FilterRequest),
    ("Results", "Response to `/search`:", schemas.SearchResponse),
    ("Hit", "Each item of `hits`:", schemas.HitResponse),
    ("Location", "Each item of a hit's `images`:", schemas.ImageLocation),
    ("Embeddings", "Fields of `/embed` and `/v1/embeddings`:", schemas.EmbedRequest),
]


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return the Markdown text of a page, with the fields if it is the page about the HTTP API."""
    if page.file.src_uri != PAGE:
        return markdown
    return "\n\n".join([markdown, *(render_section(*section) for section in SECTIONS)])


def render_section(heading: str, introduction: str, model: type[BaseModel]) -> str:
    """Return a heading and a table of the fields of a model."""
    has_defaults = any(not field.is_required() for field in model.model_fields.values())
    lines = ["| field | default | meaning |", "|---|---|---|"] if has_defaults else ["| field | meaning |", "|---|---|"]
    for name, schema in model.model_json_schema()["properties"].items():
        if model is schemas.SearchRequest and name in schemas.QueryRequest.model_fields:
            continue
        meaning = schema["description"]
        if limit := _find_limit(schema):
            meaning += f" (at most {limit:,})"
        cells = [f"`{name}`", _format_default(schema.get("default")), meaning]
        lines.append(f"| {' | '.join(cells if has_defaults else [cells[0], cells[2]])} |")
    return "\n\n".join([f"### {heading}", introduction, "\n".join(lines)])


def _find_limit(schema: dict[str, Any]) -> int | None:
    """Return the maximum of a number that has a default, or the maximum length of a list."""
    if "maximum" in schema:
        return int(schema["maximum"])
    lengths = [variant["maxItems"] for variant in [schema, *schema.get("anyOf", [])] if "maxItems" in variant]
    return max(lengths, default=None)


def _format_default(default: Any) -> str:
    if default is None or isinstance(default, list | dict):  # an empty list, or an object without conditions
        return "–"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"
