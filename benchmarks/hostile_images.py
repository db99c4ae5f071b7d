"""Measure how long the decoder takes for files of a few megabytes that were made to be slow to decode.

Each file has at most 100 million pixels, which is the limit of `decode_image`, and is decoded in its own process. The
script prints the CPU time, the increase in peak memory and the result: the size of the decoded image, or the reason why
the file was rejected.

    python benchmarks/hostile_images.py [NAME ...]
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import struct
import time
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 9_999  # width and height of most images in pixels
SIZE = 4 << 20  # approximate size of each file in bytes
TIME_LIMIT = 30  # maximum time per file in seconds


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


def sequential_scans() -> bytes:
    """Return a baseline JPEG that repeats the scans of its three components, with two bits per block and scan."""
    table = segment(0xC4, b"\x10" + bytes([1] + [0] * 15) + b"\x00")  # AC: the code 0 ends the block
    data = bytes(num_blocks(SIDE) // 4 + 1)
    scans = [scan(0, 63, 0, data, component) for component in (1, 2, 3)] * (SIZE // len(data) // 3)
    return jpeg(0xC0, [table, *scans], components=3)


def arithmetic_scans() -> bytes:
    """Return a progressive JPEG with arithmetic coding and 91 scans of short, random data."""
    data = np.random.default_rng(0).integers(0, 255, 1000, dtype=np.uint8).tobytes()
    return jpeg(0xCA, [scan(0, 0, 0, data), *[scan(1, 63, 0, data)] * 90])


def restart_markers() -> bytes:
    """Return a baseline JPEG with a restart marker after each block."""
    side = 8 * int((SIZE / 3) ** 0.5)
    table = segment(0xC4, b"\x10" + bytes([1] + [0] * 15) + b"\x00")
    data = b"".join(b"\x3f\xff" + bytes([0xD0 + i % 8]) for i in range(num_blocks(side)))
    return jpeg(0xC0, [table, segment(0xDD, b"\0\1"), scan(0, 63, 0, data)], side)


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


def gif_clear_codes() -> bytes:
    """Return a GIF whose pixel data contains only codes that clear the decoder's table."""
    return gif(b"", side=SIDE, pixels=(b"\xff" + b"\x24\x49\x92" * 85) * (SIZE // 256))


def gif_pixels() -> bytes:
    stream = io.BytesIO()
    Image.new("L", (SIDE, SIDE)).save(stream, "GIF")
    return stream.getvalue()


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


def ppm_depth() -> bytes:
    return b"P5 2000 2000 200\n" + bytes(4_000_000)


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


def tiff_shared_tags() -> bytes:
    """Return a TIFF with 2,000 tags that all refer to the same four megabytes."""
    tags = tiff_tags(8, 8, 1) | {273: [8], 278: [8], 279: [64]}
    small = tiff(tags, bytes(SIZE))
    start = struct.unpack_from("<I", small, 4)[0]
    more = b"".join(struct.pack("<HHII", 1000 + i, 1, SIZE, 8) for i in range(2000))
    entries = small[start + 2 : start + 2 + 12 * len(tags)]
    return small[:start] + struct.pack("<H", len(tags) + 2000) + entries + more + bytes(4)


def tiff_progressive_jpeg() -> bytes:
    """Return a TIFF whose single strip is a progressive JPEG with 90 refinement scans."""
    data = refinement_scans(90)
    return tiff(tiff_tags(SIDE, SIDE, 7) | {273: [8], 278: [SIDE], 279: [len(data)]}, data)


def tiff_lzma() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE)).save(stream, "TIFF", compression="lzma")
    return stream.getvalue()


def tiff_lzw() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE)).save(stream, "TIFF", compression="tiff_lzw")
    return stream.getvalue()


# ---- WebP, AVIF ----------------------------------------------------------------------------------------------------


