"""Time of a search and recall@10: the index here, faiss-cpu and LanceDB, on the same clustered vectors.

    pip install faiss-cpu lancedb
    python benchmarks/search.py [--count 1000000] [--width 1024] [--queries 100] [--graph] [--lance] [--out FOLDER]

A query is a vector near one of the million; a search is all that `LocalIndex.search` does, from the vector to the
paths. `--graph` also grows the graph here and faiss's HNSW and searches them (tens of minutes for a million on two
cores); `--lance` also asks LanceDB, exactly. Recall is against the exact float32 answer of faiss's flat index.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from llm2clip.data.image_refs import FileImage
from llm2clip.search.sqlite_backend import SqliteBackend
from llm2clip.search.types import Filter, IndexedContent, IndexedImage

K = 10


def chunks(count: int, width: int) -> Iterator[np.ndarray]:
    """Unit vectors float32 in a thousand clusters, as pictures lie."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((1000, width), dtype=np.float32)
    for start in range(0, count, 10_000):
        some = centres[rng.integers(1000, size=min(10_000, count - start))]
        some = some + 0.7 * rng.standard_normal(some.shape, dtype=np.float32)
        yield (some / np.linalg.norm(some, axis=1, keepdims=True)).astype(np.float16).astype(np.float32)


def timed(
    name: str, ask: Callable[[np.ndarray], np.ndarray], queries: np.ndarray, exact: np.ndarray | None
) -> np.ndarray:
    """Print how long queries take one by one; their answers, (queries, 10)."""
    for query in queries[:3]:
        ask(query)
    found, times = [], []
    for query in queries:
        start = time.perf_counter()
        found.append(ask(query))
        times.append(1000 * (time.perf_counter() - start))
    answers = np.array(found)
    same = 1.0 if exact is None else np.mean([len(set(a) & set(b)) / K for a, b in zip(answers, exact, strict=True)])
    p95 = statistics.quantiles(times, n=20)[-1]
    print(f"| {name} | {statistics.median(times):.1f} | {p95:.1f} | {same:.4f} |", flush=True)
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--graph", action="store_true")
    parser.add_argument("--lance", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    folder = given.out or Path(tempfile.mkdtemp())
    import faiss

    flat, start = faiss.IndexFlatIP(given.width), time.perf_counter()
    engine = SqliteBackend(folder / "index", write=True, approximate_above=1 << 60)
    filled = engine.count()[1] == given.count
    engine.begin({"model": "none", "fingerprint": "none", "width": given.width})
    spent = 0.0
    for n, some in enumerate(chunks(given.count, given.width)):
        flat.add(some)
        if not filled:
            first, start = 10_000 * n, time.perf_counter()
            names = [f"/photos/{first + i}.jpg" for i in range(len(some))]
            contents = [
                IndexedContent(name.encode(), v.astype(np.float16), b"", 1, 1)
                for name, v in zip(names, some, strict=True)
            ]
            pictures = [(IndexedImage(name, FileImage(name), "/photos", "1"), name.encode()) for name in names]
            engine.put(contents, pictures)
            spent += time.perf_counter() - start
    print(f"{given.count:,} vectors of width {given.width}; into the index in {spent:.0f} s")
    rng = np.random.default_rng(1)
    picked = np.stack([flat.reconstruct(int(i)) for i in rng.integers(given.count, size=given.queries)])
    noise = rng.standard_normal(picked.shape, dtype=np.float32) / np.sqrt(given.width)
    queries = picked + 0.5 * noise
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)

    def here(query: np.ndarray) -> np.ndarray:
        return np.array([int(hit.id) - 1 for hit in engine.search(query, K, Filter())])

    def faiss_search(index: object) -> Callable[[np.ndarray], np.ndarray]:
        return lambda query: index.search(query[None], K)[1][0]  # type: ignore[attr-defined]

    print("| way | median, ms | p95, ms | recall@10 |\n|---|---|---|---|")
    exact = timed("faiss IndexFlatIP, float32", faiss_search(flat), queries, None)
    half = faiss.IndexScalarQuantizer(given.width, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    for some in chunks(given.count, given.width):
        half.add(some)
    timed("faiss, float16", faiss_search(half), queries, exact)
    start = time.perf_counter()
    here(queries[0])
    opened = time.perf_counter() - start
    timed("here, exact: a byte a dimension scanned, the best measured by float16", here, queries, exact)
    print(f"\n(the first search reads the vectors: {opened:.1f} s)\n")
    if given.lance:
        import lancedb
        import pyarrow as pa

        database, table = lancedb.connect(folder / "lance"), None
        for n, some in enumerate(chunks(given.count, given.width)):
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(some.reshape(-1).astype(np.float16)), given.width)
            rows = pa.table({"id": np.arange(len(some)) + 10_000 * n, "vector": vectors})
            table = database.create_table("t", rows, mode="overwrite") if table is None else table
            if n:
                table.add(rows)
        assert table is not None

        def lance(query: np.ndarray) -> np.ndarray:
            return np.array(table.search(query).metric("dot").limit(K).select(["id", "_distance"]).to_arrow()["id"])

        timed("LanceDB, float16, no index", lance, queries[:20], exact[:20])
    if given.graph:
        start = time.perf_counter()
        engine.approximate_above = 0
        engine.finish()
        grown = time.perf_counter() - start
        timed(f"here, graph (grown in {grown:.0f} s)", here, queries, exact)
        graph = faiss.IndexHNSWSQ(given.width, faiss.ScalarQuantizer.QT_8bit, 16, faiss.METRIC_INNER_PRODUCT)
        start = time.perf_counter()
        graph.train(np.concatenate([c for _, c in zip(range(2), chunks(given.count, given.width), strict=False)]))
        for some in chunks(given.count, given.width):
            graph.add(some)
        grown = time.perf_counter() - start
        graph.hnsw.efSearch = 64
        timed(
            f"faiss HNSW16, a byte a dimension, efSearch 64 (grown in {grown:.0f} s)",
            faiss_search(graph),
            queries,
            exact,
        )


if __name__ == "__main__":
    main()
