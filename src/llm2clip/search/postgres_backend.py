"""PostgreSQL index backend, for an index that several machines search, or that is backed up with a database.

Each index is a schema of its own, with these tables:

    metadata      the index metadata and the format version
    calibration   the calibration of the relevance, in at most one row
    contents      hash, vector (halfvec of pgvector) and size of each distinct image
    thumbnails    JPEG thumbnails
    images        the files of each content, with their captions and capture times

All filters are SQL conditions with parameters, so a search reads only matching rows. From `approximate_above` distinct
images on, `finish` builds an HNSW graph in the database, and searches are approximate. Results are ranked by their
vectors only: words of the query are ignored, and recognised texts cannot be stored.

Names of schemas are restricted to ASCII letters, digits and underscores. All other text is passed as a parameter.
"""

from __future__ import annotations

import hashlib
import json
import queue
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, TypeVar
from urllib.parse import parse_qsl, quote, urlencode

import numpy as np
import psycopg
from pgvector import HalfVector
from pgvector.psycopg import register_vector
from psycopg import errors, pq, sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from llm2clip.data.image_refs import FileImage
from llm2clip.runs.output_folder import FolderInUseError, check_format_version
from llm2clip.search.backends import (
    FILES_PER_NEWEST,
    FORMAT_VERSION,
    LOOPBACK_HOSTS,
    MAX_LOCATIONS,
    NEW_INDEX_ADVICE,
    Filter,
    Hit,
    ImageState,
    IndexedContent,
    IndexedImage,
    IndexUnavailableError,
    hide_password,
    parse_content_id,
    ref_from_json,
    ref_to_json,
)

Connection = psycopg.Connection[tuple[Any, ...]]
Result = TypeVar("Result")

# Lower than with SQLite, whose exact search is several times as fast (benchmarks/postgres.py).
APPROXIMATE_ABOVE = 100_000
DEFAULT_SCHEMA = "llm2clip"
SCHEMA_NAME = re.compile(r"(?!pg_|public$)[A-Za-z_][A-Za-z0-9_]{0,62}")
MIN_PGVECTOR = (0, 8)  # earlier versions cannot continue an HNSW search until enough rows match a filter
MAX_CONNECTIONS = 8  # per process, for searches
# Detect within a minute that the server's machine or the network is down. Parameters in the URL take precedence.
CONNECTION_DEFAULTS = {
    "connect_timeout": "10",
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
    "tcp_user_timeout": "60000",
    "application_name": "llm2clip",
}
LOST_CONNECTION = (errors.AdminShutdown, errors.CrashShutdown, errors.CannotConnectNow)

MAX_INLINE_DIM = 3900  # larger vectors do not fit in a database page of 8 KB
MAX_HNSW_DIM = 4000  # limit of pgvector
HNSW_INDEX = "contents_hnsw"
EF_SEARCH, MAX_EF_SEARCH = 100, 1000  # candidates per HNSW search: the default, and pgvector's limit

