"""PostgreSQL index backend, for indexes that several machines search or that are backed up with a database.

Each index has its own schema. All filters are SQL conditions, so a search reads only matching rows. For indexes with at
least APPROXIMATE_ABOVE distinct images, `finish_indexing` builds an HNSW graph in the database.

Word search returns the same matches as the SQLite backend. Texts are split into words in Python, because PostgreSQL's
parser splits file names and numbers differently and does not remove diacritics.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
from pgvector import HalfVector
from psycopg import sql

from llm2clip.data.image_refs import FileImage
from llm2clip.io_utils import UNSPACED, to_valid_unicode
from llm2clip.runs.output_folder import check_format_version
from llm2clip.search.backends import (
    CONTENT_COLUMNS,
    FORMAT_VERSION,
    IMAGE_COLUMNS,
    NEW_INDEX_ADVICE,
    IndexBackend,
    Result,
    SqlConditions,
    SqlRunner,
    hide_password,
)
from llm2clip.search.metadata import (
    CONTENT_FIELDS,
    IMAGE_FIELDS,
    Filter,
    escape_like_pattern,
    format_column_definitions,
    get_column_values,
    make_contains_pattern,
)
from llm2clip.search.postgres_database import (
    Connection,
    PostgresDatabase,
    convert_sql_placeholders,
    make_sql_runner,
    parse_index_url,
)
from llm2clip.search.types import MAX_LOCATIONS, IndexedContent, IndexedImage
from llm2clip.search.words import (
    MATCHED_LOCATIONS,
    MAX_FUSED,
    MAX_MATCHED_FRACTION,
    MAX_MATCHES,
    MAX_QUERY_LENGTH,
    MIN_COMMON,
    SEPARATOR,
    SUBSTRING_COLUMNS,
    WordQuery,
    compute_word_match_limit,
    make_text_fields,
    split_text_fields,
    split_words,
)

APPROXIMATE_ABOVE = 100_000  # smaller indexes are searched exactly (see benchmarks/postgres.py)
MAX_INLINE_DIM = 3900  # larger vectors do not fit in an 8 KB database page
MAX_HNSW_DIM = 4000  # limit of pgvector
HNSW_INDEX = "contents_hnsw"
MAX_EXACT_MATCHES = 50_000  # if no more than this number of images match a filter, the search is exact
EF_SEARCH, MAX_EF_SEARCH = 100, 1000  # default and maximum number of candidates per HNSW search
# Longer words are truncated, because PostgreSQL limits words in a tsvector to 2,046 bytes.
# Query words are shorter, so they never match truncated words.
MAX_WORD_LENGTH = MAX_QUERY_LENGTH + 1
# PostgreSQL limits a tsvector, including the word positions, to 1 MB. Words that exceed the limit are ignored.
MAX_WORDS_SIZE, POSITION_SIZE = 1_000_000, 8
COLUMN_TYPES = {float: "double precision", int: "integer", str: 'text COLLATE "C"'}

# `key` is the SHA-256 hash of the name, because PostgreSQL limits indexed texts to about 2,700 bytes.
# `container` is the path of the tar file or table that contains the image.
# `date`, `folded_captions`, `unspaced_texts` (in scripts without spaces) and `words` contain normalised texts.
TABLES = f"""
CREATE TABLE metadata (key text PRIMARY KEY, value text NOT NULL);
CREATE TABLE calibration (data bytea NOT NULL);
CREATE TABLE contents (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, hash bytea NOT NULL UNIQUE, vector halfvec(%s) NOT NULL,
  {format_column_definitions(CONTENT_FIELDS, COLUMN_TYPES)});
CREATE TABLE thumbnails (id bigint PRIMARY KEY REFERENCES contents(id) ON DELETE CASCADE, jpeg bytea NOT NULL);
ALTER TABLE thumbnails ALTER COLUMN jpeg SET STORAGE EXTERNAL;
CREATE TABLE images (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, key bytea NOT NULL UNIQUE, name text COLLATE "C" NOT NULL,
  content bigint NOT NULL REFERENCES contents(id), location text NOT NULL, source text COLLATE "C" NOT NULL,
  file_version text NOT NULL, captions text NOT NULL, {format_column_definitions(IMAGE_FIELDS, COLUMN_TYPES)},
  container text COLLATE "C", date text NOT NULL, folded_captions text COLLATE "C", unspaced_texts text COLLATE "C",
  words tsvector NOT NULL);
