"""Index backend that stores images, vectors and thumbnails in an SQLite file and searches the vectors in memory.

    INDEX/
      pictures.sqlite    about, contents (hash, vector, thumbnail), pictures (name, place, captions, ...)
      graph.usearch      HNSW graph; built only for a million or more distinct images
      graph.json         quantization scale of the graph, and a summary of the ids that the graph contains

With SQLite, each batch is committed atomically, other processes can read during a write, and the database is a single
file that is easy to copy.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from llm2clip.search.types import Filter, Hit, ImageState, IndexedContent, IndexedImage, ref_from_json, ref_to_json
from llm2clip.search.vector_index import (
    CHUNK,
    GRAPH_STATE_FILE,
    QuantizedVectors,
    VectorIndex,
    open_graph,
    update_graph,
)

APPROXIMATE_ABOVE = 1_000_000
SCHEMA_VERSION = 1
# The file, table and column names are those of version 0.1, so that existing indexes can still be opened:
# The table "about" contains the metadata, and the table "pictures" contains the images. The column "place" contains the
# reference to an image's bytes, and the column "largest" contains the largest absolute value in a vector.
DATABASE = "pictures.sqlite"
SCHEMA = f"""
CREATE TABLE about (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE contents (
  id INTEGER PRIMARY KEY AUTOINCREMENT, hash BLOB NOT NULL UNIQUE, vector BLOB NOT NULL, largest REAL NOT NULL,
  width INTEGER NOT NULL, height INTEGER NOT NULL);
CREATE INDEX contents_largest ON contents(largest);
CREATE TABLE thumbnails (id INTEGER PRIMARY KEY REFERENCES contents(id) ON DELETE CASCADE, jpeg BLOB NOT NULL);
CREATE TABLE pictures (
  name TEXT PRIMARY KEY, content INTEGER NOT NULL REFERENCES contents(id), place TEXT NOT NULL, source TEXT NOT NULL,
  stamp TEXT NOT NULL, captions TEXT NOT NULL, taken REAL NOT NULL);
CREATE INDEX pictures_content ON pictures(content);
CREATE INDEX pictures_source ON pictures(source);
CREATE INDEX pictures_taken ON pictures(taken);
PRAGMA user_version = {SCHEMA_VERSION};
"""
IMAGE_COLUMNS = "name, place, source, stamp, captions, taken"
# An image is inside :path if its name equals :path or starts with :path followed by "/" (folder), "!" (tar) or
# "[" (table). File and folder names may also contain "!" and "[". Therefore, an image whose name contains one of these
# two characters after :path must also be stored in a tar or table whose file name equals the last part of :path
# (:basename).
INSIDE_PATH = """substr(name, 1, length(:path)) = :path AND (substr(name, length(:path) + 1, 1) IN ('', '/')
  OR (substr(name, length(:path) + 1, 1) IN ('!', '[') AND place NOT LIKE '["FileImage"%'
      AND '/' || json_extract(place, '$[1].path') LIKE '%/' || :basename ESCAPE '\\'))"""
FILTER_CONDITIONS = {
    "path": INSIDE_PATH,
    "caption": "any_contains(captions, :caption)",
    "after": "taken >= :after",
    "before": "taken <= :before",
    "min_side": "min(width, height) >= :min_side",
}
IDS_PER_QUERY = 500  # SQLite limits the number of parameters per statement


class SqliteBackend:
    """Index backend in a local folder. Instances are thread-safe.

    Several processes can read an index at the same time, even while one process writes to it.
    """

    def __init__(self, folder: Path, write: bool = False, approximate_above: int = APPROXIMATE_ABOVE) -> None:
        """
        Args:
            folder: Folder of the index.
            write: Open the index for writing, and create it if it does not exist.
            approximate_above: Number of distinct images from which `finish` builds an HNSW graph, so that searches are
                approximate.

        Raises:
            FileNotFoundError: There is no index in the folder.
            ValueError: The schema version of the index is not supported.
        """
        self.folder, self.approximate_above = folder, approximate_above
        self._file = folder / DATABASE
        if not write and not self._file.exists():
            raise FileNotFoundError(
                f"{folder} is not an index; create one with: llm2clip index PHOTOS --model MODEL --out {folder}"
            )
        folder.mkdir(parents=True, exist_ok=True)
        self._lock, self._index_lock = threading.RLock(), threading.Lock()
        # Size and modification time of the database file when it was opened as immutable, or None if opened normally.
        self._immutable_state: tuple[int, int] | None = None
        self._may_have_orphans = True  # an interrupted run may leave rows in `contents` that belong to no image
        # The vector index, preceded by the state of the database from which it was built.
        self._vector_index: tuple[tuple[Any, ...], VectorIndex] | None = None
        version = self._open(write)
        if version not in (0, SCHEMA_VERSION):
            raise ValueError(
                f"{self._file} has schema version {version}, but only version {SCHEMA_VERSION} can be read; "
                "build a new index in another folder (--out)"
            )
        if not write and not (version and self.metadata()):
            raise FileNotFoundError(
                f"{folder} is an incomplete index without images: run llm2clip index again to complete it"
            )

    # ---- building

    def metadata(self) -> dict[str, Any]:
        return {key: json.loads(value) for key, value in self._query("SELECT key, value FROM about")}

    def initialize(self, metadata: Mapping[str, Any]) -> None:
        rows = [(key, json.dumps(value)) for key, value in metadata.items()]
        with self._transaction():
            self._db.executemany("INSERT OR REPLACE INTO about VALUES (?, ?)", rows)

    def indexed(self, sources: Sequence[str]) -> dict[str, ImageState]:
        states: dict[str, ImageState] = {}
        for source in sources:
            sql = f"SELECT name, stamp, captions FROM pictures WHERE source = :path OR ({INSIDE_PATH})"
            for name, stamp, captions in self._query(sql, _path_parameters(source)):
                states[name] = ImageState(stamp, tuple(json.loads(captions)))
        return states

    def existing(self, hashes: Iterable[bytes]) -> set[bytes]:
        return {digest for digest in hashes if self._query("SELECT 1 FROM contents WHERE hash = ?", (digest,))}

    def add(self, contents: Sequence[IndexedContent], images: Sequence[tuple[IndexedImage, bytes]]) -> None:
        image_rows = []
        for image, digest in images:
            captions = json.dumps(image.captions)
            ref = ref_to_json(image.ref)
            image_rows.append((digest, image.name, ref, image.source, image.stamp, captions, image.taken))
        with self._transaction():
            self._may_have_orphans = True
            for content in contents:
                self._add_content(content)
            self._db.executemany(
                f"INSERT OR REPLACE INTO pictures (content, {IMAGE_COLUMNS}) "
                "VALUES ((SELECT id FROM contents WHERE hash = ?), ?, ?, ?, ?, ?, ?)",
                image_rows,
            )

    def _add_content(self, content: IndexedContent) -> None:
        """Insert an image content and its thumbnail, unless the content is already in the database."""
        vector = np.ascontiguousarray(content.vector, dtype="<f2").tobytes()
        largest = float(np.abs(content.vector).max())
        row = self._db.execute(
            "INSERT INTO contents (hash, vector, largest, width, height) VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT DO NOTHING RETURNING id",
            (content.hash, vector, largest, content.width, content.height),
        ).fetchone()
        if row is not None:
            self._db.execute("INSERT INTO thumbnails VALUES (?, ?)", (row[0], content.thumbnail))

    def remove(self, names: Sequence[str]) -> None:
        if not names and not self._may_have_orphans:
            return  # avoid a write, because after every write, all open readers must reload all vectors
        with self._transaction():
            self._db.executemany("DELETE FROM pictures WHERE name = ?", [(name,) for name in names])
            self._db.execute("DELETE FROM contents WHERE id NOT IN (SELECT content FROM pictures)")
            self._may_have_orphans = False

    def finish(self) -> None:
        ids = self._content_ids()
        if len(ids) >= self.approximate_above:
            update_graph(self.folder, ids, self._fetch_vectors, self._dim(), self._largest())

    # ---- searching

    def count(self) -> tuple[int, int]:
        ((images,),) = self._query("SELECT count(*) FROM pictures")
        ((contents,),) = self._query("SELECT count(*) FROM contents")
        return images, contents

    def duplicates(self, limit: int = 10) -> list[list[str]]:
        largest_groups = (
            "SELECT content FROM pictures GROUP BY content HAVING count(*) > 1 ORDER BY count(*) DESC, content LIMIT ?"
        )
        names_of_content = "SELECT name FROM pictures WHERE content = ? ORDER BY name"
        groups = []
        for content in self._query(largest_groups, (limit,)):
            groups.append([name for (name,) in self._query(names_of_content, content)])
        return groups

    def search(self, vector: np.ndarray, count: int, image_filter: Filter) -> list[Hit]:
        allowed_ids = self._matching_ids(image_filter) if image_filter else None
        ids, scores = self._current_vector_index().search(vector.astype(np.float32), count, allowed_ids)
        hits = []
        for content_id, score in zip(ids.tolist(), scores.tolist(), strict=True):
            images = self.images(str(content_id))
            sizes = self._query("SELECT width, height FROM contents WHERE id = ?", (content_id,))
            if images and sizes:  # otherwise, another process removed the image during this search
                width, height = sizes[0]
                hits.append(Hit(str(content_id), score, images, width, height))
        return hits

    def vector(self, hit_id: str) -> np.ndarray | None:
        rows = self._query("SELECT vector FROM contents WHERE id = ?", (_content_id(hit_id),))
        return np.frombuffer(rows[0][0], "<f2").astype(np.float32) if rows else None

    def thumbnail(self, hit_id: str) -> bytes | None:
        rows = self._query("SELECT jpeg FROM thumbnails WHERE id = ?", (_content_id(hit_id),))
        return bytes(rows[0][0]) if rows else None

    def images(self, hit_id: str) -> tuple[IndexedImage, ...]:
        sql = f"SELECT {IMAGE_COLUMNS} FROM pictures WHERE content = ? ORDER BY name"
        images = []
        for name, ref, source, stamp, captions, taken in self._query(sql, (_content_id(hit_id),)):
            images.append(IndexedImage(name, ref_from_json(ref), source, stamp, tuple(json.loads(captions)), taken))
        return tuple(images)

    def _matching_ids(self, image_filter: Filter) -> np.ndarray:
        """Return the sorted ids of the contents with at least one image that meets all conditions of a filter."""
        parameters = {name: value for name, value in asdict(image_filter).items() if value is not None}
        where = " AND ".join(FILTER_CONDITIONS[name] for name in parameters)
        if image_filter.path is not None:
            parameters.update(_path_parameters(image_filter.path.rstrip("/")))
        rows = self._query(
            "SELECT DISTINCT contents.id FROM pictures JOIN contents ON contents.id = content "
            f"WHERE {where} ORDER BY contents.id",
            parameters,
        )
        return np.array([content_id for (content_id,) in rows], dtype=np.int64)

    # ---- vectors

    def _current_vector_index(self) -> VectorIndex:
        """Return a vector index of the current database. If the database has changed, rebuild the index first."""
        with self._index_lock:  # if several threads search, one thread builds the index while the others wait
            ((version,),) = self._query("PRAGMA data_version")  # changes when another connection writes to the database
            graph_state = self.folder / GRAPH_STATE_FILE
            graph_time = graph_state.stat().st_mtime_ns if graph_state.exists() else 0
            state = version, self._db.total_changes, graph_time, self._immutable_state
            if self._vector_index is None or self._vector_index[0] != state:
                self._vector_index = None  # free the old index first, because two indexes may not fit in memory
                graph = open_graph(self.folder, self._content_ids())
                self._vector_index = state, VectorIndex(self._quantize_all, self._fetch_vectors, graph)
            return self._vector_index[1]

    def _quantize_all(self) -> QuantizedVectors:
        return QuantizedVectors(self._vector_chunks(), self._dim(), 127 / self._largest())

    def _vector_chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the ids, int64 (N,), and vectors, float16 (N, D), of all distinct images, one chunk at a time."""
        # Use a separate connection, because reading all vectors takes seconds and would block other threads.
        with self._named_errors(), closing(self._connect()) as db:
            cursor = db.execute("SELECT id, vector FROM contents ORDER BY id")
            while rows := cursor.fetchmany(CHUNK):
                ids = np.array([content_id for content_id, _ in rows], dtype=np.int64)
                vectors = np.frombuffer(b"".join(vector for _, vector in rows), "<f2")
                yield ids, vectors.reshape(len(rows), -1)

    def _fetch_vectors(self, ids: np.ndarray) -> np.ndarray:
        """Return the vectors with the given ids, float16 (N, D). The vector of a removed id is returned as zeros."""
        vectors: dict[int, bytes] = {}
        for start in range(0, len(ids), IDS_PER_QUERY):
            chunk = ids[start : start + IDS_PER_QUERY].tolist()
            placeholders = ", ".join("?" * len(chunk))
            vectors.update(self._query(f"SELECT id, vector FROM contents WHERE id IN ({placeholders})", chunk))
        dim = self._dim()
        zeros = bytes(2 * dim)
        joined = b"".join(vectors.get(content_id, zeros) for content_id in ids.tolist())
        return np.frombuffer(joined, "<f2").reshape(-1, dim)

    def _content_ids(self) -> np.ndarray:
        rows = self._query("SELECT id FROM contents ORDER BY id")
        return np.array([content_id for (content_id,) in rows], dtype=np.int64)

    def _dim(self) -> int:
        return int(self.metadata()["width"])

    def _largest(self) -> float:
        """Return the largest absolute value in any vector."""
        ((largest,),) = self._query("SELECT max(largest) FROM contents")
        return max(float(largest or 0), 1e-6)

    # ---- database

    def _open(self, write: bool) -> int:
        """Connect to the database and return its schema version, where 0 means that the database was empty.

        If `write` is true and the database is empty, create the tables.
        """
        try:
            self._db = self._connect()
            if write:
                # Only has an effect on new files. A vector takes about 2 KB, and several vectors should fit in a page.
                self._db.execute("PRAGMA page_size = 16384")
                self._db.execute("PRAGMA journal_mode = WAL")
                self._db.execute("PRAGMA foreign_keys = ON")
            version = int(self._db.execute("PRAGMA user_version").fetchone()[0])
            if write and not version:
                self._db.executescript(f"BEGIN IMMEDIATE; {SCHEMA} COMMIT;")
        except sqlite3.Error as error:
            raise OSError(f"{self._file}: {error}") from error
        return version

    def _connect(self) -> sqlite3.Connection:
        """Open a connection to the database. In a read-only folder, open the database as immutable.

        SQLite creates files next to the database even for reading, so a normal connection fails in a read-only folder.
        """
        options: dict[str, Any] = {"check_same_thread": False, "isolation_level": None, "timeout": 60}
        if self._immutable_state is None:
            try:
                db = sqlite3.connect(self._file, **options)
                db.execute("PRAGMA user_version")
            except sqlite3.OperationalError:
                log = self._file.with_name(f"{DATABASE}-wal")
                has_unmerged_writes = log.exists() and log.stat().st_size > 0
                if os.access(self._file.parent, os.W_OK) or has_unmerged_writes:
                    raise
                self._immutable_state = self._file_state()
        if self._immutable_state is not None:
            db = sqlite3.connect(f"{self._file.absolute().as_uri()}?immutable=1", uri=True, **options)
        db.create_function("any_contains", 2, _any_contains, deterministic=True)
        return db

    def _file_state(self) -> tuple[int, int]:
        """Return the size and modification time of the database file."""
        stat = self._file.stat()
        return stat.st_size, stat.st_mtime_ns

    def _query(self, sql: str, parameters: Sequence[Any] | dict[str, Any] = ()) -> list[tuple[Any, ...]]:
        with self._lock, self._named_errors():
            if self._immutable_state is not None:
                state = self._file_state()
                if state != self._immutable_state:  # another process with write access has changed the file
                    self._immutable_state, self._db = state, self._connect()
            return self._db.execute(sql, parameters).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Run the statements in the `with` block as one transaction, and roll it back if an exception is raised."""
        with self._lock, self._named_errors(), self._db:
            self._db.execute("BEGIN IMMEDIATE")
            yield

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Convert SQLite errors, such as a full disk or a locked database, to OSErrors that contain the file name."""
        try:
            yield
        except sqlite3.Error as error:
            raise OSError(f"{self._file}: {error}") from error


def _path_parameters(path: str) -> dict[str, str]:
    """Return the SQL parameters for INSIDE_PATH, with LIKE wildcards in the last part of the path escaped."""
    return {"path": path, "basename": re.sub(r"([%_\\])", r"\\\1", os.path.basename(path))}


def _any_contains(captions: str, text: str) -> bool:
    """Return whether at least one caption in a JSON list contains a text, ignoring case."""
    return any(text.casefold() in caption.casefold() for caption in json.loads(captions))


def _content_id(hit_id: str) -> int:
    """Convert a hit's id to an integer. If the id is not a valid number, return -1, which is never a content id."""
    return int(hit_id) if hit_id.isascii() and hit_id.isdigit() and len(hit_id) < 19 else -1
