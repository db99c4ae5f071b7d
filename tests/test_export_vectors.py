"""Tests of `export --to vectors`, and of the examples in docs/howto/export.md that fill other vector databases."""

import json
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from llm2clip.cli import main
from llm2clip.models.dual_encoder import DualEncoder
from llm2clip.search import export_vectors as module
from llm2clip.search.backends import IndexBackend
from llm2clip.search.index import Index
from llm2clip.search.metadata import Filter
from postgres_fixtures import get_postgres_server
from search_fixtures import BACKENDS, create_backend, get_location, index_sources, make_index

PAGE = Path(__file__).parent.parent / "docs/howto/export.md"
SECTION = PAGE.read_text().partition("## Fill another vector database\n")[2].partition("\n## ")[0]
READ, *SNIPPETS = re.findall(r"^```python\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL)


def export(location: str, out: Path, *options: str) -> pa.Table:
    assert main(["export", "--to", "vectors", "--index", location, "--out", str(out), *options]) == 0
    return parquet.read_table(out)


@pytest.mark.parametrize("kind", BACKENDS)
def test_export_contains_all_images_with_their_vectors_and_metadata(
    kind: str, photos: Path, dual_encoder: DualEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = create_backend(kind, tmp_path / "index")
    index_sources([photos], dual_encoder, backend)
    removed = photos / "1.png"
    removed.unlink()
    index_sources([photos], dual_encoder, backend)  # leaves a gap between the ids
    monkeypatch.setattr(module, "ROWS_PER_GROUP", 2)
    table = export(get_location(kind, tmp_path / "index"), tmp_path / "new/photos.parquet", "--gps")
    assert parquet.ParquetFile(tmp_path / "new/photos.parquet").num_row_groups == 3
    assert table.schema.field("vector").type == pa.list_(pa.float32(), 16)
    assert json.loads(table.schema.metadata[b"llm2clip"]) == backend.read_metadata()
    rows = {str(row["id"]): row for row in table.to_pylist()}
    hits = backend.search(None, 100, Filter())
    assert len(table) == len(rows) == len(hits) == 5
    for hit in hits:
        row, image = rows[hit.id], hit.images[0]
        np.testing.assert_array_equal(np.float32(row["vector"]), backend.read_vector(hit.id))
        assert (row["name"], row["names"]) == (image.name, [image.name for image in hit.images])
        assert (row["captions"], row["text"]) == (list(image.captions), hit.text)
        for name in ("taken", "camera", "latitude", "longitude"):
            assert row[name] == getattr(image, name)
        assert (row["width"], row["height"]) == (hit.width, hit.height)


def test_export_omits_positions_by_default_and_keeps_existing_files(
    photos: Path, dual_encoder: DualEncoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_index(tmp_path / "index", photos, dual_encoder)
    out = tmp_path / "photos.parquet"
    table = export(str(tmp_path / "index"), out)
    assert {"latitude", "longitude"}.isdisjoint(table.column_names) and "camera" in table.column_names
    assert "Exported: " in capsys.readouterr().out
    arguments = ["export", "--to", "vectors", "--index", str(tmp_path / "index"), "--out"]
    before = out.read_bytes()
    assert main([*arguments, str(out)]) != 0
    assert "already exists. Choose another file" in capsys.readouterr().err and out.read_bytes() == before


def test_interrupted_export_leaves_no_file(
    photos: Path, dual_encoder: DualEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_index(tmp_path / "index", photos, dual_encoder)
    (tmp_path / "out").mkdir()
    read: Callable[..., Any] = IndexBackend.read_hits
    monkeypatch.setattr(module, "ROWS_PER_GROUP", 2)
    monkeypatch.setattr(IndexBackend, "read_hits", lambda self, ids: read(self, ids) if "1" in ids else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        module.export_vectors(str(tmp_path / "index"), tmp_path / "out/photos.parquet")
    assert list((tmp_path / "out").iterdir()) == []


def test_export_fails_if_the_index_is_replaced(
    photos: Path, dual_encoder: DualEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_index(tmp_path / "index", photos, dual_encoder)
    make_index(tmp_path / "new", photos, dual_encoder)
    read: Callable[..., Any] = IndexBackend.read_hits

    def replace_and_read(backend: IndexBackend, ids: list[str]) -> Any:
        for file in (tmp_path / "new").glob("index.sqlite*"):
            file.replace(tmp_path / "index" / file.name)
        return read(backend, ids)

    monkeypatch.setattr(IndexBackend, "read_hits", replace_and_read)
    with pytest.raises(OSError, match="was replaced during the export"):
        module.export_vectors(str(tmp_path / "index"), tmp_path / "photos.parquet")
    assert not (tmp_path / "photos.parquet").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "vectors"], "--to vectors requires --index INDEX"),
        (["--to", "vectors", "--index", "missing"], "missing is not an index"),
        (["MODEL", "--to", "vectors", "--index", "x"], "MODEL cannot be used with --to vectors"),
        (["--to", "vectors", "--index", "x", "--dim", "8"], "--dim cannot be used with --to vectors"),
        (["--to", "onnx"], "--to onnx requires a model: llm2clip export MODEL --to onnx --out FOLDER"),
    ],
)
def test_export_explains_wrong_arguments(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", *arguments, "--out", str(tmp_path / "out")]) != 0
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("snippet", SNIPPETS, ids=[re.findall(r"(?:import|from) (\w+)", code)[0] for code in SNIPPETS])
def test_documented_examples_find_the_hits_of_the_index(
    snippet: str,
    image_folder: Path,
    dual_encoder: DualEncoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (package, *_) = re.findall(r"(?:import|from) (\w+)", snippet)
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    backend = make_index(tmp_path / "INDEX", image_folder, dual_encoder)
    export(str(tmp_path / "INDEX"), tmp_path / "photos.parquet")
    monkeypatch.chdir(tmp_path)
    if package == "psycopg":
        snippet = snippet.replace("postgresql://USER@HOST/DATABASE", create_database())
    values: dict[str, Any] = {}
    exec(READ + snippet, values)
    query = values["query"]
    expected = [int(hit.id) for hit in backend.search(query, 5, Filter())]
    np.testing.assert_allclose(query, Index(backend, dual_encoder).embed("a market with piles of oranges").combined)
    assert np.ravel(values["nearest"]).tolist() == expected
    if package == "psycopg":
        values["database"].close()


def create_database() -> str:
    """Create a database with pgvector, and return its URL."""
    import psycopg

    server = f"postgresql://postgres@127.0.0.1:{get_postgres_server().port}"
    with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
        connection.execute("CREATE DATABASE vectors")
    with psycopg.connect(f"{server}/vectors", autocommit=True) as connection:
        connection.execute("CREATE EXTENSION vector")
    return f"{server}/vectors"


def test_documentation_has_an_example_for_each_database() -> None:
    assert len(SNIPPETS) == 4
    for snippet in SNIPPETS:
        statements = snippet.partition("\n\n")[2].splitlines()
        assert len(statements) == 4
