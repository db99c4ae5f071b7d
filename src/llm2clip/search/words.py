"""Word search over the texts of indexed images: queries, rank fusion, and SQLite's full-text tables (FTS5).

In SQLite, the table `texts` has one row per image, with the id from the table `images`. Two full-text tables index
`texts`: `words` finds words, ignoring case and diacritics, and `trigrams` finds substrings, for languages such as
Chinese that do not separate words with spaces. All texts are stored as returned by `normalize_text`.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from llm2clip.io_utils import UNSPACED, to_valid_unicode
from llm2clip.search.metadata import convert_to_local_time, normalize_text
from llm2clip.search.types import IndexedImage

# Text fields of an image (the columns of the full-text table `words`), and their names in search results.
FIELDS = {"captions": "caption", "text": "text", "name": "name", "camera": "camera", "date": "date"}
SUBSTRING_COLUMNS = ("captions", "text", "name")  # columns of `trigrams`
FULL_TEXT_TABLES = {"words": tuple(FIELDS), "trigrams": SUBSTRING_COLUMNS}
TOKENIZER = "unicode61 remove_diacritics 2"
WORDS_SCHEMA = f"""
CREATE TABLE recognized_texts (
  content INTEGER PRIMARY KEY REFERENCES contents(id) ON DELETE CASCADE, text TEXT NOT NULL);
CREATE TABLE texts (
  id INTEGER PRIMARY KEY, content INTEGER NOT NULL, captions TEXT NOT NULL, text TEXT NOT NULL, name TEXT NOT NULL,
  camera TEXT NOT NULL, date TEXT NOT NULL);
CREATE INDEX texts_content ON texts(content);
CREATE VIRTUAL TABLE words USING fts5(
  captions, text, name, camera, date, content='texts', content_rowid='id', tokenize='{TOKENIZER}');
CREATE VIRTUAL TABLE trigrams USING fts5(
  captions, text, name, content='texts', content_rowid='id', tokenize='trigram case_sensitive 1');
"""
SEPARATOR = "\x1f"  # character before each caption in `texts`; does not occur in normalised texts
TRIGRAM_LENGTH = 3  # the full-text table `trigrams` cannot find shorter texts
UNSPACED_PARTS = re.compile(rf"(?:[^\W_]|{UNSPACED.pattern})+")  # \w does not match vowel signs and tone marks
# Longer queries are descriptions, which are searched by embedding only.
MAX_QUERY_WORDS, MAX_QUERY_LENGTH = 32, 500
# If too many images contain all query words, such as IMG in file names, the search uses only the embedding.
# The limit is MAX_MATCHED_FRACTION of the index, but at least MIN_COMMON and at most MAX_MATCHES (30 ms of scoring).
MIN_COMMON, MAX_MATCHED_FRACTION, MAX_MATCHES = 100, 0.1, 20_000
MATCHED_LOCATIONS = 5  # number of locations per hit that are searched for matching fields
MAX_FUSED = 1000  # number of top ids of each ranking that are merged by rank fusion
RRF_K = 60  # constant of reciprocal rank fusion (Cormack et al., 2009)


def make_text_fields(image: IndexedImage, text: str = "") -> dict[str, str]:
    """Return the normalised texts of an image, keyed as in FIELDS. `text` is the text recognised in the image."""
    taken = convert_to_local_time(image.taken)
    folder = image.source
    while folder not in ("", "/") and not image.name.startswith(os.path.join(folder, "")):
        folder = os.path.dirname(folder)
    return {
        "captions": "".join(SEPARATOR + normalize_text(caption) for caption in image.captions),
        "text": normalize_text(text),
        "name": normalize_text(image.name.removeprefix(os.path.join(folder, ""))),
        "camera": normalize_text(image.camera),
        "date": "" if taken is None else taken.strftime("%Y-%m-%d"),
    }


def split_words(texts: Iterable[str]) -> list[list[str]]:
    """Split normalised texts into words without diacritics, exactly as the full-text table `words` does."""
    words: list[list[str]] = []
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
        db.execute(f"CREATE VIRTUAL TABLE texts USING fts5(text, content='', tokenize='{TOKENIZER}')")
        db.execute("CREATE VIRTUAL TABLE words USING fts5vocab(texts, instance)")
        db.execute("BEGIN")
        for row, text in enumerate(texts):
            db.execute("INSERT INTO texts (rowid, text) VALUES (?, ?)", (row, text))
            words.append([])
        for row, word in db.execute("SELECT doc, term FROM words ORDER BY doc, offset"):
            words[row].append(word)
    return words


@dataclass(frozen=True)
class WordQuery:
    """Normalised query words, which must all occur in the texts of an image.

    Attributes:
        words: Whole words. A word with punctuation, such as `img_1234.jpg`, is matched as a sequence of words.
        substrings: Words in scripts without spaces between words.
    """

    words: tuple[str, ...] = ()
    substrings: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.words or self.substrings)

    @classmethod
    def parse(cls, texts: Sequence[str]) -> WordQuery:
        """Split texts into words. If the texts are too long for a word search, return an empty query."""
        text = normalize_text(" ".join(texts))
        if len(text) > MAX_QUERY_LENGTH:
            return cls()
        words: dict[str, None] = {}
        substrings: dict[str, None] = {}
        for token in text.split():
            if UNSPACED.search(token):
                for part in UNSPACED_PARTS.findall(token):
                    (substrings if UNSPACED.search(part) else words)[part] = None
            elif re.search(r"[^\W_]", token):
                words[token] = None
        if len(words) + len(substrings) > MAX_QUERY_WORDS:
            return cls()
        return cls(tuple(words), tuple(substrings))


def quote_fts5_text(text: str) -> str:
    """Quote a text so that FTS5 does not interpret words such as NEAR as operators."""
    return '"' + text.replace('"', '""') + '"'


def make_caption_condition(caption: str) -> tuple[str, dict[str, str]]:
    text = normalize_text(caption)
    if not text:
        return "images.id IN (SELECT id FROM texts WHERE captions != :caption)", {"caption": ""}
    if len(text) < TRIGRAM_LENGTH:
        return "images.id IN (SELECT id FROM texts WHERE instr(captions, :caption))", {"caption": text}
    condition = "images.id IN (SELECT rowid FROM trigrams WHERE trigrams MATCH :caption)"
    return condition, {"caption": f"captions : {quote_fts5_text(text)}"}


def find_word_matches(db: sqlite3.Connection, query: WordQuery, allowed_ids: np.ndarray | None) -> np.ndarray:
    """Return at most MAX_FUSED ids of contents with all query words, sorted by BM25, or no ids if too many match."""
    tables, conditions, parameters = _make_word_match_condition(query)
    ranks = [f"{table}.rank" for table in FULL_TEXT_TABLES if table in tables]
    source = f"FROM {tables} WHERE {' AND '.join(conditions)}"
    ((total,),) = db.execute("SELECT count(*) FROM texts")
    limit = compute_word_match_limit(total)
    if ranks:  # count the matches first, because computing BM25 scores takes 20 times as long
        ((matched,),) = db.execute(f"SELECT count(*) FROM (SELECT 1 {source} LIMIT {limit + 1})", parameters)
        if matched > limit:
            return np.empty(0, np.int64)
    matches = db.execute(f"SELECT texts.content, {' + '.join(ranks or ['0.0'])} {source} LIMIT {limit + 1}", parameters)
    rows = np.fromiter(matches, np.dtype([("content", np.int64), ("rank", np.float64)]))
    if len(rows) > limit:
        return np.empty(0, np.int64)
    if allowed_ids is not None:
        rows = rows[np.isin(rows["content"], allowed_ids)]
    return sort_distinct_ids(rows["content"], rows["rank"])[:MAX_FUSED]  # FTS5 ranks are negative BM25 scores


def sort_distinct_ids(ids: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Return the distinct ids, sorted by the lowest key of each id, then by id."""
    ids = ids[np.lexsort((ids, keys))]
    _, first = np.unique(ids, return_index=True)
    return ids[np.sort(first)]


