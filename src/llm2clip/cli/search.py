"""`llm2clip index`, `search` and `serve`."""

from __future__ import annotations

from jsonargparse import Namespace

from llm2clip.cli.commands import Commands, select


def add(commands: Commands) -> None:
    """The verbs of this file."""
    sub = commands.add("index", _index, "Pictures into an index, to be searched; again, it takes what changed.")
    sub.add_argument("data", nargs="+", type=str, help="sources of pictures, with or without captions")
    sub.add_argument("--model", type=str, required=True, help="model folder, or any model as for `evaluate`")
    sub.add_argument("--out", type=str, required=True, help="index folder; or qdrant+http://HOST:6333/COLLECTION")
    sub.add_argument("--watch", type=float, help="look again after so many seconds, for ever")
    sub.add_argument("--gone", action="store_true", help="sources that are not there any more: drop their pictures")
    sub.add_argument("--columns", type=dict[str, str], default={}, help="our field to the source's column")
    sub.add_argument("--max_skipped", type=float, default=1.0, help="largest share of bad pictures put up with")
    sub.add_argument("--batch", type=int, default=64, help="pictures in a pass, and kept at once")
    sub.add_argument("--workers", type=int, help="processes that decode; half of the cores")
    sub.add_argument(
        "--approximate_above", type=int, default=1_000_000, help="different pictures from which a graph is searched"
    )

    sub = commands.add(
        "search", _search, "Find pictures of an index by texts and pictures, in any language that the model knows."
    )
    sub.add_argument("index", type=str, help="index folder or URL")
    sub.add_argument("texts", nargs="*", type=str, default=[], help="what the pictures show")
    sub.add_argument("--images", nargs="+", type=str, default=[], help="pictures that they are like")
    sub.add_argument("--without", nargs="+", type=str, default=[], help="what they do not show")
    sub.add_argument("--without_images", nargs="+", type=str, default=[], help="pictures that they are unlike")
    sub.add_argument("--top", type=int, default=10, help="how many")
    sub.add_argument("--under", type=str, help="folder, tar or file that they lie in")
    sub.add_argument("--caption", type=str, help="words that one of their captions contains")
    sub.add_argument("--after", type=str, help="taken then or later: 2024-05-31, or with a time")
    sub.add_argument("--before", type=str, help="taken then or earlier")
    sub.add_argument("--larger", type=int, help="pixels of the shorter side, at least")
    sub.add_argument("--model", type=str, help="where the index's model is now, if it moved")
    sub.add_argument("--sheet", type=str, help="folder for a contact sheet, an HTML page")
    sub.add_argument("--open", action="store_true", help="open the contact sheet in a browser")

    sub = commands.add("serve", _serve, "Search and embeddings over HTTP, and a page to search with.")
    sub.add_argument("--index", type=str, help="index folder or URL; without one, embeddings alone")
    sub.add_argument("--model", type=str, help="the index's, if it moved; or any, without an index")
    sub.add_argument("--host", type=str, default="127.0.0.1", help="address to listen at; 0.0.0.0 is all, with a token")
    sub.add_argument("--port", type=int, default=7860, help="port")
    sub.add_argument("--token", type=str, help="that requests must bear; also LLM2CLIP_TOKEN; made up if one is needed")
    sub.add_argument("--batch", type=int, default=32, help="texts, or pictures, that go through the model together")
    sub.add_argument("--waiting", type=int, default=512, help="texts, or pictures, that may wait; then 429")
    sub.add_argument("--seconds", type=float, default=30.0, help="that a request may take; then 504")
    sub.add_argument("--precision", type=str, default="auto", help="texts are read in: fp32, bf16, or auto, the faster")


def _index(given: Namespace) -> list[str]:
    from llm2clip.search.verbs import index_verb

    names = ("watch", "columns", "max_skipped", "batch", "workers", "approximate_above", "gone")
    return index_verb(given.data, given.model, given.out, **select(given, *names))


def _search(given: Namespace) -> list[str]:
    from llm2clip.search.types import Filter
    from llm2clip.search.verbs import canonical_path, parse_time, search_verb

    return search_verb(
        given["index"],
        given.texts or [],
        images=given.images,
        without=given.without,
        without_images=given.without_images,
        top=given.top,
        only=Filter(
            canonical_path(given.under),
            given.caption,
            parse_time(given.after),
            parse_time(given.before, True),
            given.larger,
        ),
        model=given.model,
        sheet=given.sheet,
        opened=given.open,
    )


def _serve(given: Namespace) -> list[str]:
    from llm2clip.search.verbs import serve_verb

    names = ("model", "host", "port", "token", "batch", "waiting", "seconds", "precision")
    return serve_verb(given["index"], **select(given, *names))