# "key" is the SHA-256 hash of the name, because PostgreSQL limits the length of indexed text to about 2,700 bytes.
# "container" is the tar file or table that contains the image, and "folded_captions" are the captions in the form in
# which filters compare them. Both are NULL if there are none.
TABLES = """
CREATE TABLE metadata (key text PRIMARY KEY, value text NOT NULL);
CREATE TABLE calibration (data bytea NOT NULL);
CREATE TABLE contents (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, hash bytea NOT NULL UNIQUE, vector halfvec({dim}) NOT NULL,
  width integer NOT NULL, height integer NOT NULL);
CREATE TABLE thumbnails (id bigint PRIMARY KEY REFERENCES contents(id) ON DELETE CASCADE, jpeg bytea NOT NULL);
ALTER TABLE thumbnails ALTER COLUMN jpeg SET STORAGE EXTERNAL;
CREATE TABLE images (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, key bytea NOT NULL UNIQUE, name text COLLATE "C" NOT NULL,
  content bigint NOT NULL REFERENCES contents(id), location text NOT NULL, source text COLLATE "C" NOT NULL,
  file_version text NOT NULL, captions text[] NOT NULL, taken double precision NOT NULL, container text COLLATE "C",
  folded_captions text COLLATE "C");
CREATE INDEX images_content ON images (content, id);
CREATE INDEX images_taken ON images (taken);
"""
IMAGE_COLUMNS = "name, location, source, file_version, captions, taken"  # same order as in `_image_to_row`
INSERT_CONTENT = """
WITH added AS (
  INSERT INTO contents (hash, vector, width, height) VALUES (%s, %s, %s, %s) ON CONFLICT (hash) DO NOTHING RETURNING id)
INSERT INTO thumbnails SELECT id, %s FROM added
"""
INSERT_IMAGE = f"""
INSERT INTO images (key, content, {IMAGE_COLUMNS}, container, folded_captions)
VALUES (%s, (SELECT id FROM contents WHERE hash = %s), %s, %s, %s, %s, %s, %s, %s, %s)
ON CONFLICT (key) DO UPDATE SET content = excluded.content, location = excluded.location, source = excluded.source,
  file_version = excluded.file_version, captions = excluded.captions, taken = excluded.taken,
  container = excluded.container, folded_captions = excluded.folded_captions
"""
INSIDE_PATH = "(name LIKE %(path)s OR name LIKE %(path)s || '/%%' OR container LIKE %(path)s)"
IMAGE_CONDITIONS = {
    "path": INSIDE_PATH,
    "after": "taken >= %(after)s",
    "before": "taken <= %(before)s",
    "caption": "folded_captions LIKE %(caption)s",
}
MIN_SIDE_CONDITION = "least(width, height) >= %(min_side)s"
# PostgreSQL cannot store NUL characters and lone surrogates. They are stored as private-use characters of plane 16,
# which do not occur in practice. The separator is one of them too, so no caption filter matches across two captions.
STORABLE_CHARACTERS = {0: 0x10F7FF, **{code: code + 0x102000 for code in range(0xD800, 0xE000)}}
ORIGINAL_CHARACTERS = {stored: original for original, stored in STORABLE_CHARACTERS.items()}
CAPTION_SEPARATOR = "\U0010f7fe"


def open_index(location: str, write: bool, approximate_above: int | None) -> PostgresBackend:
    """Open the index at `postgresql://USER@HOST/DATABASE?schema=NAME`. See `open_backend`."""
    backend = PostgresBackend(location, APPROXIMATE_ABOVE if approximate_above is None else approximate_above)
    if not write and not backend.metadata():
        raise FileNotFoundError(
            f"{hide_password(location)} has no llm2clip index in the schema {backend.schema!r}. Create an index with "
            "`llm2clip index`"
        )
    return backend


