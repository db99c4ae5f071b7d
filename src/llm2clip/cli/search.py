"""Image search commands `index` and `search`."""

from __future__ import annotations

import os
import sys
import time
from contextlib import redirect_stdout
from datetime import date as date_type
from datetime import datetime
from datetime import time as time_type
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt

from llm2clip.cli.checks import check_index, check_output_folder, check_sources, resolve_model
from llm2clip.cli.commands import (
    ArgumentParser,
    Commands,
    add_reading_arguments,
    format_command,
    select_arguments,
)
from llm2clip.search.metadata import CONDITIONS, Filter

if TYPE_CHECKING:
    from llm2clip.data.skip_log import SkipLog
    from llm2clip.models.prompts import QueryTemplates
    from llm2clip.search.build import IndexReport
    from llm2clip.search.index import Index, SearchPage
    from llm2clip.search.query import SearchQuery

NOTHING_CLOSE = "Nothing close: no image is close to the query. To see the closest images anyway, add --show_weak."
NO_RESULTS = "No results: the index is empty, or no image matches the filters."


def add_commands(commands: Commands) -> None:
    """Add this module's commands."""
    _add_index_arguments(commands.add("index", _index, "Build or update an image index for `search` and `serve`."))
    sub = commands.add(
        "search", _search, "Search an index by text (in any language that the model supports) and by image."
    )
    sub.add_argument("index", type=str, help="Index folder or URL.")
    _add_query_arguments(sub)
    for name, condition in CONDITIONS.items():
        example = ", given as a date or time such as 2024-05-31" if condition.kind.endswith("time") else ""
        value_type = PositiveInt if condition.kind == "number" else str
        sub.add_argument(f"--{name}", type=value_type, help=f"Only images {condition.description}{example}.")
    sub.add_argument("--model", type=str, help="Model that built the index. Needed only if the model folder was moved.")
    _add_output_arguments(sub)


def _add_index_arguments(sub: ArgumentParser) -> None:
    sub.add_argument("data", nargs="+", type=str, help="Image sources, with or without captions.")
    sub.add_argument(
        "--model", type=str, required=True, help="Model folder, or any other model that `evaluate` accepts."
    )
    sub.add_argument(
        "--out", type=str, required=True, help="Index folder or postgresql://USER@HOST/DATABASE?schema=NAME."
    )
    sub.add_argument(
        "--dim",
        type=PositiveInt,
        help="Truncate vectors to this number of dimensions, for a smaller index. `search` and `serve` truncate "
        "queries accordingly. Default: all dimensions.",
    )
    sub.add_argument(
        "--ocr",
        action="store_true",
        help="Also recognise the text in the images, for word search. Requires the `ocr` extra. Takes about a second "
        "per image and CPU core.",
    )
    sub.add_argument("--watch", type=PositiveFloat, help="Keep running and update the index every N seconds.")
    sub.add_argument(
        "--prune",
        action="store_true",
        help="Remove deleted images from the index even if a source no longer exists or over a fifth of its images "
        "were deleted.",
    )
    sub.add_argument(
        "--allow_outside",
        action="store_true",
        help="Also index images outside the source's folder if caption files or symbolic links refer to them.",
    )
    sub.add_argument(
        "--no_relevance",
        action="store_true",
        help="Do not calibrate relevance, and remove an existing calibration. Every search then returns results, even "
        "if nothing in the index is close to the query.",
    )
    add_reading_arguments(sub, max_skipped=1.0)
    sub.add_argument("--batch_size", type=PositiveInt, default=64, help="Number of images per forward pass.")
    sub.add_argument(
        "--workers",
        type=NonNegativeInt,
        help="Number of image decoding processes. Default: half the number of CPU cores.",
    )
    sub.add_argument(
        "--approximate_above",
        type=NonNegativeInt,
        help="Use approximate search (an HNSW graph) if the index has at least this many distinct images. Default: "
        "1,000,000 for a folder, 100,000 for PostgreSQL.",
    )


