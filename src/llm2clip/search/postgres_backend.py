"""PostgreSQL index backend, for an index that several machines search, or that is backed up with a database.

Each index is a schema of its own, with these tables:

    metadata           the index metadata and the format version
    calibration        the calibration of the relevance, in at most one row
    contents           hash, vector (halfvec of pgvector) and size of each distinct image
    thumbnails         JPEG thumbnails
    images             the files of each content, with their captions, capture times and words
    recognized_texts   the text recognised in each content

All filters are SQL conditions with parameters, so a search reads only matching rows. From `approximate_above` distinct
images on, `finish` builds an HNSW graph in the database, and searches are approximate. Word search uses a text index
(GIN) of the database (see `search.postgres_words`).

Names of schemas are restricted to ASCII letters, digits and underscores. All other text is passed as a parameter.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
from pgvector import HalfVector
from psycopg.errors import Diagnostic

from llm2clip.data.image_refs import FileImage, to_valid_unicode
from llm2clip.runs.output_folder import check_format_version
from llm2clip.runs.ranks import print_once
from llm2clip.search.backends import (
    FILES_PER_NEWEST,
    FORMAT_VERSION,
    MAX_LOCATIONS,
    NEW_INDEX_ADVICE,
    Filter,
    Hit,
    ImageState,
    IndexedContent,
    IndexedImage,
    hide_password,
    parse_content_id,
    ref_from_json,
    ref_to_json,
)
from llm2clip.search.postgres_database import Connection, PostgresDatabase, parse_url
from llm2clip.search.postgres_words import (
    WORD_COLUMNS,
    create_trigram_index,
    escape_pattern,
    find_matched_fields,
    find_matches,
    make_match,
    make_word_columns,
)
from llm2clip.search.words import MAX_FUSED, WordQuery, fuse_rankings, make_fields, normalize

# Lower than with SQLite, whose exact search is several times as fast (benchmarks/postgres.py).
APPROXIMATE_ABOVE = 100_000
MAX_INLINE_DIM = 3900  # larger vectors do not fit in a database page of 8 KB
MAX_HNSW_DIM = 4000  # limit of pgvector
HNSW_INDEX = "contents_hnsw"
# Number of locations of a hit that are read to find the matching fields. The locations of an image usually have the
# same captions.
MATCHED_LOCATIONS = 5
MAX_EXACT_MATCHES = 50_000  # if at most this many images match a filter, they are searched exactly
EF_SEARCH, MAX_EF_SEARCH = 100, 1000  # candidates per HNSW search: the default, and pgvector's limit

# "key" is the SHA-256 hash of the name, because PostgreSQL limits the length of indexed text to about 2,700 bytes.
# "container" is the tar file or table that contains the image, and "folded_captions" are the captions in the form in
# which filters compare them. Both are NULL if there are none. `postgres_words` describes the columns for word search.
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
  camera text NOT NULL, date text NOT NULL, folded_captions text COLLATE "C", unspaced_texts text COLLATE "C",
  words tsvector NOT NULL);
CREATE INDEX images_content ON images (content, id);
CREATE INDEX images_taken ON images (taken);
CREATE INDEX images_words ON images USING gin (words);
CREATE TABLE recognized_texts (
  content bigint PRIMARY KEY REFERENCES contents(id) ON DELETE CASCADE, text text NOT NULL);
"""
IMAGE_COLUMNS = "name, location, source, file_version, captions, taken"  # same order as in `_image_to_row`
INSERT_CONTENT = """
WITH added AS (
  INSERT INTO contents (hash, vector, width, height) VALUES (%s, %s, %s, %s) ON CONFLICT (hash) DO NOTHING RETURNING id)
INSERT INTO thumbnails SELECT id, %s FROM added
"""
INSERT_IMAGE = f"""
INSERT INTO images (key, content, {IMAGE_COLUMNS}, container, {WORD_COLUMNS})
VALUES (%s, (SELECT id FROM contents WHERE hash = %s), %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s::tsvector)
ON CONFLICT (key) DO UPDATE SET content = excluded.content, location = excluded.location, source = excluded.source,
  file_version = excluded.file_version, captions = excluded.captions, taken = excluded.taken,
  container = excluded.container, camera = excluded.camera, date = excluded.date,
  folded_captions = excluded.folded_captions, unspaced_texts = excluded.unspaced_texts, words = excluded.words
"""
UPDATE_WORDS = f"UPDATE images SET ({WORD_COLUMNS}) = (%s, %s, %s, %s, %s::tsvector) WHERE id = %s"
INSERT_TEXT = """
INSERT INTO recognized_texts SELECT id, %s FROM contents WHERE hash = %s
ON CONFLICT (content) DO UPDATE SET text = excluded.text
"""
TEXT_ROWS = f"""
SELECT images.id, images.content, coalesce(recognized_texts.text, '') AS text, camera, date, {IMAGE_COLUMNS}
FROM images LEFT JOIN recognized_texts ON recognized_texts.content = images.content
"""
INSIDE_PATH = "(name LIKE %(path)s OR name LIKE %(path)s || '/%%' OR container LIKE %(path)s)"
INSIDE_SOURCE = f"(source = %(source)s OR {INSIDE_PATH})"
IMAGE_CONDITIONS = {
    "path": INSIDE_PATH,
    "after": "taken >= %(after)s",
    "before": "taken <= %(before)s",
    "caption": "folded_captions LIKE %(caption)s",
}
MIN_SIDE_CONDITION = "least(width, height) >= %(min_side)s"
# PostgreSQL cannot store NUL characters and lone surrogates. They are stored as private-use characters of plane 16,
# which do not occur in practice.
STORABLE_CHARACTERS = {0: 0x10F7FF, **{code: code + 0x102000 for code in range(0xD800, 0xE000)}}
ORIGINAL_CHARACTERS = {stored: original for original, stored in STORABLE_CHARACTERS.items()}


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

    def repair_words(self) -> None:
        """Do nothing, because PostgreSQL repairs its tables after a crash."""

    def indexed(self, sources: Sequence[str]) -> dict[str, ImageState]:
        states: dict[str, ImageState] = {}
        statement = f"SELECT name, file_version, captions FROM images WHERE {INSIDE_SOURCE}"
        for source in sources:
            for name, file_version, captions in self._db.query(statement, _make_source_parameters(source)):
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
        self._has_changes = self._may_have_orphans = True
        with self._db.write() as connection, connection.cursor() as cursor:
            if content_rows:
                cursor.executemany(INSERT_CONTENT, content_rows)
            if images:
                cursor.executemany(INSERT_IMAGE, _make_image_rows(connection, images))

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
        missing: dict[bytes, IndexedImage] = {}
        statement = (
            f"SELECT hash, {IMAGE_COLUMNS} FROM images JOIN contents ON contents.id = images.content "
            "WHERE NOT EXISTS (SELECT FROM recognized_texts WHERE recognized_texts.content = contents.id) "
            f"AND {INSIDE_SOURCE}"
        )
        for source in sources:
            for digest, *row in self._db.query(statement, _make_source_parameters(source)):
                missing.setdefault(digest, _image_from_row(row))
        return list(missing.items())

    def set_texts(self, texts: Mapping[bytes, str]) -> None:
        if not texts:
            return
        self._has_changes = True
        with self._db.write() as connection:
            text_rows = [(_to_storable(to_valid_unicode(text)), digest) for digest, text in texts.items()]
            connection.cursor().executemany(INSERT_TEXT, text_rows)
            rows = connection.execute(
                f"{TEXT_ROWS} WHERE images.content IN (SELECT id FROM contents WHERE hash = ANY(%s))", (list(texts),)
            ).fetchall()
            _update_words(connection, rows)

    def finish(self) -> None:
        """Build the HNSW graph if there are enough distinct images, and update the statistics of the query planner.

        PostgreSQL then keeps the graph up to date.
        """
        _, contents = self.count()
        dim = int(self.metadata()["embed_dim"])
        with self._db.write() as connection:
            if contents >= self.approximate_above and dim <= MAX_HNSW_DIM:
                connection.add_notice_handler(self._report_slow_graph)
                connection.execute(
                    f"CREATE INDEX IF NOT EXISTS {HNSW_INDEX} ON contents USING hnsw (vector halfvec_ip_ops)"
                )
                connection.remove_notice_handler(self._report_slow_graph)
            else:
                connection.execute(f"DROP INDEX IF EXISTS {HNSW_INDEX}")
        if self._has_changes:
            self._db.vacuum("contents", "images", "thumbnails")
            self._has_changes = False

    def _report_slow_graph(self, notice: Diagnostic) -> None:
        if "maintenance_work_mem" in (notice.message_primary or ""):
            print_once(
                f"{self.location}: the HNSW graph does not fit into the server's maintenance_work_mem, so building it "
                "takes much longer. To allow more memory, add &options=-c%20maintenance_work_mem%3D2GB to the URL"
            )

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
        parameters = _make_parameters(image_filter)
        if vector is not None:
            parameters["query"] = HalfVector(vector)
        query = WordQuery.parse(words)

        def read(connection: Connection) -> list[Hit]:
            matches = np.empty(0, np.int64)
            if vector is None:
                ids = _find_newest(connection, {**parameters, "count": count, "offset": offset})
            else:
                if query:
                    matches = find_matches(connection, query, _make_content_condition(parameters), parameters)
                ids = self._rank(connection, matches, count, offset, parameters)
            matched = _find_matched_fields(connection, query, set(ids) & set(matches.tolist()))
            images = _read_images(connection, ids, parameters)
            hits = []
            for content_id, *sizes, image_count, score, text in _read_contents(connection, ids, parameters):
                if content_id in images:  # contents without images are removed at the end of an indexing run
                    width, height = sizes
                    fields, locations = matched.get(content_id, ()), images[content_id]
                    hits.append(Hit(str(content_id), score, locations, image_count, width, height, fields, text))
            return hits

        return self._db.read(read)

    def _rank(
        self, connection: Connection, matches: np.ndarray, count: int, offset: int, parameters: Mapping[str, Any]
    ) -> list[int]:
        """Return a page of content ids, ranked by their similarity to the query vector and by their words."""
        depth = max(offset + count, MAX_FUSED) if len(matches) else count
        page = {**parameters, "count": depth, "offset": 0 if len(matches) else offset}
        ids = _find_nearest(connection, page, is_approximate=_exists(connection, f"{self.schema}.{HNSW_INDEX}"))
        if not len(matches):
            return ids
        fused: list[int] = fuse_rankings(np.array(ids, np.int64), matches)[offset : offset + count].tolist()
        return fused

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
    create_trigram_index(connection, "images_captions", "folded_captions")
    create_trigram_index(connection, "images_unspaced_texts", "unspaced_texts")