class PostgresBackend:
    """Index backend in a schema of a PostgreSQL database with pgvector. Thread-safe.

    Several processes can search an index at the same time, even while one process writes to it.
    """

    def __init__(self, url: str, approximate_above: int = APPROXIMATE_ABOVE) -> None:
        """
        Args:
            url: Connection URL of libpq, with the additional parameter `schema`. The password can also come from
                PGPASSWORD, a password file or a service file.
            approximate_above: Minimum number of distinct images for which `finish` builds an HNSW graph, which makes
                searches approximate.

        Raises:
            ValueError: The URL is invalid, or the connection to another machine would not be encrypted.
            IndexUnavailableError: The server does not respond or rejects the connection.
        """
        conninfo, self.schema = parse_url(url)
        self.location, self.approximate_above = hide_password(url), approximate_above
        self._db = PostgresDatabase(conninfo, self.schema, self.location)
        self._has_changes = False
        self._may_have_orphans = True  # an interrupted run may leave contents that belong to no image

    # ---- building

    def lock(self) -> AbstractContextManager[None]:
        return self._db.lock()

    def metadata(self) -> dict[str, Any]:
        def read(connection: Connection) -> list[tuple[Any, ...]]:
            if not _exists(connection, f"{self.schema}.metadata"):
                return []
            return connection.execute("SELECT key, value FROM metadata").fetchall()

        metadata = {key: json.loads(value) for key, value in self._db.read(read)}
        if metadata:
            version = metadata.pop("format_version", None)
            check_format_version(self.location, version, FORMAT_VERSION, NEW_INDEX_ADVICE)
        return metadata

    def initialize(self, metadata: Mapping[str, Any]) -> None:
        with self._db.write() as connection:
            if not _exists(connection, f"{self.schema}.metadata"):
                self._db.create_schema(connection)
                _create_tables(connection, int(metadata["embed_dim"]))
            rows = [(key, json.dumps(value)) for key, value in {**metadata, "format_version": FORMAT_VERSION}.items()]
            connection.cursor().executemany(
                "INSERT INTO metadata VALUES (%s, %s) ON CONFLICT (key) DO UPDATE SET value = excluded.value", rows
            )

    def prepare_words(self) -> None:
        pass

    def indexed(self, sources: Sequence[str]) -> dict[str, ImageState]:
        states: dict[str, ImageState] = {}
        statement = f"SELECT name, file_version, captions FROM images WHERE source = %(source)s OR {INSIDE_PATH}"
        for source in sources:
            stored_source = _to_storable(source)
            parameters = {"source": stored_source, "path": _escape_pattern(stored_source)}
            for name, file_version, captions in self._db.query(statement, parameters):
                state = ImageState(_from_storable(file_version), tuple(map(_from_storable, captions)))
                states[_from_storable(name)] = state
        return states

    def existing(self, hashes: Iterable[bytes]) -> set[bytes]:
        rows = self._db.query("SELECT hash FROM contents WHERE hash = ANY(%s)", (list(hashes),))
        return {digest for (digest,) in rows}

    def add(self, contents: Sequence[IndexedContent], images: Sequence[tuple[IndexedImage, bytes]]) -> None:
        if not contents and not images:
            return
        content_rows = [
            (content.hash, HalfVector(content.vector), content.width, content.height, content.thumbnail)
            for content in contents
        ]
        image_rows = [(_hash_name(image.name), digest, *_image_to_row(image)) for image, digest in images]
        self._has_changes = self._may_have_orphans = True
        with self._db.write() as connection, connection.cursor() as cursor:
            if content_rows:
                cursor.executemany(INSERT_CONTENT, content_rows)
            if image_rows:
                cursor.executemany(INSERT_IMAGE, image_rows)

    def remove(self, names: Sequence[str]) -> None:
        if not names and not self._may_have_orphans:
            return
        keys = [_hash_name(name) for name in names]
        with self._db.write() as connection:
            removed = connection.execute("DELETE FROM images WHERE key = ANY(%s)", (keys,)).rowcount
            orphans = connection.execute(
                "DELETE FROM contents WHERE NOT EXISTS (SELECT FROM images WHERE content = contents.id)"
            ).rowcount
        self._has_changes |= removed + orphans > 0
        self._may_have_orphans = False

    def contents_without_text(self, sources: Sequence[str]) -> list[tuple[bytes, IndexedImage]]:
        return []

    def set_texts(self, texts: Mapping[bytes, str]) -> None:
        raise ValueError(f"{self.location}: recognised texts (--ocr) can be stored only in a local index")

    def finish(self) -> None:
        """Build the HNSW graph if there are enough distinct images, and update the statistics of the query planner.

        PostgreSQL then keeps the graph up to date.
        """
        _, contents = self.count()
        dim = int(self.metadata()["embed_dim"])
        with self._db.write() as connection:
            if contents >= self.approximate_above and dim <= MAX_HNSW_DIM:
                connection.execute(
                    f"CREATE INDEX IF NOT EXISTS {HNSW_INDEX} ON contents USING hnsw (vector halfvec_ip_ops)"
                )
            else:
                connection.execute(f"DROP INDEX IF EXISTS {HNSW_INDEX}")
        if self._has_changes:
            self._db.vacuum("contents", "images", "thumbnails")
            self._has_changes = False

    # ---- searching

    def count(self) -> tuple[int, int]:
        ((images, contents),) = self._db.query("SELECT (SELECT count(*) FROM images), (SELECT count(*) FROM contents)")
        return images, contents

    def duplicates(self, limit: int = 10) -> list[list[str]]:
        rows = self._db.query(
            "SELECT array_agg(name) FROM images GROUP BY content HAVING count(*) > 1 "
            "ORDER BY count(*) DESC, content LIMIT %s",
            (limit,),
        )
        return [sorted(map(_from_storable, names)) for (names,) in rows]

    def search(
        self,
        vector: np.ndarray | None,
        count: int,
        image_filter: Filter,
        offset: int = 0,
        words: Sequence[str] = (),
    ) -> list[Hit]:
        parameters = {**_make_parameters(image_filter), "count": count, "offset": offset}

        def read(connection: Connection) -> list[Hit]:
            if vector is None:
                rows = _find_newest(connection, parameters)
            else:
                query = {**parameters, "query": HalfVector(vector)}
                rows = _find_nearest(connection, query, is_approximate=_exists(connection, self._hnsw_index))
            images = _read_images(connection, [row[0] for row in rows], parameters)
            hits = []
            for content_id, width, height, image_count, distance in rows:
                if content_id in images:  # contents without images are removed at the end of an indexing run
                    score = None if distance is None else -distance
                    hits.append(Hit(str(content_id), score, images[content_id], image_count, width, height))
            return hits

        return self._db.read(read)

    @property
    def _hnsw_index(self) -> str:
        return f"{self.schema}.{HNSW_INDEX}"

    def count_matches(self, image_filter: Filter) -> int:
        parameters = _make_parameters(image_filter)
        statement = f"SELECT count(*) FROM contents WHERE {_make_content_condition(parameters)}"
        ((count,),) = self._db.query(statement, parameters)
        return int(count)

    def vector(self, hit_id: str) -> np.ndarray | None:
        rows = self._db.query("SELECT vector FROM contents WHERE id = %s", (parse_content_id(hit_id),))
        return rows[0][0].to_numpy().astype(np.float32) if rows else None

    def vectors(self, hit_ids: Sequence[str]) -> dict[str, np.ndarray]:
        ids = [parse_content_id(hit_id) for hit_id in hit_ids]
        rows = self._db.query("SELECT id, vector FROM contents WHERE id = ANY(%s)", (ids,))
        vectors = {content_id: vector.to_numpy().astype(np.float32) for content_id, vector in rows}
        return {str(content_id): vectors[content_id] for content_id in ids if content_id in vectors}

    def sample_ids(self, count: int) -> list[str]:
        rows = self._db.query("SELECT id FROM contents ORDER BY hash LIMIT %s", (count,))  # hashes are random
        return [str(content_id) for (content_id,) in rows]

    def newest_ids(self, count: int) -> list[str]:
        rows = self._db.query("SELECT content FROM images ORDER BY taken DESC LIMIT %s", (count * FILES_PER_NEWEST,))
        return list(dict.fromkeys(str(content_id) for (content_id,) in rows))[:count]

    def save_calibration(self, data: bytes) -> None:
        with self._db.write() as connection:
            connection.execute("DELETE FROM calibration")
            connection.execute("INSERT INTO calibration VALUES (%s)", (data,))

    def load_calibration(self) -> bytes | None:
        rows = self._db.query("SELECT data FROM calibration")
        return bytes(rows[0][0]) if rows else None

    def thumbnail(self, hit_id: str) -> bytes | None:
        rows = self._db.query("SELECT jpeg FROM thumbnails WHERE id = %s", (parse_content_id(hit_id),))
        return bytes(rows[0][0]) if rows else None

    def images(self, hit_id: str) -> tuple[IndexedImage, ...]:
        content_id = parse_content_id(hit_id)
        images = self._db.read(lambda connection: _read_images(connection, [content_id], {}))
        return images.get(content_id, ())


