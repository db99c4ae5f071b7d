"""Tests of building, updating and filtering an index, on generated images and a random model."""

import dataclasses
import gc
import io
import json
import os
import re
import shutil
import signal
import sqlite3
import stat
import sys
import tarfile
from datetime import datetime
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from conftest import run_in_process
from llm2clip.cli import main
from llm2clip.data.image_refs import FileImage, ImageRef, ParquetImage, TarImage
from llm2clip.data.skip_log import SkipLog
from llm2clip.models.dual_encoder import DualEncoder
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.runs.output_folder import FolderInUseError, FormatVersionError
from llm2clip.search import sqlite_backend
from llm2clip.search.backends import open_backend
from llm2clip.search.metadata import Filter
from llm2clip.search.query import QueryEncoder, SearchQuery
from llm2clip.search.sqlite_backend import QuantizedVectors, SqliteBackend
from llm2clip.search.types import (
    IndexedContent,
    IndexedImage,
    IndexUnavailableError,
    parse_image_ref,
    serialize_image_ref,
)
from search_fixtures import BACKENDS, create_backend, index_sources, search_names

QUERY = np.eye(16, dtype=np.float32)[0]


# ---- updates --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BACKENDS)
def test_build_index_handles_new_changed_moved_and_deleted_images(
    kind: str, photos: Path, dual_encoder: DualEncoder, tmp_path: Path
) -> None:
    backend, log = create_backend(kind, tmp_path / "index"), SkipLog(tmp_path / "skipped.jsonl", 1.0)
    report = index_sources([photos], dual_encoder, backend, log=log)
    assert (report.added, report.embedded, report.changed, report.removed) == (7, 6, 0, 0)
    assert backend.count_images() == (7, 6)
    duplicates = [[Path(name).name for name in group] for group in backend.find_duplicates()]
    assert duplicates == [["5.png", "copy.png"]]
    skipped = [json.loads(line)["file"] for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert {Path(file).name for file in skipped} == {"bad.jpg", "half.png"}

    report = index_sources([photos], dual_encoder, backend)
    assert not report and report.embedded == 0

    (photos / "sub/5.png").rename(photos / "moved.png")  # the same content under another name
    (photos / "1.png").unlink()
    shutil.copy(photos / "2.png", photos / "3.png")  # other content under an existing name
    os.utime(photos / "3.png", (1, 1))
    (photos / "0.png").write_bytes(b"no longer an image")
    report = index_sources([photos], dual_encoder, backend)
    assert (report.added, report.embedded, report.changed, report.removed) == (1, 0, 1, 3)
    assert search_names(backend) == {"2.png", "3.png", "copy.png", "moved.png", "old.jpg"}
    assert backend.count_images() == (5, 3)

    (photos / "2.txt").write_text("a caption that was added later\n")
    report = index_sources([photos], dual_encoder, backend)
    assert (report.added, report.embedded, report.changed, report.removed) == (0, 0, 1, 0)
    assert search_names(backend, Filter(caption="added later")) == {"2.png", "3.png"}  # they share one content


def test_build_index_rejects_another_model(
    photos: Path, dual_encoder: DualEncoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from llm2clip.search.server import create_app

    backend = SqliteBackend(tmp_path / "index", write=True)
    index_sources([photos], dual_encoder, backend)
    other_weights = {"image_fingerprint": "0", "text_fingerprint": "0"}
    backend.initialize({"model": dual_encoder.name, "embed_dim": 16, **other_weights})
    with pytest.raises(ValueError, match="built with a different model"):
        index_sources([photos], dual_encoder, backend)
    assert main(["search", str(tmp_path / "index"), "a"]) == 1
    assert "built with a different model" in capsys.readouterr().err
    with pytest.raises(ValueError, match="built with a different model"):
        create_app(dual_encoder, backend)


def test_open_index_switches_to_a_new_index_at_the_same_path(
    photos: Path, image_folder: Path, dual_encoder: DualEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = tmp_path / "index"
    index_sources([photos], dual_encoder, SqliteBackend(index, write=True))
    reader = SqliteBackend(index)
    old = search_names(reader)
    vectors = reader._get_quantized_vectors()

    new = SqliteBackend(tmp_path / "new", write=True)
    index_sources([image_folder], dual_encoder, new)
    expected, counts = search_names(new), new.count_images()
    index.rename(tmp_path / "old")  # the path does not exist for a moment
    assert search_names(reader) == search_names(reader, Filter(path=str(photos))) == old
    assert reader.search(QUERY, 3, Filter(), words=["1.png"])[0].matched == ("name",)
    assert reader._get_quantized_vectors() is vectors
    reader._vectors = None
    assert len(reader._get_quantized_vectors()) == len(vectors)
    (tmp_path / "new").rename(index)
    assert search_names(reader) == expected != old
    assert reader.count_images() == counts

    other = SqliteBackend(tmp_path / "other", write=True)
    index_sources([photos], dual_encoder, other)
    other.initialize({**other.read_metadata(), "fingerprint": "0"})
    index.rename(tmp_path / "old2")
    (tmp_path / "other").rename(index)
    connections: list[sqlite3.Connection] = []
    connect = reader._db._connect
    monkeypatch.setattr(reader._db, "_connect", lambda: connections.append(connect()) or connections[-1])
    for image_filter in (Filter(), Filter(min_side=1)):
        with pytest.raises(IndexUnavailableError, match="replaced with an index of a different model"):
            search_names(reader, image_filter)
    for connection in connections:
        with pytest.raises(sqlite3.ProgrammingError, match="closed database"):
            connection.execute("SELECT 1")


def test_open_index_is_used_until_the_index_that_replaces_it_has_a_model(
    photos: Path, image_folder: Path, dual_encoder: DualEncoder, tmp_path: Path
) -> None:
    index = tmp_path / "index"
    index_sources([photos], dual_encoder, SqliteBackend(index, write=True))
    gc.collect()  # closes the writer
    reader = SqliteBackend(index)
    old = search_names(reader)

    def check_old_index() -> None:
        reader._cache.clear()
        assert search_names(reader) == search_names(reader, Filter(path=str(photos))) == old

    shutil.rmtree(index)
    check_old_index()
    index.mkdir()
    (index / "index.sqlite").touch()
    check_old_index()
    new = SqliteBackend(index, write=True)
    check_old_index()
    index_sources([image_folder], dual_encoder, new)
    assert search_names(reader) == search_names(new) != old


def test_index_that_was_replaced_with_a_newer_format_is_not_read(tmp_path: Path) -> None:
    for name in ("index", "newer"):
        SqliteBackend(tmp_path / name, write=True).initialize({"model": "m", "fingerprint": "f", "embed_dim": 4})
    reader = SqliteBackend(tmp_path / "index")
    gc.collect()  # closes the writers
    with sqlite3.connect(tmp_path / "newer/index.sqlite") as db:
        db.execute("ALTER TABLE contents RENAME TO renamed")
        db.execute("PRAGMA user_version = 99")
    db.close()
    shutil.rmtree(tmp_path / "index")
    (tmp_path / "newer").rename(tmp_path / "index")
    with pytest.raises(IndexUnavailableError, match="replaced with an index of a different model or format"):
        reader.count_images()


def test_vectors_stay_in_memory_if_new_ones_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = SqliteBackend(tmp_path, write=True)
    backend.initialize({"model": "m", "embed_dim": 4})
    read, starts = sqlite_backend._read_vector_chunks, []

    def add(number: int) -> None:
        content = IndexedContent(b"%d" % number, np.full(4, 0.5, np.float16), b"")
        backend.add_images([content], [(IndexedImage(f"{number}", FileImage("/a"), "s", "1"), content.hash)])

    def failing_read(db: sqlite3.Connection, last_id: int) -> Any:
        starts.append(last_id)
        if len(starts) == 1:
            raise sqlite3.OperationalError("disk I/O error")
        return read(db, last_id)

    add(1)
    backend._get_quantized_vectors()
    monkeypatch.setattr(sqlite_backend, "_read_vector_chunks", failing_read)
    add(2)
    with pytest.raises(IndexUnavailableError, match="disk I/O error"):
        backend._get_quantized_vectors()
    assert len(backend._get_quantized_vectors()) == 2
    assert starts == [1, 1]  # only the second vector is read


def test_index_on_a_read_only_disk(
    photos: Path, dual_encoder: DualEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index_sources([photos], dual_encoder, SqliteBackend(tmp_path / "index", write=True))
    gc.collect()  # closes the writer
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=os.ST_RDONLY))
    reader = SqliteBackend(tmp_path / "index")
    assert len(search_names(reader)) == reader.count_images()[0] > 0
    assert [file.name for file in (tmp_path / "index").iterdir() if file.name.startswith("index.sqlite")] == [
        "index.sqlite"  # SQLite has created no other files, which would fail on a read-only disk
    ]
    (photos / "3.png").unlink()  # and another machine updates the index
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=0))
        index_sources([photos], dual_encoder, SqliteBackend(tmp_path / "index", write=True))
        gc.collect()
        expected = search_names(SqliteBackend(tmp_path / "index"))
        gc.collect()
    assert search_names(reader) == expected


