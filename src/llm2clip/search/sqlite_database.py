"""SQLite database of an index: tables, connections, transactions, and the log of changes.

SQLite commits each batch atomically, allows other processes to read during a write, and stores the database as a single
file that is easy to copy.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from llm2clip.runs.output_folder import INDEX_FILE, check_format_version
from llm2clip.runs.ranks import print_once
from llm2clip.search.backends import FORMAT_VERSION, NEW_INDEX_ADVICE

# The column "location" contains the reference to an image's bytes, and "max_abs" the largest absolute value in a
# vector. The table "changes" is a log of contents that were removed or whose images changed, so that readers can reload
# only these.
SCHEMA = f"""
CREATE TABLE metadata (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE contents (
  id INTEGER PRIMARY KEY AUTOINCREMENT, hash BLOB NOT NULL UNIQUE, vector BLOB NOT NULL, max_abs REAL NOT NULL,
  width INTEGER NOT NULL, height INTEGER NOT NULL);
CREATE INDEX contents_max_abs ON contents(max_abs);
CREATE TABLE thumbnails (id INTEGER PRIMARY KEY REFERENCES contents(id) ON DELETE CASCADE, jpeg BLOB NOT NULL);
CREATE TABLE images (
  name TEXT PRIMARY KEY, content INTEGER NOT NULL REFERENCES contents(id), location TEXT NOT NULL, source TEXT NOT NULL,
  file_version TEXT NOT NULL, captions TEXT NOT NULL, taken REAL NOT NULL);
CREATE INDEX images_content ON images(content);
CREATE INDEX images_source ON images(source);
CREATE INDEX images_taken ON images(taken);
CREATE TABLE changes (id INTEGER PRIMARY KEY AUTOINCREMENT, content INTEGER NOT NULL);
CREATE TRIGGER image_added AFTER INSERT ON images
  BEGIN INSERT INTO changes (content) VALUES (new.content); END;
CREATE TRIGGER image_removed AFTER DELETE ON images
  BEGIN INSERT INTO changes (content) VALUES (old.content); END;
CREATE TRIGGER content_removed AFTER DELETE ON contents
  BEGIN INSERT INTO changes (content) VALUES (old.id); END;
PRAGMA user_version = {FORMAT_VERSION};
"""
MAX_LOG_LENGTH = 100_000  # a reader that has missed more changes than this reloads everything
NETWORK_FILE_SYSTEMS = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "fuse.sshfs", "afs", "lustre", "gpfs", "beegfs", "ceph", "fuse.glusterfs"}
)


class LogState(NamedTuple):
    """Position in the log of changes, and the states that must be unchanged for the log to be usable.

    Args:
        schema: SQLite's schema version. VACUUM, which renumbers rows, also changes it.
        immutable_state: Size and modification time of a database file that was opened as immutable, otherwise None.
            Another index may replace such a file.
        last: Largest id in the log.
    """

    schema: int
    immutable_state: tuple[int, int] | None
    last: int


class SqliteDatabase:
    """Connection to the database of an index. Instances are thread-safe.

    Attributes:
        is_empty: True if the database was empty when it was opened for reading.
    """

    def __init__(self, folder: Path, write: bool) -> None:
        """
        Args:
            folder: Index folder, which must exist.
            write: If True, open the database for writing, and create it if it does not exist. Only the current user can
                read a new database.

        Raises:
            FormatVersionError: The index has another format version.
            OSError: The database cannot be opened.
        """
        self.file = folder / INDEX_FILE
        if not self.file.exists():
            self.file.touch(mode=0o600)  # SQLite gives its temporary files the same permissions
        self._lock = threading.RLock()
        # Size and modification time of the database file when it was opened as immutable. None if it was opened
        # normally.
        self._immutable_state: tuple[int, int] | None = None
        with self._convert_errors():
            self.connection = self._connect()
            version = int(self.connection.execute("PRAGMA user_version").fetchone()[0])
            self.is_empty = version == 0 and not write
            if version:
                check_format_version(self.file, version, FORMAT_VERSION, NEW_INDEX_ADVICE)
            if write:
                _warn_if_on_network(folder)
                # Affects only new files. A vector takes about 2 KB, and several vectors should fit in a page.
                self.connection.execute("PRAGMA page_size = 16384")
                self.connection.execute("PRAGMA journal_mode = WAL")
                self.connection.execute("PRAGMA foreign_keys = ON")
                self.connection.execute("PRAGMA recursive_triggers = ON")  # make REPLACE also run the log's triggers
                if version == 0:
                    self.connection.executescript(f"BEGIN IMMEDIATE; {SCHEMA} COMMIT;")

    def query(self, sql: str, parameters: Sequence[Any] | dict[str, Any] = ()) -> list[tuple[Any, ...]]:
        """Run a statement and return all rows."""
        with self._lock, self._convert_errors():
            if self._immutable_state is not None:
                state = self._read_file_state()
                if state != self._immutable_state:  # another process with write access has changed the file
                    self._immutable_state, self.connection = state, self._connect()
            return self.connection.execute(sql, parameters).fetchall()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Yield a connection for the statements of one transaction, which is rolled back after an exception."""
        with self._lock, self._convert_errors(), self.connection:
            self.connection.execute("BEGIN IMMEDIATE")
            yield self.connection

    @contextmanager
    def snapshot(self) -> Iterator[sqlite3.Connection]:
        """Open a separate connection that reads from a snapshot of the database without blocking other threads."""
        with self._convert_errors(), closing(self._connect()) as db:
            db.execute("BEGIN")
            yield db

    # ---- changes

    def state(self) -> tuple[Any, ...]:
        """Return a value that changes with every write to the database."""
        ((version,),) = self.query("PRAGMA data_version")  # changes when another connection writes to the database
        return version, self.connection.total_changes, self._immutable_state

    def trim_log(self, connection: sqlite3.Connection) -> None:
        """Delete all but the latest changes from the log."""
        connection.execute("DELETE FROM changes WHERE id <= (SELECT max(id) FROM changes) - ?", (MAX_LOG_LENGTH,))

    def log_state(self, db: sqlite3.Connection) -> LogState:
        """Return the position of the last entry in the log of changes."""
        ((schema,),) = db.execute("PRAGMA schema_version")
        ((last,),) = db.execute("SELECT coalesce(max(id), 0) FROM changes")
        return LogState(schema, self._immutable_state, last)

    def can_update(self, db: sqlite3.Connection, old: LogState, new: LogState) -> bool:
        """Return True if the log contains all changes between two states, and they are few enough for an update."""
        if old[:2] != new[:2] or new.last - old.last > MAX_LOG_LENGTH:
            return False
        ((first,),) = db.execute("SELECT coalesce(min(id), 1) FROM changes")
        return bool(first <= old.last + 1)

    # ---- connection

    def _connect(self) -> sqlite3.Connection:
        """Open a connection to the database. In a read-only folder, open the database as immutable.

        SQLite creates files next to the database even for reading, so a normal connection fails in a read-only folder.
        """
        options: dict[str, Any] = {"check_same_thread": False, "isolation_level": None, "timeout": 60}
        if self._immutable_state is None:
            try:
                db = sqlite3.connect(self.file, **options)
                db.execute("PRAGMA user_version")
            except sqlite3.OperationalError:
                log = self.file.with_name(f"{INDEX_FILE}-wal")
                has_unmerged_writes = log.exists() and log.stat().st_size > 0
                if os.access(self.file.parent, os.W_OK) or has_unmerged_writes:
                    raise
                self._immutable_state = self._read_file_state()
        if self._immutable_state is not None:
            db = sqlite3.connect(f"{self.file.absolute().as_uri()}?immutable=1", uri=True, **options)
        return db

    def _read_file_state(self) -> tuple[int, int]:
        """Return the size and modification time of the database file."""
        stat = self.file.stat()
        return stat.st_size, stat.st_mtime_ns

    @contextmanager
    def _convert_errors(self) -> Iterator[None]:
        """Convert SQLite errors, such as a full disk or a locked database, to OSErrors that contain the file name."""
        try:
            yield
        except sqlite3.Error as error:
            raise OSError(f"{self.file}: {error}") from error


def _warn_if_on_network(folder: Path) -> None:
    """Print a message if a folder is on a network file system, where SQLite's write-ahead log is unsafe."""
    path = folder.resolve()
    partitions = [part for part in psutil.disk_partitions(all=True) if path.is_relative_to(part.mountpoint)]
    partition = max(partitions, key=lambda part: len(part.mountpoint), default=None)
    if partition is not None and partition.fstype in NETWORK_FILE_SYSTEMS:
        print_once(
            f"{folder} is on a network file system ({partition.fstype}). Do not search it from other machines while "
            "`llm2clip index` is running."
        )
