"""The index on generated pictures and a random model: what it holds, what it notices, what it answers."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import sqlite3
import tarfile
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from llm2clip.cli import main
from llm2clip.data.image_refs import FileImage, ParquetImage, TarImage
from llm2clip.data.skip_log import SkipLog
from llm2clip.models.dual_encoder import DualEncoder, open_dual_encoder
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.search.backends import open_backend
from llm2clip.search.build import build_index, date_taken
from llm2clip.search.query_embedding import NEGATIVE_WEIGHT, Query, combine, embed_query, embed_texts
from llm2clip.search.sqlite_backend import SqliteBackend
from llm2clip.search.types import (
    Backend,
    Filter,
    IndexedContent,
    IndexedImage,
    container_path,
    ref_from_json,
    ref_to_json,
)
from llm2clip.search.vector_index import QuantizedVectors, VectorIndex, open_graph, update_graph
from llm2clip.search.verbs import canonical_path, parse_time
from search_fixtures import make_model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(model_folder: Path) -> DualEncoder:
    return open_dual_encoder(str(model_folder))


def engine_at(kind: str, folder: Path) -> Backend:
    if kind == "local":
        return SqliteBackend(folder, write=True)
    qdrant = pytest.importorskip("llm2clip.search.qdrant_backend")
    from qdrant_client import QdrantClient

    return qdrant.QdrantBackend(QdrantClient(path=str(folder)), "pictures")


def names(engine: Backend, only: Filter | None = None, count: int = 100) -> set[str]:
    width = int(engine.about()["width"])
    hits = engine.search(np.eye(width, dtype=np.float32)[0], count, only or Filter())
    return {Path(p.name).name for hit in hits for p in hit.pictures}


@pytest.fixture
def photos(tmp_path: Path, pictures: Path) -> Path:
    """Some pictures in two folders, one of them twice, one damaged, one taken in 2001, one with a caption beside it."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for n in range(4):
        shutil.copy(pictures / f"{n}.png", folder / f"{n}.png")
    shutil.copy(pictures / "5.png", folder / "sub/5.png")
    shutil.copy(pictures / "5.png", folder / "sub/copy.png")
    (folder / "0.txt").write_text("Ein roter Ärmel\n")
    (folder / "bad.jpg").write_bytes(b"\xff\xd8\xff not a picture")
    (folder / "half.png").write_bytes((pictures / "6.png").read_bytes()[:300])
    exif = Image.Exif()
    exif[0x0132] = "2001:02:03 04:05:06"
    Image.open(pictures / "7.png").resize((80, 64)).convert("RGB").save(folder / "old.jpg", exif=exif)
    return folder


