"""Tests of word search, caption filters and text recognition, and of how readers keep up with changes of an index."""

import functools
import json
import re
import sqlite3
import sys
import threading
import unicodedata
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

import search_fixtures
from conftest import HANG_TIMEOUT
from llm2clip.cli import main
from llm2clip.data.image_refs import FileImage
from llm2clip.models.dual_encoder import DualEncoder
from llm2clip.search import ocr, sqlite_backend, words
from llm2clip.search.backends import IndexBackend
from llm2clip.search.metadata import Filter, normalize_text
from llm2clip.search.sqlite_backend import SqliteBackend
from llm2clip.search.types import Hit, IndexedContent, IndexedImage, IndexUnavailableError
from llm2clip.search.words import WordQuery, fuse_rankings
from search_fixtures import create_patient_app, index_sources

NEEDLES = ("", "a", "B", "ab", "abab", "狗", "\u7209", "ss", "ß", "İ", "i̇", "\x00", "\ud800", "zz", "b" * 9, "abba" * 3)
OPERATORS = ('"', '""', "*", "a*", "-", "-a", "^a", "NEAR(a b)", "a AND b", "a OR b", "NOT a", "captions:a", "(", "😀")
DIM = 8
with_each_backend = pytest.mark.parametrize("kind", search_fixtures.BACKENDS)


def random_captions(rng: np.random.Generator, count: int) -> list[str]:
    """Return short texts of few different characters, so that most needles occur, also at both ends of captions."""
    letters = np.array(["a", "b", "A", "B", "狗", "ß", "İ", "\x00", "\ud800", "s", '"', "*", "-", " ", "😀"])
    return ["".join(rng.choice(letters, size=rng.integers(12))) for _ in range(count)]


def brute_force(images: Mapping[int, list[str]], text: str) -> set[int]:
    return {n for n, captions in images.items() if any(text.casefold() in caption.casefold() for caption in captions)}


def add_image(
    backend: IndexBackend, name: str, captions: list[str], content: int, largest: float = 0.5, camera: str = ""
) -> None:
    """Add an image with a random vector, which has no larger value than `largest`."""
    vector = np.random.default_rng(content).uniform(-largest, largest, DIM).astype(np.float16)
    vector[content % DIM] = largest
    digest = content.to_bytes(4, "big")
    image = IndexedImage(name, FileImage(name), "/p", "1", tuple(captions), taken=float(content), camera=camera)
    backend.add_images([IndexedContent(digest, vector, b"jpeg", width=1, height=1)], [(image, digest)])


def create_backend(folder: Path, kind: str = "sqlite") -> Any:
    backend = search_fixtures.create_backend(kind, folder)
    backend.initialize({"model": "m", "fingerprint": "f", "embed_dim": DIM})
    return backend


def create_index(folder: Path, count: int, kind: str = "sqlite") -> Any:
    backend = create_backend(folder, kind)
    for n in range(count):
        add_image(backend, f"/p/{n}", [f"caption {n}", "common"], n)
    return backend


def search(backend: IndexBackend, text: str = "", count: int = 1000, offset: int = 0, **conditions: Any) -> list[Hit]:
    query = np.arange(1, DIM + 1, dtype=np.float32)
    return backend.search(query / np.linalg.norm(query), count, Filter(**conditions), offset, [text] if text else [])


def hits(backend: SqliteBackend, image_filter: Filter) -> list[tuple[str, float | None]]:
    query = np.arange(1, DIM + 1, dtype=np.float32)
    return [(hit.id, hit.score) for hit in backend.search(query / np.linalg.norm(query), 1000, image_filter)]


def names_of(found: list[Hit]) -> set[int]:
    return {int(Path(hit.images[0].name).stem) for hit in found}


def check_full_text(backend: IndexBackend) -> None:
    if isinstance(backend, SqliteBackend):
        with backend._db.open_transaction() as connection:
            for table in words.FULL_TEXT_TABLES:  # raises an exception if a table is corrupt
                connection.execute(f"INSERT INTO {table} ({table}, rank) VALUES ('integrity-check', 1)")


