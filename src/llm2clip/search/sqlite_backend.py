"""An index in a folder: one SQLite file of pictures, vectors and thumbnails, and what searches the vectors.

    INDEX/
      pictures.sqlite    about, contents (hash, vector, thumbnail), pictures (name, place, captions, ...)
      graph.usearch      of a million contents and more; graph.json says of which

SQLite writes a batch whole or not at all, lets others read meanwhile, and is one file to copy.
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

from llm2clip.search.types import Filter, Hit, IndexedContent, IndexedImage, ref_from_json, ref_to_json
from llm2clip.search.vector_index import CHUNK, QuantizedVectors, VectorIndex, open_graph, update_graph

APPROXIMATE_ABOVE = 1_000_000
SCHEMA = """
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
PRAGMA user_version = 1;
"""
# In a folder, a tar or a parquet file, or itself. A ! or a [ ends the name of a tar or a table only: it is `base`.
UNDER = """substr(name, 1, length(:under)) = :under AND (substr(name, length(:under) + 1, 1) IN ('', '/')
  OR (substr(name, length(:under) + 1, 1) IN ('!', '[') AND place NOT LIKE '["FileImage"%'
      AND '/' || json_extract(place, '$[1].path') LIKE '%/' || :base ESCAPE '\\'))"""
FIELDS = "name, place, source, stamp, captions, taken"


class SqliteBackend:
    """An engine (`entries.Engine`) in a folder. One process writes at a time, any number read; threads share one."""

    def __init__(self, folder: Path, write: bool = False, approximate_above: int = APPROXIMATE_ABOVE) -> None:
        """
        Args:
            folder: of the index.
            write: make it if it is not there.
            approximate_above: contents from which `finish` grows a graph, which searches then use.

        Raises:
            FileNotFoundError: there is no index.
            ValueError: it is of another version.
        """
        self.folder, self.approximate_above = folder, approximate_above
        file = folder / "pictures.sqlite"
        if not write and not file.exists():
            raise FileNotFoundError(f"{folder} is no index: llm2clip index PHOTOS --model MODEL --out {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        self._file, self._lock, self._reading = file, threading.RLock(), threading.Lock()
        self._fixed: tuple[int, int] | None = None
        try:
            self._db = self._connected()
            if write:
                # Of a new file: a vector of 2 KB leaves little of such a page empty.
                self._db.execute("PRAGMA page_size = 16384")
                self._db.execute("PRAGMA journal_mode = WAL")
                self._db.execute("PRAGMA foreign_keys = ON")
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if write and not version:
                self._db.executescript(f"BEGIN IMMEDIATE; {SCHEMA} COMMIT;")
        except sqlite3.Error as error:
            raise OSError(f"{file}: {error}") from error
        if version not in (0, 1):
            raise ValueError(f"{file} is of version {version}, and 1 is what can be read; index into another --out")
        if not write and not (version and self.about()):
            raise FileNotFoundError(f"{folder} is an index that nothing was ever put into")
        self._orphans = True  # contents that no picture has may be there
        self._nearest: tuple[tuple[Any, ...], VectorIndex] | None = None

    def _connected(self) -> sqlite3.Connection:
        """Where nothing can be written beside the file, as SQLite does even to read, it is read as it lies there."""
        options: dict[str, Any] = {"check_same_thread": False, "isolation_level": None, "timeout": 60}
        if self._fixed is None:
            try:
                db = sqlite3.connect(self._file, **options)
                db.execute("PRAGMA user_version")
            except sqlite3.OperationalError:
                log = self._file.with_name("pictures.sqlite-wal")
                if os.access(self._file.parent, os.W_OK) or (log.exists() and log.stat().st_size):
                    raise
                self._fixed = self._state()
        if self._fixed is not None:
            db = sqlite3.connect(f"{self._file.absolute().as_uri()}?immutable=1", uri=True, **options)
        db.create_function("contains", 2, _contains, deterministic=True)
        return db

    def _state(self) -> tuple[int, int]:
        there = self._file.stat()
        return there.st_size, there.st_mtime_ns

    def _read(self, sql: str, values: Sequence[Any] | dict[str, Any] = ()) -> list[tuple[Any, ...]]:
        with self._lock, self._named():
            if self._fixed is not None and self._fixed != (now := self._state()):
                self._fixed, self._db = now, self._connected()  # somebody who may write has
            return self._db.execute(sql, values).fetchall()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """All of a block, or nothing."""
        with self._lock, self._named(), self._db:
            self._db.execute("BEGIN IMMEDIATE")
            yield

    @contextmanager
    def _named(self) -> Iterator[None]:
        """SQLite's errors (a full disk, a lock that another holds too long) as the system's, with the file's name."""
        try:
            yield
        except sqlite3.Error as error:
            raise OSError(f"{self._file}: {error}") from error

    # -- filling it

    def about(self) -> dict[str, Any]:
        return {key: json.loads(value) for key, value in self._read("SELECT key, value FROM about")}

    def begin(self, about: Mapping[str, Any]) -> None:
        rows = [(key, json.dumps(value)) for key, value in about.items()]
        with self._writing():
            self._db.executemany("INSERT OR REPLACE INTO about VALUES (?, ?)", rows)

    def known(self, sources: Sequence[str]) -> dict[str, tuple[str, tuple[str, ...]]]:
        found: dict[str, tuple[str, tuple[str, ...]]] = {}
        for source in sources:
            sql = f"SELECT name, stamp, captions FROM pictures WHERE source = :under OR ({UNDER})"
            rows = self._read(sql, {"under": source, "base": _base(source)})
            found.update((name, (stamp, tuple(json.loads(texts)))) for name, stamp, texts in rows)
        return found

    def have(self, hashes: Iterable[bytes]) -> set[bytes]:
        return {h for h in hashes if self._read("SELECT 1 FROM contents WHERE hash = ?", (h,))}

    def put(self, contents: Sequence[IndexedContent], pictures: Sequence[tuple[IndexedImage, bytes]]) -> None:
        with self._writing():
            self._orphans = True
            for c in contents:
                vector = np.ascontiguousarray(c.vector, dtype="<f2").tobytes()
                row = self._db.execute(
                    "INSERT INTO contents (hash, vector, largest, width, height) VALUES (?, ?, ?, ?, ?) "
                    "ON CONFLICT DO NOTHING RETURNING id",
                    (c.hash, vector, float(np.abs(c.vector).max()), c.width, c.height),
                ).fetchone()
                if row is not None:
                    self._db.execute("INSERT INTO thumbnails VALUES (?, ?)", (row[0], c.thumbnail))
            self._db.executemany(
                f"INSERT OR REPLACE INTO pictures (content, {FIELDS}) "
                f"VALUES ((SELECT id FROM contents WHERE hash = ?), ?, ?, ?, ?, ?, ?)",
                [
                    (digest, p.name, ref_to_json(p.place), p.source, p.stamp, json.dumps(p.captions), p.taken)
                    for p, digest in pictures
                ],
            )

    def forget(self, names: Sequence[str]) -> None:
        if not names and not self._orphans:
            return  # to write nothing new would make every reader read all again
        with self._writing():
            self._db.executemany("DELETE FROM pictures WHERE name = ?", [(name,) for name in names])
            self._db.execute("DELETE FROM contents WHERE id NOT IN (SELECT content FROM pictures)")
            self._orphans = False

    def finish(self) -> None:
        ids = self._ids()
        if len(ids) >= self.approximate_above:
            update_graph(self.folder, ids, self._vectors, int(self.about()["width"]), self._largest())

    # -- asking it

    def count(self) -> tuple[int, int]:
        ((pictures,),) = self._read("SELECT count(*) FROM pictures")
        ((contents,),) = self._read("SELECT count(*) FROM contents")
        return pictures, contents

    def copies(self, limit: int = 10) -> list[list[str]]:
        sql = (
            "SELECT content FROM pictures GROUP BY content HAVING count(*) > 1 ORDER BY count(*) DESC, content LIMIT ?"
        )
        names = "SELECT name FROM pictures WHERE content = ? ORDER BY name"
        return [[name for (name,) in self._read(names, row)] for row in self._read(sql, (limit,))]

    def search(self, vector: np.ndarray, count: int, only: Filter) -> list[Hit]:
        among = self._among(only) if only else None
        ids, scores = self._searcher().search(vector.astype(np.float32), count, among)
        hits = []
        for number, score in zip(ids.tolist(), scores.tolist(), strict=True):
            pictures = self.pictures(str(number))
            sizes = self._read("SELECT width, height FROM contents WHERE id = ?", (number,))
            if pictures and sizes:  # else it went while this search ran
                hits.append(Hit(str(number), score, pictures, *sizes[0]))
        return hits

    def vector(self, hit: str) -> np.ndarray | None:
        rows = self._read("SELECT vector FROM contents WHERE id = ?", (_id(hit),))
        return np.frombuffer(rows[0][0], "<f2").astype(np.float32) if rows else None

    def thumbnail(self, hit: str) -> bytes | None:
        rows = self._read("SELECT jpeg FROM thumbnails WHERE id = ?", (_id(hit),))
        return bytes(rows[0][0]) if rows else None

    def pictures(self, hit: str) -> tuple[IndexedImage, ...]:
        rows = self._read(f"SELECT {FIELDS} FROM pictures WHERE content = ? ORDER BY name", (_id(hit),))
        return tuple(
            IndexedImage(name, ref_from_json(place), source, stamp, tuple(json.loads(captions)), taken)
            for name, place, source, stamp, captions, taken in rows
        )

    # -- vectors

    def _ids(self) -> np.ndarray:
        return np.array([i for (i,) in self._read("SELECT id FROM contents ORDER BY id")], dtype=np.int64)

    def _searcher(self) -> VectorIndex:
        """What searches the vectors; another once something was written."""
        with self._reading:  # one reads, and those that wait take what it made
            ((version,),) = self._read("PRAGMA data_version")
            graph = self.folder / "graph.json"
            state = version, self._db.total_changes, graph.stat().st_mtime_ns if graph.exists() else 0, self._fixed
            if self._nearest is None or self._nearest[0] != state:
                self._nearest = None  # before the next is read: both may not fit
                ids = self._ids()
                self._nearest = state, VectorIndex(self._codes, self._vectors, open_graph(self.folder, ids))
            return self._nearest[1]

    def _codes(self) -> QuantizedVectors:
        return QuantizedVectors(self._chunks(), int(self.about()["width"]), 127 / self._largest())

    def _largest(self) -> float:
        """The largest number in any vector."""
        ((largest,),) = self._read("SELECT max(largest) FROM contents")
        return max(float(largest or 0), 1e-6)

    def _chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        # Through a connection of its own: this takes seconds, in which others ask.
        with self._named(), closing(self._connected()) as db:
            cursor = db.execute("SELECT id, vector FROM contents ORDER BY id")
            while rows := cursor.fetchmany(CHUNK):
                vectors = np.frombuffer(b"".join(v for _, v in rows), "<f2")
                yield np.array([i for i, _ in rows], dtype=np.int64), vectors.reshape(len(rows), -1)

    def _vectors(self, ids: np.ndarray) -> np.ndarray:
        """float16 (N, D) of some contents; of one that is gone, zeros."""
        found: dict[int, bytes] = {}
        for start in range(0, len(ids), 500):
            some = ids[start : start + 500].tolist()
            found.update(self._read(f"SELECT id, vector FROM contents WHERE id IN ({_marks(some)})", some))
        width = int(self.about()["width"])
        joined = b"".join(found.get(i, bytes(2 * width)) for i in ids.tolist())
        return np.frombuffer(joined, "<f2").reshape(-1, width)

    def _among(self, only: Filter) -> np.ndarray:
        """Ids of the contents of the pictures that a filter lets through, sorted."""
        tests = {
            "under": UNDER,
            "caption": "contains(captions, :caption)",
            "after": "taken >= :after",
            "before": "taken <= :before",
            "larger": "min(width, height) >= :larger",
        }
        asked = {name: value for name, value in asdict(only).items() if value is not None}
        if "under" in asked:
            asked["under"] = asked["under"].rstrip("/")
            asked["base"] = _base(asked["under"])
        where = " AND ".join(tests[name] for name in asked if name in tests)
        sql = "SELECT DISTINCT contents.id FROM pictures JOIN contents ON contents.id = content"
        rows = self._read(f"{sql} WHERE {where} ORDER BY contents.id", asked)
        return np.array([i for (i,) in rows], dtype=np.int64)


def _base(path: str) -> str:
    """The last part of a path, as LIKE takes it."""
    return re.sub(r"([%_\\])", r"\\\1", os.path.basename(path))


def _contains(captions: str, words: str) -> bool:
    return any(words.casefold() in caption.casefold() for caption in json.loads(captions))


def _marks(values: Sequence[Any]) -> str:
    return ", ".join("?" * len(values))


def _id(hit: str) -> int:
    return int(hit) if hit.isascii() and hit.isdigit() and len(hit) < 19 else -1