def read_matching_text_fields(
    db: sqlite3.Connection, query: WordQuery, ids: Sequence[int]
) -> list[tuple[int, dict[str, str]]]:
    """Return a (content id, text fields) pair for each image whose content contains all query words."""
    tables, conditions, parameters = _make_word_match_condition(query)
    # With CROSS JOIN, SQLite looks up the given contents instead of reading all matches.
    tables = tables.replace(" JOIN ", " CROSS JOIN ")
    conditions.append("texts.content IN (SELECT value FROM json_each(:ids))")
    columns = ", ".join(f"texts.{column} AS {column}" for column in ("content", *FIELDS))
    sql = f"""SELECT content, {", ".join(FIELDS)} FROM (
        SELECT {columns}, row_number() OVER (PARTITION BY texts.content ORDER BY texts.id) AS number
        FROM {tables} WHERE {" AND ".join(conditions)}
      ) WHERE number <= {MATCHED_LOCATIONS}"""
    rows = db.execute(sql, {**parameters, "ids": json.dumps(list(ids))})
    return [(content, dict(zip(FIELDS, values, strict=True))) for content, *values in rows]


def find_matched_fields(
    query: WordQuery, images: Sequence[tuple[int, Mapping[str, str]]]
) -> dict[int, tuple[str, ...]]:
    """Return the names of the fields that contain query words, keyed by content id."""
    phrases = [f" {' '.join(words)} " for words in split_words(query.words) if words]
    matched: dict[int, set[str]] = {}
    for (content, fields), field_words in zip(images, split_text_fields([fields for _, fields in images]), strict=True):
        for (column, name), words in zip(FIELDS.items(), field_words, strict=True):
            joined = f" {' '.join(words)} "
            has_words = any(phrase in joined for phrase in phrases)
            if has_words or any(text in fields[column] for text in query.substrings):
                matched.setdefault(content, set()).add(name)
    return {content: tuple(name for name in FIELDS.values() if name in names) for content, names in matched.items()}


def split_text_fields(images: Sequence[Mapping[str, str]]) -> list[list[list[str]]]:
    words = split_words(fields[name] for fields in images for name in FIELDS)
    return [words[start : start + len(FIELDS)] for start in range(0, len(words), len(FIELDS))]


