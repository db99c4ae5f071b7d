"""Metadata of indexed images, and search filters.

The declarations in `ImageMetadata` and `ContentMetadata` determine the database columns, the HTTP API, the options and
JSON output of `llm2clip search`, the search page, its CSV export and galleries. To add a field, declare the field, read
its value in `read_exif`, and increase `backends.FORMAT_VERSION`.
"""

import io
import re
import unicodedata
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from datetime import datetime
from types import NoneType
from typing import Any, Literal, get_args

# Control characters and lone surrogates are replaced with symbols, such as U+2400 (␀) for NUL, which separate words.
# FTS5's trigram tokenizer stops at NUL, and SQLite cannot store lone surrogates.
REPLACEMENTS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n\r"}
REPLACEMENTS |= dict.fromkeys(range(0xD800, 0xE000), 0xFFFD)
MAX_FILTER_LENGTH = 500  # maximum length of a caption or camera filter, in characters
MAX_PATH_LENGTH = 4096  # maximum length of a path filter, in characters


def normalize_text(text: str) -> str:
    """Case-fold a text, convert it to NFC and replace control characters, for word search and filters."""
    return unicodedata.normalize("NFC", text.casefold()).translate(REPLACEMENTS)


def make_contains_pattern(text: str) -> str:
    r"""Return a pattern for `LIKE ... ESCAPE '\'` that matches normalised texts containing `text`."""
    return f"%{escape_like_pattern(normalize_text(text))}%"


def escape_like_pattern(text: str) -> str:
    return text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")


# ---- declarations


@dataclass(frozen=True)
class FilterCondition:
    name: str  # name in `Filter`, in the HTTP API and on the command line
    kind: Literal["text", "number", "first time", "last time"]  # type of the value; times are Unix timestamps
    label: str  # text in front of the value on the search page
    description: str  # text that follows "Only images" in the HTTP API and in `--help`
    sql: str = ""  # SQL condition with the value as `:NAME`; empty if each backend has its own condition
    max_length: int = MAX_FILTER_LENGTH  # maximum length of a text value, in characters
    placeholder: str = ""  # example or unit in the empty input field on the search page
    to_parameter: Callable[[Any], Any] = field(default=lambda value: value)  # converts the value to an SQL parameter


@dataclass(frozen=True)
class MetadataField:
    """A metadata field and its database column. A text field has a second, normalised column `folded_NAME`."""

    name: str
    type: type  # float, int or str
    is_nullable: bool  # True if the value can be None
    description: str
    display: str = ""  # template of a metadata line; the line is hidden if a field `{NAME}` is empty
    link: str = ""  # template of the URL to which the displayed text links
    is_time: bool = False  # True for Unix timestamps, which are shown as local dates and times
    is_private: bool = False  # True if galleries omit the field by default
    conditions: tuple[FilterCondition, ...] = ()


def declare_metadata_field(default: Any, **values: Any) -> Any:
    """Declare a dataclass field with a default value and the attributes of a `MetadataField`."""
    return field(default=default, metadata=values)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageMetadata:
    """Metadata of an image at one of its locations. Texts must be valid Unicode."""

    taken: float = declare_metadata_field(
        0.0,
        description="capture time, or file modification time if the capture time is unknown, as a Unix timestamp",
        display="{taken}",
        is_time=True,
        conditions=(
            FilterCondition("after", "first time", "taken after", "taken at or after this time", "taken >= :after"),
            FilterCondition("before", "last time", "taken before", "taken at or before this time", "taken <= :before"),
        ),
    )
    camera: str = declare_metadata_field(
        "",
        description="make and model of the camera; empty if unknown",
        display="{camera}",
        conditions=(
            FilterCondition(
                "camera",
                "text",
                "camera contains",
                "taken with a camera whose make and model contain this text, ignoring case",
                r"folded_camera LIKE :camera ESCAPE '\'",
                to_parameter=make_contains_pattern,
            ),
        ),
    )
    latitude: float | None = declare_metadata_field(
        None,
        description="GPS latitude in degrees; null if unknown",
        display="{latitude}, {longitude}",
        link="https://www.openstreetmap.org/?mlat={latitude}&mlon={longitude}#map=15/{latitude}/{longitude}",
        is_private=True,
    )
    longitude: float | None = declare_metadata_field(
        None, description="GPS longitude in degrees; null if unknown", is_private=True
    )


