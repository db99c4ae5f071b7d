"""Image search commands: `index` and `search`."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from datetime import datetime
from datetime import time as time_type
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt

from llm2clip.cli.checks import (
    check_data_sources,
    check_index_exists,
    check_output_folder,
    check_sources_exist,
    resolve_model_name,
)
from llm2clip.cli.commands import ArgumentParser, CommandGroup, add_data_reading_arguments, make_options_from_args
from llm2clip.io_utils import format_count
from llm2clip.models.loading import DEFAULT_MODEL
from llm2clip.search.metadata import CONDITIONS, CONTENT_FIELDS, IMAGE_FIELDS, Filter, metadata_to_json

if TYPE_CHECKING:
    from rich.console import Console

    from llm2clip.cli.server_index import ServerIndexClient
    from llm2clip.data.skip_log import SkipLog
    from llm2clip.search.backends import IndexBackend
    from llm2clip.search.build import IndexReport
    from llm2clip.search.explain import Explanation
    from llm2clip.search.index import Index, SearchPage
    from llm2clip.search.types import Hit

CAPTION_LENGTH = 160  # maximum length of a displayed caption, in characters
NOTHING_CLOSE = "No image is close to the query. To see the closest images anyway, add --show_weak."
NOT_CALIBRATED = "Relevance is not calibrated for this index, so the images may not be close to the query."


def add_commands(commands: CommandGroup) -> None:
    _add_index_arguments(commands.add("index", _run_index, "Build or update an image index for `search` and `serve`."))
    sub = commands.add(
        "search", _run_search, "Search an index by text, in any language that the model supports, and by image."
    )
    sub.add_argument("index", nargs="?", type=str, help="Index folder or URL. Not used with --server.")
    _add_query_arguments(sub)
    for name, condition in CONDITIONS.items():
        example = ", given as a date or time such as 2024-05-31" if condition.kind.endswith("time") else ""
        value_type = PositiveInt if condition.kind == "number" else str
        sub.add_argument(f"--{name}", type=value_type, help=f"Only images {condition.description}{example}.")
    sub.add_argument("--model", type=str, help="Model of the index. Needed only if the model folder was moved.")
    sub.add_argument(
        "--server",
        type=str,
        help="Address of a running `llm2clip serve` to search instead of a local index. A search takes less than a "
        "second, because no model is loaded.",
    )
    sub.add_argument(
        "--token",
        type=str,
        help="Token for the server. Default: the token in the address, or $LLM2CLIP_TOKEN. Other users of this "
        "machine can see command-line arguments, but not environment variables.",
    )
    _add_output_arguments(sub)


def _add_index_arguments(sub: ArgumentParser) -> None:
    sub.add_argument("data", nargs="+", type=str, help="Image sources, with or without captions.")
    sub.add_argument(
        "--model",
        type=str,
        help="Model folder, or any other model that `evaluate` accepts. Default: the model of the existing index or, "
        f"for a new index, {DEFAULT_MODEL} from the hub.",
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
        help="Also recognise text in the images, for word search. Requires the extra `ocr`. Takes about a second per "
        "image on a CPU core.",
    )
    sub.add_argument("--watch", type=PositiveFloat, help="Keep running and update the index every N seconds.")
    sub.add_argument(
        "--prune",
        action="store_true",
        help="Remove deleted images from the index even if a source no longer exists or more than a fifth of its "
        "images were deleted.",
    )
    sub.add_argument(
        "--allow_outside",
        action="store_true",
        help="Also index images outside the source folder if caption files or symbolic links refer to the images.",
    )
    add_data_reading_arguments(sub, max_skipped=1.0)
    sub.add_argument("--batch_size", type=PositiveInt, default=64, help="Number of images per forward pass.")
    sub.add_argument(
        "--workers",
        type=NonNegativeInt,
        help="Number of processes that decode images. Default: half the number of CPU cores.",
    )


def _add_query_arguments(sub: ArgumentParser) -> None:
    sub.add_argument(
        "words", nargs="*", type=str, default=[], help="What the images should show. All words together form one text."
    )
    sub.add_argument("--text", action="append", type=str, default=[], help="Additional query text. May be repeated.")
    sub.add_argument("--images", nargs="+", type=str, default=[], help="Images that the results should resemble.")
    sub.add_argument("--negative", nargs="+", type=str, default=[], help="What the images should not show.")
    sub.add_argument(
        "--negative_images", nargs="+", type=str, default=[], help="Images that the results should not resemble."
    )
    sub.add_argument(
        "--templates",
        nargs="*",
        type=str,
        help="Prompt templates, such as 'a photo of a {}', for query texts of up to three words. The embeddings of the "
        "text and of the filled-in templates are averaged. Default: the templates saved with the model. --templates "
        "without a value disables templates.",
    )
    sub.add_argument("--top", type=PositiveInt, default=10, help="Maximum number of results.")
    sub.add_argument("--show_weak", action="store_true", help="Also show results if no image is close to the query.")
    sub.add_argument(
        "--no_words",
        action="store_true",
        help="Rank only by similarity. By default, images rank higher if their captions, recognised text, file name, "
        "camera and date contain all words in the query.",
    )
    sub.add_argument(
        "--no_group",
        action="store_true",
        help="Show similar images as separate results. By default, a burst or the edited copies of an image form one "
        "result.",
    )


def _add_output_arguments(sub: ArgumentParser) -> None:
    sub.add_argument(
        "--json",
        action="store_true",
        help="Print each result as a JSON object with rank, score, relevance, path, duplicates, similar, captions, "
        "text, matched and the metadata of the image.",
    )
    sub.add_argument(
        "--explain",
        action="store_true",
        help="Also print the effect of each word of the query on the similarity of the first result.",
    )
    sub.add_argument("--paths", action="store_true", help="Print only the paths, one per line.")


def _run_index(args: Namespace) -> list[str]:
    from llm2clip.io_utils import require_extra
    from llm2clip.search.backends import check_backend_packages, get_backend_name, hide_password, open_backend

    if get_backend_name(args.out) == "sqlite":
        check_output_folder(args.out, "index")
    check_backend_packages(args.out)
    if args.ocr:
        require_extra("ocr", "--ocr")
    if not args.prune:
        check_sources_exist(args.data)
    if not (args.prune or os.path.exists(args.out)):  # an update reports missing images and suggests --prune
        check_data_sources(args, require_captions=False)
    args.model = _choose_index_model(args.out) if args.model is None else resolve_model_name(args.model)
    from llm2clip.data.skip_log import SkipLog
    from llm2clip.models.dual_encoder import open_dual_encoder
    from llm2clip.models.llm2clip import check_truncate_dim
    from llm2clip.models.text_graph import save_text_graph
    from llm2clip.runs.ranks import print_once
    from llm2clip.search.build import IndexOptions, build_index
    from llm2clip.search.ocr import open_text_recognizer

    recognize = open_text_recognizer() if args.ocr else None
    model = open_dual_encoder(args.model)  # loaded before --out is created, because loading may fail
    if args.dim is not None:
        check_truncate_dim(args.dim, model.embed_dim, model.name)
    backend = open_backend(args.out, write=True)
    skipped_file = None if "://" in args.out else Path(args.out) / "skipped.jsonl"
    if skipped_file is not None and not skipped_file.exists():
        skipped_file.touch(mode=0o600)  # file names may be private

    def update_index() -> tuple[IndexReport, SkipLog]:
        log = SkipLog(skipped_file, args.max_skipped)
        options = dataclasses.replace(make_options_from_args(IndexOptions, args), recognize=recognize)
        return build_index(args.data, model, backend, log, options), log

    report, log = update_index()
    save_text_graph(model)
    if args.watch is not None:
        print_once(f"{datetime.now():%H:%M:%S} {report}", log.summary())
        print_once(f"Watching {', '.join(args.data)}; press Ctrl-C to stop.")
    while args.watch is not None:
        time.sleep(args.watch)
        try:
            report, log = update_index()
        except (OSError, ValueError) as error:  # the cause may be temporary, such as an unmounted disk
            print_once(f"{datetime.now():%H:%M:%S} {error}")
            continue
        if report:
            print_once(f"{datetime.now():%H:%M:%S} {report}", log.summary())
    print_once(str(report), log.summary())
    return _describe_updated_index(hide_password(args.out), backend, log, skipped_file)


def _describe_updated_index(location: str, backend: IndexBackend, log: SkipLog, skipped_file: Path | None) -> list[str]:
    """Return the lines to print about an updated index. `location` must not contain a password."""
    images, contents = backend.count()
    lines = [f"Index: {location} ({format_count(images, 'image')}, {contents:,} distinct)"]
    for names in backend.duplicates(limit=3):
        lines.append("Duplicates: " + ", ".join(names[:4]))
    if log.skipped and skipped_file:
        lines.append(f"Skipped images: {log.skipped.total():,}, listed in {skipped_file}")
    unread = log.dropped["text not recognised"]
    if unread:
        listed = f", listed in {skipped_file}" if skipped_file else ""
        lines.append(f"Images whose text could not be recognised: {unread:,}{listed}")
    if images:
        lines.append(f"Next: {shlex.join(['llm2clip', 'search', location, 'a description of an image'])}")
        lines.append(f"      {shlex.join(['llm2clip', 'serve', location])}")
    return lines


def _choose_index_model(location: str) -> str:
    """Return the model of an existing index or, for a new index, the default model.

    Raises:
        OSError: The default model is required, but the hub cannot be reached.
    """
    from llm2clip.models.loading import check_model_source, find_hub_problem
    from llm2clip.search.backends import INDEX_FILE, open_backend

    if "://" in location or (Path(location) / INDEX_FILE).is_file():
        with suppress(FileNotFoundError):  # raised if the index has no images
            return str(open_backend(location).metadata()["model"])
    try:
        check_model_source(DEFAULT_MODEL)
    except FileNotFoundError as error:
        raise OSError(
            f"without --model, `index` needs {DEFAULT_MODEL}, but {find_hub_problem()}. Pass a model folder with "
            "--model. `llm2clip quickstart` and `llm2clip fit` can train a model without the hub"
        ) from error
    print(
        f"Model: {DEFAULT_MODEL} (English; MIT licence; the first use downloads 605 MB). To use another model, such as "
        "RUN/model of your own `fit` run, use --model."
    )
    return DEFAULT_MODEL


def _run_search(args: Namespace) -> list[str]:
    if args["index"] is None and args.server is None:
        raise ValueError("pass an index, or the address of a running server with --server")
    if args.server is None:
        check_index_exists(args["index"], args.words)
    elif args["index"] is not None:
        args.words.insert(0, args["index"])  # with --server, all positional arguments are words of the query
    args.texts = [*([" ".join(args.words)] if args.words else []), *args.text]
    _check_query_arguments(args)
    _check_output_flags(args)
    image_filter = _parse_filter_arguments(args)
    if args.server is not None:
        return _search_on_server(args, image_filter)
    if args.model is not None:
        args.model = resolve_model_name(args.model)
    from llm2clip.models.prompts import QueryTemplates, check_prompt_templates

    check_prompt_templates(args.templates or [], "--templates")
    from llm2clip.search.index import Index, SearchOptions
    from llm2clip.search.query import SearchQuery

    templates = None if args.templates is None else QueryTemplates(tuple(args.templates))
    query = SearchQuery(args.texts, args.images, args.negative, args.negative_images, templates=templates)
    options = SearchOptions(not args.no_words, not args.no_group, args.show_weak)
    with redirect_stdout(sys.stderr):  # keeps other messages out of the output of --json and --paths
        index = Index.open(args["index"], args.model)
        page = index.search(query, args.top, filter=image_filter, options=options)
    return _print_search_results(args, index, query, page, image_filter)


def _search_on_server(args: Namespace, image_filter: Filter) -> list[str]:
    from llm2clip.cli.server_index import ServerIndexClient, encode_images

    for name in ("model", "templates"):
        if args[name] is not None:
            raise ValueError(f"--{name} cannot be used with --server: the server uses its own model and templates")
    index = ServerIndexClient(args.server, args.token)
    query = {
        "texts": args.texts,
        "images": encode_images(args.images),
        "negative_texts": args.negative,
        "negative_images": encode_images(args.negative_images),
    }
    page = index.search(
        query,
        top=args.top,
        filter=dict(image_filter.values),
        words=not args.no_words,
        group_similar=not args.no_group,
        show_weak=args.show_weak,
    )
    return _print_search_results(args, index, query, page, image_filter)


def _print_search_results(
    args: Namespace, index: Index | ServerIndexClient, query: Any, page: SearchPage, image_filter: Filter
) -> list[str]:
    from rich.console import Console

    if page.nothing_close and (args.json or args.paths):
        print(NOTHING_CLOSE, file=sys.stderr)
    if args.json:
        return [format_hit_as_json(rank, hit) for rank, hit in enumerate(page.hits, 1)]
    if args.paths:
        return [hit.images[0].name for hit in page.hits]
    if not page.hits:
        return [NOTHING_CLOSE if page.nothing_close else _explain_missing_results(args, index, image_filter)]
    print_hits(page.hits, Console())
    if args.explain:
        print_explanation(index.explain(query, page.hits[0].id), Console())
    if page.nothing_close:
        return ["None of these images is close to the query."]
    has_query = bool(args.texts or args.images)
    return [NOT_CALIBRATED] if has_query and page.hits[0].relevance is None else []


def _explain_missing_results(args: Namespace, index: Index | ServerIndexClient, image_filter: Filter) -> str:
    from llm2clip.cli.server_index import ServerIndexClient

    if isinstance(index, ServerIndexClient):
        return "No results: the index is empty, or no image matches the filters."
    if not index.backend.count()[0]:
        return "No results: the index is empty."
    unmatched = []  # filters that match no image even without the other filters
    for name, value in image_filter.values.items():
        if not index.backend.count_matches(Filter(**{name: value})):
            unmatched.append(name)
    flags = [f"--{name} {args[name]}" for name in unmatched or image_filter.values]
    return f"No results: no image matches {' and '.join(flags)}."


def _check_output_flags(args: Namespace) -> None:
    if args.json and args.paths:
        raise ValueError("--json and --paths cannot be combined")
    if args.explain and not args.texts:
        raise ValueError("--explain requires a query text")
    if args.explain and (args.json or args.paths):
        raise ValueError("--explain prints a table, so it cannot be combined with --json or --paths")


def _check_query_arguments(args: Namespace) -> None:
    has_query = args.texts or args.images or args.negative or args.negative_images
    if not has_query and all(args[name] is None for name in CONDITIONS):
        raise ValueError("pass text or images to search for, or a filter such as --after 2024-05-31")
    from llm2clip.io_utils import check_texts_not_empty

    check_texts_not_empty(args.texts)
    check_texts_not_empty(args.negative)
    for image in (*args.images, *args.negative_images):
        if not os.path.exists(image):
            raise FileNotFoundError(f"No such file: {image}")


def _parse_filter_arguments(args: Namespace) -> Filter:
    """Create a filter from `args`. Raise ValueError if a time is invalid, or if --after is later than --before."""
    values = {name: args[name] for name in CONDITIONS}
    for name, condition in CONDITIONS.items():
        if condition.kind.endswith("time"):
            values[name] = parse_iso_timestamp(values[name], f"--{name}", end_of_day=condition.kind == "last time")
    values["path"] = resolve_path_filter(values["path"])
    after, before = values["after"], values["before"]
    if after is not None and before is not None and after > before:
        raise ValueError(f"--after {args.after} is later than --before {args.before}, so no image can match")
    return Filter(**values)


def parse_iso_timestamp(text: str | None, option: str, end_of_day: bool = False) -> float | None:
    """Convert an ISO 8601 date or time to a Unix timestamp.

    Args:
        end_of_day: If True, a date without a time means the end of the day instead of its start.

    Raises:
        ValueError: The text is not a valid date or time.
    """
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise ValueError(
            f"{option} must be a date or a date and time, such as 2024-05-31 or 2024-05-31T12:00 "
            f"(got {text!r}: {error})"
        ) from error
    if end_of_day and len(text) <= len("2024-05-31"):
        moment = datetime.combine(moment, time_type.max)
    return moment.timestamp()


def resolve_path_filter(path: str | None) -> str | None:
    """Convert a path filter to the form of paths in an index: absolute, with symbolic links resolved.

    A relative path that does not exist is returned unchanged, because it can match paths in any folder.
    """
    from llm2clip.io_utils import to_valid_unicode

    if path is None:
        return None
    path = os.path.expanduser(path)
    return to_valid_unicode(os.path.realpath(path) if os.path.isabs(path) or os.path.exists(path) else path)


# ---- output ----------------------------------------------------------------------------------------------------------


def print_hits(hits: Sequence[Hit], console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table()
    table.add_column("", justify="right")
    table.add_column("date" if hits[0].score is None else "cosine", justify="right")
    table.add_column("file", overflow="fold")
    for rank, hit in enumerate(hits, 1):
        first = hit.images[0]
        lines = []
        if hit.image_count > 1:
            lines.append(f"and {format_count(hit.image_count - 1, 'duplicate')}")
        if first.captions:
            lines.append(_shorten_text(first.captions[0]))
        if hit.text:
            lines.append(f"text: {_shorten_text(hit.text)}")
        if hit.similar:
            lines.append(f"+{len(hit.similar)} similar")
        if hit.matched:
            lines.append(f"matched: {', '.join(hit.matched)}")
        description = Text(_replace_unprintable_characters(first.name))
        description.append("".join(f"\n{line}" for line in lines), style="dim")
        score = f"{datetime.fromtimestamp(first.taken):%Y-%m-%d}" if hit.score is None else f"{hit.score:.3f}"
        table.add_row(str(rank), score, description)
    console.print(table)


def print_explanation(explanation: Explanation, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Effect of each word on the first result's cosine similarity", title_justify="left")
    table.add_column("word", overflow="fold")
    table.add_column("effect", justify="right")
    for word in explanation.words:
        table.add_row(Text(_replace_unprintable_characters(word.text)), f"{word.effect:+.3f}")
    console.print(table)


def format_hit_as_json(rank: int, hit: Hit) -> str:
    """Format a search result as a single line of JSON, with local times in ISO 8601 format."""
    first, *duplicates = hit.images
    values = {
        "rank": rank,
        "score": None if hit.score is None else round(float(hit.score), 4),
        "relevance": None if hit.relevance is None else round(hit.relevance, 4),
        "path": first.name,
        "duplicates": [image.name for image in duplicates],
        "similar": [other.name for other in hit.similar],
        "captions": list(first.captions),
        "text": hit.text,
        "matched": list(hit.matched),
        **metadata_to_json(first, IMAGE_FIELDS),
        **metadata_to_json(hit, CONTENT_FIELDS),
    }
    text = json.dumps(values, ensure_ascii=False)
    return re.sub(r"[\x7f-\x9f]", lambda match: f"\\u{ord(match[0]):04x}", text)  # escapes terminal control characters


def _replace_unprintable_characters(text: str) -> str:
    """Replace unprintable characters with spaces, because terminals would interpret control characters."""
    return "".join(c if c.isprintable() else " " for c in text)


def _shorten_text(text: str) -> str:
    return shorten(_replace_unprintable_characters(text), CAPTION_LENGTH, placeholder=" …")
