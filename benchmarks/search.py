"""Measure the search latency and recall@10 of the local index and of faiss-cpu on the same clustered vectors.

    pip install faiss-cpu
    python benchmarks/search.py [--count 1000000]

Each query is a random vector near an indexed vector. For llm2clip, the measured time is that of the complete
`SqliteBackend.search` call, from the query vector to the file names. Recall is measured against faiss's float32 flat
index.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llm2clip.search.metadata import Filter
from llm2clip.search.sqlite_backend import SqliteBackend
from shared import make_parser, print_header, print_row
from vectors import CHUNK, add_images, add_noise, initialize_index, vector_chunks

DIM, QUERIES, K = 1024, 100, 10
Search = Callable[[np.ndarray], np.ndarray]  # query of shape (D,) -> row numbers of the K nearest vectors, (K,)


def main() -> None:
    import faiss

    parser = make_parser(__doc__)
    parser.add_argument("--count", type=int, default=1_000_000, help="number of vectors to index")
    args = parser.parse_args()
    flat = faiss.IndexFlatIP(DIM)
    half = faiss.IndexScalarQuantizer(DIM, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    for vectors in vector_chunks(args.count, DIM):
        flat.add(vectors)
        half.add(vectors)
    rng = np.random.default_rng(1)
    rows = rng.integers(args.count, size=QUERIES)
    queries = add_noise(np.stack([flat.reconstruct(int(row)) for row in rows]), rng)
    with tempfile.TemporaryDirectory() as folder:
        backend = SqliteBackend(Path(folder), write=True)
        start = time.perf_counter()
        fill(backend, args.count)
        filled = time.perf_counter()
        backend.search(queries[0], K, Filter())
        seconds = f"written in {filled - start:.0f} s; the first search took {time.perf_counter() - filled:.1f} s"
        print(f"{args.count:,} vectors, {seconds}\n")
        print_header("method", "median, ms", "p95, ms", "recall@10")
        exact = measure("faiss IndexFlatIP, float32", faiss_search(flat), queries, None)
        measure("faiss, float16", faiss_search(half), queries, exact)

        def search_backend(query: np.ndarray) -> np.ndarray:
            return np.array([int(hit.id) - 1 for hit in backend.search(query, K, Filter())])

        measure("llm2clip, exact: int8 scan, then float16 rescoring", search_backend, queries, exact)


def fill(backend: SqliteBackend, count: int) -> None:
    initialize_index(backend, DIM)
    for chunk, vectors in enumerate(vector_chunks(count, DIM)):
        first = chunk * CHUNK
        add_images(backend, [f"/photos/{row}.jpg" for row in range(first, first + len(vectors))], vectors)


def measure(name: str, search: Search, queries: np.ndarray, exact: np.ndarray | None) -> np.ndarray:
    """Time each query separately and print a table row. Return the row numbers found, of shape (queries, K)."""
    for query in queries[:3]:  # warm-up
        search(query)
    results, milliseconds = [], []
    for query in queries:
        start = time.perf_counter()
        results.append(search(query))
        milliseconds.append(1000 * (time.perf_counter() - start))
    recalls = [len(set(a) & set(b)) / K for a, b in zip(results, results if exact is None else exact, strict=True)]
    p95 = statistics.quantiles(milliseconds, n=20)[-1]
    print_row(name, f"{statistics.median(milliseconds):.1f}", f"{p95:.1f}", f"{np.mean(recalls):.4f}")
    return np.array(results)


def faiss_search(index: Any) -> Search:
    return lambda query: index.search(query[None], K)[1][0]


if __name__ == "__main__":
    main()
