"""Index backend that stores images, vectors and thumbnails in an SQLite file, and searches the vectors in memory.

    INDEX/
      index.sqlite       metadata, images, image contents and the calibration of relevance
      graph.usearch      HNSW graph; built only for a million or more distinct images
      graph.json         the graph's quantization scale, checksum and id summary

SQLite commits each batch atomically, lets other processes read during a write, and stores the database as a single file
that is easy to copy. Readers keep the quantized vectors in memory, and load only new vectors after a write. Word search
and caption filters use full-text tables (see `search.words`). A reader needs write permission to the folder, because
SQLite creates files next to the database even when reading.
"""

import glob
import json
import os
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from llm2clip.runs.output_folder import folder_lock
from llm2clip.runs.ranks import print_once
from llm2clip.search.backends import (
    FILES_PER_NEWEST,
    MAX_LOCATIONS,
    Backend,
    Filter,
    Hit,
    ImageState,
    IndexedContent,
    IndexedImage,
    WordIndexError,
    format_missing_index_message,
    parse_content_id,
    ref_from_json,
    ref_to_json,
)
from llm2clip.search.sqlite_database import INDEX_FILE, SqliteDatabase
from llm2clip.search.vector_index import (
    CHUNK,
    GRAPH_FILE,
    GRAPH_STATE_FILE,
    GraphState,
    QuantizedVectors,
    VectorIndex,
    open_graph,
    update_graph,
)
from llm2clip.search.words import (
    MAX_FUSED,
    WordQuery,
    add_texts,
    find_matched_fields,
    find_matches,
    fuse_rankings,
    is_corrupt,
    is_corruption,
    make_caption_condition,
    rebuild,
    remove_texts,
    set_recognized_text,
)

APPROXIMATE_ABOVE = 1_000_000
IMAGE_COLUMNS = "name, location, source, file_version, captions, taken"  # same order as in `_image_to_row`
# SQL condition for images inside a path. An image's name must match the pattern :glob, or the pattern followed by "/"
# (folder), "!" (tar) or "[" (table). File and folder names may also contain "!" and "[", so in these two cases, the
# image must also be stored in a tar or table whose file name matches the last part of the path (:basename).
INSIDE_PATH = """(images.name GLOB :glob OR images.name GLOB :glob || '/*'
  OR (images.name GLOB :glob || '[![]*' AND location NOT LIKE '["FileImage"%'
      AND '/' || json_extract(location, '$[1].path') GLOB '*/' || :basename))"""
FILTER_CONDITIONS = {
    "path": INSIDE_PATH,
    "after": "taken >= :after",
    "before": "taken <= :before",
    "min_side": "min(width, height) >= :min_side",
}
MATCH_DTYPE = np.dtype([("content", np.int64), ("taken", np.float64)])
IDS_PER_QUERY = 500  # SQLite limits the number of parameters per statement


def open_index(location: str, write: bool, approximate_above: int | None) -> Backend:
    """Open the index in a local folder. See `open_backend`."""
    return SqliteBackend(Path(location), write, APPROXIMATE_ABOVE if approximate_above is None else approximate_above)


