"""Nearest-neighbour search with usearch: a scan of all vectors, quantized to int8, or an HNSW graph (arXiv 1603.09320).

The best candidates are scored again with the float16 vectors. Scans are limited by memory bandwidth, and int8 vectors
are half the size of float16 vectors (see benchmarks/search.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from usearch.index import Index, MetricKind
from usearch.index import search as exact_search

from llm2clip.io_utils import atomic_path, atomic_write_text
from llm2clip.progress import ProgressBar
from llm2clip.runs.ranks import print_once

# Minimum number of candidates to re-score. With 128, a scan of a million vectors found the exact top 10.
MIN_CANDIDATES = 128
EXACT_BELOW = 2048  # for at most this many ids, scoring all float16 vectors is faster than scanning int8 codes first
CHUNK = 65_536
# Number of nodes that a search of the graph keeps as candidates, at least the number of results. With a million images
# and 128, searches find 90% of the 10 images nearest to a caption. With 256, they find 95% in 2.5 times the time.
EXPANSION = 256
MIN_FOUND = 0.99  # a graph is used only if searches find at least this fraction of a sample of its vectors
SAMPLE_SIZE = 2000
MAX_REPAIRED = 0.1  # if searches miss more than this fraction of the sample, adding vectors again does not help
NEAREST = 16  # number of neighbours among which a vector must find itself
GRAPH_FILE, GRAPH_STATE_FILE = "graph.usearch", "graph.json"

FetchVectors = Callable[[np.ndarray], np.ndarray]  # maps ids of shape (N,) to float16 vectors of shape (N, D)
Block = tuple[np.ndarray, np.ndarray]  # sorted int64 ids of shape (N,), and int8 codes of shape (N, D)


class QuantizedVectors:
    """Vectors quantized to int8 by rounding scale * x and clipping to ±127.

    All vectors share one scale, so their dot products with a query are comparable. Vectors are stored in blocks, sorted
    by id, so an update copies only a few blocks instead of all vectors.
    """

    def __init__(self, scale: float, blocks: Sequence[Block] = ()) -> None:
        self.scale, self.blocks = scale, tuple(blocks)

    @property
    def last_id(self) -> int:
        return int(self.blocks[-1][0][-1]) if self.blocks else 0

    def __len__(self) -> int:
        return sum(len(ids) for ids, _ in self.blocks)

    def with_added(self, chunks: Iterable[tuple[np.ndarray, np.ndarray]]) -> QuantizedVectors:
        """Return a new object with chunks of additional int64 ids and float16 vectors. Both objects share most blocks.

        The ids must be larger than all previous ids.
        """
        blocks = list(self.blocks)
        for ids, vectors in chunks:
            codes = quantize(vectors, self.scale)
            if blocks and len(blocks[-1][0]) + len(ids) <= CHUNK:
                last_ids, last_codes = blocks.pop()
                ids, codes = np.concatenate([last_ids, ids]), np.concatenate([last_codes, codes])
            blocks.append((ids, codes))
        return QuantizedVectors(self.scale, blocks)

    def with_only(self, ids: np.ndarray) -> QuantizedVectors:
        """Return a new object without the vectors whose ids are not in the sorted array `ids`."""
        blocks = [_select(block, ids) for block in self.blocks]
        return QuantizedVectors(self.scale, [block for block in blocks if len(block[0])])

    def find_nearest(self, query_code: np.ndarray, count: int, allowed_ids: np.ndarray | None = None) -> np.ndarray:
        """Return the ids of the vectors with the largest dot products with a quantized query, largest first."""
        best_ids, best_distances = [np.empty(0, np.int64)], [np.empty(0, np.float32)]
        for block in self.blocks:
            ids, codes = block if allowed_ids is None else _select(block, allowed_ids)
            if len(ids):
                matches = exact_search(codes, query_code, min(count, len(ids)), MetricKind.IP, exact=True)
                best_ids.append(ids[matches.keys.astype(np.int64)])
                best_distances.append(matches.distances)
        order = np.argsort(np.concatenate(best_distances), kind="stable")[:count]
        return np.concatenate(best_ids)[order]


def _select(block: Block, allowed_ids: np.ndarray) -> Block:
    """Return the vectors of a block whose ids are in a sorted array: the block itself if it contains no others."""
    ids, codes = block
    first, end = np.searchsorted(allowed_ids, (ids[0], ids[-1] + 1))
    allowed = np.isin(ids, allowed_ids[first:end], assume_unique=True)
    return block if allowed.all() else (ids[allowed], codes[allowed])


def quantize(vectors: np.ndarray, scale: float) -> np.ndarray:
    return np.clip(np.rint(vectors.astype(np.float32) * scale), -127, 127).astype(np.int8)


class VectorIndex:
    """Top-k cosine similarity search over vectors with integer ids."""

    def __init__(self, load_quantized: Callable[[], QuantizedVectors], fetch: FetchVectors, graph: Any = None) -> None:
        """
        Args:
            load_quantized: Function that returns all quantized vectors. Called once, before the first scan.
            fetch: Function that returns the float16 vectors with the given ids, to re-score candidates.
            graph: HNSW graph of the same vectors, from `open_graph`. If None, all searches scan the vectors.
        """
        self._load_quantized, self.fetch, self.graph = load_quantized, fetch, graph
        self._quantized: QuantizedVectors | None = None
        self._lock = Lock()

    @property
    def quantized(self) -> QuantizedVectors:
        with self._lock:  # among concurrent searches, only one loads the vectors
            if self._quantized is None:
                self._quantized = self._load_quantized()
            return self._quantized

    def search(
        self, query: np.ndarray, count: int, allowed_ids: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the int64 ids and float32 cosine similarities of the nearest vectors, best first, then by id.

        Args:
            query: L2-normalised query vector of shape (D,), float32.
            allowed_ids: Sorted ids of the vectors to search. Default: all vectors.
        """
        ids = self._find_candidates(query, max(4 * count, MIN_CANDIDATES), allowed_ids)
        scores = self.fetch(ids).astype(np.float32) @ query
        order = np.lexsort((ids, -scores))[:count]
        return ids[order], scores[order]

    def _find_candidates(self, query: np.ndarray, count: int, allowed_ids: np.ndarray | None) -> np.ndarray:
        """Return the ids of about `count` candidates, selected by their int8 codes."""
        # The query may use a different scale, because constant factors do not change the ranking.
        query_code = np.rint(query * (127 / max(float(np.abs(query).max()), 1e-6))).astype(np.int8)
        if allowed_ids is not None and len(allowed_ids) <= EXACT_BELOW:
            return allowed_ids
        if allowed_ids is None and self.graph is not None:
            return self.graph.search(query_code, count).keys.astype(np.int64)
        return self.quantized.find_nearest(query_code, count, allowed_ids)


