"""Model Context Protocol (MCP) tools that let AI agents search the index of a server."""

import json
from typing import Annotated, Any

from fastapi import FastAPI, Response
from mcp.server.lowlevel import Server
from mcp.server.mcpserver import Image
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from mcp.types import CallToolRequestParams, CallToolResult, ListToolsResult, TextContent, Tool, ToolAnnotations
from pydantic import Field

from llm2clip.data.images import ImageError, encode_thumbnail
from llm2clip.io_utils import format_count
from llm2clip.search import schemas
from llm2clip.search.images import ImageTooLargeError, read_original_image
from llm2clip.search.index import Index
from llm2clip.search.metadata import MAX_PATH_LENGTH, Filter
from llm2clip.search.server import run_search_request
from llm2clip.search.types import NotFoundError

MAX_SIDE = 1024  # maximum length of the longer side of an image from `show_photo`, in pixels
MAX_PHOTOS = 50  # maximum number of photos per result, to save space in the agent's context
Photo = Annotated[str, Field(max_length=MAX_PATH_LENGTH - 2), schemas.VALID_UNICODE, schemas.NON_BLANK]


class SearchPhotosTool(schemas.StrictModel):
    """Search a photo collection. Return the id, name, relevance (0 to 1) and thumbnail of each photo, best first.

    If no photo is close to the text, say so instead of presenting unrelated photos.
    """

    text: schemas.AnyText = Field("", description="what the photos should show; empty for the newest photos")
    top: int = Field(10, ge=1, le=MAX_PHOTOS, description="maximum number of photos, not counting similar photos")
    offset: int = Field(0, ge=0, le=schemas.MAX_OFFSET, description="offset of the next photos, from the last result")
    filters: schemas.FilterRequest | None = None

    def run(self, index: Index) -> list[Any]:
        texts, filters = [self.text] if self.text.strip() else [], self.filters or schemas.FilterRequest()
        request = {"texts": texts, "top": self.top, "offset": self.offset, "filter": filters}
        page = run_search_request(index, schemas.SearchRequest.model_validate(request))
        summary = f"{format_count(len(page.hits), 'photo')} of {page.total:,}"
        summary += " that match the filters." if filters.to_filter() else "."
        if page.nothing_close:
            summary = "Nothing is close: no photo shows what the text describes."
            summary += " The following photos only match the filters." if page.hits else ""
        elif texts and page.hits and page.hits[0].relevance is None:
            summary += " Relevance is not calibrated for this index, so perhaps no photo is close to the text."
        if page.next_offset is not None:
            summary += f" For more photos, use offset {page.next_offset}."
        content: list[Any] = [TextContent(text=summary)]
        for hit in page.hits:
            values: dict[str, Any] = {"id": hit.id, "name": hit.images[0].name, "relevance": hit.relevance}
            text = json.dumps(values | {"similar": [other.name for other in hit.similar]}, ensure_ascii=False)
            if jpeg := index.backend.read_thumbnail(hit.id):  # None if another process has just removed the photo
                content += [TextContent(text=text), Image(data=jpeg, format="jpeg").to_image_content()]
        return content


class ShowPhotoTool(schemas.StrictModel):
    """Show a photo at up to 1024 pixels, with its metadata, captions and recognised text.

    If several photos have this file name, show the newest photo. `others` lists the names of at most 49 other photos.
    """

    photo: Photo = Field(description="id or name of a photo, or a file name")

    def run(self, index: Index) -> list[Any]:
        hits = index.backend.read_hits([self.photo])
        pattern, ends = self.photo.replace("*", "?"), (f"/{self.photo}", f"!{self.photo}")  # "*" would match any text
        for path in (pattern, f"*!{pattern}"):  # the second pattern matches members of tar files
            if not hits:
                # The filter also matches similar names and folder names, so the file names are compared again.
                hits = index.search(top=MAX_PHOTOS, filter=Filter(path=path)).hits
                hits = [hit for hit in hits if any(f"/{image.name}".endswith(ends) for image in hit.images)]
        if not hits:
            raise NotFoundError(f"the index contains no photo with the id or name {self.photo}")
        hit, image = hits[0], hits[0].images[0]
        values: dict[str, Any] = {"id": hit.id, "name": image.name, "captions": image.captions, "text": hit.text}
        values |= {"details": [item.text for item in hit.details], "others": [item.images[0].name for item in hits[1:]]}
        content: list[Any] = [TextContent(text=json.dumps(values, ensure_ascii=False))]
        try:
            with index.resources.decoding:
                data = read_original_image(index.backend, hit.id, index.resources.max_file_bytes)
                jpeg: bytes | None = encode_thumbnail(index.encoder.load(data), MAX_SIDE)
        except (ImageError, NotFoundError, ImageTooLargeError) as error:
            content.append(TextContent(text=f"The photo cannot be shown: {error}. Only its thumbnail is available."))
            jpeg = index.backend.read_thumbnail(hit.id)
        if jpeg is None:
            raise NotFoundError(f"the photo {self.photo} has just been removed from the index")
        return [*content, Image(data=jpeg, format="jpeg").to_image_content()]


def add_mcp_route(app: FastAPI) -> None:
    """Add the route /mcp with the tools `search_photos` and `show_photo` to an application from `create_app`.

    The route has no sessions or streams, so the server's limits apply. The MCP SDK limits request bodies to 4 MiB.
    """
    models: dict[str, Any] = {"search_photos": SearchPhotosTool, "show_photo": ShowPhotoTool}

    async def list_tools(*_: Any) -> ListToolsResult:
        tools, hints = [], ToolAnnotations(read_only_hint=True, open_world_hint=False)
        for name, model in models.items():
            schema = model.model_json_schema()
            tools.append(Tool(name=name, description=schema.pop("description"), input_schema=schema, annotations=hints))
        return ListToolsResult(tools=tools)

    async def call_tool(_: Any, call: CallToolRequestParams) -> CallToolResult:
        try:
            if call.name not in models:
                raise NotFoundError(f"unknown tool {call.name[:50]!r}; valid tools are {', '.join(models)}")
            service, tool = app.state.service, models[call.name].model_validate(call.arguments or {})
            return CallToolResult(content=await service.searchers.run(tool.run, service.require_index()))
        except Exception as error:  # the MCP SDK would send the exception's message to the client
            return CallToolResult(
                content=[TextContent(text=schemas.make_client_error_message(error, app))], is_error=True
            )

    server = Server("llm2clip", version=app.version, on_list_tools=list_tools, on_call_tool=call_tool)
    manager = StreamableHTTPSessionManager(server, json_response=True, stateless=True)

    class McpResponse(Response):
        __call__ = staticmethod(manager.handle_request)

    @app.post("/mcp", include_in_schema=False)  # a GET request would open a stream
    async def handle_mcp_request() -> Response:
        return McpResponse()

    app.state.background = manager.run()
