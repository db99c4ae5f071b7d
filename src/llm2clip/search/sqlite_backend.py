"""SQLite index backend, which searches the vectors in memory.

Each search scans all vectors, quantised to int8, and re-scores the best candidates with the float16 vectors. Memory
bandwidth limits the speed of a scan, and int8 vectors are half the size of float16 vectors (see benchmarks/search.py).
Readers keep the quantised vectors in memory and load only new vectors after a write.
"""

from __future__ import annotations

import glob
import json
import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from usearch.index import MetricKind
from usearch.index import search as exact_search

from llm2clip.runs.output_folder import check_format_version, hold_folder_lock
from llm2clip.search.backends import (
    CONTENT_COLUMNS,
    FORMAT_VERSION,
    IMAGE_COLUMNS,
    INDEX_FILE,
    NEW_INDEX_ADVICE,
    IndexBackend,
    Result,
    SqlConditions,
    SqlRunner,
    format_missing_index_message,
)
from llm2clip.search.metadata import CONTENT_FIELDS, IMAGE_FIELDS, Filter, format_column_definitions, get_column_values
from llm2clip.search.types import MAX_LOCATIONS, IndexedContent, IndexedImage, IndexUnavailableError
from llm2clip.search.words import (
    WORDS_SCHEMA,
    WordQuery,
    add_image_texts,
    find_word_matches,
    make_caption_condition,
    read_matching_text_fields,
    remove_image_texts,
    set_recognized_text,
    sort_distinct_ids,
)

# Minimum number of candidates that are re-scored. For a million vectors, 128 candidates gave an exact top 10.
MIN_CANDIDATES = 128
CANDIDATES_PER_HIT = 4
MIN_SCANNED = 1024  # minimum number of candidates that a scan returns; not all of them are re-scored
EXACT_BELOW = 2048  # up to this number of vectors, exact float16 scoring is faster than an int8 scan
CHUNK = 65_536  # number of vectors per block
COLUMN_TYPES = {float: "REAL", int: "INTEGER", str: "TEXT"}
# `location` is a serialised `ImageRef`, and `max_abs` is the largest absolute value in a vector.
# AUTOINCREMENT prevents the reuse of content ids, so an id always refers to the same content.
SCHEMA = f"""
CREATE TABLE metadata (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE calibration (data BLOB NOT NULL);
CREATE TABLE contents (
  id INTEGER PRIMARY KEY AUTOINCREMENT, hash BLOB NOT NULL UNIQUE, vector BLOB NOT NULL, max_abs REAL NOT NULL,
  {format_column_definitions(CONTENT_FIELDS, COLUMN_TYPES)});
CREATE INDEX contents_max_abs ON contents(max_abs);
CREATE TABLE thumbnails (id INTEGER PRIMARY KEY REFERENCES contents(id) ON DELETE CASCADE, jpeg BLOB NOT NULL);
CREATE TABLE images (
  id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, content INTEGER NOT NULL REFERENCES contents(id),
  location TEXT NOT NULL, source TEXT NOT NULL, file_version TEXT NOT NULL, captions TEXT NOT NULL,
  {format_column_definitions(IMAGE_FIELDS, COLUMN_TYPES)});
CREATE INDEX images_content ON images(content);
CREATE INDEX images_source ON images(source);
CREATE INDEX images_taken ON images(taken);
PRAGMA user_version = {FORMAT_VERSION};
"""
INSERT_CONTENT = f"""
INSERT INTO contents (hash, vector, max_abs, {", ".join(CONTENT_COLUMNS)})
VALUES (:hash, :vector, :max_abs, {", ".join(f":{name}" for name in CONTENT_COLUMNS)})
ON CONFLICT DO NOTHING RETURNING id
"""
INSERT_IMAGE = f"""
INSERT OR REPLACE INTO images (content, {", ".join(IMAGE_COLUMNS)})
VALUES ((SELECT id FROM contents WHERE hash = :hash), {", ".join(f":{name}" for name in IMAGE_COLUMNS)})
"""
# SQL condition for images inside the path :glob. In names, "/" (folder), "!" (tar) or "[" (table) follows the path.
# File names may also contain "!" and "[", so the name of the tar file or table must match :basename.
INSIDE_PATH = """(images.name GLOB :glob OR images.name GLOB :glob || '/*'
  OR (images.name GLOB :glob || '[![]*' AND location NOT LIKE '["FileImage"%'
      AND '/' || json_extract(location, '$[1].path') GLOB '*/' || :basename))"""