def _add_query_arguments(sub: ArgumentParser) -> None:
    sub.add_argument("texts", nargs="*", type=str, default=[], help="What the images should show.")
    sub.add_argument("--images", nargs="+", type=str, default=[], help="Images that the results should resemble.")
    sub.add_argument("--negative", nargs="+", type=str, default=[], help="What the images should not show.")
    sub.add_argument(
        "--negative_images", nargs="+", type=str, default=[], help="Images that the results should not resemble."
    )
    add_templates_argument(sub)
    sub.add_argument("--top", type=PositiveInt, default=10, help="Maximum number of results.")
    sub.add_argument("--show_weak", action="store_true", help="Also show results if nothing is close to the query.")
    sub.add_argument(
        "--no_words",
        action="store_true",
        help="Rank only by similarity. By default, images rank higher if their captions, recognised text, file name, "
        "camera and date contain all words of the query.",
    )
    sub.add_argument(
        "--no_group",
        action="store_true",
        help="Show bursts and edited copies of an image as separate results. By default, each is one result.",
    )
    sub.add_argument(
        "--rerank",
        type=str,
        help="Model that sorts the first 50 results again, using the image files: any model that `evaluate` accepts.",
    )


def _add_output_arguments(sub: ArgumentParser) -> None:
    sub.add_argument(
        "--json",
        action="store_true",
        help="Print each result as a JSON object: rank, score, relevance, path, duplicates, similar, captions, text, "
        "matched and the image's metadata.",
    )
    sub.add_argument(
        "--explain",
        action="store_true",
        help="Also print how much each word of the texts changes the similarity of the first result.",
    )
    sub.add_argument("--paths", action="store_true", help="Print only the paths, one per line.")
    sub.add_argument("--sheet", type=str, help="Write an HTML page with the results to this folder.")
    sub.add_argument("--open", action="store_true", help="Open an HTML page with the results in a browser.")
    sub.add_argument("--heatmaps", action="store_true", help="On the HTML page, show where images match the query.")


def add_templates_argument(parser: ArgumentParser, note: str = "") -> None:
    parser.add_argument(
        "--templates",
        nargs="*",
        type=str,
        help="Prompt templates for texts of up to three words, such as 'a photo of a {}'. The embeddings of the text "
        f"and the filled-in templates are averaged.{note} Default: the templates saved with the model. --templates "
        "without a value disables templates.",
    )


def _index(args: Namespace) -> list[str]:
    from llm2clip.search.backends import get_backend_name, hide_password, open_backend

    if get_backend_name(args.out) == "sqlite":
        check_output_folder(args.out, "index")
    if not args.prune:
        check_sources(args.data)
    args.model = resolve_model(args.model)
    from llm2clip.data.skip_log import SkipLog
    from llm2clip.models.dual_encoder import open_dual_encoder
    from llm2clip.models.llm2clip import check_dim
    from llm2clip.runs.ranks import print_once
    from llm2clip.search.build import IndexOptions, build_index
    from llm2clip.search.ocr import open_recognizer

    recognize = open_recognizer() if args.ocr else None
    model = open_dual_encoder(args.model)  # loaded first, so that --out stays unchanged if loading fails
    if args.dim is not None:
        check_dim(args.dim, model.embed_dim, model.name)
    backend = open_backend(args.out, write=True, approximate_above=args.approximate_above)
    skipped_file = None if "://" in args.out else Path(args.out) / "skipped.jsonl"
    if skipped_file is not None and not skipped_file.exists():
        skipped_file.touch(mode=0o600)  # file names may be private

    def update_index() -> tuple[IndexReport, SkipLog]:
        log = SkipLog(skipped_file, args.max_skipped)
        values = select_arguments(args, "columns", "batch_size", "workers", "prune", "allow_outside", "dim")
        options = IndexOptions(**values, relevance=not args.no_relevance, recognize=recognize)
        return build_index(args.data, model, backend, log, options), log

    report, log = update_index()
    if args.watch is not None:
        print_once(f"{datetime.now():%H:%M:%S} {report}", log.summary())
        print_once(f"Watching {', '.join(args.data)}; press Ctrl-C to stop.")
    while args.watch is not None:
        time.sleep(args.watch)
        try:
            report, log = update_index()
        except (OSError, ValueError) as error:  # perhaps temporary, such as an unmounted disk
            print_once(f"{datetime.now():%H:%M:%S} {error}")
            continue
        if report:
            print_once(f"{datetime.now():%H:%M:%S} {report}", log.summary())
    print_once(str(report), log.summary())

    images, contents = backend.count()
    location = hide_password(args.out)
    lines = [f"Index: {location} ({images:,} images, {contents:,} distinct)"]
    for names in backend.duplicates(limit=3):
        lines.append("Duplicates: " + ", ".join(names[:4]))
    if log.skipped and skipped_file:
        lines.append(f"Unreadable images: {log.skipped.total():,}, listed in {skipped_file}")
    unread = log.dropped["text not recognised"]
    if unread:
        listed = f", listed in {skipped_file}" if skipped_file else ""
        lines.append(f"Images whose text could not be recognised: {unread:,}{listed}")
    lines.append(f"Next: {format_command('search', location, 'a description of an image')}")
    lines.append(f"      {format_command('serve', '--index', location)}")
    return lines


