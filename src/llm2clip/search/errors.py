"""HTTP error responses in the JSON format of OpenAI's API."""

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from llm2clip.data.image_refs import to_valid_unicode
from llm2clip.search.backends import IndexUnavailableError, WordIndexError
from llm2clip.search.images import InvalidImage, NotFound, TooLarge
from llm2clip.search.inference import DeadlineExceeded, QueueFull
from llm2clip.search.query import UnsupportedQuery

logger = logging.getLogger(__name__)

ERROR_TYPES = {
    400: "bad request",
    401: "missing or invalid token",
    403: "cross-site request",
    404: "not found",
    413: "request too large",
    422: "invalid request",
    429: "too many requests",
    503: "index unavailable",
    504: "timeout",
}
# Clients receive the messages of these exceptions. All other exceptions are reported as internal errors.
STATUS_CODES: dict[type[Exception], int] = {
    QueueFull: 429,
    TooLarge: 413,
    UnsupportedQuery: 400,
    NotFound: 404,
    WordIndexError: 503,
    DeadlineExceeded: 504,
    ValueError: 422,
}
MAX_MESSAGE_LENGTH = 1000  # in characters; validation messages may quote parts of the request
RETRY_SOON = {"Retry-After": "1"}  # asks the client to wait for one second


class ErrorBody(BaseModel):
    """Error description in the format of OpenAI's API."""

    message: str
    type: str
    code: int
    param: str | None = Field(
        default=None, description='field and index of the image that cannot be decoded, such as "images.0"'
    )


class ErrorResponse(BaseModel):
    """JSON body of all error responses."""

    error: ErrorBody


# Passed to FastAPI as `responses` to document these errors in the OpenAPI schema.
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    code: {"model": ErrorResponse, "description": description} for code, description in ERROR_TYPES.items()
}


def make_error_response(
    code: int, message: str, headers: dict[str, str] | None = None, param: str | None = None
) -> JSONResponse:
    """Return a JSON error response in the format of OpenAI's API."""
    error = {"message": message, "type": ERROR_TYPES.get(code, "error"), "code": code, "param": param}
    return JSONResponse({"error": error}, code, headers)


def add_error_handlers(app: FastAPI) -> None:
    """Register handlers that convert all exceptions in an application to error responses."""
    app.add_exception_handler(Exception, _handle_unexpected_error)
    app.add_exception_handler(HTTPException, _handle_http_exception)
    app.add_exception_handler(RequestValidationError, _handle_validation_error)
    app.add_exception_handler(InvalidImage, _handle_error)
    app.add_exception_handler(IndexUnavailableError, _handle_unavailable_index)
    for exception in STATUS_CODES:
        app.add_exception_handler(exception, _handle_error)


async def _handle_error(_: Request, error: Exception) -> Response:
    if isinstance(error, InvalidImage):
        return make_error_response(error.code, str(error), param=error.param)
    code = next(code for exception, code in STATUS_CODES.items() if isinstance(error, exception))
    return make_error_response(code, str(error), RETRY_SOON if code in (429, 503) else None)


async def _handle_unavailable_index(_: Request, error: Exception) -> Response:
    logger.warning("%s", error)  # clients do not receive the message, because it contains addresses
    return make_error_response(503, "the index is temporarily unavailable; try again later", RETRY_SOON)


async def _handle_unexpected_error(_: Request, error: Exception) -> JSONResponse:
    return make_error_response(500, "internal server error; see the server's log")


async def _handle_http_exception(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return make_error_response(error.status_code, str(error.detail), dict(error.headers or {}))


async def _handle_validation_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problems = []
    for problem in error.errors()[:3]:
        field = ".".join(str(part) for part in problem["loc"])
        problems.append(f"{field}: {problem['msg']}")
    return make_error_response(422, to_valid_unicode("; ".join(problems))[:MAX_MESSAGE_LENGTH])
