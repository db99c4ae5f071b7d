"""Property-based tests of the HTTP API, generated from its OpenAPI schema.

Whatever a request contains, the server must not fail, and the response must match the schema. To run more examples:
`LLM2CLIP_EXAMPLES=500 pytest tests/test_api.py`.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import HANG_TIMEOUT
from llm2clip.models.dual_encoder import DualEncoder
from search_fixtures import create_patient_app, make_index, running_server

schemathesis = pytest.importorskip("schemathesis")
hypothesis = pytest.importorskip("hypothesis")
checks = pytest.importorskip("schemathesis.checks")
openapi_checks = pytest.importorskip("schemathesis.specs.openapi.checks")
# Not checked: that every request valid by the schema is accepted. A schema cannot express that a query must not be
# empty or that a data URI must contain an image.
CHECKS = (
    checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_schema_conformance,
)
MAX_EXAMPLES = int(os.environ.get("LLM2CLIP_EXAMPLES", "20"))
OPERATIONS = (
    "GET /health",
    "GET /metrics",
    "POST /search",
    "POST /heatmap",
    "POST /embed",
    "GET /thumbnail/{hit_id}",
    "GET /image/{hit_id}",
    "POST /explain",
)


@pytest.fixture(scope="module", params=["index", "no index"])
def operations(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    image_folder: Path,
    dual_encoder: DualEncoder,
) -> Iterator[dict[str, Any]]:
    """The operations of a running server by label."""
    has_index = request.param == "index"  # without an index, most operations answer 404
    backend = make_index(tmp_path_factory.mktemp("index"), image_folder, dual_encoder) if has_index else None
    with running_server(create_patient_app(dual_encoder, backend, max_body_bytes=1 << 20)) as address:
        schema = schemathesis.openapi.from_url(f"{address}openapi.json", timeout=HANG_TIMEOUT)
        results = [result.ok() for result in schema.get_all_operations()]
        yield {operation.label: operation for operation in results}


def test_all_operations_are_tested(operations: dict[str, Any]) -> None:
    assert sorted(operations) == sorted(OPERATIONS)


@pytest.mark.parametrize("label", OPERATIONS)
@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
def test_responses_match_the_schema(
    operations: dict[str, Any], label: str, mode: str, request: pytest.FixtureRequest
) -> None:
    """POSITIVE requests match the schema, NEGATIVE ones do not."""
    codes: dict[int, int] = {}
    has_index = request.node.callspec.params["operations"] == "index"
    requests = operations[label].as_strategy(generation_mode=getattr(schemathesis.GenerationMode, mode))

    @hypothesis.given(api_request=requests)
    @hypothesis.settings(
        max_examples=MAX_EXAMPLES if has_index else MAX_EXAMPLES // 4,
        deadline=None,
        database=None,
        derandomize=True,  # every run sends the same requests, so that a failure repeats
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    def send(api_request: Any) -> None:
        code = api_request.call_and_validate(checks=CHECKS, timeout=HANG_TIMEOUT).status_code
        codes[code] = codes.get(code, 0) + 1

    try:
        send()
    except hypothesis.errors.Unsatisfiable:
        pytest.skip("every request to this operation is valid")
    print(label, mode, codes)
    assert all(code < 500 for code in codes)
