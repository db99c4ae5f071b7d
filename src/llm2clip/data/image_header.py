"""Image header parsing, supported formats, and limits on image size and decoding cost.

A small file can make a decoder process the same pixels or bytes thousands of times. `open_image_header` and
`check_decoding_cost` reject these files. `benchmarks/hostile_images.py` measures the decoding time of the slowest files
that are accepted.
"""

import io
import re
import struct
from collections.abc import Iterator
from functools import cache
from typing import Any, BinaryIO, cast

from PIL import Image

from llm2clip.io_utils import format_install_command

# Images with more pixels are rejected before decoding. 100 million RGB pixels take 300 MB.
MAX_PIXELS = 100_000_000
MAX_IMAGE_BYTES = 1 << 30  # enough for 100 million uncompressed 16-bit RGBA pixels (800 MB)

# Pillow decodes these formats in-process, whereas it runs Ghostscript for EPS.
# ICO is excluded because Pillow decodes the images in an ICO file before their size can be checked.
# HEIC requires the optional package pillow-heif, which is imported when the first HEIC file is opened.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")

MAX_SCANS = 100  # progressive JPEGs usually have at most 20 scans; a scan of 100 bytes can cover the entire image
MAX_SCANNED_PIXELS = 2_000_000_000  # maximum product of the number of scans and the number of pixels in a JPEG
MAX_HEADER_READS = 2048  # Pillow runs Python code for each part of a header, such as a PNG chunk
MAX_PNG_PROFILES = 16  # Pillow decompresses every colour profile, although a PNG may contain only one
MAX_PYTHON_PIXELS = 2_000_000  # limit for PPM images with an unusual maximum value, which Pillow decodes in Python

_SOI, _EOI, _SOS = 0xD8, 0xD9, 0xDA  # JPEG markers (ITU-T T.81, table B.1)
_SEQUENTIAL_FRAMES = frozenset({0xC0, 0xC1})
_ARITHMETIC_FRAMES = frozenset({0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF})
# In entropy-coded JPEG data, FF is followed by 00 or by a restart marker (D0 to D7).
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")
# Header of a progressive or arithmetic-coded JPEG frame with 1 to 4 components and 8 bits per sample.
_COMPLEX_FRAME = re.compile(rb"\xff[\xc2\xc5-\xc7\xc9-\xcb\xcd-\xcf]\x00[\x0b\x0e\x11\x14]\x08")
# JPEG segments that Pillow does not check: Huffman tables, restart intervals, comments and rare application segments.
_UNCHECKED_SEGMENTS = frozenset({0xC4, 0xDD, 0xFE, *range(0xE3, 0xED), 0xEF})
_SIMPLE_FRAMES = frozenset({0xC0, 0xC1, 0xC2})
_unpack_segment_header = struct.Struct(">BBH").unpack_from  # 0xFF, marker, length
MAX_SIMPLE_SEGMENTS = 100  # JPEG files with more segments are opened with Pillow
MAX_SIMPLE_PIXELS = 50_000_000  # larger images are opened with Pillow, which has its own limit
START_BYTES = 4096  # number of bytes read at the start of a file, enough for most image headers

_TILE_WIDTH, _TILE_HEIGHT, _TILE_BYTES, _STRIP_BYTES = 322, 323, 325, 279  # TIFF tags
_FILE_TYPE, _DNG_VERSION = 254, 50706  # TIFF tags
_HEIC_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"})
_UNSUPPORTED = {  # regular expression for the start of a file -> format name
    rb"(II\*\0|MM\0\*)....CR\x02": "Canon RAW (CR2)",
    rb"....ftypcrx ": "Canon RAW (CR3)",
    rb"FUJIFILMCCD-RAW": "Fujifilm RAW (RAF)",
    rb"IIU\0": "Panasonic RAW (RW2)",
    rb"IIR[OS]|MMOR": "Olympus RAW (ORF)",
    rb"8BPS": "Photoshop (PSD)",
    rb"\xff\x0a|\0\0\0\x0cJXL ": "JPEG XL",
    rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51": "JPEG 2000",
    rb"%PDF": "PDF",
    rb"%!PS": "EPS",
    rb"\x00\x00\x01\x00": "ICO",
}


class ImageFormatError(ValueError):
    """Raised when a file is not an image in a supported format. The message names the format if it is known."""


class DecodingLimitError(ValueError):
    """Raised when an image would be far more expensive to decode than its number of pixels suggests."""


