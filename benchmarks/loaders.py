"""Compare loaders of images from webdataset tar files.

    pip install webdataset wids datasets
    python benchmarks/loaders.py FOLDER

20,000 images of 256 x 256 pixels are read in random order, decoded and cropped to 224 pixels with llm2clip's functions.
Each loader runs in this process, and with two workers. The loaders run in turns.
"""

import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
import webdataset
import wids
from braceexpand import braceexpand
from torch.utils.data import DataLoader, RandomSampler

from data import IMAGE_SIZE, PREPROCESS, open_batches, read_records, write_store
from llm2clip.data.images import decode_image
from llm2clip.data.transforms import TrainTransform
from measurements import measure_cpu
from samples import make_samples
from shared import format_median, make_parser, print_header, print_row

SAMPLES, PIXELS = 20_000, 256
BATCH_SIZE, BATCHES_PER_TURN, ROUNDS = 128, 8, 6
BUFFER = 1000  # shuffle buffer of the streaming loaders, in images


def open_llm2clip(source: str, workers: int, folder: Path) -> Iterator[Any]:
    records = read_records(source, folder / "work")
    batches = open_batches(records, write_store(records, folder / "work/store"), workers, BATCH_SIZE)
    return (batch.images for batch in batches.iterate_batches(0))


def open_webdataset(source: str, workers: int, folder: Path) -> Iterator[Any]:
    files, decode = list(braceexpand(source)), make_decoder()
    stream = webdataset.WebDataset(files, shardshuffle=len(files), seed=0).shuffle(BUFFER)
    stream = stream.map(lambda sample: decode(sample["jpg"]))
    return iter(DataLoader(stream, batch_size=BATCH_SIZE, num_workers=workers))


def open_wids(source: str, workers: int, folder: Path) -> Iterator[Any]:
    decode = make_decoder()
    shards = [{"url": file, "nsamples": count_samples(file)} for file in braceexpand(source)]
    cache: dict[str, Any] = {"cache_dir": f"{folder}/wids", "keep": True, "lru_size": len(shards)}
    dataset = wids.ShardListDataset(shards, transformations=[], **cache)
    dataset.add_transform(lambda sample: decode(sample[".jpg"].read()))
    return iter(DataLoader(dataset, sampler=RandomSampler(dataset), batch_size=BATCH_SIZE, num_workers=workers))


def open_streaming(source: str, workers: int, folder: Path) -> Iterator[Any]:
    table = open_hugging_face(source, folder, streaming=True).shuffle(seed=0, buffer_size=BUFFER)
    return iter(DataLoader(table, collate_fn=make_collator(), batch_size=BATCH_SIZE, num_workers=workers))


def open_arrow_copy(source: str, workers: int, folder: Path) -> Iterator[Any]:
    table = open_hugging_face(source, folder, streaming=False).select_columns("jpg")
    return iter(DataLoader(table, shuffle=True, collate_fn=make_collator(), batch_size=BATCH_SIZE, num_workers=workers))


LOADERS: dict[str, Callable[[str, int, Path], Iterator[Any]]] = {
    "llm2clip": open_llm2clip,
    f"WebDataset, buffer of {BUFFER:,} images": open_webdataset,
    "wids": open_wids,
    f"Hugging Face datasets, streaming, buffer of {BUFFER:,} images": open_streaming,
    "Hugging Face datasets, Arrow copy": open_arrow_copy,
}


def open_hugging_face(source: str, folder: Path, streaming: bool) -> Any:
    files = list(braceexpand(source))
    cache = f"{folder}/datasets"
    table = datasets.load_dataset("webdataset", data_files=files, split="train", streaming=streaming, cache_dir=cache)
    return table.cast_column("jpg", datasets.Image(decode=False))


def make_collator() -> Callable[[list[dict[str, Any]]], Any]:
    decode = make_decoder()
    return lambda rows: torch.stack([decode(row["jpg"]["bytes"]) for row in rows])


def make_decoder() -> Callable[[bytes], Any]:
    """Return a function that decodes and crops a JPEG file as `align` does."""
    transform, generator = TrainTransform(PREPROCESS), torch.Generator().manual_seed(0)
    return lambda data: transform(decode_image(data), generator)


def count_samples(tar: str) -> int:
    with tarfile.open(tar) as file:
        return len(file.getnames()) // 2


def measure_turn(loader: Iterator[Any], workers: int) -> float:
    """Load some batches, and return the images per second.

    After the last batch, the workers fill the loader's queue, which counts as part of the turn. Then they wait.
    """
    start = time.perf_counter()
    for _ in range(BATCHES_PER_TURN):
        assert next(loader).shape == (BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE)
    seconds, cpu = time.perf_counter() - start, measure_cpu()
    while workers:
        time.sleep(0.05)
        if (new_cpu := measure_cpu()) - cpu < 0.02:
            break
        seconds, cpu = time.perf_counter() - start, new_cpu
    return BATCHES_PER_TURN * BATCH_SIZE / seconds


def measure_loaders(source: str, workers: int, folder: Path) -> dict[str, list[float]]:
    """Return the images per second of each loader in each turn."""
    # llm2clip is opened last, because the other loaders fork this process.
    loaders = {name: LOADERS[name](source, workers, folder) for name in reversed(LOADERS)}
    results: dict[str, list[float]] = {name: [] for name in LOADERS}
    for number in range(ROUNDS + 1):
        for name, rates in results.items():
            rate = measure_turn(loaders[name], workers)
            if number:  # the first turn includes the start of the workers
                rates.append(rate)
    return results


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("folder", type=Path, help="folder for the samples")
    args = parser.parse_args()
    torch.set_num_threads(1)
    source = make_samples(args.folder, SAMPLES, PIXELS)
    print_header("loader", "workers", "images/s, median (minimum to maximum)")
    for workers in (0, 2):
        for name, rates in measure_loaders(source, workers, args.folder).items():
            print_row(name, workers, format_median(rates))


if __name__ == "__main__":
    main()
