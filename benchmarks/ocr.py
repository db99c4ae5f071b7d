"""Measure the recognition of text in photographs.

    python benchmarks/ocr.py DATA --chinese_font FILE

DATA contains flickr8k and coco_img, each with a captions.jsonl and images. Recognition uses the models of `index --ocr`
on one core. Words are compared as search compares them: without case and diacritics, and only entire words.

    drawn     140 photographs, enlarged to 800 pixels, with two to five drawn words each. Fonts, sizes, angles and
              colours are random. A quarter of the photographs has Chinese words
    natural   60 photographs in their own size (about 224 pixels) with legible text. The words of each photograph were
              transcribed by hand (ocr_words.json)

Recall is the share of the words that are found. Precision is the share of the recognised words that are in the
photograph. Words that are partly hidden or hard to read ("unclear" in ocr_words.json) do not count for either, nor do
words that are recognised in a photograph before anything is drawn on it.
"""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before the libraries that read it are loaded

import numpy as np
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

from llm2clip.data.images import load_image
from llm2clip.search.metadata import normalize_text
from llm2clip.search.ocr import RecognizeText, open_text_recognizer, prepare_image_for_ocr
from llm2clip.search.words import split_words
from measurements import memory_mb
from shared import make_parser, print_header, print_row, read_rows

WORDS_FILE = Path(__file__).with_name("ocr_words.json")
DRAWN = 140  # number of photographs with drawn words
SIDE = 800  # length of a photograph's longer side before words are drawn, in pixels
SIZES = (16, 24, 36, 56)  # font sizes in pixels
ANGLES = (0, 0, 15, -15, 90)  # in degrees
COLOURS = ("white", "black", "yellow", "red", "blue", "lime")
FONTS = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSerif.ttf", "DejaVuSansMono.ttf", "STIXGeneral.ttf")
CHINESE = ("出口", "酒店", "咖啡", "欢迎光临", "北京", "地铁站", "小心地滑", "停车场", "面包", "开放", "书店", "医院")


class Counts:
    """Whether each word of the photographs was found, whether each recognised word is correct, and the CPU seconds."""

    def __init__(self, recognize: RecognizeText) -> None:
        self._recognize = recognize
        self.found: list[bool] = []
        self.correct: list[bool] = []
        self.seconds: list[float] = []

    def recognize(self, pixels: np.ndarray) -> str:
        start = time.process_time()
        text = self._recognize(pixels)
        self.seconds.append(time.process_time() - start)
        return text

    def add(self, pixels: np.ndarray, words: Sequence[str], ignored: Sequence[str]) -> None:
        """Compare the words of a photograph with the recognised text. Words in `ignored` are not counted as wrong."""
        recognized = set(split_text(self.recognize(pixels)))
        expected = [split_text(word)[0] for word in words]
        self.found.extend(word in recognized for word in expected)
        self.correct.extend(word in expected for word in recognized if word in expected or word not in ignored)

    def add_chinese(self, pixels: np.ndarray, words: Sequence[str]) -> None:
        """Find the words anywhere in the recognised text, as search does for Chinese."""
        text = self.recognize(pixels)
        self.found.extend(word in text for word in words)

    def print(self, label: str) -> None:
        precision = f"{np.mean(self.correct):.1%}" if self.correct else ""
        recall, seconds = f"{np.mean(self.found):.1%}", f"{np.mean(self.seconds):.2f}"
        print_row(label, len(self.found), recall, precision, seconds)


def split_text(text: str) -> list[str]:
    """Split a text into words as search does."""
    return split_words([normalize_text(text)])[0]


def measure_drawn(data: Path, recognize: RecognizeText, chinese_font: Path) -> None:
    rng = np.random.default_rng(0)
    annotated = json.loads(WORDS_FILE.read_text(encoding="utf-8"))
    files, vocabulary = [], set()
    for name in ("flickr8k", "coco_img"):
        rows = list(read_rows(data / name / "captions.jsonl"))
        names = [f"{name}/{row['image']}" for row in rows if f"{name}/{row['image']}" not in annotated]
        files += [data / str(name) for name in rng.choice(names, DRAWN // 2, replace=False)]
        vocabulary |= {word for row in rows for word in row["captions"][0].split() if word.isalpha() and len(word) > 2}
    fonts = [str(Path(get_data_path()) / "fonts/ttf" / font) for font in FONTS]
    english, chinese = Counts(recognize), Counts(recognize)
    for number, file in enumerate(files):
        image = Image.open(file).convert("RGB")
        scale = SIDE / max(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
        if number % 4 == 3:
            words = draw_words(image, CHINESE, [str(chinese_font)], rng)
            chinese.add_chinese(np.asarray(image), words)
        else:
            own_words = split_text(recognize(np.asarray(image)))
            words = draw_words(image, sorted(vocabulary), fonts, rng)
            english.add(np.asarray(image), words, own_words)
    english.print("drawn, English words and numbers")
    chinese.print("drawn, Chinese")


def draw_words(
    image: Image.Image, vocabulary: Sequence[str], fonts: Sequence[str], rng: np.random.Generator
) -> list[str]:
    """Draw two to five words on a photograph, at random positions at which they do not overlap."""
    words = []
    is_free = np.ones((image.height, image.width), bool)
    for _ in range(int(rng.integers(2, 6))):
        text = str(rng.choice(vocabulary))
        if text.isascii():
            text = str(rng.integers(10, 10_000)) if rng.random() < 0.2 else text
            text = str(rng.choice([text, text.upper(), text.capitalize()]))
        font = ImageFont.truetype(str(rng.choice(fonts)), int(rng.choice(SIZES)))
        left, top, right, bottom = font.getbbox(text)
        line = Image.new("RGBA", (round(right - left) + 8, round(bottom - top) + 8))
        ImageDraw.Draw(line).text((4 - left, 4 - top), text, font=font, fill=str(rng.choice(COLOURS)))
        line = line.rotate(int(rng.choice(ANGLES)), expand=True, resample=Image.Resampling.BICUBIC)
        for _ in range(50):
            x = int(rng.integers(max(1, image.width - line.width)))
            y = int(rng.integers(max(1, image.height - line.height)))
            area = is_free[y : y + line.height, x : x + line.width]
            if area.all():
                area[:] = False
                image.paste(line, (x, y), line)
                words.append(text)
                break
    return words


def measure_natural(data: Path, recognize: RecognizeText) -> None:
    counts = Counts(recognize)
    for name, labels in json.loads(WORDS_FILE.read_text(encoding="utf-8")).items():
        words = sorted(set(split_text(" ".join(labels["words"]))))
        unclear = split_text(" ".join(labels["unclear"]))
        counts.add(prepare_image_for_ocr(load_image(str(data / name))), words, unclear)
    counts.print("natural, 224 pixels")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--chinese_font", type=Path, required=True, help="font file")
    args = parser.parse_args()
    before = memory_mb("VmRSS")
    recognize = open_text_recognizer()
    print(f"memory of the models: {memory_mb('VmRSS') - before:.0f} MB\n")
    print_header("photographs", "words", "recall", "precision", "seconds per photograph")
    measure_drawn(args.data, recognize, args.chinese_font)
    measure_natural(args.data, recognize)


if __name__ == "__main__":
    main()