CREATE INDEX images_content ON images (content, id);
CREATE INDEX images_taken ON images (taken);
CREATE INDEX images_words ON images USING gin (words);
CREATE TABLE recognized_texts (
  content bigint PRIMARY KEY REFERENCES contents(id) ON DELETE CASCADE, text text NOT NULL);
"""
INSERT_CONTENT = f"""
WITH added AS (
  INSERT INTO contents (hash, vector, {", ".join(CONTENT_COLUMNS)})
  VALUES (:hash, :vector, {", ".join(f":{name}" for name in CONTENT_COLUMNS)})
  ON CONFLICT (hash) DO NOTHING RETURNING id)
INSERT INTO thumbnails SELECT id, :thumbnail FROM added
"""
WORD_COLUMNS = ("date", "folded_captions", "unspaced_texts", "words")
UPDATED_COLUMNS = (*IMAGE_COLUMNS, "container", *WORD_COLUMNS)
INSERT_IMAGE = f"""
INSERT INTO images (key, content, {", ".join(UPDATED_COLUMNS)})
VALUES (:key, (SELECT id FROM contents WHERE hash = :hash), {", ".join(f":{name}" for name in UPDATED_COLUMNS)})
ON CONFLICT (key) DO UPDATE SET content = excluded.content,
  {", ".join(f"{name} = excluded.{name}" for name in UPDATED_COLUMNS)}
