"""The engines by name: a folder here, or the URL of a vector engine."""

from __future__ import annotations

from pathlib import Path

from llm2clip.search.types import Backend

QDRANT = "qdrant+"


def open_backend(where: str, write: bool = False, **options: int) -> Backend:
    """The index at a folder, or at `qdrant+http://HOST:6333/COLLECTION`.

    Args:
        where: it is.
        write: make it if it is not there.
        options: of `LocalIndex`.

    Raises:
        FileNotFoundError: there is no index.
        ImportError: what it takes is not installed.
        ValueError: it is a URL of something else.
    """
    try:
        if "://" in where and not where.startswith(QDRANT):
            raise ValueError(f"{where}: an index elsewhere is written {QDRANT}http://HOST:6333/COLLECTION")
        if where.startswith(QDRANT):
            from llm2clip.search.qdrant_backend import QdrantBackend

            return QdrantBackend.of_url(where.removeprefix(QDRANT), write)
        from llm2clip.search.sqlite_backend import SqliteBackend

        return SqliteBackend(Path(where), write, **options)
    except ModuleNotFoundError as error:
        extra = "qdrant" if where.startswith(QDRANT) else "search"
        raise ImportError(f"{where}: this index needs `pip install 'llm2clip[{extra}]'` ({error})") from error