class SqliteBackend:
    """Index backend in a local folder. Thread-safe.

    Several processes can read an index at the same time, even while one process writes to it.
    """

    def __init__(self, folder: Path, write: bool = False, approximate_above: int = APPROXIMATE_ABOVE) -> None:
        """
        Args:
            write: If True, open the index for writing, and create it if it does not exist. Only the current user can
                read a new index.
            approximate_above: Minimum number of distinct images for which `finish` builds an HNSW graph, which makes
                searches approximate.

        Raises:
            FileNotFoundError: `write` is False, and there is no complete index in the folder.
            FormatVersionError: The index has a different format version.
        """
        self.folder, self.approximate_above = folder, approximate_above
        if not write and not (folder / INDEX_FILE).exists():
            raise FileNotFoundError(format_missing_index_message(folder))
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # thumbnails and captions may be private
        self._db = SqliteDatabase(folder, write)
        self._may_have_orphans = True  # an interrupted run may leave contents that belong to no image
        self._cache: dict[str, tuple[Any, Any]] = {}  # see `_get_cached`
        # Quantized vectors, and the id of the file from which they were read.
        self._vectors: tuple[tuple[int, int], QuantizedVectors] | None = None
        self._index_lock, self._vectors_lock = threading.Lock(), threading.Lock()
        self._are_words_checked = False
        if not write and (self._db.is_empty or not self.metadata()):
            raise FileNotFoundError(
                f"{folder} is an incomplete index without images. To complete it, run `llm2clip index` again"
            )

    # ---- building

    def lock(self) -> AbstractContextManager[None]:
        return folder_lock(self.folder)

    def metadata(self) -> dict[str, Any]:
        return {key: json.loads(value) for key, value in self._db.query("SELECT key, value FROM metadata")}

    def initialize(self, metadata: Mapping[str, Any]) -> None:
        rows = [(key, json.dumps(value)) for key, value in metadata.items()]
        with self._db.transaction() as connection:
            connection.executemany("INSERT OR REPLACE INTO metadata VALUES (?, ?)", rows)

    def repair_words(self) -> None:
        if self._are_words_checked:
            return
        with self._db.transaction() as connection:
            if is_corrupt(connection):
                rebuild(connection)
                print_once(f"{self._db.file}: the tables for word search were corrupt and have been rebuilt")
        self._are_words_checked = True

    def indexed(self, sources: Sequence[str]) -> dict[str, ImageState]:
        states: dict[str, ImageState] = {}
        for source in sources:
            sql = f"SELECT name, file_version, captions FROM images WHERE source = :source OR {INSIDE_PATH}"
            parameters = {"source": source, **_make_path_parameters(glob.escape(source))}
            for name, file_version, captions in self._db.query(sql, parameters):
                states[name] = ImageState(file_version, tuple(json.loads(captions)))
        return states

    def existing(self, hashes: Iterable[bytes]) -> set[bytes]:
        return {digest for digest in hashes if self._db.query("SELECT 1 FROM contents WHERE hash = ?", (digest,))}

    def add(self, contents: Sequence[IndexedContent], images: Sequence[tuple[IndexedImage, bytes]]) -> None:
        with self._db.transaction() as connection:
            self._may_have_orphans = True
            for content in contents:
                self._add_content(connection, content)
            remove_texts(connection, [image.name for image, _ in images])
            connection.executemany(
                f"INSERT OR REPLACE INTO images (content, {IMAGE_COLUMNS}) "
                "VALUES ((SELECT id FROM contents WHERE hash = ?), ?, ?, ?, ?, ?, ?)",
                [(digest, *_image_to_row(image)) for image, digest in images],
            )
            add_texts(connection, {image.name: image for image, _ in images}.values())

    def _add_content(self, connection: sqlite3.Connection, content: IndexedContent) -> None:
        """Insert image content and its thumbnail, unless the content is already in the database."""
        vector = np.ascontiguousarray(content.vector, dtype="<f2").tobytes()
        max_abs = float(np.abs(content.vector).max())
        row = connection.execute(
            "INSERT INTO contents (hash, vector, max_abs, width, height) VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT DO NOTHING RETURNING id",
            (content.hash, vector, max_abs, content.width, content.height),
        ).fetchone()
        if row is not None:
            connection.execute("INSERT INTO thumbnails VALUES (?, ?)", (row[0], content.thumbnail))

    def remove(self, names: Sequence[str]) -> None:
        if not names and not self._may_have_orphans:
            return  # avoid a write, because all open readers look for changes after each write
        with self._db.transaction() as connection:
            remove_texts(connection, names)
            connection.executemany("DELETE FROM images WHERE name = ?", [(name,) for name in names])
            connection.execute("DELETE FROM contents WHERE id NOT IN (SELECT content FROM images)")
            self._may_have_orphans = False

    def contents_without_text(self, sources: Sequence[str]) -> list[tuple[bytes, IndexedImage]]:
        missing: dict[bytes, IndexedImage] = {}
        for source in sources:
            sql = (
                f"SELECT hash, {IMAGE_COLUMNS} FROM images JOIN contents ON contents.id = content "
                "WHERE contents.id NOT IN (SELECT content FROM recognized_texts) "
                f"AND (source = :source OR {INSIDE_PATH})"
            )
            parameters = {"source": source, **_make_path_parameters(glob.escape(source))}
            for digest, *row in self._db.query(sql, parameters):
                missing.setdefault(bytes(digest), _image_from_row(row))
        return list(missing.items())

    def set_texts(self, texts: Mapping[bytes, str]) -> None:
        with self._db.transaction() as connection:
            for digest, text in texts.items():
                row = connection.execute("SELECT id FROM contents WHERE hash = ?", (digest,)).fetchone()
                if row is not None:
                    set_recognized_text(connection, row[0], text)

    def finish(self) -> None:
        ids = _read_int_column(self._db.query("SELECT id FROM contents ORDER BY id"))
        if len(ids) >= self.approximate_above:
            with self._db.snapshot() as db:
                max_abs = _read_max_abs(db)
            update_graph(self.folder, ids, self._fetch_vectors, self._read_dim(), max_abs)
            for name in (GRAPH_FILE, GRAPH_STATE_FILE):
                shutil.copymode(self._db.file, self.folder / name)

    # ---- searching

    def count(self) -> tuple[int, int]:
        sql = "SELECT (SELECT count(*) FROM images), (SELECT count(*) FROM contents)"
        images, contents = self._get_cached("count", self._db.read_state(), lambda: self._db.query(sql)[0])
        return images, contents

    def duplicates(self, limit: int = 10) -> list[list[str]]:
        largest_groups = (
            "SELECT content FROM images GROUP BY content HAVING count(*) > 1 ORDER BY count(*) DESC, content LIMIT ?"
        )
        names_of_content = "SELECT name FROM images WHERE content = ? ORDER BY name"
        groups = []
        for content in self._db.query(largest_groups, (limit,)):
            groups.append([name for (name,) in self._db.query(names_of_content, content)])
        return groups

    def search(
        self,
        vector: np.ndarray | None,
        count: int,
        image_filter: Filter,
        offset: int = 0,
        words: Sequence[str] = (),
    ) -> list[Hit]:
        scores: Sequence[float | None]
        matched: dict[int, tuple[str, ...]] = {}
        if vector is None:
            page = self._get_matching_ids(image_filter, newest_first=True)[offset : offset + count]
            scores = [None] * len(page)
        else:
            query = WordQuery.parse(words)
            allowed_ids = self._get_matching_ids(image_filter) if image_filter else None
            matches = self._find_word_matches(query, image_filter, allowed_ids)
            depth = offset + count if not len(matches) else max(offset + count, MAX_FUSED)
            ranking = self._find_nearest(vector.astype(np.float32), depth, image_filter, allowed_ids)
            page, scores = self._rank(vector.astype(np.float32), ranking, matches, count, offset)
            if len(matches):
                matched = self._find_matched_fields(query, page)
        conditions, parameters = _make_sql_conditions(image_filter, ("path", "after", "before"))
        texts = self._read_texts(page)
        hits = []
        for content_id, score in zip(page.tolist(), scores, strict=True):
            images = self._read_images(content_id)
            if conditions:
                matching = self._read_images(content_id, conditions, parameters)
                images = tuple(dict.fromkeys([*matching, *images]))[:MAX_LOCATIONS]
            sizes = self._db.query(
                "SELECT width, height, (SELECT count(*) FROM images WHERE content = contents.id) FROM contents "
                "WHERE id = ?",
                (content_id,),
            )
            if images and sizes:  # skip images that another process has removed during this search
                width, height, image_count = sizes[0]
                text, fields = texts.get(content_id, ""), matched.get(content_id, ())
                hits.append(Hit(str(content_id), score, images, image_count, width, height, fields, text))
        return hits

    def _find_nearest(
        self, vector: np.ndarray, depth: int, image_filter: Filter, allowed_ids: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of the `depth` contents most similar to a vector, and their cosine similarities.

        The last ranking is cached, because the relevance of a further page depends on the first hits of the query.
        """
        key = self._db.read_state(), vector.tobytes(), image_filter  # read first: the index may be newer, but not older
        index = self._get_current_vector_index()
        cached = self._cache.get("nearest")
        if cached is None or cached[0][0] != key or cached[0][1] < depth:
            cached = self._cache["nearest"] = (key, depth), index.search(vector, depth, allowed_ids)
        ids, cosines = cached[1]
        return ids[:depth], cosines[:depth]

    def _rank(
        self,
        vector: np.ndarray,
        ranking: tuple[np.ndarray, np.ndarray],
        matches: np.ndarray,
        count: int,
        offset: int,
    ) -> tuple[np.ndarray, list[float]]:
        """Return the content ids of a page of hits, int64 of shape (N,), and their cosine similarities to a vector.

        Args:
            ranking: Result of `_find_nearest`.
            matches: Ids of the contents that contain all words of the query, best first.
        """
        ids, cosines = ranking
        if not len(matches):
            return ids[offset:], cosines[offset:].tolist()
        page = fuse_rankings(ids, matches)[offset : offset + count]
        score_of = dict(zip(ids.tolist(), cosines.tolist(), strict=True))
        others = np.array([content for content in page.tolist() if content not in score_of], np.int64)
        score_of.update(zip(others.tolist(), (self._fetch_vectors(others) @ vector).tolist(), strict=True))
        return page, [score_of[content] for content in page.tolist()]

    def _find_word_matches(self, query: WordQuery, image_filter: Filter, allowed_ids: np.ndarray | None) -> np.ndarray:
        """Return the ids from `find_matches`. Those for the last query are cached for further result pages."""

        def find() -> np.ndarray:
            with self._open_words() as db:
                return find_matches(db, query, allowed_ids)

        if not query:
            return np.empty(0, np.int64)
        key = self._db.read_state(), query, image_filter
        ids: np.ndarray = self._get_cached("word matches", key, find)
        return ids

    def _find_matched_fields(self, query: WordQuery, ids: np.ndarray) -> dict[int, tuple[str, ...]]:
        with self._open_words() as db:
            return find_matched_fields(db, query, ids.tolist())

    def _read_texts(self, ids: np.ndarray) -> dict[int, str]:
        """Return the texts recognised in the given contents. Contents in which no text was recognised are skipped."""
        return dict(self._query_by_id("SELECT content, text FROM recognized_texts WHERE content", ids))

    @contextmanager
    def _open_words(self) -> Iterator[sqlite3.Connection]:
        """Open a database snapshot for a word search. Raise WordIndexError if the tables are corrupt."""
        try:
            with self._db.snapshot() as db:
                yield db
        except OSError as error:
            if not is_corruption(error.__cause__):
                raise
            raise WordIndexError(
                f"{error}. The tables for word search and caption filters are corrupt. To rebuild them, run "
                "`llm2clip index` again. Until then, search without words and without a caption filter."
            ) from error

    def count_matches(self, image_filter: Filter) -> int:
        return len(self._get_matching_ids(image_filter)) if image_filter else self.count()[1]

    def vector(self, hit_id: str) -> np.ndarray | None:
        rows = self._db.query("SELECT vector FROM contents WHERE id = ?", (parse_content_id(hit_id),))
        return np.frombuffer(rows[0][0], "<f2").astype(np.float32) if rows else None

    def vectors(self, hit_ids: Sequence[str]) -> dict[str, np.ndarray]:
        ids = np.array([parse_content_id(hit_id) for hit_id in hit_ids], np.int64)
        vectors = self._fetch_vectors(ids).astype(np.float32)
        return {hit_id: vector for hit_id, vector in zip(hit_ids, vectors, strict=True) if vector.any()}

    def sample_ids(self, count: int) -> list[str]:
        rng = np.random.default_rng(0)
        total = self.count()[1]
        ((last,),) = self._db.query("SELECT coalesce(max(id), 0) FROM contents")
        # Reading all ids of a large index takes seconds. Nearly all ids up to the last one exist, unless many images
        # have been removed, so enough of twice the expected number of random ids usually exist.
        candidate_count = 2 * count * last // max(total, 1)
        if candidate_count < last:
            candidates = 1 + rng.choice(last, candidate_count, replace=False)
            existing = _read_int_column(self._query_by_id("SELECT id FROM contents WHERE id", candidates))
            sample = candidates[np.isin(candidates, existing)][:count]
            if len(sample) == count:
                return [str(content_id) for content_id in np.sort(sample).tolist()]
        # Without ORDER BY, SQLite reads the ids from an index, not from the table, which also contains the vectors.
        ids = np.sort(_read_int_column(self._db.query("SELECT id FROM contents")))
        if len(ids) > count:
            ids = np.sort(rng.choice(ids, count, replace=False))
        return [str(content_id) for content_id in ids.tolist()]

    def newest_ids(self, count: int) -> list[str]:
        rows = self._db.query("SELECT content FROM images ORDER BY taken DESC LIMIT ?", (count * FILES_PER_NEWEST,))
        return list(dict.fromkeys(str(content_id) for (content_id,) in rows))[:count]

    def save_calibration(self, data: bytes) -> None:
        with self._db.transaction() as connection:
            connection.execute("DELETE FROM calibration")
            connection.execute("INSERT INTO calibration VALUES (?)", (data,))

    def load_calibration(self) -> bytes | None:
        rows = self._db.query("SELECT data FROM calibration")
        return bytes(rows[0][0]) if rows else None

    def thumbnail(self, hit_id: str) -> bytes | None:
        rows = self._db.query("SELECT jpeg FROM thumbnails WHERE id = ?", (parse_content_id(hit_id),))
        return bytes(rows[0][0]) if rows else None

    def images(self, hit_id: str) -> tuple[IndexedImage, ...]:
        return self._read_images(parse_content_id(hit_id))

    def _read_images(
        self, content_id: int, conditions: Sequence[str] = (), parameters: Mapping[str, Any] | None = None
    ) -> tuple[IndexedImage, ...]:
        """Return at most MAX_LOCATIONS images with the given content that match SQL conditions, sorted by name.

        If there are more images, return those indexed first, so that SQLite can stop reading early.
        """
        where = " AND ".join(["content = :content", *conditions])
        sql = f"SELECT {IMAGE_COLUMNS} FROM images WHERE {where} ORDER BY rowid LIMIT :limit"
        rows = self._db.query(sql, {**(parameters or {}), "content": content_id, "limit": MAX_LOCATIONS})
        return tuple(sorted(map(_image_from_row, rows), key=lambda image: image.name))

    # ---- filters

    def _get_matching_ids(self, image_filter: Filter, newest_first: bool = False) -> np.ndarray:
        """Return the ids from `_find_matching_ids`. Those for the last filter are cached for further result pages."""
        key = self._db.read_state(), image_filter, newest_first
        ids: np.ndarray = self._get_cached("ids", key, lambda: self._find_matching_ids(image_filter, newest_first))
        return ids

    def _find_matching_ids(self, image_filter: Filter, newest_first: bool = False) -> np.ndarray:
        """Return the ids of all contents with at least one image that matches a filter, as int64 of shape (N,).

        By default, the ids are in ascending order. With `newest_first`, they are sorted by the latest capture time of
        their matching images, newest first.
        """
        conditions, parameters = _make_sql_conditions(image_filter, FILTER_CONDITIONS)
        tables = "images JOIN contents ON contents.id = images.content"
        if image_filter.caption is not None:
            if conditions or newest_first:
                tables = "texts JOIN images ON images.name = texts.image JOIN contents ON contents.id = images.content"
            else:
                tables = "texts"
            condition, parameters["caption"] = make_caption_condition(image_filter.caption)
            conditions.append(condition)
        columns = "texts.content, 0.0" if tables == "texts" else "images.content, images.taken"
        with self._open_words() as db:
            sql = f"SELECT {columns} FROM {tables} WHERE {' AND '.join(conditions) or 'true'}"
            rows = np.fromiter(db.execute(sql, parameters), MATCH_DTYPE)
        if not newest_first:
            return _sort_unique(rows["content"])
        ids = rows["content"][np.lexsort((rows["content"], -rows["taken"]))]
        _, first = np.unique(ids, return_index=True)
        return ids[np.sort(first)]

    # ---- vectors

    def _get_current_vector_index(self) -> VectorIndex:
        """Return a vector index for the current database state."""
        with self._index_lock:  # among concurrent searches, one opens the graph while the others wait
            graph_time = 0
            with suppress(FileNotFoundError):
                graph_time = (self.folder / GRAPH_STATE_FILE).stat().st_mtime_ns

            def create_index() -> VectorIndex:
                graph = self._get_current_graph(graph_time) if graph_time else None
                return VectorIndex(self._load_current_vectors, self._fetch_vectors, graph)

            index: VectorIndex = self._get_cached("index", (self._db.read_state(), graph_time), create_index)
            return index

    def _get_current_graph(self, graph_time: int) -> Any:
        """Return the graph, or None if it is corrupt or its ids differ from those in the database."""
        opened: tuple[Any, GraphState] | None = self._get_cached("graph", graph_time, lambda: open_graph(self.folder))
        if opened is None:
            return None
        graph, state = opened
        (ids,) = self._db.query("SELECT count(*), max(id), sum(id) FROM contents")
        return graph if ids == (state.count, state.last, state.sum) else None

    def _load_current_vectors(self) -> QuantizedVectors:
        """Return all quantized vectors, reading only vectors added since the last call.

        If a new vector raises the maximum absolute value, it would overflow with the old scale: all vectors are reread.
        """
        # Use a separate connection, because reading all vectors takes seconds and would block other threads.
        with self._vectors_lock, self._db.snapshot() as db:
            file_id, vectors = self._db.file_id, QuantizedVectors(127 / _read_max_abs(db))
            if self._vectors is not None:
                last_file_id, last_vectors = self._vectors
                if last_file_id == file_id and last_vectors.scale <= vectors.scale:
                    vectors = last_vectors
                else:
                    self._vectors = None  # free the old vectors first, in case both do not fit in memory
            vectors = vectors.with_added(_read_vector_chunks(db, vectors.last_id))
            ((count,),) = db.execute("SELECT count(*) FROM contents")
            if count < len(vectors):
                vectors = vectors.with_only(np.sort(_read_int_column(db.execute("SELECT id FROM contents"))))
            self._vectors = file_id, vectors
            return vectors

    def _fetch_vectors(self, ids: np.ndarray) -> np.ndarray:
        """Return the vectors with the given ids, as a float16 array of shape (N, D). Removed ids have zero vectors."""
        vectors: dict[int, bytes] = dict(self._query_by_id("SELECT id, vector FROM contents WHERE id", ids))
        dim = self._read_dim()
        zeros = bytes(2 * dim)
        joined = b"".join(vectors.get(content_id, zeros) for content_id in ids.tolist())
        return np.frombuffer(joined, "<f2").reshape(-1, dim)

    def _query_by_id(self, sql: str, ids: np.ndarray) -> Iterator[tuple[Any, ...]]:
        """Run a statement that ends with the name of an id column, and yield the rows with the given ids."""
        for start in range(0, len(ids), IDS_PER_QUERY):
            chunk = ids[start : start + IDS_PER_QUERY].tolist()
            placeholders = ", ".join("?" * len(chunk))
            yield from self._db.query(f"{sql} IN ({placeholders})", chunk)

    def _read_dim(self) -> int:
        return int(self.metadata()["embed_dim"])

    def _get_cached(self, name: str, state: Any, compute: Callable[[], Any]) -> Any:
        """Return the cached value with the given name. Recompute it if the state has changed since the last call."""
        cached = self._cache.get(name)
        if cached is None or cached[0] != state:
            cached = self._cache[name] = state, compute()
        return cached[1]


def _image_to_row(image: IndexedImage) -> tuple[Any, ...]:
    """Return an image's values for IMAGE_COLUMNS, with the reference and captions as JSON."""
    captions = json.dumps(image.captions)
    return image.name, ref_to_json(image.ref), image.source, image.file_version, captions, image.taken


def _image_from_row(row: Sequence[Any]) -> IndexedImage:
    name, ref, source, file_version, captions, taken = row
    return IndexedImage(name, ref_from_json(ref), source, file_version, tuple(json.loads(captions)), taken)


def _make_sql_conditions(image_filter: Filter, names: Iterable[str]) -> tuple[list[str], dict[str, Any]]:
    """Return SQL conditions and their parameters for the filter fields that are listed in `names` and not None."""
    parameters: dict[str, Any] = {}
    for name in names:
        value = getattr(image_filter, name)
        if value is not None:
            parameters[name] = value
    conditions = [FILTER_CONDITIONS[name] for name in parameters]
    if "path" in parameters:
        # Brackets are common in file names, so they are matched literally. The root folder's pattern is empty.
        pattern = parameters["path"].rstrip("/").replace("[", "[[]")
        is_absolute = parameters["path"].startswith("/") or not pattern
        parameters.update(_make_path_parameters(pattern if is_absolute else f"*/{pattern}"))
    return conditions, parameters


def _make_path_parameters(pattern: str) -> dict[str, str]:
    """Return the SQL parameters for INSIDE_PATH."""
    return {"glob": pattern, "basename": os.path.basename(pattern)}


def _read_vector_chunks(db: sqlite3.Connection, last_id: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the vectors after `last_id` in chunks of int64 ids of shape (N,) and float16 vectors of shape (N, D)."""
    cursor = db.execute("SELECT id, vector FROM contents WHERE id > ? ORDER BY id", (last_id,))
    while rows := cursor.fetchmany(CHUNK):
        ids = np.array([content_id for content_id, _ in rows], dtype=np.int64)
        vectors = np.frombuffer(b"".join(vector for _, vector in rows), "<f2")
        yield ids, vectors.reshape(len(rows), -1)


def _read_max_abs(db: sqlite3.Connection) -> float:
    """Return the largest absolute value in any vector."""
    ((max_abs,),) = db.execute("SELECT max(max_abs) FROM contents")
    return max(float(max_abs or 0), 1e-6)


def _read_int_column(cursor: Iterable[tuple[Any, ...]]) -> np.ndarray:
    return np.array([value for (value,) in cursor], dtype=np.int64)


def _sort_unique(ids: np.ndarray) -> np.ndarray:
    """Return the distinct ids in ascending order. Ids are dense, so a boolean array is faster than sorting."""
    occurs = np.zeros(int(ids.max(initial=-1)) + 1, bool)
    occurs[ids] = True
    return np.flatnonzero(occurs)
