"""Connections to the PostgreSQL schema of an index."""

from __future__ import annotations

import hashlib
import queue
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar
from urllib.parse import parse_qsl, quote, urlencode

import psycopg
from pgvector.psycopg import register_vector
from psycopg import errors, pq, sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from llm2clip.runs.output_folder import FolderInUseError
from llm2clip.search.backends import SqlRunner, hide_password
from llm2clip.search.types import FairSemaphore, IndexUnavailableError

Connection = psycopg.Connection[tuple[Any, ...]]
Result = TypeVar("Result")
DEFAULT_SCHEMA = "llm2clip"
LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})
# If a password contained an unencoded @, libpq would use part of the password as the host and show it in messages.
ADDRESS = re.compile(r"\w+://([^/@]*@)?[^@]*")
SCHEMA_NAME = re.compile(r"(?!pg_|public$)[A-Za-z_][A-Za-z0-9_]{0,62}")
MIN_PGVECTOR = (0, 8)  # in earlier versions, an HNSW search with a filter may return too few rows
MAX_CONNECTIONS = 8  # maximum number of search connections per process
# With these defaults, a failure of the server or the network is detected within a minute.
CONNECTION_DEFAULTS = {
    "connect_timeout": "10",
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
    "tcp_user_timeout": "60000",
    "application_name": "llm2clip",
}
LOST_CONNECTION = (errors.AdminShutdown, errors.CrashShutdown, errors.CannotConnectNow)
# PostgreSQL raises these errors if an index is being replaced, memory or disk space is exhausted, or files are corrupt.
UNREADABLE = (errors.UndefinedTable, errors.InsufficientPrivilege, psycopg.OperationalError, psycopg.InternalError)


def parse_index_url(url: str) -> tuple[str, str]:
    """Split an index URL into a libpq connection string and the schema name.

    Connections to other machines must be encrypted, because they transmit captions, thumbnails and passwords.

    Raises:
        ValueError: The URL is invalid, or it disables encryption for a connection to another machine.
    """
    address, _, query_string = url.partition("?")
    query = parse_qsl(query_string, keep_blank_values=True)
    schema = dict(query).get("schema", DEFAULT_SCHEMA)
    location = hide_password(url)
    if SCHEMA_NAME.fullmatch(schema) is None:
        raise ValueError(
            f"{location}: the schema must consist of ASCII letters, digits and underscores, and must not be public or "
            f"start with pg_ (got {schema!r})"
        )
    parameters = urlencode([(key, value) for key, value in query if key != "schema"], quote_via=quote)
    try:
        if ADDRESS.fullmatch(address) is None:
            raise psycopg.ProgrammingError("the password contains @")
        options: dict[str, Any] = {**CONNECTION_DEFAULTS, **conninfo_to_dict(f"{address}?{parameters}")}
    except psycopg.ProgrammingError:
        raise ValueError(
            f"{location}: the URL must have the form postgresql://USER@HOST/DATABASE?schema=NAME. Special characters "
            "in the password must be percent-encoded"
        ) from None  # libpq's message may contain the password
    options["client_encoding"] = "utf8"
    settings = _resolve_connection_options(make_conninfo(**options))
    hosts = f"{settings.get('host', '')},{settings.get('hostaddr', '')}".split(",")
    if not all(host in LOOPBACK_HOSTS or host[:1] in ("", "/", "@") for host in hosts):
        if settings.get("sslmode") in ("disable", "allow"):
            raise ValueError(
                f"{location}: sslmode={settings['sslmode']} would send passwords, captions and thumbnails over the "
                f"network unencrypted. Use sslmode=require, or an SSH tunnel (ssh -L 5432:localhost:5432 "
                f"{hosts[0]})"
            )
        if settings.get("sslmode") == "prefer":  # libpq's default, which allows unencrypted connections
            options["sslmode"] = "require"
    return make_conninfo(**options), schema


def _resolve_connection_options(conninfo: str) -> dict[str, str]:
    """Return all connection options, including options from the environment and service files, without connecting."""
    connection = pq.PGconn.connect_start(conninfo.encode())
    options = {option.keyword.decode(): option.val.decode() for option in connection.info if option.val is not None}
    connection.finish()
    return options