@dataclass(frozen=True, kw_only=True)
class ContentMetadata:
    """Metadata that all images with identical bytes share."""

    width: int = declare_metadata_field(
        0,
        description="width in pixels, after EXIF rotation",
        display="{width} × {height}",
        conditions=(
            FilterCondition(
                "min_side",
                "number",
                "shorter side at least",
                "whose shorter side has at least this many pixels",
                "width >= :min_side AND height >= :min_side",
                placeholder="pixels",
            ),
        ),
    )
    height: int = declare_metadata_field(0, description="height in pixels, after EXIF rotation")


def list_metadata_fields(metadata: type[ImageMetadata] | type[ContentMetadata]) -> tuple[MetadataField, ...]:
    declared = []
    for item in fields(metadata):
        types = get_args(item.type) or (item.type,)
        [value_type] = [candidate for candidate in types if candidate is not NoneType]
        declared.append(MetadataField(item.name, value_type, NoneType in types, **item.metadata))
    return tuple(declared)


IMAGE_FIELDS, CONTENT_FIELDS = list_metadata_fields(ImageMetadata), list_metadata_fields(ContentMetadata)


def list_column_names(metadata_fields: tuple[MetadataField, ...]) -> list[str]:
    columns = [item.name for item in metadata_fields]
    return columns + [f"folded_{item.name}" for item in metadata_fields if item.type is str]


def format_column_definitions(metadata_fields: tuple[MetadataField, ...], types: Mapping[type, str]) -> str:
    definitions = []
    for item in metadata_fields:
        definition = types[item.type] if item.is_nullable else f"{types[item.type]} NOT NULL"
        definitions.append(f"{item.name} {definition}")
        if item.type is str:
            definitions.append(f"folded_{item.name} {definition}")
    return ", ".join(definitions)


def get_column_values(
    values: ImageMetadata | ContentMetadata, metadata_fields: tuple[MetadataField, ...]
) -> dict[str, Any]:
    columns = {item.name: getattr(values, item.name) for item in metadata_fields}
    texts = [item.name for item in metadata_fields if item.type is str]
    return columns | {f"folded_{name}": normalize_text(columns[name]) for name in texts}


# ---- display


@dataclass(frozen=True)
class MetadataLine:
    """Line of metadata that is shown to users. If `url` is not empty, the text links to this URL."""

    text: str
    url: str


def describe_metadata(content: ContentMetadata, image: ImageMetadata, with_private: bool = True) -> list[MetadataLine]:
    values = convert_metadata_to_json(content, CONTENT_FIELDS) | convert_metadata_to_json(image, IMAGE_FIELDS)
    details = []
    for item in (*CONTENT_FIELDS, *IMAGE_FIELDS):
        if item.is_time and values[item.name] is not None:
            values[item.name] = values[item.name][: len("2024-05-31T12:00")].replace("T", " ")
        names = re.findall(r"{(\w+)}", item.display)
        is_shown = with_private or not item.is_private
        if is_shown and names and all(values[name] not in (None, "") for name in names):
            details.append(MetadataLine(item.display.format(**values), item.link.format(**values)))
    return details


def convert_metadata_to_json(
    values: ImageMetadata | ContentMetadata, metadata_fields: tuple[MetadataField, ...]
) -> dict[str, Any]:
    """Return metadata values for JSON. Times are local times in ISO 8601 format, or None if out of range."""
    converted = {item.name: getattr(values, item.name) for item in metadata_fields}
    for item in metadata_fields:
        if item.is_time:
            time = convert_to_local_time(converted[item.name])
            converted[item.name] = None if time is None else time.isoformat(timespec="seconds")
    return converted


def convert_to_local_time(timestamp: float) -> datetime | None:
    """Convert a Unix timestamp to a local time, or to None if the timestamp is out of range."""
    try:
        return datetime.fromtimestamp(timestamp)
    except (OverflowError, OSError, ValueError):
        return None


# ---- filters

PATH = FilterCondition(
    "path",
    "text",
    "in folder",
    "in this folder, tar or file. A relative path, such as 2024/trip, matches in every folder. * matches any "
    "characters, including slashes, and ? matches one character",
    max_length=MAX_PATH_LENGTH,
    placeholder="2024/trip or *.png",
)
CAPTION = FilterCondition("caption", "text", "caption contains", "with a caption containing this text, ignoring case")
CONTENT_CONDITIONS = [condition for item in CONTENT_FIELDS for condition in item.conditions]
IMAGE_CONDITIONS = [condition for item in IMAGE_FIELDS for condition in item.conditions]
CONDITIONS = {condition.name: condition for condition in (CAPTION, PATH, *IMAGE_CONDITIONS, *CONTENT_CONDITIONS)}


