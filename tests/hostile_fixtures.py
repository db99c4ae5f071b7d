"""Images that were made to be slow to decode. Each file has at most a few megabytes and 100 million pixels."""

import struct
import zlib
from collections.abc import Callable, Sequence

import numpy as np

SIDE = 9_999  # width and height of most images in pixels
SIZE = 4 << 20  # approximate size of each file in bytes


# ---- JPEG ----------------------------------------------------------------------------------------------------------


def jpeg(frame: int, scans: Sequence[bytes], side: int = SIDE, components: int = 1) -> bytes:
    """Return a JPEG with a frame header of the given type (SOFn) and the given scans."""
    sampling = b"".join(bytes([number, 0x11, 0]) for number in range(1, components + 1))
    tables = segment(0xDB, b"\0" + b"\x01" * 64)
    tables += segment(0xC4, b"\x00" + bytes([1] + [0] * 15) + b"\x00")  # DC: the code 0 means "no difference"
    return b"".join(
        [
            b"\xff\xd8",
            tables,
            segment(frame, struct.pack(">BHHB", 8, side, side, components) + sampling),
            *scans,
            b"\xff\xd9",
        ]
    )


def segment(marker: int, body: bytes) -> bytes:
    """Return a JPEG segment."""
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def scan(first: int, last: int, approximation: int, data: bytes, component: int = 1) -> bytes:
    """Return a JPEG scan of one component, with the coefficients from `first` to `last`."""
    return segment(0xDA, bytes([1, component, 0, first, last, approximation])) + data


