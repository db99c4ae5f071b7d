"""Nearest-neighbour search that uses either a scan of all quantized vectors or an HNSW graph.

A scan compares the query with all vectors, quantized to int8, and re-scores the best candidates with the float16
vectors. The speed of a scan is limited by memory bandwidth, and int8 vectors need half as many bytes as float16 vectors
(see benchmarks/search.py). A search in an HNSW graph (arXiv 1603.09320) visits only a few thousand vectors. Both
methods are implemented with usearch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from usearch.index import Index, MetricKind
from usearch.index import search as exact_search

from llm2clip.io_utils import atomic_path, atomic_write_text
from llm2clip.progress import ProgressBar

# Minimum number of candidates to re-score. With 128, a scan of a million vectors found the exact top 10.
MIN_CANDIDATES = 128
EXACT_BELOW = 2048  # up to this many ids, scoring all float16 vectors is faster than scanning the int8 codes first
CHUNK = 65_536
GRAPH_FILE, GRAPH_STATE_FILE = "graph.usearch", "graph.json"

FetchVectors = Callable[[np.ndarray], np.ndarray]  # ids (N,) -> float16 (N, D), in the same order


class QuantizedVectors:
    """Vectors quantized to int8 by rounding scale * x and clipping to ±127.

    All vectors have the same scale, so that their dot products with a query can be compared.
    """

    def __init__(self, chunks: Iterable[tuple[np.ndarray, np.ndarray]], dim: int, scale: float) -> None:
        """
        Args:
            chunks: Chunks of vectors. Each chunk is a pair of ids, int64 (N,), and vectors, float16 (N, D).
            dim: Vector dimension, D.
            scale: Quantization scale, which is 127 divided by the largest absolute value in any vector.
        """
        ids, codes = [np.empty(0, np.int64)], [np.empty((0, dim), np.int8)]
        for chunk_ids, vectors in chunks:
            ids.append(chunk_ids)
            codes.append(quantize(vectors, scale))
        self.ids, self.codes = np.concatenate(ids), np.concatenate(codes)


def quantize(vectors: np.ndarray, scale: float) -> np.ndarray:
    """Quantize float vectors (N, D) to int8 (N, D)."""
    return np.clip(np.rint(vectors.astype(np.float32) * scale), -127, 127).astype(np.int8)


class VectorIndex:
    """Top-k search by cosine similarity over vectors with integer ids."""

    def __init__(self, load_quantized: Callable[[], QuantizedVectors], fetch: FetchVectors, graph: Any = None) -> None:
        """
        Args:
            load_quantized: Function that returns all vectors, quantized. It is called once, before the first scan.
            fetch: Function that returns the float16 vectors with the given ids. It is used to re-score candidates.
            graph: HNSW graph of the same vectors, from `open_graph`. If None, all searches scan the vectors.
        """
        self._load_quantized, self.fetch, self.graph = load_quantized, fetch, graph
        self._quantized: QuantizedVectors | None = None
        self._lock = Lock()

    @property
    def quantized(self) -> QuantizedVectors:
        with self._lock:  # if several threads search, only one of them loads the vectors
            if self._quantized is None:
                self._quantized = self._load_quantized()
            return self._quantized

    def search(
        self, query: np.ndarray, count: int, allowed_ids: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids, int64 (k,), and cosine similarities, float32 (k,), of the nearest vectors, best first.

        Vectors with equal similarities are ordered by id.

        Args:
            query: Query vector, float32 (D,), L2-normalised.
            count: Maximum number of results.
            allowed_ids: Sorted ids. If given, only vectors with these ids are searched. Default: search all vectors.
        """
        ids = self._candidates(query, max(4 * count, MIN_CANDIDATES), allowed_ids)
        scores = self.fetch(ids).astype(np.float32) @ query
        order = np.lexsort((ids, -scores))[:count]
        return ids[order], scores[order]

    def _candidates(self, query: np.ndarray, count: int, allowed_ids: np.ndarray | None) -> np.ndarray:
        """Return the ids of about `count` candidates, which are selected by their int8 codes."""
        # The query can have a different scale, because a constant factor does not change the order of the scores.
        query_code = np.rint(query * (127 / max(float(np.abs(query).max()), 1e-6))).astype(np.int8)
        if allowed_ids is not None and len(allowed_ids) <= EXACT_BELOW:
            return allowed_ids
        if allowed_ids is None and self.graph is not None:
            return self.graph.search(query_code, count).keys.astype(np.int64)
        ids, codes = self.quantized.ids, self.quantized.codes
        if allowed_ids is None:
            if len(ids) <= count:
                return ids
            return ids[exact_search(codes, query_code, count, MetricKind.IP, exact=True).keys.astype(np.int64)]
        rows = np.flatnonzero(np.isin(ids, allowed_ids, assume_unique=True))
        if len(rows) > count:
            rows = _scan_rows(codes, rows, query_code, count)
        return ids[rows]