@pytest.mark.parametrize("kind", ["local", "qdrant"])
def test_what_is_new_changed_moved_and_gone(kind: str, photos: Path, model: DualEncoder, tmp_path: Path) -> None:
    engine, log = engine_at(kind, tmp_path / "index"), SkipLog(tmp_path / "skipped.jsonl", 1.0)
    report = build_index([str(photos)], model, engine, log)
    assert (report.added, report.embedded, report.changed, report.dropped) == (7, 6, 0, 0)
    assert engine.count() == (7, 6)
    assert [[Path(n).name for n in group] for group in engine.copies()] == [["5.png", "copy.png"]]
    listed = [json.loads(line)["file"] for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert {Path(file).name for file in listed} == {"bad.jpg", "half.png"}

    again = build_index([str(photos)], model, engine, SkipLog(None, 1.0))
    assert not again and again.embedded == 0

    (photos / "sub/5.png").rename(photos / "moved.png")  # the same bytes elsewhere
    (photos / "1.png").unlink()
    shutil.copy(photos / "2.png", photos / "3.png")  # another picture under an old name
    os.utime(photos / "3.png", (1, 1))
    (photos / "0.png").write_bytes(b"no longer a picture")
    report = build_index([str(photos)], model, engine, SkipLog(None, 1.0))
    assert (report.added, report.embedded, report.changed, report.dropped) == (1, 0, 1, 3)
    assert names(engine) == {"2.png", "3.png", "copy.png", "moved.png", "old.jpg"}
    assert engine.count() == (5, 3)
    (photos / "2.txt").write_text("a caption that came later\n")
    report = build_index([str(photos)], model, engine, SkipLog(None, 1.0))
    assert (report.added, report.embedded, report.changed, report.dropped) == (0, 0, 1, 0)
    assert names(engine, Filter(caption="came later")) == {"2.png", "3.png"}  # of one content


@pytest.mark.parametrize("kind", ["local", "qdrant"])
def test_filters(kind: str, photos: Path, model: DualEncoder, tmp_path: Path) -> None:
    engine = engine_at(kind, tmp_path / "index")
    build_index([str(photos)], model, engine, SkipLog(None, 1.0))
    assert names(engine, Filter(under=str(photos / "sub"))) == {"5.png", "copy.png"}
    assert names(engine, Filter(under=str(photos / "su"))) == set()
    assert names(engine, Filter(under=str(photos / "1.png"))) == {"1.png"}
    assert names(engine, Filter(caption="roter ärmel")) == {"0.png"}
    assert names(engine, Filter(caption="%")) == set()
    assert names(engine, Filter(before=1e9)) == {"old.jpg"}
    assert names(engine, Filter(after=1e9, larger=41)) == set()
    assert names(engine, Filter(larger=41)) == {"old.jpg"}
    assert names(engine, Filter(), count=2) < names(engine)


@pytest.mark.parametrize("kind", ["local", "qdrant"])
def test_answers_are_the_brute_force_ones(kind: str, pictures: Path, model: DualEncoder, tmp_path: Path) -> None:
    engine = engine_at(kind, tmp_path / "index")
    build_index([str(pictures)], model, engine, SkipLog(None, 1.0))
    query = embed_query(model, Query(texts=["the middle is red"]))
    files = sorted(pictures.glob("*.png"))
    vectors = LLM2CLIP.encode_image(LLM2CLIP.from_pretrained(model.name), files).numpy()
    cosines = vectors @ query
    hits = engine.search(query, 5, Filter())
    assert [Path(hit.pictures[0].name).name for hit in hits] == [files[i].name for i in np.argsort(-cosines)[:5]]
    assert [hit.score for hit in hits] == pytest.approx(np.sort(-cosines)[:5] * -1, abs=2e-3)
    held = engine.vector(hits[0].id)
    assert held is not None and held @ query == pytest.approx(hits[0].score, abs=1e-3)
    assert (engine.thumbnail(hits[0].id) or b"").startswith(b"\xff\xd8")
    assert engine.pictures(hits[0].id) == hits[0].pictures
    for nothing in ("0", "99", "-1", "x", "../..", "9" * 30):
        assert engine.vector(nothing) is None and engine.thumbnail(nothing) is None and engine.pictures(nothing) == ()


def test_another_model_is_refused(
    photos: Path, model: DualEncoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = SqliteBackend(tmp_path / "index", write=True)
    build_index([str(photos)], model, engine, SkipLog(None, 1.0))
    engine.begin({"model": model.name, "fingerprint": "0", "width": 16})  # the same name, trained anew
    with pytest.raises(ValueError, match="as it was then"):
        build_index([str(photos)], model, engine, SkipLog(None, 1.0))
    assert main(["search", str(tmp_path / "index"), "a"]) == 1
    assert "as it was then" in capsys.readouterr().err
    from llm2clip.search.server import create_app

    with pytest.raises(ValueError, match="as it was then"):
        create_app(model, engine)


def test_odd_names_odd_vectors_and_turned_pictures(pictures: Path, model: DualEncoder, tmp_path: Path) -> None:
    """A name that is no UTF-8, a vector that is not finite, a picture whose EXIF says that it lies on its side."""
    photos, log = tmp_path / "photos", SkipLog(tmp_path / "skipped.jsonl", 1.0)
    photos.mkdir()
    odd = os.fsdecode(b"caf\xe9.png")
    shutil.copy(pictures / "1.png", photos / odd)
    exif = Image.Exif()
    exif[0x0112] = 6
    exif.get_ifd(0x8769)[0x9003] = "2002:03:04 05:06:07"
    Image.open(pictures / "2.png").convert("RGB").save(photos / "turned.jpg", exif=exif)
    (photos / "phone.heic").write_bytes(b"not read here")
    engine = SqliteBackend(tmp_path / "index", write=True)
    build_index([str(photos)], model, engine, log)
    assert names(engine) == {r"caf\udce9.png", "turned.jpg"} and log.skipped == {"unknown format": 1}
    assert not build_index([str(photos)], model, engine, SkipLog(None, 1.0))
    hits = {Path(hit.pictures[0].name).name: hit for hit in engine.search(np.eye(16, dtype=np.float32)[0], 9, Filter())}
    turned = hits["turned.jpg"]
    assert (turned.width, turned.height) == (40, 48) == Image.open(io.BytesIO(engine.thumbnail(turned.id) or b"")).size
    assert turned.pictures[0].taken == datetime(2002, 3, 4, 5, 6, 7).timestamp()
    assert hits[r"caf\udce9.png"].pictures[0].place.read() == (pictures / "1.png").read_bytes()
    broken = dataclasses.replace(model, encode_images_raw=lambda some: torch.full((len(some), 16), torch.nan))
    shutil.copy(pictures / "3.png", photos / "3.png")
    again = SkipLog(None, 1.0)
    assert build_index([str(photos)], broken, engine, again).added == 0 and again.skipped["undecodable image"] == 1
    assert names(engine) == {r"caf\udce9.png", "turned.jpg"}


def test_a_folder_with_all_that_is_in_it(pictures: Path, model: DualEncoder, tmp_path: Path) -> None:
    """Tars, parquet files and captions beside pictures do not hide them; two rows of a picture are one."""
    photos = tmp_path / "photos"
    (photos / "old").mkdir(parents=True)
    for n in (1, 2):
        shutil.copy(pictures / f"{n}.png", photos)
    with tarfile.open(photos / "old/some.tar", "w") as tar:
        tar.add(pictures / "3.png", "3.png")
    rows = [{"image": "1.png", "caption": "one"}, {"image": "1.png", "caption": "the same"}, {"image": "gone.png"}]
    (photos / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    engine = SqliteBackend(tmp_path / "index", write=True)
    assert build_index([str(photos)], model, engine, SkipLog(None, 1.0)).added == 3
    assert names(engine, Filter(caption="one")) == names(engine, Filter(caption="THE same")) == {"1.png"}
    (photos / "old/some.tar").unlink()
    build_index([str(photos / "old"), str(photos)], model, engine, SkipLog(None, 1.0), gone=True)
    assert names(engine) == {"1.png", "2.png"}


def test_splits_of_one_file_do_not_drop_each_other(pictures: Path, model: DualEncoder, tmp_path: Path) -> None:
    engine, file = SqliteBackend(tmp_path / "index", write=True), pictures / "captions.jsonl"
    train = build_index([f"{file}@train"], model, engine, SkipLog(None, 1.0)).added
    report = build_index([f"{file}@val"], model, engine, SkipLog(None, 1.0))
    assert (report.added, report.dropped) == (6, 0) and engine.count() == (train + 6, train + 6)


def test_sources_that_are_gone(pictures: Path, model: DualEncoder, tmp_path: Path) -> None:
    engine, photos = SqliteBackend(tmp_path / "index", write=True), tmp_path / "photos"
    (photos / "sub").mkdir(parents=True)
    shutil.copy(pictures / "1.png", photos)
    shutil.copy(pictures / "2.png", photos / "sub")
    build_index([str(photos)], model, engine, SkipLog(None, 1.0))
    build_index([str(photos / "sub")], model, engine, SkipLog(None, 1.0))
    (photos / "sub/2.png").unlink()
    with pytest.raises(FileNotFoundError, match="--gone"):
        build_index([str(photos / "sub")], model, engine, SkipLog(None, 1.0))
    assert engine.count() == (2, 2)  # a disk that is away is no reason to forget what is on it
    assert build_index([str(photos)], model, engine, SkipLog(None, 1.0)).dropped == 1
    shutil.rmtree(photos)
    assert build_index([str(photos)], model, engine, SkipLog(None, 1.0), gone=True).dropped == 1
    assert engine.count() == (0, 0) and engine.search(np.eye(16, dtype=np.float32)[0], 3, Filter()) == []


def test_a_parquet_file_that_is_written_anew(pictures: Path, model: DualEncoder, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def write(*numbers: int) -> None:
        cells = pa.array([{"bytes": (pictures / f"{n}.png").read_bytes(), "path": None} for n in numbers])
        pq.write_table(pa.table({"image": cells}), tmp_path / "some.parquet")

    engine = SqliteBackend(tmp_path / "index", write=True)
    write(1)
    build_index([str(tmp_path / "some.parquet")], model, engine, SkipLog(None, 1.0))
    write(2, 3)
    assert build_index([str(tmp_path / "some.parquet")], model, engine, SkipLog(None, 1.0)).changed == 1
    ((hit, *_),) = [engine.search(embed_texts(model, [pictures / "2.png"])[0].numpy(), 1, Filter())]
    assert hit.score == pytest.approx(1, abs=2e-3) and hit.pictures[0].name.endswith("[0].image")


def test_nothing_new_is_nothing_written(photos: Path, model: DualEncoder, tmp_path: Path) -> None:
    """Else every look of --watch would make a server read all vectors again."""
    writer, reader = (SqliteBackend(tmp_path / "index", True) for _ in range(2))
    build_index([str(photos)], model, writer, SkipLog(None, 1.0))
    names(reader)
    searcher = reader._searcher()
    build_index(
        [str(photos)], model, SqliteBackend(tmp_path / "index", True), SkipLog(None, 1.0)
    )  # drops orphans, none here
    names(reader)
    held = reader._searcher()
    build_index([str(photos)], model, writer, SkipLog(None, 1.0))
    assert reader._searcher() is held is not None and searcher is not None


def test_a_run_that_is_stopped_keeps_its_batches(
    photos: Path, model: DualEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, put, calls = SqliteBackend(tmp_path / "index", write=True), SqliteBackend.put, []

    def failing(self: SqliteBackend, *given: object) -> None:
        calls.append(given)
        if len(calls) == 4:
            raise KeyboardInterrupt
        put(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(SqliteBackend, "put", failing)
    with pytest.raises(KeyboardInterrupt):
        build_index([str(photos)], model, engine, SkipLog(None, 1.0), batch=2)
    monkeypatch.undo()
    kept = engine.count()[0]
    assert 0 < kept < 7
    report = build_index([str(photos)], model, engine, SkipLog(None, 1.0), batch=2)
    assert report.added == 7 - kept and engine.count() == (7, 6)


def test_a_batch_is_whole_or_absent(tmp_path: Path) -> None:
    engine = SqliteBackend(tmp_path, write=True)
    content = IndexedContent(b"a", np.zeros(4, np.float16), b"jpeg", 1, 1)
    fine = IndexedImage("a", FileImage("a"), "s", "1")
    with pytest.raises(OSError, match=r"pictures\.sqlite"):  # the second picture's content is not there
        engine.put([content], [(fine, b"a"), (IndexedImage("b", FileImage("b"), "s", "1"), b"b")])
    assert engine.count() == (0, 0)


@pytest.mark.parametrize("kind", ["local", "qdrant"])
def test_a_sibling_whose_name_goes_on_is_no_part_of_a_folder(
    kind: str, pictures: Path, model: DualEncoder, tmp_path: Path
) -> None:
    """`!` and `[`, which stand after a tar and a table, stand in names of folders and files, too."""
    engine, home = engine_at(kind, tmp_path / "index"), tmp_path / "p"
    for n, name in enumerate(("trip/a.png", "trip[2019]/b.png", "trip!/c.png", "trip[1].png")):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(pictures / f"{n}.png", home / name)
    with tarfile.open(home / "trip.tar", "w") as tar:
        tar.add(pictures / "4.png", "4.png")
    assert build_index([str(home)], model, engine, SkipLog(None, 1.0)).added == 5
    assert not build_index([str(home / "trip")], model, engine, SkipLog(None, 1.0))
    assert names(engine, Filter(under=str(home / "trip"))) == {"a.png"}
    assert names(engine, Filter(under=str(home / "trip.tar"))) == {"trip.tar!4.png"}
    assert len(names(engine, Filter(under="/"))) == 5
    (home / "copy.png").write_bytes((home / "trip/a.png").read_bytes())
    os.utime(home / "copy.png", (1, 1))
    build_index([str(home)], model, engine, SkipLog(None, 1.0))
    both = Filter(under=str(home / "trip"), before=2)
    assert names(engine, both) == set(), "each copy meets half of it, and none all"


def test_a_disk_that_gives_an_error_takes_no_picture_with_it(
    photos: Path, model: DualEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = SqliteBackend(tmp_path / "index", write=True)
    build_index([str(photos)], model, engine, SkipLog(None, 1.0))
    opened = FileImage.open

    def fails(ref: FileImage) -> Any:
        if ref.path.endswith("2.png"):
            raise OSError(5, "Input/output error")
        return opened(ref)

    with monkeypatch.context() as patch:
        patch.setattr(FileImage, "open", fails)
        assert not build_index([str(photos)], model, engine, SkipLog(None, 1.0))
    assert engine.count() == (7, 6)
    (photos / "3.png").write_bytes((photos / "3.png").read_bytes()[:300])  # its header is read, the rest is gone
    assert build_index([str(photos)], model, engine, SkipLog(None, 1.0)).dropped == 1 and engine.count() == (6, 5)
    listed = tmp_path / "some.jsonl"
    listed.write_text("".join(json.dumps({"image": str(photos / f"{n}.png"), "caption": "x"}) + "\n" for n in (1, 2)))
    build_index([str(listed)], model, engine, SkipLog(None, 1.0))
    listed.write_text(listed.read_text().splitlines()[0])
    assert build_index([str(listed)], model, engine, SkipLog(None, 1.0)).dropped == 1, (
        "a list that leaves it out lets it go"
    )


def test_two_pictures_of_one_name_in_a_tar(pictures: Path, model: DualEncoder, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "some.tar", "w") as tar:
        for n, name in ((1, "a.png"), (2, "b.png"), (3, "a.png")):
            tar.add(pictures / f"{n}.png", name)
    engine = SqliteBackend(tmp_path / "index", write=True)
    assert build_index([str(tmp_path / "some.tar")], model, engine, SkipLog(None, 1.0)).added == 3
    assert not build_index([str(tmp_path / "some.tar")], model, engine, SkipLog(None, 1.0))
    assert len(names(engine, Filter(under=str(tmp_path / "some.tar")))) == 3
    assert container_path(
        f"{tmp_path}/some.tar!a.png@2048", TarImage(f"{tmp_path}/some.tar", 2048, 9, "a.png")
    ).endswith(".tar")


def test_an_index_that_can_only_be_read_is_read(
    photos: Path, model: DualEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a folder is mounted to be read: root, who runs the tests elsewhere, may write anywhere."""
    folder, connect = tmp_path / "index", sqlite3.connect
    writer = SqliteBackend(folder, write=True)
    build_index([str(photos)], model, writer, SkipLog(None, 1.0))

    def only_reads(where: Any, **options: Any) -> sqlite3.Connection:
        if not options.get("uri"):
            raise sqlite3.OperationalError("attempt to write a readonly database")
        return connect(where, **options)

    with monkeypatch.context() as patch:
        patch.setattr("llm2clip.search.sqlite_backend.os.access", lambda *_: False)
        patch.setattr(sqlite3, "connect", only_reads)
        with pytest.raises(OSError, match="readonly"):  # what the writer has not brought in yet would be missed
            SqliteBackend(folder)
        writer._db.close()
        reader = SqliteBackend(folder)
        assert names(reader) >= {"1.png", "5.png", "old.jpg"}
        assert {file.name for file in folder.iterdir()} == {"pictures.sqlite"}, "nothing is written beside it"
    (photos / "1.png").unlink()
    writer = SqliteBackend(folder, write=True)
    build_index([str(photos)], model, writer, SkipLog(None, 1.0))
    writer._db.close()
    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", only_reads)
        assert "1.png" not in names(reader), "what changed is read anew"


def test_what_an_index_is_called(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"qdrant\+http"):
        open_backend("http://localhost:6333/photos", write=True)
    assert not Path("http:").exists()
    day = datetime(2024, 5, 31).timestamp()
    for written in ("2024-05-31", "20240531"):
        assert parse_time(written) == day and day + 86399 < (parse_time(written, end=True) or 0) < day + 86400
    assert parse_time("2024-05-31T12:00") == parse_time("2024-05-31T12:00", end=True) == day + 43200
    assert canonical_path(os.fsdecode(b"/x/\xff.png")) == "/x/\\udcff.png"


def test_tars_and_parquet(pictures: Path, model: DualEncoder, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with tarfile.open(tmp_path / "some.tar", "w") as tar:
        tar.add(pictures / "1.png", "a/1.png")
        tar.add(pictures / "2.png", "a/2.png")
    cells = pa.array([{"bytes": (pictures / "2.png").read_bytes(), "path": None}])
    pq.write_table(pa.table({"image": cells}), tmp_path / "some.parquet")
    engine = SqliteBackend(tmp_path / "index", write=True)
    report = build_index(
        [str(tmp_path / "some.tar"), str(tmp_path / "some.parquet")], model, engine, SkipLog(None, 1.0)
    )
    assert (report.added, report.embedded) == (3, 2)
    assert names(engine, Filter(under=str(tmp_path / "some.tar"))) == {"1.png", "2.png", "some.parquet[0].image"}
    ((first, second),) = engine.copies()
    assert first.endswith("some.parquet[0].image") and second.endswith("some.tar!a/2.png")
    build_index([str(tmp_path / "some.tar")], model, engine, SkipLog(None, 1.0))
    assert engine.count() == (3, 2)  # a source that is not named stays


def test_places() -> None:
    for where in (FileImage("/a b"), TarImage("/t.tar", 512, 9, "n"), ParquetImage("/p", 3, "image")):
        assert ref_from_json(ref_to_json(where)) == where
    with pytest.raises(ValueError, match="no place"):
        ref_from_json('["Popen", {}]')


def test_date_taken(pictures: Path) -> None:
    assert date_taken((pictures / "1.png").read_bytes()) is None
    assert date_taken(b"\xff\xd8\xff") is None


def test_queries(model: DualEncoder, pictures: Path) -> None:
    red, dog = model.encode_texts(["red", "dog"])
    seen = torch.nn.functional.normalize(model.encode_images([model.transform(torch.zeros(3, 9, 9).byte())]), dim=1)
    assert combine([red.numpy()]) == pytest.approx(red.numpy(), abs=1e-6)
    both = embed_query(model, Query(["red"], [torch.zeros(3, 9, 9).byte()]))
    assert both == pytest.approx(torch.nn.functional.normalize(red + seen[0], dim=0).numpy(), abs=1e-6)
    without = embed_query(model, Query(["red"], without_texts=["dog"]))
    assert without == pytest.approx(torch.nn.functional.normalize(red - NEGATIVE_WEIGHT * dog, dim=0).numpy(), abs=1e-6)
    with pytest.raises(ValueError, match="nothing to look for"):
        embed_query(model, Query(without_texts=["dog"]))


# ---- the nearest ----------------------------------------------------------------------------------------------------


def vectors_of(count: int, width: int, seed: int = 0) -> np.ndarray:
    """Unit vectors in clusters, as pictures are; some dimensions are far larger than others."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(50, width)) * np.where(np.arange(width) < 2, 8, 1)
    found = centres[rng.integers(50, size=count)] + 0.3 * rng.normal(size=(count, width))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float16)


@pytest.mark.parametrize("graph", [False, True])
def test_nearest_are_those_of_float64(graph: bool, tmp_path: Path) -> None:
    vectors, ids = vectors_of(6000, 64), np.arange(6000, dtype=np.int64) * 3 + 7
    vectors[5990:] = 0
    vectors[5990:, 3] = 1  # far larger than what came before
    largest = float(np.abs(vectors).max())

    def fetch(some: np.ndarray) -> np.ndarray:
        return vectors[(some - 7) // 3]

    def codes() -> QuantizedVectors:
        return QuantizedVectors([(ids[:4000], vectors[:4000]), (ids[4000:], vectors[4000:])], 64, 127 / largest)

    if graph:
        update_graph(tmp_path, ids[:5000], fetch, 64, float(np.abs(vectors[:5000]).max()))
        assert open_graph(tmp_path, ids) is None
        update_graph(tmp_path, ids[10:], fetch, 64, largest)  # what came, and what went
        assert open_graph(tmp_path, ids) is None
        update_graph(tmp_path, ids, fetch, 64, largest)
    nearest = VectorIndex(codes, fetch, open_graph(tmp_path, ids) if graph else None)
    assert graph == (nearest.graph is not None)
    missed = 0
    for query in [*vectors_of(40, 64, 1).astype(np.float32), np.eye(64, dtype=np.float32)[3]]:
        found, scores = nearest.search(query, 10)
        exact = vectors.astype(np.float64) @ query.astype(np.float64)
        best = np.argsort(-exact)[:10]
        missed += len(set(ids[best]) - set(found)) if exact[best[-1]] < 1 else 0  # ten and more may be alike
        assert scores[0] == pytest.approx(exact.max(), abs=1e-5)
        assert scores == pytest.approx(exact[(found - 7) // 3], abs=1e-5)
        assert (np.diff(scores) <= 0).all()
    assert missed <= (8 if graph else 0)
    for among in (ids[::100], ids[::2]):  # few are measured at once, many are scanned
        found, scores = nearest.search(query, 10, among)
        best = among[np.argsort(-exact[(among - 7) // 3])[:10]]
        assert set(found) == set(best)
    none = nearest.search(query, 10, ids[:0])
    assert len(none[0]) == len(none[1]) == 0


def test_an_index_that_grows_is_searched_anew(photos: Path, model: DualEncoder, tmp_path: Path) -> None:
    """One that is open, by another that writes; and with a graph."""
    writer, reader = (SqliteBackend(tmp_path / "index", True, approximate_above=3) for _ in range(2))
    build_index([str(photos / "sub")], model, writer, SkipLog(None, 1.0))
    assert names(reader) == {"5.png", "copy.png"} and not (tmp_path / "index/graph.json").exists()
    build_index([str(photos)], model, writer, SkipLog(None, 1.0))
    assert (tmp_path / "index/graph.json").exists()
    assert len(names(reader)) == 7
    (tmp_path / "index/graph.json").rename(tmp_path / "graph.json")
    assert reader._searcher().graph is None
    (tmp_path / "graph.json").rename(tmp_path / "index/graph.json")  # a graph that comes after the vectors is taken
    assert reader._searcher().graph is not None


def test_watching(photos: Path, pictures: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                  capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            shutil.copy(pictures / "9.png", photos / "9.png")
        if len(slept) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr("llm2clip.search.verbs.time.sleep", sleep)
    out = tmp_path / "index"
    assert main(["index", str(photos), "--model", str(model_folder), "--out", str(out), "--watch", "3"]) == 130
    said = capsys.readouterr().out
    assert slept == [3.0] * 4 and "watching" in said
    assert (
        said.count("pictures added") == 2 and "1 pictures added" in said
    )  # a look that finds nothing new says nothing
    assert SqliteBackend(out).count() == (8, 7)


def test_the_commands(photos: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "index"
    assert main(["index", str(photos), "--model", str(model_folder), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "7 pictures added" in said and "(7 pictures, 6 different)" in said and "llm2clip search" in said
    assert "could not be read: 2, listed in" in said and "copy.png" in said
    search = ["search", str(out), "a red one", "--images", str(photos / "1.png"), "--without", "a dog", "--top", "3"]
    assert main([*search, "--sheet", str(tmp_path / "sheet")]) == 0
    said = capsys.readouterr().out
    assert said.count("cosine") == 1 and ".png" in said
    page = (tmp_path / "sheet/found.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 3 and "a red one" in page and "without a dog" in page
    assert main(["search", str(out), "x", "--after", "2100-01-01"]) == 0
    assert "Nothing: the index is empty" in capsys.readouterr().out
    for wrong, message in (
        (["search", str(tmp_path / "none"), "x"], "is no index"),
        (["search", str(out)], "nothing to look for"),
        (["index", str(photos), "--model", str(tmp_path / "typo"), "--out", str(tmp_path / "new")], "neither a folder"),
        (["search", str(out), "x", "--images", "no.jpg"], "No such file"),
        (["search", str(out), "x", "--after", "yesterday"], "Invalid isoformat"),
        (["index", str(tmp_path / "gone"), "--model", str(model_folder), "--out", str(out)], "no such file or folder"),
        (["index", "hf:a", "--model", str(model_folder), "--out", "qdrant+http://x"], "HOST:6333/COLLECTION"),
    ):
        assert main(wrong) == 1
        assert message in capsys.readouterr().err
