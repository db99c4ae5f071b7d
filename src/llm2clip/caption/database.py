"""SQLite database of a captioning run, with the source records of the images and the answers of the model.

Runs can be resumed, because each answer is committed when it arrives, and stored answers are not requested again.
Images are identified by the SHA-256 hash of their bytes, so moved and duplicate images require no new requests.
"""

import json
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from llm2clip.caption.options import Prompt
from llm2clip.runs.output_folder import check_format_version

BUSY_TIMEOUT = 60  # seconds to wait for another rank's transaction
FORMAT_VERSION = 4
SCHEMA = """
CREATE TABLE images(
  number INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, hash TEXT NOT NULL, record TEXT NOT NULL, version TEXT
);
CREATE INDEX images_by_hash ON images(hash, number);
CREATE TABLE answers(
  hash TEXT NOT NULL, prompt TEXT NOT NULL, sample INTEGER NOT NULL, model TEXT NOT NULL,
  text TEXT, error TEXT, temperature REAL NOT NULL, date TEXT NOT NULL,
  input_tokens INTEGER NOT NULL DEFAULT 0, output_tokens INTEGER NOT NULL DEFAULT 0,
  problem TEXT, score REAL, rank REAL,
  PRIMARY KEY(hash, prompt, sample, model)
) WITHOUT ROWID;
"""
# Adds the token counts of all attempts, because failed attempts can also cost money.
_ADD_ANSWER = f"""
INSERT INTO answers VALUES ({", ".join("?" * 13)})
ON CONFLICT DO UPDATE SET text = excluded.text, error = excluded.error, temperature = excluded.temperature,
  date = excluded.date, input_tokens = input_tokens + excluded.input_tokens,
  output_tokens = output_tokens + excluded.output_tokens
"""
# Selects a model's answers to the specified prompts for the current images.
_CURRENT_ANSWERS = """
FROM answers WHERE model = ? AND ({prompts}) AND EXISTS (SELECT 1 FROM images WHERE images.hash = answers.hash)
"""
# Errors are grouped by the text before the first colon.
_COUNT_ERRORS = f"""
SELECT substr(error, 1, instr(error || ':', ':') - 1) AS reason, count(*) AS number, min(error) {_CURRENT_ANSWERS}
  AND error IS NOT NULL GROUP BY reason ORDER BY number DESC, reason LIMIT ?
"""
_COUNT_WITHOUT_CAPTION = f"""
SELECT count(*) FILTER (WHERE num_captions = 0), count(*) FILTER (WHERE num_captions > 0 AND num_accepted = 0) FROM (
  SELECT count(text) AS num_captions, count(text) FILTER (WHERE problem IS NULL) AS num_accepted {_CURRENT_ANSWERS}
  GROUP BY hash)
"""


@dataclass(frozen=True, slots=True)
class StoredAnswer:
    """Row of the table `answers`. The fields are in column order, and the first four form the primary key."""

    hash: str  # `ImageRow.hash`
    prompt: str  # `Prompt.key`
    sample: int  # from 0
    model: str
    text: str | None  # caption, or None if the request failed
    error: str | None  # reason why the last request failed, or None
    temperature: float
    date: str  # UTC date, such as 2026-11-29
    input_tokens: int = 0
    output_tokens: int = 0
    problem: str | None = None  # reason why quality control rejected the caption, or None
    score: float | None = None  # cosine similarity between the caption and its image (see `score_captions`)
    rank: float | None = None  # fraction of other images that match the caption better than its own image


@dataclass(frozen=True, slots=True)
class ImageRow:
    """Row of the `images` table: a source record that has an image."""

    number: int  # zero-based position of the record in the sources
    key: str  # path or another identifier of the image
    hash: str  # SHA-256 hash of the image's bytes
    record: dict[str, Any]  # source record, whose image path may be relative to the output folder
    version: str | None = None  # size and modification time of a local image file, otherwise None


