"""Any source as a stream of records: an image, if there is one, and its captions.

`open_records` is the one way in. It reads what people have (see `readers` for the formats), checks each row as it
passes, and lists what it leaves out with file and row: nothing is lost silently, and nothing is fetched.
"""

from __future__ import annotations

import ast
import difflib
import io
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from PIL import Image

from llm2clip.data import readers
from llm2clip.data.image_header import readable_formats
from llm2clip.data.image_refs import FileImage, ImageRef, MemoryImage
from llm2clip.data.raw_rows import BadRow, LoadedImage, RawRow, guess_columns
from llm2clip.data.skip_log import SkipLog

ImageCheck = Literal["header", "exists", "unchecked", "ignore"]
LOOKED_FOR = ("header", "exists")  # then a row without its image is left out
MAX_PIXELS = 100_000_000
EARLY_CHECK_ROWS = 1000  # rows after which a source that is going wrong is stopped before its end
NO_SPLIT = "none"  # in a selection and in data: the records of no split

NAMES = {  # what our fields are commonly called; the first that is there is taken
    "id": ("id", "image_id", "__key__"),
    "image": ("image", "filepath", "file_name", "filename", "path", "img", "image_path"),
    "captions": ("captions", "caption", "text", "texts", "title", "sentences", "sentence", "txt"),
    "short_captions": ("short_captions", "short_caption"),
    "long_captions": ("long_captions", "long_caption"),
    "split": ("split",),
}
CAPTION_FIELDS = (
    "captions",
    "short_captions",
    "long_captions",
)  # of texts: as they came; and written anew, short and long


@dataclass(frozen=True, slots=True)
class Record:
    """An image and what is said of it. `image` is None in a source of texts; captions are stripped, never cut; `named`
    says whether the id is the source's."""

    id: str
    image: ImageRef | None
    captions: tuple[str, ...]
    short_captions: tuple[str, ...] = ()
    long_captions: tuple[str, ...] = ()
    split: str | None = None
    id_from_source: bool = field(default=True, compare=False)

    @property
    def texts(self) -> tuple[str, ...]:
        return self.captions + self.short_captions + self.long_captions