def _make_parameters(image_filter: Filter) -> dict[str, Any]:
    """Return the SQL parameters of the filter fields that are not None. Paths and captions become LIKE patterns."""
    parameters: dict[str, Any] = {}
    for name in (*IMAGE_CONDITIONS, "min_side"):
        value = getattr(image_filter, name)
        if value is not None:
            parameters[name] = value
    if "path" in parameters:
        path = _to_storable(image_filter.path or "").rstrip("/")
        pattern = escape_pattern(path).replace("*", "%").replace("?", "_")
        is_absolute = (image_filter.path or "").startswith("/") or not path
        parameters["path"] = pattern if is_absolute else f"%/{pattern}"
    if "caption" in parameters:
        parameters["caption"] = f"%{escape_pattern(normalize(image_filter.caption or ''))}%"
    return parameters


def _make_source_parameters(source: str) -> dict[str, str]:
    """Return the SQL parameters of INSIDE_SOURCE."""
    stored_source = _to_storable(source)
    return {"source": stored_source, "path": escape_pattern(stored_source)}


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


def _find_newest(connection: Connection, parameters: Mapping[str, Any]) -> list[int]:
    """Return a page of content ids, sorted by the latest time of the matching images."""
    conditions = _make_image_conditions(parameters)
    if "min_side" in parameters:
        conditions.append(MIN_SIDE_CONDITION)
    statement = (
        "SELECT contents.id FROM contents JOIN images ON content = contents.id"
        f" WHERE {' AND '.join(conditions) or 'true'} GROUP BY contents.id"
        " ORDER BY max(taken) DESC, contents.id LIMIT %(count)s OFFSET %(offset)s"
    )
    return [content_id for (content_id,) in connection.execute(statement, parameters)]