class CaptionDatabase:
    """SQLite database next to the output file. Threads that share an instance must use a lock.

    Raises:
        FormatVersionError: The file has an unsupported format version.
        OSError: The file cannot be opened or is not a database.
    """

    def __init__(self, file: str | Path) -> None:
        self.file = Path(file)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self._convert_sqlite_errors():
            self.connection = sqlite3.connect(
                self.file, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False
            )
            ((version,),) = self.connection.execute("PRAGMA user_version")
            if version not in (0, FORMAT_VERSION):
                self.connection.close()
                check_format_version(self.file, version, FORMAT_VERSION, "Use another --out, or delete this file")
            self.connection.execute("PRAGMA journal_mode = WAL")
            self.connection.execute("PRAGMA synchronous = NORMAL")
            if version == 0:  # a new file
                schema = f"{SCHEMA} PRAGMA user_version = {FORMAT_VERSION};"
                self.connection.executescript(f"BEGIN IMMEDIATE; {schema} COMMIT;")

    def close(self) -> None:
        self.connection.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit the changes made in the `with` block, or roll them back if the block raises an exception."""
        with self._convert_sqlite_errors():
            self.connection.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self.connection.execute("ROLLBACK")
                raise
            self.connection.execute("COMMIT")

    # ---- images

    def replace_image_rows(self, rows: Iterable[ImageRow]) -> None:
        """Replace the rows of the table `images` in one transaction. Merge records with the same key."""
        with self.transaction():
            self.connection.execute("DELETE FROM images")
            for row in rows:
                earlier = self.find_image_row(row.key)
                if earlier is not None:
                    record = json.dumps(_merge_records(earlier.record, row.record))
                    self.connection.execute("UPDATE images SET record = ? WHERE number = ?", (record, earlier.number))
                else:
                    values = (row.number, row.key, row.hash, json.dumps(row.record), row.version)
                    self.connection.execute("INSERT INTO images VALUES (?, ?, ?, ?, ?)", values)

    def find_image_row(self, key: str) -> ImageRow | None:
        row = self.connection.execute("SELECT * FROM images WHERE key = ?", (key,)).fetchone()
        return None if row is None else _parse_image_row(row)

    def read_image_row(self, number: int) -> ImageRow:
        row = self.connection.execute("SELECT * FROM images WHERE number = ?", (number,)).fetchone()
        return _parse_image_row(row)

    def has_source_captions(self, image_hash: str) -> bool:
        """Return True if any source record with this image has captions."""
        query = "SELECT 1 FROM images WHERE hash = ? AND json_extract(record, '$.captions[0]') IS NOT NULL LIMIT 1"
        return self.connection.execute(query, (image_hash,)).fetchone() is not None

    def count_images(self) -> int:
        ((count,),) = self.connection.execute("SELECT count(DISTINCT hash) FROM images")
        return int(count)

    def iterate_image_rows(self, distinct: bool = False) -> Iterator[ImageRow]:
        """Yield all image rows in source order. If `distinct` is True, yield only the first row of each image.

        The database may be modified during the iteration.
        """
        is_first = "number = (SELECT min(number) FROM images AS same WHERE same.hash = images.hash)"
        condition = f"number > ? AND {is_first}" if distinct else "number > ?"
        query = f"SELECT * FROM images WHERE {condition} ORDER BY number LIMIT 1000"
        last = -1
        while rows := self.connection.execute(query, (last,)).fetchall():
            yield from map(_parse_image_row, rows)
            last = rows[-1][0]

    # ---- answers

    def add_answers(self, answers: Sequence[StoredAnswer]) -> None:
        """Store answers in one transaction. An answer replaces any earlier answer with the same key."""
        with self.transaction():
            self.connection.executemany(_ADD_ANSWER, map(astuple, answers))

    def list_answers(self, image_hash: str, model: str, prompts: Sequence[Prompt]) -> list[StoredAnswer]:
        """Return a model's answers for an image, including failed requests, in the order of the prompts.

        Only the first `Prompt.samples` answers to each prompt are returned.
        """
        query = "SELECT * FROM answers WHERE hash = ? AND prompt = ? AND model = ? AND sample < ? ORDER BY sample"
        answers = []
        for prompt in prompts:
            rows = self.connection.execute(query, (image_hash, prompt.key, model, prompt.samples))
            answers += [StoredAnswer(*row) for row in rows]
        return answers

    def count_answers(self, model: str, prompts: Sequence[Prompt], only_captions: bool = False) -> int:
        """Count a model's answers for the current images. If `only_captions` is True, exclude failed requests."""
        condition = "AND error IS NULL" if only_captions else ""
        ((count,),) = self._query_current_answers(f"SELECT count(*) {_CURRENT_ANSWERS} {condition}", model, prompts)
        return int(count)

    def count_rejected_by_problem(self, model: str, prompts: Sequence[Prompt]) -> Counter[str]:
        """Count the rejected captions of the current images, grouped by problem."""
        query = f"SELECT problem, count(*) {_CURRENT_ANSWERS} AND problem IS NOT NULL GROUP BY problem"
        return Counter(dict(self._query_current_answers(query, model, prompts)))

    def count_errors_by_reason(self, model: str, prompts: Sequence[Prompt], limit: int) -> list[tuple[str, int, str]]:
        """Return the most common reasons for failed requests, as (reason, number of requests, example error)."""
        return self._query_current_answers(_COUNT_ERRORS, model, prompts, limit)

    def count_images_without_caption(self, model: str, prompts: Sequence[Prompt]) -> tuple[int, int]:
        """Count the images without an accepted caption. Captions must have been requested for all images.

        Returns:
            The number of images for which all requests failed, and the number of images with only rejected captions.
        """
        ((num_failed, num_rejected),) = self._query_current_answers(_COUNT_WITHOUT_CAPTION, model, prompts)
        return int(num_failed), int(num_rejected)

    def _query_current_answers(
        self, query: str, model: str, prompts: Sequence[Prompt], *parameters: object
    ) -> list[Any]:
        """Run a query that contains `_CURRENT_ANSWERS`, and return its rows."""
        condition = " OR ".join(["prompt = ? AND sample < ?"] * len(prompts))
        samples = [value for prompt in prompts for value in (prompt.key, prompt.samples)]
        return self.connection.execute(query.format(prompts=condition), (model, *samples, *parameters)).fetchall()

    def count_tokens(self, model: str) -> tuple[int, int]:
        """Return the total number of input and output tokens of a model's answers."""
        query = "SELECT coalesce(sum(input_tokens), 0), coalesce(sum(output_tokens), 0) FROM answers WHERE model = ?"
        return self.connection.execute(query, (model,)).fetchone()

    def update_check_results(self, answers: Iterable[StoredAnswer]) -> None:
        """Store the problem, score and rank of each answer in one transaction."""
        query = """UPDATE answers SET problem = ?, score = ?, rank = ?
          WHERE hash = ? AND prompt = ? AND sample = ? AND model = ?"""
        with self.transaction():
            for answer in answers:
                key = answer.hash, answer.prompt, answer.sample, answer.model
                self.connection.execute(query, (answer.problem, answer.score, answer.rank, *key))

    @contextmanager
    def _convert_sqlite_errors(self) -> Iterator[None]:
        """Convert SQLite errors, for example due to a corrupt file, to OSErrors that name the file."""
        try:
            yield
        except sqlite3.Error as error:
            raise OSError(f"{self.file}: {error}") from error


def _parse_image_row(row: tuple[int, str, str, str, str | None]) -> ImageRow:
    number, key, image_hash, record, version = row
    return ImageRow(number, key, image_hash, json.loads(record), version)


def _merge_records(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Merge two records. Concatenate lists such as captions. For other fields, the first record takes precedence."""
    merged = second | first
    for name, values in second.items():
        if isinstance(values, list):
            merged[name] = list(dict.fromkeys([*first.get(name, []), *values]))
    return merged
