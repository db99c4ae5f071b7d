"""Tests of `search.vector_index`, and of how the SQLite backend keeps it up to date."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm2clip.models.dual_encoder import DualEncoder
from llm2clip.search import vector_index
from llm2clip.search.sqlite_backend import SqliteBackend
from llm2clip.search.vector_index import FetchVectors, QuantizedVectors, VectorIndex, open_graph, update_graph
from search_fixtures import index_sources, search_names

DIM = 64


def clustered_vectors(count: int, seed: int = 0) -> np.ndarray:
    """Return unit vectors float16 (count, DIM) in clusters, as embeddings are. Two dimensions are far larger."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(50, DIM)) * np.where(np.arange(DIM) < 2, 8, 1)
    vectors = centres[rng.integers(50, size=count)] + 0.3 * rng.normal(size=(count, DIM))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


@pytest.mark.parametrize("use_graph", [False, True])
def test_vector_index_matches_exact_float64_search(use_graph: bool, tmp_path: Path) -> None:
    vectors, ids = clustered_vectors(6000), np.arange(6000, dtype=np.int64) * 3 + 7
    vectors[5990:] = 0
    vectors[5990:, 3] = 1  # a value far larger than those in earlier vectors
    max_abs = float(np.abs(vectors).max())

    def fetch(some_ids: np.ndarray) -> np.ndarray:
        return vectors[(some_ids - 7) // 3]

    def quantize_all() -> QuantizedVectors:
        chunks = [(ids[:4000], vectors[:4000]), (ids[4000:], vectors[4000:])]
        return QuantizedVectors(127 / max_abs).with_added(chunks)

    graph = None
    if use_graph:
        for some_ids, some_max in ((ids[:5000], np.abs(vectors[:5000]).max()), (ids[10:], max_abs), (ids, max_abs)):
            update_graph(tmp_path, some_ids, fetch, DIM, float(some_max), threads=1)
            opened = open_graph(tmp_path)
            assert opened is not None
            graph, state = opened
            assert (state.count, state.last, state.sum) == (len(some_ids), some_ids[-1], some_ids.sum())
    index = VectorIndex(quantize_all, fetch, graph)

    missed = 0
    for query in [*clustered_vectors(40, seed=1).astype(np.float32), np.eye(DIM, dtype=np.float32)[3]]:
        result_ids, scores = index.search(query, 10)
        exact = vectors.astype(np.float64) @ query.astype(np.float64)
        best = np.argsort(-exact)[:10]
        if exact[best[-1]] < 1:  # otherwise more than ten vectors are equal
            missed += len(set(ids[best]) - set(result_ids))
        assert scores[0] == pytest.approx(exact.max(), abs=1e-5)
        assert scores == pytest.approx(exact[(result_ids - 7) // 3], abs=1e-5)
        assert (np.diff(scores) <= 0).all()
    assert missed <= (3 if use_graph else 0)  # of 400 results

    for allowed_ids in (ids[::100], ids[::2]):  # few are scored directly, many are scanned
        result_ids, _ = index.search(query, 10, allowed_ids)
        best = allowed_ids[np.argsort(-exact[(allowed_ids - 7) // 3])[:10]]
        assert set(result_ids) == set(best)
    result_ids, scores = index.search(query, 10, ids[:0])
    assert len(result_ids) == len(scores) == 0


def test_update_graph_adds_unreachable_vectors_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that add vectors at the same time can leave vectors that no search finds."""
    vectors = clustered_vectors(3000)
    ids = np.arange(3000, dtype=np.int64)
    add = vector_index._add_to_graph
    calls: list[tuple[list[int], int]] = []

    def add_without_some(graph: Any, some_ids: np.ndarray, fetch: FetchVectors, scale: float, threads: int) -> None:
        calls.append((some_ids.tolist(), threads))
        kept = some_ids if len(calls) > 1 else some_ids[some_ids % 1000 != 7]
        add(graph, kept, fetch, scale, threads)

    monkeypatch.setattr(vector_index, "_add_to_graph", add_without_some)
    update_graph(tmp_path, ids, vectors.__getitem__, DIM, float(np.abs(vectors).max()))
    assert calls[0] == (ids.tolist(), 0)
    assert {7, 1007, 2007} <= set(calls[1][0]) and calls[1][1] == 1
    opened = open_graph(tmp_path)
    assert opened is not None and len(opened[0]) == 3000
    # Vectors that are added again can very rarely hide others.
    assert len(vector_index._find_unreachable(opened[0], ids, vectors.__getitem__, opened[1].scale)) < 5


def test_open_graph_does_not_search_a_graph_that_misses_vectors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example, many equal vectors can separate a graph into parts."""
    vectors, ids = clustered_vectors(1000), np.arange(1000, dtype=np.int64)
    monkeypatch.setattr(vector_index, "_find_unreachable", lambda graph, ids, *others: ids[::50])
    update_graph(tmp_path, ids, vectors.__getitem__, DIM, float(np.abs(vectors).max()))
    assert "finds only 98.0% of the images" in capsys.readouterr().out
    assert open_graph(tmp_path) is None
    opened = open_graph(tmp_path, view=False)  # the next update continues with this graph
    assert opened is not None and opened[1].found == pytest.approx(0.98)


@pytest.mark.parametrize("damage", ["zeros", "truncated", "empty", "missing", "state"])
def test_sqlite_backend_scans_if_the_graph_is_damaged(
    damage: str, photos: Path, dual_encoder: DualEncoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After a power failure, parts of a file that had been renamed before may be lost."""
    folder = tmp_path / "index"
    writer = SqliteBackend(folder, write=True, approximate_above=3)
    index_sources([photos], dual_encoder, writer)
    graph_file = folder / "graph.usearch"
    data = graph_file.read_bytes()
    if damage == "state":
        (folder / "graph.json").write_bytes(bytes(50))
    elif damage == "missing":
        graph_file.unlink()
    else:
        start = len(data) // 2
        zeros = data[:start] + bytes(len(data) - start)
        graph_file.write_bytes({"zeros": zeros, "truncated": data[:start], "empty": b""}[damage])
    capsys.readouterr()
    reader = SqliteBackend(folder)
    for _ in range(2):
        assert len(search_names(reader)) == 7
    writer.remove([str(photos / "1.png")])
    assert len(search_names(reader)) == 6
    assert capsys.readouterr().out.count("run `llm2clip index` again") == 1
    assert reader._get_current_vector_index().graph is None

    index_sources([photos], dual_encoder, writer)
    assert len(search_names(reader)) == 7
    assert reader._get_current_vector_index().graph is not None


def test_sqlite_backend_reloads_vectors_and_graph_after_a_write(
    photos: Path, dual_encoder: DualEncoder, tmp_path: Path
) -> None:
    folder = tmp_path / "index"
    graph_state = folder / "graph.json"
    writer, reader = (SqliteBackend(folder, write=True, approximate_above=3) for _ in range(2))
    index_sources([photos / "sub"], dual_encoder, writer)
    assert search_names(reader) == {"5.png", "copy.png"}
    assert not graph_state.exists()
    index_sources([photos], dual_encoder, writer)
    assert graph_state.exists()
    assert len(search_names(reader)) == 7
    graph_state.rename(tmp_path / "graph.json")
    assert reader._get_current_vector_index().graph is None
    (tmp_path / "graph.json").rename(graph_state)  # a graph that is written after the vectors is used
    assert reader._get_current_vector_index().graph is not None


def test_sqlite_backend_keeps_vectors_when_nothing_changed(
    photos: Path, dual_encoder: DualEncoder, tmp_path: Path
) -> None:
    """Otherwise each update of `index --watch` would make a server load all vectors again."""
    folder = tmp_path / "index"
    writer, reader = (SqliteBackend(folder, write=True) for _ in range(2))
    index_sources([photos], dual_encoder, writer)
    search_names(reader)
    first = reader._get_current_vector_index()
    index_sources([photos], dual_encoder, SqliteBackend(folder, write=True))  # a new writer looks for orphans once
    search_names(reader)
    second = reader._get_current_vector_index()
    index_sources([photos], dual_encoder, writer)
    assert reader._get_current_vector_index() is second is not None
    assert first is not None