@dataclass(frozen=True)
class Source:
    """What to read: a path (or pattern, or hf:NAME), which splits of it (empty: all), and how its columns are called.

    columns: our field (id, image, captions, short_captions, long_captions, split) to the source's column; "" leaves a
    field out.
    """

    path: str
    splits: tuple[str, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.columns:
            if name not in NAMES:
                raise ValueError(f"columns: unknown field {name!r}; ours are {', '.join(NAMES)}")

    @classmethod
    def parse(cls, value: str | os.PathLike[str] | Mapping[str, Any] | Source) -> Source:
        """From `path`, `path@train+none`, or a mapping of our fields. A path that exists with an @ is that path."""
        if isinstance(value, Source):
            return value
        if isinstance(value, Mapping):
            if "path" not in value or not set(value) <= {"path", "splits", "columns"}:
                raise ValueError(f"a source has path, splits and columns; this has {', '.join(map(str, value))}")
            source, splits = cls.parse(value["path"]), value.get("splits") or ()
            splits = tuple(splits.split("+") if isinstance(splits, str) else map(str, splits))
            return cls(source.path, splits or source.splits, dict(value.get("columns") or {}))
        text = os.fspath(value)
        selection = re.fullmatch(r"(.+)@([^@/\\]+)", text, flags=re.DOTALL)
        if selection is None or os.path.exists(os.path.expanduser(text)):
            return cls(text)
        return cls(selection[1], tuple(name for name in selection[2].split("+") if name))

    def __str__(self) -> str:
        return "@".join([self.path, "+".join(self.splits)] if self.splits else [self.path])


# ---- opening -------------------------------------------------------------------------------------------------------


def open_records(
    source: str | os.PathLike[str] | Mapping[str, Any] | Source,
    log: SkipLog | None = None,
    image_check: ImageCheck = "header",
    require_captions: bool = True,
) -> Iterator[Record]:
    """The records of a source, one at a time, in its order.

    The path is looked for now; rows are read as they are asked for. Only .csv, .tsv and captions.txt are read whole,
    for a caption's row may be anywhere in them: rows of the same image and split become one record, at its first row.

    images: "header" opens each image as far as its size (about 0.1 ms from a warm disk; damage further in is not
    found), "exists" asks whether the file is there. "unchecked" and "ignore" are for reading texts: no row is left out for
    its image, and `image` is what the row names, there or not; "ignore" does not read the bytes in a table, either,
    without which its images cannot be told apart. A row without an image is a record too.
    captionless: so is one without captions, if it has an image, and nobody asks for a column of them; a folder is read
    with all that is in it.

    Raises what `SkipLog.check` raises, at the end and, once going wrong, early; ValueError for columns that are not
    there and for a source or a selection of splits without any record.
    """
    source = Source.parse(source)
    if image_check not in get_args(ImageCheck):
        raise ValueError(f"image_check={image_check!r}; it is one of {', '.join(get_args(ImageCheck))}")
    files = readers.find_source(source.path, whole=not require_captions)
    return _Opening(source, SkipLog() if log is None else log, image_check, not require_captions).records(files)


class _Skip(Exception):
    """Raised where a row turns out to give no record."""

    def __init__(self, reason: str, value: object, rows: int = 1) -> None:
        self.reason, self.value, self.rows = reason, value, rows


@dataclass(frozen=True, slots=True)
class _Row:
    """A row with our names and types, its image not looked at yet."""

    file: str
    row: int
    id: str | None
    image: LoadedImage | None
    captions: tuple[str, ...]
    short_captions: tuple[str, ...]
    long_captions: tuple[str, ...]
    split: str | None
    rows: int = 1  # of the source


class _Opening:
    """One reading of a source: its columns, and what has been met so far."""

    def __init__(self, source: Source, log: SkipLog, image_check: ImageCheck, captionless: bool = False) -> None:
        self.source, self.log, self.image_check, self.captionless = source, log, image_check, captionless
        self.met: dict[str, None] = {}  # column names, in order
        self.texts_met = False
        self.seen = 0  # rows of this source; the log counts those of all
        self.splits_met: Counter[str] = Counter()
        self._chosen: dict[tuple[str, ...], dict[str, str]] = {}

    def records(self, files: Sequence[tuple[str, str]]) -> Iterator[Record]:
        count = 0
        wanted = None if "split" in self.source.columns else self.source.splits
        for kind, path in files:
            raw = readers.read_source(kind, path, self.choose, self.image_check != "ignore", wanted)
            rows: Iterable[_Row] = self.rows(raw, kind)
            if kind in ("csv", "tsv", "captions.txt"):
                rows = _grouped(rows)
            for row in rows:
                try:
                    record = self.record(row)
                except _Skip as skip:
                    skip.rows = row.rows
                    self.skip(row.file, row.row, skip)
                    continue
                count += 1
                yield record
        if self.met:
            self.check_columns()
        self.log.check()
        if not count:
            splits = ", ".join(f"{name} ({number:,} rows)" for name, number in self.splits_met.items())
            listed = f"; its splits: {splits}" if splits else ""
            raise ValueError(f"{self.source}: no record{listed}; {self.log.summary()}")

    def saw(self, rows: int = 1) -> None:
        self.seen += rows
        self.log.count_source_rows(self.source.path, "+".join(sorted(self.source.splits)), self.seen)

    def skip(self, file: str, row: int, skip: _Skip) -> None:
        self.log.skip(file, row, skip.reason, skip.value, skip.rows)
        if self.seen >= EARLY_CHECK_ROWS:
            if not self.texts_met and not self.captionless:
                self.check_columns()
            self.log.check()

    # -- columns

    def choose(self, file: str, names: Sequence[str]) -> dict[str, str]:
        """Our field to the column that holds it, of a table with these columns."""
        key = tuple(names)
        if key not in self._chosen:
            self.met |= dict.fromkeys(names)
            chosen = self._chosen[key] = self.choose_some(key)
            self.texts_met |= bool(chosen.keys() & {*CAPTION_FIELDS})
            self.check_columns(file)
        return self._chosen[key]

    def choose_some(self, names: Sequence[str]) -> dict[str, str]:
        """As `choose`, of names of which some may be missing, as they may from one row of JSON."""
        chosen = guess_columns(NAMES | {name: (column,) for name, column in self.source.columns.items()}, names)
        # Sentences beside a long caption are what it is made of (image paragraphs), not captions of the image.
        guess = "captions" not in self.source.columns and chosen.get("captions")
        if guess in ("sentences", "sentence") and "long_captions" in chosen:
            del chosen["captions"]
        return chosen

    def of_row(self, fields: Mapping[str, Any]) -> dict[str, str]:
        """As `choose`, of a row that has names of its own: a name that holds nothing gives way to the next guess."""
        names = tuple(fields)
        filled = tuple(name for name, value in fields.items() if name in NAMES["image"] or not _null(value))
        key = (*names, "", *filled)
        if key not in self._chosen:  # rows have few shapes
            self.met |= dict.fromkeys(names)
            chosen = self._chosen[key] = self.choose_some(names) | self.choose_some(filled)
            self.texts_met |= bool(chosen.keys() & {*CAPTION_FIELDS})
        return self._chosen[key]

    def check_columns(self, file: str = "") -> None:
        """Raises if what the user named, or any column of captions, is not among the columns met."""
        has = f"it has {', '.join(self.met) or 'no columns'}"
        for name, column in self.source.columns.items():
            if column and column not in self.met:
                near = difflib.get_close_matches(column, self.met, n=1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                raise ValueError(f"{file or self.source}: no column {column!r} for {name}{hint}; {has}")
        if not self.texts_met and not self.captionless:
            hint = "map it with columns: {captions: NAME}"
            raise ValueError(f"{file or self.source}: no column of captions; {has}; {hint}")

    # -- rows

    def rows(self, raw: Iterable[RawRow], kind: str) -> Iterator[_Row]:
        """Raw rows of the splits asked for, with our names and types; those that have others are skipped here."""
        table = kind in ("csv", "tsv", "parquet", "hf", "saved")
        lists = kind in ("csv", "tsv", "tar")  # a cell of text may be a list written out
        for file, number, fields in raw:
            try:
                if isinstance(fields, BadRow):
                    raise _Skip(fields.reason, fields.value, fields.rows)
                chosen = self.choose(file, list(fields)) if table else self.of_row(fields)
                values = {name: fields.get(column) for name, column in chosen.items()}
                if kind in ("csv", "tsv"):  # of columns of one name the last, but for captions
                    values |= {n: v[-1] for n, v in values.items() if n not in CAPTION_FIELDS and isinstance(v, list)}
                split = _name(values, "split")
                split = None if split == NO_SPLIT else split
                self.splits_met[split or NO_SPLIT] += 1
                if self.source.splits and (split or NO_SPLIT) not in self.source.splits:
                    continue
                row = _Row(
                    file,
                    number,
                    _name(values, "id"),
                    _reference(values.get("image"), file, self.image_check),
                    self.strings(file, number, values.get("captions"), lists),
                    self.strings(file, number, values.get("short_captions") or None, lists),
                    self.strings(file, number, values.get("long_captions") or None, lists),
                    split,
                )
            except _Skip as skip:
                self.saw(skip.rows)
                self.skip(file, number, skip)
                continue
            self.saw()
            yield row

    def strings(self, file: str, row: int, value: Any, lists: bool) -> tuple[str, ...]:
        """The captions of a field: a string is one, a list is several, the empty ones among them are dropped."""
        if _null(value) and not isinstance(value, str):
            return ()
        if isinstance(value, str):
            value = _written_list(value) if lists else [value]
        if not isinstance(value, list):
            raise _Skip("malformed row", f"captions are text or a list of text, not {value!r}")
        kept = []
        for text in value:
            if not isinstance(text, str) and text is not None:
                raise _Skip("malformed row", f"a caption is text, not {text!r}")
            text = (text or "").strip()
            if not text:
                self.log.drop(file, row, "empty caption", value)
                continue
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise _Skip("malformed row", f"not valid Unicode: {text!r}") from error
            kept.append(text)
        return tuple(kept)

    def record(self, row: _Row) -> Record:
        image = row.image.ref if row.image else None
        if not any(getattr(row, kind) for kind in CAPTION_FIELDS) and not (self.captionless and image):
            raise _Skip("no image and no caption" if self.captionless else "no caption", image or row.id or "")
        if row.image is not None and self.image_check in LOOKED_FOR:
            _check_image(row.image, self.image_check)
        stem = os.path.splitext(os.path.basename(row.image.name or ""))[0] if row.image else ""
        identity = row.id or stem or f"{os.path.basename(row.file).split('.')[0]}:{row.row}"
        texts = (row.captions, row.short_captions, row.long_captions)
        return Record(identity, image, *texts, row.split, id_from_source=row.id is not None)


def _grouped(rows: Iterable[_Row]) -> Iterator[_Row]:
    """One row an image and split (where there is no image, an id and split), wherever its captions stand."""
    groups: dict[tuple[object, ...], list[_Row]] = {}
    for row in rows:
        name = str(row.image.ref) if row.image else row.id
        key = (row.image is None, name, row.split) if name else (row.file, row.row)
        groups.setdefault(key, []).append(row)
    for first, *others in groups.values():
        texts: dict[str, Any] = {
            kind: sum((getattr(row, kind) for row in others), getattr(first, kind)) for kind in CAPTION_FIELDS
        }
        yield replace(first, rows=1 + len(others), **texts)


def _null(value: object) -> bool:
    """Whether a source says "nothing" with it: pandas writes NaN, CSV an empty string."""
    return value is None or value == "" or value == [] or (isinstance(value, float) and math.isnan(value))


def _name(values: Mapping[str, Any], name: str) -> str | None:
    value = values.get(name)
    if _null(value):
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise _Skip("malformed row", f"{name} is text or a number, not {value!r}")
    return str(value).strip() or None


def _written_list(text: str) -> list[Any]:
    """The list a cell of text spells out, as JSON or as Python prints it; any other text is itself."""
    if text.lstrip().startswith("["):
        for parse in (json.loads, ast.literal_eval):
            try:
                value = parse(text.strip())
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            if isinstance(value, list) and all(isinstance(item, str | None) for item in value):
                return value
    return [text]


def _reference(value: Any, file: str, images: ImageCheck) -> LoadedImage | None:
    """What an image's cell refers to. A path is relative to the folder of the file that names it."""
    name = None
    if isinstance(value, dict) and {"bytes", "path"} & value.keys():  # as Hugging Face writes an image
        name = value.get("path")
        value = value["bytes"] if value.get("bytes") is not None else name
    if _null(value) or value == b"":
        return None
    if isinstance(value, LoadedImage):
        return value
    if isinstance(value, ImageRef):
        return LoadedImage(value, None, str(value))
    if isinstance(value, bytes):
        return LoadedImage(MemoryImage(value, name or f"image in {file}"), value, name)
    if not isinstance(value, str):
        raise _Skip("malformed row", f"an image is a path, bytes or null, not {value!r}")
    if images in LOOKED_FOR and re.match(r"[A-Za-z][A-Za-z0-9+.-]+://|data:", value):
        raise _Skip("image is a URL", value)
    path = os.path.join(os.path.dirname(file), value)
    return LoadedImage(FileImage(path), None, path)


def _check_image(held: LoadedImage, images: ImageCheck) -> None:
    """Raises if the image is not there or, for "header", does not begin like an image of a size one can decode."""
    if isinstance(held.ref, FileImage) and not os.path.isfile(held.ref.path):
        raise _Skip("missing image", held.ref)
    if images == "exists":
        return
    try:
        with io.BytesIO(held.data) if held.data is not None else held.ref.open() as stream:
            width, height = Image.open(stream, formats=readable_formats()).size
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # PIL's limits, near ours
        raise _Skip("image too large", f"{held.ref}: {error}") from error
    except Exception as error:  # PIL's plugins raise anything on hostile bytes
        raise _Skip("unreadable image", f"{held.ref}: {error}") from error
    if width * height > MAX_PIXELS:
        raise _Skip("image too large", f"{held.ref}: {width} x {height}")