# ---- caption filters ------------------------------------------------------------------------------------------------


def test_caption_filter_finds_the_same_images_as_python(tmp_path: Path) -> None:
    """PostgreSQL finds the same images as SQLite (see test_postgres_backend.py)."""
    rng, backend = np.random.default_rng(0), create_backend(tmp_path)
    images = {n: random_captions(rng, rng.integers(4)) for n in range(150)}
    images[150], images[151], images[152] = ["x" * 30], ["abbaABBAabba" + "b" * 40], [""]

    def check() -> None:
        for needle in (*NEEDLES, *OPERATORS, "x" * 30, "x" * 31, "b" * 41, "a b", 'a"', "😀a"):
            found = backend.search(None, 1000, Filter(caption=needle))
            assert names_of(found) == brute_force(images, needle), needle
            assert backend.count_matches(Filter(caption=needle)) == len(found)
            older = {n for n in brute_force(images, needle) if n <= 75}
            assert names_of(backend.search(None, 1000, Filter(caption=needle, before=75))) == older

    for n, captions in images.items():
        add_image(backend, f"/p/{n}", captions, n)
    check()
    for n in range(0, 150, 7):
        images[n] = random_captions(rng, 2)
        add_image(backend, f"/p/{n}", images[n], n)
    removed = range(3, 150, 10)
    backend.remove_images([f"/p/{n}" for n in removed])
    for n in removed:
        del images[n]
    check()
    check_full_text(backend)


# ---- word search ----------------------------------------------------------------------------------------------------

VOCABULARY = (
    *("dog", "Dog", "café", "CAFE", "cafe\u0301", "straße", "STRASSE", "IMG_1234.jpg", "img", "1234", "x-ray", "ray"),
    *("狗", "狗在", "红色的狗", "東京タワー", "タワー", "한국어", "ไทย", "naïve", "😀", "near", "NEAR", "AND", "or"),
    *("not", '"', "*", "dog*", "-dog", "^dog", "captions:", "(dog)", "dog's", "\ud800", "\x00", "a_b", "b"),
    *("'; DROP TABLE texts",),
)


@functools.cache
def split_into_words(text: str) -> list[str]:
    decomposed = unicodedata.normalize("NFD", normalize_text(text))
    return re.findall(r"[^\W_]+", "".join(c for c in decomposed if not unicodedata.combining(c) or c > "\u0e00"))


def contains_all_words(fields: list[str], query: str) -> bool:
    """Search like `find_word_matches`, in plain Python."""
    for token in query.split():
        for part in words.UNSPACED_PARTS.findall(normalize_text(token)) if words.UNSPACED.search(token) else [token]:
            if words.UNSPACED.search(part):
                if not any(part in normalize_text(field) for field in fields):
                    return False
            elif sequence := split_into_words(part):
                spaced = [f" {' '.join(split_into_words(field))} " for field in fields]
                if not any(f" {' '.join(sequence)} " in field for field in spaced):
                    return False
    return True


def test_word_search_finds_the_same_images_as_python(tmp_path: Path) -> None:
    rng, backend = np.random.default_rng(0), create_backend(tmp_path)
    vocabulary = np.array(VOCABULARY)
    captions = {n: " ".join(rng.choice(vocabulary, size=rng.integers(6))) for n in range(120)}
    texts = {n: "\n".join(rng.choice(vocabulary, size=rng.integers(3))) for n in range(120)}
    for n in range(120):
        add_image(backend, f"/p/{n}", [captions[n]], n)
    backend.save_recognized_texts({n.to_bytes(4, "big"): text for n, text in texts.items()})
    for n in range(0, 120, 5):
        captions[n] = "dog 狗"
        add_image(backend, f"/p/{n}", [captions[n]], n)
    backend.remove_images(["/p/7", "/p/8"])
    check_full_text(backend)
    queries = [*VOCABULARY, *OPERATORS, *(" ".join(rng.choice(vocabulary, size=2)) for _ in range(200))]
    num_found = 0
    for query in queries:
        expected = set()
        if re.search(r"[^\W_]", normalize_text(query)):
            for n in set(captions) - {7, 8}:
                if contains_all_words([captions[n], texts[n], str(n)], query):
                    expected.add(n)
        found = [hit for hit in search(backend, query) if hit.matched]
        assert names_of(found) == expected, query
        num_found += len(expected)
    assert num_found > 500