# ---- statements


def _exists(connection: Connection, name: str) -> bool:
    """Return True if there is a table or index with the given name, which includes the schema."""
    schema, relation = name.split(".")
    rows = connection.execute(
        "SELECT FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace WHERE nspname = %s AND relname = %s",
        (schema, relation),
    )
    return rows.fetchone() is not None


def _create_tables(connection: Connection, dim: int) -> None:
    connection.execute(TABLES.format(dim=dim))
    if dim <= MAX_INLINE_DIM:
        # By default, vectors of more than about 1,000 dimensions are stored in a separate table, which is slow to scan.
        connection.execute("ALTER TABLE contents ALTER COLUMN vector SET STORAGE PLAIN")
    trigrams = connection.execute(
        "SELECT nspname FROM pg_extension JOIN pg_namespace ON pg_namespace.oid = extnamespace "
        "WHERE extname = 'pg_trgm'"
    ).fetchone()
    if trigrams is not None:
        operators = sql.Identifier(trigrams[0], "gin_trgm_ops")
        connection.execute(
            sql.SQL("CREATE INDEX images_captions ON images USING gin (folded_captions {})").format(operators)
        )


def _make_parameters(image_filter: Filter) -> dict[str, Any]:
    """Return the SQL parameters of the filter fields that are not None. Paths and captions become LIKE patterns."""
    parameters: dict[str, Any] = {}
    for name in (*IMAGE_CONDITIONS, "min_side"):
        value = getattr(image_filter, name)
        if value is not None:
            parameters[name] = value
    if "path" in parameters:
        path = _to_storable(image_filter.path or "").rstrip("/")
        pattern = _escape_pattern(path).replace("*", "%").replace("?", "_")
        is_absolute = (image_filter.path or "").startswith("/") or not path
        parameters["path"] = pattern if is_absolute else f"%/{pattern}"
    if "caption" in parameters:
        parameters["caption"] = f"%{_escape_pattern(_fold_caption(image_filter.caption or ''))}%"
    return parameters


