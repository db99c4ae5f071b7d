"""Measure the time and memory of the checks of captions without a model.

    python benchmarks/caption_checks.py DATA/flickr8k/captions.jsonl [--captions 1000 10000 100000]

Half as many images as captions get two captions each. A caption consists of the first half of one human caption and the
second half of another one.
"""

import argparse
import os
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before the libraries that read it are loaded

from llm2clip.caption.checks import check_captions, identify_language
from llm2clip.caption.database import CaptionDatabase, ImageRow, StoredAnswer
from llm2clip.caption.prompts import Prompt
from shared import memory_mb, read_rows, reset_peak_memory

MODEL = "synthetic"
PROMPTS = (Prompt("first", "short", "Describe the image."), Prompt("second", "short", "Name the objects."))
ROWS_PER_TRANSACTION = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="JSON Lines file with human captions")
    parser.add_argument("--captions", type=int, nargs="+", default=[1000, 10_000, 100_000], help="numbers of captions")
    args = parser.parse_args()
    words = [caption.split() for row in read_rows(args.source) for caption in row["captions"]]
    identify_language("a dog")  # loads the model
    print("| captions | CPU seconds | memory, MB | database, MB |\n|---|---|---|---|")
    for count in args.captions:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "captions.sqlite"
            with closing(CaptionDatabase(file)) as database:
                fill_database(database, words, count)
                memory, start = reset_peak_memory(), time.process_time()
                check_captions(database, MODEL, PROMPTS)
                seconds, peak = time.process_time() - start, memory_mb("VmHWM") - memory
                print(f"| {count:,} | {seconds:.1f} | +{peak:.0f} | {file.stat().st_size / 1e6:.0f} |", flush=True)


def fill_database(database: CaptionDatabase, words: list[list[str]], count: int) -> None:
    num_images = count // len(PROMPTS)
    database.replace_images(
        ImageRow(n, str(n), make_hash(n), {"image": f"{n}.jpg", "id": str(n)}) for n in range(num_images)
    )
    answers: list[StoredAnswer] = []
    for answer in make_answers(words, num_images):
        answers.append(answer)
        if len(answers) == ROWS_PER_TRANSACTION:
            database.add_answers(answers)
            answers.clear()
    database.add_answers(answers)


def make_answers(words: list[list[str]], num_images: int) -> Iterator[StoredAnswer]:
    rng = random.Random(0)
    for n in range(num_images):
        for prompt in PROMPTS:
            first, second = rng.choice(words), rng.choice(words)
            text = " ".join([*first[: len(first) // 2], *second[len(second) // 2 :]])
            yield StoredAnswer(make_hash(n), prompt.key, 0, MODEL, text, None, 0.0, "2026-11-29")


def make_hash(number: int) -> str:
    return random.Random(number).randbytes(32).hex()


if __name__ == "__main__":
    main()