@with_each_backend
def test_word_search_ranks_matches_first_and_names_their_fields(kind: str, tmp_path: Path) -> None:
    backend = create_index(tmp_path, 40, kind)
    add_image(backend, "/p/summer/100.jpg", ["a Dog on the beach"], 100, camera="Canon EOS R5")
    backend.save_recognized_texts({b"\0\0\0\x64": "Hôtel Miramar\n開店しました"})
    plain = search(backend)
    assert plain[0].id != "41" and all(not hit.matched for hit in plain)
    for query, matched in (
        ("hotel", ("text",)),
        ("DOG beach", ("caption",)),
        ("dog hotel", ("caption", "text")),
        ("summer", ("name",)),
        ("100.jpg", ("name",)),
        ("canon miramar", ("text", "camera")),
        ("1970-01-01 dog", ("caption", "date")),
        ("開店", ("text",)),
        ("した", ("text",)),
        ("dog 開店し", ("caption", "text")),
    ):
        found = search(backend, query, 3)
        first = next(hit for hit in found if hit.matched)
        assert first.id == "41" and first in found[:2], query
        assert first.matched == matched and first.text.startswith("Hôtel Miramar\n"), query
        assert first.score == pytest.approx(next(hit.score for hit in plain if hit.id == "41"), abs=1e-3)
    for query in ("dog cat", "do", "beach100", " ".join(f"w{n}" for n in range(40)) + " dog", "x" * 501):
        assert hits_and_fields(search(backend, query)) == hits_and_fields(plain), query
    assert [hit.id for hit in search(backend, "dog", before=50.0)] == [hit.id for hit in plain if hit.id != "41"]


def hits_and_fields(found: list[Hit]) -> list[tuple[Any, ...]]:
    return [(hit.id, hit.score, hit.matched) for hit in found]


@with_each_backend
def test_words_in_many_images_are_ignored(kind: str, tmp_path: Path) -> None:
    """Such as the file name prefix IMG, which says nothing about an image."""
    backend = create_backend(tmp_path, kind)
    for n in range(150):
        add_image(backend, f"/p/{n}", [f"number{n}", "common", "rare" if n < 100 else ""], n)
    plain = [hit.id for hit in search(backend)]
    assert [hit.id for hit in search(backend, "common")] == plain
    assert not any(hit.matched for hit in search(backend, "common"))
    assert len([hit for hit in search(backend, "rare") if hit.matched]) == 100
    [hit, *_] = search(backend, "common number7")
    assert hit.matched == ("caption",) and hit.images[0].name == "/p/7"


PIECES = (
    *("a", "A", "b", "ä", "a\u0308", "Ü", "ß", "ss", "é", "ộ", "ø", "й", "и", "ά", "α", "ह", "ि", "İ", "1", "42"),
    *("狗", "红色", "红", "น้ำ", "น", "タワー", "が", "か\u3099", "한국"),
    *(".", "-", "_", "%", "'", '"', "\\", "*", ":", "&", "|", "<->", "\x00", "\x1f", "\ud800", "😀", "\ue000"),
)
ATTACKS = (
    *("a' | 'b", "a & !b", "a:*", "a <-> b", "'a':1A", "'; DROP TABLE images; --", "%(words)s", ":words", "狗%", "狗_"),
    *("\\'a",),
)


