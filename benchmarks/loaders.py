"""Comparison of loaders of images from webdataset tar files. See `data.py`."""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measurements import Timer, measure, measure_cpu
from samples import make_samples

IMAGE_SIZE, BATCH_SIZE = 224, 128
BATCHES_PER_TURN = 8
BUFFER = 1000  # shuffle buffer of the streaming loaders, in images
PACKAGES = {
    "llm2clip": "",
    "WebDataset": "webdataset",
    "wids": "wids",
    "datasets, streaming": "datasets",
    "datasets, Arrow copy": "datasets",
}
S3_SAMPLES, S3_CACHE_GB = 60_000, 0.8  # the cache is smaller than the samples
BUCKET = "samples"


def get_preprocess() -> Any:
    """Return the preprocessing settings of all loaders."""
    from llm2clip.data.transforms import Preprocess

    return Preprocess(IMAGE_SIZE, "squash", 1.0, "bicubic", (0.5,) * 3, (0.5,) * 3)


def open_loader(name: str, source: str, workers: int, folder: str) -> Iterator[Any]:
    """Return an iterator over batches of pixels, in random order."""
    if name.startswith("llm2clip"):
        return open_align_loader(source, workers, folder)
    from braceexpand import braceexpand
    from torch.utils.data import DataLoader, RandomSampler

    files, decode = list(braceexpand(source)), make_decoder()
    options: dict[str, Any] = {"batch_size": BATCH_SIZE, "num_workers": workers}
    if name == "WebDataset":
        import webdataset

        stream = webdataset.WebDataset(files, shardshuffle=len(files), seed=0).shuffle(BUFFER)
        return iter(DataLoader(stream.map(lambda sample: decode(sample["jpg"])), **options))
    if name == "wids":
        import wids

        shards = [{"url": file, "nsamples": count_samples(file)} for file in files]
        cache: dict[str, Any] = {"cache_dir": f"{folder}/wids", "keep": True, "lru_size": len(files)}
        dataset = wids.ShardListDataset(shards, transformations=[], **cache)
        dataset.add_transform(lambda sample: decode(sample[".jpg"].read()))
        return iter(DataLoader(dataset, sampler=RandomSampler(dataset), **options))
    import datasets
    import torch

    streaming = "streaming" in name
    table = datasets.load_dataset(
        "webdataset", data_files=files, split="train", streaming=streaming, cache_dir=f"{folder}/datasets"
    ).cast_column("jpg", datasets.Image(decode=False))
    table = table.shuffle(seed=0, buffer_size=BUFFER) if streaming else table.select_columns("jpg")

    def collate(rows: list[dict[str, Any]]) -> Any:
        return torch.stack([decode(row["jpg"]["bytes"]) for row in rows])

    return iter(DataLoader(table, shuffle=None if streaming else True, collate_fn=collate, **options))


def open_align_loader(source: str, workers: int, folder: str) -> Iterator[Any]:
    """Return an iterator over the pixels in the batches of `align`."""
    import data

    work = Path(folder) / f"work-{Path(source).stem}"  # sources with the same files share a store
    if not (work / "store" / "manifest.json").exists():
        measure("write_store", source=source, folder=str(work))
    _, (_, batches) = data.start_align(Timer(), source, str(work), workers, BATCH_SIZE, iterate=False)
    return (batch.images for batch in batches.batches(0))


def make_decoder() -> Callable[[bytes], Any]:
    """Return a function that decodes and crops a JPEG file as `align` does."""
    import torch

    from llm2clip.data.images import decode_image
    from llm2clip.data.transforms import TrainTransform

    transform, generator = TrainTransform(get_preprocess(), 0.9), torch.Generator().manual_seed(0)
    return lambda data: transform(decode_image(data), generator)


def count_samples(tar: str) -> int:
    with tarfile.open(tar) as file:
        return len(file.getnames()) // 2


