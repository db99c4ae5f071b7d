"""Tar files in webdataset format for benchmarks, with a small JPEG and two captions per sample."""

import json
import random
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

JPEGS = 400  # number of different images; all JPEG files differ in a comment
SHORT = "a %s %s is on the %s next to a %s %s"
LONG = "two %s %ss in front of a %s with the %s of a %s %s, and a %s near the %s in the background"
WORDS = 20_000  # number of distinct words in the captions
SHARD_SIZE = 1000


def make_samples(folder: Path, count: int, pixels: int) -> str:
    """Make `count` samples (rounded up to full tar files) unless they exist. Return a source for the samples."""
    root = folder / f"tar-{pixels}"
    root.mkdir(parents=True, exist_ok=True)
    num_shards = -(-count // SHARD_SIZE)
    jpegs: list[bytes] = []
    for number in range(num_shards):
        path = root / f"shard-{number:05}.tar"
        if not path.exists():
            jpegs = jpegs or make_jpegs(pixels)
            write_shard(path.with_suffix(".tmp"), number * SHARD_SIZE, jpegs)
            path.with_suffix(".tmp").rename(path)
    return f"{root}/shard-{{00000..{num_shards - 1:05}}}.tar"


def make_jpegs(pixels: int) -> list[bytes]:
    """Return JPEG files of noise."""
    rng = np.random.default_rng(0)
    jpegs = []
    for _ in range(JPEGS):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
        smooth = np.asarray(coarse.resize((pixels, pixels), Image.Resampling.BICUBIC), np.int16)
        noisy = smooth + rng.integers(-20, 20, (pixels, pixels, 1), np.int16)
        stream = BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=80, optimize=True)
        jpegs.append(stream.getvalue())
    return jpegs


def write_shard(path: Path, first: int, jpegs: list[bytes]) -> None:
    """Write the samples whose numbers start at `first`."""
    captions = zip(make_captions(SHORT, first), make_captions(LONG, first), strict=True)
    with tarfile.open(path, "w") as tar:
        for number, (short, long) in enumerate(captions, first):
            comment = b"\xff\xfe\x00\x12%016d" % number  # follows the start marker of the JPEG file
            jpeg = jpegs[number % JPEGS]
            add_file(tar, f"{number:09}.jpg", jpeg[:2] + comment + jpeg[2:])
            add_file(tar, f"{number:09}.json", json.dumps({"caption": short, "long_caption": long}).encode())


def make_captions(template: str, first: int) -> list[str]:
    """Return captions for a tar file. The frequencies of the words follow Zipf's law."""
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    names = random.Random(0)
    words = ["".join(names.choices(syllables, k=names.randint(2, 4))) for _ in range(WORDS)]
    random_numbers = np.random.default_rng(first).random((SHARD_SIZE, template.count("%s")))
    indices = (WORDS**random_numbers).astype(np.int64) - 1
    return [template % tuple(words[index] for index in row) for row in indices.tolist()]


def add_file(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, BytesIO(data))
