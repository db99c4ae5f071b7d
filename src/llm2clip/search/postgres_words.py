"""Word search in PostgreSQL, with the same matches as in SQLite.

The table `images` has these columns for word search. All texts are normalised (see `search.words.normalize`):

    date              the capture date
    folded_captions   the captions, also for caption filters, or NULL
    unspaced_texts    the texts that contain scripts without spaces between words, such as Chinese, or NULL
    words             a tsvector with the words of all texts (`search.words.FIELDS`) and their positions

The texts are split into words in Python, and the tsvector is written in its text form. PostgreSQL's text search
configurations are not used, because their parser splits file names and numbers differently and keeps diacritics.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from psycopg import sql

from llm2clip.data.texts import UNSPACED
from llm2clip.search.backends import Query
from llm2clip.search.metadata import escape_pattern
from llm2clip.search.postgres_database import Connection
from llm2clip.search.words import (
    FIELDS,
    MAX_FUSED,
    MAX_MATCHED_FRACTION,
    MAX_MATCHES,
    MAX_QUERY_LENGTH,
    MIN_COMMON,
    SEPARATOR,
    SUBSTRING_COLUMNS,
    WordQuery,
    compute_match_limit,
    split_words,
)

WORD_COLUMNS = ("date", "folded_captions", "unspaced_texts", "words")
# Longer words are truncated, because PostgreSQL limits the words of a tsvector to 2,046 bytes. Words of a query are
# shorter, so they never match a truncated word.
MAX_WORD_LENGTH = MAX_QUERY_LENGTH + 1
# The words of longer texts are ignored, because PostgreSQL limits a tsvector to a megabyte, including the positions.
MAX_WORDS_SIZE, POSITION_SIZE = 1_000_000, 8


def create_trigram_index(connection: Connection, name: str, column: str) -> None:
    """Create an index for substring searches in a column of `images`, if the extension pg_trgm is enabled."""
    schema = connection.execute(
        "SELECT nspname FROM pg_extension JOIN pg_namespace ON pg_namespace.oid = extnamespace "
        "WHERE extname = 'pg_trgm'"
    ).fetchone()
    if schema is not None:
        operators = sql.Identifier(schema[0], "gin_trgm_ops")
        statement = sql.SQL("CREATE INDEX IF NOT EXISTS {} ON images USING gin ({} {})")
        connection.execute(statement.format(sql.Identifier(name), sql.Identifier(column), operators))


def make_word_columns(images: Sequence[Mapping[str, str]]) -> list[dict[str, str | None]]:
    """Return the values of WORD_COLUMNS for the fields of several images."""
    rows = []
    for fields, words in zip(images, _split_fields(images), strict=True):
        unspaced = [fields[name] for name in SUBSTRING_COLUMNS if UNSPACED.search(fields[name])]
        row = {"date": fields["date"], "folded_captions": fields["captions"] or None}
        rows.append({**row, "unspaced_texts": SEPARATOR.join(unspaced) or None, "words": _format_tsvector(words)})
    return rows


def _split_fields(images: Sequence[Mapping[str, str]]) -> list[list[list[str]]]:
    words = split_words(fields[name] for fields in images for name in FIELDS)
    return [words[start : start + len(FIELDS)] for start in range(0, len(words), len(FIELDS))]


def _format_tsvector(fields: Iterable[Sequence[str]]) -> str:
    """Return the words of several fields in the text form of a tsvector. Words consist of letters and digits.

    Positions of different fields do not follow each other, so phrases do not match across two fields.
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


def make_match(query: WordQuery) -> tuple[str, dict[str, str]]:
    """Return the SQL condition for rows of `images` with all words of a query, and its parameters."""
    conditions, parameters = [], {}
    if query.words:
        phrases = [" <-> ".join(f"'{word}'" for word in words) for words in split_words(query.words) if words]
        conditions.append("words @@ :words::tsquery")
        parameters["words"] = " & ".join(f"({phrase})" for phrase in phrases)  # an empty tsquery matches nothing
    for number, text in enumerate(query.substrings):
        conditions.append(f"unspaced_texts LIKE :substring{number}")
        parameters[f"substring{number}"] = f"%{escape_pattern(text)}%"
    return " AND ".join(conditions), parameters


def find_matches(run: Query, query: WordQuery, content_condition: str, parameters: Mapping[str, Any]) -> np.ndarray:
    """Return the ids of the image contents that contain all words of a query, best match first.

    Matches are ranked by `ts_rank` with a penalty for long texts, because PostgreSQL does not compute BM25.

    Args:
        content_condition: SQL condition for the contents that match the filter.
        parameters: Parameters of the condition.

    Returns:
        At most MAX_FUSED content ids, int64 of shape (N,). Empty if too many images contain all words.
    """
    match, match_parameters = make_match(query)
    parameters = {**parameters, **match_parameters, "limit": MIN_COMMON, "fused": MAX_FUSED}
    exceeds = f"SELECT 1 FROM images WHERE {match} OFFSET :limit LIMIT 1"
    if run(exceeds, parameters):
        # In larger indexes, the limit is the same, so not all images are counted.
        counted = {"counted": math.ceil(MAX_MATCHES / MAX_MATCHED_FRACTION)}
        ((total,),) = run("SELECT count(*) FROM (SELECT FROM images LIMIT :counted) AS counted", counted)
        parameters["limit"] = compute_match_limit(total)
        if run(exceeds, parameters):
            return np.empty(0, np.int64)
    rank = "ts_rank(words, :words::tsquery, 1)" if query.words else "0"
    rows = run(
        f"WITH matches AS MATERIALIZED (SELECT content, {rank} AS rank FROM images WHERE {match}) "
        f"SELECT content FROM matches JOIN contents ON contents.id = content WHERE {content_condition} "
        "GROUP BY content ORDER BY max(rank) DESC, content LIMIT :fused",
        parameters,
    )
    return np.array([content for (content,) in rows], np.int64)


def find_matched_fields(
    query: WordQuery, images: Sequence[tuple[int, Mapping[str, str]]]
) -> dict[int, tuple[str, ...]]:
    """Return the names of the fields that contain words of the query, keyed by content id.

    Args:
        images: Content ids and fields of images that contain all words of the query.
    """
    phrases = [f" {' '.join(words)} " for words in split_words(query.words) if words]
    matched: dict[int, set[str]] = {}
    for (content, fields), field_words in zip(images, _split_fields([fields for _, fields in images]), strict=True):
        for (column, name), words in zip(FIELDS.items(), field_words, strict=True):
            joined = f" {' '.join(words)} "
            has_words = any(phrase in joined for phrase in phrases)
            if has_words or any(text in fields[column] for text in query.substrings):
                matched.setdefault(content, set()).add(name)
    return {content: tuple(name for name in FIELDS.values() if name in names) for content, names in matched.items()}
