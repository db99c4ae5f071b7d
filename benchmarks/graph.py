"""Sweep the parameters of approximate nearest-neighbour search on embeddings of real captions and images.

    pip install faiss-cpu hnswlib
    python benchmarks/graph.py MODEL DATA/*/captions.jsonl --out runs/graph [--count 1000000]

The vectors are the model's embeddings of all captions and images in the sources. The data sets contain fewer than a
million captions and images, so more vectors are made from them: a caption is mixed with another caption of the same
image, and an image with one of its 10 nearest images. Then noise is added, so that the new vector is as far from the
mixture as a real vector is from its nearest neighbour. The noise is the scaled difference of two random vectors. There
are two tasks, with QUERIES queries each:

    captions    captions search for captions. The queries are not in the index.
    images      captions search for images. The two have different distributions, so this task is harder.

Every method returns the 10 nearest vectors. The graphs and the inverted file contain int8 or float16 codes, and the
best candidates are re-scored with float16 vectors, as in `search`. Recall is measured against exact search in float32.
All queries are run one at a time, on one core. Each method's row is appended to OUT/table.jsonl, and an interrupted
sweep continues with the next method.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count as count_from
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from usearch.index import Index, MetricKind

from llm2clip.data.records import open_records
from llm2clip.data.skip_log import SkipLog
from llm2clip.evaluate.embeddings import ModelEmbeddings
from llm2clip.io_utils import atomic_path
from llm2clip.models.dual_encoder import open_dual_encoder
from llm2clip.search.vector_index import quantize
from shared import read_rows

TASKS = ("captions", "images")
K, QUERIES, NEIGHBOURS = 10, 1000, 10
CHUNK = 65_536
CONNECTIVITY, EXPANSION_ADD = (16, 32, 48), (128, 256, 512)
EXPANSION_SEARCH, CANDIDATES = (64, 128, 256, 512), (10, 50, 128)
FindCandidates = Callable[[np.ndarray, int], np.ndarray]  # query of shape (D,) and number of candidates -> row numbers


class Embeddings(NamedTuple):
    """Distinct captions and images, float16 of shape (N, D), and the image number of each caption, of shape (N,)."""

    captions: np.ndarray
    groups: np.ndarray
    images: np.ndarray


class Task(NamedTuple):
    """Indexed vectors of shape (N, D), float16, queries of shape (Q, D), float32, and the exact row numbers (Q, K)."""

    vectors: np.ndarray
    queries: np.ndarray
    exact: np.ndarray


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=str)
    parser.add_argument("data", nargs="+", type=str)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=1_000_000, help="number of vectors to index")
    parser.add_argument("--connectivity", type=int, nargs="+", default=CONNECTIVITY)
    parser.add_argument("--expansion_add", type=int, nargs="+", default=EXPANSION_ADD)
    parser.add_argument("--tasks", choices=TASKS, nargs="+", default=TASKS)
    parser.add_argument("--others", action="store_true", help="also measure hnswlib and faiss")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    embeddings = load_embeddings(args.model, args.data, args.out / "embeddings.npz")
    for name in args.tasks:
        task = make_task(name, embeddings, args.count)
        print(f"\n{name}: {len(task.vectors):,} vectors of dimension {task.vectors.shape[1]}", flush=True)
        results = Results(args.out / "table.jsonl", name, task)
        for connectivity, expansion in product(args.connectivity, args.expansion_add):
            results.measure_once(
                f"usearch, connectivity {connectivity}, expansion_add {expansion}",
                partial(build_usearch, task.vectors, connectivity, expansion),
                EXPANSION_SEARCH,
            )
        if args.others:
            results.measure_once("hnswlib, M 16, ef_construction 128", partial(build_hnswlib, task), EXPANSION_SEARCH)
            results.measure_once("faiss HNSW16, int8", partial(build_faiss_hnsw, task), EXPANSION_SEARCH)
            results.measure_once("faiss IVF4096, int8 (nprobe)", partial(build_faiss_ivf, task), (16, 64, 256))


# ---- data


def load_embeddings(model_name: str, sources: list[str], file: Path) -> Embeddings:
    """Embed all distinct captions and all images once, and save the embeddings to a file."""
    if not file.exists():
        captions: dict[str, int] = {}
        refs, numbers = [], count_from()
        for source in sources:
            for record in open_records(source):
                group = next(numbers)
                for caption in record.captions:
                    captions.setdefault(caption, group)
                if record.image is not None:
                    refs.append(record.image)
        embeddings = ModelEmbeddings(open_dual_encoder(model_name), SkipLog())
        images, _ = embeddings.encode_images(refs)
        texts = embeddings.encode_texts(list(captions))
        with atomic_path(file) as temporary, temporary.open("wb") as stream:
            np.savez(
                stream,
                captions=texts.numpy().astype(np.float16),
                groups=np.fromiter(captions.values(), np.int64),
                images=images.numpy().astype(np.float16),
            )
    with np.load(file) as arrays:
        return Embeddings(arrays["captions"], arrays["groups"], arrays["images"])


def make_task(name: str, embeddings: Embeddings, count: int) -> Task:
    rng = np.random.default_rng(0)
    order = rng.permutation(len(embeddings.captions))
    queries = embeddings.captions[order[:QUERIES]].astype(np.float32)
    if name == "captions":
        rows = np.sort(order[QUERIES:])
        vectors, groups = embeddings.captions[rows], embeddings.groups[rows]
        partners = choose_from_same_group(groups, rng)
    else:
        vectors = embeddings.images
        nearest = search_exactly(vectors, vectors.astype(np.float32), NEIGHBOURS + 1)[:, 1:]
        partners = nearest[np.arange(len(vectors)), rng.integers(NEIGHBOURS, size=len(vectors))]
    vectors = extend(vectors, partners, count, rng)
    return Task(vectors, queries, search_exactly(vectors, queries, K))


def choose_from_same_group(groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return for each caption the row of a caption of the same image, which is the caption itself if it is the only."""
    order = np.lexsort((rng.random(len(groups)), groups))
    is_last = np.append(groups[order][1:] != groups[order][:-1], True)
    starts = np.maximum.accumulate(np.where(np.append(True, is_last[:-1]), np.arange(len(groups)), 0))
    following = np.where(is_last, starts, np.arange(len(groups)) + 1)
    partners = np.empty_like(order)
    partners[order] = order[following]
    return partners


