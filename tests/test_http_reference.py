"""docs/reference/http.md lists all routes, and docs/http_fields.py describes all fields."""

import re
import runpy
from pathlib import Path
from types import SimpleNamespace

from fastapi.routing import APIRoute

from llm2clip.models.dual_encoder import DualEncoder
from llm2clip.search.schemas import EmbedRequest, HitResponse, SearchRequest
from llm2clip.search.server import create_app

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "reference/http.md").read_text()


def test_http_page_lists_all_routes(dual_encoder: DualEncoder) -> None:
    app = create_app(dual_encoder)
    routes = {route.path.replace("{hit_id}", "ID") for route in app.routes if isinstance(route, APIRoute)}
    listed = set(re.findall(r"`(?:GET|POST) (\S+)`", PAGE))
    assert listed == routes - {"/static/{name}"} | {"/mcp", "/openapi.json"}


def test_http_fields_are_added_to_the_page_only() -> None:
    add_fields = runpy.run_path(str(DOCS / "http_fields.py"))["on_page_markdown"]
    page = add_fields(PAGE, page=SimpleNamespace(file=SimpleNamespace(src_uri="reference/http.md")))
    assert page.startswith(PAGE)
    for model in (SearchRequest, HitResponse, EmbedRequest):
        assert [name for name in model.model_fields if f"\n| `{name}` |" not in page] == []
    assert "| `top` | `50` | maximum number of hits, not counting similar images (at most 200) |" in page
    assert add_fields("text", page=SimpleNamespace(file=SimpleNamespace(src_uri="index.md"))) == "text"
