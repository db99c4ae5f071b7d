"""Measure the search latency and recall@10 of the local index, faiss-cpu and LanceDB on the same clustered vectors.

    pip install faiss-cpu lancedb
    python benchmarks/search.py [--count 1000000] [--dim 1024] [--queries 100] [--lance] [--out FOLDER]
    python benchmarks/search.py --captions [--count 1000000]

Each query is a random vector near an indexed vector. For llm2clip, the measured time is that of the complete
`SqliteBackend.search` call, from the query vector to the file names. `--lance` also searches with LanceDB, without an
index. Recall is measured against faiss's float32 flat index.

`--captions` measures caption filters instead: how long it takes to find all images whose caption contains a given text,
in an index with one caption of 9 to 15 words per image. The baseline is the filter of version 0.1, an SQL function that
parses the captions of every image. Times are CPU times, because both filters use a single thread. The script also
measures the first filter call after one image has been added.
"""

import argparse
import json
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llm2clip.data.image_refs import FileImage
from llm2clip.search.backends import INDEX_FILE
from llm2clip.search.metadata import Filter
from llm2clip.search.sqlite_backend import SqliteBackend
from llm2clip.search.types import IndexedContent, IndexedImage

K = 10
CHUNK = 10_000  # number of vectors per chunk
LANCE_QUERIES = 20  # number of queries for LanceDB, which takes much longer than the other libraries
Search = Callable[[np.ndarray], np.ndarray]  # query of shape (D,) -> row numbers of the K nearest vectors, (K,)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000, help="number of vectors to index")
    parser.add_argument("--dim", type=int, default=1024, help="vector dimension")
    parser.add_argument("--queries", type=int, default=100, help="number of queries per method")
    parser.add_argument("--lance", action="store_true", help="also search with LanceDB")
    parser.add_argument(
        "--out", type=Path, help="folder for the index, so that it can be reused; default: a temporary folder"
    )
    parser.add_argument("--captions", action="store_true", help="measure caption filters instead")
    args = parser.parse_args()
    folder = args.out or Path(tempfile.mkdtemp())
    if args.captions:
        measure_captions(folder / "captions", args.count)
        return
    import faiss

    flat = faiss.IndexFlatIP(args.dim)
    backend = SqliteBackend(folder / "index", write=True)
    seconds = fill(backend, flat, args.count, args.dim)
    print(f"{args.count:,} vectors of dimension {args.dim}, indexed in {seconds:.0f} s")
    queries = make_queries(flat, args.queries, args.count)

    def search_backend(query: np.ndarray) -> np.ndarray:
        return np.array([int(hit.id) - 1 for hit in backend.search(query, K, Filter())])

    print("| method | median, ms | p95, ms | recall@10 |\n|---|---|---|---|")
    exact = measure("faiss IndexFlatIP, float32", faiss_search(flat), queries)
    half = faiss.IndexScalarQuantizer(args.dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    for vectors in vector_chunks(args.count, args.dim):
        half.add(vectors)
    measure("faiss, float16", faiss_search(half), queries, exact)
    start = time.perf_counter()
    search_backend(queries[0])
    first_search = time.perf_counter() - start
    measure("llm2clip, exact: int8 scan, best candidates re-scored in float16", search_backend, queries, exact)
    print(f"\n(the first search, which loads the vectors, took {first_search:.1f} s)\n")
    if args.lance:
        search = lance_search(folder / "lance", args.count, args.dim)
        measure("LanceDB, float16, no index", search, queries[:LANCE_QUERIES], exact[:LANCE_QUERIES])


def measure_captions(folder: Path, count: int) -> None:
    """Measure caption filters for a rare word, a Chinese character, a word in all captions, and a phrase."""
    rng = np.random.default_rng(0)
    words = np.array(["dog", "狗", "Street", "oranges", *(f"word{n}" for n in range(5000))])
    writer = SqliteBackend(folder, write=True)
    writer.initialize({"model": "none", "fingerprint": "none", "embed_dim": 8})

    def add(rows: range) -> None:
        contents, images = [], []
        for row in rows:
            caption = "A photo of " + " ".join(rng.choice(words, size=rng.integers(6, 13)))
            name = f"/photos/{row}.jpg"
            contents.append(IndexedContent(name.encode(), rng.random(8).astype(np.float16), b"", width=1, height=1))
            images.append((IndexedImage(name, FileImage(name), "/photos", "1", (caption,)), name.encode()))
        writer.add(contents, images)

    if writer.count()[1] < count:
        for start in range(0, count, CHUNK):
            add(range(start, min(start + CHUNK, count)))
    backend = SqliteBackend(folder)
    seconds, _ = time_call(lambda: backend._find_matching_ids(Filter(caption="dog")))
    print(f"{count:,} captions; the first filter took {1000 * seconds:.0f} ms of CPU time\n")

    database = sqlite3.connect(folder / INDEX_FILE)
    database.create_function(
        "any_contains",
        2,
        lambda captions, text: any(text.casefold() in caption.casefold() for caption in json.loads(captions)),
        deterministic=True,
    )
    query = "SELECT DISTINCT content FROM images WHERE any_contains(captions, ?) ORDER BY content"
    print("| text | images | version 0.1, ms | llm2clip, ms (median of 10) |\n|---|---|---|---|")
    for text in ("DOG", "狗", "photo", "a photo of word"):
        before, rows = time_call(lambda text=text: database.execute(query, (text,)).fetchall())
        calls = [time_call(lambda text=text: backend._find_matching_ids(Filter(caption=text))) for _ in range(10)]
        assert calls[0][1].tolist() == [content for (content,) in rows]
        after = statistics.median(seconds for seconds, _ in calls)
        print(f"| {text} | {len(rows):,} | {1000 * before:.0f} | {1000 * after:.0f} |", flush=True)
    added = writer.count()[1]
    add(range(added, added + 1))
    seconds, _ = time_call(lambda: backend._find_matching_ids(Filter(caption="dog")))
    print(f"\n(after one image was added, the first filter took {1000 * seconds:.0f} ms)")


def time_call(function: Callable[[], Any]) -> tuple[float, Any]:
    """Return the CPU seconds that a call takes in this thread, and its result."""
    start = time.thread_time()
    result = function()
    return time.thread_time() - start, result


def vector_chunks(count: int, dim: int) -> Iterator[np.ndarray]:
    """Yield chunks of float32 unit vectors of shape (N, D) in a thousand clusters, similar to image embeddings."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((1000, dim), dtype=np.float32)
    for start in range(0, count, CHUNK):
        vectors = centres[rng.integers(1000, size=min(CHUNK, count - start))]
        vectors = vectors + 0.7 * rng.standard_normal(vectors.shape, dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        yield vectors.astype(np.float16).astype(np.float32)


def fill(backend: SqliteBackend, flat: Any, count: int, dim: int) -> float:
    """Fill the faiss index and, if necessary, the local index. Return the seconds spent on the local index."""
    is_filled = backend.count()[1] == count
    backend.initialize({"model": "none", "fingerprint": "none", "embed_dim": dim})
    seconds = 0.0
    for chunk, vectors in enumerate(vector_chunks(count, dim)):
        flat.add(vectors)
        if is_filled:
            continue
        start = time.perf_counter()
        contents, images = [], []
        for row, vector in enumerate(vectors, chunk * CHUNK):
            name = f"/photos/{row}.jpg"
            contents.append(IndexedContent(name.encode(), vector.astype(np.float16), b"", width=1, height=1))
            images.append((IndexedImage(name, FileImage(name), "/photos", "1"), name.encode()))
        backend.add(contents, images)
        seconds += time.perf_counter() - start
    return seconds


def make_queries(flat: Any, queries: int, count: int) -> np.ndarray:
    """Return float32 unit vectors of shape (queries, D), each near a randomly chosen indexed vector."""
    rng = np.random.default_rng(1)
    return add_noise(np.stack([flat.reconstruct(int(row)) for row in rng.integers(count, size=queries)]), rng)


def add_noise(vectors: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return float32 unit vectors that are near the given unit vectors of shape (N, D)."""
    noise = rng.standard_normal(vectors.shape, dtype=np.float32) / np.sqrt(vectors.shape[1])
    vectors = vectors + 0.5 * noise
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def measure(name: str, search: Search, queries: np.ndarray, exact: np.ndarray | None = None) -> np.ndarray:
    """Time each query separately and print a table row. Return the row numbers found, of shape (queries, K)."""
    for query in queries[:3]:  # warm-up
        search(query)
    results, milliseconds = [], []
    for query in queries:
        start = time.perf_counter()
        results.append(search(query))
        milliseconds.append(1000 * (time.perf_counter() - start))
    recall = 1.0
    if exact is not None:
        recall = np.mean([len(set(a) & set(b)) / K for a, b in zip(results, exact, strict=True)])
    p95 = statistics.quantiles(milliseconds, n=20)[-1]
    print(f"| {name} | {statistics.median(milliseconds):.1f} | {p95:.1f} | {recall:.4f} |", flush=True)
    return np.array(results)


def faiss_search(index: Any) -> Search:
    return lambda query: index.search(query[None], K)[1][0]


def lance_search(folder: Path, count: int, dim: int) -> Search:
    """Write the vectors to a LanceDB table and return a function that searches the table."""
    import lancedb
    import pyarrow as pa

    database, table = lancedb.connect(folder), None
    for chunk, vectors in enumerate(vector_chunks(count, dim)):
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1).astype(np.float16)), dim)
        rows = pa.table({"id": np.arange(len(vectors)) + chunk * CHUNK, "vector": column})
        if table is None:
            table = database.create_table("t", rows, mode="overwrite")
        else:
            table.add(rows)
    assert table is not None

    def search(query: np.ndarray) -> np.ndarray:
        result = table.search(query).metric("dot").limit(K).select(["id", "_distance"])
        return np.array(result.to_arrow()["id"])

    return search


if __name__ == "__main__":
    main()
