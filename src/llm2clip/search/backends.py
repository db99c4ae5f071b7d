"""Base class of index backends, and a function that opens an index.

An index is stored in a local folder (SQLite) or in a schema of a PostgreSQL database.
"""

import importlib
import json
import re
import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from llm2clip.io_utils import check_extra
from llm2clip.search.metadata import (
    CONDITIONS,
    CONTENT_CONDITIONS,
    CONTENT_FIELDS,
    IMAGE_FIELDS,
    Filter,
    list_columns,
    read_columns,
)
from llm2clip.search.types import Hit, ImageState, IndexedContent, IndexedImage, ref_from_json, ref_to_json
from llm2clip.search.words import MAX_FUSED, WordQuery, find_matched_fields, fuse_rankings

# Backend of each URL scheme, and the form of the URLs. The module `search.NAME_backend` defines `open_index`, and the
# extra with this name installs its packages. Locations without a scheme are folders.
BACKENDS = {"postgresql": "postgres", "postgres": "postgres"}
URL_FORM = "postgresql://USER@HOST/DATABASE?schema=NAME"
# Parameters of index URLs that messages contain. Others can contain secrets, such as `password` or `options`.
PUBLIC_PARAMETERS = ("schema", "user", "host", "hostaddr", "port", "dbname", "service", "sslmode", "connect_timeout")
INDEX_FILE = "index.sqlite"  # main file of an index folder
FORMAT_VERSION = 2  # version of the index format
NEW_INDEX_ADVICE = "Build a new index in another folder with `llm2clip index`"
IMAGE_COLUMNS = ("name", "location", "source", "file_version", "captions", *list_columns(IMAGE_FIELDS))
CONTENT_COLUMNS = tuple(list_columns(CONTENT_FIELDS))

Result = TypeVar("Result")
# Runs an SQL statement, whose parameters have the form `:NAME`, and returns all rows.
Query = Callable[[str, Mapping[str, Any]], list[tuple[Any, ...]]]


@dataclass
class SqlConditions:
    """SQL conditions of a filter on rows of `images`, on the captions of such a row, and on rows of `contents`."""

    images: list[str] = field(default_factory=list)
    captions: str | None = None
    contents: list[str] = field(default_factory=list)
    parameters: dict[str, Any] = field(default_factory=dict)