def extend(vectors: np.ndarray, partners: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return `count` vectors: a random sample, or all vectors and mixtures of a vector with its partner plus noise."""
    if len(vectors) >= count:
        return vectors[np.sort(rng.choice(len(vectors), count, replace=False))]
    sample = rng.choice(len(vectors), min(1000, len(vectors)), replace=False)
    queries = vectors[sample].astype(np.float32)
    nearest = search_exactly(vectors, queries, 2)[:, 1]
    distances = np.linalg.norm(vectors[nearest].astype(np.float32) - queries, axis=1)
    extended = np.empty((count, vectors.shape[1]), np.float16)
    extended[: len(vectors)] = vectors
    for start in range(len(vectors), count, CHUNK):
        size = min(CHUNK, count - start)
        rows = rng.integers(len(vectors), size=size)
        weights = rng.random((size, 1), dtype=np.float32)
        mixed = weights * vectors[rows].astype(np.float32) + (1 - weights) * vectors[partners[rows]].astype(np.float32)
        pairs = vectors[rng.integers(len(vectors), size=(2, size))].astype(np.float32)
        noise = pairs[0] - pairs[1]  # has the same principal components as the vectors, unlike isotropic noise
        noise *= (rng.choice(distances, size) / np.maximum(np.linalg.norm(noise, axis=1), 1e-6))[:, None]
        mixed = mixed / np.linalg.norm(mixed, axis=1, keepdims=True) + noise
        extended[start : start + size] = mixed / np.linalg.norm(mixed, axis=1, keepdims=True)
    return extended


def search_exactly(vectors: np.ndarray, queries: np.ndarray, count: int) -> np.ndarray:
    """Return the row numbers of the nearest vectors of each query, best first, int64 of shape (Q, count)."""
    rows: list[np.ndarray] = []
    for part in iterate_chunks(queries, 2048):
        best_scores, best_rows = torch.empty(len(part), 0), torch.empty(len(part), 0, dtype=torch.int64)
        for start in range(0, len(vectors), CHUNK):
            chunk = torch.from_numpy(vectors[start : start + CHUNK]).float()
            scores, columns = (torch.from_numpy(part) @ chunk.T).topk(min(count, len(chunk)))
            scores = torch.cat([best_scores, scores], dim=1)
            best_scores, kept = scores.topk(min(count, scores.shape[1]))
            best_rows = torch.cat([best_rows, columns + start], dim=1).gather(1, kept)
        rows.append(best_rows.numpy())
    return np.concatenate(rows)


def iterate_chunks(array: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(array), size):
        yield array[start : start + size]


# ---- methods: each returns the function that finds candidates, and one that sets the search parameter


def build_usearch(vectors: np.ndarray, connectivity: int, expansion_add: int) -> tuple[FindCandidates, Any]:
    graph = Index(
        ndim=vectors.shape[1],
        metric=MetricKind.IP,
        dtype="i8",
        connectivity=connectivity,
        expansion_add=expansion_add,
    )
    scale = 127 / float(np.abs(vectors).max())
    for start in range(0, len(vectors), CHUNK):
        chunk = vectors[start : start + CHUNK]
        graph.add(np.arange(start, start + len(chunk)), quantize(chunk, scale))

    def find(query: np.ndarray, count: int) -> np.ndarray:
        code = quantize(query[None], 127 / float(np.abs(query).max()))[0]
        return graph.search(code, count, threads=1).keys.astype(np.int64)

    return find, lambda value: setattr(graph, "expansion_search", value)


def build_hnswlib(task: Task) -> tuple[FindCandidates, Any]:
    import hnswlib

    graph = hnswlib.Index(space="ip", dim=task.vectors.shape[1])
    graph.init_index(max_elements=len(task.vectors), ef_construction=128, M=16)
    for start in range(0, len(task.vectors), CHUNK):
        chunk = task.vectors[start : start + CHUNK].astype(np.float32)
        graph.add_items(chunk, np.arange(start, start + len(chunk)))
    graph.set_num_threads(1)
    return lambda query, count: graph.knn_query(query[None], count)[0][0].astype(np.int64), graph.set_ef


def build_faiss_hnsw(task: Task) -> tuple[FindCandidates, Any]:
    import faiss

    graph = faiss.IndexHNSWSQ(task.vectors.shape[1], faiss.ScalarQuantizer.QT_8bit, 16, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction = 128
    _fill_faiss(graph, task.vectors)
    return _search_faiss(graph), lambda value: setattr(graph.hnsw, "efSearch", value)


def build_faiss_ivf(task: Task) -> tuple[FindCandidates, Any]:
    import faiss

    dim = task.vectors.shape[1]
    lists = min(4096, len(task.vectors) // 40)
    index = faiss.index_factory(dim, f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
    _fill_faiss(index, task.vectors)
    return _search_faiss(index), lambda value: setattr(index, "nprobe", value)


def _fill_faiss(index: Any, vectors: np.ndarray) -> None:
    sample = np.random.default_rng(0).choice(len(vectors), min(len(vectors), 100_000), replace=False)
    index.train(vectors[np.sort(sample)].astype(np.float32))
    for chunk in iterate_chunks(vectors, CHUNK):
        index.add(chunk.astype(np.float32))


def _search_faiss(index: Any) -> FindCandidates:
    import faiss

    def find(query: np.ndarray, count: int) -> np.ndarray:
        faiss.omp_set_num_threads(1)
        rows: np.ndarray = index.search(query[None], count)[1][0]
        return rows[rows >= 0]

    return find


# ---- measurement


class Results:
    """Measures methods on a task, and appends one row per setting to a file."""

    def __init__(self, file: Path, name: str, task: Task) -> None:
        self.file, self.name, self.task = file, name, task
        self.done = set()
        if file.exists():
            self.done = {(row["task"], row["method"]) for row in read_rows(file) if row["vectors"] == len(task.vectors)}

    def measure_once(
        self, method: str, build: Callable[[], tuple[FindCandidates, Any]], parameters: tuple[int, ...]
    ) -> None:
        """Build an index and measure all search settings, unless the file already contains the method."""
        if (self.name, method) in self.done:
            return
        start = time.perf_counter()
        find, set_parameter = build()
        seconds = time.perf_counter() - start
        set_parameter(parameters[0])
        found = self._measure_self_recall(find)
        rows = []
        for parameter, candidates in product(parameters, CANDIDATES):
            set_parameter(parameter)
            recall, milliseconds = self._measure(find, candidates)
            rows.append(
                {
                    "task": self.name,
                    "vectors": len(self.task.vectors),
                    "method": method,
                    "build, s": round(seconds),
                    "expansion_search or nprobe": parameter,
                    "candidates": candidates,
                    "recall@10": round(recall, 4),
                    "ms": round(statistics.median(milliseconds), 3),
                    "p95, ms": round(statistics.quantiles(milliseconds, n=20)[-1], 3),
                    "found": round(found, 4),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
        with self.file.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    def _measure(self, find: FindCandidates, candidates: int) -> tuple[float, list[float]]:
        """Return the recall@10 and the time of each query in milliseconds, re-scoring included."""
        hits, milliseconds = 0, []
        for query, exact in zip(self.task.queries, self.task.exact, strict=True):
            start = time.perf_counter()
            rows = find(query, candidates)
            scores = self.task.vectors[rows].astype(np.float32) @ query
            best = rows[np.argsort(-scores, kind="stable")[:K]]
            milliseconds.append(1000 * (time.perf_counter() - start))
            hits += len(np.intersect1d(best, exact))
        return hits / self.task.exact.size, milliseconds

    def _measure_self_recall(self, find: FindCandidates) -> float:
        """Return the fraction of 1,000 indexed vectors that are among the 10 nearest candidates of themselves."""
        rows = np.random.default_rng(2).choice(len(self.task.vectors), QUERIES, replace=False)
        return sum(int(row in find(self.task.vectors[row].astype(np.float32), K)) for row in rows) / len(rows)


if __name__ == "__main__":
    main()
