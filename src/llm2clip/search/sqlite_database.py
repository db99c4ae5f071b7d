"""Connection to the SQLite file of an index, and its tables."""

import os
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from llm2clip.runs.output_folder import check_format_version
from llm2clip.runs.ranks import print_once
from llm2clip.search.backends import FORMAT_VERSION, INDEX_FILE, NEW_INDEX_ADVICE, IndexUnavailableError
from llm2clip.search.metadata import CONTENT_FIELDS, IMAGE_FIELDS, define_columns
from llm2clip.search.words import WORDS_SCHEMA

COLUMN_TYPES = {float: "REAL", int: "INTEGER", str: "TEXT"}
# The column "location" is the reference to an image's bytes, and "max_abs" is the largest absolute value in a vector.
# The ids of contents are never reused, so contents with the same id are equal.
SCHEMA = f"""
CREATE TABLE metadata (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE calibration (data BLOB NOT NULL);
CREATE TABLE contents (
  id INTEGER PRIMARY KEY AUTOINCREMENT, hash BLOB NOT NULL UNIQUE, vector BLOB NOT NULL, max_abs REAL NOT NULL,
  {define_columns(CONTENT_FIELDS, COLUMN_TYPES)});
CREATE INDEX contents_max_abs ON contents(max_abs);
CREATE TABLE thumbnails (id INTEGER PRIMARY KEY REFERENCES contents(id) ON DELETE CASCADE, jpeg BLOB NOT NULL);
CREATE TABLE images (
  id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, content INTEGER NOT NULL REFERENCES contents(id),
  location TEXT NOT NULL, source TEXT NOT NULL, file_version TEXT NOT NULL, captions TEXT NOT NULL,
  {define_columns(IMAGE_FIELDS, COLUMN_TYPES)});
CREATE INDEX images_content ON images(content);
CREATE INDEX images_source ON images(source);
CREATE INDEX images_taken ON images(taken);
PRAGMA user_version = {FORMAT_VERSION};
"""


class SqliteDatabase:
    """Connection to an index database. Thread-safe.

    Attributes:
        is_empty: True if the database was empty when it was opened for reading.
    """

    def __init__(self, folder: Path, write: bool) -> None:
        """Open the database in an existing folder. With `write`, create the database if it does not exist."""
        self.file = folder / INDEX_FILE
        if not self.file.exists():
            self.file.touch(mode=0o600)  # SQLite's temporary files inherit these permissions
        self._lock = threading.RLock()
        with self._convert_errors():
            self.file_id = self._rejected_id = self._read_file_id()
            self.connection = self._connect()
            version = int(self.connection.execute("PRAGMA user_version").fetchone()[0])
            self.is_empty = version == 0 and not write
            if version:
                check_format_version(self.file, version, FORMAT_VERSION, NEW_INDEX_ADVICE)
            if write:
                # Affects only new databases. A page should hold several vectors, each of which takes about 2 KB.
                self.connection.execute("PRAGMA page_size = 16384")
                self.connection.execute("PRAGMA journal_mode = WAL")
                self.connection.execute("PRAGMA foreign_keys = ON")
                if version == 0:
                    self.connection.executescript(f"BEGIN IMMEDIATE; {SCHEMA} {WORDS_SCHEMA} COMMIT;")

    def query(self, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> list[tuple[Any, ...]]:
        """Run a statement and return all rows."""
        with self._lock, self._convert_errors():
            if self._read_file_id() not in (self.file_id, self._rejected_id, (0, 0)):
                self._open_new_file()
            return self.connection.execute(sql, parameters).fetchall()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Yield a connection with an open transaction, which is rolled back if an exception is raised."""
        with self._lock, self._convert_errors(), self.connection:
            self.connection.execute("BEGIN IMMEDIATE")
            yield self.connection

    @contextmanager
    def snapshot(self) -> Iterator[sqlite3.Connection]:
        """Open a separate connection to read a database snapshot without blocking other threads.

        If the file has been replaced or deleted, only the existing connection can read it, so other threads wait.
        """
        if self._read_file_id() != self.file_id:
            with self._lock, self._convert_errors():
                yield self.connection
            return
        with self._convert_errors(), closing(self._connect()) as db:
            db.execute("BEGIN")
            yield db

    def read_state(self) -> tuple[Any, ...]:
        """Return a value that changes with every write to the database."""
        ((version,),) = self.query("PRAGMA data_version")  # changes when another connection writes
        with self._lock:
            return version, self.connection.total_changes, self.file_id

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self.file, check_same_thread=False, isolation_level=None, timeout=60)

    def _open_new_file(self) -> None:
        """Read from the file that has replaced the index file since it was opened.

        Until the new file contains an index of the same model, continue with the old file, which remains readable even
        after it has been deleted.
        """
        identity = """SELECT key, value FROM metadata
          WHERE key IN ('fingerprint', 'image_fingerprint', 'embed_dim') ORDER BY key"""
        new_id = self._read_file_id()
        with closing(self._connect()) as connection:
            try:
                new_model = connection.execute(identity).fetchall()
            except sqlite3.Error:
                return  # the tables have not been created yet
        if new_model == self.connection.execute(identity).fetchall():
            old, self.connection, self.file_id = self.connection, self._connect(), new_id
            old.close()
        elif new_model and self._rejected_id != new_id:
            self._rejected_id = new_id
            print_once(f"{self.file} was replaced with an index of a different model. To use it, restart this command")

    def _read_file_id(self) -> tuple[int, int]:
        """Return the numbers by which the file system identifies the database file, or (0, 0) if it was deleted."""
        try:
            stat = self.file.stat()
        except FileNotFoundError:
            return 0, 0
        return stat.st_dev, stat.st_ino

    @contextmanager
    def _convert_errors(self) -> Iterator[None]:
        """Convert SQLite errors, such as a full disk or a locked database, to errors that name the file."""
        try:
            yield
        except sqlite3.Error as error:
            # A table is missing or locked, or the disk is full; or the file is corrupt or not a database.
            is_unavailable = isinstance(error, sqlite3.OperationalError) or type(error) is sqlite3.DatabaseError
            advice = ""
            if not os.access(self.file.parent, os.W_OK):
                advice = ". Searching an index requires write permission to its folder, where SQLite creates files"
            raise (IndexUnavailableError if is_unavailable else OSError)(f"{self.file}: {error}{advice}") from error