@cache
def list_readable_formats() -> list[str]:
    """Return the supported formats that the installed version of Pillow can read."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def parse_image_size(data: bytes, file_size: int) -> tuple[int, int] | None:
    """Return the width and height of a JPEG that starts with `data`, about ten times faster than `open_image_header`.

    Return None for files that must be opened with Pillow, including all files that `open_image_header` rejects.
    """
    if file_size > MAX_IMAGE_BYTES or not data.startswith(b"\xff\xd8\xff"):
        return None
    try:
        size = _parse_jpeg_size(data)
    except struct.error:  # the header is longer than `data`
        return None
    return size if size is not None and 0 < size[0] * size[1] <= MAX_SIMPLE_PIXELS else None


def _parse_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return the width and height of a baseline or progressive JPEG, or None if its header is unusual.

    The segments before the first scan are checked in the same way as in Pillow.
    """
    size = None
    position = 2
    for _ in range(MAX_SIMPLE_SEGMENTS):
        prefix, marker, length = _unpack_segment_header(data, position)
        content = position + 4
        position += 2 + length
        if prefix != 0xFF or length < 2 or position > len(data):
            break
        if marker in _UNCHECKED_SEGMENTS:
            continue
        if marker == 0xDB:  # quantization tables with 8 bits per value
            if (length - 2) % 65 or max(data[content:position:65], default=0) > 15:
                break
        elif marker in _SIMPLE_FRAMES:
            bits, height, width, num_components = struct.unpack_from(">BHHB", data, content)
            if size is not None or bits != 8 or num_components not in (1, 3, 4) or length != 8 + 3 * num_components:
                break
            size = width, height
        elif marker == _SOS and size is not None:
            return size
        elif not _is_accepted_jpeg_segment(marker, data[content : content + 12], length - 2):
            break
    return None


def _is_accepted_jpeg_segment(marker: int, start: bytes, length: int) -> bool:
    """Return True if Pillow is known to accept an application segment of `length` bytes that starts with `start`."""
    if marker == 0xE0:
        return length >= 7 or not start.startswith(b"JFIF")
    if marker == 0xE1:
        return not start.startswith(b"Exif\0\0")  # EXIF data must be parsed by Pillow
    if marker == 0xE2:
        return not start.startswith(b"MPF\0") and (length >= 14 or not start.startswith(b"ICC_PROFILE\0"))
    return marker == 0xEE and (length >= 7 or not start.startswith(b"Adobe"))


def open_image_header(stream: BinaryIO) -> Image.Image:
    """Open an image without decoding its pixels. The caller must check the number of pixels against `MAX_PIXELS`.

    Malicious files can make Pillow raise almost any type of exception.

    Raises:
        ImageFormatError: The file is not an image in a supported format.
        DecodingLimitError: The file or its header is too large.
    """
    reader = _BoundedImageStream(stream)
    start = stream.read(1024)
    stream.seek(0)
    formats = list_readable_formats()
    if is_heic(start):
        _register_heic_plugin()
        formats = ["HEIF"]
    try:
        image = Image.open(cast(BinaryIO, reader), formats=formats)
    except Image.UnidentifiedImageError:
        _reject_unsupported_formats(start)
        reason = f"not an image in a supported format ({', '.join(list_readable_formats())}, HEIC)"
        raise ImageFormatError(reason if start else "not an image: the file is empty") from None
    tags = getattr(image, "tag_v2", {})
    if tags:
        _reject_unsupported_formats(start)  # CR2 files are based on TIFF
    if tags.get(_FILE_TYPE) == 1 or _DNG_VERSION in tags:
        # The first image in a DNG, NEF or ARW file is a small preview.
        raise ImageFormatError("RAW photos are not supported. Convert the photo to JPEG")
    reads_pixels = any(codec == "ppm" for codec, *_ in cast(Any, image).tile)
    reader.allow_decoding(bytes_per_read=1 if reads_pixels else 64)
    return image


def _reject_unsupported_formats(start: bytes) -> None:
    for pattern, name in _UNSUPPORTED.items():
        if re.match(pattern, start, flags=re.DOTALL):
            raise ImageFormatError(f"{name} is not supported. Convert the image to JPEG")
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<") and b"<svg" in start:
        raise ImageFormatError("SVG is not supported. Convert the image to JPEG")


@cache
def _register_heic_plugin() -> None:
    try:
        import pillow_heif
    except ImportError as error:
        raise ImageFormatError(
            f"HEIC images require the package pillow-heif ({error}). Run {format_install_command('photos')}, or "
            "convert the image to JPEG"
        ) from error
    # Thumbnails, depth maps and other auxiliary images are not read, to save memory.
    pillow_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False, decode_threads=1)


def is_heic(start: bytes) -> bool:
    """Return True if a file that starts with `start` is HEIC. AVIF uses the same container but is not HEIC."""
    if start[4:8] != b"ftyp":
        return False
    box = start[: min(1024, int.from_bytes(start[:4], "big"))]
    brands = {box[index : index + 4] for index in (8, *range(16, len(box), 4))}
    return bool(brands & _HEIC_BRANDS) and not brands & {b"avif", b"avis"}


