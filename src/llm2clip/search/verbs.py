"""`llm2clip index`, `search` and `serve`, as they are typed."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date as date_of
from datetime import datetime
from datetime import time as time_of
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rich.console import Console

from llm2clip.data.image_refs import printable
from llm2clip.data.skip_log import SkipLog
from llm2clip.distributed import print_once
from llm2clip.models.dual_encoder import open_dual_encoder
from llm2clip.search.backends import open_backend
from llm2clip.search.build import build_index, check_model
from llm2clip.search.query_embedding import Query, embed_query
from llm2clip.search.render import open_in_browser, print_hits, write_contact_sheet
from llm2clip.search.types import Filter


def index_verb(
    sources: Sequence[str],
    model: str,
    out: str,
    *,
    watch: float | None,
    columns: dict[str, str],
    max_skipped: float,
    batch: int,
    workers: int | None,
    approximate_above: int,
    gone: bool,
) -> list[str]:
    """Fill an index, once or again and again; lines that say what is in it.

    Args:
        sources, columns, batch, workers, gone: as of `index`.
        model: its name.
        out: folder or URL of the index.
        watch: seconds from one look at the sources to the next; None looks once.
        max_skipped: largest share of pictures that cannot be read.
        approximate_above: different pictures from which a graph is searched.
    """
    dual, first = open_dual_encoder(model), True  # before anything is made at `out`
    engine = open_backend(out, write=True, approximate_above=approximate_above)
    list_of_bad = None if "://" in out else Path(out) / "skipped.jsonl"
    while True:
        log = SkipLog(list_of_bad, max_skipped)
        try:
            report = build_index(sources, dual, engine, log, columns, batch, workers, gone)
        except (OSError, ValueError) as error:
            if first:
                raise
            print_once(f"{datetime.now():%H:%M:%S} {error}")  # a disk that is away comes back
            time.sleep(watch or 1)
            continue
        if first or report:
            print_once(f"{datetime.now():%H:%M:%S} {report}" if watch else str(report), log.summary())
        if watch is None:
            break
        if first:
            print_once(f"watching {', '.join(sources)}; ctrl-c ends it")
        first = False
        time.sleep(watch)
    pictures, contents = engine.count()
    lines = [f"Index: {out} ({pictures:,} pictures, {contents:,} different)"]
    lines += ["the same bytes: " + ", ".join(names[:4]) for names in engine.copies(3)]
    if log.skipped and list_of_bad:
        lines.append(f"could not be read: {log.skipped.total():,}, listed in {list_of_bad}")
    return [*lines, f'Next: llm2clip search {out} "what you look for"', f"      llm2clip serve --index {out}"]


def search_verb(
    where: str,
    texts: Sequence[str],
    *,
    images: Sequence[str],
    without: Sequence[str],
    without_images: Sequence[str],
    top: int,
    only: Filter,
    model: str | None,
    sheet: str | None,
    opened: bool,
) -> list[str]:
    """Print what an index finds; see the arguments of `llm2clip search`."""
    if top < 1:
        raise ValueError(f"--top is 1 or more, not {top}")
    engine = open_backend(where)
    about = engine.about()
    dual = open_dual_encoder(model or about["model"])
    check_model(about, dual)
    query = Query(texts, images, without, without_images)
    hits = engine.search(embed_query(dual, query), top, only)
    if not hits:
        return ["Nothing: the index is empty, or its filters let nothing through."]
    print_hits(hits, engine, Console())
    if not opened and sheet is None:
        return []
    page = write_contact_sheet(_in_words(query), hits, engine, Path(sheet) if sheet else None)
    if opened:
        open_in_browser(page)
    return [f"Contact sheet: {page}"]


def serve_verb(
    where: str | None,
    *,
    model: str | None,
    host: str,
    port: int,
    token: str | None,
    batch: int,
    waiting: int,
    seconds: float,
    precision: str,
) -> list[str]:
    """Serve until ctrl-c or SIGTERM.

    Raises:
        ValueError: neither an index nor a model is named.
        ImportError: what it takes is not installed.
    """
    try:
        from llm2clip.search.schemas import Limits
        from llm2clip.search.server import LOOPBACK, create_app, serve
    except ModuleNotFoundError as error:
        raise ImportError(f"serving needs `pip install llm2clip[search]` ({error})") from error
    engine = open_backend(where) if where else None
    name = model or (engine.about()["model"] if engine else None)
    if name is None:
        raise ValueError("name an index with --index, or a model with --model")
    near = host in LOOPBACK
    token = token or os.environ.get("LLM2CLIP_TOKEN") or (None if near else secrets.token_urlsafe(24))
    thread = ThreadPoolExecutor(1, "model")
    dual = thread.submit(open_dual_encoder, name, precision=precision).result()
    limits = Limits(max_queue=waiting, timeout=seconds, batch_size=batch)
    app = create_app(dual, engine, limits, token, LOOPBACK if near else None, thread)
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
    entry = f"{address}?token={quote(token, safe='')}" if token else address
    print_once(f"Serving at {entry}", "Its API is at /openapi.json; ctrl-c ends it.")
    serve(app, host, port)
    return ["Stopped; what was under way was answered."]


def parse_time(date: str | None, end: bool = False) -> float | None:
    """A date or time as ISO 8601 writes it, in seconds since 1970; of a day its first second, or its last.

    Raises:
        ValueError: it is none.
    """
    if date is None:
        return None
    try:
        day = datetime.combine(date_of.fromisoformat(date), time_of.max if end else time_of.min)
    except ValueError:
        return datetime.fromisoformat(date).timestamp()
    return day.timestamp()


def canonical_path(path: str | None) -> str | None:
    """A path as names in an index are written."""
    return printable(os.path.realpath(os.path.expanduser(path))) if path is not None else None


def _in_words(query: Query) -> str:
    parts: list[Any] = [*query.texts, *query.images]
    without = [*query.without_texts, *query.without_images]
    return " + ".join(map(str, parts)) + "".join(f" without {part}" for part in without)