def noise(side: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


def webp_lossy() -> bytes:
    stream = io.BytesIO()
    noise(1000).resize((SIDE, SIDE), Image.Resampling.NEAREST).save(stream, "WEBP", quality=1, method=0)
    return stream.getvalue()


def webp_lossless() -> bytes:
    stream = io.BytesIO()
    tile = np.tile(np.asarray(noise(500)), (SIDE // 500 + 1, SIDE // 500 + 1, 1))[:SIDE, :SIDE]
    Image.fromarray(tile).save(stream, "WEBP", lossless=True, quality=0, method=0)
    return stream.getvalue()


def webp_frames() -> bytes:
    stream = io.BytesIO()
    frames = [Image.new("RGB", (4000, 4000), (i % 256, i // 256, 9)) for i in range(30)]
    frames[0].save(stream, "WEBP", save_all=True, append_images=frames[1:], lossless=True, quality=0, method=0)
    return stream.getvalue()


def avif() -> bytes:
    stream = io.BytesIO()
    noise(500).resize((SIDE, SIDE), Image.Resampling.NEAREST).save(stream, "AVIF", quality=10, speed=10)
    return stream.getvalue()


def heic() -> bytes:
    """Return a HEIC image. Requires the package pillow-heif."""
    import pillow_heif

    pillow_heif.register_heif_opener()
    stream = io.BytesIO()
    noise(500).resize((SIDE, SIDE), Image.Resampling.NEAREST).save(
        stream, "HEIF", quality=10, enc_params={"preset": "ultrafast"}
    )
    return stream.getvalue()


FILES: dict[str, Callable[[], bytes]] = {
    "jpeg refinement scans": lambda: refinement_scans(4000),
    "jpeg 90 scans": lambda: refinement_scans(90),
    "jpeg sequential scans": sequential_scans,
    "jpeg arithmetic": arithmetic_scans,
    "jpeg restart markers": restart_markers,
    "png chunks": png_chunks,
    "png profiles": png_profiles,
    "png profiles after pixels": png_profiles_after_pixels,
    "png chunks after pixels": png_chunks_after_pixels,
    "png empty pixels": png_empty_pixels,
    "png 16 bit": lambda: png(depth=16),
    "gif comments": gif_comments,
    "gif long comment": gif_long_comment,
    "gif clear codes": gif_clear_codes,
    "gif pixels": gif_pixels,
    "bmp runs": bmp_runs,
    "bmp jumps": bmp_jumps,
    "ppm comments": ppm_comments,
    "ppm numbers": ppm_numbers,
    "ppm depth": ppm_depth,
    "tiff shared strips": tiff_shared_strips,
    "tiff large tiles": tiff_large_tiles,
    "tiff huge tile": tiff_huge_tile,
    "tiff shared tags": tiff_shared_tags,
    "tiff progressive jpeg": tiff_progressive_jpeg,
    "tiff lzma": tiff_lzma,
    "tiff lzw": tiff_lzw,
    "webp lossy": webp_lossy,
    "webp lossless": webp_lossless,
    "webp frames": webp_frames,
    "avif": avif,
    "heic": heic,
}


def decode(data: bytes, results: multiprocessing.SimpleQueue[tuple[float, int, str]]) -> None:
    """Decode an image; put the CPU seconds, the increase in peak memory in MB and the result in a queue."""
    from llm2clip.data.images import ImageError, decode_image

    warnings.simplefilter("ignore")
    before = peak_memory()
    start = time.process_time()
    try:
        pixels = decode_image(data)
        result = f"decoded, {pixels.shape[2]} x {pixels.shape[1]}"
    except ImageError as error:
        result = str(error)[:100]
    seconds = time.process_time() - start
    results.put((seconds, peak_memory() - before, result))


def peak_memory() -> int:
    """Return the peak memory of this process in MB (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", help="Names of the files to decode, as in the table. Default: all.")
    names = parser.parse_args().names
    context = multiprocessing.get_context("spawn")
    print(f"{'file':<26} {'MB':>6} {'seconds':>8} {'peak MB':>8}  result")
    for name, build in FILES.items():
        if names and name not in names:
            continue
        data = build()
        results: multiprocessing.SimpleQueue[tuple[float, int, str]] = context.SimpleQueue()
        process = context.Process(target=decode, args=(data, results))
        process.start()
        process.join(TIME_LIMIT)
        if process.is_alive():
            process.kill()
            process.join()
            seconds, memory, result = float(TIME_LIMIT), 0, "still decoding"
        elif results.empty():
            seconds, memory, result = 0.0, 0, f"the process died ({process.exitcode})"
        else:
            seconds, memory, result = results.get()
        print(f"{name:<26} {len(data) / 1e6:6.2f} {seconds:8.2f} {memory:8,}  {result}", flush=True)


if __name__ == "__main__":
    main()