MATCH_DTYPE = np.dtype([("content", np.int64), ("taken", np.float64)])
Block = tuple[np.ndarray, np.ndarray]  # sorted int64 ids of shape (N,) and int8 vectors of shape (N, D)


def open_index(location: str, write: bool) -> IndexBackend:
    """Open the index in a local folder. See `open_backend`."""
    return SqliteBackend(Path(location), write)


class SqliteBackend(IndexBackend):
    """Index backend in a local folder, for one writing process and any number of readers. Thread-safe."""

    IN_IDS = "IN (SELECT value FROM json_each(:ids))"

    def __init__(self, folder: Path, write: bool = False) -> None:
        """Open the index in a folder, or create an index that only the current user can read.

        Raises:
            FileNotFoundError: `write` is False, and there is no complete index in the folder.
            FormatVersionError: The index has a different format version.
        """
        if not write and not (folder / INDEX_FILE).exists():
            raise FileNotFoundError(format_missing_index_message(folder))
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # thumbnails and captions may be private
        self.folder, self._db = folder, SqliteDatabase(folder, write)
        self._may_have_orphans = True  # an interrupted run may have left contents that belong to no image
        self._cache: dict[str, tuple[Any, Any]] = {}  # see `_get_cached_value`
        self._vectors: tuple[tuple[Any, ...], QuantizedVectors] | None = None  # (database state, vectors)
        self._vectors_lock = threading.Lock()
        if not write and (self._db.is_empty or not self.read_metadata()):
            raise FileNotFoundError(
                f"{folder} is an incomplete index without images. To complete it, run `llm2clip index` again"
            )

    # ---- building

    def lock(self) -> AbstractContextManager[None]:
        return hold_folder_lock(self.folder)

    def read_metadata(self) -> dict[str, Any]:
        return {key: json.loads(value) for key, value in self._db.query("SELECT key, value FROM metadata")}

    def initialize(self, metadata: Mapping[str, Any]) -> None:
        rows = [(key, json.dumps(value)) for key, value in metadata.items()]
        with self._db.open_transaction() as connection:
            connection.executemany("INSERT OR REPLACE INTO metadata VALUES (?, ?)", rows)

    def find_existing_hashes(self, hashes: Iterable[bytes]) -> set[bytes]:
        return {digest for digest in hashes if self._db.query("SELECT 1 FROM contents WHERE hash = ?", (digest,))}

    def add_images(self, contents: Sequence[IndexedContent], images: Sequence[tuple[IndexedImage, bytes]]) -> None:
        with self._db.open_transaction() as connection:
            self._may_have_orphans = True
            for content in contents:
                row = get_column_values(content, CONTENT_FIELDS)
                row |= {"hash": content.hash, "vector": np.ascontiguousarray(content.vector, dtype="<f2").tobytes()}
                row["max_abs"] = float(np.abs(content.vector).max())
                added = connection.execute(INSERT_CONTENT, row).fetchone()
                if added is not None:
                    connection.execute("INSERT INTO thumbnails VALUES (?, ?)", (added[0], content.thumbnail))
            remove_image_texts(connection, [image.name for image, _ in images])
            rows = [{**self._convert_image_to_row(image), "hash": digest} for image, digest in images]
            connection.executemany(INSERT_IMAGE, rows)
            add_image_texts(connection, {image.name: image for image, _ in images}.values())

    def remove_images(self, names: Sequence[str]) -> None:
        if not names and not self._may_have_orphans:
            return  # an unnecessary write would invalidate the caches of all readers
        with self._db.open_transaction() as connection:
            remove_image_texts(connection, names)
            connection.executemany("DELETE FROM images WHERE name = ?", [(name,) for name in names])
            connection.execute("DELETE FROM contents WHERE id NOT IN (SELECT content FROM images)")
            self._may_have_orphans = False

    def save_recognized_texts(self, texts: Mapping[bytes, str]) -> None:
        with self._db.open_transaction() as connection:
            for digest, text in texts.items():
                row = connection.execute("SELECT id FROM contents WHERE hash = ?", (digest,)).fetchone()
                if row is not None:
                    set_recognized_text(connection, row[0], text)

    # ---- statements

    def _run_with_read_access(self, function: Callable[[SqlRunner], Result]) -> Result:
        return function(self._db.query)

    @contextmanager
    def _open_transaction(self) -> Iterator[SqlRunner]:
        with self._db.open_transaction() as connection:
            yield lambda statement, parameters: connection.execute(statement, parameters).fetchall()

    def _make_source_condition(self, source: str) -> tuple[str, dict[str, Any]]:
        parameters = {"source": source, **_make_path_parameters(glob.escape(source))}
        return f"(source = :source OR {INSIDE_PATH})", parameters

    def _make_path_condition(self, path: str) -> tuple[str, dict[str, Any]]:
        # File names often contain brackets, so brackets are matched literally. The root folder has an empty pattern.
        pattern = path.rstrip("/").replace("[", "[[]")
        is_absolute = path.startswith("/") or not pattern
        return INSIDE_PATH, _make_path_parameters(pattern if is_absolute else f"*/{pattern}")

    def _make_caption_condition(self, caption: str) -> tuple[str, dict[str, Any]]:
        return make_caption_condition(caption)

    # ---- searching

    def count_matches(self, image_filter: Filter) -> int:
        return len(self._get_matching_ids(image_filter)) if image_filter else self.count_images()[1]

    def _find_newest_contents(self, run: SqlRunner, image_filter: Filter, count: int, offset: int) -> list[int]:
        ids = self._get_matching_ids(image_filter, newest_first=True)
        return list(ids[offset : offset + count].tolist())

    def _find_nearest_contents(
        self, run: SqlRunner, vector: np.ndarray, depth: int, image_filter: Filter
    ) -> tuple[np.ndarray, np.ndarray]:
        # The last ranking is cached, because each page of a query also requires the top hits of the query.
        # The database state is read before the ranking, so that it cannot be newer than the ranking.
        key = self._db.read_database_state(), vector.tobytes(), image_filter
        cached = self._cache.get("nearest")
        if cached is None or cached[0][0] != key or cached[0][1] < depth:
            allowed_ids = self._get_matching_ids(image_filter) if image_filter else None
            cached = self._cache["nearest"] = (key, depth), self._rank_nearest_vectors(vector, depth, allowed_ids)
        ids, cosines = cached[1]
        return ids[:depth], cosines[:depth]

    def _rank_nearest_vectors(
        self, query: np.ndarray, count: int, allowed_ids: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids (int64) and cosine similarities (float32) of the nearest vectors, best first, then by id.

        Candidates are re-scored in stages, and each stage only appends hits to the ranking. The order of the hits
        therefore does not depend on `count`, so the pages of a query neither repeat nor skip images.

        Args:
            query: L2-normalised float32 vector of shape (D,).
            allowed_ids: Sorted ids of the vectors to search. Default: all vectors.
        """
        if allowed_ids is not None and len(allowed_ids) <= EXACT_BELOW:
            scores = self._fetch_vector_array(allowed_ids).astype(np.float32) @ query
            ranking = np.lexsort((allowed_ids, -scores))[:count]
            return allowed_ids[ranking], scores[ranking]
        stages = [MIN_CANDIDATES]
        while stages[-1] < CANDIDATES_PER_HIT * count:
            stages.append(2 * stages[-1])
        # Among vectors with equal codes, the number of candidates determines which ids are found, hence MIN_SCANNED.
        ids = self._get_quantized_vectors().find_nearest_ids(query, max(stages[-1], MIN_SCANNED), allowed_ids)
        scores, ranking = np.empty(0, np.float32), np.empty(0, np.int64)
        for size in stages:
            vectors = self._fetch_vector_array(ids[len(scores) : size]).astype(np.float32)
            scores = np.concatenate([scores, vectors @ query])
            order = np.lexsort((ids[:size], -scores))
            ranking = np.concatenate([ranking, order[~np.isin(order, ranking)]])[: size // CANDIDATES_PER_HIT]
        return ids[ranking[:count]], scores[ranking[:count]]

    def _find_word_matches(self, run: SqlRunner, query: WordQuery, image_filter: Filter) -> np.ndarray:
        def find_word_match_ids() -> np.ndarray:
            allowed_ids = self._get_matching_ids(image_filter) if image_filter else None
            with self._db.open_snapshot() as db:
                return find_word_matches(db, query, allowed_ids)

        ids: np.ndarray = self._get_cached_value(
            "word matches", (self._db.read_database_state(), query, image_filter), find_word_match_ids
        )
        return ids

    def _read_text_fields(
        self, run: SqlRunner, query: WordQuery, ids: Sequence[int]
    ) -> list[tuple[int, dict[str, str]]]:
        with self._db.open_snapshot() as db:
            return read_matching_text_fields(db, query, ids)

    def _read_images(
        self, run: SqlRunner, ids: Sequence[int], conditions: SqlConditions
    ) -> dict[int, tuple[IndexedImage, ...]]:
        columns = ", ".join(IMAGE_COLUMNS)

        def select_images(content_id: int, where: Sequence[str]) -> list[IndexedImage]:
            statement = f"SELECT {columns} FROM images WHERE {' AND '.join(where)} ORDER BY id LIMIT :limit"
            rows = run(statement, {**conditions.parameters, "content": content_id, "limit": MAX_LOCATIONS})
            return sorted(map(self._convert_row_to_image, rows), key=lambda image: image.name)

        images = {}
        for content_id in ids:
            content_images = select_images(content_id, ["content = :content"])
            if conditions.images and content_images:
                matching = select_images(content_id, ["content = :content", *conditions.images])
                content_images = list(dict.fromkeys([*matching, *content_images]))[:MAX_LOCATIONS]
            if content_images:
                images[content_id] = tuple(content_images)
        return images

    def _get_matching_ids(self, image_filter: Filter, newest_first: bool = False) -> np.ndarray:
        key = self._db.read_database_state(), image_filter
        slot = "newest ids" if newest_first else "ids"
        ids: np.ndarray = self._get_cached_value(slot, key, lambda: self._find_matching_ids(image_filter, newest_first))
        if newest_first:
            self._get_cached_value("ids", key, lambda: np.sort(ids))  # for `count_matches`
        return ids

    def _find_matching_ids(self, image_filter: Filter, newest_first: bool = False) -> np.ndarray:
        """Return the int64 ids of all contents with a matching image, in ascending order or newest image first."""
        conditions = self._build_filter_conditions(image_filter)
        where = [*conditions.images, *conditions.contents]
        if conditions.captions is not None:
            where.append(conditions.captions)
        with self._db.open_snapshot() as db:
            sql = (
                "SELECT images.content, images.taken FROM images JOIN contents ON contents.id = images.content "
                f"WHERE {' AND '.join(where)}"
            )
            rows = np.fromiter(db.execute(sql, conditions.parameters), MATCH_DTYPE)
        return sort_distinct_ids(rows["content"], -rows["taken"]) if newest_first else np.unique(rows["content"])

    # ---- vectors

    def _get_quantized_vectors(self) -> QuantizedVectors:
        """Return all quantised vectors. Vectors are cached: only those added since the last call are read, unless the
        scale must change."""
        with self._vectors_lock:  # of several concurrent searches, only one reads the vectors
            state = self._db.read_database_state()
            if self._vectors is not None and self._vectors[0] == state:
                return self._vectors[1]
            with self._db.open_snapshot() as db:
                ((max_abs,),) = db.execute("SELECT max(max_abs) FROM contents")
                vectors, last = QuantizedVectors(127 / max(max_abs or 0, 1e-6)), self._vectors
                if last is not None and last[0][-1] == state[-1] and last[1].scale <= vectors.scale:
                    vectors = last[1]
                else:  # free the old vectors first, because old and new vectors may not both fit in memory
                    last = self._vectors = None
                vectors = vectors.with_added_vectors(_read_vector_chunks(db, vectors.last_id))
                ((count,),) = db.execute("SELECT count(*) FROM contents")
                if count < len(vectors):
                    remaining = db.execute("SELECT id FROM contents ORDER BY id")
                    vectors = vectors.with_only_ids(np.array([content_id for (content_id,) in remaining], np.int64))
            self._vectors = state, vectors
            return vectors

    def _decode_vector(self, vector: bytes) -> np.ndarray:
        return np.frombuffer(vector, "<f2").astype(np.float32)

    def _fetch_vector_array(self, ids: np.ndarray) -> np.ndarray:
        """Return the vectors with the given ids, of shape (N, D), float16. Removed ids have zero vectors."""
        statement = f"SELECT id, vector FROM contents WHERE id {self.IN_IDS}"
        vectors: dict[int, bytes] = dict(self._db.query(statement, {"ids": json.dumps(ids.tolist())}))
        dim = int(self.read_metadata()["embed_dim"])
        zeros = bytes(2 * dim)
        joined = b"".join(vectors.get(content_id, zeros) for content_id in ids.tolist())
        return np.frombuffer(joined, "<f2").reshape(-1, dim)

    def _get_cached_value(self, name: str, state: Any, compute: Callable[[], Any]) -> Any:
        """Return the cached value of a name. If `state` has changed since the last call, compute the value again."""
        cached = self._cache.get(name)
        if cached is None or cached[0] != state:
            cached = self._cache[name] = state, compute()
        return cached[1]


def _make_path_parameters(pattern: str) -> dict[str, str]:
    return {"glob": pattern, "basename": os.path.basename(pattern)}


def _read_vector_chunks(db: sqlite3.Connection, last_id: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield chunks of int64 ids of shape (N,) and float16 vectors of shape (N, D) for all ids after `last_id`."""
    cursor = db.execute("SELECT id, vector FROM contents WHERE id > ? ORDER BY id", (last_id,))
    while rows := cursor.fetchmany(CHUNK):
        ids = np.array([content_id for content_id, _ in rows], dtype=np.int64)
        vectors = np.frombuffer(b"".join(vector for _, vector in rows), "<f2")
        yield ids, vectors.reshape(len(rows), -1)


# ---- quantised vectors


class QuantizedVectors:
    """Vectors quantised to int8 by rounding scale * x and clipping to ±127.

    All vectors have the same scale, so their dot products with a query are comparable. Blocks of vectors are sorted by
    id, so that an update copies only a few blocks.
    """

    def __init__(self, scale: float, blocks: Sequence[Block] = ()) -> None:
        self.scale, self.blocks = scale, tuple(blocks)

    @property
    def last_id(self) -> int:
        return int(self.blocks[-1][0][-1]) if self.blocks else 0

    def __len__(self) -> int:
        return sum(len(ids) for ids, _ in self.blocks)

    def with_added_vectors(self, chunks: Iterable[tuple[np.ndarray, np.ndarray]]) -> QuantizedVectors:
        """Return a copy that also contains the given vectors, passed as chunks of (int64 ids, float16 vectors).

        The ids must be larger than all existing ids. The copy shares most blocks with the original.
        """
        blocks = list(self.blocks)
        for ids, vectors in chunks:
            codes = quantize_to_int8(vectors, self.scale)
            if blocks and len(blocks[-1][0]) + len(ids) <= CHUNK:
                last_ids, last_codes = blocks.pop()
                ids, codes = np.concatenate([last_ids, ids]), np.concatenate([last_codes, codes])
            blocks.append((ids, codes))
        return QuantizedVectors(self.scale, blocks)

    def with_only_ids(self, ids: np.ndarray) -> QuantizedVectors:
        """Return a copy that contains only the vectors whose ids are in the sorted array `ids`."""
        blocks = [_select_vectors_from_block(block, ids) for block in self.blocks]
        return QuantizedVectors(self.scale, [block for block in blocks if len(block[0])])

    def find_nearest_ids(self, query: np.ndarray, count: int, allowed_ids: np.ndarray | None = None) -> np.ndarray:
        """Return the ids of the vectors with the largest dot products with the quantised query, largest first."""
        # The query may have a different scale, because a constant factor does not change the ranking.
        query_code = np.rint(query * (127 / max(float(np.abs(query).max()), 1e-6))).astype(np.int8)
        best_ids, best_distances = [np.empty(0, np.int64)], [np.empty(0, np.float32)]
        for block in self.blocks:
            ids, codes = block if allowed_ids is None else _select_vectors_from_block(block, allowed_ids)
            if len(ids):
                try:
                    matches = exact_search(codes, query_code, min(count, len(ids)), MetricKind.IP, exact=True)
                except (MemoryError, SystemError) as error:
                    if isinstance(error.__cause__, KeyboardInterrupt):  # usearch wraps KeyboardInterrupt
                        raise KeyboardInterrupt from None
                    raise
                best_ids.append(ids[matches.keys.astype(np.int64)])
                best_distances.append(matches.distances)
        ids = np.concatenate(best_ids)
        return ids[np.lexsort((ids, np.concatenate(best_distances)))[:count]]


def _select_vectors_from_block(block: Block, allowed_ids: np.ndarray) -> Block:
    """Return the allowed vectors of a block, or the block itself if all are allowed. `allowed_ids` must be sorted."""
    ids, codes = block
    first, end = np.searchsorted(allowed_ids, (ids[0], ids[-1] + 1))
    allowed = np.isin(ids, allowed_ids[first:end], assume_unique=True)
    return block if allowed.all() else (ids[allowed], codes[allowed])


def quantize_to_int8(vectors: np.ndarray, scale: float) -> np.ndarray:
    return np.clip(np.rint(vectors.astype(np.float32) * scale), -127, 127).astype(np.int8)


# ---- database


class SqliteDatabase:
    """Connection to an index database. Thread-safe."""

    def __init__(self, folder: Path, write: bool) -> None:
        """Open the database in an existing folder. If `write` is True and the database is empty, create the tables."""
        self.file = folder / INDEX_FILE
        if not self.file.exists():
            self.file.touch(mode=0o600)  # SQLite's temporary files inherit the permissions of the database
        self._lock = threading.RLock()
        with self._convert_sqlite_errors():
            self.file_id = self._read_file_id()
            self.connection = self._connect()
            version = int(self.connection.execute("PRAGMA user_version").fetchone()[0])
            self.is_empty = version == 0 and not write  # True if an empty database was opened for reading
            if version:
                check_format_version(self.file, version, FORMAT_VERSION, NEW_INDEX_ADVICE)
            if write:
                # No effect on existing databases. A page should have space for several vectors of about 2 KB each.
                self.connection.execute("PRAGMA page_size = 16384")
                self.connection.execute("PRAGMA journal_mode = WAL")
                self.connection.execute("PRAGMA foreign_keys = ON")
                if version == 0:
                    self.connection.executescript(f"BEGIN IMMEDIATE; {SCHEMA} {WORDS_SCHEMA} COMMIT;")

    def query(self, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> list[tuple[Any, ...]]:
        with self._lock, self._convert_sqlite_errors():
            self._reopen_if_replaced()
            return self.connection.execute(sql, parameters).fetchall()

    @contextmanager
    def open_transaction(self) -> Iterator[sqlite3.Connection]:
        """Open a transaction, which is rolled back if the `with` block raises an exception."""
        with self._lock, self._convert_sqlite_errors(), self.connection:
            self.connection.execute("BEGIN IMMEDIATE")
            yield self.connection

    @contextmanager
    def open_snapshot(self) -> Iterator[sqlite3.Connection]:
        """Open a separate connection that reads a snapshot of the database without blocking other threads.

        If the open file is no longer at its path, yield the main connection, which blocks other threads.
        """
        with self._convert_sqlite_errors():
            with self._lock:
                if not self._reopen_if_replaced():
                    yield self.connection
                    return
            with closing(self._connect()) as db:
                db.execute("BEGIN")
                yield db

    def read_database_state(self) -> tuple[Any, ...]:
        """Return a value that changes with every write to the database."""
        ((version,),) = self.query("PRAGMA data_version")  # data_version changes when another connection writes
        with self._lock:
            return version, self.connection.total_changes, self.file_id

    def _connect(self) -> sqlite3.Connection:
        mode = "mode=rw"
        if self._is_on_read_only_disk() and not Path(f"{self.file}-wal").exists():
            mode = "immutable=1"  # otherwise, SQLite would create files next to the database
        uri = f"{self.file.absolute().as_uri()}?{mode}"
        return sqlite3.connect(uri, uri=True, check_same_thread=False, isolation_level=None, timeout=60)

    def _reopen_if_replaced(self) -> bool:
        """If the index file has been replaced, open the new file. Return True if the connection reads the current file.

        If the file has been deleted, or the new index has no metadata yet, keep reading the old file and return False.
        Raise IndexUnavailableError if the new index has a different model or format.
        """
        file_id = self._read_file_id()
        if file_id in (self.file_id, ()):
            return bool(file_id)
        keys = "'fingerprint', 'image_fingerprint', 'embed_dim'"
        columns = "key, value, user_version FROM metadata, pragma_user_version"
        identity = f"SELECT {columns} WHERE key IN ({keys}) ORDER BY key"
        connection = self._connect()
        try:
            has_table = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'metadata'").fetchall()
            model = connection.execute(identity).fetchall() if has_table else []
            if not model:
                return False
            if model != self.connection.execute(identity).fetchall():
                raise IndexUnavailableError(
                    f"{self.file} was replaced with an index of a different model or format. To use the new index, "
                    "restart this command"
                )
            connection, self.connection, self.file_id = self.connection, connection, file_id
            return True
        finally:
            connection.close()

    def _is_on_read_only_disk(self) -> bool:
        if not hasattr(os, "statvfs"):  # Windows
            return False
        with suppress(OSError):
            return bool(os.statvfs(self.file.parent).f_flag & os.ST_RDONLY)
        return False

    def _read_file_id(self) -> tuple[int, ...]:
        """Return an identifier that changes if the database file is replaced, or () if the file does not exist.

        A connection to a file on a read-only disk does not notice that another machine changes the file. The identifier
        of such a file therefore also changes with each modification.
        """
        try:
            stat = self.file.stat()
        except FileNotFoundError:
            return ()
        if self._is_on_read_only_disk():
            return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
        return stat.st_dev, stat.st_ino

    @contextmanager
    def _convert_sqlite_errors(self) -> Iterator[None]:
        """Convert SQLite errors, such as a full disk, to OSErrors whose messages contain the file name and advice."""
        try:
            yield
        except sqlite3.Error as error:
            # OperationalError: a table is missing or locked, or the disk is full. DatabaseError: the file is corrupt.
            is_unavailable = isinstance(error, sqlite3.OperationalError) or type(error) is sqlite3.DatabaseError
            advice = ""
            if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_CORRUPT:
                advice = f". The index is corrupt. {NEW_INDEX_ADVICE}"
                if self._is_on_read_only_disk():
                    advice = f". If another machine is writing to the index, try again. Otherwise{advice[1:]}"
            elif not os.access(self.file.parent, os.W_OK):
                advice = ". Searching an index requires write access to its folder, because SQLite creates files there"
            raise (IndexUnavailableError if is_unavailable else OSError)(f"{self.file}: {error}{advice}") from error