def _search(args: Namespace) -> list[str]:
    check_index(args["index"])
    _check_query(args)
    _check_output(args)
    image_filter = _make_filter(args)
    for name in ("model", "rerank"):
        if args[name] is not None:
            args[name] = resolve_model(args[name])
    from llm2clip.search.explain import require_dense_encoder
    from llm2clip.search.index import Index, SearchOptions
    from llm2clip.search.query import SearchQuery
    from llm2clip.search.relevance import warn_if_not_calibrated

    templates = make_query_templates(args.templates)
    query = SearchQuery(args.texts, args.images, args.negative, args.negative_images, templates=templates)
    options = SearchOptions(not args.no_words, not args.no_group, args.show_weak, args.rerank is not None)
    with redirect_stdout(sys.stderr):  # keeps everything but the results out of the --json and --paths output
        index = Index.open(args["index"], args.model, args.rerank)
        if args.heatmaps:
            require_dense_encoder(index.encoder.model)
        page = index.search(query, args.top, filter=image_filter, options=options)
        if query and index.calibration is None:
            warn_if_not_calibrated(index.backend)
        if page.rerank_missing:
            print(
                f"Results that could not be re-ranked, because their files were changed or removed since indexing, "
                f"or cannot be decoded: {page.rerank_missing:,}"
            )
        if page.nothing_close and (args.json or args.paths):
            print(NOTHING_CLOSE)
    return _print_page(args, index, query, page)


def _print_page(args: Namespace, index: Index, query: SearchQuery, page: SearchPage) -> list[str]:
    """Print the hits in the requested format. Return the lines to print at the end."""
    from rich.console import Console

    from llm2clip.search.render import hit_to_json, print_explanation, print_hits

    if args.json:
        return [hit_to_json(rank, hit) for rank, hit in enumerate(page.hits, 1)]
    if args.paths:
        return [hit.images[0].name for hit in page.hits]
    if not page.hits:
        return [NOTHING_CLOSE if page.nothing_close else NO_RESULTS]
    if args.open or args.sheet is not None:
        return _write_sheet(args, index, page)
    print_hits(page.hits, index.backend, Console())
    if args.explain:
        print_explanation(index.explain(query, page.hits[0].id), Console())
    return ["None of these images is close to the query."] if page.nothing_close else []


def _write_sheet(args: Namespace, index: Index, page: SearchPage) -> list[str]:
    """Write the hits to an HTML page, and open it with --open."""
    from llm2clip.search.render import open_in_browser, write_contact_sheet

    heatmaps = index.draw_heatmaps(page) if args.heatmaps else {}
    title = " + ".join([*args.texts, *args.images])
    title += "".join(f" without {part}" for part in (*args.negative, *args.negative_images))
    title = title.strip() or "newest images"
    folder = Path(args.sheet) if args.sheet else None
    file = write_contact_sheet(title, page.hits, index.backend, folder, heatmaps, rerank_model=args.rerank)
    if args.open:
        open_in_browser(file)
    lines = [f"Results: {file}"]
    if args.heatmaps and len(heatmaps) < len(page.hits):
        missing = [hit.images[0].name for hit in page.hits if hit.id not in heatmaps]
        lines.append(
            f"No heat map for {len(missing)} of {len(page.hits)} images. Their files were changed or removed since "
            f"indexing, or cannot be decoded: {', '.join(missing[:3])}"
        )
    return lines


