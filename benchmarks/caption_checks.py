"""Measure the checks of captions: their errors on human captions, and their time and memory.

    python benchmarks/caption_checks.py errors DATA/flickr8k/captions.jsonl@val [--model MODEL] [--images 400]
    python benchmarks/caption_checks.py speed DATA/flickr8k/captions.jsonl [--captions 10000 100000 1000000]

`errors` prints which human captions the checks of texts reject or shorten. With --model, it also compares two captions
per image with the images. It prints which fraction of them is rejected, and which fraction of the same captions after
each has been assigned to a random other image.

`speed` measures the checks of texts. Each image has four captions. A caption consists of the first half of one human
caption and the second half of another one.
"""

import argparse
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before the libraries that read it are loaded

import torch

from llm2clip.caption.checks import check_captions, find_problem, identify_language, rank_captions, remove_opening
from llm2clip.caption.database import CaptionDatabase, ImageRow, StoredAnswer
from llm2clip.caption.options import Prompt
from llm2clip.data.records import Record, open_records
from llm2clip.data.skip_log import SkipLog
from llm2clip.evaluate.embeddings import ModelEmbeddings
from llm2clip.models.dual_encoder import open_dual_encoder
from measurements import memory_mb, reset_peak_memory

MODEL = "synthetic"
PROMPTS = tuple(Prompt(name, "short", f"Write the {name} caption.") for name in ("first", "second", "third", "fourth"))
ROWS_PER_TRANSACTION = 10_000
CAPTIONS_PER_IMAGE = 2  # with --model
MAX_RANKS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["errors", "speed"])
    parser.add_argument("source", help="source of human captions")
    parser.add_argument("--model", help="dual encoder that has not been trained on the images")
    parser.add_argument("--images", type=int, default=400, help="number of images for --model")
    parser.add_argument(
        "--captions", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="numbers of captions"
    )
    args = parser.parse_args()
    records = open_records(args.source)
    if args.part == "speed":
        measure_speed([caption.split() for record in records for caption in record.captions], args.captions)
    elif args.model:
        measure_ranks(list(islice(records, args.images)), args.model)
    else:
        measure_texts(records)


# ---- errors ----------------------------------------------------------------------------------------------------------


def measure_texts(records: Iterator[Record]) -> None:
    problems: Counter[str] = Counter()
    num_captions = 0
    for record in records:
        for caption in record.captions:
            num_captions += 1
            shortened = remove_opening(caption)
            problem = find_problem(shortened, "short")
            if problem is not None:
                problems[problem] += 1
            elif identify_language(shortened) not in (None, "en"):
                problems["wrong language"] += 1
            problems["opening removed"] += shortened != caption
    print(f"| of {num_captions:,} captions | number |\n|---|---|")
    for problem, count in problems.most_common():
        print(f"| {problem} | {count:,} |")


def measure_ranks(records: Sequence[Record], model: str) -> None:
    embeddings = ModelEmbeddings(open_dual_encoder(model), SkipLog())
    images, indices = embeddings.encode_images([record.image for record in records if record.image is not None])
    captions = [records[index].captions[:CAPTIONS_PER_IMAGE] for index in indices]
    texts = embeddings.encode_texts([caption for group in captions for caption in group])
    own = torch.tensor([n for n, group in enumerate(captions) for _ in group])
    generator = torch.Generator().manual_seed(0)
    other = (own + torch.randint(1, len(images), own.shape, generator=generator)) % len(images)
    ranks = []
    for image in (own, other):
        is_own = image[:, None] == torch.arange(len(images))  # (captions, images)
        ranks.append(rank_captions(texts, images[image], images, is_own)[1])
    print("| maximum rank | rejected, % | rejected after assignment to another image, % |\n|---|---|---|")
    for max_rank in MAX_RANKS:
        own_rejected, other_rejected = (100 * float((rank > max_rank).float().mean()) for rank in ranks)
        print(f"| {max_rank} | {own_rejected:.1f} | {other_rejected:.1f} |")


# ---- speed -----------------------------------------------------------------------------------------------------------


def measure_speed(words: Sequence[list[str]], sizes: Sequence[int]) -> None:
    identify_language("a dog")  # loads the model
    print("| captions | CPU seconds | memory, MB | database, MB |\n|---|---|---|---|")
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "captions.sqlite"
            with closing(CaptionDatabase(file)) as database:
                fill_database(database, words, size)
                memory, start = reset_peak_memory(), time.process_time()
                check_captions(database, MODEL, PROMPTS)
                seconds, peak = time.process_time() - start, memory_mb("VmHWM") - memory
                print(f"| {size:,} | {seconds:.1f} | +{peak:.0f} | {file.stat().st_size / 1e6:.0f} |", flush=True)


def fill_database(database: CaptionDatabase, words: Sequence[list[str]], size: int) -> None:
    num_images = size // len(PROMPTS)
    database.replace_images(
        ImageRow(n, str(n), make_hash(n), {"image": f"{n}.jpg", "id": str(n)}) for n in range(num_images)
    )
    answers = make_answers(words, num_images)
    while batch := list(islice(answers, ROWS_PER_TRANSACTION)):
        database.add_answers(batch)


def make_answers(words: Sequence[list[str]], num_images: int) -> Iterator[StoredAnswer]:
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
