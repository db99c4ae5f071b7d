"""Tools with which AI agents search a server's index, over the Model Context Protocol (MCP)."""

import json
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import FastAPI
from mcp.server.mcpserver import Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import ToolAnnotations
from pydantic import Field

from llm2clip.data.images import ImageError, make_thumbnail
from llm2clip.io_utils import format_count
from llm2clip.search.images import TooLarge, read_original
from llm2clip.search.index import Index
from llm2clip.search.metadata import Filter
from llm2clip.search.schemas import MAX_TOP, STATUS_CODES, AnyText, FilterRequest, SearchRequest, Text, describe_error
from llm2clip.search.server import search_index
from llm2clip.search.types import NotFound

MAX_SIDE = 1024  # maximum width and height of the image that `show_photo` returns, in pixels
ToolResult = list[str | Image]
Query = Annotated[AnyText, Field(description="what the photos should show; empty for the newest photos")]
Top = Annotated[int, Field(ge=1, le=MAX_TOP, description="maximum number of photos")]
Photo = Annotated[Text, Field(description="id or name of a photo from search_photos, or a file name")]


def add_mcp_route(app: FastAPI) -> None:
    """Add the route /mcp with the tools `search_photos` and `show_photo` to an application from `create_app`.

    There are no sessions and no streams, so the limits of the other routes also apply to /mcp.
    """
    server = MCPServer("llm2clip", version=app.version, subscriptions=False, log_level="WARNING")
    tool = server.tool(annotations=ToolAnnotations(read_only_hint=True, open_world_hint=False))

    async def run(function: Callable[..., ToolResult], *args: Any) -> ToolResult:
        try:
            return await app.state.service.searchers.run(function, app.state.service.require_index(), *args)
        except tuple(STATUS_CODES) as error:
            raise ToolError(describe_error(error, app)) from error

    @tool
    async def search_photos(text: Query = "", top: Top = 10, filters: FilterRequest | None = None) -> ToolResult:
        """Search a photo collection. Return the id, name, relevance (0 to 1) and thumbnail of each photo, best first.

        If no photo is close to the text, say so instead of presenting unrelated photos.
        """
        request = {"texts": [text] if text.strip() else [], "top": top, "filter": filters or FilterRequest()}
        return await run(_search_photos, SearchRequest.model_validate(request))

    @tool
    async def show_photo(photo: Photo) -> ToolResult:
        """Show a photo at up to 1024 pixels, with its metadata, captions and recognised text."""
        return await run(_show_photo, photo)

    # With this host, only `TrustedHostMiddleware` checks the Host header. A GET request would open a stream.
    (route,) = server.streamable_http_app(json_response=True, stateless_http=True, host="0.0.0.0").routes
    app.add_route("/mcp", route.endpoint, methods=["POST"], include_in_schema=False)  # type: ignore[attr-defined]
    app.state.background = server.session_manager.run()


def _search_photos(index: Index, request: SearchRequest) -> ToolResult:
    page = search_index(index, request)
    summary = f"{format_count(len(page.hits), 'photo')} of {page.total:,} that match the filters."
    if page.nothing_close:
        summary = "Nothing is close: no photo shows what the text describes."
        summary += " The following photos only match the filters." if page.hits else ""
    elif request.texts and page.hits and page.hits[0].relevance is None:
        summary += " Relevance is not calibrated for this index: perhaps none of them is close to the text."
    result: ToolResult = [summary]
    for hit in page.hits:
        values = {"id": hit.id, "name": hit.images[0].name, "relevance": hit.relevance}
        jpeg = index.backend.thumbnail(hit.id) or b""
        result += [json.dumps(values, ensure_ascii=False), Image(data=jpeg, format="jpeg")]
    return result


def _show_photo(index: Index, photo: str) -> ToolResult:
    backend = index.backend
    hits = backend.read_hits([photo]) or backend.search(None, 1, Filter(path=photo))
    # The filter also matches the photos in a folder with this name.
    if not hits or not (photo == hits[0].id or hits[0].images[0].name.endswith(photo)):
        raise NotFound(f"the index contains no photo with the id or name {photo}")
    hit, image = hits[0], hits[0].images[0]
    values = {"id": hit.id, "name": image.name, "captions": image.captions, "text": hit.text}
    result: ToolResult = [json.dumps(values | {"details": [item.text for item in hit.details]}, ensure_ascii=False)]
    try:
        with index.resources.decoding:
            data = read_original(backend, hit.id, index.resources.max_file_bytes)
            jpeg = make_thumbnail(index.encoder.load(data), MAX_SIDE)
    except (ImageError, NotFound, TooLarge) as error:
        result.append(f"This is the thumbnail, because the photo cannot be shown: {error}")
        jpeg = backend.thumbnail(hit.id) or b""
    return [*result, Image(data=jpeg, format="jpeg")]