@dataclass(frozen=True)
class GraphState:
    """Contents of `graph.json`."""

    scale: float  # quantization scale of the vectors in the graph
    count: int  # number of ids
    last: int  # largest id
    sum: int  # sum of all ids
    checksum: str  # of the graph file, from `compute_checksum`
    found: float  # fraction of a sample of the vectors that a search for the vector itself finds


def update_graph(
    folder: Path, ids: np.ndarray, fetch: FetchVectors, dim: int, max_abs: float, threads: int = 0
) -> None:
    """Update the HNSW graph in a folder to contain exactly the vectors with the given sorted ids.

    Args:
        max_abs: Largest absolute value in any vector. If it has grown by 10% or more since the graph was built, the
            graph is rebuilt.
        threads: Number of threads that add vectors. 0 means all cores. With several threads, the graph differs between
            runs, because the insertion order is not deterministic.
    """
    graph_file, state_file = folder / GRAPH_FILE, folder / GRAPH_STATE_FILE
    scale = 127 / max_abs
    opened = open_graph(folder, view=False)
    if opened is not None and opened[1].scale < 1.1 * scale:
        graph, scale = opened[0], opened[1].scale
    else:
        graph = Index(ndim=dim, metric=MetricKind.IP, dtype="i8")
    graph_ids = np.sort(np.fromiter(graph.keys, np.int64, len(graph)))
    removed = np.setdiff1d(graph_ids, ids, assume_unique=True)
    added = np.setdiff1d(ids, graph_ids, assume_unique=True)
    if not len(removed) and not len(added):
        return
    if len(removed):
        graph.remove(removed)
    _add_to_graph(graph, added, fetch, scale, threads)
    sample = np.random.default_rng(0).permutation(ids)[:SAMPLE_SIZE]
    unreachable = _find_unreachable(graph, sample, fetch, scale)
    if len(unreachable) <= MAX_REPAIRED * len(sample):
        # Threads that add vectors at the same time can leave vectors that no search reaches (usearch issue 735).
        missed = _find_unreachable(graph, added, fetch, scale)
        if len(missed):
            graph.remove(missed)
            _add_to_graph(graph, missed, fetch, scale, threads=1)
    unreachable = _find_unreachable(graph, sample, fetch, scale, EXPANSION)
    found = 1 - len(unreachable) / len(sample)
    if found < MIN_FOUND:
        print_once(
            f"The search graph finds only {found:.1%} of the images, for example because many images are nearly equal. "
            "So searches scan all vectors instead."
        )
    state_file.unlink(missing_ok=True)  # graphs without a state file are ignored, so an interrupted save is harmless
    with atomic_path(graph_file) as temporary:
        graph.save(str(temporary))
    state = GraphState(scale, len(ids), int(ids[-1]), int(ids.sum()), compute_checksum(graph_file), found)
    atomic_write_text(state_file, json.dumps(asdict(state)))


