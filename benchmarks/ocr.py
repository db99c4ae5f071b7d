"""Measure the recognition of text in photographs, and its effect on searches with plain descriptions.

    python benchmarks/ocr.py DATA [--chinese_font FILE] [--model MODEL]

DATA contains flickr8k and coco_img, each with a captions.jsonl and images. Recognition uses the models of `index --ocr`
on one core. Words are compared as search compares them: without case and diacritics, and only entire words.

    drawn     140 photographs, enlarged to 800 pixels, with two to five drawn words each. Fonts, sizes, angles and
              colours are random. With a Chinese font, a quarter of the photographs has Chinese words
    natural   60 photographs in their own size (about 224 pixels) with legible text. The words of each photograph were
              transcribed by hand (ocr_words.json)

Recall is the share of the words that are found. Precision is the share of the recognised words that are in the
photograph. Words that are partly hidden or hard to read ("unclear" in ocr_words.json) do not count for either, nor do
words that are recognised in a photograph before anything is drawn on it.

With --model, the images of flickr8k's validation split are indexed with their recognised text, without and with
captions. The queries are the last captions, which are not in the index. The table shows R@1 without and with word
search.
"""

import argparse
import json
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # before the libraries that read it are loaded

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from llm2clip.data.image_refs import FileImage
from llm2clip.data.images import load_image
from llm2clip.models.dual_encoder import open_dual_encoder
from llm2clip.search.metadata import Filter, normalize
from llm2clip.search.ocr import RecognizeText, open_recognizer, prepare_image
from llm2clip.search.relevance import embed_texts
from llm2clip.search.sqlite_backend import SqliteBackend
from llm2clip.search.types import IndexedContent, IndexedImage
from llm2clip.search.words import split_words
from measurements import memory_mb, reset_peak_memory
from shared import read_rows

WORDS_FILE = Path(__file__).with_name("ocr_words.json")
DRAWN = 140  # number of photographs with drawn words
SIDE = 800  # length of a photograph's longer side before words are drawn, in pixels
SIZES = (16, 24, 36, 56)  # font sizes in pixels
ANGLES = (0, 0, 15, -15, 90)  # in degrees
COLOURS = ("white", "black", "yellow", "red", "blue", "lime")
MIN_CONTRAST = 60  # difference of a word's and its background's mean brightness, of 255
FONTS = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSerif.ttf", "DejaVuSansMono.ttf", "STIXGeneral.ttf")
CHINESE = ("出口", "酒店", "咖啡", "欢迎光临", "北京", "地铁站", "小心地滑", "停车场", "面包", "开放", "书店", "医院")
BATCH_SIZE = 32


class DrawnWord(NamedTuple):
    text: str
    groups: tuple[str, ...]


class Counts(NamedTuple):
    """Results of one photograph: whether each of its words was found, and whether each recognised word is correct."""

    found: list[bool]
    correct: list[bool]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--chinese_font", type=Path, help="font file. Default: only English words are drawn")
    parser.add_argument("--model", help="also measure searches with this model")
    args = parser.parse_args()
    torch.set_num_threads(1)
    before = memory_mb("VmRSS")
    recognize = open_recognizer()
    print(f"memory of the models: {memory_mb('VmRSS') - before:.0f} MB\n")
    print("| photographs | words | number | recall | precision |\n|---|---|---|---|---|")
    reset_peak_memory()
    measure_drawn(args.data, recognize, args.chinese_font)
    measure_natural(args.data, recognize)
    print(f"\npeak memory of the process: {memory_mb('VmHWM'):.0f} MB")
    if args.model:
        measure_search(args.data / "flickr8k", recognize, args.model)


# ---- recognition