def make_random_text(rng: np.random.Generator, count: int) -> str:
    """Return a text of random PIECES, half of which are followed by spaces."""
    pieces = np.array(PIECES, object)[rng.integers(len(PIECES), size=count)]
    return "".join(piece + (" " if rng.random() < 0.5 else "") for piece in pieces)


def test_sqlite_and_postgres_find_the_same_images_and_fields(tmp_path: Path) -> None:
    """Both indexes receive the same random images, texts, changes, removals and queries."""
    rng, backends = np.random.default_rng(0), [create_backend(tmp_path / kind, kind) for kind in ("sqlite", "postgres")]

    def add_images(numbers: Any) -> None:
        for number in numbers:
            captions = [make_random_text(rng, int(rng.integers(8))) for _ in range(rng.integers(4))]
            name = f"/p/{make_random_text(rng, 3)}/{number}".replace("\ud800", "").replace("\x00", "")
            camera = make_random_text(rng, int(rng.integers(3))).replace("\ud800", "")
            for backend in backends:
                add_image(backend, name, captions, number % 120, camera=camera)
            names.append(name)

    def set_texts(numbers: Any) -> None:
        texts = {int(n).to_bytes(4, "big"): make_random_text(rng, int(rng.integers(8))) for n in numbers}
        for backend in backends:
            backend.save_recognized_texts(texts)

    def read_hits(backend: IndexBackend, query: str, **conditions: Any) -> dict[str, tuple[str, ...]]:
        return {hit.images[0].name: hit.matched for hit in search(backend, query, **conditions) if hit.matched}

    def compare() -> int:
        num_found = 0
        for query in (*ATTACKS, *PIECES, *(make_random_text(rng, int(rng.integers(1, 4))) for _ in range(60))):
            conditions: dict[str, Any] = {}
            if rng.random() < 0.3:
                conditions["before"] = float(rng.integers(120))
            if rng.random() < 0.2:
                conditions["caption"] = str(rng.choice(["a", "1", "狗"]))
            expected, actual = (read_hits(backend, query, **conditions) for backend in backends)
            assert actual == expected, (query, conditions)
            num_found += len(expected)
        texts, other_texts = ({hit.images: hit.text for hit in search(backend)} for backend in backends)
        assert other_texts == texts and any(texts.values())
        return num_found

    names: list[str] = []
    add_images(range(150))
    set_texts(range(0, 120, 2))
    assert compare() > 300
    for backend in backends:
        backend.remove_images(names[::3])
    add_images(range(20, 170, 5))  # the recognised texts belong to the contents
    set_texts(range(0, 120, 3))
    assert compare() > 300
    for backend in backends:
        backend.remove_images(names)
        assert search(backend) == []


@with_each_backend
def test_thai_and_decomposed_texts_are_found(kind: str, tmp_path: Path) -> None:
    backend = create_backend(tmp_path, kind)
    captions = ["น้ำตก", "นก", unicodedata.normalize("NFD", "がっこう")]
    for n, caption in enumerate(captions):
        add_image(backend, f"/p/{n}", [caption], n)
    for query, expected in (("น้ำ", {0}), ("นก", {1}), ("がっこう", {2})):
        assert names_of([hit for hit in search(backend, query) if hit.matched]) == expected


def test_word_query_splits_texts_into_words_and_substrings() -> None:
    assert WordQuery.parse(["A DOG", "... dog"]) == WordQuery(("a", "dog"))
    assert WordQuery.parse(["IMG_1.jpg, 红色的狗。sign"]) == WordQuery(("img_1.jpg,", "sign"), ("红色的狗",))
    assert not WordQuery.parse(["?! 😀"]) and not WordQuery.parse([])