"""
UPDATE_WORDS = f"UPDATE images SET {', '.join(f'{name} = :{name}' for name in WORD_COLUMNS)} WHERE id = :id"
INSERT_TEXT = """
INSERT INTO recognized_texts SELECT id, :text FROM contents WHERE hash = :hash
ON CONFLICT (content) DO UPDATE SET text = excluded.text
"""
TEXT_ROWS = f"""
SELECT images.id, images.content, coalesce(recognized_texts.text, '') AS text, date, {", ".join(IMAGE_COLUMNS)}
FROM images LEFT JOIN recognized_texts ON recognized_texts.content = images.content
"""
INSIDE_PATH = "(name LIKE :path OR name LIKE :path || '/%' OR container LIKE :path)"
# PostgreSQL cannot store NUL and lone surrogates, so they are mapped to private-use characters from U+10F7FF on.
# If a text already contains one of these private-use characters, U+10F7FE is inserted in front of the character.
STORABLE_CHARACTERS: dict[int, str] = {
    **{code: f"\U0010f7fe{chr(code)}" for code in range(0x10F7FE, 0x110000)},
    0: "\U0010f7ff",
    **{code: chr(code + 0x102000) for code in range(0xD800, 0xE000)},
}
ORIGINAL_CHARACTERS = {stored: chr(original) for original, stored in STORABLE_CHARACTERS.items()}
STORED_CHARACTER = re.compile("\U0010f7fe?[\U0010f7fe-\U0010ffff]")


def open_index(location: str, write: bool) -> PostgresBackend:
    """Open the index at a URL of the form `postgresql://USER@HOST/DATABASE?schema=NAME`. See `open_backend`."""
    backend = PostgresBackend(location)
    if not write and not backend.read_metadata():
        raise FileNotFoundError(
            f"{hide_password(location)}: the schema {backend.schema!r} does not contain an llm2clip index. Create one "
            "with `llm2clip index`"
        )
    return backend


class PostgresBackend(IndexBackend):
    """Index backend in a schema of a PostgreSQL database with pgvector, for any number of readers. Thread-safe."""

    IN_IDS = "IN (SELECT value::bigint FROM json_array_elements_text(:ids::json))"

    def __init__(self, url: str) -> None:
        """Open the index at a libpq connection URL with the additional parameter `schema`.

        The password can also be set in the environment variable PGPASSWORD, a password file or a service file.

        Raises:
            ValueError: The URL is invalid, or the connection to another machine would not be encrypted.
        """
        conninfo, self.schema = parse_index_url(url)
        self.location, self.approximate_above = hide_password(url), APPROXIMATE_ABOVE
        self._db = PostgresDatabase(conninfo, self.schema, self.location)
        self._has_changes = False
        self._may_have_orphans = True  # an interrupted run may have left contents that belong to no image

    # ---- building

    def lock(self) -> AbstractContextManager[None]:
        return self._db.lock()

    def read_metadata(self) -> dict[str, Any]:
        def read_rows(run: SqlRunner) -> list[tuple[Any, ...]]:
            has_table = _has_relation(run, f"{self.schema}.metadata")
            return run("SELECT key, value FROM metadata", {}) if has_table else []

        metadata = {key: json.loads(value) for key, value in self._run_with_read_access(read_rows)}
        if metadata:
            version = metadata.pop("format_version", None)
            check_format_version(self.location, version, FORMAT_VERSION, NEW_INDEX_ADVICE)
        return metadata

    def initialize(self, metadata: Mapping[str, Any]) -> None:
        with self._db.open_transaction() as connection:
            if not _has_relation(make_sql_runner(connection), f"{self.schema}.metadata"):
                self._db.create_schema(connection)
                _create_tables(connection, int(metadata["embed_dim"]))
            rows = [(key, json.dumps(value)) for key, value in {**metadata, "format_version": FORMAT_VERSION}.items()]
            connection.cursor().executemany(
                "INSERT INTO metadata VALUES (%s, %s) ON CONFLICT (key) DO UPDATE SET value = excluded.value", rows
            )

    def find_existing_hashes(self, hashes: Iterable[bytes]) -> set[bytes]:
        rows = self._query("SELECT hash FROM contents WHERE hash = ANY(:hashes)", {"hashes": list(hashes)})
        return {digest for (digest,) in rows}

    def add_images(self, contents: Sequence[IndexedContent], images: Sequence[tuple[IndexedImage, bytes]]) -> None:
        content_rows = []
        for content in contents:
            row = {"hash": content.hash, "vector": HalfVector(content.vector), "thumbnail": content.thumbnail}
            content_rows.append({**row, **get_column_values(content, CONTENT_FIELDS)})
        self._has_changes = self._may_have_orphans = True
        with self._db.open_transaction() as connection, connection.cursor() as cursor:
            if content_rows:
                cursor.executemany(convert_sql_placeholders(INSERT_CONTENT), content_rows)
            if images:
                cursor.executemany(convert_sql_placeholders(INSERT_IMAGE), self._make_image_rows(connection, images))

    def _make_image_rows(
        self, connection: Connection, images: Sequence[tuple[IndexedImage, bytes]]
    ) -> list[dict[str, Any]]:
        texts: dict[bytes, str] = dict(
            connection.execute(
                "SELECT hash, text FROM recognized_texts JOIN contents ON id = content WHERE hash = ANY(%s)",
                ([digest for _, digest in images],),
            ).fetchall()
        )
        fields = [make_text_fields(image, self._unescape_text(texts.get(digest, ""))) for image, digest in images]
        rows = []
        for (image, digest), columns in zip(images, _make_word_columns(fields), strict=True):
            container = None if isinstance(image.ref, FileImage) else self._escape_text(image.container)
            row = {"key": self._hash_image_name(image.name), "hash": digest, "container": container}
            rows.append({**row, **self._convert_image_to_row(image), **columns})
        return rows

    def remove_images(self, names: Sequence[str]) -> None:
        if not names and not self._may_have_orphans:
            return
        keys = [self._hash_image_name(name) for name in names]
        with self._db.open_transaction() as connection:
            removed = connection.execute("DELETE FROM images WHERE key = ANY(%s)", (keys,)).rowcount
            orphans = connection.execute(
                "DELETE FROM contents WHERE NOT EXISTS (SELECT FROM images WHERE content = contents.id)"
            ).rowcount
        self._has_changes |= removed + orphans > 0
        self._may_have_orphans = False

    def save_recognized_texts(self, texts: Mapping[bytes, str]) -> None:
        if not texts:
            return
        self._has_changes = True
        text_rows = [
            {"text": self._escape_text(to_valid_unicode(text)), "hash": digest} for digest, text in texts.items()
        ]
        with self._db.open_transaction() as connection, connection.cursor() as cursor:
            cursor.executemany(convert_sql_placeholders(INSERT_TEXT), text_rows)
            statement = f"{TEXT_ROWS} WHERE images.content IN (SELECT id FROM contents WHERE hash = ANY(:hashes))"
            rows = make_sql_runner(connection)(statement, {"hashes": list(texts)})
            columns = _make_word_columns([self._convert_row_to_fields(row) for row in rows])
            parameters = [{**values, "id": row[0]} for values, row in zip(columns, rows, strict=True)]
            cursor.executemany(convert_sql_placeholders(UPDATE_WORDS), parameters)

    def finish_indexing(self) -> None:
        """Build the HNSW graph if the index is large, and update the statistics of the query planner."""
        _, contents = self.count_images()
        dim = int(self.read_metadata()["embed_dim"])
        with self._db.open_transaction() as connection:
            if contents >= self.approximate_above and dim <= MAX_HNSW_DIM:
                connection.execute(
                    f"CREATE INDEX IF NOT EXISTS {HNSW_INDEX} ON contents USING hnsw (vector halfvec_ip_ops)"
                )
            else:
                connection.execute(f"DROP INDEX IF EXISTS {HNSW_INDEX}")
        if self._has_changes:
            self._db.vacuum("contents", "images", "thumbnails")
            self._has_changes = False

    # ---- statements

    def _run_with_read_access(self, function: Callable[[SqlRunner], Result]) -> Result:
        return self._db.run_with_read_access(lambda connection: function(make_sql_runner(connection)))

    @contextmanager
    def _open_transaction(self) -> Iterator[SqlRunner]:
        with self._db.open_transaction() as connection:
            yield make_sql_runner(connection)

    def _make_source_condition(self, source: str) -> tuple[str, dict[str, Any]]:
        stored_source = self._escape_text(source)
        parameters = {"source": stored_source, "path": escape_like_pattern(stored_source)}
        return f"(source = :source OR {INSIDE_PATH})", parameters

    def _make_path_condition(self, path: str) -> tuple[str, dict[str, Any]]:
        pattern = escape_like_pattern(self._escape_text(path).rstrip("/")).replace("*", "%").replace("?", "_")
        is_absolute = path.startswith("/") or not pattern
        return INSIDE_PATH, {"path": pattern if is_absolute else f"%/{pattern}"}

    def _make_caption_condition(self, caption: str) -> tuple[str, dict[str, Any]]:
        return "folded_captions LIKE :caption", {"caption": make_contains_pattern(caption)}

    # ---- searching

    def count_matches(self, image_filter: Filter) -> int:
        condition, parameters = self._make_content_condition(image_filter)
        ((count,),) = self._query(f"SELECT count(*) FROM contents WHERE {condition}", parameters)
        return int(count)

    def _make_content_condition(self, image_filter: Filter) -> tuple[str, dict[str, Any]]:
        """Return the SQL condition and parameters for contents that have a matching image."""
        conditions = self._build_filter_conditions(image_filter)
        where = list(conditions.contents)
        image_conditions = _list_image_conditions(conditions)
        if image_conditions:
            matching = " AND ".join(["content = contents.id", *image_conditions])
            where.append(f"EXISTS (SELECT FROM images WHERE {matching})")
        return " AND ".join(where) or "true", conditions.parameters

    def _find_newest_contents(self, run: SqlRunner, image_filter: Filter, count: int, offset: int) -> list[int]:
        conditions = self._build_filter_conditions(image_filter)
        where = [*_list_image_conditions(conditions), *conditions.contents]
        statement = (
            "SELECT contents.id FROM contents JOIN images ON content = contents.id"
            f" WHERE {' AND '.join(where)} GROUP BY contents.id"
            " ORDER BY max(taken) DESC, contents.id LIMIT :count OFFSET :offset"
        )
        rows = run(statement, {**conditions.parameters, "count": count, "offset": offset})
        return [content_id for (content_id,) in rows]

    def _find_nearest_contents(
        self, run: SqlRunner, vector: np.ndarray, depth: int, image_filter: Filter
    ) -> tuple[np.ndarray, np.ndarray]:
        condition, parameters = self._make_content_condition(image_filter)
        parameters |= {"query": HalfVector(vector), "depth": depth}

        def select_nearest(distance: str, order: str) -> list[tuple[Any, ...]]:
            statement = (
                "SELECT id, distance FROM ("
                f"  SELECT id, {distance} AS distance FROM contents WHERE {condition}"
                f"  ORDER BY {order} LIMIT :depth) AS nearest ORDER BY distance, id"
            )
            return run(statement, parameters)

        rows: list[tuple[Any, ...]] = []
        if _has_relation(run, f"{self.schema}.{HNSW_INDEX}") and _has_many_matches(run, condition, parameters):
            ef_search = min(max(EF_SEARCH, depth), MAX_EF_SEARCH)
            run(
                "SELECT set_config('hnsw.ef_search', :ef, true), "
                "set_config('hnsw.iterative_scan', 'strict_order', true)",
                {"ef": str(ef_search)},
            )
            rows = select_nearest("vector <#> :query", "vector <#> :query")
        if len(rows) < depth:  # pgvector may stop before it has found enough matches
            rows = select_nearest("(vector <#> :query) + 0", "distance, id")  # adding 0 bypasses the HNSW graph
        ids, distances = np.array(rows, np.float64).reshape(-1, 2).T
        return ids.astype(np.int64), -distances

    def _find_word_matches(self, run: SqlRunner, query: WordQuery, image_filter: Filter) -> np.ndarray:
        condition, parameters = self._make_content_condition(image_filter)
        match, match_parameters = _make_word_match_condition(query)
        parameters = {**parameters, **match_parameters, "limit": MIN_COMMON, "fused": MAX_FUSED}
        exceeds = f"SELECT 1 FROM images WHERE {match} OFFSET :limit LIMIT 1"
        if run(exceeds, parameters):
            # The limit is the same for all larger indexes, so the count can stop at this number of images.
            counted = {"counted": math.ceil(MAX_MATCHES / MAX_MATCHED_FRACTION)}
            ((total,),) = run("SELECT count(*) FROM (SELECT FROM images LIMIT :counted) AS counted", counted)
            parameters["limit"] = compute_word_match_limit(total)
            if run(exceeds, parameters):
                return np.empty(0, np.int64)
        # PostgreSQL cannot compute BM25 scores. The last argument of `ts_rank` is an option that penalises long texts.
        rank = "ts_rank(words, :words::tsquery, 1)" if query.words else "0"
        rows = run(
            f"WITH matches AS MATERIALIZED (SELECT content, {rank} AS rank FROM images WHERE {match}) "
            f"SELECT content FROM matches JOIN contents ON contents.id = content WHERE {condition} "
            "GROUP BY content ORDER BY max(rank) DESC, content LIMIT :fused",
            parameters,
        )
        return np.array([content for (content,) in rows], np.int64)

    def _read_text_fields(
        self, run: SqlRunner, query: WordQuery, ids: Sequence[int]
    ) -> list[tuple[int, dict[str, str]]]:
        match, parameters = _make_word_match_condition(query)
        rows = run(
            f"SELECT matching.* FROM unnest(:ids::bigint[]) AS page(id), LATERAL ({TEXT_ROWS} "
            f"WHERE images.content = page.id AND {match} ORDER BY images.id LIMIT :locations) AS matching",
            {**parameters, "ids": list(ids), "locations": MATCHED_LOCATIONS},
        )
        # The stored dates are in the time zone of the machine that added the images.
        return [(row[1], {**self._convert_row_to_fields(row), "date": row[3]}) for row in rows]

    def _read_images(
        self, run: SqlRunner, ids: Sequence[int], conditions: SqlConditions
    ) -> dict[int, tuple[IndexedImage, ...]]:
        def make_select_statement(matches: str, image_conditions: Sequence[str]) -> str:
            where = " AND ".join(["content = page.id", *image_conditions])
            columns = f"{matches} AS matches, {', '.join(IMAGE_COLUMNS)}"
            return f"(SELECT {columns} FROM images WHERE {where} ORDER BY images.id LIMIT :locations)"

        selected = make_select_statement("false", [])
        if conditions.images:
            selected = f"{make_select_statement('true', conditions.images)} UNION ALL {selected}"
        rows = run(
            f"SELECT page.id, image.* FROM unnest(:ids::bigint[]) AS page(id), LATERAL ({selected}) AS image",
            {**conditions.parameters, "ids": list(ids), "locations": MAX_LOCATIONS},
        )
        rows.sort(key=lambda row: (not row[1], row[2]))
        images: dict[int, dict[IndexedImage, None]] = {}
        for content_id, _, *row in rows:
            images.setdefault(content_id, {})[self._convert_row_to_image(row)] = None
        return {content_id: tuple(content_images)[:MAX_LOCATIONS] for content_id, content_images in images.items()}

    def _decode_vector(self, vector: HalfVector) -> np.ndarray:
        return vector.to_numpy().astype(np.float32)

    # ---- rows

    def _escape_text(self, text: str) -> str:
        return text.translate(STORABLE_CHARACTERS)

    def _unescape_text(self, text: str) -> str:
        return STORED_CHARACTER.sub(lambda match: ORIGINAL_CHARACTERS.get(match[0], match[0]), text)

    def _hash_image_name(self, name: str) -> bytes:
        return hashlib.sha256(self._escape_text(name).encode()).digest()

    def _convert_row_to_fields(self, row: Sequence[Any]) -> dict[str, str]:
        _, _, text, _, *image_row = row
        return make_text_fields(self._convert_row_to_image(image_row), self._unescape_text(text))


def _has_relation(run: SqlRunner, name: str) -> bool:
    schema, relation = name.split(".")
    statement = (
        "SELECT 1 FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace "
        "WHERE nspname = :schema AND relname = :relation"
    )
    return bool(run(statement, {"schema": schema, "relation": relation}))


def _create_tables(connection: Connection, dim: int) -> None:
    connection.execute(TABLES % dim)
    if dim <= MAX_INLINE_DIM:
        # By default, vectors of more than about 1,000 dimensions are stored in a separate table that is slow to scan.
        connection.execute("ALTER TABLE contents ALTER COLUMN vector SET STORAGE PLAIN")
    schema = connection.execute(
        "SELECT nspname FROM pg_extension JOIN pg_namespace ON pg_namespace.oid = extnamespace "
        "WHERE extname = 'pg_trgm'"
    ).fetchone()
    if schema is None:
        return
    operators = sql.Identifier(schema[0], "gin_trgm_ops")
    for name, column in (("images_captions", "folded_captions"), ("images_unspaced_texts", "unspaced_texts")):
        statement = sql.SQL("CREATE INDEX IF NOT EXISTS {} ON images USING gin ({} {})")
        connection.execute(statement.format(sql.Identifier(name), sql.Identifier(column), operators))


def _list_image_conditions(conditions: SqlConditions) -> list[str]:
    return conditions.images if conditions.captions is None else [*conditions.images, conditions.captions]


def _has_many_matches(run: SqlRunner, condition: str, parameters: Mapping[str, Any]) -> bool:
    if condition == "true":
        return True
    matches = f"SELECT FROM contents WHERE {condition} LIMIT :limit"
    values = {**parameters, "limit": MAX_EXACT_MATCHES + 1}
    ((count,),) = run(f"SELECT count(*) FROM ({matches}) AS matches", values)
    return bool(count > MAX_EXACT_MATCHES)


# ---- words


def _make_word_columns(images: Sequence[Mapping[str, str]]) -> list[dict[str, str | None]]:
    rows = []
    for fields, words in zip(images, split_text_fields(images), strict=True):
        unspaced = [fields[name] for name in SUBSTRING_COLUMNS if UNSPACED.search(fields[name])]
        row = {"date": fields["date"], "folded_captions": fields["captions"] or None}
        rows.append({**row, "unspaced_texts": SEPARATOR.join(unspaced) or None, "words": _format_tsvector(words)})
    return rows


def _format_tsvector(fields: Iterable[Sequence[str]]) -> str:
    """Format the words of several fields as a tsvector. Words must consist of letters and digits.

    The positions have a gap between fields, so a phrase cannot match words from two fields.
    """
    positions: dict[str, list[str]] = {}
    position = size = 0
    for words in fields:
        position += 1
        for word in words:
            word = word[:MAX_WORD_LENGTH]
            position += 1
            size += len(word.encode()) + POSITION_SIZE
            if size <= MAX_WORDS_SIZE:
                positions.setdefault(word, []).append(str(position))
    return " ".join(f"'{word}':{','.join(numbers)}" for word, numbers in positions.items())


def _make_word_match_condition(query: WordQuery) -> tuple[str, dict[str, str]]:
    """Return the SQL condition and parameters for images that contain all words of a query."""
    conditions, parameters = [], {}
    if query.words:
        phrases = [" <-> ".join(f"'{word}'" for word in words) for words in split_words(query.words) if words]
        conditions.append("words @@ :words::tsquery")
        parameters["words"] = " & ".join(f"({phrase})" for phrase in phrases)  # an empty tsquery matches nothing
    for number, text in enumerate(query.substrings):
        conditions.append(f"unspaced_texts LIKE :substring{number}")
        parameters[f"substring{number}"] = f"%{escape_like_pattern(text)}%"
    return " AND ".join(conditions), parameters