def _check_output(args: Namespace) -> None:
    """Raise ValueError if the output options contradict each other or the query."""
    to_page = args.open or args.sheet is not None
    if args.heatmaps and not to_page:
        raise ValueError("--heatmaps requires an HTML page: add --open or --sheet FOLDER")
    if args.json + args.paths + to_page > 1:
        raise ValueError("--json, --paths and the HTML page (--sheet, --open) cannot be combined")
    if args.explain and not args.texts:
        raise ValueError("--explain requires a text, because it rates the words of the texts")
    if args.explain and (args.json or args.paths or to_page):
        raise ValueError("--explain prints a table: remove --json, --paths, --sheet and --open")
    if args.rerank is not None and not (args.texts or args.images or args.negative or args.negative_images):
        raise ValueError("--rerank requires a text or an image to search for")


def _check_query(args: Namespace) -> None:
    """Raise an error if there is neither a query nor a filter, if a text is empty, or if an image file is missing."""
    filters = [args[name] for name in CONDITIONS]
    has_query = args.texts or args.images or args.negative or args.negative_images
    if not has_query and (args.heatmaps or all(value is None for value in filters)):
        raise ValueError("pass text or images to search for, or a filter such as --after 2024-05-31")
    from llm2clip.io_utils import check_not_empty

    check_not_empty(args.texts)
    check_not_empty(args.negative)
    for image in (*args.images, *args.negative_images):
        if not os.path.exists(image):
            raise FileNotFoundError(f"No such file: {image}")


def _make_filter(args: Namespace) -> Filter:
    """Create a filter from the arguments. Raise ValueError if a time is invalid or --after is later than --before."""
    values = {name: args[name] for name in CONDITIONS}
    for name, condition in CONDITIONS.items():
        if condition.kind.endswith("time"):
            values[name] = parse_time(values[name], f"--{name}", end_of_day=condition.kind == "last time")
    values["path"] = resolve_path_filter(values["path"])
    after, before = values["after"], values["before"]
    if after is not None and before is not None and after > before:
        raise ValueError(f"--after {args.after} is later than --before {args.before}, so no image can match")
    return Filter(**values)


def make_query_templates(templates: list[str] | None) -> QueryTemplates | None:
    """Return the templates specified by --templates, or None to use the templates saved with the model."""
    from llm2clip.models.prompts import QueryTemplates, check_templates

    check_templates(templates or [], "--templates")
    return None if templates is None else QueryTemplates(tuple(templates))


def parse_time(text: str | None, option: str, end_of_day: bool = False) -> float | None:
    """Convert an ISO 8601 date or time to a Unix timestamp.

    Args:
        option: Name of the option, for the error message.
        end_of_day: If True, a date without a time means the end of that day. If False, it means the start.

    Raises:
        ValueError: The text is not a valid date or time.
    """
    if text is None:
        return None
    try:
        date = date_type.fromisoformat(text)
    except ValueError:
        try:
            return datetime.fromisoformat(text).timestamp()
        except ValueError as error:
            raise ValueError(
                f"{option} must be a date or a date and time, such as 2024-05-31 or 2024-05-31T12:00 "
                f"(got {text!r}: {error})"
            ) from error
    return datetime.combine(date, time_type.max if end_of_day else time_type.min).timestamp()


def resolve_path_filter(path: str | None) -> str | None:
    """Convert a path filter to the form stored in search indexes: absolute, with symbolic links resolved.

    Relative paths that do not exist are returned unchanged, because they match in every folder.
    """
    from llm2clip.io_utils import to_valid_unicode

    if path is None:
        return None
    path = os.path.expanduser(path)
    return to_valid_unicode(os.path.realpath(path) if os.path.isabs(path) or os.path.exists(path) else path)
