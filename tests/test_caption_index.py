"""Tests of `search.caption_index`, and of how the SQLite backend keeps the captions and the vectors up to date."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from conftest import HANG_TIMEOUT
from llm2clip.data.image_refs import FileImage
from llm2clip.search import caption_index, sqlite_backend, vector_index
from llm2clip.search.backends import MAX_CAPTION_FILTER_LENGTH, Filter, IndexedContent, IndexedImage
from llm2clip.search.caption_index import CaptionIndex
from llm2clip.search.sqlite_backend import SqliteBackend

NEEDLES = ("", "a", "B", "ab", "abab", "狗", "\u7209", "ss", "ß", "İ", "i̇", "\x00", "\ud800", "zz", "b" * 9, "abba" * 3)
DIM = 8


def random_captions(rng: np.random.Generator, count: int) -> list[str]:
    """Return short texts of few different characters, so that most needles occur, also at both ends of captions."""
    letters = np.array(["a", "b", "A", "B", "狗", "ß", "İ", "\x00", "\ud800", "s"])
    return ["".join(rng.choice(letters, size=rng.integers(12))) for _ in range(count)]


def brute_force(images: dict[int, list[str]], text: str) -> set[int]:
    return {n for n, captions in images.items() if any(text.casefold() in caption.casefold() for caption in captions)}


def caption_rows(images: dict[int, list[str]]) -> list[tuple[int, int, str]]:
    return [(n, 1000 + n, json.dumps(captions)) for n, captions in images.items()]


@pytest.mark.parametrize("block", [3, 100])
def test_caption_index_finds_the_same_images_as_python(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caption_index, "BLOCK", block)
    rng = np.random.default_rng(0)
    images = {n: random_captions(rng, rng.integers(4)) for n in range(300)}
    images[300], images[301] = ["x" * 30], ["abbaABBAabba" + "b" * 40]
    captions = CaptionIndex().with_changes(np.empty(0, np.int64), caption_rows(images))
    changed = {n: random_captions(rng, 2) for n in range(0, 300, 7)}
    updated = captions.with_changes(np.array(list(changed)) + 1000, caption_rows(changed))
    for index, expected in ((captions, images), (updated, {**images, **changed})):
        for needle in (*NEEDLES, "x" * 30, "x" * 31, "b" * 41):
            rows, contents = index.find_captions(needle)
            assert set(rows.tolist()) == brute_force(expected, needle), needle
            assert (contents == rows + 1000).all()


def test_filter_rejects_long_captions() -> None:
    Filter(caption="a" * MAX_CAPTION_FILTER_LENGTH)
    with pytest.raises(ValueError, match="501 characters; the limit is 500"):
        Filter(caption="a" * 501)


# ---- updates of readers ---------------------------------------------------------------------------------------------


def add_image(backend: SqliteBackend, name: str, captions: list[str], content: int, largest: float = 0.5) -> None:
    """Add an image with a random vector, which has no larger value than `largest`."""
    vector = np.random.default_rng(content).uniform(-largest, largest, DIM).astype(np.float16)
    vector[content % DIM] = largest
    digest = content.to_bytes(4, "big")
    image = IndexedImage(name, FileImage(name), "/p", "1", tuple(captions), float(content))
    backend.add([IndexedContent(digest, vector, b"jpeg", 1, 1)], [(image, digest)])


def create_index(folder: Path, count: int) -> SqliteBackend:
    backend = SqliteBackend(folder, write=True)
    backend.initialize({"model": "m", "fingerprint": "f", "embed_dim": DIM})
    for n in range(count):
        add_image(backend, f"/p/{n}", [f"caption {n}", "common"], n)
    return backend


def hits(backend: SqliteBackend, image_filter: Filter) -> list[tuple[str, float]]:
    query = np.arange(1, DIM + 1, dtype=np.float32)
    return [(hit.id, hit.score) for hit in backend.search(query / np.linalg.norm(query), 1000, image_filter)]


def test_readers_see_all_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that follows the log of changes returns the same results as a reader that reads everything."""
    monkeypatch.setattr(sqlite_backend, "MAX_LOG_LENGTH", 20)
    monkeypatch.setattr(vector_index, "EXACT_BELOW", 0)
    monkeypatch.setattr(vector_index, "CHUNK", 8)
    writer = create_index(tmp_path, 30)
    reader, rng = SqliteBackend(tmp_path), np.random.default_rng(0)
    for step in range(60):
        # Every tenth step makes more changes than the log contains. VACUUM renumbers the rows.
        for _ in range(30 if step % 10 == 9 else rng.integers(1, 4)):
            number = int(rng.integers(50))
            if rng.random() < 0.4:
                writer.remove([f"/p/{number}"])
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
            assert reader.count() == SqliteBackend(tmp_path).count()
    assert reader.count()[0] > 10 and len(expected) > 0


