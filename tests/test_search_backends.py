"""Tests of what is specific to the index backends: storage, transactions, format versions."""

import os
import re
import sqlite3
import stat
from pathlib import Path

import numpy as np
import pytest

from llm2clip.data.image_refs import FileImage, ImageRef, ParquetImage, TarImage
from llm2clip.models.dual_encoder import DualEncoder
from llm2clip.runs.output_folder import FolderInUseError, FormatVersionError
from llm2clip.search.backends import open_backend
from llm2clip.search.sqlite_backend import SqliteBackend
from llm2clip.search.types import IndexedContent, IndexedImage, ref_from_json, ref_to_json
from search_fixtures import index_sources

# References as they are stored in an index: a class must keep its name there even if it is renamed.
STORED_REFS = (
    (FileImage("/a b"), '["FileImage", {"path": "/a b"}]'),
    (TarImage("/t.tar", 512, 9, "n"), '["TarImage", {"path": "/t.tar", "offset": 512, "size": 9, "name": "n"}]'),
    (
        ParquetImage("/p", 3, "image"),
        '["ParquetImage", {"path": "/p", "row": 3, "column": "image", "digest": ""}]',
    ),
)


@pytest.mark.parametrize(("ref", "text"), STORED_REFS)
def test_ref_to_json_matches_the_stored_form(ref: ImageRef, text: str) -> None:
    assert ref_to_json(ref) == text
    assert ref_from_json(text) == ref


def test_ref_from_json_rejects_unknown_types() -> None:
    with pytest.raises(ValueError, match="unknown image reference type"):
        ref_from_json('["Popen", {}]')


@pytest.mark.parametrize("version", [1, 99])
def test_sqlite_backend_rejects_other_format_versions(version: int, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "index.sqlite") as db:
        db.execute(f"PRAGMA user_version = {version}")
    db.close()
    for write in (False, True):
        with pytest.raises(FormatVersionError, match=rf"format version {version}, but.* version 2.*`llm2clip index`"):
            SqliteBackend(tmp_path, write)


def test_sqlite_backend_adds_a_batch_completely_or_not_at_all(tmp_path: Path) -> None:
    backend = SqliteBackend(tmp_path, write=True)
    content = IndexedContent(b"a", np.zeros(4, np.float16), b"jpeg", width=1, height=1)
    valid = IndexedImage("a", FileImage("a"), "s", "1")
    without_content = IndexedImage("b", FileImage("b"), "s", "1")
    with pytest.raises(OSError, match=r"index\.sqlite"):
        backend.add([content], [(valid, b"a"), (without_content, b"b")])
    assert backend.count() == (0, 0)


def test_sqlite_backend_creates_private_files(photos: Path, dual_encoder: DualEncoder, tmp_path: Path) -> None:
    folder, mask = tmp_path / "index", os.umask(0o022)
    try:
        backend = SqliteBackend(folder, write=True, approximate_above=3)
        index_sources([photos], dual_encoder, backend)
        modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir() if file.name != ".lock"}
        assert modes.pop("graph.usearch") == modes.pop("graph.json") == modes.pop("index.sqlite") == 0o600
        assert set(modes.values()) <= {0o600}
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700

        folder.chmod(0o755)  # an existing index stays as it is
        (folder / "index.sqlite").chmod(0o644)
        (photos / "1.png").unlink()
        index_sources([photos], dual_encoder, SqliteBackend(folder, write=True, approximate_above=3))
        assert stat.S_IMODE(folder.stat().st_mode) == 0o755
        for name in ("graph.usearch", "graph.json", "index.sqlite"):
            assert stat.S_IMODE((folder / name).stat().st_mode) == 0o644
    finally:
        os.umask(mask)


def test_build_index_raises_while_another_run_writes(photos: Path, dual_encoder: DualEncoder, tmp_path: Path) -> None:
    first, second = (SqliteBackend(tmp_path / "index", write=True) for _ in range(2))
    with first.lock(), pytest.raises(FolderInUseError, match="another run is writing to"):
        index_sources([photos], dual_encoder, second)
    assert index_sources([photos], dual_encoder, second).added == 7


@pytest.mark.parametrize("scheme", ["http", "other+http", "mysql"])
def test_open_backend_rejects_unknown_schemes(scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = rf"unknown index backend '{re.escape(scheme)}'.*local folder or a PostgreSQL.*--out postgres"
    for write in (False, True):
        with pytest.raises(ValueError, match=message):
            open_backend(f"{scheme}://user:secret@h:6333/photos", write)
    assert not list(tmp_path.iterdir())


def test_indexed_image_container_is_the_file_that_contains_it() -> None:
    for ref, name, container in (
        (FileImage("/p/a.jpg"), "/p/a.jpg", "/p/a.jpg"),
        (TarImage("/p/t.tar", 512, 9, "a.png"), "/p/t.tar!a.png", "/p/t.tar"),
        (TarImage("/p/t.tar", 2048, 9, "a.png"), "/p/t.tar!a.png@2048", "/p/t.tar"),
        (ParquetImage("/p/t.parquet", 3, "image"), "/p/t.parquet[3].image", "/p/t.parquet"),
    ):
        assert IndexedImage(name, ref, "/p", "1").container == container