def _make_word_match_condition(query: WordQuery) -> tuple[str, list[str], dict[str, str]]:
    tables, conditions = "texts", []
    parameters: dict[str, str] = {}
    if query.words:
        tables += " JOIN words ON words.rowid = texts.id"
        conditions.append("words MATCH :words")
        parameters["words"] = " ".join(map(quote_fts5_text, query.words))  # FTS5 combines consecutive words with AND
    long_substrings = [text for text in query.substrings if len(text) >= TRIGRAM_LENGTH]
    if long_substrings:
        tables += " JOIN trigrams ON trigrams.rowid = texts.id"
        conditions.append("trigrams MATCH :trigrams")
        parameters["trigrams"] = " ".join(map(quote_fts5_text, long_substrings))
    for number, text in enumerate(text for text in query.substrings if len(text) < TRIGRAM_LENGTH):
        columns = " || char(31) || ".join(f"texts.{column}" for column in SUBSTRING_COLUMNS)
        conditions.append(f"instr({columns}, :short{number})")
        parameters[f"short{number}"] = text
    return tables, conditions, parameters


def compute_word_match_limit(total: int) -> int:
    return int(min(max(MIN_COMMON, MAX_MATCHED_FRACTION * total), MAX_MATCHES))


def fuse_rankings(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Merge rankings by reciprocal rank fusion: the score of an id is the sum of 1 / (RRF_K + rank) over both rankings.

    Only the top MAX_FUSED ids of each ranking are fused. The remaining ids of the first ranking follow in their
    original order, so a longer first ranking does not change the order of the top ids.
    """
    scores: dict[int, float] = {}
    for ranking in (first, second):
        for rank, content in enumerate(ranking[:MAX_FUSED].tolist(), 1):
            scores[content] = scores.get(content, 0.0) + 1 / (RRF_K + rank)
    fused = sorted(scores, key=lambda content: -scores[content])  # tied ids keep the order of the first ranking
    rest = [content for content in first[MAX_FUSED:].tolist() if content not in scores]
    return np.array([*fused, *rest], np.int64)


# ---- building


def add_image_texts(connection: sqlite3.Connection, images: Iterable[IndexedImage]) -> None:
    """Index the texts of images that have just been added to the table `images`."""
    ((last,),) = connection.execute("SELECT coalesce(max(id), 0) FROM texts")
    for image in images:
        connection.execute(
            "INSERT INTO texts (id, content, captions, text, name, camera, date) "
            "SELECT images.id, images.content, ?, ?, ?, ?, ? FROM images WHERE name = ?",
            (*make_text_fields(image).values(), image.name),
        )
    for content, text in connection.execute(
        "SELECT DISTINCT content, recognized_texts.text FROM texts JOIN recognized_texts USING (content) WHERE id > ?",
        (last,),
    ).fetchall():
        connection.execute(
            "UPDATE texts SET text = ? WHERE content = ? AND id > ?", (normalize_text(text), content, last)
        )
    _index_texts(connection, f"id > {int(last)}")


def remove_image_texts(connection: sqlite3.Connection, names: Iterable[str]) -> None:
    """Remove the texts of images that are about to be removed from the table `images` or replaced."""
    _unindex_texts(connection, "SELECT id FROM images WHERE name = ?", [(name,) for name in names])
    connection.execute("DELETE FROM texts WHERE id IN removed_texts")


def set_recognized_text(connection: sqlite3.Connection, content: int, text: str) -> None:
    _unindex_texts(connection, "SELECT id FROM texts WHERE content = ?", [(content,)])
    connection.execute("INSERT OR REPLACE INTO recognized_texts VALUES (?, ?)", (content, to_valid_unicode(text)))
    connection.execute("UPDATE texts SET text = ? WHERE content = ?", (normalize_text(text), content))
    _index_texts(connection, "id IN removed_texts")


def _index_texts(connection: sqlite3.Connection, condition: str) -> None:
    # Triggers would be slower, because FTS5 would write to the disk after each row.
    for table, columns in FULL_TEXT_TABLES.items():
        listed = ", ".join(columns)
        rows = f"SELECT id, {listed} FROM texts WHERE {condition}"
        connection.execute(f"INSERT INTO {table} (rowid, {listed}) {rows}")


def _unindex_texts(connection: sqlite3.Connection, statement: str, parameters: Sequence[tuple[Any]]) -> None:
    """Select ids with `statement`, store the ids in `removed_texts` and remove their rows from the full-text tables."""
    connection.execute("CREATE TEMP TABLE IF NOT EXISTS removed_texts (id INTEGER PRIMARY KEY)")
    connection.execute("DELETE FROM removed_texts")
    connection.executemany(f"INSERT INTO removed_texts {statement}", parameters)
    for table, columns in FULL_TEXT_TABLES.items():
        listed = ", ".join(columns)
        connection.execute(
            f"INSERT INTO {table} ({table}, rowid, {listed}) "
            f"SELECT 'delete', id, {listed} FROM texts WHERE id IN removed_texts"
        )
