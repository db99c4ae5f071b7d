"""Measure how long the decoder takes for the slowest files that it accepts.

    python benchmarks/hostile_images.py

Each file has a few megabytes and at most 100 million pixels, which is the limit of `decode_image`, and is decoded in
its own process. The table shows the CPU time and the increase in the peak memory of the process. The HEIC file requires
pillow-heif.
"""

import io
import struct
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
from PIL import Image

from llm2clip.data.images import decode_image
from measurements import memory_mb, run_in_new_process
from shared import print_header, print_row

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from hostile_fixtures import SIDE, SIZE, jpeg, num_blocks, png, scan, segment


def jpeg_sequential_scans() -> bytes:
    """Return a baseline JPEG that repeats the scans of its three components, with two bits per block and scan."""
    table = segment(0xC4, b"\x10" + bytes([1] + [0] * 15) + b"\x00")  # AC: the code 0 ends the block
    data = bytes(num_blocks(SIDE) // 4 + 1)
    scans = [scan(0, 63, 0, data, component) for component in (1, 2, 3)] * (SIZE // len(data) // 3)
    return jpeg(0xC0, [table, *scans], components=3)


def jpeg_restart_markers() -> bytes:
    """Return a baseline JPEG with a restart marker after each block."""
    side = 8 * int((SIZE / 3) ** 0.5)
    table = segment(0xC4, b"\x10" + bytes([1] + [0] * 15) + b"\x00")
    data = b"".join(b"\x3f\xff" + bytes([0xD0 + i % 8]) for i in range(num_blocks(side)))
    return jpeg(0xC0, [table, segment(0xDD, struct.pack(">H", 1)), scan(0, 63, 0, data)], side)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def black(mode: str) -> Image.Image:
    return Image.new(mode, (SIDE, SIDE))


def noise(side: int) -> Image.Image:
    """Return noise of `side` x `side` pixels, enlarged to 100 million pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.NEAREST)


def webp_lossless() -> bytes:
    tile = np.random.default_rng(0).integers(0, 256, (500, 500, 3), dtype=np.uint8)
    repeats = SIDE // len(tile) + 1
    image = Image.fromarray(np.tile(tile, (repeats, repeats, 1))[:SIDE, :SIDE])
    return encode(image, "WEBP", lossless=True, quality=0, method=0)


def webp_frames() -> bytes:
    frames = [Image.new("RGB", (4000, 4000), (number, 0, 9)) for number in range(30)]
    options = {"save_all": True, "append_images": frames[1:], "lossless": True, "quality": 0, "method": 0}
    return encode(frames[0], "WEBP", **options)


def heic() -> bytes:
    pillow_heif.register_heif_opener()
    return encode(noise(500), "HEIF", quality=10, enc_params={"preset": "ultrafast"})


FILES: dict[str, Callable[[], bytes]] = {
    "JPEG, sequential, repeated components": jpeg_sequential_scans,
    "JPEG, a restart marker after each block": jpeg_restart_markers,
    "PNG, 16-bit RGBA, 100 million pixels": lambda: png(depth=16),
    "GIF, 100 million pixels": lambda: encode(black("L"), "GIF"),
    "TIFF, LZMA, 100 million pixels": lambda: encode(black("RGB"), "TIFF", compression="lzma"),
    "TIFF, LZW, 100 million pixels": lambda: encode(black("RGB"), "TIFF", compression="tiff_lzw"),
    "WebP, lossy": lambda: encode(noise(1000), "WEBP", quality=1, method=0),
    "WebP, lossless": webp_lossless,
    "WebP, 30 frames of 16 million pixels": webp_frames,
    "AVIF": lambda: encode(noise(500), "AVIF", quality=10, speed=10),
    "HEIC": heic,
}


def measure_decoding(data: bytes) -> tuple[float, float]:
    """Decode an image. Return the CPU seconds and the increase in peak memory in MB."""
    warnings.simplefilter("ignore")
    memory, start = memory_mb("VmHWM"), time.process_time()
    decode_image(data)
    return time.process_time() - start, memory_mb("VmHWM") - memory


def main() -> None:
    print_header("File", "MB", "CPU time", "memory")
    for name, build in FILES.items():
        data = build()
        seconds, memory = run_in_new_process(measure_decoding, data)
        print_row(name, f"{len(data) / 1e6:.3f}", f"{seconds:.1f} s", f"{memory:,.0f} MB")


if __name__ == "__main__":
    main()