def load_images(timer: Timer, sources: dict[str, str], workers: int, rounds: int, folder: str) -> Any:
    """Measure loaders in turns. Return (images per second, CPU seconds per image) of each turn, by loader.

    After a turn, the workers of a loader fill its queue, which counts as part of the turn. Then they wait.

    Args:
        sources: Maps each loader to its source.
    """
    import torch

    torch.set_num_threads(1)
    # Ours is opened last, because the other loaders fork this process.
    loaders = {name: open_loader(name, source, workers, folder) for name, source in reversed(sources.items())}
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in sources}
    for number in range(rounds + 1):
        for name in sources:
            start, cpu = time.perf_counter(), measure_cpu()
            for _ in range(BATCHES_PER_TURN):
                assert next(loaders[name]).shape == (BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE)
            seconds, last_cpu = time.perf_counter() - start, measure_cpu()
            while workers:
                time.sleep(0.05)
                if (new_cpu := measure_cpu()) - last_cpu < 0.02:
                    break
                seconds, last_cpu = time.perf_counter() - start, new_cpu
            if number:  # the first turn includes the start of the workers
                images = BATCHES_PER_TURN * BATCH_SIZE
                results[name].append((images / seconds, (last_cpu - cpu) / images))
    return results, loaders


def compare_loaders(folder: Path, args: argparse.Namespace) -> None:
    """Print the speed of all loaders whose packages are installed."""
    source = make_samples(folder, "tar", args.loader_samples, args.loader_pixels)
    sources = {}
    for name, package in PACKAGES.items():
        if package and subprocess.run([sys.executable, "-c", f"import {package}"], capture_output=True).returncode:
            print(f"{name} is not measured: pip install {package}")
        else:
            sources[name] = source
    print("\n| loader | workers | images/s, median (minimum to maximum) | llm2clip / loader | CPU per image, µs |")
    print("|---|---|---|---|---|")
    for workers in (0, 2):
        result = measure("load", sources=sources, workers=workers, rounds=args.rounds, folder=str(folder))
        print_loaders(result["results"], workers)


def print_loaders(results: dict[str, list[tuple[float, float]]], workers: int) -> None:
    """Print a row for each loader. The ratio is the median of the ratios within a round."""
    ours = [rate for rate, _ in next(iter(results.values()))]
    for name, turns in results.items():
        rates, cpu = [rate for rate, _ in turns], statistics.median(cpu for _, cpu in turns)
        ratio = statistics.median(a / b for a, b in zip(ours, rates, strict=True))
        cells = f"{statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f}) | {ratio:.2f}x"
        print(f"| {name} | {workers} | {cells} | {cpu * 1e6:,.0f} |", flush=True)


# ---- object storage --------------------------------------------------------------------------------------------------


def compare_s3(folder: Path, args: argparse.Namespace) -> None:
    """Print the speed of loading from a local S3 server with a cache smaller than the samples, and from disk."""
    source = make_samples(folder, "tar", S3_SAMPLES, args.loader_pixels)
    with start_s3_server() as endpoint:
        os.environ["LLM2CLIP_CACHE"], os.environ["LLM2CLIP_SHARD_CACHE_GB"] = f"{folder}/cache", str(S3_CACHE_GB)
        upload_samples(endpoint, source)
        sources = {"llm2clip, disk": source, "llm2clip, S3": f"s3://{BUCKET}/{Path(source).name}"}
        print("\n| source | workers | images/s, median (minimum to maximum) | disk / source | CPU per image, µs |")
        print("|---|---|---|---|---|")
        result = measure("load", sources=sources, workers=1, rounds=args.rounds, folder=str(folder))
        print_loaders(result["results"], 1)


@contextmanager
def start_s3_server() -> Iterator[str]:
    """Start an S3 server in a new process, and set the environment variables for its clients. Yield its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port)]
    if subprocess.run([*command[:3], "--help"], capture_output=True).returncode:
        raise SystemExit("the S3 server is missing: pip install 'moto[server]' s3fs")
    endpoint = f"http://127.0.0.1:{port}"
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ.update({**keys, "AWS_ENDPOINT_URL": endpoint})
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield endpoint
    finally:
        server.terminate()


def upload_samples(endpoint: str, source: str) -> None:
    """Upload the files of a source to the server."""
    import boto3
    from botocore.config import Config
    from braceexpand import braceexpand

    client = boto3.client("s3", endpoint_url=endpoint, config=Config(retries={"max_attempts": 10}))
    client.create_bucket(Bucket=BUCKET)
    for file in braceexpand(source):
        client.upload_file(file, BUCKET, Path(file).name)