def _find_nearest(connection: Connection, parameters: Mapping[str, Any], is_approximate: bool) -> list[int]:
    """Return a page of content ids, most similar first."""
    condition = _make_content_condition(parameters)

    def select(distance: str, order: str) -> list[int]:
        statement = (
            "SELECT id FROM ("
            f"  SELECT id, {distance} AS distance FROM contents WHERE {condition}"
            f"  ORDER BY {order} LIMIT %(count)s OFFSET %(offset)s) AS page ORDER BY distance, id"
        )
        return [content_id for (content_id,) in connection.execute(statement, parameters)]

    if is_approximate and condition != "true":
        # Among few matches, a graph search misses many of the nearest images.
        matches = f"SELECT FROM contents WHERE {condition} LIMIT %(limit)s"
        values = {**parameters, "limit": MAX_EXACT_MATCHES + 1}
        ((count,),) = connection.execute(f"SELECT count(*) FROM ({matches}) AS matches", values).fetchall()
        is_approximate = count > MAX_EXACT_MATCHES
    if is_approximate:
        ef_search = min(max(EF_SEARCH, parameters["count"] + parameters["offset"]), MAX_EF_SEARCH)
        connection.execute(
            "SELECT set_config('hnsw.ef_search', %s, true), set_config('hnsw.iterative_scan', 'strict_order', true)",
            (str(ef_search),),
        )
        ids = select("vector <#> %(query)s", "vector <#> %(query)s")
        if len(ids) == parameters["count"]:
            return ids
        # pgvector stops after a number of candidates, so few of them may match the filter.
    return select("(vector <#> %(query)s) + 0", "distance, id")  # the addition excludes the HNSW graph


