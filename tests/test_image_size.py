"""`read_image_size` gives the result of `open_header`, which is the reference, also for corrupt images."""

import io
import random
from collections.abc import Callable

import pytest
from PIL import Image

from conftest import load_benchmark
from llm2clip.data import image_header
from llm2clip.data.image_header import DecodingLimitError, ImageFormatError, open_header, read_image_size

fuzz = load_benchmark("fuzz")
mutate_image: Callable[[bytes, random.Random], bytes] = fuzz.mutate_image


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


NOISE = Image.effect_noise((50, 40), 80).convert("RGB")
SIMPLE_IMAGES = [
    encode(NOISE, "JPEG"), encode(NOISE, "JPEG", quality=95, optimize=True), encode(NOISE, "JPEG", progressive=True),
    encode(NOISE.convert("L"), "JPEG"), encode(NOISE.convert("CMYK"), "JPEG"),
    encode(NOISE, "JPEG", dpi=(72, 72), icc_profile=b"x" * 200, comment=b"comment", xmp=b"<x/>"),
    encode(NOISE, "PNG"), encode(NOISE.convert("RGBA"), "PNG"), encode(NOISE.convert("L"), "PNG", dpi=(72, 72)),
    encode(NOISE.convert("P"), "PNG", transparency=3), encode(NOISE.convert("1"), "PNG"),
    encode(NOISE, "WEBP"), encode(NOISE, "WEBP", lossless=True), encode(NOISE.convert("RGBA"), "WEBP", lossless=True),
]  # fmt: skip


def read_size_with_pillow(data: bytes) -> tuple[int, int] | type[Exception]:
    try:
        return open_header(io.BytesIO(data)).size
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("data", SIMPLE_IMAGES)
def test_ordinary_images_are_not_opened_with_pillow(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    size = read_size_with_pillow(data)
    monkeypatch.setattr(image_header, "open_header", lambda _: pytest.fail("opened with Pillow"))
    assert read_image_size(data) == read_image_size(io.BytesIO(data)) == size == (50, 40)


@pytest.mark.parametrize("seed", range(10))
def test_size_of_corrupt_images_is_that_of_pillow(seed: int) -> None:
    rng, seeds = random.Random(seed), fuzz.image_seeds()
    num_simple = 0
    for _ in range(400):
        data = mutate_image(rng.choice(rng.choice([SIMPLE_IMAGES, seeds])), rng)
        if rng.random() < 0.5:  # the fuzzer changes bytes anywhere, but most fields are at the start
            data = mutate_image(data[:60], rng) + data[60:]
        if rng.random() < 0.1:
            data = data[: rng.randrange(len(data))]
        size = image_header._parse_image_size(data, len(data))
        start = image_header._parse_image_size(data[: rng.randrange(700)], len(data))
        if size is not None:
            num_simple += 1
            assert size == read_size_with_pillow(data)
        assert start is None or start == size
    assert num_simple > 40


def test_images_with_a_long_header_are_opened_with_pillow() -> None:
    for kind in ("JPEG", "PNG"):
        data = encode(NOISE, kind, icc_profile=b"x" * 10_000)
        assert read_image_size(io.BytesIO(data)) == read_image_size(data) == (50, 40)


def test_image_size_of_other_files_raises_the_errors_of_open_header(monkeypatch: pytest.MonkeyPatch) -> None:
    for data in (b"", b"x", b"\xff\xd8\xff", b"RIFF", b"\x89PNG\r\n\x1a\n", b"%PDF-1.7"):
        for image in (data, io.BytesIO(data)):
            with pytest.raises(ImageFormatError):
                read_image_size(image)
    monkeypatch.setattr(image_header, "MAX_FILE_BYTES", len(SIMPLE_IMAGES[0]) - 1)
    with pytest.raises(DecodingLimitError, match="file too large"):
        read_image_size(SIMPLE_IMAGES[0])
