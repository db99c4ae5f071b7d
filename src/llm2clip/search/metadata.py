"""Metadata of indexed images, and filters. Each field is declared once, in `ImageMetadata` or `ContentMetadata`.

The columns of both index backends, the HTTP API, the options and the JSON output of `llm2clip search`, the details and
filters of the search page, its CSV list and galleries are derived from the declarations. To add a field, declare it
here, read it in `exif.read_exif`, and increase `backends.FORMAT_VERSION`.
"""

import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args

# FTS5's trigram tokenizer stops at NUL, and SQLite cannot store lone surrogates. They are replaced with symbols, such
# as U+2400 (␀) for NUL, which separate words as the original characters do.
REPLACEMENTS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n\r"}
REPLACEMENTS |= dict.fromkeys(range(0xD800, 0xE000), 0xFFFD)
MAX_FILTER_LENGTH = 500  # of a caption or camera filter, in characters
MAX_PATH_LENGTH = 4096  # in characters


def normalize(text: str) -> str:
    """Return a text in the form in which it is stored and searched: casefolded, composed (NFC), without controls."""
    return unicodedata.normalize("NFC", text.casefold()).translate(REPLACEMENTS)


def make_contains_pattern(text: str) -> str:
    r"""Return the pattern of `LIKE ... ESCAPE '\'` for normalised texts that contain a text."""
    return f"%{escape_pattern(normalize(text))}%"


def escape_pattern(text: str) -> str:
    """Escape the characters that have a special meaning in LIKE patterns."""
    return text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")


@dataclass(frozen=True)
class Condition:
    """A condition of a `Filter`.

    Attributes:
        name: Name in `Filter`, in the HTTP API and on the command line.
        kind: Type of the value: a text, a number, or a time as a Unix timestamp. On the command line and on the search
            page, times are dates.
        label: Description in front of the value on the search page.
        description: Continuation of "Only images" in the HTTP API and in `--help`.
        sql: SQL condition. `:NAME` is the value. Empty if each backend has its own.
        max_length: Maximum length of a text, in characters.
        placeholder: Example or unit, shown in the empty input on the search page.
        to_parameter: Function that converts the value to the parameter of the SQL condition.
    """

    name: str
    kind: Literal["text", "number", "first time", "last time"]
    label: str
    description: str
    sql: str = ""
    max_length: int = MAX_FILTER_LENGTH
    placeholder: str = ""
    to_parameter: Callable[[Any], Any] = field(default=lambda value: value)


@dataclass(frozen=True)
class Declaration:
    """Declaration of a metadata field.

    Attributes:
        description: Description in the HTTP API.
        display: Text for the details of an image. `{NAME}` is the value of a field. The text is omitted if one of the
            values is None or empty.
        link: URL of the text, or empty.
        is_time: True for Unix timestamps, which are shown as local dates and times.
        is_private: True if galleries omit the field by default.
        conditions: Filters on the field.
    """

    description: str
    display: str = ""
    link: str = ""
    is_time: bool = False
    is_private: bool = False
    conditions: tuple[Condition, ...] = ()


def declare(default: Any, **values: Any) -> Any:
    """Return a dataclass field with the given default and `Declaration`."""
    return field(default=default, metadata={"declaration": Declaration(**values)})


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageMetadata:
    """Metadata of an image at a specific location. Texts must be valid Unicode."""

    taken: float = declare(
        0.0,
        description="capture time, or file modification time if the capture time is unknown, as a Unix timestamp",
        display="{taken}",
        is_time=True,
        conditions=(
            Condition("after", "first time", "taken after", "taken at or after this time", "taken >= :after"),
            Condition("before", "last time", "taken before", "taken at or before this time", "taken <= :before"),
        ),
    )
    camera: str = declare(
        "",
        description="make and model of the camera; empty if unknown",
        display="{camera}",
        conditions=(
            Condition(
                "camera",
                "text",
                "camera contains",
                "taken with a camera whose make and model contain this text, ignoring case",
                r"folded_camera LIKE :camera ESCAPE '\'",
                to_parameter=make_contains_pattern,
            ),
        ),
    )
    latitude: float | None = declare(
        None,
        description="GPS latitude in degrees; null if unknown",
        display="{latitude}, {longitude}",
        link="https://www.openstreetmap.org/?mlat={latitude}&mlon={longitude}#map=15/{latitude}/{longitude}",
        is_private=True,
    )
    longitude: float | None = declare(None, description="GPS longitude in degrees; null if unknown", is_private=True)


@dataclass(frozen=True, kw_only=True)
class ContentMetadata:
    """Metadata of an image content, which all images with identical bytes share."""

    width: int = declare(
        0,
        description="width in pixels, after EXIF rotation",
        display="{width} × {height}",
        conditions=(
            Condition(
                "min_side",
                "number",
                "shorter side at least",
                "whose shorter side has at least this many pixels",
                "width >= :min_side AND height >= :min_side",
                placeholder="pixels",
            ),
        ),
    )
    height: int = declare(0, description="height in pixels, after EXIF rotation")


@dataclass(frozen=True)
class MetadataField:
    """A declared metadata field.

    Attributes:
        name: Name of the field, and of its column. The column `folded_NAME` contains normalised texts, for filters.
        type: Type of the values: float, int or str.
        is_nullable: True if the value can be None.
    """

    name: str
    type: type
    is_nullable: bool
    declaration: Declaration


