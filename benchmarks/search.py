"""Measure the search latency and recall@10 of the local index and of faiss-cpu on the same clustered vectors.

    pip install faiss-cpu
    python benchmarks/search.py [--count 1000000]

Each query is a random vector near an indexed vector. For llm2clip, the measured time is that of the complete
`SqliteBackend.search` call, from the query vector to the file names. Recall is measured against faiss's float32 flat
index.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llm2clip.data.image_refs import FileImage
from llm2clip.search.metadata import Filter
from llm2clip.search.sqlite_backend import SqliteBackend
from llm2clip.search.types import IndexedContent, IndexedImage

DIM, QUERIES, K = 1024, 100, 10
CHUNK = 10_000  # number of vectors per chunk
Search = Callable[[np.ndarray], np.ndarray]  # query of shape (D,) -> row numbers of the K nearest vectors, (K,)


def main() -> None:
    import faiss

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
        print("| method | median, ms | p95, ms | recall@10 |\n|---|---|---|---|")
        exact = measure("faiss IndexFlatIP, float32", faiss_search(flat), queries, None)
        measure("faiss, float16", faiss_search(half), queries, exact)

        def search_backend(query: np.ndarray) -> np.ndarray:
            return np.array([int(hit.id) - 1 for hit in backend.search(query, K, Filter())])

        measure("llm2clip, exact: int8 scan, then float16 rescoring", search_backend, queries, exact)


def vector_chunks(count: int, dim: int) -> Iterator[np.ndarray]:
    """Yield chunks of float32 unit vectors of shape (N, D) in a thousand clusters, similar to image embeddings."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((1000, dim), dtype=np.float32)
    for start in range(0, count, CHUNK):
        vectors = centres[rng.integers(1000, size=min(CHUNK, count - start))]
        vectors = vectors + 0.7 * rng.standard_normal(vectors.shape, dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        yield vectors.astype(np.float16).astype(np.float32)


def add_noise(vectors: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return float32 unit vectors that are near the given unit vectors of shape (N, D)."""
    noise = rng.standard_normal(vectors.shape, dtype=np.float32) / np.sqrt(vectors.shape[1])
    vectors = vectors + 0.5 * noise
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def fill(backend: SqliteBackend, count: int) -> None:
    backend.initialize({"model": "none", "fingerprint": "none", "embed_dim": DIM})
    for chunk, vectors in enumerate(vector_chunks(count, DIM)):
        contents, images = [], []
        for row, vector in enumerate(vectors, chunk * CHUNK):
            name = f"/photos/{row}.jpg"
            contents.append(IndexedContent(name.encode(), vector.astype(np.float16), b"", width=1, height=1))
            images.append((IndexedImage(name, FileImage(name), "/photos", "1"), name.encode()))
        backend.add_images(contents, images)


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
    print(f"| {name} | {statistics.median(milliseconds):.1f} | {p95:.1f} | {np.mean(recalls):.4f} |", flush=True)
    return np.array(results)


def faiss_search(index: Any) -> Search:
    return lambda query: index.search(query[None], K)[1][0]


if __name__ == "__main__":
    main()