def _make_image_conditions(parameters: Mapping[str, Any], names: Iterable[str] = IMAGE_CONDITIONS) -> list[str]:
    return [IMAGE_CONDITIONS[name] for name in names if name in parameters]


def _make_content_condition(parameters: Mapping[str, Any]) -> str:
    """Return the SQL condition for contents with at least one image that meets all image conditions."""
    conditions = [MIN_SIDE_CONDITION] if "min_side" in parameters else []
    image_conditions = _make_image_conditions(parameters)
    if image_conditions:
        where = " AND ".join(["content = contents.id", *image_conditions])
        conditions.append(f"EXISTS (SELECT FROM images WHERE {where})")
    return " AND ".join(conditions) or "true"


COUNT_IMAGES = "(SELECT count(*) FROM images WHERE content = page.id)"


def _find_newest(connection: Connection, parameters: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """Return rows of id, width, height, image count and NULL, sorted by the latest time of the matching images."""
    conditions = _make_image_conditions(parameters)
    if "min_side" in parameters:
        conditions.append(MIN_SIDE_CONDITION)
    statement = (
        f"SELECT id, width, height, {COUNT_IMAGES}, NULL FROM ("
        "  SELECT contents.id, width, height, max(taken) AS latest FROM contents JOIN images ON content = contents.id"
        f"  WHERE {' AND '.join(conditions) or 'true'} GROUP BY contents.id"
        "  ORDER BY latest DESC, contents.id LIMIT %(count)s OFFSET %(offset)s) AS page ORDER BY latest DESC, id"
    )
    return connection.execute(statement, parameters).fetchall()


def _find_nearest(connection: Connection, parameters: Mapping[str, Any], is_approximate: bool) -> list[tuple[Any, ...]]:
    """Return rows of id, width, height, image count and negative cosine similarity, most similar first."""

    def select(distance: str, order: str) -> list[tuple[Any, ...]]:
        statement = (
            f"SELECT id, width, height, {COUNT_IMAGES}, distance FROM ("
            f"  SELECT id, width, height, {distance} AS distance FROM contents"
            f"  WHERE {_make_content_condition(parameters)}"
            f"  ORDER BY {order} LIMIT %(count)s OFFSET %(offset)s) AS page ORDER BY distance, id"
        )
        return connection.execute(statement, parameters).fetchall()

    if is_approximate:
        ef_search = min(max(EF_SEARCH, parameters["count"] + parameters["offset"]), MAX_EF_SEARCH)
        connection.execute(
            "SELECT set_config('hnsw.ef_search', %s, true), set_config('hnsw.iterative_scan', 'strict_order', true)",
            (str(ef_search),),
        )
        rows = select("vector <#> %(query)s", "vector <#> %(query)s")
        if len(rows) == parameters["count"]:
            return rows
        # pgvector stops after a number of candidates, so few or none of them may match a selective filter.
    return select("(vector <#> %(query)s) + 0", "distance, id")  # the addition excludes the HNSW graph


def _read_images(
    connection: Connection, content_ids: Sequence[int], parameters: Mapping[str, Any]
) -> dict[int, tuple[IndexedImage, ...]]:
    """Return at most MAX_LOCATIONS images per content, sorted by name, those that match path and time first.

    If there are more images, return those indexed first, so that PostgreSQL can stop reading early.
    """
    conditions = _make_image_conditions(parameters, ("path", "after", "before"))

    def select(matches: str, conditions: Sequence[str]) -> str:
        where = " AND ".join(["content = page.id", *conditions])
        columns = f"{matches} AS matches, {IMAGE_COLUMNS}"
        return f"(SELECT {columns} FROM images WHERE {where} ORDER BY images.id LIMIT %(locations)s)"

    selected = select("false", [])
    if conditions:
        selected = f"{select('true', conditions)} UNION ALL {selected}"
    rows = connection.execute(
        f"SELECT page.id, image.* FROM unnest(%(ids)s::bigint[]) AS page(id), LATERAL ({selected}) AS image",
        {**parameters, "ids": list(content_ids), "locations": MAX_LOCATIONS},
    ).fetchall()
    rows.sort(key=lambda row: (not row[1], row[2]))
    images: dict[int, dict[IndexedImage, None]] = {}
    for content_id, _, *row in rows:
        images.setdefault(content_id, {})[_image_from_row(row)] = None
    return {content_id: tuple(content_images)[:MAX_LOCATIONS] for content_id, content_images in images.items()}


# ---- text and rows


def _to_storable(text: str) -> str:
    return text.translate(STORABLE_CHARACTERS)


def _from_storable(text: str) -> str:
    return text if text.isascii() else text.translate(ORIGINAL_CHARACTERS)


def _fold_caption(caption: str) -> str:
    return _to_storable(caption.casefold())


def _escape_pattern(text: str) -> str:
    """Escape the characters that have a special meaning in LIKE patterns."""
    return re.sub(r"([\\%_])", r"\\\1", text)


def _hash_name(name: str) -> bytes:
    return hashlib.sha256(_to_storable(name).encode()).digest()


def _image_to_row(image: IndexedImage) -> tuple[Any, ...]:
    """Return an image's values for IMAGE_COLUMNS, the container and the folded captions."""
    return (
        _to_storable(image.name),
        ref_to_json(image.ref),
        _to_storable(image.source),
        _to_storable(image.file_version),
        [_to_storable(caption) for caption in image.captions],
        image.taken,
        None if isinstance(image.ref, FileImage) else _to_storable(image.container),
        CAPTION_SEPARATOR.join(map(_fold_caption, image.captions)) if image.captions else None,
    )


def _image_from_row(row: Sequence[Any]) -> IndexedImage:
    name, ref, source, file_version, captions, taken = row
    return IndexedImage(
        name=_from_storable(name),
        ref=ref_from_json(ref),
        source=_from_storable(source),
        file_version=_from_storable(file_version),
        captions=tuple(map(_from_storable, captions)),
        taken=taken,
    )


# ---- connections


def parse_url(url: str) -> tuple[str, str]:
    """Split an index URL into a connection string of libpq and the schema name.

    Connections to other machines must be encrypted, because they transmit captions and thumbnails, and may transmit a
    password.

    Raises:
        ValueError: The URL is invalid, or it disables encryption for another machine.
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
        options: dict[str, Any] = {**CONNECTION_DEFAULTS, **conninfo_to_dict(f"{address}?{parameters}")}
    except psycopg.ProgrammingError:
        raise ValueError(
            f"{location}: the URL must have the form postgresql://USER@HOST/DATABASE?schema=NAME. Special characters "
            "in the password must be percent-encoded"
        ) from None  # the message of libpq may contain the password
    options["client_encoding"] = "utf8"
    settings = _resolve_options(make_conninfo(**options))
    hosts = f"{settings.get('host', '')},{settings.get('hostaddr', '')}".split(",")
    if not all(host in LOOPBACK_HOSTS or host[:1] in ("", "/", "@") for host in hosts):
        if settings.get("sslmode") in ("disable", "allow"):
            raise ValueError(
                f"{location}: sslmode={settings['sslmode']} would send passwords, captions and thumbnails over the "
                f"network unencrypted. Use sslmode=require, or forward a local port (ssh -L 5432:localhost:5432 "
                f"{hosts[0]})"
            )
        if settings.get("sslmode") == "prefer":  # libpq's default, which falls back to an unencrypted connection
            options["sslmode"] = "require"
    return make_conninfo(**options), schema


def _resolve_options(conninfo: str) -> dict[str, str]:
    """Return all connection options, including those from environment variables and service files.

    `connect_start` opens a socket, but sends nothing.
    """
    connection = pq.PGconn.connect_start(conninfo.encode())
    options = {option.keyword.decode(): option.val.decode() for option in connection.info if option.val is not None}
    connection.finish()
    return options


class PostgresDatabase:
    """Connections to the schema of an index. Thread-safe.

    Searches share up to MAX_CONNECTIONS read-only connections. All writes use one other connection, which also holds
    the lock, so nothing is written after the lock is lost.
    """

    def __init__(self, conninfo: str, schema: str, location: str) -> None:
        """
        Args:
            location: URL without a password, for error messages.
        """
        self.conninfo, self.schema, self.location = conninfo, schema, location
        self._idle: queue.LifoQueue[Connection] = queue.LifoQueue()
        self._slots = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._writer: Connection | None = None
        self._write_lock, self._is_locked = threading.RLock(), False

    # ---- reading

    def query(self, statement: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> list[tuple[Any, ...]]:
        """Run a statement and return all rows."""
        return self.read(lambda connection: connection.execute(statement, parameters).fetchall())

    def read(self, function: Callable[[Connection], Result]) -> Result:
        """Call a function with a connection in a read-only transaction, which sees a single state of the database.

        If the connection is lost, for example because the server was restarted, call the function again with a new
        connection.
        """
        with self._slots:
            try:
                return self._read_once(function)
            except _ConnectionLost:
                self._close_idle_connections()  # they were probably lost too
            try:
                return self._read_once(function)
            except _ConnectionLost as error:
                raise self._make_unavailable_error(error) from error

    def _read_once(self, function: Callable[[Connection], Result]) -> Result:
        connection = self._take_connection()
        try:
            with connection.transaction():
                return function(connection)
        except psycopg.Error as error:
            if _is_lost(connection, error):
                connection.close()
                raise _ConnectionLost(str(error)) from error
            raise OSError(f"{self.location}: {error}") from error
        finally:
            if not connection.closed:
                self._idle.put(connection)

    def _take_connection(self) -> Connection:
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
        """Hold the index's advisory lock. PostgreSQL releases it when the connection ends.

        Raises:
            FolderInUseError: Another run holds the lock.
        """
        digest = hashlib.sha256(f"llm2clip index {self.schema}".encode()).digest()
        key = int.from_bytes(digest[:8], "big", signed=True)
        with self._convert_errors():
            writer = self._get_writer()
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
    def write(self) -> Iterator[Connection]:
        """Yield a connection with an open transaction, which is rolled back if an exception is raised."""
        with self._write_lock, self._convert_errors():
            writer = self._get_writer()
            with writer.transaction():
                yield writer

    def vacuum(self, *tables: str) -> None:
        """Remove deleted rows from tables and update the statistics of the query planner."""
        with self._write_lock, self._convert_errors():
            self._get_writer().execute(f"VACUUM (ANALYZE) {', '.join(tables)}")

    def create_schema(self, connection: Connection) -> None:
        """Create the schema if it does not exist. By default, only its owner can read it."""
        row = connection.execute("SELECT 1 FROM pg_namespace WHERE nspname = %s", (self.schema,)).fetchone()
        if row is None:
            connection.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(self.schema)))

    def _get_writer(self) -> Connection:
        if self._writer is None or self._writer.closed:
            if self._is_locked:
                raise IndexUnavailableError(
                    f"{self.location}: the connection that holds the lock was lost. Run the command again: it resumes "
                    "after the last complete batch"
                )
            self._writer = self._connect(create_extensions=True)
            self._close_idle_connections()  # they may have been opened before the extensions were created
        return self._writer

    @contextmanager
    def _convert_errors(self) -> Iterator[None]:
        """Convert PostgreSQL errors of the writer to OSErrors that name the index."""
        try:
            yield
        except psycopg.Error as error:
            if self._writer is not None and _is_lost(self._writer, error):
                self._writer.close()
                raise self._make_unavailable_error(error) from error
            raise OSError(f"{self.location}: {str(error).strip()}") from error

    # ---- connecting

    def _connect(self, create_extensions: bool = False) -> Connection:
        """Open a connection and set it up. With `create_extensions`, create missing extensions first."""
        try:
            # Without prepared statements, each plan takes the parameters, such as path patterns, into account.
            connection = psycopg.connect(self.conninfo, autocommit=True, prepare_threshold=None)
        except psycopg.OperationalError as error:
            raise self._make_unavailable_error(error) from error
        try:
            if create_extensions:
                self._create_extensions(connection)
            self._set_up(connection)
        except psycopg.Error as error:
            connection.close()
            if isinstance(error, psycopg.OperationalError):
                raise self._make_unavailable_error(error) from error
            raise OSError(f"{self.location}: {str(error).strip()}") from error
        except Exception:
            connection.close()
            raise
        return connection

    def _set_up(self, connection: Connection) -> None:
        """Set the schemas in which tables and extensions are looked up, and register the vector types."""
        encoding = connection.info.parameter_status("server_encoding")
        if encoding != "UTF8":
            raise ValueError(f"{self.location}: the database must have the encoding UTF8 (got {encoding})")
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
                    f"{self.location}: pgvector {version} is too old; llm2clip requires {minimum} or later. Install it "
                    "on the server, then run `ALTER EXTENSION vector UPDATE` in the database"
                )
        search_path = sql.SQL(", ").join(map(sql.Identifier, schemas)).as_string(connection)
        # JIT compilation takes longer than it saves in queries of less than a second.
        connection.execute(
            "SELECT set_config('search_path', %s, false), set_config('jit', 'off', false)", (search_path,)
        )
        if rows:
            register_vector(connection)

    def _create_extensions(self, connection: Connection) -> None:
        """Create the extension pgvector and, if possible, pg_trgm, which makes caption filters faster.

        Raises:
            OSError: pgvector is not installed on the server, or the user may not create it.
        """
        rows = connection.execute(
            "SELECT name FROM pg_available_extensions WHERE name IN ('vector', 'pg_trgm')"
        ).fetchall()
        names = {name for (name,) in rows}
        if "vector" not in names:
            raise OSError(f"{self.location}: the server has no pgvector. Install pgvector 0.8 or later on the server")
        try:
            connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
        except errors.InsufficientPrivilege as error:
            raise OSError(
                f"{self.location}: this database user cannot enable pgvector. Run `CREATE EXTENSION vector` in the "
                "database as an administrator"
            ) from error
        if "pg_trgm" in names:
            with suppress(errors.InsufficientPrivilege):  # without pg_trgm, caption filters read all captions
                connection.execute("CREATE EXTENSION IF NOT EXISTS pg_trgm")

    def _make_unavailable_error(self, error: Exception) -> IndexUnavailableError:
        return IndexUnavailableError(f"{self.location}: no connection to PostgreSQL: {str(error).strip()}")


class _ConnectionLost(Exception):
    """A connection was lost while it was in use."""


def _is_lost(connection: Connection, error: psycopg.Error) -> bool:
    return connection.closed or isinstance(error, LOST_CONNECTION)