class Backend(ABC):
    """Base class of indexes, which store images and search them by embedding.

    The tables `contents`, `thumbnails`, `images`, `metadata`, `calibration` and `recognized_texts` are the same in all
    backends. Statements that all databases understand are in this class. Methods raise IndexUnavailableError if the
    database cannot be read.
    """

    # Condition for rows whose value is in the JSON list :ids. It is one parameter, so that databases compile and cache
    # one statement for any number of ids.
    IN_IDS: str

    # ---- building

    @abstractmethod
    def lock(self) -> AbstractContextManager[None]:
        """Prevent other runs from writing to the index. Raise FolderInUseError if another run holds the lock."""

    @abstractmethod
    def metadata(self) -> dict[str, Any]:
        """Return the index metadata, or an empty dict if `initialize` has not been called.

        The keys are `model` (the model's name), `embed_dim` (the number of dimensions of the vectors, which may be
        truncated), and either `fingerprint` (the model's fingerprint) or `image_fingerprint` and `text_fingerprint`
        (those of its image encoder and text encoder).
        """

    @abstractmethod
    def initialize(self, metadata: Mapping[str, Any]) -> None:
        """Store the metadata and prepare the backend for adding images."""

    def indexed(self, sources: Sequence[str]) -> dict[str, ImageState]:
        """Return the states of the images from the given sources or inside their paths, keyed by image name."""
        states = {}
        for source in sources:
            condition, parameters = self._make_source_condition(source)
            statement = f"SELECT name, file_version, captions FROM images WHERE {condition}"
            for name, file_version, captions in self._query(statement, parameters):
                state = ImageState(self._decode(file_version), tuple(json.loads(captions)))
                states[self._decode(name)] = state
        return states

    @abstractmethod
    def existing(self, hashes: Iterable[bytes]) -> set[bytes]:
        """Return the subset of the given content hashes that are already in the index."""

    @abstractmethod
    def add(self, contents: Sequence[IndexedContent], images: Sequence[tuple[IndexedImage, bytes]]) -> None:
        """Add contents, and pairs of image and content hash, in one transaction.

        An image replaces any existing image of the same name.
        """

    @abstractmethod
    def remove(self, names: Sequence[str]) -> None:
        """Remove images by name, then remove all contents that no longer belong to any image."""

    def finish(self) -> None:  # noqa: B027  (optional)
        """Complete an indexing run. Call this after all images have been added and removed."""

    def contents_without_text(self, sources: Sequence[str]) -> list[tuple[bytes, IndexedImage]]:
        """Return content hash and image of the contents in which no text has been recognised yet, as in `indexed`."""
        missing: dict[bytes, IndexedImage] = {}
        for source in sources:
            condition, parameters = self._make_source_condition(source)
            statement = (
                f"SELECT hash, {', '.join(IMAGE_COLUMNS)} FROM images JOIN contents ON contents.id = images.content "
                "WHERE NOT EXISTS (SELECT 1 FROM recognized_texts WHERE recognized_texts.content = contents.id) "
                f"AND {condition}"
            )
            for digest, *row in self._query(statement, parameters):
                missing.setdefault(bytes(digest), self._image_from_row(row))
        return list(missing.items())

    @abstractmethod
    def set_texts(self, texts: Mapping[bytes, str]) -> None:
        """Store the texts recognised in images, keyed by content hash."""

    # ---- searching

    def count(self) -> tuple[int, int]:
        """Return the number of images and the number of distinct image contents."""
        statement = "SELECT (SELECT count(*) FROM images), (SELECT count(*) FROM contents)"
        ((images, contents),) = self._query(statement, {})
        return images, contents

    def duplicates(self, limit: int = 10) -> list[list[str]]:
        """Return the names of duplicate images, grouped by content: at most `limit` groups, largest first."""
        largest_groups = (
            "SELECT content FROM images GROUP BY content HAVING count(*) > 1 "
            "ORDER BY count(*) DESC, content LIMIT :limit"
        )
        groups = []
        for (content_id,) in self._query(largest_groups, {"limit": limit}):
            names = self._query("SELECT name FROM images WHERE content = :id", {"id": content_id})
            groups.append(sorted(self._decode(name) for (name,) in names))
        return groups

    def search(
        self,
        vector: np.ndarray | None,
        count: int,
        image_filter: Filter,
        offset: int = 0,
        words: Sequence[str] = (),
    ) -> list[Hit]:
        """Return the images that match a filter, most similar to the query vector first.

        Images whose texts contain all words of the query are ranked higher (see `search.words`), so the scores of the
        hits, which are cosine similarities, are then not sorted. Without a query vector, return the newest images
        first. If several files of an image match the filter, the latest of their capture times is used. Equal times are
        ordered by id.

        Args:
            vector: L2-normalised query vector of shape (D,), float32, or None.
            offset: Number of hits to skip.
            words: Texts of the query, for word search. Used only with a query vector.
        """
        query = WordQuery() if vector is None else WordQuery.parse(words)

        def read(run: Query) -> list[Hit]:
            matches = self._find_word_matches(run, query, image_filter) if query else np.empty(0, np.int64)
            scores: dict[int, float] = {}
            if vector is None and image_filter:
                ids = self._find_newest(run, image_filter, count, offset)
            elif vector is None:
                ids = self._find_newest_unfiltered(run, count, offset)
            else:
                depth = max(offset + count, MAX_FUSED) if len(matches) else offset + count
                nearest, cosines = self._find_nearest(run, vector.astype(np.float32), depth, image_filter)
                scores = dict(zip(nearest.tolist(), cosines.tolist(), strict=True))
                ranking = fuse_rankings(nearest, matches) if len(matches) else nearest
                ids = ranking[offset : offset + count].tolist()
                others = self._fetch_vectors(run, [content_id for content_id in ids if content_id not in scores])
                scores |= {content_id: float(other @ vector) for content_id, other in others.items()}
            matched_ids = sorted(set(ids) & set(matches.tolist()))
            matched = {}
            if matched_ids:
                matched = find_matched_fields(query, self._read_word_fields(run, query, matched_ids))
            return self._read_hits(run, ids, scores, matched, image_filter)

        return self._read(read)

    def _read_hits(
        self,
        run: Query,
        ids: Sequence[int],
        scores: Mapping[int, float],
        matched: Mapping[int, tuple[str, ...]],
        image_filter: Filter,
    ) -> list[Hit]:
        names = [item.name for item in CONTENT_FIELDS]
        rows = run(
            "SELECT id, (SELECT count(*) FROM images WHERE content = contents.id), "
            f"(SELECT text FROM recognized_texts WHERE content = contents.id), {', '.join(names)} "
            f"FROM contents WHERE id {self.IN_IDS}",
            {"ids": json.dumps(list(ids))},
        )
        contents = {content_id: values for content_id, *values in rows}
        images = self._read_images(run, ids, self._make_conditions(image_filter))
        hits = []
        for content_id in ids:
            if content_id in contents and content_id in images:
                image_count, text, *values = contents[content_id]
                hit = Hit(
                    str(content_id),
                    scores.get(content_id),
                    images[content_id],
                    image_count,
                    matched.get(content_id, ()),
                    self._decode(text or ""),
                    **dict(zip(names, values, strict=True)),
                )
                hits.append(hit)
        return hits

    @abstractmethod
    def count_matches(self, image_filter: Filter) -> int:
        """Return the number of distinct images that match a filter."""

    def vector(self, hit_id: str) -> np.ndarray | None:
        return self.vectors([hit_id]).get(hit_id)

    def vectors(self, hit_ids: Sequence[str]) -> dict[str, np.ndarray]:
        """Return the embeddings of hits in the given order, of shape (D,), float32. Unknown ids are skipped."""
        ids = [parse_content_id(hit_id) for hit_id in hit_ids]
        vectors = self._read(lambda run: self._fetch_vectors(run, ids))
        return {hit_id: vectors[i] for hit_id, i in zip(hit_ids, ids, strict=True) if i in vectors}

    def sample_ids(self, count: int) -> list[str]:
        """Return the hit ids of at most `count` distinct images, chosen at random. Equal indexes give equal samples."""
        statement = "SELECT id FROM contents ORDER BY hash LIMIT :count"  # hashes are random
        return [str(content_id) for (content_id,) in self._query(statement, {"count": count})]

    def read_hits(self, hit_ids: Sequence[str]) -> list[Hit]:
        """Return hits without scores, in the given order. Unknown ids are skipped."""
        ids = [parse_content_id(hit_id) for hit_id in hit_ids]
        return self._read(lambda run: self._read_hits(run, ids, {}, {}, Filter()))

    def list_ids(self, after: str, count: int) -> list[str]:
        """Return at most `count` hit ids greater than `after`, in ascending order. Start with `after="0"`."""
        statement = "SELECT id FROM contents WHERE id > :after ORDER BY id LIMIT :count"
        rows = self._query(statement, {"after": int(after), "count": count})
        return [str(content_id) for (content_id,) in rows]

    def save_calibration(self, data: bytes) -> None:
        """Store a serialized `search.relevance.Calibration`, or empty bytes if the index cannot be calibrated."""
        with self._write() as run:
            run("DELETE FROM calibration", {})
            run("INSERT INTO calibration VALUES (:data)", {"data": data})

    def load_calibration(self) -> bytes | None:
        """Return the data from `save_calibration`, or None if it has never been called."""
        rows = self._query("SELECT data FROM calibration", {})
        return bytes(rows[0][0]) if rows else None

    def thumbnail(self, hit_id: str) -> bytes | None:
        """Return a hit's JPEG thumbnail, or None if the id is unknown."""
        rows = self._query("SELECT jpeg FROM thumbnails WHERE id = :id", {"id": parse_content_id(hit_id)})
        return bytes(rows[0][0]) if rows else None

    def images(self, hit_id: str) -> tuple[IndexedImage, ...]:
        """Return at most MAX_LOCATIONS images with a hit's content, or an empty tuple if the id is unknown."""
        content_id = parse_content_id(hit_id)
        images = self._read(lambda run: self._read_images(run, [content_id], SqlConditions()))
        return images.get(content_id, ())

    # ---- statements of each database

    @abstractmethod
    def _read(self, function: Callable[[Query], Result]) -> Result:
        """Call a function with a function that runs statements that only read."""

    @abstractmethod
    def _write(self) -> AbstractContextManager[Query]:
        """Return the context manager of a transaction, which is rolled back if an exception is raised."""

    def _query(self, statement: str, parameters: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        return self._read(lambda run: run(statement, parameters))

    @abstractmethod
    def _make_source_condition(self, source: str) -> tuple[str, dict[str, Any]]:
        """Return the condition for images from a source or inside its path, and its parameters."""

    @abstractmethod
    def _make_path_condition(self, path: str) -> tuple[str, dict[str, Any]]:
        """Return the condition of a path filter, and its parameters."""

    @abstractmethod
    def _make_caption_condition(self, caption: str) -> tuple[str, dict[str, Any]]:
        """Return the condition of a caption filter, and its parameters."""

    def _make_conditions(self, image_filter: Filter) -> SqlConditions:
        conditions = SqlConditions()
        for name, value in image_filter.values.items():
            if name == "path":
                condition, parameters = self._make_path_condition(value)
                conditions.images.append(condition)
            elif name == "caption":
                conditions.captions, parameters = self._make_caption_condition(value)
            else:
                declared = CONDITIONS[name]
                parameters = {name: declared.to_parameter(value)}
                target = conditions.contents if declared in CONTENT_CONDITIONS else conditions.images
                target.append(f"({declared.sql})")
            conditions.parameters |= parameters
        return conditions

    @abstractmethod
    def _find_newest(self, run: Query, image_filter: Filter, count: int, offset: int) -> list[int]:
        """Return a page of content ids, sorted by the latest time of the matching images."""

    def _find_newest_unfiltered(self, run: Query, count: int, offset: int) -> list[int]:
        # The database reads only this many images, with the index `images_taken`. Some of them may be duplicates.
        limit = 2 * (offset + count)
        while True:
            rows = run("SELECT content FROM images ORDER BY taken DESC, content LIMIT :limit", {"limit": limit})
            ids = list(dict.fromkeys(content for (content,) in rows))
            if len(ids) >= offset + count or len(rows) < limit:
                return ids[offset : offset + count]
            limit *= 4

    @abstractmethod
    def _find_nearest(
        self, run: Query, vector: np.ndarray, depth: int, image_filter: Filter
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the int64 ids of the `depth` contents most similar to a vector, and their cosine similarities."""

    @abstractmethod
    def _find_word_matches(self, run: Query, query: WordQuery, image_filter: Filter) -> np.ndarray:
        """Return the ids of at most MAX_FUSED contents with all words, best first. None if too many images match."""

    @abstractmethod
    def _read_word_fields(self, run: Query, query: WordQuery, ids: Sequence[int]) -> list[tuple[int, dict[str, str]]]:
        """Return the ids of the given contents and the fields of their images that contain all words of a query."""

    @abstractmethod
    def _read_images(
        self, run: Query, ids: Sequence[int], conditions: SqlConditions
    ) -> dict[int, tuple[IndexedImage, ...]]:
        """Return at most MAX_LOCATIONS images per content, sorted by name, those that match the conditions first.

        If there are more images, return those indexed first, so that the database can stop reading early.
        """

    def _fetch_vectors(self, run: Query, ids: Sequence[int]) -> dict[int, np.ndarray]:
        """Return the float32 vectors with the given content ids. Unknown ids are skipped."""
        statement = f"SELECT id, vector FROM contents WHERE id {self.IN_IDS}"
        rows = run(statement, {"ids": json.dumps(list(ids))}) if len(ids) else []
        return {content_id: self._decode_vector(vector) for content_id, vector in rows}

    @abstractmethod
    def _decode_vector(self, vector: Any) -> np.ndarray:
        """Return a value of the column `vector` as a float32 array of shape (D,)."""

    # ---- rows

    def _encode(self, text: str) -> str:
        """Convert a text to a form that the database can store."""
        return text

    def _decode(self, text: str) -> str:
        return text

    def _image_to_row(self, image: IndexedImage) -> dict[str, Any]:
        row = {"name": image.name, "location": ref_to_json(image.ref), "source": image.source}
        row |= {"file_version": image.file_version, "captions": json.dumps(image.captions)}
        row |= read_columns(image, IMAGE_FIELDS)
        return {name: self._encode(value) if isinstance(value, str) else value for name, value in row.items()}

    def _image_from_row(self, row: Sequence[Any]) -> IndexedImage:
        values: dict[str, Any] = {}
        for name, value in zip(IMAGE_COLUMNS, row, strict=True):
            if not name.startswith("folded_"):
                values[name] = self._decode(value) if isinstance(value, str) else value
        ref, captions = ref_from_json(values.pop("location")), tuple(json.loads(values.pop("captions")))
        return IndexedImage(ref=ref, captions=captions, **values)


# ---- opening


def format_missing_index_message(folder: str | Path) -> str:
    out = shlex.quote(str(folder))
    return f"{folder} is not an index. Create an index with: llm2clip index PHOTOS --model MODEL --out {out}"


def open_backend(location: str, write: bool = False) -> Backend:
    """Open the index in a local folder or at a URL of the form URL_FORM.

    Args:
        write: If True, create the index if it does not exist.

    Raises:
        FileNotFoundError: `write` is False, and there is no index at the location.
        ImportError: A required package is not installed.
        ValueError: The URL is invalid, or a password or data would be sent unencrypted.
        IndexUnavailableError: The server does not respond.
    """
    check_backend_packages(location)
    module = importlib.import_module(f"llm2clip.search.{get_backend_name(location)}_backend")
    backend: Backend = module.open_index(location, write)
    return backend


def check_backend_packages(location: str) -> None:
    """Raise ImportError if a package that reads the index is not installed, or ValueError if the URL is invalid."""
    name = get_backend_name(location)
    check_extra("search" if name == "sqlite" else name, f"the index {hide_password(location)}")


def get_backend_name(location: str) -> str:
    scheme, separator, _ = location.partition("://")
    if not separator:
        return "sqlite"
    if scheme not in BACKENDS:
        raise ValueError(
            f"{hide_password(location)}: unknown index backend {scheme!r}. An index is a local folder or a PostgreSQL "
            f"database. To build the index in PostgreSQL, run `llm2clip index` again with --out {URL_FORM}"
        )
    return BACKENDS[scheme]


def hide_password(location: str) -> str:
    """Return the location of an index without the secrets that a URL can contain, for messages."""
    if "://" not in location:
        return location
    location = re.sub(r"^([\w+]+://[^/?#:@]*):.*@", r"\1@", location)  # a password may contain @
    return re.sub(rf"([?&](?!(?:{'|'.join(PUBLIC_PARAMETERS)})=)[^=&#]*=)[^&#]*", r"\1***", location)


def parse_content_id(hit_id: str) -> int:
    """Convert a hit id to an integer content id. For invalid ids, return -1, which is never a content id."""
    return int(hit_id) if hit_id.isascii() and hit_id.isdigit() and len(hit_id) < 19 else -1
