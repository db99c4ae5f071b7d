"""Interface of index backends, and functions that open an index.

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

from llm2clip.io_utils import require_extra
from llm2clip.search.metadata import (
    CONDITIONS,
    CONTENT_CONDITIONS,
    CONTENT_FIELDS,
    IMAGE_FIELDS,
    Filter,
    get_column_values,
    list_column_names,
)
from llm2clip.search.types import Hit, ImageState, IndexedContent, IndexedImage, parse_image_ref, serialize_image_ref
from llm2clip.search.words import MAX_FUSED, WordQuery, find_matched_fields, fuse_rankings

# Backend of each URL scheme. A location without a scheme is a folder.
# The module of the backend NAME is `search.NAME_backend`, and the extra NAME installs its packages.
BACKENDS = {"postgresql": "postgres", "postgres": "postgres"}
URL_FORM = "postgresql://USER@HOST/DATABASE?schema=NAME"
# URL parameters that may appear in messages. Other parameters, such as `password` or `options`, can contain secrets.
PUBLIC_PARAMETERS = ("schema", "user", "host", "hostaddr", "port", "dbname", "service", "sslmode", "connect_timeout")
INDEX_FILE = "index.sqlite"
FORMAT_VERSION = 2
NEW_INDEX_ADVICE = "Build a new index in another folder with `llm2clip index`"
IMAGE_COLUMNS = ("name", "location", "source", "file_version", "captions", *list_column_names(IMAGE_FIELDS))
CONTENT_COLUMNS = tuple(list_column_names(CONTENT_FIELDS))

Result = TypeVar("Result")
# Function that runs an SQL statement with parameters of the form `:NAME` and returns all rows.
SqlRunner = Callable[[str, Mapping[str, Any]], list[tuple[Any, ...]]]


@dataclass
class SqlConditions:
    """SQL conditions of a search filter, grouped by the table to which they apply."""

    images: list[str] = field(default_factory=list)
    captions: str | None = None  # condition on the captions in the table `images`
    contents: list[str] = field(default_factory=list)
    parameters: dict[str, Any] = field(default_factory=dict)


class IndexBackend(ABC):
    """Base class of index backends, which store images and search them by embedding.

    All backends have the tables `contents`, `thumbnails`, `images`, `metadata`, `calibration` and `recognized_texts`.
    The base class contains the SQL statements that work in all databases. Methods raise IndexUnavailableError if the
    database cannot be read.
    """

    # SQL condition after a column name: its value is in the JSON list :ids. One statement works for any number of ids.
    IN_IDS: str

    # ---- building

    @abstractmethod
    def lock(self) -> AbstractContextManager[None]:
        """Lock the index for writing. Raise FolderInUseError if another process holds the lock."""

    @abstractmethod
    def read_metadata(self) -> dict[str, Any]:
        """Return the index metadata, or an empty dict if `initialize` has not been called.

        The keys are `model` (model name), `embed_dim` (dimension of the vectors, which may be truncated), and either
        `fingerprint` (fingerprint of the model) or `image_fingerprint` and `text_fingerprint` (fingerprints of the
        image encoder and the text encoder).
        """

    @abstractmethod
    def initialize(self, metadata: Mapping[str, Any]) -> None:
        """Store the metadata and prepare the backend for adding images."""

    def read_image_states(self, sources: Sequence[str]) -> dict[str, ImageState]:
        """Return the state of each image that comes from one of the sources or is inside its path, keyed by name."""
        states = {}
        for source in sources:
            condition, parameters = self._make_source_condition(source)
            statement = f"SELECT name, file_version, captions FROM images WHERE {condition}"
            for name, file_version, captions in self._query(statement, parameters):
                state = ImageState(self._unescape_text(file_version), tuple(json.loads(captions)))
                states[self._unescape_text(name)] = state
        return states

    @abstractmethod
    def find_existing_hashes(self, hashes: Iterable[bytes]) -> set[bytes]:
        """Return the subset of content hashes that are already in the index."""

    @abstractmethod
    def add_images(self, contents: Sequence[IndexedContent], images: Sequence[tuple[IndexedImage, bytes]]) -> None:
        """Add image contents and images in one transaction. `images` contains (image, content hash) pairs.

        An added image replaces an existing image with the same name.
        """

    @abstractmethod
    def remove_images(self, names: Sequence[str]) -> None:
        """Remove images by name, then remove all contents that no longer belong to any image."""

    def finish_indexing(self) -> None:  # noqa: B027  (optional)
        """Complete an indexing run after all images have been added and removed."""

    def find_contents_without_text(self, sources: Sequence[str]) -> list[tuple[bytes, IndexedImage]]:
        """Return a (content hash, image) pair for each distinct image without an OCR result.

        `sources` selects images as in `read_image_states`.
        """
        missing: dict[bytes, IndexedImage] = {}
        for source in sources:
            condition, parameters = self._make_source_condition(source)
            statement = (
                f"SELECT hash, {', '.join(IMAGE_COLUMNS)} FROM images JOIN contents ON contents.id = images.content "
                "WHERE NOT EXISTS (SELECT 1 FROM recognized_texts WHERE recognized_texts.content = contents.id) "
                f"AND {condition}"
            )
            for digest, *row in self._query(statement, parameters):
                missing.setdefault(bytes(digest), self._convert_row_to_image(row))
        return list(missing.items())

    @abstractmethod
    def save_recognized_texts(self, texts: Mapping[bytes, str]) -> None:
        """Store the texts recognised in images, keyed by content hash."""

    # ---- searching

    def count_images(self) -> tuple[int, int]:
        """Return the number of images and the number of distinct image contents."""
        statement = "SELECT (SELECT count(*) FROM images), (SELECT count(*) FROM contents)"
        ((images, contents),) = self._query(statement, {})
        return images, contents

    def find_duplicates(self, limit: int = 10) -> list[list[str]]:
        """Return the names of duplicate images, grouped by content: at most `limit` groups, largest first."""
        largest_groups = (
            "SELECT content FROM images GROUP BY content HAVING count(*) > 1 "
            "ORDER BY count(*) DESC, content LIMIT :limit"
        )
        groups = []
        for (content_id,) in self._query(largest_groups, {"limit": limit}):
            names = self._query("SELECT name FROM images WHERE content = :id", {"id": content_id})
            groups.append(sorted(self._unescape_text(name) for (name,) in names))
        return groups

    def search(
        self, vector: np.ndarray | None, count: int, image_filter: Filter, offset: int = 0, words: Sequence[str] = ()
    ) -> list[Hit]:
        """Return the images that match a filter, most similar to the query vector first.

        Images whose texts contain all words of the query are ranked higher (see `search.words`). Scores are cosine
        similarities, so the scores of a page with word matches are not always in descending order. Without a query
        vector, return the newest images first. The capture time of an image is the latest capture time of its files
        that match the filter. Ties are sorted by id.

        Args:
            vector: L2-normalised float32 query vector of shape (D,), or None.
            offset: Number of hits to skip.
            words: Query texts for word search. Ignored without a query vector.
        """
        query = WordQuery() if vector is None else WordQuery.parse(words)

        def find_hits(run: SqlRunner) -> list[Hit]:
            matches = self._find_word_matches(run, query, image_filter) if query else np.empty(0, np.int64)
            scores: dict[int, float] = {}
            if vector is None and image_filter:
                ids = self._find_newest_contents(run, image_filter, count, offset)
            elif vector is None:
                ids = self._find_newest_without_filter(run, count, offset)
            else:
                depth = max(offset + count, MAX_FUSED) if len(matches) else offset + count
                nearest, cosines = self._find_nearest_contents(run, vector.astype(np.float32), depth, image_filter)
                scores = dict(zip(nearest.tolist(), cosines.tolist(), strict=True))
                ranking = fuse_rankings(nearest, matches) if len(matches) else nearest
                ids = ranking[offset : offset + count].tolist()
                others = self._fetch_vectors(run, [content_id for content_id in ids if content_id not in scores])
                scores |= {content_id: float(other @ vector) for content_id, other in others.items()}
            matched_ids = sorted(set(ids) & set(matches.tolist()))
            matched = {}
            if matched_ids:
                matched = find_matched_fields(query, self._read_text_fields(run, query, matched_ids))
            return self._read_hits(run, ids, scores, matched, image_filter)

        return self._run_with_read_access(find_hits)

    def _read_hits(
        self,
        run: SqlRunner,
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
        images = self._read_images(run, ids, self._build_filter_conditions(image_filter))
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
                    self._unescape_text(text or ""),
                    **dict(zip(names, values, strict=True)),
                )
                hits.append(hit)
        return hits

    @abstractmethod
    def count_matches(self, image_filter: Filter) -> int:
        """Return the number of distinct images that match a filter."""

    def read_vector(self, hit_id: str) -> np.ndarray | None:
        return self.read_vectors([hit_id]).get(hit_id)

    def read_vectors(self, hit_ids: Sequence[str]) -> dict[str, np.ndarray]:
        """Return float32 embeddings of shape (D,), keyed by hit id, in the order of `hit_ids`. Skip unknown ids."""
        ids = [parse_content_id(hit_id) for hit_id in hit_ids]
        vectors = self._run_with_read_access(lambda run: self._fetch_vectors(run, ids))
        return {hit_id: vectors[i] for hit_id, i in zip(hit_ids, ids, strict=True) if i in vectors}

    def sample_ids(self, count: int) -> list[str]:
        """Return the hit ids of at most `count` distinct images. The sample depends only on the image contents."""
        statement = "SELECT id FROM contents ORDER BY hash LIMIT :count"  # the order of SHA-256 hashes is pseudorandom
        return [str(content_id) for (content_id,) in self._query(statement, {"count": count})]

    def read_hits(self, hit_ids: Sequence[str]) -> list[Hit]:
        """Return hits without scores, in the order of `hit_ids`. Skip unknown ids."""
        ids = [parse_content_id(hit_id) for hit_id in hit_ids]
        return self._run_with_read_access(lambda run: self._read_hits(run, ids, {}, {}, Filter()))

    def list_hit_ids(self, after: str, count: int) -> list[str]:
        """Return at most `count` hit ids greater than `after`, in ascending order. Start with `after="0"`."""
        statement = "SELECT id FROM contents WHERE id > :after ORDER BY id LIMIT :count"
        rows = self._query(statement, {"after": int(after), "count": count})
        return [str(content_id) for (content_id,) in rows]

    def save_calibration(self, data: bytes) -> None:
        """Store a serialised `search.relevance.Calibration`, or empty bytes if the index cannot be calibrated."""
        with self._open_transaction() as run:
            run("DELETE FROM calibration", {})
            run("INSERT INTO calibration VALUES (:data)", {"data": data})

    def load_calibration(self) -> bytes | None:
        """Return the data stored by `save_calibration`, or None if nothing has been stored."""
        rows = self._query("SELECT data FROM calibration", {})
        return bytes(rows[0][0]) if rows else None

    def read_thumbnail(self, hit_id: str) -> bytes | None:
        """Return a hit's JPEG thumbnail, or None if the id is unknown."""
        rows = self._query("SELECT jpeg FROM thumbnails WHERE id = :id", {"id": parse_content_id(hit_id)})
        return bytes(rows[0][0]) if rows else None

    def read_images(self, hit_id: str) -> tuple[IndexedImage, ...]:
        """Return at most MAX_LOCATIONS images with the content of a hit, or an empty tuple if the id is unknown."""
        content_id = parse_content_id(hit_id)
        images = self._run_with_read_access(lambda run: self._read_images(run, [content_id], SqlConditions()))
        return images.get(content_id, ())

    # ---- database-specific statements

    @abstractmethod
    def _run_with_read_access(self, function: Callable[[SqlRunner], Result]) -> Result:
        """Call `function` with a `SqlRunner` for read-only statements, and return its result."""

    @abstractmethod
    def _open_transaction(self) -> AbstractContextManager[SqlRunner]:
        """Open a transaction, which is rolled back if the `with` block raises an exception."""

    def _query(self, statement: str, parameters: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        return self._run_with_read_access(lambda run: run(statement, parameters))

    @abstractmethod
    def _make_source_condition(self, source: str) -> tuple[str, dict[str, Any]]:
        """Return the SQL condition and parameters for images that come from a source or are inside its path."""

    @abstractmethod
    def _make_path_condition(self, path: str) -> tuple[str, dict[str, Any]]:
        """Return the SQL condition and parameters of a path filter."""

    @abstractmethod
    def _make_caption_condition(self, caption: str) -> tuple[str, dict[str, Any]]:
        """Return the SQL condition and parameters of a caption filter."""

    def _build_filter_conditions(self, image_filter: Filter) -> SqlConditions:
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
    def _find_newest_contents(self, run: SqlRunner, image_filter: Filter, count: int, offset: int) -> list[int]:
        """Return a page of content ids, sorted by the latest capture time of the matching images, newest first."""

    def _find_newest_without_filter(self, run: SqlRunner, count: int, offset: int) -> list[int]:
        # Several images can have the same content, so `limit` rows may contain fewer than `limit` distinct ids.
        limit = 2 * (offset + count)
        while True:
            rows = run("SELECT content FROM images ORDER BY taken DESC, content LIMIT :limit", {"limit": limit})
            ids = list(dict.fromkeys(content for (content,) in rows))
            if len(ids) >= offset + count or len(rows) < limit:
                return ids[offset : offset + count]
            limit *= 4

    @abstractmethod
    def _find_nearest_contents(
        self, run: SqlRunner, vector: np.ndarray, depth: int, image_filter: Filter
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids (int64) and cosine similarities of the `depth` contents that are most similar to a vector."""

    @abstractmethod
    def _find_word_matches(self, run: SqlRunner, query: WordQuery, image_filter: Filter) -> np.ndarray:
        """Return at most MAX_FUSED ids of contents with all query words, best first, or no ids if too many match."""

    @abstractmethod
    def _read_text_fields(
        self, run: SqlRunner, query: WordQuery, ids: Sequence[int]
    ) -> list[tuple[int, dict[str, str]]]:
        """Return (content id, text fields) pairs for the images of the contents that contain all query words."""

    @abstractmethod
    def _read_images(
        self, run: SqlRunner, ids: Sequence[int], conditions: SqlConditions
    ) -> dict[int, tuple[IndexedImage, ...]]:
        """Return at most MAX_LOCATIONS images per content: matching images, then other images, both sorted by name.

        If there are more images, return the images that were indexed first, so the database can stop reading early.
        """

    def _fetch_vectors(self, run: SqlRunner, ids: Sequence[int]) -> dict[int, np.ndarray]:
        """Return the float32 vectors of the given contents, keyed by id. Skip unknown ids."""
        statement = f"SELECT id, vector FROM contents WHERE id {self.IN_IDS}"
        rows = run(statement, {"ids": json.dumps(list(ids))}) if len(ids) else []
        return {content_id: self._decode_vector(vector) for content_id, vector in rows}

    @abstractmethod
    def _decode_vector(self, vector: Any) -> np.ndarray:
        """Convert a value of the column `vector` to a float32 array of shape (D,)."""

    # ---- rows

    def _escape_text(self, text: str) -> str:
        """Replace characters that the database cannot store."""
        return text

    def _unescape_text(self, text: str) -> str:
        return text

    def _convert_image_to_row(self, image: IndexedImage) -> dict[str, Any]:
        row = {"name": image.name, "location": serialize_image_ref(image.ref), "source": image.source}
        row |= {"file_version": image.file_version, "captions": json.dumps(image.captions)}
        row |= get_column_values(image, IMAGE_FIELDS)
        return {name: self._escape_text(value) if isinstance(value, str) else value for name, value in row.items()}

    def _convert_row_to_image(self, row: Sequence[Any]) -> IndexedImage:
        values: dict[str, Any] = {}
        for name, value in zip(IMAGE_COLUMNS, row, strict=True):
            if not name.startswith("folded_"):
                values[name] = self._unescape_text(value) if isinstance(value, str) else value
        ref, captions = parse_image_ref(values.pop("location")), tuple(json.loads(values.pop("captions")))
        return IndexedImage(ref=ref, captions=captions, **values)


# ---- opening


def format_missing_index_message(folder: str | Path) -> str:
    out = "INDEX" if Path(folder).is_file() else shlex.quote(str(folder))
    return f"{folder} is not an index. Create an index with: llm2clip index PHOTOS --model MODEL --out {out}"


def open_backend(location: str, write: bool = False) -> IndexBackend:
    """Open the index in a local folder or in a PostgreSQL database.

    Args:
        location: Path of the folder, or a URL of the form `postgresql://USER@HOST/DATABASE?schema=NAME`.
        write: If True, create the index if it does not exist.

    Raises:
        FileNotFoundError: `write` is False, and there is no index at the location.
        ImportError: A required package is not installed.
        ValueError: The URL is invalid, or disables encryption for a connection to another machine.
        IndexUnavailableError: The PostgreSQL server does not respond.
    """
    check_backend_packages(location)
    module = importlib.import_module(f"llm2clip.search.{get_backend_name(location)}_backend")
    backend: IndexBackend = module.open_index(location, write)
    return backend


def check_backend_packages(location: str) -> None:
    """Raise ImportError if a package that the backend requires is missing, or ValueError if the URL is invalid."""
    name = get_backend_name(location)
    require_extra("search" if name == "sqlite" else name, f"the index {hide_password(location)}")


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
    """Remove the password and other secrets from an index URL, so that the URL can be shown in messages."""
    if "://" not in location:
        return location
    location = re.sub(r"^([\w+]+://[^/?#:@]*):.*@", r"\1@", location)  # passwords may contain an @
    return re.sub(rf"([?&](?!(?:{'|'.join(PUBLIC_PARAMETERS)})=)[^=&#]*=)[^&#]*", r"\1***", location)


def parse_content_id(hit_id: str) -> int:
    """Convert a hit id to an integer content id. If the hit id is invalid, return -1, which is never a content id."""
    return int(hit_id) if hit_id.isascii() and hit_id.isdigit() and len(hit_id) < 19 else -1