class PostgresDatabase:
    """Connections to the schema of an index. Thread-safe.

    Searches share up to MAX_CONNECTIONS read-only connections. All writes use a separate connection, which holds the
    lock, so nothing can be written after the lock is lost.
    """

    def __init__(self, conninfo: str, schema: str, location: str) -> None:
        """Store the settings without connecting. `location` is the URL without secrets, for error messages."""
        self.conninfo, self.schema, self.location = conninfo, schema, location
        self._idle: queue.LifoQueue[Connection] = queue.LifoQueue()
        self._slots = FairSemaphore(MAX_CONNECTIONS)
        self._writer: Connection | None = None
        self._write_lock, self._is_locked = threading.RLock(), False

    # ---- reading

    def run_with_read_access(self, function: Callable[[Connection], Result]) -> Result:
        """Call a function with a connection in a read-only transaction, which reads a snapshot of the database.

        If the connection is lost, for example because the server has restarted, call the function again.
        """
        with self._slots:
            try:
                return self._read_in_transaction(function)
            except _LostConnectionError:
                self._close_idle_connections()  # the other connections are probably lost, too
            try:
                return self._read_in_transaction(function)
            except _LostConnectionError as error:
                raise self._make_unavailable_error(error) from error

    def _read_in_transaction(self, function: Callable[[Connection], Result]) -> Result:
        connection = self._get_connection()
        try:
            with connection.transaction():
                return function(connection)
        except psycopg.Error as error:
            if _is_connection_lost(connection, error):
                connection.close()
                raise _LostConnectionError(str(error)) from error
            error_type = IndexUnavailableError if isinstance(error, UNREADABLE) else OSError
            raise error_type(f"{self.location}: {error}") from error
        finally:
            if not connection.closed:
                self._idle.put(connection)

    def _get_connection(self) -> Connection:
        try:
            return self._idle.get_nowait()
        except queue.Empty:
            connection = self._connect()
            connection.read_only = True
            connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            return connection

    def _close_idle_connections(self) -> None:
        while True:
            try:
                self._idle.get_nowait().close()
            except queue.Empty:
                return

    # ---- writing

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the advisory lock of the index. If the connection is lost, PostgreSQL releases the lock."""
        digest = hashlib.sha256(f"llm2clip index {self.schema}".encode()).digest()
        key = int.from_bytes(digest[:8], "big", signed=True)
        with self._convert_postgres_errors():
            writer = self._get_write_connection()
            row = writer.execute("SELECT pg_try_advisory_lock(%s)", (key,)).fetchone()
        if row != (True,):
            raise FolderInUseError(f"another run is writing to {self.location}")
        self._is_locked = True
        try:
            yield
        finally:
            self._is_locked = False
            writer.close()

    @contextmanager
    def open_transaction(self) -> Iterator[Connection]:
        with self._write_lock, self._convert_postgres_errors():
            writer = self._get_write_connection()
            with writer.transaction():
                yield writer

    def vacuum(self, *tables: str) -> None:
        with self._write_lock, self._convert_postgres_errors():
            self._get_write_connection().execute(f"VACUUM (ANALYZE) {', '.join(tables)}")

    def create_schema(self, connection: Connection) -> None:
        """Create the schema if it does not exist. By default, only the owner can read a new schema."""
        row = connection.execute("SELECT 1 FROM pg_namespace WHERE nspname = %s", (self.schema,)).fetchone()
        if row is None:
            connection.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(self.schema)))

    def _get_write_connection(self) -> Connection:
        if self._writer is None or self._writer.closed:
            if self._is_locked:
                raise IndexUnavailableError(
                    f"{self.location}: the connection that holds the lock was lost. Run the command again to resume "
                    "after the last complete batch"
                )
            self._writer = self._connect(create_extensions=True)
            self._writer.prepare_threshold = 5  # otherwise, planning takes a quarter of the time to add an image
            self._close_idle_connections()  # idle connections have not registered the types of new extensions
        return self._writer

    @contextmanager
    def _convert_postgres_errors(self) -> Iterator[None]:
        """Convert PostgreSQL errors on the write connection to OSErrors that name the database."""
        try:
            yield
        except psycopg.Error as error:
            if self._writer is not None and _is_connection_lost(self._writer, error):
                self._writer.close()
                raise self._make_unavailable_error(error) from error
            raise OSError(f"{self.location}: {str(error).strip()}") from error

    # ---- connecting

    def _connect(self, create_extensions: bool = False) -> Connection:
        connection = None
        try:
            # A prepared statement could reuse a plan that does not suit the parameters, such as the path pattern.
            connection = psycopg.connect(self.conninfo, autocommit=True, prepare_threshold=None)
            if create_extensions:
                self._create_extensions(connection)
            self._set_up_connection(connection)
        except Exception as error:
            if connection is not None:
                connection.close()
            if isinstance(error, psycopg.OperationalError):
                raise self._make_unavailable_error(error) from error
            if isinstance(error, psycopg.Error):
                raise OSError(f"{self.location}: {str(error).strip()}") from error
            raise
        return connection

    def _set_up_connection(self, connection: Connection) -> None:
        """Check the encoding and the pgvector version, set the search path and register the vector types."""
        encoding = connection.info.parameter_status("server_encoding")
        if encoding != "UTF8":
            raise ValueError(f"{self.location}: the database encoding must be UTF8 (got {encoding})")
        rows = connection.execute(
            "SELECT nspname, extversion FROM pg_extension JOIN pg_namespace ON pg_namespace.oid = extnamespace "
            "WHERE extname = 'vector'"
        ).fetchall()
        schemas = [self.schema]
        for extension_schema, version in rows:
            schemas.append(extension_schema)
            if tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < MIN_PGVECTOR:
                minimum = ".".join(map(str, MIN_PGVECTOR))
                raise ValueError(
                    f"{self.location}: pgvector {version} is too old; llm2clip requires {minimum} or later. Install a "
                    "newer version on the server, then run `ALTER EXTENSION vector UPDATE` in the database"
                )
        search_path = sql.SQL(", ").join(map(sql.Identifier, schemas)).as_string(connection)
        # For queries of less than a second, JIT compilation takes more time than it saves.
        connection.execute(
            "SELECT set_config('search_path', %s, false), set_config('jit', 'off', false)", (search_path,)
        )
        if rows:
            register_vector(connection)

    def _create_extensions(self, connection: Connection) -> None:
        """Create the extension pgvector and, if possible, pg_trgm, which makes caption filters faster."""
        rows = connection.execute(
            "SELECT name FROM pg_available_extensions WHERE name IN ('vector', 'pg_trgm')"
        ).fetchall()
        names = {name for (name,) in rows}
        if "vector" not in names:
            raise OSError(
                f"{self.location}: the server does not have pgvector. Install pgvector 0.8 or later on the server"
            )
        try:
            connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
        except errors.InsufficientPrivilege as error:
            raise OSError(
                f"{self.location}: this database user cannot enable pgvector. Run `CREATE EXTENSION vector` in the "
                "database as an administrator"
            ) from error
        if "pg_trgm" in names:
            with suppress(errors.InsufficientPrivilege):  # pg_trgm is optional
                connection.execute("CREATE EXTENSION IF NOT EXISTS pg_trgm")

    def _make_unavailable_error(self, error: Exception) -> IndexUnavailableError:
        return IndexUnavailableError(f"{self.location}: no connection to PostgreSQL: {str(error).strip()}")


def make_sql_runner(connection: Connection) -> SqlRunner:
    """Return a function that runs SQL statements with parameters of the form `:NAME`."""

    def run_statement(statement: str, parameters: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        cursor = connection.execute(convert_sql_placeholders(statement), parameters)
        return [] if cursor.description is None else cursor.fetchall()

    return run_statement


def convert_sql_placeholders(statement: str) -> str:
    """Convert parameters of the form `:NAME` to the form `%(NAME)s`."""
    return re.sub(r"(?<!:):([a-z]\w*)", r"%(\1)s", statement.replace("%", "%%"))


class _LostConnectionError(Exception):
    """Raised when a connection is lost while it is in use."""


def _is_connection_lost(connection: Connection, error: psycopg.Error) -> bool:
    return connection.closed or isinstance(error, LOST_CONNECTION)
