"""Metadata in the EXIF data of images."""

import io
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any

from PIL import Image

from llm2clip.data.image_header import open_header
from llm2clip.data.image_refs import to_valid_unicode
from llm2clip.search.types import IndexedImage

EXIF_IFD, GPS_IFD = 0x8769, 0x8825
DATE_TAKEN, DATE, MAKE, MODEL = 0x9003, 0x0132, 0x010F, 0x0110  # EXIF tags
LATITUDE_REFERENCE, LATITUDE, LONGITUDE_REFERENCE, LONGITUDE = 1, 2, 3, 4  # tags of GPS_IFD
MAX_CAMERA_LENGTH = 200  # in characters
TIME_OFFSET = 1e-6  # added to EXIF times that are equal to the file's modification time, in seconds


def read_exif(data: bytes, modified: float = 0.0) -> dict[str, Any]:
    """Return the fields of `ImageMetadata` that an encoded image contains.

    EXIF dates have no time zone, so the local time zone is assumed.

    Args:
        modified: The file's modification time, which is returned as `taken` if there is no date.
    """
    metadata: dict[str, Any] = {"taken": modified}
    try:
        header = open_header(io.BytesIO(data))
        if header.format == "PNG" and "exif" not in header.info:
            return metadata  # Pillow would decode the entire image to look for EXIF data after the pixels
        exif = header.getexif()
        metadata["camera"] = _read_camera(exif)
    except Exception:  # Pillow can raise almost any exception for corrupt headers
        return metadata
    with suppress(Exception):
        date = exif.get_ifd(EXIF_IFD).get(DATE_TAKEN) or exif.get(DATE)
        taken = datetime.strptime(str(date)[:19], "%Y:%m:%d %H:%M:%S").timestamp()
        metadata["taken"] = taken + TIME_OFFSET if taken == modified else taken  # see `has_exif_time`
    with suppress(Exception):
        metadata.update(_read_position(exif.get_ifd(GPS_IFD)))
    return metadata


def _read_camera(exif: Image.Exif) -> str:
    make, model = (str(exif.get(tag) or "").strip(" \0") for tag in (MAKE, MODEL))
    camera = model if model.casefold().startswith(make.casefold()) else f"{make} {model}"
    return to_valid_unicode(camera[:MAX_CAMERA_LENGTH])


def _read_position(gps: Mapping[int, Any]) -> dict[str, float]:
    """Return the latitude and longitude in degrees, or an empty dict if the values are out of range."""
    latitude = _read_angle(gps[LATITUDE], gps[LATITUDE_REFERENCE], "S")
    longitude = _read_angle(gps[LONGITUDE], gps[LONGITUDE_REFERENCE], "W")
    if not abs(latitude) <= 90 or not abs(longitude) <= 180:  # also rejects NaN
        return {}
    return {"latitude": latitude, "longitude": longitude}


def _read_angle(parts: Any, reference: Any, negative_reference: str) -> float:
    """Convert degrees, minutes and seconds to degrees, rounded to about 10 cm."""
    degrees, minutes, seconds = (float(part) for part in parts)
    angle = round(degrees + minutes / 60 + seconds / 3600, 6)
    return -angle if str(reference).strip(" \0").upper() == negative_reference else angle


def has_exif_time(image: IndexedImage) -> bool:
    """Return True if `taken` is an EXIF time. Return False if it is, or could be, the file's modification time.

    For images in a saved data set, the index does not contain the modification time, so the result is always False.
    """
    _, _, nanoseconds = image.file_version.partition(" ")
    return nanoseconds.isdigit() and abs(image.taken - int(nanoseconds) / 1e9) > TIME_OFFSET / 2