def _read_contents(
    connection: Connection, content_ids: Sequence[int], parameters: Mapping[str, Any]
) -> list[tuple[Any, ...]]:
    """Return rows of id, width, height, image count, cosine similarity and recognised text, in the given order.

    Without a query vector, the similarity is NULL.
    """
    score = "-(vector <#> %(query)s)" if "query" in parameters else "NULL"
    rows = connection.execute(
        f"SELECT page.id, width, height, (SELECT count(*) FROM images WHERE content = page.id), {score}, "
        "(SELECT text FROM recognized_texts WHERE content = page.id) "
        "FROM unnest(%(ids)s::bigint[]) WITH ORDINALITY AS page(id, position) "
        "JOIN contents ON contents.id = page.id ORDER BY position",
        {**parameters, "ids": list(content_ids)},
    ).fetchall()
    return [(*row, _from_storable(text or "")) for *row, text in rows]


def _find_matched_fields(
    connection: Connection, query: WordQuery, content_ids: Collection[int]
) -> dict[int, tuple[str, ...]]:
    """Return the fields that contain words of the query, for contents with images that contain all words.

    Only MATCHED_LOCATIONS of these images are read per content.
    """
    if not content_ids:
        return {}
    match, parameters = make_match(query)
    rows = connection.execute(
        f"SELECT matching.* FROM unnest(%(ids)s::bigint[]) AS page(id), LATERAL ("
        f"  {TEXT_ROWS} WHERE images.content = page.id AND {match} ORDER BY images.id LIMIT %(locations)s) AS matching",
        {**parameters, "ids": list(content_ids), "locations": MATCHED_LOCATIONS},
    ).fetchall()
    # The stored dates are those of the time zone of the machine that added the images.
    return find_matched_fields(query, [(row[1], {**_fields_from_row(row), "date": row[4]}) for row in rows])


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


def _hash_name(name: str) -> bytes:
    return hashlib.sha256(_to_storable(name).encode()).digest()


def _make_image_rows(connection: Connection, images: Sequence[tuple[IndexedImage, bytes]]) -> list[tuple[Any, ...]]:
    """Return the parameters of INSERT_IMAGE for images and their content hashes."""
    texts: dict[bytes, str] = dict(
        connection.execute(
            "SELECT hash, text FROM recognized_texts JOIN contents ON id = content WHERE hash = ANY(%s)",
            ([digest for _, digest in images],),
        ).fetchall()
    )
    fields = [make_fields(image, _from_storable(texts.get(digest, ""))) for image, digest in images]
    rows = []
    for (image, digest), columns in zip(images, make_word_columns(fields), strict=True):
        rows.append((_hash_name(image.name), digest, *_image_to_row(image), *columns))
    return rows


def _update_words(connection: Connection, rows: Sequence[Sequence[Any]]) -> None:
    """Compute the columns for word search again, for images in rows of TEXT_ROWS."""
    columns = make_word_columns([_fields_from_row(row) for row in rows])
    parameters = [(*values, row[0]) for values, row in zip(columns, rows, strict=True)]
    connection.cursor().executemany(UPDATE_WORDS, parameters)


def _fields_from_row(row: Sequence[Any]) -> dict[str, str]:
    """Return the fields for word search of an image in a row of TEXT_ROWS."""
    _, _, text, camera, _, *image_row = row
    return make_fields(replace(_image_from_row(image_row), camera=camera), _from_storable(text))


def _image_to_row(image: IndexedImage) -> tuple[Any, ...]:
    """Return an image's values for IMAGE_COLUMNS, and the container."""
    return (
        _to_storable(image.name),
        ref_to_json(image.ref),
        _to_storable(image.source),
        _to_storable(image.file_version),
        [_to_storable(caption) for caption in image.captions],
        image.taken,
        None if isinstance(image.ref, FileImage) else _to_storable(image.container),
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