def check_decoding_cost(data: bytes, header: Image.Image) -> None:
    """Raise `DecodingLimitError` if an image is too expensive to decode.

    `data` is the encoded image, and `header` is the same image, opened with `open_image_header`.
    """
    width, height = header.size
    if header.format in ("JPEG", "MPO"):
        _check_jpeg_cost(data, width * height)
    elif header.format == "TIFF":
        _check_tiff_decoding_cost(data, header)
    elif header.format == "PNG" and data.count(b"iCCP") > MAX_PNG_PROFILES:
        raise DecodingLimitError(f"a PNG must have at most {MAX_PNG_PROFILES} colour profiles")
    for codec, *_ in cast(Any, header).tile:
        if codec in ("bmp_rle", "ppm_plain"):  # decoded by Pillow in pure Python, which is slow
            raise DecodingLimitError("run-length encoded BMP images and plain-text PPM images are not supported")
        if codec == "ppm" and width * height > MAX_PYTHON_PIXELS:
            raise DecodingLimitError(
                f"a PPM image with an unusual maximum value must have at most {MAX_PYTHON_PIXELS:,} pixels"
            )


class _BoundedImageStream:
    """Stream that limits how often and how much a decoder can read, depending on the size of the file.

    Without the limits, reading a header with a million empty chunks, or with thousands of references to the same bytes,
    could take minutes or gigabytes of memory.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._size = stream.seek(0, io.SEEK_END)
        stream.seek(0)
        if self._size > MAX_IMAGE_BYTES:
            raise DecodingLimitError(f"file too large: {self._size:,} bytes; the limit is {MAX_IMAGE_BYTES:,} bytes")
        self._reads_left = MAX_HEADER_READS
        self._bytes_left = 2 * self._size + (1 << 20)

    def allow_decoding(self, bytes_per_read: int) -> None:
        """Reset the limits, so that a decoder can read the entire file in chunks of `bytes_per_read` bytes."""
        self._reads_left = MAX_HEADER_READS + self._size // bytes_per_read
        self._bytes_left = 2 * self._size + (1 << 20)

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self._reads_left -= 1
        self._bytes_left -= len(data)
        if self._reads_left < 0 or self._bytes_left < 0:
            raise DecodingLimitError("the file has too many small chunks, or refers to the same bytes too often")
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _check_jpeg_cost(data: bytes, num_pixels: int) -> None:
    max_scans = min(MAX_SCANS, MAX_SCANNED_PIXELS // max(1, num_pixels))
    num_scans = 0
    num_components = None  # number of components of a sequential JPEG, None for other JPEGs
    for marker, position in _iter_jpeg_markers(data):
        if marker in _ARITHMETIC_FRAMES:
            raise DecodingLimitError("JPEG images with arithmetic coding are not supported")
        if marker in _SEQUENTIAL_FRAMES:
            num_components = data[position + 7 : position + 8]
        if marker != _SOS:
            continue
        if data[position + 2 : position + 3] == num_components:
            return  # decoding a sequential JPEG ends after a scan with all components
        num_scans += 1
        if num_scans > max_scans:
            raise DecodingLimitError(f"a JPEG of {num_pixels:,} pixels must have at most {max_scans} scans")


def _iter_jpeg_markers(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield (marker, offset after the marker) for each marker outside the segments of a JPEG."""
    position = 0
    while (match := _MARKER.search(data, position)) is not None:
        marker, position = match[0][1], match.end()
        if marker == _EOI:
            return
        yield marker, position
        if marker != _SOI:
            length = int.from_bytes(data[position : position + 2], "big")
            position += max(2, length)


def _check_tiff_decoding_cost(data: bytes, header: Any) -> None:
    width, height = header.size
    tags = header.tag_v2
    if _TILE_WIDTH in tags or _TILE_HEIGHT in tags:
        tile_width, tile_height = max(1, tags.get(_TILE_WIDTH, 1)), max(1, tags.get(_TILE_HEIGHT, 1))
        num_tiles = -(-width // tile_width) * -(-height // tile_height)
        if num_tiles * tile_width * tile_height > 2 * MAX_PIXELS:
            raise DecodingLimitError(f"the tiles of the TIFF must have at most {2 * MAX_PIXELS:,} pixels in total")
    if header.info.get("compression", "raw") == "raw":
        return  # Pillow reads uncompressed pixels through `_BoundedImageStream`
    sizes = tags.get(_TILE_BYTES) or tags.get(_STRIP_BYTES)
    if not sizes or sum(sizes) > len(data):
        raise DecodingLimitError("the strips or tiles of the TIFF overlap or have no size")
    if "jpeg" in header.info["compression"] and _COMPLEX_FRAME.search(data):
        raise DecodingLimitError("TIFF images with progressive or arithmetic-coded JPEG data are not supported")