def num_blocks(side: int) -> int:
    return (-(-side // 8)) ** 2


def end_of_block_runs(side: int) -> bytes:
    """Return the data of a progressive scan that has no coefficients in any block: one code per 32,766 blocks."""
    code = "0" + f"{32_766 - (1 << 14):014b}"  # the code 0 means a run of 2^14 blocks plus a 14-bit number
    bits = code * -(-num_blocks(side) // 32_766)
    bits += "0" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\x00")


def refinement_scans(num_scans: int, side: int = SIDE) -> bytes:
    """Return a progressive JPEG whose scans visit every coefficient but change none, with about 100 bytes per scan."""
    table = segment(0xC4, b"\x10" + bytes([1] + [0] * 15) + b"\xe0")  # AC: the code 0 means a run of blocks
    dc = scan(0, 0, 1, bytes(num_blocks(side) // 8 + 1))
    runs = end_of_block_runs(side)
    first = scan(1, 63, 1, runs)
    return jpeg(0xC2, [table, dc, first, *[scan(1, 63, 0x10, runs)] * num_scans], side)


def arithmetic_scans() -> bytes:
    """Return a progressive JPEG with arithmetic coding and 91 scans of short, random data."""
    data = np.random.default_rng(0).integers(0, 255, 1000, dtype=np.uint8).tobytes()
    return jpeg(0xCA, [scan(0, 0, 0, data), *[scan(1, 63, 0, data)] * 90])


# ---- PNG -----------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(before: bytes = b"", pixels: bytes = b"", after: bytes = b"", side: int = SIDE, depth: int = 8) -> bytes:
    """Return a grey PNG (RGBA for a depth of 16), with chunks before and after the pixels."""
    colours = 6 if depth == 16 else 0
    if not pixels:
        row = bytes(1 + side * (8 if depth == 16 else 1))
        pixels = chunk(b"IDAT", zlib.compress(row * side, 9))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, depth, colours, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + before + pixels + after + chunk(b"IEND", b"")


def png_profiles() -> bytes:
    """Return a PNG with thousands of colour profiles, each of which decompresses to a megabyte."""
    profile = chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes((1 << 20) - 1), 9))
    return png(profile * (SIZE // len(profile)), side=8)


def png_chunks(side: int = 8) -> bytes:
    return png(chunk(b"abCd", b"") * (SIZE // 12), side=side)


def png_chunks_after_pixels() -> bytes:
    return png(after=chunk(b"abCd", b"") * (SIZE // 12), side=8)


def png_empty_pixels() -> bytes:
    pixels = chunk(b"IDAT", zlib.compress(bytes(9 * 8)))
    return png(pixels=chunk(b"IDAT", b"") * (SIZE // 12) + pixels, side=8)


def png_profiles_after_pixels() -> bytes:
    profile = chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes((1 << 20) - 1), 9))
    return png(after=profile * (SIZE // len(profile)), side=8)


# ---- GIF, BMP, PPM -------------------------------------------------------------------------------------------------


def gif(blocks: bytes, side: int = 8, pixels: bytes = b"") -> bytes:
    header = b"GIF89a" + struct.pack("<HHBBB", side, side, 0x80, 0, 0) + bytes(6)
    image = b"," + struct.pack("<HHHHB", 0, 0, side, side, 0) + b"\x02" + (pixels or b"\x02\x44\x01") + b"\0"
    return header + blocks + image + b";"


def gif_comments() -> bytes:
    return gif(b"!\xfe\x01x\0" * (SIZE // 5))


def gif_long_comment() -> bytes:
    return gif(b"!\xfe" + (b"\xff" + b"x" * 255) * (SIZE // 256) + b"\0")


def bmp_runs() -> bytes:
    """Return a BMP with run-length coding, in which each run has one pixel and takes two bytes."""
    palette = bytes(4 * 256)
    data = b"\x01\x00" * (SIZE // 2)
    info = struct.pack("<IiiHHIIiiII", 40, SIDE, SIDE, 1, 8, 1, len(data), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(palette) + len(data), 0, 0, 54 + len(palette)) + info + palette + data


def bmp_jumps() -> bytes:
    """Return a BMP with run-length coding that jumps beyond the end of the image."""
    info = struct.pack("<IiiHHIIiiII", 40, SIDE * SIDE, 1, 1, 8, 1, 6, 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 54 + 1030, 0, 0, 54 + 1024) + info + bytes(1024) + b"\x00\x02\xff\xff\0\x01"


def ppm_comments() -> bytes:
    return b"P3 999 999 255\n" + b"#\n" * (SIZE // 2) + b"1 " * 9


def ppm_numbers() -> bytes:
    return b"P2 2000 1000 255\n" + b"1 " * 2_000_000


# ---- TIFF ----------------------------------------------------------------------------------------------------------


def tiff(tags: dict[int, list[int]], data: bytes) -> bytes:
    """Return a TIFF with one directory. All tag values are 32-bit; `data` starts at byte 8."""
    entries, values = b"", b""
    start = 8 + len(data) + 2 + 12 * len(tags) + 4
    for tag, items in sorted(tags.items()):
        packed = np.array(items, "<u4").tobytes()
        if len(items) > 1:
            entries += struct.pack("<HHII", tag, 4, len(items), start + len(values))
            values += packed
        else:
            entries += struct.pack("<HHI", tag, 4, 1) + packed
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory + values


def tiff_tags(width: int, height: int, compression: int) -> dict[int, list[int]]:
    return {256: [width], 257: [height], 258: [8], 259: [compression], 262: [1], 277: [1]}


def tiff_shared_strips() -> bytes:
    """Return a TIFF whose strips all refer to the same 0.5 MB of empty deflate blocks."""
    blocks = b"\x78\x9c" + b"\x00\x00\x00\xff\xff" * 100_000
    row = zlib.compressobj(9, zlib.DEFLATED, -15)
    data = blocks + row.compress(bytes(16)) + row.flush() + struct.pack(">I", zlib.adler32(bytes(16)))
    rows = SIZE // 16
    strips = {273: [8] * rows, 278: [1], 279: [len(data)] * rows}
    return tiff(tiff_tags(16, rows, 8) | strips, data)


def tiff_large_tiles() -> bytes:
    """Return a narrow TIFF whose tiles are 65,536 pixels wide and all refer to the same bytes."""
    data = zlib.compress(bytes(16 * 65_536), 9)
    count = SIZE // 16
    tiles = {322: [65_536], 323: [16], 324: [8] * count, 325: [len(data)] * count}
    return tiff(tiff_tags(16, 16 * count, 8) | tiles, data)


def tiff_huge_tile() -> bytes:
    """Return a TIFF of 16 x 16 pixels with one tile of two billion pixels."""
    data = zlib.compress(bytes(1 << 20), 9)
    return tiff(tiff_tags(16, 16, 8) | {322: [1 << 15], 323: [(1 << 16) - 16], 324: [8], 325: [len(data)]}, data)


def tiff_progressive_jpeg() -> bytes:
    """Return a TIFF whose single strip is a progressive JPEG with 90 refinement scans."""
    data = refinement_scans(90)
    return tiff(tiff_tags(SIDE, SIDE, 7) | {273: [8], 278: [SIDE], 279: [len(data)]}, data)


# Files that `decode_image` rejects.
REJECTED: dict[str, Callable[[], bytes]] = {
    "jpeg refinement scans": lambda: refinement_scans(4000),
    "jpeg arithmetic": arithmetic_scans,
    "png chunks": png_chunks,
    "png profiles": png_profiles,
    "png profiles after pixels": png_profiles_after_pixels,
    "png chunks after pixels": png_chunks_after_pixels,
    "png empty pixels": png_empty_pixels,
    "gif comments": gif_comments,
    "gif long comment": gif_long_comment,
    "bmp runs": bmp_runs,
    "bmp jumps": bmp_jumps,
    "ppm comments": ppm_comments,
    "ppm numbers": ppm_numbers,
    "tiff shared strips": tiff_shared_strips,
    "tiff large tiles": tiff_large_tiles,
    "tiff huge tile": tiff_huge_tile,
    "tiff progressive jpeg": tiff_progressive_jpeg,
}
