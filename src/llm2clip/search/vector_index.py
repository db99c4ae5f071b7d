"""The nearest of many vectors: a scan of all, or a graph of them.

Vectors are coded in a byte a dimension and scanned by usearch's kernels; the best are then measured by their own
vectors. A scan of bytes reads half of what one of float16 does, and memory is what a scan waits for
(benchmarks/search.py). The graph (HNSW, arXiv 1603.09320, usearch's) reads a few thousand codes and not all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from usearch.index import Index, MetricKind
from usearch.index import search as scan

from llm2clip.io_utils import atomic_write_text

MIN_CANDIDATES = 128  # candidates that are measured at the least; of a scan of a million none was missed with them
EXACT_BELOW = 2048  # vectors that are measured sooner than coded
CHUNK = 65_536

Fetch = Callable[[np.ndarray], np.ndarray]  # ids (N,) -> float16 (N, D), in their order


class QuantizedVectors:
    """Vectors in a byte a dimension: round(scale x), cut at 127. One scale for all, or products would not compare."""

    def __init__(self, chunks: Iterable[tuple[np.ndarray, np.ndarray]], width: int, scale: float) -> None:
        """
        Args:
            chunks: ids int64 (N,) and float16 (N, D), one after the other.
            width: D.
            scale: 127 / the largest number in any of them.
        """
        ids, codes = [np.empty(0, np.int64)], [np.empty((0, width), np.int8)]
        for some, vectors in chunks:
            ids.append(some)
            codes.append(quantize(vectors, scale))
        self.ids, self.codes = np.concatenate(ids), np.concatenate(codes)


def quantize(vectors: np.ndarray, scale: float) -> np.ndarray:
    """(N, D) floats to int8 (N, D)."""
    return np.clip(np.rint(vectors.astype(np.float32) * scale), -127, 127).astype(np.int8)


class VectorIndex:
    """The closest vectors by id."""

    def __init__(self, codes: Callable[[], QuantizedVectors], fetch: Fetch, graph: Any = None) -> None:
        """
        Args:
            codes: of all vectors, worked out at the first scan.
            fetch: the vectors themselves, for the few that are measured.
            graph: of the same ids, `graph_of` opened it.
        """
        self._make, self.fetch, self.graph = codes, fetch, graph
        self._made: QuantizedVectors | None = None
        self._lock = Lock()

    @property
    def codes(self) -> QuantizedVectors:
        with self._lock:  # several threads search, one makes them
            if self._made is None:
                self._made = self._make()
            return self._made

    def search(self, query: np.ndarray, count: int, among: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Ids int64 (k,) and cosines float32 (k,), the best first; equal ones by their ids.

        Args:
            query: float32 (D,), L2-normalised.
            count: how many at most.
            among: ids, sorted, that alone may be found.
        """
        ids = self._candidates(query, max(4 * count, MIN_CANDIDATES), among)
        scores = self.fetch(ids).astype(np.float32) @ query
        best = np.lexsort((ids, -scores))[:count]
        return ids[best], scores[best]

    def _candidates(self, query: np.ndarray, wanted: int, among: np.ndarray | None) -> np.ndarray:
        code = np.rint(query * (127 / max(float(np.abs(query).max()), 1e-6))).astype(np.int8)  # at a scale of its own
        if among is not None and len(among) <= EXACT_BELOW:
            return among
        if among is None and self.graph is not None:
            return self.graph.search(code, wanted).keys.astype(np.int64)
        ids, codes = self.codes.ids, self.codes.codes
        rows = None if among is None else np.flatnonzero(np.isin(ids, among, assume_unique=True))
        if len(ids if rows is None else rows) <= wanted:
            return ids if rows is None else ids[rows]
        if rows is None:
            return ids[scan(codes, code, wanted, MetricKind.IP, exact=True).keys.astype(np.int64)]
        kept, far = [], []  # block by block: all that a filter lets through at once could be the whole matrix again
        for start in range(0, len(rows), CHUNK):
            some = rows[start : start + CHUNK]
            found = scan(codes[some], code, min(wanted, len(some)), MetricKind.IP, exact=True)
            kept.append(some[found.keys.astype(np.int64)])
            far.append(found.distances)
        best = np.argsort(np.concatenate(far), kind="stable")[:wanted]
        return ids[np.concatenate(kept)[best]]


# ---- the graph ------------------------------------------------------------------------------------------------------


def update_graph(folder: Path, ids: np.ndarray, fetch: Fetch, width: int, largest: float) -> None:
    """Bring the graph in a folder to these ids: what is new is added, what is gone is taken out.

    Args:
        folder: of `graph.usearch` and `graph.json`.
        ids: sorted int64 (N,).
        fetch: their vectors.
        width: D.
        largest: number in any vector; where it is far beyond what it was, the graph is grown anew.
    """
    file, about = folder / "graph.usearch", folder / "graph.json"
    graph = Index(ndim=width, metric=MetricKind.IP, dtype="i8")
    scale = 127 / largest
    if about.exists() and (before := json.loads(about.read_text())["scale"]) < 1.1 * scale:
        scale = before
        graph.load(str(file))
    held = np.sort(np.fromiter(graph.keys, np.int64, len(graph)))
    gone, new = np.setdiff1d(held, ids, assume_unique=True), np.setdiff1d(ids, held, assume_unique=True)
    if not len(gone) and not len(new):
        return
    if len(gone):
        graph.remove(gone)
    with tqdm(total=len(new), desc="graph", unit="picture") as bar:
        for start in range(0, len(new), CHUNK):
            some = new[start : start + CHUNK]
            graph.add(some, quantize(fetch(some), scale))
            bar.update(len(some))
    about.unlink(missing_ok=True)  # what is not described is not read
    graph.save(str(file.with_suffix(".part")))
    file.with_suffix(".part").replace(file)
    held_now = {"scale": scale, "count": len(ids), "last": int(ids[-1]), "sum": int(ids.sum())}
    atomic_write_text(about, json.dumps(held_now))


def open_graph(folder: Path, ids: np.ndarray) -> Any:
    """The graph in a folder, mapped and not read; None if there is none of these ids."""
    about = folder / "graph.json"
    if not about.exists():
        return None
    known = json.loads(about.read_text())
    if (known["count"], known["last"], known["sum"]) != (len(ids), int(ids[-1]) if len(ids) else 0, int(ids.sum())):
        return None
    return Index.restore(str(folder / "graph.usearch"), view=True)
