"""Command that starts an HTTP server for search and embeddings: `serve`."""

from __future__ import annotations

import os
import secrets
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from urllib.parse import quote

from jsonargparse import Namespace
from jsonargparse.typing import PositiveFloat, PositiveInt

from llm2clip.cli.checks import check_index_exists, check_port_is_available, resolve_model_name
from llm2clip.cli.commands import ArgumentParser, CommandGroup, Port
from llm2clip.io_utils import require_extra


def add_commands(commands: CommandGroup) -> None:
    sub = commands.add("serve", _run_serve, "Serve a search API, an embeddings API and a search page over HTTP.")
    sub.add_argument("index", nargs="?", type=str, help="Index folder or URL. Default: serve embeddings only.")
    sub.add_argument(
        "--model",
        type=str,
        help="Model to serve. Default: the model with which the index was created. Required if there is no index "
        "or the model folder was moved.",
    )
    sub.add_argument(
        "--host", type=str, default="127.0.0.1", help="Address to listen on. 0.0.0.0 means all network interfaces."
    )
    sub.add_argument(
        "--port", type=Port, help="Port to listen on. 0 means any free port. Default: 7860, or 3003 with --immich."
    )
    sub.add_argument(
        "--token",
        type=str,
        help="Token that clients must send. Default: $LLM2CLIP_TOKEN if set, otherwise a random token. Other users of "
        "this machine can see command-line arguments, but not environment variables.",
    )
    sub.add_argument(
        "--no_token",
        action="store_true",
        help="Disable authentication. Allowed only if other machines cannot connect (see --host).",
    )
    sub.add_argument(
        "--list_models_without_token",
        action="store_true",
        help="Allow GET /v1/models without a token, for clients such as mteb that do not send a token to this path. "
        "Anyone who can connect can then read the model name.",
    )
    sub.add_argument(
        "--behind_proxy",
        action="store_true",
        help="Trust the client address in the headers of a reverse proxy on this machine.",
    )
    sub.add_argument("--mcp", action="store_true", help="Also run an MCP server for AI agents at /mcp.")
    sub.add_argument(
        "--immich",
        action="store_true",
        help="Serve only image and text embeddings to the photo library Immich, in place of Immich's own machine-"
        "learning service. No token is required, because Immich cannot send one. Listen only on a private network.",
    )
    sub.add_argument(
        "--immich_upstream",
        type=str,
        help="Address of Immich's own machine-learning service, such as http://127.0.0.1:3004, to which requests for "
        "facial recognition and OCR are forwarded. Default: such requests fail, so disable both features in Immich.",
    )
    _add_model_arguments(sub)


def _add_model_arguments(sub: ArgumentParser) -> None:
    sub.add_argument(
        "--batch_size", type=PositiveInt, default=32, help="Maximum number of texts or images per forward pass."
    )
    sub.add_argument(
        "--max_queue",
        type=PositiveInt,
        default=512,
        help="Maximum number of concurrent searches, and of concurrent embedding requests. Further requests are "
        "rejected with status 429.",
    )
    sub.add_argument(
        "--timeout",
        type=PositiveFloat,
        default=30.0,
        help="Maximum time per request in seconds. Slower requests fail with status 504.",
    )
    sub.add_argument(
        "--precision",
        type=str,
        default="auto",
        help="Text encoder precision: fp32, bf16, or auto (the faster of the two).",
    )


def _run_serve(args: Namespace) -> list[str]:
    if args.port is None:
        args.port = 3003 if args.immich else 7860
    _check_immich_options(args)
    check_port_is_available(args.host, args.port)
    check_index_exists(args["index"])
    if args.model is not None:
        args.model = resolve_model_name(args.model)
    require_extra("search", "`serve`")
    if args.mcp:
        require_extra("mcp", "--mcp")
        if args["index"] is None:
            raise ValueError("--mcp requires an index: llm2clip serve INDEX --mcp")
    from llm2clip.models.dual_encoder import open_dual_encoder
    from llm2clip.runs.ranks import print_once
    from llm2clip.search.backends import open_backend
    from llm2clip.search.inference import ServerLimits
    from llm2clip.search.server import LOOPBACK, AccessPolicy, create_app, serve

    backend = open_backend(args["index"]) if args["index"] else None
    model_name = args.model or (backend.read_metadata()["model"] if backend else None)
    if model_name is None:
        raise ValueError("pass an index, or a model with --model")
    token = None if args.immich else resolve_access_token(args.token, args.no_token, args.host)
    add_routes = None
    if args.immich:
        from llm2clip.search.immich import UpstreamService, add_immich_routes, format_immich_instructions

        upstream = UpstreamService(args.immich_upstream) if args.immich_upstream is not None else None
        add_routes = partial(add_immich_routes, upstream=upstream)
    model_thread = ThreadPoolExecutor(1, "model")
    model = model_thread.submit(open_dual_encoder, model_name, precision=args.precision, stage="serve").result()
    public_paths = ("/health", "/v1/models") if args.list_models_without_token else ("/health",)
    app = create_app(
        model,
        backend,
        limits=ServerLimits(max_queue=args.max_queue, timeout=args.timeout, batch_size=args.batch_size),
        access=AccessPolicy(token, LOOPBACK if args.host in LOOPBACK else None, public_paths),
        model_thread=model_thread,
        add_routes=add_routes,
    )
    if args.mcp:
        from llm2clip.search.mcp_tools import add_mcp_route

        add_mcp_route(app)
    host = f"[{args.host}]" if ":" in args.host else args.host  # IPv6

    def print_address(port: int) -> None:
        address = f"http://{host}:{port}/"
        if args.immich:
            print_once(format_immich_instructions(address, model.embed_dim, upstream))
            return
        known = os.environ.get("LLM2CLIP_TOKEN")  # a known token is not printed, because logs may contain the output
        page = f"{address}?token={quote(token, safe='')}" if token and token != known else address
        mcp = f"MCP server: {address}mcp. " if args.mcp else ""
        print_once(f"Serving at {page}", f"{mcp}API description: {address}openapi.json. Press Ctrl-C to stop.")

    serve(app, args.host, args.port, on_start=print_address, behind_proxy=args.behind_proxy)
    return ["Server stopped."]


def _check_immich_options(args: Namespace) -> None:
    if args.immich_upstream is not None and not args.immich:
        raise ValueError("--immich_upstream requires --immich")
    if args.immich and args["index"]:
        raise ValueError("--immich does not use an index. Pass only a model with --model")
    if args.immich and args.model is None:
        raise ValueError("--immich requires --model")
    if args.immich and args.token is not None:
        raise ValueError("--token cannot be used with --immich, because Immich cannot send a token")


def resolve_access_token(token: str | None, no_token: bool, host: str) -> str | None:
    """Return the token that clients must send, or None if no token is required.

    Raises:
        ValueError: The options contradict each other, the token is empty, or `no_token` would allow other machines to
            connect.
    """
    from llm2clip.search.server import LOOPBACK

    if no_token:
        if token is not None:
            raise ValueError("--token and --no_token cannot be used together")
        if host not in LOOPBACK:
            raise ValueError(
                f"--no_token is not allowed with --host {host}, because other machines could access the indexed "
                "images. Set a token with --token or LLM2CLIP_TOKEN, or remove --host."
            )
        return None
    if token == "":
        raise ValueError("--token is empty. Omit it to generate a token, or use --no_token to disable authentication.")
    return token or os.environ.get("LLM2CLIP_TOKEN") or secrets.token_urlsafe(24)