def test_fuse_rankings_matches_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = np.arange(100), np.array([70, 3, 500])
    scores = {n: 1 / (61 + n) for n in range(100)}
    for rank, n in enumerate(second.tolist(), 1):
        scores[n] = scores.get(n, 0) + 1 / (60 + rank)
    expected = sorted(scores, key=lambda n: -scores[n])
    assert fuse_rankings(first, second).tolist() == expected
    monkeypatch.setattr(words, "MAX_FUSED", 10)
    for length in (10, 20, 100):  # a longer ranking starts with the same ids
        fused = fuse_rankings(first[:length], second).tolist()
        # 70 is beyond the first ten ids of the first ranking, so only its rank in the second ranking counts.
        assert fused[:12] == [3, 0, 70, 1, 2, 500, *range(4, 10)]
        assert sorted(fused) == sorted({*range(length), *second.tolist()})


@with_each_backend
def test_pages_of_a_word_search_follow_each_other(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = create_backend(tmp_path, kind)
    for n in range(60):
        add_image(backend, f"/p/{n}", ["dog " * (n % 5) if n % 3 == 0 else "cat"], n)
    for limit in (4, 1000):
        monkeypatch.setattr(words, "MAX_FUSED", limit)
        monkeypatch.setattr("llm2clip.search.backends.MAX_FUSED", limit)
        everything = search(backend, "dog")
        assert len({hit.id for hit in everything}) == 60
        pages = [hit for offset in range(0, 60, 7) for hit in search(backend, "dog", 7, offset)]
        assert [hit.id for hit in pages] == [hit.id for hit in everything]


def test_corrupt_word_tables_are_reported(photos: Path, dual_encoder: DualEncoder, tmp_path: Path) -> None:
    folder = tmp_path / "index"
    index_sources([photos], dual_encoder, SqliteBackend(folder, write=True))
    with closing(sqlite3.connect(folder / "index.sqlite")) as db, db:
        for table in ("words", "trigrams"):
            db.execute(f"DELETE FROM {table}_data WHERE id > 10")
    reader = SqliteBackend(folder)
    query = np.eye(16, dtype=np.float32)[0]
    for conditions, texts in (({"caption": "ärmel"}, []), ({}, ["ärmel"])):
        with pytest.raises(
            IndexUnavailableError, match=r"index\.sqlite: .*\. The index is corrupt\. Build a new index"
        ):
            reader.search(query, 9, Filter(**conditions), words=texts)
    assert len(reader.search(query, 9, Filter())) == 6


def test_search_reports_fields_and_text_on_the_command_line_and_over_http(
    photos: Path, model_folder: Path, dual_encoder: DualEncoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from starlette.testclient import TestClient

    index = SqliteBackend(tmp_path / "index", write=True)
    index_sources([photos], dual_encoder, index, recognize=lambda image: "Bäckerei\x1b[31m")
    command = ["search", str(tmp_path / "index"), "ärmel", "--model", str(model_folder)]
    capsys.readouterr()
    assert main([*command, "--json"]) == 0
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [result["matched"] for result in results if result["matched"]] == [["caption"]]
    assert {result["text"] for result in results} == {"Bäckerei\x1b[31m"}
    assert main(command) == 0
    output = capsys.readouterr().out
    assert "matched: caption" in output and "text: Bäckerei" in output and "\x1b[31m" not in output
    assert main([*command, "--no_words"]) == 0
    assert "matched" not in capsys.readouterr().out
    with TestClient(create_patient_app(dual_encoder, index), base_url="http://localhost") as client:
        for use_words, expected in ((True, [["caption"]]), (False, [])):
            response = client.post("/search", json={"texts": ["Ärmel"], "words": use_words}).json()
            assert [hit["matched"] for hit in response["hits"] if hit["matched"]] == expected
            assert {hit["text"] for hit in response["hits"]} == {"Bäckerei\x1b[31m"}


# ---- text recognition -----------------------------------------------------------------------------------------------


@with_each_backend
def test_texts_are_recognised_once_per_content(
    kind: str, photos: Path, dual_encoder: DualEncoder, tmp_path: Path
) -> None:
    backend: Any = search_fixtures.create_backend(kind, tmp_path / "index")
    shapes: list[tuple[int, ...]] = []

    def recognize(image: np.ndarray) -> str:
        shapes.append(image.shape)
        return f"text {len(shapes)} " + "x" * 20_000

    assert index_sources([photos], dual_encoder, backend).read is None
    report = index_sources([photos], dual_encoder, backend, recognize=recognize)  # --ocr was added later
    assert (report.embedded, report.read, len(shapes)) == (0, 6, 6)
    query = np.eye(16, dtype=np.float32)[0]
    assert {len(hit.text) for hit in backend.search(query, 9, Filter())} == {ocr.MAX_TEXT_LENGTH}
    assert index_sources([photos], dual_encoder, backend, recognize=recognize).read == 0

    (photos / "sub/5.png").rename(photos / "moved.png")  # the text belongs to the content, not to the file
    (photos / "1.png").unlink()
    Image.new("RGB", (40, 2000), "red").save(photos / "2.png")
    report = index_sources([photos], dual_encoder, backend, recognize=recognize)
    assert report.read == 1 and shapes[-1] == (ocr.MAX_SIDE, 19, 3)
    texts = {hit.text[:7] for hit in backend.search(query, 9, Filter(), words=["moved"]) if hit.matched}
    assert len(texts) == 1 and texts < {f"text {n} " for n in range(1, 7)}
    assert backend._query("SELECT count(*) FROM recognized_texts", {}) == [(5,)]
    check_full_text(backend)


def test_images_whose_text_cannot_be_recognised_are_indexed_and_listed(
    photos: Path,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(image: np.ndarray) -> str:
        raise MemoryError("out of memory")

    monkeypatch.setattr(ocr, "open_text_recognizer", lambda: fail)
    index = tmp_path / "index"
    assert main(["index", str(photos), "--model", str(model_folder), "--out", str(index), "--ocr"]) == 0
    output = capsys.readouterr().out
    assert "Images: 7 added" in output and "0 processed by OCR" in output
    assert f"Images whose text could not be recognised: 6, listed in {index}" in output
    lines = [json.loads(line) for line in (index / "skipped.jsonl").read_text().splitlines()]
    failures = [line for line in lines if line["reason"] == "text not recognised"]
    assert len(failures) == 6 and all("out of memory" in str(line) for line in failures)
    assert SqliteBackend(index).count_images() == (7, 6)
    monkeypatch.setattr(ocr, "open_text_recognizer", lambda: lambda image: "found")
    assert main(["index", str(photos), "--model", str(model_folder), "--out", str(index), "--ocr"]) == 0
    assert "6 processed by OCR" in capsys.readouterr().out  # failed images are tried again


def test_ocr_requires_its_packages(
    photos: Path,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    command = ["index", str(photos), "--model", str(model_folder), "--ocr", "--out"]
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    assert main([*command, str(tmp_path / "index")]) == 1
    assert "--ocr requires additional packages" in capsys.readouterr().err
    assert not (tmp_path / "index").exists()


@pytest.mark.weights
def test_real_models_read_text_of_all_orientations_and_scripts() -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (`ocr` extra)")
    pytest.importorskip("rapidocr", reason="rapidocr is not installed (`ocr` extra)")
    recognize = ocr.open_text_recognizer()
    image = Image.new("RGB", (640, 320), "white")
    draw = ImageDraw.Draw(image)
    draw.text((30, 40), "HOTEL MIRAMAR", font=ImageFont.load_default(48), fill="black")
    draw.text((30, 180), "Open 24 hours", font=ImageFont.load_default(32), fill="darkblue")
    text = recognize(np.asarray(image)).upper()
    assert "MIRAMAR" in text and "HOURS" in text
    assert recognize(np.full((200, 300, 3), 255, np.uint8)) == ""
    for shape in ((1, 1, 3), (1, 900, 3), (900, 1, 3)):
        assert isinstance(recognize(np.zeros(shape, np.uint8)), str)
    stripes = np.full((960, 960, 3), 255, np.uint8)
    stripes[::8] = 0  # very long lines are not read
    assert len(recognize(stripes)) < 2000


# ---- updates of readers ---------------------------------------------------------------------------------------------


def test_readers_see_all_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that loads only new vectors returns the same results as a reader that loads all vectors."""
    monkeypatch.setattr(sqlite_backend, "EXACT_BELOW", 0)
    monkeypatch.setattr(sqlite_backend, "CHUNK", 8)
    writer = create_index(tmp_path, 30)
    reader, rng = SqliteBackend(tmp_path), np.random.default_rng(0)
    for step in range(60):
        for _ in range(30 if step % 10 == 9 else rng.integers(1, 4)):
            number = int(rng.integers(50))
            if rng.random() < 0.4:
                writer.remove_images([f"/p/{number}"])
            else:  # a new image, other captions, or another content
                largest = 0.9 if step == 30 else 0.5
                captions = [*random_captions(rng, rng.integers(3)), "common"]
                captions = [caption.replace("\ud800", "") for caption in captions]
                add_image(writer, f"/p/{number}", captions, int(rng.integers(40)) + 100 * (step // 30), largest)
        if step == 40:
            writer._db.connection.execute("VACUUM")
        for image_filter in (Filter(), Filter(caption="common"), Filter(caption="a"), Filter(caption="B", after=20)):
            expected = hits(SqliteBackend(tmp_path), image_filter)
            assert hits(reader, image_filter) == expected
            assert reader.count_images() == SqliteBackend(tmp_path).count_images()
    assert reader.count_images()[0] > 10 and len(expected) > 0


def test_readers_read_only_what_a_commit_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = create_index(tmp_path, 50)
    reader = SqliteBackend(tmp_path)
    vectors_read: list[int] = []
    quantize = sqlite_backend.quantize_to_int8

    def counting_quantize(vectors: np.ndarray, scale: float) -> np.ndarray:
        vectors_read.append(len(vectors))
        return quantize(vectors, scale)

    monkeypatch.setattr(sqlite_backend, "quantize_to_int8", counting_quantize)

    def count_reads() -> tuple[int, int]:
        """Return the numbers of hits, and of vectors that were read."""
        vectors_read.clear()
        count = len(hits(reader, Filter()))
        return count, sum(vectors_read)

    assert count_reads() == (50, 50)
    assert count_reads() == (50, 0)
    add_image(writer, "/p/50", ["new", "common"], 50)
    assert count_reads() == (51, 1)
    add_image(writer, "/p/50", ["other captions"], 50)
    assert count_reads() == (51, 0)
    writer.remove_images(["/p/3"])
    assert count_reads() == (50, 0)
    state = reader._db.read_database_state()
    writer.remove_images([])  # as in each update of `index --watch` without changes
    assert reader._db.read_database_state() == state
    add_image(writer, "/p/51", [], 51, largest=0.6)  # the quantization scale changes
    assert count_reads() == (51, 51)


def test_filters_do_not_block_other_readers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one thread searches the captions, other threads use the index."""
    backend = create_index(tmp_path, 3)
    is_reading, may_continue = threading.Event(), threading.Event()
    find_ids = SqliteBackend._find_matching_ids

    def wait_and_find_ids(*args: Any) -> Any:
        is_reading.set()
        assert may_continue.wait(HANG_TIMEOUT)
        return find_ids(*args)

    with monkeypatch.context() as patch, ThreadPoolExecutor(2) as threads:
        patch.setattr(SqliteBackend, "_find_matching_ids", wait_and_find_ids)
        filtered = threads.submit(hits, backend, Filter(caption="caption 1"))
        try:
            assert is_reading.wait(HANG_TIMEOUT)
            others = threads.submit(
                lambda: (backend.count_images(), backend.read_thumbnail("1"), len(hits(backend, Filter())))
            )
            assert others.result(HANG_TIMEOUT) == ((3, 3), b"jpeg", 3)
            assert not filtered.done()
        finally:
            may_continue.set()
        assert [hit_id for hit_id, _ in filtered.result(HANG_TIMEOUT)] == ["2"]