def list_fields(metadata: type[ImageMetadata] | type[ContentMetadata]) -> tuple[MetadataField, ...]:
    """Return the declared fields of a class."""
    declared = []
    for item in fields(metadata):
        types = get_args(item.type) or (item.type,)
        [value_type] = [candidate for candidate in types if candidate is not NoneType]
        declared.append(MetadataField(item.name, value_type, NoneType in types, item.metadata["declaration"]))
    return tuple(declared)


IMAGE_FIELDS, CONTENT_FIELDS = list_fields(ImageMetadata), list_fields(ContentMetadata)


def list_columns(metadata_fields: tuple[MetadataField, ...]) -> list[str]:
    """Return the names of the columns of metadata fields."""
    columns = [item.name for item in metadata_fields]
    return columns + [f"folded_{item.name}" for item in metadata_fields if item.type is str]


def define_columns(metadata_fields: tuple[MetadataField, ...], types: Mapping[type, str]) -> str:
    """Return the SQL definitions of the columns of metadata fields.

    Args:
        types: SQL type of each Python type.
    """
    definitions = []
    for item in metadata_fields:
        definition = types[item.type] if item.is_nullable else f"{types[item.type]} NOT NULL"
        definitions.append(f"{item.name} {definition}")
        if item.type is str:
            definitions.append(f"folded_{item.name} {definition}")
    return ", ".join(definitions)


def read_columns(values: ImageMetadata | ContentMetadata, metadata_fields: tuple[MetadataField, ...]) -> dict[str, Any]:
    """Return the values of the columns of metadata fields."""
    columns = {item.name: getattr(values, item.name) for item in metadata_fields}
    columns |= {f"folded_{item.name}": normalize(columns[item.name]) for item in metadata_fields if item.type is str}
    return columns


class Detail(NamedTuple):
    """A line about an image, made from one or more metadata fields.

    Attributes:
        text: Text for the user.
        url: URL to which the text is linked, or an empty string.
        is_private: True if galleries omit the line by default.
    """

    text: str
    url: str
    is_private: bool


def list_details(content: ContentMetadata, image: ImageMetadata) -> list[Detail]:
    """Return the lines about an image content and one of its images."""
    values = to_json(content, CONTENT_FIELDS) | to_json(image, IMAGE_FIELDS)
    for item in (*CONTENT_FIELDS, *IMAGE_FIELDS):
        if item.declaration.is_time and values[item.name] is not None:
            values[item.name] = values[item.name][: len("2024-05-31T12:00")].replace("T", " ")
    details = []
    for item in (*CONTENT_FIELDS, *IMAGE_FIELDS):
        declaration = item.declaration
        names = re.findall(r"{(\w+)}", declaration.display)
        if names and all(values[name] not in (None, "") for name in names):
            text, url = declaration.display.format(**values), declaration.link.format(**values)
            details.append(Detail(text, url, declaration.is_private))
    return details


def to_json(values: ImageMetadata | ContentMetadata, metadata_fields: tuple[MetadataField, ...]) -> dict[str, Any]:
    """Return the values of metadata fields. Times are local and in ISO 8601 format, or None if out of range."""
    converted = {item.name: getattr(values, item.name) for item in metadata_fields}
    for item in metadata_fields:
        if item.declaration.is_time:
            converted[item.name] = _format_time(converted[item.name])
    return converted


def _format_time(timestamp: float) -> str | None:
    try:
        return datetime.fromtimestamp(timestamp).isoformat(timespec="seconds")
    except (OverflowError, OSError, ValueError):  # files can have any modification time
        return None


PATH = Condition(
    "path",
    "text",
    "in folder",
    "in this folder, tar or file. A relative path, such as 2024/trip, matches in every folder. * matches any "
    "characters, including slashes, and ? matches one character",
    max_length=MAX_PATH_LENGTH,
    placeholder="2024/trip or *.png",
)
CAPTION = Condition("caption", "text", "caption contains", "with a caption that contains this text, ignoring case")
CONTENT_CONDITIONS = [condition for item in CONTENT_FIELDS for condition in item.declaration.conditions]
IMAGE_CONDITIONS = [condition for item in IMAGE_FIELDS for condition in item.declaration.conditions]
CONDITIONS = {condition.name: condition for condition in (CAPTION, PATH, *IMAGE_CONDITIONS, *CONTENT_CONDITIONS)}


@dataclass(frozen=True, init=False)
class Filter:
    """Conditions that every search result must meet, such as `Filter(path="2024/trip", min_side=500)`.

    An image content meets the conditions if one of its images meets all of them.

    Attributes:
        values: Value of each condition, keyed by the names in CONDITIONS. Conditions whose value is None are omitted.

    Raises:
        TypeError: A name is not in CONDITIONS.
        ValueError: A text is too long.
    """

    values: Mapping[str, Any]

    def __init__(self, **values: Any) -> None:
        for name, value in values.items():
            if name not in CONDITIONS:
                raise TypeError(f"unknown filter {name!r}; the filters are {', '.join(CONDITIONS)}")
            limit = CONDITIONS[name].max_length
            if isinstance(value, str) and len(value) > limit:
                raise ValueError(f"the {name} filter is too long: {len(value):,} characters; the limit is {limit:,}")
        object.__setattr__(self, "values", {name: value for name, value in values.items() if value is not None})

    def __bool__(self) -> bool:
        return bool(self.values)