def _add_to_graph(graph: Any, ids: np.ndarray, fetch: FetchVectors, scale: float, threads: int) -> None:
    with ProgressBar(total=len(ids), desc="graph", unit="image") as bar:
        for start in range(0, len(ids), CHUNK):
            chunk = ids[start : start + CHUNK]
            graph.add(chunk, quantize(fetch(chunk), scale), threads=threads)
            bar.update(len(chunk))


def _find_unreachable(
    graph: Any, ids: np.ndarray, fetch: FetchVectors, scale: float, expansion: int = 64
) -> np.ndarray:
    """Return the ids of those vectors that are not found by a search for the vector itself."""
    graph.expansion_search = expansion
    unreachable = [ids[:0]]
    count = min(NEAREST, len(graph))
    for start in range(0, len(ids), CHUNK):
        chunk = ids[start : start + CHUNK]
        codes = quantize(fetch(chunk), scale)
        matches = graph.search(codes, count)
        shape = len(chunk), count  # usearch omits the first dimension if there is only one query
        is_found = (matches.keys.reshape(shape).astype(np.int64) == chunk[:, None]).any(axis=1)
        # If all matches are equally near, which happens with equal vectors, the vector need not be among them.
        own = np.einsum("nd,nd->n", codes, codes, dtype=np.float32)
        is_found |= 1 - matches.distances.reshape(shape)[:, -1] >= own
        unreachable.append(chunk[~is_found])
    return np.concatenate(unreachable)


def open_graph(folder: Path, view: bool = True) -> tuple[Any, GraphState] | None:
    """Return the graph in a folder and its state, or None if there is none or it is corrupt.

    With `view`, memory-map the graph for searching, unless searches miss too many of its vectors.
    """
    graph_file, state_file = folder / GRAPH_FILE, folder / GRAPH_STATE_FILE
    if not state_file.exists():
        return None
    try:
        state = GraphState(**json.loads(state_file.read_text()))
        if view and state.found < MIN_FOUND:
            return None
        if state.checksum != compute_checksum(graph_file):
            raise ValueError("checksum mismatch")
        graph: Any = Index.restore(str(graph_file), view=view)
        graph.expansion_search = EXPANSION
        return graph, state
    except Exception as error:  # usearch raises different errors for truncated and empty files
        print_once(
            f"{graph_file} is corrupt ({error}), so searches scan all vectors instead. "
            "To rebuild the graph, run `llm2clip index` again."
        )
        return None


def compute_checksum(file: Path) -> str:
    """Return the size of a file and the sum of its 64-bit words, which only the disk's speed limits."""
    data = np.memmap(file, np.uint8, mode="r")
    end = len(data) // 8 * 8  # the remaining bytes are added one by one
    total = data[:end].view("<u8").sum(dtype=np.uint64) + data[end:].sum(dtype=np.uint64)
    return f"{len(data)} {int(total):x}"