@dataclass(frozen=True, init=False)
class Filter:
    """Conditions that every search result must meet, such as `Filter(path="2024/trip", min_side=500)`.

    If several files have the same content, at least one file must meet all conditions.

    Attributes:
        values: Values of the conditions, keyed by the names in CONDITIONS. Conditions with the value None are omitted.

    Raises:
        TypeError: A name is not in CONDITIONS.
        ValueError: A text is too long.
    """

    values: Mapping[str, Any]

    def __init__(self, **values: Any) -> None:
        for name, value in values.items():
            if name not in CONDITIONS:
                raise TypeError(f"unknown filter {name!r}; valid filters are {', '.join(CONDITIONS)}")
            limit = CONDITIONS[name].max_length
            if isinstance(value, str) and len(value) > limit:
                raise ValueError(f"the {name} filter is too long: {len(value):,} characters; the limit is {limit:,}")
        object.__setattr__(self, "values", {name: value for name, value in values.items() if value is not None})

    def __bool__(self) -> bool:
        return bool(self.values)


# ---- EXIF data

EXIF_IFD, GPS_IFD = 0x8769, 0x8825
DATE_TAKEN, DATE, MAKE, MODEL = 0x9003, 0x0132, 0x010F, 0x0110  # EXIF tags
LATITUDE_REFERENCE, LATITUDE, LONGITUDE_REFERENCE, LONGITUDE = 1, 2, 3, 4  # tags of GPS_IFD
MAX_CAMERA_LENGTH = 200  # in characters; longer camera names are truncated
TIME_OFFSET = 1e-6  # seconds that are added to an EXIF time that equals the modification time of the file


def read_exif(data: bytes, modified: float = 0.0) -> dict[str, Any]:
    """Read the fields of `ImageMetadata` from the EXIF data of an encoded image.

    EXIF dates have no time zone and are interpreted as local times. Without an EXIF date, `taken` is `modified`, the
    modification time of the file.
    """
    from llm2clip.data.image_header import open_image_header  # deferred, because importing Pillow is slow

    metadata: dict[str, Any] = {"taken": modified}
    try:
        header = open_image_header(io.BytesIO(data))
        if header.format == "PNG" and "exif" not in header.info:
            return metadata  # Pillow would decode the entire image to find EXIF data after the pixels
        exif = header.getexif()
        metadata["camera"] = _read_camera_name(exif)
    except Exception:  # Pillow can raise almost any exception for corrupt headers
        return metadata
    with suppress(Exception):
        date = exif.get_ifd(EXIF_IFD).get(DATE_TAKEN) or exif.get(DATE)
        taken = datetime.strptime(str(date)[:19], "%Y:%m:%d %H:%M:%S").timestamp()
        metadata["taken"] = taken + TIME_OFFSET if taken == modified else taken  # see `IndexedImage.has_exif_time`
    with suppress(Exception):
        gps = exif.get_ifd(GPS_IFD)
        latitude = _convert_to_degrees(gps[LATITUDE], gps[LATITUDE_REFERENCE], "S")
        longitude = _convert_to_degrees(gps[LONGITUDE], gps[LONGITUDE_REFERENCE], "W")
        if abs(latitude) <= 90 and abs(longitude) <= 180:  # False for NaN
            metadata |= {"latitude": latitude, "longitude": longitude}
    return metadata


def _read_camera_name(exif: Any) -> str:
    from llm2clip.io_utils import to_valid_unicode

    make, model = (str(exif.get(tag) or "").strip(" \0") for tag in (MAKE, MODEL))
    camera = model if model.casefold().startswith(make.casefold()) else f"{make} {model}"
    return to_valid_unicode(camera[:MAX_CAMERA_LENGTH])


def _convert_to_degrees(parts: Any, reference: Any, negative_reference: str) -> float:
    """Convert degrees, minutes and seconds to degrees, rounded to six decimal places (about 10 cm)."""
    degrees, minutes, seconds = (float(part) for part in parts)
    angle = round(degrees + minutes / 60 + seconds / 3600, 6)
    return -angle if str(reference).strip(" \0").upper() == negative_reference else angle
