"""Measure text recognition and word search.

    python benchmarks/words.py PHOTOS [--count 200]
    python benchmarks/words.py --index INDEX --model MODEL [--count 1000]

The first command draws words on photographs, in several sizes, contrasts and angles, and recognises them with `--ocr`'s
models on one core. It prints the share of the words that are found, and the seconds per image. A photograph is first
scaled to 800 pixels.

The second command copies the vectors and captions of an index. Its queries are the first captions of the images, which
the copy lacks. It prints how often the right image comes first, with and without word search.
"""

import argparse
import os
import tempfile
import time
from collections import defaultdict
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before the libraries that read it are loaded

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from llm2clip.models.dual_encoder import open_dual_encoder
from llm2clip.search.backends import Filter, IndexedContent, IndexedImage
from llm2clip.search.build import truncate_to_index
from llm2clip.search.ocr import open_recognizer
from llm2clip.search.query import SearchQuery, embed_query
from llm2clip.search.sqlite_backend import SqliteBackend

WORDS = ("HOTEL", "Miramar", "Bakery", "24", "Zimmer", "frei", "exit", "Platform", "Invoice", "2024", "Coffee", "Open")
SIDE = 800  # length of a photograph's longer side, in pixels
SIZES = (16, 28, 48)  # font sizes in pixels
CONTRASTS = {"high": 255, "low": 110}  # opacity of the text
ANGLES = (0, 15, 90)  # in degrees


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, nargs="?", help="folder of photographs")
    parser.add_argument("--index", type=Path, help="index of images with at least two captions each")
    parser.add_argument("--model", help="model that built the index")
    parser.add_argument("--count", type=int, default=200, help="number of photographs or queries")
    args = parser.parse_args()
    if args.photos is not None:
        measure_ocr(args.photos, args.count)
    if args.index is not None:
        measure_fusion(args.index, args.model, args.count)


def measure_ocr(folder: Path, count: int) -> None:
    recognize, rng = open_recognizer(), np.random.default_rng(0)
    files = sorted(file for file in folder.iterdir() if file.suffix in (".jpg", ".png"))[:count]
    found: dict[str, list[bool]] = defaultdict(list)
    seconds = []
    for number, file in enumerate(files):
        size, angle = SIZES[number % 3], ANGLES[number // 3 % 3]
        contrast = list(CONTRASTS)[number // 9 % 2]
        words = rng.choice(WORDS, size=3, replace=False).tolist()
        image = draw_words(file, words, size, CONTRASTS[contrast], angle, rng)
        start = time.process_time()
        text = recognize(np.asarray(image)).casefold()
        seconds.append(time.process_time() - start)
        for word in words:
            for group in ("all", f"{size} pixels", f"{contrast} contrast", f"{angle} degrees"):
                found[group].append(word.casefold() in text)
    print("| words | number | found |\n|---|---|---|")
    for group in ("all", *sorted(found.keys() - {"all"})):
        print(f"| {group} | {len(found[group])} | {np.mean(found[group]):.0%} |")
    print(f"\n{len(files)} images, {np.mean(seconds):.2f} s of CPU time per image")


def draw_words(
    file: Path, words: list[str], size: int, opacity: int, angle: int, rng: np.random.Generator
) -> Image.Image:
    """Draw three words in one line at a random position of a photograph."""
    image = Image.open(file).convert("RGB")
    scale = SIDE / max(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    font = ImageFont.load_default(size)
    left, top, right, bottom = font.getbbox(" ".join(words))
    line = Image.new("RGBA", (round(right - left) + 8, round(bottom - top) + 8))
    draw = ImageDraw.Draw(line)
    draw.text((4 - left, 4 - top), " ".join(words), font=font, fill=(255, 255, 255, opacity))
    line = line.rotate(angle, expand=True, resample=Image.Resampling.BICUBIC)
    room = max(1, image.width - line.width), max(1, image.height - line.height)
    image.paste(line, (int(rng.integers(room[0])), int(rng.integers(room[1]))), line)
    return image


def measure_fusion(folder: Path, model_name: str, count: int) -> None:
    source = SqliteBackend(folder)
    model = truncate_to_index(source.metadata(), open_dual_encoder(model_name))
    copy, queries, contents, images = SqliteBackend(Path(tempfile.mkdtemp()), write=True), [], [], []
    copy.initialize(source.metadata())
    for hit in source.search(None, count, Filter()):
        vector, image = source.vector(hit.id), hit.images[0]
        assert vector is not None and len(image.captions) > 1
        queries.append(image.captions[0])
        contents.append(IndexedContent(hit.id.encode(), vector.astype(np.float16), b"", hit.width, hit.height))
        described = IndexedImage(image.name, image.ref, image.source, "1", image.captions[1:], image.taken)
        images.append((described, hit.id.encode()))
    copy.add(contents, images)
    vectors = [embed_query(model, SearchQuery([query])) for query in queries]
    names = [image.name for image, _ in images]
    short = [" ".join(query.split()[1:3]) for query in queries]
    print("| queries | word search | images with a word match | R@1 |\n|---|---|---|---|")
    for label, texts in (("captions", queries), ("two words of a caption", short)):
        if label != "captions":
            vectors = [embed_query(model, SearchQuery([text])) for text in texts]
        for name, use_words in (("off", False), ("on", True)):
            correct, matched = [], []
            for text, vector, expected in zip(texts, vectors, names, strict=True):
                hits = copy.search(vector, 1, Filter(), words=[text] if use_words else [])
                correct.append(hits[0].images[0].name == expected)
                matched.append(bool(hits[0].matched))
            print(f"| {label} | {name} | {np.mean(matched):.1%} | {np.mean(correct):.1%} |", flush=True)


if __name__ == "__main__":
    main()
