"""Connection to the SQLite file of an index, and its tables."""

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
from llm2clip.search.backends import FORMAT_VERSION, NEW_INDEX_ADVICE, IndexUnavailableError
from llm2clip.search.words import WORDS_SCHEMA

# The column "location" is the reference to an image's bytes, and "max_abs" is the largest absolute value in a vector.
# The table "changes" logs the contents that were removed or whose images changed, so readers reload only these.
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
CREATE TABLE calibration (data BLOB NOT NULL);
PRAGMA user_version = {FORMAT_VERSION};
"""
MAX_LOG_LENGTH = 100_000  # readers that have missed more changes than this reload everything
NETWORK_FILE_SYSTEMS = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "fuse.sshfs", "afs", "lustre", "gpfs", "beegfs", "ceph", "fuse.glusterfs"}
)


class LogPosition(NamedTuple):
    """Position in the change log, and the state that must stay unchanged for the log to remain usable.

    Args:
        schema: SQLite's schema version. VACUUM changes it, and also renumbers rows.
        immutable_state: Size and modification time of the database file if it was opened as immutable, otherwise None.
            Such a file may be replaced with another index.
        file_id: See `SqliteDatabase._read_file_id`.
        last: Largest id in the log.
    """

    schema: int
    immutable_state: tuple[int, int] | None
    file_id: tuple[int, int]
    last: int


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
        # Size and modification time of the database file when it was opened as immutable, or None if it was not.
        self._immutable_state: tuple[int, int] | None = None
        with self._convert_errors():
            self._file_id = self._rejected_id = self._read_file_id()
            self.connection = self._connect()
            version = int(self.connection.execute("PRAGMA user_version").fetchone()[0])
            self.is_empty = version == 0 and not write
            if version:
                check_format_version(self.file, version, FORMAT_VERSION, NEW_INDEX_ADVICE)
            if write:
                _warn_about_network_file_system(folder)
                # Affects only new databases. A page should hold several vectors, each of which takes about 2 KB.
                self.connection.execute("PRAGMA page_size = 16384")
                self.connection.execute("PRAGMA journal_mode = WAL")
                self.connection.execute("PRAGMA foreign_keys = ON")
                self.connection.execute("PRAGMA recursive_triggers = ON")  # so that REPLACE also logs its changes
                if version == 0:
                    self.connection.executescript(f"BEGIN IMMEDIATE; {SCHEMA} {WORDS_SCHEMA} COMMIT;")

    def query(self, sql: str, parameters: Sequence[Any] | dict[str, Any] = ()) -> list[tuple[Any, ...]]:
        """Run a statement and return all rows."""
        with self._lock, self._convert_errors():
            if self._read_file_id() not in (self._file_id, self._rejected_id, (0, 0)):
                self._open_new_file()
            if self._immutable_state is not None:
                state = self._read_file_state()
                if state != self._immutable_state:  # another process with write access has changed the file
                    self._immutable_state, self.connection = state, self._connect()
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
        if self._read_file_id() != self._file_id:
            with self._lock, self._convert_errors():
                yield self.connection
            return
        with self._convert_errors(), closing(self._connect()) as db:
            db.execute("BEGIN")
            yield db

    # ---- changes

    def read_state(self) -> tuple[Any, ...]:
        """Return a value that changes with every write to the database."""
        ((version,),) = self.query("PRAGMA data_version")  # changes when another connection writes
        with self._lock:
            return version, self.connection.total_changes, self._immutable_state, self._file_id

    def read_log_position(self, db: sqlite3.Connection) -> LogPosition:
        """Return the position of the last entry in the change log."""
        ((schema,),) = db.execute("PRAGMA schema_version")
        ((last,),) = db.execute("SELECT coalesce(max(id), 0) FROM changes")
        return LogPosition(schema, self._immutable_state, self._file_id, last)

    def can_update(self, db: sqlite3.Connection, old: LogPosition, new: LogPosition) -> bool:
        """Return True if the log contains all changes between two positions, and they are few enough for an update."""
        if old[:-1] != new[:-1] or new.last - old.last > MAX_LOG_LENGTH:
            return False
        ((first,),) = db.execute("SELECT coalesce(min(id), 1) FROM changes")
        return bool(first <= old.last + 1)

    # ---- connection

    def _connect(self) -> sqlite3.Connection:
        """Open a connection to the database. In a read-only folder, open the database as immutable.

        A normal connection would fail there, because SQLite creates files next to the database even when reading.
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
            old, self.connection, self._file_id = self.connection, self._connect(), new_id
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

    def _read_file_state(self) -> tuple[int, int]:
        """Return the database file's size and modification time."""
        stat = self.file.stat()
        return stat.st_size, stat.st_mtime_ns

    @contextmanager
    def _convert_errors(self) -> Iterator[None]:
        """Convert SQLite errors, such as a full disk or a locked database, to errors that name the file."""
        try:
            yield
        except sqlite3.Error as error:
            # A table is missing or locked, or the disk is full; or the file is corrupt or not a database.
            is_unavailable = isinstance(error, sqlite3.OperationalError) or type(error) is sqlite3.DatabaseError
            raise (IndexUnavailableError if is_unavailable else OSError)(f"{self.file}: {error}") from error


def _warn_about_network_file_system(folder: Path) -> None:
    """Print a warning if a folder is on a network file system, where SQLite's write-ahead log is unsafe."""
    path = folder.resolve()
    partitions = [part for part in psutil.disk_partitions(all=True) if path.is_relative_to(part.mountpoint)]
    partition = max(partitions, key=lambda part: len(part.mountpoint), default=None)
    if partition is not None and partition.fstype in NETWORK_FILE_SYSTEMS:
        print_once(
            f"{folder} is on a network file system ({partition.fstype}). Do not search this index from other machines "
            "while `llm2clip index` is running."
        )