def test_build_index_keeps_images_after_a_read_error(
    photos: Path, dual_encoder: DualEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = SqliteBackend(tmp_path / "index", write=True)
    index_sources([photos], dual_encoder, backend)
    open_image = FileImage.open

    def failing_open(ref: FileImage) -> Any:
        if ref.path.endswith("2.png"):
            raise OSError(5, "Input/output error")
        return open_image(ref)

    with monkeypatch.context() as patch:
        patch.setattr(FileImage, "open", failing_open)
        assert not index_sources([photos], dual_encoder, backend)
    assert backend.count_images() == (7, 6)

    (photos / "3.png").write_bytes((photos / "3.png").read_bytes()[:300])  # only its header can be read
    assert index_sources([photos], dual_encoder, backend).removed == 1
    assert backend.count_images() == (6, 5)


def test_build_index_removes_images_that_are_no_longer_listed(
    photos: Path, dual_encoder: DualEncoder, tmp_path: Path
) -> None:
    backend, source = SqliteBackend(tmp_path / "index", write=True), tmp_path / "list.jsonl"
    rows = [json.dumps({"image": str(photos / f"{n}.png"), "caption": "x"}) for n in (1, 2)]
    source.write_text("\n".join(rows))
    index_sources([source], dual_encoder, backend)
    source.write_text(rows[0])
    assert index_sources([source], dual_encoder, backend).removed == 1  # although the file still exists


def test_build_index_requires_prune_for_missing_sources(
    image_folder: Path, dual_encoder: DualEncoder, tmp_path: Path
) -> None:
    backend, photos = SqliteBackend(tmp_path / "index", write=True), tmp_path / "photos"
    (photos / "sub").mkdir(parents=True)
    shutil.copy(image_folder / "1.png", photos)
    shutil.copy(image_folder / "2.png", photos / "sub")
    index_sources([photos], dual_encoder, backend)
    index_sources([photos / "sub"], dual_encoder, backend)
    (photos / "sub/2.png").unlink()
    with pytest.raises(FileNotFoundError, match="--prune"):
        index_sources([photos / "sub"], dual_encoder, backend)
    assert backend.count_images() == (2, 2)
    assert index_sources([photos], dual_encoder, backend).removed == 1
    shutil.rmtree(photos)
    assert index_sources([photos], dual_encoder, backend, prune=True).removed == 1
    assert backend.count_images() == (0, 0)
    assert backend.search(QUERY, 3, Filter()) == []


def test_build_index_requires_prune_to_remove_many_images(
    photos: Path, image_folder: Path, dual_encoder: DualEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is mounted in a folder of a source may be disconnected. Its folder is then empty."""
    monkeypatch.setattr("llm2clip.search.build.MAX_DELETED", 1)
    backend = SqliteBackend(tmp_path / "index", write=True)
    index_sources([photos], dual_encoder, backend)
    for file in (photos / "sub").iterdir():
        file.rename(tmp_path / file.name)
    shutil.copy(image_folder / "9.png", photos)
    with pytest.raises(ValueError, match=r"2 of 7 indexed images no longer exist, for example .*--prune"):
        index_sources([photos], dual_encoder, backend)
    assert backend.count_images() == (8, 7)  # the new image was added
    assert index_sources([photos], dual_encoder, backend, prune=True).removed == 2
    (photos / "9.png").unlink()
    assert index_sources([photos], dual_encoder, backend).removed == 1  # few images may be removed without --prune


def test_build_index_resumes_after_kill_at_any_moment(photos: Path, dual_encoder: DualEncoder, tmp_path: Path) -> None:
    """SIGKILL in a transaction, and after all images have been added."""
    batches = []

    class RecordingBackend(SqliteBackend):
        def add_images(self, *batch: Any) -> None:
            batches.append(batch)
            super().add_images(*batch)

    complete = RecordingBackend(tmp_path / "complete", write=True)
    index_sources([photos], dual_encoder, complete, batch_size=2)
    metadata = complete.read_metadata()
    for moment, call, committed in (("get_column_values", 4, 2), ("finish_indexing", 1, 6)):
        exit_code = run_in_process(_add_until_killed, tmp_path / moment, metadata, batches, moment, call)
        assert exit_code == -signal.SIGKILL
        backend = SqliteBackend(tmp_path / moment, write=True)
        assert backend._db.query("PRAGMA integrity_check") == [("ok",)]
        assert backend.count_images()[1] == committed
        index_sources([photos], dual_encoder, backend, batch_size=2)
        assert backend.count_images() == (7, 6)
        assert len(search_names(backend)) == 7


def _add_until_killed(folder: Path, metadata: dict[str, Any], batches: list[Any], moment: str, call: int) -> None:
    """Add images to an index, and kill this process at a call of a function."""
    owners = {"get_column_values": sqlite_backend, "finish_indexing": SqliteBackend}
    function = getattr(owners[moment], moment)
    calls = count(1)

    def kill(*args: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)

    setattr(owners[moment], moment, kill)
    backend = SqliteBackend(folder, write=True)
    backend.initialize(metadata)
    for batch in batches:
        backend.add_images(*batch)
    backend.finish_indexing()


# ---- sources --------------------------------------------------------------------------------------------------------


def test_build_index_reads_everything_in_a_folder(
    image_folder: Path, dual_encoder: DualEncoder, tmp_path: Path
) -> None:
    """Images, tars and caption files may be mixed. Two rows of the same image are merged."""
    photos = tmp_path / "photos"
    (photos / "old").mkdir(parents=True)
    for n in (1, 2):
        shutil.copy(image_folder / f"{n}.png", photos)
    with tarfile.open(photos / "old/some.tar", "w") as tar:
        tar.add(image_folder / "3.png", "3.png")
    rows = [
        {"image": "1.png", "caption": "one"},
        {"image": "1.png", "caption": "the same"},
        {"image": "missing.png"},
    ]
    (photos / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    backend = SqliteBackend(tmp_path / "index", write=True)
    assert index_sources([photos], dual_encoder, backend).added == 3
    assert search_names(backend, Filter(caption="one")) == {"1.png"}
    assert search_names(backend, Filter(caption="THE same")) == {"1.png"}
    (photos / "old/some.tar").unlink()
    index_sources([photos / "old", photos], dual_encoder, backend, prune=True)
    assert search_names(backend) == {"1.png", "2.png"}


def test_build_index_reads_tars_and_parquet(image_folder: Path, dual_encoder: DualEncoder, tmp_path: Path) -> None:
    tar_file, parquet_file = tmp_path / "some.tar", tmp_path / "some.parquet"
    with tarfile.open(tar_file, "w") as tar:
        tar.add(image_folder / "1.png", "a/1.png")
        tar.add(image_folder / "2.png", "a/2.png")
    write_parquet(parquet_file, [image_folder / "2.png"])
    backend = SqliteBackend(tmp_path / "index", write=True)
    report = index_sources([tar_file, parquet_file], dual_encoder, backend)
    assert (report.added, report.embedded) == (3, 2)
    assert search_names(backend, Filter(path=str(tar_file))) == {"1.png", "2.png", "some.parquet[0].image"}
    ((first, second),) = backend.find_duplicates()
    assert first.endswith("some.parquet[0].image") and second.endswith("some.tar!a/2.png")
    index_sources([tar_file], dual_encoder, backend)
    assert backend.count_images() == (3, 2)  # images of other sources stay


def test_build_index_distinguishes_tar_members_of_the_same_name(
    image_folder: Path, dual_encoder: DualEncoder, tmp_path: Path
) -> None:
    tar_file = tmp_path / "some.tar"
    with tarfile.open(tar_file, "w") as tar:
        for n, name in ((1, "a.png"), (2, "b.png"), (3, "a.png")):
            tar.add(image_folder / f"{n}.png", name)
    backend = SqliteBackend(tmp_path / "index", write=True)
    assert index_sources([tar_file], dual_encoder, backend).added == 3
    assert not index_sources([tar_file], dual_encoder, backend)
    assert len(search_names(backend, Filter(path=str(tar_file)))) == 3


def test_build_index_updates_a_rewritten_parquet_file(
    image_folder: Path, dual_encoder: DualEncoder, tmp_path: Path
) -> None:
    backend, file = SqliteBackend(tmp_path / "index", write=True), tmp_path / "some.parquet"
    write_parquet(file, [image_folder / "1.png"])
    index_sources([file], dual_encoder, backend)
    write_parquet(file, [image_folder / "2.png", image_folder / "3.png"])
    assert index_sources([file], dual_encoder, backend).changed == 1
    query = QueryEncoder(dual_encoder).embed_images([image_folder / "2.png"])[0]
    hit = backend.search(query, 1, Filter())[0]
    assert hit.score == pytest.approx(1, abs=2e-3)
    assert hit.images[0].name.endswith("[0].image")


def test_build_index_keeps_other_splits_of_a_file(
    image_folder: Path, dual_encoder: DualEncoder, tmp_path: Path
) -> None:
    backend, file = SqliteBackend(tmp_path / "index", write=True), image_folder / "captions.jsonl"
    train = index_sources([Path(f"{file}@train")], dual_encoder, backend).added
    report = index_sources([Path(f"{file}@val")], dual_encoder, backend)
    assert (report.added, report.removed) == (6, 0)
    assert backend.count_images() == (train + 6, train + 6)


# ---- unusual images -------------------------------------------------------------------------------------------------


def test_build_index_handles_invalid_unicode_names_and_rotated_images(
    image_folder: Path, dual_encoder: DualEncoder, tmp_path: Path
) -> None:
    photos, log = tmp_path / "photos", SkipLog(tmp_path / "skipped.jsonl", 1.0)
    photos.mkdir()
    shutil.copy(image_folder / "1.png", photos / os.fsdecode(b"caf\xe9.png"))  # not UTF-8
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotated by 90 degrees
    exif.get_ifd(0x8769)[0x9003] = "2002:03:04 05:06:07"
    Image.open(image_folder / "2.png").convert("RGB").save(photos / "rotated.jpg", exif=exif)
    (photos / "camera.cr2").write_bytes(b"an unsupported format")
    backend = SqliteBackend(tmp_path / "index", write=True)
    index_sources([photos], dual_encoder, backend, log=log)
    assert search_names(backend) == {r"caf\udce9.png", "rotated.jpg"}
    assert log.skipped == {"unsupported image format": 1}
    assert not index_sources([photos], dual_encoder, backend)

    hits = {Path(hit.images[0].name).name: hit for hit in backend.search(QUERY, 9, Filter())}
    rotated = hits["rotated.jpg"]
    thumbnail = Image.open(io.BytesIO(backend.read_thumbnail(rotated.id) or b""))
    assert (rotated.width, rotated.height) == thumbnail.size == (40, 48)
    assert rotated.images[0].taken == datetime(2002, 3, 4, 5, 6, 7).timestamp()
    assert hits[r"caf\udce9.png"].images[0].ref.read() == (image_folder / "1.png").read_bytes()


def test_build_index_skips_images_with_a_vector_that_is_not_finite(
    image_folder: Path, dual_encoder: DualEncoder, tmp_path: Path
) -> None:
    photos, log = tmp_path / "photos", SkipLog(None, 1.0)
    photos.mkdir()
    shutil.copy(image_folder / "3.png", photos)
    broken = dataclasses.replace(
        dual_encoder, encode_images_raw=lambda images: torch.full((len(images), 16), torch.nan)
    )
    backend = SqliteBackend(tmp_path / "index", write=True)
    assert index_sources([photos], broken, backend, log=log).added == 0
    assert log.skipped["undecodable image"] == 1
    assert search_names(backend) == set()


# ---- search ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BACKENDS)
def test_search_matches_brute_force(kind: str, image_folder: Path, dual_encoder: DualEncoder, tmp_path: Path) -> None:
    backend = create_backend(kind, tmp_path / "index")
    index_sources([image_folder], dual_encoder, backend)
    query = QueryEncoder(dual_encoder).embed(SearchQuery(texts=["the middle is red"])).combined
    files = sorted(image_folder.glob("*.png"))
    cosines = LLM2CLIP.from_pretrained(dual_encoder.name).encode_image(files).numpy() @ query
    best = np.argsort(-cosines)[:5]
    hits = backend.search(query, 5, Filter())
    assert [Path(hit.images[0].name).name for hit in hits] == [files[i].name for i in best]
    assert [hit.score for hit in hits] == pytest.approx(cosines[best], abs=2e-3)

    vector = backend.read_vector(hits[0].id)
    assert vector is not None and vector @ query == pytest.approx(hits[0].score, abs=1e-3)
    assert (backend.read_thumbnail(hits[0].id) or b"").startswith(b"\xff\xd8")
    assert backend.read_images(hits[0].id) == hits[0].images
    for unknown_id in ("0", "99", "-1", "x", "../..", "9" * 30):
        assert backend.read_vector(unknown_id) is None
        assert backend.read_thumbnail(unknown_id) is None
        assert backend.read_images(unknown_id) == ()


@pytest.mark.parametrize("kind", BACKENDS)
def test_search_applies_filters(kind: str, photos: Path, dual_encoder: DualEncoder, tmp_path: Path) -> None:
    backend = create_backend(kind, tmp_path / "index")
    index_sources([photos], dual_encoder, backend)
    assert search_names(backend, Filter(path=str(photos / "sub"))) == {"5.png", "copy.png"}
    assert search_names(backend, Filter(path=str(photos / "su"))) == set()
    assert search_names(backend, Filter(path=str(photos / "1.png"))) == {"1.png"}
    for image_filter in (Filter(path=str(photos)), Filter(path=str(photos), after=1e9), Filter()):
        names = search_names(backend, image_filter)
        duplicates = int("copy.png" in names)
        assert backend.count_matches(image_filter) == len(names) - duplicates > 0
    assert search_names(backend, Filter(caption="roter ärmel")) == {"0.png"}
    assert search_names(backend, Filter(caption="%")) == set()
    assert search_names(backend, Filter(before=1e9)) == {"old.jpg"}
    assert search_names(backend, Filter(after=1e9, min_side=41)) == set()
    assert search_names(backend, Filter(min_side=41)) == {"old.jpg"}
    assert search_names(backend, Filter(), count=2) < search_names(backend)


@pytest.mark.parametrize("kind", BACKENDS)
def test_relative_paths_and_wildcards_match_in_every_folder(
    kind: str, photos: Path, dual_encoder: DualEncoder, tmp_path: Path
) -> None:
    backend = create_backend(kind, tmp_path / "index")
    index_sources([photos], dual_encoder, backend)
    for path in ("sub", f"{photos.name}/sub/", "*ub", "s?b/*.png", f"{photos}/s*"):
        assert search_names(backend, Filter(path=path)) == {"5.png", "copy.png"}
        assert backend.count_matches(Filter(path=path)) == 1
    for path in ("ub", "s", "[1].png", "1.PNG"):
        assert search_names(backend, Filter(path=path)) == set()


@pytest.mark.parametrize("kind", BACKENDS)
def test_path_filter_excludes_siblings_with_the_same_prefix(
    kind: str, image_folder: Path, dual_encoder: DualEncoder, tmp_path: Path
) -> None:
    """`!` and `[` separate a tar or a table from what is inside it, but also occur in other names."""
    backend, root = create_backend(kind, tmp_path / "index"), tmp_path / "p"
    for n, name in enumerate(("trip/a.png", "trip[2019]/b.png", "trip!/c.png", "trip[1].png")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(image_folder / f"{n}.png", root / name)
    with tarfile.open(root / "trip.tar", "w") as tar:
        tar.add(image_folder / "4.png", "4.png")
    assert index_sources([root], dual_encoder, backend).added == 5
    assert not index_sources([root / "trip"], dual_encoder, backend)
    names = {"trip": "a.png", "trip.tar": "trip.tar!4.png", "trip[2019]": "b.png"}
    for path, name in names.items():
        assert search_names(backend, Filter(path=str(root / path))) == {name}
        assert search_names(backend, Filter(path=path)) == search_names(backend, Filter(path=f"p/{path}")) == {name}
    assert search_names(backend, Filter(path="*.tar")) == {"trip.tar!4.png"}
    assert len(search_names(backend, Filter(path="/"))) == 5


@pytest.mark.parametrize("kind", BACKENDS)
def test_search_pages_follow_each_other(
    kind: str, image_folder: Path, dual_encoder: DualEncoder, tmp_path: Path
) -> None:
    """Without a query, the newest images come first. The times of duplicates outside the filter are ignored."""
    backend, root = create_backend(kind, tmp_path / "index"), tmp_path / "p"
    (root / "old").mkdir(parents=True)
    for n in range(6):
        shutil.copy(image_folder / f"{n}.png", root)
        os.utime(root / f"{n}.png", (100 * n, 100 * n))
    shutil.copy(image_folder / "1.png", root / "old/copy.png")
    os.utime(root / "old/copy.png", (450, 450))
    index_sources([root], dual_encoder, backend)

    def newest(image_filter: Filter, count: int = 9, offset: int = 0) -> list[str]:
        hits = backend.search(None, count, image_filter, offset)
        assert {hit.score for hit in hits} <= {None}
        return [min(Path(image.name).name for image in hit.images) for hit in hits]

    folder = Filter(path=str(root))
    assert newest(folder) == ["5.png", "1.png", "4.png", "3.png", "2.png", "0.png"]
    expected = ["4.png", "3.png", "2.png", "1.png", "0.png"]
    assert newest(Filter(before=420)) == expected
    assert newest(Filter(before=420), 2, 1) == expected[1:3]
    assert newest(folder, 2, 5) == ["0.png"] and newest(folder, 2, 6) == []
    assert newest(Filter()) == newest(folder)
    assert [name for offset in range(7) for name in newest(Filter(), 1, offset)] == newest(folder)
    for image_filter in (Filter(), Filter(path=str(root), before=500)):
        ids = [hit.id for hit in backend.search(QUERY, 9, image_filter)]
        pages = [backend.search(QUERY, 2, image_filter, offset) for offset in range(0, 8, 2)]
        assert [hit.id for page in pages for hit in page] == ids and len(ids) == 6
    # One duplicate is in the folder, and the other one is older.
    assert search_names(backend, Filter(path=str(root / "old"), before=420)) == set()
    assert backend.count_matches(Filter(path=str(root / "old"), before=420)) == 0


@pytest.mark.parametrize("kind", BACKENDS)
def test_newest_images_are_found_without_reading_all_images(kind: str, tmp_path: Path) -> None:
    backend = create_backend(kind, tmp_path / "index")
    backend.initialize({"model": "m", "embed_dim": 4})
    contents = [IndexedContent(b"%d" % n, np.full(4, 0.5, np.float16), b"") for n in range(100)]
    times = [(n, n) for n in range(100)] + [(7, 200 + copy) for copy in range(9)]  # the newest image has copies
    images = [IndexedImage(f"{n} {time}", FileImage("/a"), "s", "1", taken=float(time)) for n, time in times]
    backend.add_images(contents, [(image, contents[n].hash) for image, (n, _) in zip(images, times, strict=True)])
    read: list[int] = []

    def find(run: Any) -> list[int]:
        def count_rows(statement: str, parameters: Any) -> Any:
            rows = run(statement, parameters)
            read.append(len(rows))
            return rows

        return backend._find_newest_without_filter(count_rows, 3, 1)

    expected = [hit.id for hit in backend.search(None, 3, Filter(before=1e9), 1)]
    assert [hit.id for hit in backend.search(None, 3, Filter(), 1)] == expected
    assert [str(content_id) for content_id in backend._run_with_read_access(find)] == expected
    assert read == [8, 32]
    if kind == "sqlite":
        plan = backend._query("EXPLAIN QUERY PLAN SELECT content FROM images ORDER BY taken DESC, content LIMIT 8", {})
        assert "USING INDEX images_taken" in str(plan)


def test_a_filter_is_evaluated_once_for_all_pages(
    photos: Path, dual_encoder: DualEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = SqliteBackend(tmp_path / "index", write=True)
    index_sources([photos], dual_encoder, backend)
    find, calls = backend._find_matching_ids, []
    monkeypatch.setattr(backend, "_find_matching_ids", lambda *args: calls.append(args) or find(*args))
    for offset in range(3):
        assert len(backend.search(None, 1, Filter(min_side=1), offset)) == 1
        assert backend.count_matches(Filter(min_side=1)) == 6
        assert len(backend.search(QUERY, 1, Filter(min_side=1), offset)) == 1
    assert len(calls) == 1


@pytest.mark.parametrize("kind", BACKENDS)
def test_hits_contain_only_some_of_many_locations(
    kind: str, image_folder: Path, dual_encoder: DualEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, root = create_backend(kind, tmp_path / "index"), tmp_path / "p"
    monkeypatch.setattr(sys.modules[type(backend).__module__], "MAX_LOCATIONS", 3)
    for n in range(6):
        (root / str(n)).mkdir(parents=True)
        shutil.copy(image_folder / "0.png", root / f"{n}/{n}.png")
    index_sources([root], dual_encoder, backend)
    query = np.eye(int(backend.read_metadata()["embed_dim"]), dtype=np.float32)[0]
    for folder, expected in ((root, ["0.png", "1.png", "2.png"]), (root / "5", ["5.png", "0.png", "1.png"])):
        [hit] = backend.search(query, 5, Filter(path=str(folder)))
        assert [Path(image.name).name for image in hit.images] == expected
        assert hit.image_count == 6
    assert len(backend.read_images(hit.id)) == 3


def write_parquet(file: Path, images: list[Path]) -> None:
    cells = pa.array([{"bytes": image.read_bytes(), "path": None} for image in images])
    pq.write_table(pa.table({"image": cells}), file)


# ---- vectors ---------------------------------------------------------------------------------------------------------


def clustered_vectors(count: int, seed: int = 0) -> np.ndarray:
    """Return unit vectors float16 (count, 64) in clusters, as embeddings are. Two dimensions are far larger."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(50, 64)) * np.where(np.arange(64) < 2, 8, 1)
    vectors = centres[rng.integers(50, size=count)] + 0.3 * rng.normal(size=(count, 64))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def test_sqlite_backend_ranks_as_an_exact_float64_search(tmp_path: Path) -> None:
    vectors = clustered_vectors(6000)
    vectors[5990:] = 0
    vectors[5990:, 3] = 1  # a value far larger than those in earlier vectors
    backend = SqliteBackend(tmp_path, write=True)
    backend.initialize({"model": "m", "embed_dim": 64})
    queries = [*clustered_vectors(40, seed=1).astype(np.float32), np.eye(64, dtype=np.float32)[3]]
    for start, end in ((0, 4000), (4000, 6000)):  # later vectors are added to those in memory
        contents = [IndexedContent(b"%d" % n, vectors[n], b"") for n in range(start, end)]
        images = [(IndexedImage(f"{n}", FileImage(f"{n}"), "s", "1"), b"%d" % n) for n in range(start, end)]
        backend.add_images(contents, images)
        for query in queries:
            exact = vectors[:end].astype(np.float64) @ query.astype(np.float64)
            ids, scores = backend._rank_nearest_vectors(query, 10, None)
            best = np.argsort(-exact)[:10]
            if exact[best[-1]] < 1:  # otherwise more than ten vectors are equal
                assert set(ids - 1) == set(best)
            assert scores[0] == pytest.approx(exact.max(), abs=1e-5)
            assert scores == pytest.approx(exact[ids - 1], abs=1e-5)
            assert (np.diff(scores) <= 0).all()
    for allowed_ids in (np.arange(1, 6001, 100), np.arange(1, 6001, 2)):  # few are scored directly, many are scanned
        ids, _ = backend._rank_nearest_vectors(queries[0], 10, allowed_ids)
        exact = vectors[allowed_ids - 1].astype(np.float64) @ queries[0]
        assert set(ids) == set(allowed_ids[np.argsort(-exact)[:10]])
    ids, scores = backend._rank_nearest_vectors(queries[0], 10, np.empty(0, np.int64))
    assert len(ids) == len(scores) == 0


def test_quantized_vectors_clip_values_and_find_only_allowed_ids() -> None:
    codes = sqlite_backend.quantize_to_int8(np.array([[2.0, -2.0, 0.5, 0.0]]), scale=100)
    assert codes.tolist() == [[127, -127, 50, 0]]
    ids, vectors = 3 * np.arange(1, 41), clustered_vectors(40)
    codes = sqlite_backend.quantize_to_int8(vectors, scale=127)
    quantized = QuantizedVectors(127.0, [(ids[:20], codes[:20]), (ids[20:], codes[20:])])
    allowed = ids[[0, 5, 18, 19, 20, 39]]  # including the first and the last id of each block
    query = vectors[7].astype(np.float32)
    assert set(quantized.find_nearest_ids(query, 10, allowed)) == set(allowed)
    assert set(quantized.with_only_ids(allowed).find_nearest_ids(query, 10)) == set(allowed)


@pytest.mark.parametrize("noise", [0.03, 0.0])
def test_sqlite_pages_of_near_equal_vectors_are_complete(tmp_path: Path, noise: float) -> None:
    """Frames of a scene whose differences are mostly smaller than the steps of int8 values, or equal frames."""
    rng = np.random.default_rng(0)
    vectors = np.array([1.0, *rng.normal(size=63) / 20]) + noise * rng.normal(size=(3000, 64)) / 8
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    backend = SqliteBackend(tmp_path, write=True)
    backend.initialize({"model": "m", "embed_dim": 64})
    backend.add_images([IndexedContent(b"%d" % n, vector, b"") for n, vector in enumerate(vectors)], [])
    query = rng.normal(size=64)
    query /= np.linalg.norm(query)
    pages = []
    for offset in range(0, 240, 20):
        pages.extend(backend._rank_nearest_vectors(query.astype(np.float32), offset + 20, None)[0][offset:].tolist())
    assert len(set(pages)) == 240
    best = np.argsort(-(vectors.astype(np.float64) @ query))[:150] + 1
    assert noise == 0 or set(best) <= set(pages)


@pytest.mark.parametrize("kind", [MemoryError, SystemError])
def test_ctrl_c_during_a_search_is_a_keyboard_interrupt(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_as_usearch(*_: object, **__: object) -> None:
        raise kind from KeyboardInterrupt()

    monkeypatch.setattr(sqlite_backend, "exact_search", fail_as_usearch)
    vectors = QuantizedVectors(127).with_added_vectors([(np.arange(1, 3), QUERY[None].repeat(2, 0))])
    with pytest.raises(KeyboardInterrupt):
        vectors.find_nearest_ids(QUERY, 1)


# ---- backends --------------------------------------------------------------------------------------------------------


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
def test_serialize_image_ref_matches_the_stored_form(ref: ImageRef, text: str) -> None:
    assert serialize_image_ref(ref) == text
    assert parse_image_ref(text) == ref


def test_parse_image_ref_rejects_unknown_types() -> None:
    with pytest.raises(ValueError, match="unknown image reference type"):
        parse_image_ref('["Popen", {}]')


@pytest.mark.parametrize(("version", "advice"), [(1, "Build a new index"), (99, "Update llm2clip")])
def test_sqlite_backend_rejects_other_format_versions(version: int, advice: str, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "index.sqlite") as db:
        db.execute(f"PRAGMA user_version = {version}")
    db.close()
    for write in (False, True):
        with pytest.raises(FormatVersionError, match=rf"format version {version}, but.* version 2\. {advice}"):
            SqliteBackend(tmp_path, write)


def test_sqlite_backend_adds_a_batch_completely_or_not_at_all(tmp_path: Path) -> None:
    backend = SqliteBackend(tmp_path, write=True)
    content = IndexedContent(b"a", np.zeros(4, np.float16), b"jpeg", width=1, height=1)
    valid = IndexedImage("a", FileImage("a"), "s", "1")
    without_content = IndexedImage("b", FileImage("b"), "s", "1")
    with pytest.raises(OSError, match=r"index\.sqlite"):
        backend.add_images([content], [(valid, b"a"), (without_content, b"b")])
    assert backend.count_images() == (0, 0)


def test_sqlite_backend_creates_private_files(photos: Path, dual_encoder: DualEncoder, tmp_path: Path) -> None:
    folder, mask = tmp_path / "index", os.umask(0o022)
    try:
        backend = SqliteBackend(folder, write=True)
        index_sources([photos], dual_encoder, backend)
        modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir() if file.name != ".lock"}
        assert modes.pop("index.sqlite") == 0o600
        assert set(modes.values()) <= {0o600}
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700

        folder.chmod(0o755)  # an existing index stays as it is
        (folder / "index.sqlite").chmod(0o644)
        (photos / "1.png").unlink()
        index_sources([photos], dual_encoder, SqliteBackend(folder, write=True))
        assert stat.S_IMODE(folder.stat().st_mode) == 0o755
        assert stat.S_IMODE((folder / "index.sqlite").stat().st_mode) == 0o644
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
