"""Property-based tests of the HTTP API: generated requests never crash the server, and responses match the schema.

To run more examples: `LLM2CLIP_EXAMPLES=500 pytest tests/test_api.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llm2clip.models.dual_encoder import open_dual_encoder
from llm2clip.search.schemas import Limits
from llm2clip.search.server import create_app
from search_fixtures import make_index, make_model, running_server

schemathesis = pytest.importorskip("schemathesis")
hypothesis = pytest.importorskip("hypothesis")
checks = pytest.importorskip("schemathesis.checks")
openapi_checks = pytest.importorskip("schemathesis.specs.openapi.checks")
# The check that valid requests succeed is not included: an empty search and an invalid image are rejected, which the
# schema cannot express.
CHECKS = (
    checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_schema_conformance,
)
EXAMPLES = int(os.environ.get("LLM2CLIP_EXAMPLES", "20"))
ENDPOINTS = (
    "GET /health",
    "GET /metrics",
    "POST /search",
    "POST /embed",
    "POST /embed/upload",
    "GET /thumbnail/{hit_id}",
    "GET /image/{hit_id}",
)


@pytest.fixture(scope="module")
def operations(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> Iterator[dict[str, Any]]:
    model = open_dual_encoder(str(make_model(tmp_path_factory.mktemp("model"))))
    backend = make_index(tmp_path_factory.mktemp("index"), image_folder, model)
    with running_server(create_app(model, backend, Limits(max_body_bytes=1 << 20))) as address:
        schema = schemathesis.openapi.from_url(f"{address}openapi.json")
        yield {operation.ok().label: operation.ok() for operation in schema.get_all_operations()}


def test_schema_lists_all_endpoints(operations: dict[str, Any]) -> None:
    assert sorted(operations) == sorted(ENDPOINTS)


@pytest.mark.parametrize("label", ENDPOINTS)
@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
def test_endpoint_handles_generated_requests(operations: dict[str, Any], label: str, mode: str) -> None:
    codes: dict[int, int] = {}
    strategy = operations[label].as_strategy(generation_mode=getattr(schemathesis.GenerationMode, mode))

    @hypothesis.given(case=strategy)
    @hypothesis.settings(
        max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    def send(case: Any) -> None:
        code = case.call_and_validate(checks=CHECKS).status_code
        codes[code] = codes.get(code, 0) + 1

    try:
        send()
    except hypothesis.errors.Unsatisfiable:
        pytest.skip("the endpoint has no parameters that could be invalid")
    print(label, mode, codes)
    assert all(code < 500 for code in codes)