def measure_drawn(data: Path, recognize: RecognizeText, chinese_font: Path | None) -> None:
    rng = np.random.default_rng(0)
    annotated = json.loads(WORDS_FILE.read_text(encoding="utf-8"))
    files, vocabulary = [], set()
    for name in ("flickr8k", "coco_img"):
        rows = list(read_rows(data / name / "captions.jsonl"))
        names = [f"{name}/{row['image']}" for row in rows if f"{name}/{row['image']}" not in annotated]
        files += [data / str(name) for name in rng.choice(names, DRAWN // 2, replace=False)]
        vocabulary |= {word for row in rows for word in row["captions"][0].split() if word.isalpha() and len(word) > 2}
    english = sorted(vocabulary)
    found: dict[str, list[bool]] = defaultdict(list)
    correct, seconds = [], []
    for number, file in enumerate(files):
        is_chinese = chinese_font is not None and number % 4 == 3
        image = Image.open(file).convert("RGB")
        scale = SIDE / max(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
        own_words = split_text(recognize(np.asarray(image)))
        words = draw_words(image, english, chinese_font if is_chinese else None, rng)
        start = time.process_time()
        text = recognize(np.asarray(image))
        seconds.append(time.process_time() - start)
        counts = compare([word.text for word in words], own_words, text, as_substrings=is_chinese)
        for word, is_found in zip(words, counts.found, strict=True):
            for group in ("all", "Chinese" if is_chinese else "English", *word.groups):
                found[group].append(is_found)
        if not is_chinese:
            correct += counts.correct
    for group, values in found.items():
        precision = f"{np.mean(correct):.1%} of {len(correct)}" if group == "English" else ""
        print(f"| {DRAWN}, drawn | {group} | {len(values)} | {np.mean(values):.1%} | {precision} |")
    print(f"| seconds of CPU time per image | | | {np.mean(seconds):.2f} | |", flush=True)


def draw_words(
    image: Image.Image, english: Sequence[str], chinese_font: Path | None, rng: np.random.Generator
) -> list[DrawnWord]:
    """Draw two to five words on a photograph, at random positions at which they do not overlap."""
    from matplotlib import get_data_path

    words: list[DrawnWord] = []
    taken: list[tuple[int, int, int, int]] = []
    for _ in range(int(rng.integers(2, 6))):
        size, angle = int(rng.choice(SIZES)), int(rng.choice(ANGLES))
        if chinese_font is not None:
            text, font_name, font = str(rng.choice(CHINESE)), "", ImageFont.truetype(chinese_font, size)
        else:
            text = str(rng.integers(10, 10_000)) if rng.random() < 0.2 else str(rng.choice(english))
            text = str(rng.choice([text, text.upper(), text.capitalize()]))
            font_name = str(rng.choice(FONTS))
            font = ImageFont.truetype(Path(get_data_path()) / "fonts" / "ttf" / font_name, size)
        colour = str(rng.choice(COLOURS))
        left, top, right, bottom = font.getbbox(text)
        line = Image.new("RGBA", (round(right - left) + 8, round(bottom - top) + 8))
        ImageDraw.Draw(line).text((4 - left, 4 - top), text, font=font, fill=colour)
        line = line.rotate(angle, expand=True, resample=Image.Resampling.BICUBIC)
        for _ in range(50):
            x, y = (
                int(rng.integers(max(1, side - length))) for side, length in zip(image.size, line.size, strict=True)
            )
            box = (x, y, x + line.width, y + line.height)
            if not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
                break
        else:
            continue
        taken.append(box)
        background = np.asarray(image.crop(box).convert("L"), np.float32).mean()
        ink = Image.new("RGB", (1, 1), colour).convert("L").getpixel((0, 0))
        contrast = "high" if abs(float(str(ink)) - background) >= MIN_CONTRAST else "low"
        image.paste(line, (x, y), line)
        groups = (f"{size} pixels", f"{abs(angle)} degrees", f"{contrast} contrast", font_name.removesuffix(".ttf"))
        words.append(DrawnWord(text, tuple(group for group in groups if group)))
    return words


def measure_natural(data: Path, recognize: RecognizeText) -> None:
    found: dict[str, list[bool]] = defaultdict(list)
    correct, seconds = [], []
    for name, labels in json.loads(WORDS_FILE.read_text(encoding="utf-8")).items():
        image = prepare_image(load_image(str(data / name)))
        start = time.process_time()
        text = recognize(image)
        seconds.append(time.process_time() - start)
        words = sorted(set(split_text(" ".join(labels["words"]))))
        counts = compare(words, split_text(" ".join(labels["unclear"])), text)
        correct += counts.correct
        for word, is_found in zip(words, counts.found, strict=True):
            kind = "numbers" if word.isdigit() else "at least 4 letters" if len(word) > 3 else "1 to 3 letters"
            found["all"].append(is_found)
            found[kind].append(is_found)
    for kind, values in found.items():
        precision = f"{np.mean(correct):.1%} of {len(correct)}" if kind == "all" else ""
        print(f"| {len(seconds)}, natural | {kind} | {len(values)} | {np.mean(values):.1%} | {precision} |")
    print(f"| seconds of CPU time per image | | | {np.mean(seconds):.2f} | |", flush=True)


def split_text(text: str) -> list[str]:
    """Split a text into words as search does."""
    return split_words([normalize(text)])[0]


def compare(words: Sequence[str], ignored: Sequence[str], text: str, as_substrings: bool = False) -> Counts:
    """Compare the words of a photograph with the text that was recognised in it.

    Args:
        ignored: Words that are not counted as wrong.
        as_substrings: Find words anywhere in the text, as search does for Chinese.
    """
    if as_substrings:
        return Counts([word in text for word in words], [])
    recognized = set(split_text(text))
    expected = [split_text(word)[0] for word in words]
    correct = [word in expected for word in recognized if word in expected or word not in ignored]
    return Counts([word in recognized for word in expected], correct)


# ---- search


def measure_search(folder: Path, recognize: RecognizeText, model_name: str) -> None:
    model = open_dual_encoder(model_name)
    rows = [row for row in read_rows(folder / "captions.jsonl") if row["split"] == "val"]
    vectors, texts = [], {}
    for start in range(0, len(rows), BATCH_SIZE):
        images = [load_image(str(folder / row["image"])) for row in rows[start : start + BATCH_SIZE]]
        vectors.append(model.encode_images([model.transform(image) for image in images]).numpy().astype(np.float16))
        for number, image in enumerate(images, start):
            texts[number.to_bytes(32)] = recognize(prepare_image(image))
    contents = [
        IndexedContent(number.to_bytes(32), vector, b"", width=1, height=1)
        for number, vector in enumerate(np.concatenate(vectors))
    ]
    queries = [row["captions"][-1] for row in rows]
    print(f"\n{sum(map(bool, texts.values()))} of {len(rows)} photographs have recognised text\n")
    print("| texts in the index | queries | with a word match first | R@1, words off | R@1, words on | difference |")
    print("|---|---|---|---|---|---|")
    for label, with_captions in (("recognised text", False), ("recognised text and captions", True)):
        backend = SqliteBackend(Path(tempfile.mkdtemp()), write=True)
        backend.initialize({"model": "", "fingerprint": "", "embed_dim": model.embed_dim})
        images = []
        for number, row in enumerate(rows):
            captions = tuple(row["captions"][:-1]) if with_captions else ()
            image = IndexedImage(f"/{number}.jpg", FileImage(f"/{number}.jpg"), "/", "", captions)
            images.append((image, number.to_bytes(32)))
        backend.add(contents, images)
        backend.set_texts(texts)
        for kind, size in (("captions", None), ("two words of a caption", 2), ("one word of a caption", 1)):
            selected = [" ".join(choose_words(query, size)) for query in queries]
            print_search(backend, f"{label} | {kind}", selected, embed_texts(model, selected))


def choose_words(caption: str, size: int | None) -> list[str]:
    """Return all words of a caption, or its longest words in their order."""
    words = caption.split()
    longest = sorted(range(len(words)), key=lambda index: -len(words[index]))[:size]
    return words if size is None else [words[index] for index in sorted(longest)]


def print_search(backend: SqliteBackend, label: str, queries: Sequence[str], vectors: np.ndarray) -> None:
    """Print R@1 without and with word search, and the 95% confidence interval of the difference."""
    first: dict[bool, list[bool]] = {False: [], True: []}
    matched = []
    for number, (query, vector) in enumerate(zip(queries, vectors, strict=True)):
        for use_words, correct in first.items():
            hit = backend.search(vector, 1, Filter(), words=[query] if use_words else [])[0]
            correct.append(hit.images[0].name == f"/{number}.jpg")
        matched.append(bool(hit.matched))
    off, on = (np.array(values, np.float64) for values in first.values())
    samples = np.random.default_rng(0).integers(len(off), size=(1000, len(off)))
    low, high = np.percentile((on - off)[samples].mean(axis=1), (2.5, 97.5))
    cells = f"{np.mean(matched):.1%} | {off.mean():.1%} | {on.mean():.1%}"
    print(f"| {label} | {cells} | {on.mean() - off.mean():+.1%} ({low:+.1%} to {high:+.1%}) |", flush=True)


if __name__ == "__main__":
    main()
