"""Client for a running `llm2clip serve`, used by `llm2clip search --server`. The client loads no model."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import HTTPError
from urllib.parse import parse_qs, urlsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

from llm2clip.io_utils import hide_url_secrets

TIMEOUT = 60  # in seconds
MAX_RESPONSE_BYTES = 1 << 28
NO_SERVER = "{} is not the address of a server started with `llm2clip serve`"


class ServerIndexClient:
    """Client for the index of a running server. Search results have the same attributes as results of `Index`."""

    def __init__(self, address: str, token: str | None = None) -> None:
        """Use the token in the address or, if there is none, $LLM2CLIP_TOKEN, unless `token` is set.

        Raises:
            ValueError: The address is invalid, or the token contains unprintable or non-ASCII characters.
        """
        form = f"--server must be of the form http://HOST:PORT or https://HOST (got {hide_url_secrets(address)})"
        try:
            parts = urlsplit(address)
            is_valid = parts.scheme in ("http", "https") and parts.hostname and parts.username is None
            is_valid = is_valid and parts.port != 0  # reading an invalid port raises ValueError
        except ValueError as error:
            raise ValueError(form) from error
        if not is_valid:
            raise ValueError(form)
        self.address = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        self._token = token or parse_qs(parts.query).get("token", [""])[0] or os.environ.get("LLM2CLIP_TOKEN", "")
        if not self._token.isascii() or not self._token.isprintable():
            raise ValueError("the token must contain only printable ASCII characters")
        # Redirects and, for http://, proxies are disabled, so that no other server can read the token.
        proxies = [ProxyHandler({})] if parts.scheme == "http" else []
        self._opener = build_opener(_RejectRedirectsHandler, *proxies)

    def search(self, query: dict[str, Any], **options: Any) -> Any:
        """Return a page of hits. The arguments are the fields of `search.schemas.SearchRequest`.

        Raises:
            OSError: The server cannot be reached, rejects the token or the request, or is not an llm2clip server.
        """
        page = self._post_json("search", {**query, **options})
        if not hasattr(page, "hits"):
            raise OSError(NO_SERVER.format(self.address))
        return page

    def explain(self, query: dict[str, Any], hit_id: str) -> Any:
        return self._post_json("explain", {**query, "id": hit_id})

    def _post_json(self, path: str, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        request = Request(f"{self.address}/{path}", json.dumps(body).encode(), headers)
        try:
            with self._opener.open(request, timeout=TIMEOUT) as response:
                data = response.read(MAX_RESPONSE_BYTES)
            return json.loads(data, object_hook=lambda values: SimpleNamespace(**values))
        except HTTPError as error:
            raise OSError(f"{self.address}: {_explain_http_error(error)}") from error
        except (OSError, HTTPException) as error:
            raise OSError(
                f"cannot reach the server {self.address} ({getattr(error, 'reason', None) or error}). Check the "
                "address, or start the server with `llm2clip serve INDEX`"
            ) from error
        except ValueError as error:
            raise OSError(NO_SERVER.format(self.address)) from error


class _RejectRedirectsHandler(HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def _explain_http_error(error: HTTPError) -> str:
    if error.code == 401:
        return (
            "the token is missing or wrong. Set the environment variable LLM2CLIP_TOKEN, or pass the address that "
            "`llm2clip serve` printed, which contains the token"
        )
    if 300 <= error.code < 400:
        return f"the server redirects to {hide_url_secrets(error.headers.get('Location', ''))}. Pass the new address"
    try:
        return str(json.loads(error.read(MAX_RESPONSE_BYTES))["error"]["message"])
    except (OSError, HTTPException, ValueError, LookupError, TypeError):
        return f"the server answered with HTTP status {error.code}. Check the address"


def encode_images(paths: Sequence[str]) -> list[str]:
    """Encode image files as data URIs. The media type is always image/jpeg, because the server detects the format."""
    return [f"data:image/jpeg;base64,{base64.b64encode(Path(path).read_bytes()).decode()}" for path in paths]