def test_readers_read_only_what_a_commit_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = create_index(tmp_path, 50)
    reader = SqliteBackend(tmp_path)
    vectors_read: list[int] = []
    captions_read: list[str] = []
    quantize, encode = vector_index.quantize, caption_index.encode_casefolded

    def counting_quantize(vectors: np.ndarray, scale: float) -> np.ndarray:
        vectors_read.append(len(vectors))
        return quantize(vectors, scale)

    def counting_encode(text: str) -> bytes:
        captions_read.append(text)
        return encode(text)

    monkeypatch.setattr(vector_index, "quantize", counting_quantize)
    monkeypatch.setattr(caption_index, "encode_casefolded", counting_encode)

    def search() -> tuple[int, int, int]:
        """Return the numbers of hits, of vectors that were read, and of captions that were read."""
        vectors_read.clear()
        captions_read.clear()
        count = len(hits(reader, Filter()))
        reader._find_matching_ids(Filter(caption="common"))  # without the cache of the last filter
        return count, sum(vectors_read), len(captions_read) - 1  # the filter itself is encoded as well

    assert search() == (50, 50, 100)
    assert search() == (50, 0, 0)
    add_image(writer, "/p/50", ["new", "common"], 50)
    assert search() == (51, 1, 2)
    add_image(writer, "/p/50", ["other captions"], 50)
    assert search() == (51, 0, 1)
    writer.remove(["/p/3"])
    assert search() == (50, 0, 0)
    add_image(writer, "/p/51", [], 51, largest=0.6)  # the quantization scale changes
    assert search() == (51, 51, 0)


def test_filters_do_not_block_other_readers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one thread reads the captions or searches them, other threads use the index."""
    backend = create_index(tmp_path, 3)
    is_reading, may_continue = threading.Event(), threading.Event()
    encode, find = caption_index.encode_casefolded, CaptionIndex.find_captions

    def wait() -> None:
        is_reading.set()
        assert may_continue.wait(HANG_TIMEOUT)

    def waiting_encode(text: str) -> bytes:
        wait()
        return encode(text)

    def waiting_find(captions: CaptionIndex, text: str) -> tuple[np.ndarray, np.ndarray]:
        wait()
        return find(captions, text)

    for owner, name, function, caption in (
        (caption_index, "encode_casefolded", waiting_encode, "caption 1"),
        (CaptionIndex, "find_captions", waiting_find, "CAPTION 1"),  # the matches of the last filter are cached
    ):
        is_reading.clear()
        may_continue.clear()
        with monkeypatch.context() as patch, ThreadPoolExecutor(2) as threads:
            patch.setattr(owner, name, function)
            filtered = threads.submit(hits, backend, Filter(caption=caption))
            try:
                assert is_reading.wait(HANG_TIMEOUT)
                others = threads.submit(lambda: (backend.count(), backend.thumbnail("1"), len(hits(backend, Filter()))))
                assert others.result(HANG_TIMEOUT) == ((3, 3), b"jpeg", 3)
                assert not filtered.done()
            finally:
                may_continue.set()
            assert [hit_id for hit_id, _ in filtered.result(HANG_TIMEOUT)] == ["2"]