def _scan_rows(codes: np.ndarray, rows: np.ndarray, query_code: np.ndarray, count: int) -> np.ndarray:
    """Return the `count` rows of the code matrix that are nearest to the query, considering only the given rows.

    The rows are processed in chunks, because they must be copied and may include nearly the entire matrix.
    """
    best_rows, best_distances = [], []
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        matches = exact_search(codes[chunk], query_code, min(count, len(chunk)), MetricKind.IP, exact=True)
        best_rows.append(chunk[matches.keys.astype(np.int64)])
        best_distances.append(matches.distances)
    order = np.argsort(np.concatenate(best_distances), kind="stable")[:count]
    return np.concatenate(best_rows)[order]


def update_graph(
    folder: Path, ids: np.ndarray, fetch: FetchVectors, dim: int, max_abs: float, threads: int = 0
) -> None:
    """Update the HNSW graph in a folder so that it contains exactly the vectors with the given ids.

    Args:
        folder: Folder that contains `graph.usearch` and `graph.json`.
        ids: Sorted ids of all vectors, int64 (N,).
        fetch: Function that returns the float16 vectors with the given ids.
        dim: Vector dimension, D.
        max_abs: Largest absolute value in any vector. If this value has grown by 10% or more since the graph
            was built, the graph is rebuilt.
        threads: Number of threads that add vectors. 0 means all cores. With more than one thread, the order in which
            vectors are added, and so the graph, differs between runs.
    """
    graph_file, state_file = folder / GRAPH_FILE, folder / GRAPH_STATE_FILE
    graph = Index(ndim=dim, metric=MetricKind.IP, dtype="i8")
    scale = 127 / max_abs
    if state_file.exists():
        previous_scale = json.loads(state_file.read_text())["scale"]
        if previous_scale < 1.1 * scale:
            scale = previous_scale
            graph.load(str(graph_file))
    graph_ids = np.sort(np.fromiter(graph.keys, np.int64, len(graph)))
    removed = np.setdiff1d(graph_ids, ids, assume_unique=True)
    added = np.setdiff1d(ids, graph_ids, assume_unique=True)
    if not len(removed) and not len(added):
        return
    if len(removed):
        graph.remove(removed)
    with ProgressBar(total=len(added), desc="graph", unit="image") as bar:
        for start in range(0, len(added), CHUNK):
            chunk = added[start : start + CHUNK]
            graph.add(chunk, quantize(fetch(chunk), scale), threads=threads)
            bar.update(len(chunk))
    state_file.unlink(missing_ok=True)  # a graph without a state file is ignored, so an interrupted save does no harm
    with atomic_path(graph_file) as temporary:
        graph.save(str(temporary))
    state = {"scale": scale, "count": len(ids), "last": int(ids[-1]), "sum": int(ids.sum())}
    atomic_write_text(state_file, json.dumps(state))


def open_graph(folder: Path, ids: np.ndarray) -> Any:
    """Memory-map the graph in a folder. Return None if there is no graph or if the graph contains different ids."""
    state_file = folder / GRAPH_STATE_FILE
    if not state_file.exists():
        return None
    state = json.loads(state_file.read_text())
    last = int(ids[-1]) if len(ids) else 0
    if (state["count"], state["last"], state["sum"]) != (len(ids), last, int(ids.sum())):
        return None
    return Index.restore(str(folder / GRAPH_FILE), view=True)
