"""Tests of the PostgreSQL backend with a real server: filters, failures of the server, writers, and text in queries."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from conftest import start_process
from llm2clip.data.image_refs import FileImage, ImageRef, TarImage
from llm2clip.runs.output_folder import FolderInUseError, FormatVersionError
from llm2clip.search.backends import IndexBackend, hide_password, open_backend
from llm2clip.search.metadata import Filter
from llm2clip.search.types import (
    Deadline,
    DeadlineExceededError,
    IndexedContent,
    IndexedImage,
    IndexUnavailableError,
    current_deadline,
)
from llm2clip.search.words import WordQuery
from postgres_fixtures import PostgresServer, get_postgres_server
from search_fixtures import (
    create_backend,
    create_patient_app,
    index_sources,
    make_postgres_url,
    search_names,
    wait_until,
)

if TYPE_CHECKING:
    from llm2clip.models.dual_encoder import DualEncoder

postgres_backend = pytest.importorskip("llm2clip.search.postgres_backend")
postgres_database = pytest.importorskip("llm2clip.search.postgres_database")
psycopg = pytest.importorskip("psycopg")
DIM = 8
QUERY = np.eye(DIM, dtype=np.float32)[0]
HOSTILE_TEXTS = (
    "'; DROP TABLE images; --",
    '"; DROP SCHEMA llm2clip CASCADE; --',
    "%(path)s {path} %s $1 :path",
    "\\' OR true --",
    "50%_off\\",
    "NUL \0 and a lone surrogate \ud800",
    "the characters that stand for them: \U0010f7fe\0\U0010f7fe\U0010f7ff\U0010f801\U0010ffff",
)


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    """The PostgreSQL server, which is started again if a test has killed it."""
    server = get_postgres_server()
    yield server
    if not server.is_running:
        server.start()


def test_waiting_for_a_connection_ends_at_the_deadline(tmp_path: Path) -> None:
    backend = create_backend("postgres", tmp_path)
    token = current_deadline.set(Deadline(time.monotonic() + 0.01, 0.01))
    try:
        with ExitStack() as stack:
            for _ in range(postgres_database.MAX_CONNECTIONS):
                stack.enter_context(backend._db._slots)
            with pytest.raises(DeadlineExceededError):
                backend.read_metadata()
    finally:
        current_deadline.reset(token)
    assert backend.read_metadata() == {}


def make_content(number: int, vector: np.ndarray | None = None, side: int = 100) -> IndexedContent:
    if vector is None:
        vector = np.random.default_rng(number).standard_normal(DIM)
    half = (vector / np.linalg.norm(vector)).astype(np.float16)
    return IndexedContent(f"hash {number}".encode(), half, f"thumbnail {number}".encode(), width=side, height=side + 1)


def make_image(
    name: str, captions: Sequence[str] = (), taken: float = 0.0, ref: ImageRef | None = None
) -> IndexedImage:
    return IndexedImage(name, ref or FileImage(name), "/source", "1", tuple(captions), taken=taken)


def add_images(backend: IndexBackend, numbers: Sequence[int]) -> None:
    """Add an image with its own content for each number."""
    contents = [make_content(number) for number in numbers]
    images = [(make_image(f"/p/{number}.png"), content.hash) for number, content in zip(numbers, contents, strict=True)]
    backend.add_images(contents, images)


def create_index(tmp_path: Path, kind: str = "postgres") -> IndexBackend:
    backend = create_backend(kind, tmp_path / kind)
    backend.initialize({"model": "m", "fingerprint": "f", "embed_dim": DIM})
    return backend


# ---- filters --------------------------------------------------------------------------------------------------------


def test_postgres_filters_match_those_of_sqlite_on_random_data(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    backends = [create_index(tmp_path, kind) for kind in ("sqlite", "postgres")]
    folders = ["a", "A", "b c", "50%", "_", "x_y", "xay", "back\\slash", "tri[p]", "trip!", "ä", "it's", "a.tar"]
    words = ["Dog", "dog", "STRASSE", "straße", "Ärmel", "ÄRMEL", "%", "_", "\\", "狗", "'", "\0", "\ud800", "İ"]

    def choose(values: list[str], count: int) -> list[str]:
        return [values[index] for index in rng.integers(len(values), size=count)]

    images = []
    for number in range(300):
        path = "/" + "/".join([*choose(folders, int(rng.integers(1, 4))), f"{number}.png"])
        captions = [" ".join(choose(words, 3)) for _ in range(rng.integers(3))]
        ref: ImageRef = FileImage(path)
        if number % 3 == 0:
            container, _, member = path.rpartition("/")
            path, ref = f"{container}.tar!{member}", TarImage(f"{container}.tar", 512, 9, member)
        images.append(make_image(path, captions, float(rng.integers(20)), ref))
    contents = [make_content(number, side=int(rng.integers(1, 10))) for number in range(200)]
    pairs = [(image, contents[rng.integers(200)].hash) for image in images]
    for backend in backends:
        backend.add_images(contents, pairs)
        backend.remove_images([])

    def choose_filter() -> Filter:
        values: dict[str, Any] = {}
        if rng.random() < 0.6:
            name = str(rng.choice([image.name for image in images]))
            path = "/".join(name.split("/")[: rng.integers(1, 5)])
            values["path"] = str(
                rng.choice([path, path + "/", path.lstrip("/"), path[-5:], "*" + path[3:], path[:4] + "*"])
            )
            if rng.random() < 0.3:
                values["path"] = values["path"].replace("a", "?", 1)
        if rng.random() < 0.4:
            values["caption"] = " ".join(choose(words, int(rng.integers(1, 3))))[: rng.integers(0, 8)]
        for name in ("after", "before"):
            if rng.random() < 0.2:
                values[name] = float(rng.integers(20))
        if rng.random() < 0.3:
            values["min_side"] = int(rng.integers(10))
        return Filter(**values)

    matched = 0
    for image_filter in (Filter(), Filter(path="/"), Filter(caption=""), *(choose_filter() for _ in range(100))):
        for vector in (None, QUERY):
            expected, actual = (
                [
                    (hit.images, hit.image_count, hit.width, hit.height)
                    for hit in backend.search(vector, 30, image_filter)
                ]
                for backend in backends
            )
            if vector is None:
                assert actual == expected, image_filter
            else:  # images with almost equal similarity may be in another order
                assert {hit[0] for hit in actual[:20]} <= {hit[0] for hit in expected}, image_filter
        counts = [backend.count_matches(image_filter) for backend in backends]
        assert counts[0] == counts[1], image_filter
        matched += counts[0] > 0
    assert matched > 30
    assert backends[1].read_image_states(["/a", "/50%"]) == backends[0].read_image_states(["/a", "/50%"]) != {}
    assert backends[1].find_duplicates() == backends[0].find_duplicates() != []
    assert backends[1].count_images() == backends[0].count_images()


@pytest.mark.parametrize("text", HOSTILE_TEXTS)
def test_postgres_stores_and_finds_text_that_is_not_valid_in_sql(text: str, tmp_path: Path) -> None:
    backend = create_index(tmp_path)
    name = "/p/" + text.replace("\ud800", "")
    image = IndexedImage(name, FileImage(name), text, text, (text, "other"), taken=1.5)
    backend.add_images([make_content(0), make_content(1)], [(image, b"hash 0"), (make_image("/q/b"), b"hash 1")])
    for image_filter in (Filter(caption=text.upper()), Filter(path=name), Filter(path=name.removeprefix("/"))):
        [hit] = backend.search(QUERY, 9, image_filter)
        assert hit.images == (image,)
        assert backend.count_matches(image_filter) == 1
        assert [hit.images for hit in backend.search(None, 9, image_filter)] == [(image,)]
    assert backend.count_matches(Filter(caption="other" + text)) == 0  # these are two captions
    assert backend.read_image_states([text]) == {name: (text, (text, "other"))}
    assert (
        backend.read_vector(text) is None and backend.read_thumbnail(text) is None and backend.read_images(text) == ()
    )
    backend.remove_images([text, name])
    assert backend.count_images() == (1, 1)


def test_postgres_finds_names_that_are_longer_than_an_index_entry(tmp_path: Path) -> None:
    backend = create_index(tmp_path)
    name = "/p/" + "".join(map(chr, np.random.default_rng(0).integers(0x4E00, 0x9FFF, size=4000))) + ".png"
    backend.add_images([make_content(0)], [(make_image(name, [name]), b"hash 0")])
    assert search_names(backend, Filter(path=name, caption=name[-400:])) == {name.removeprefix("/p/")}


def open_writer(url: str, approximate_above: int) -> IndexBackend:
    backend: Any = open_backend(url, write=True)
    backend.approximate_above = approximate_above
    return backend


def test_postgres_approximate_search_returns_all_images_that_match_a_filter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = make_postgres_url(tmp_path)
    backend = open_writer(url, 2000)
    backend.initialize({"model": "m", "fingerprint": "f", "embed_dim": DIM})
    add_images(backend, range(1999))
    backend.finish_indexing()
    exact = [hit.id for hit in backend.search(QUERY, 10, Filter())]
    explain = "EXPLAIN SELECT id FROM contents ORDER BY vector <#> (SELECT vector FROM contents LIMIT 1) LIMIT 10"
    assert "hnsw" not in str(backend._query(explain, {}))
    add_images(backend, range(1999, 2500))
    backend.add_images([], [(make_image("/rare/a.png"), make_content(7).hash), (make_image("/rare/b"), b"hash 1500")])
    backend.finish_indexing()
    assert "contents_hnsw" in str(backend._query(explain, {}))
    exact = [hit.id for hit in _search_exactly(backend, 10)]
    hits = backend.search(QUERY, 10, Filter())
    assert len(set(exact) & {hit.id for hit in hits}) >= 9
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert len(backend.search(QUERY, 200, Filter(), offset=2300)) == 200
    statements: list[str] = []
    execute = psycopg.Connection.execute

    def record(connection: Any, statement: Any, *args: Any) -> Any:
        statements.append(str(statement))
        return execute(connection, statement, *args)

    monkeypatch.setattr(psycopg.Connection, "execute", record)
    for exact_below in (50_000, 0):
        monkeypatch.setattr(postgres_backend, "MAX_EXACT_MATCHES", exact_below)
        rare = backend.search(QUERY, 10, Filter(path="/rare"))
        assert {hit.images[0].name for hit in rare} == {"/rare/a.png", "/rare/b"}
        assert any("hnsw.ef_search" in statement for statement in statements) == (exact_below == 0)
    backend = open_writer(url, 5000)
    backend.finish_indexing()
    assert "hnsw" not in str(backend._query(explain, {}))


def _search_exactly(backend: Any, count: int) -> list[Any]:
    return sorted(backend.search(QUERY, 2500, Filter()), key=lambda hit: -hit.score)[:count]


# ---- word search: test_words.py compares both backends --------------------------------------------------------------


def search_words(backend: IndexBackend, text: str) -> dict[str, tuple[str, ...]]:
    """Return the fields that match in each image with all words of a text, keyed by file name."""
    hits = backend.search(QUERY, 100, Filter(), words=[text])
    return {Path(hit.images[0].name).name: hit.matched for hit in hits if hit.matched}


def test_postgres_reader_with_the_documented_privileges_can_search(server: PostgresServer, tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs/howto/operations.md").read_text()
    block = page.partition("```sql\n")[2].partition("```")[0]
    backend: Any = create_index(tmp_path)
    add_images(backend, [1, 2])
    statements = block.replace("photos", backend.schema).replace("reader", "search_reader").splitlines()
    with backend._db.open_transaction() as connection:
        for statement in ("CREATE ROLE search_reader LOGIN", *statements):
            connection.execute(statement)
    reader = open_backend(make_postgres_url(tmp_path / "postgres").replace("postgres@", "search_reader@"))
    assert search_names(reader) == {"1.png", "2.png"} and set(search_words(reader, "1")) == {"1.png"}


def test_postgres_reads_few_locations_to_find_the_matching_fields(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, content = create_index(tmp_path), make_content(1)
    captions = ["a cat", "a cat", "a cat", "a cat", "a dog"]
    images = [(make_image(f"/p/dog {n}.png", [caption]), content.hash) for n, caption in enumerate(captions)]
    backend.add_images([content], images)
    assert search_words(backend, "dog") == {"dog 0.png": ("caption", "name")}
    monkeypatch.setattr("llm2clip.search.postgres_backend.MATCHED_LOCATIONS", 4)
    assert search_words(backend, "dog") == {"dog 0.png": ("name",)}
    assert search_words(backend, "dog 4") == {"dog 0.png": ("caption", "name")}  # only locations with all words count


def test_postgres_word_search_accepts_very_long_texts(tmp_path: Path) -> None:
    backend = create_index(tmp_path)
    long_word = "ä" * 5000
    many_words = " ".join(f"word{number}" for number in range(150_000))  # more than a tsvector can store
    captions = [f"first {long_word} {'狗' * 5000} dog", "cat " * 20_000 + "mouse", f"start {many_words} end"]
    for number, caption in enumerate(captions):
        backend.add_images([make_content(number)], [(make_image(f"/p/{number}.png", [caption]), b"hash %d" % number)])
    for query, names in (
        ("first dog", {"0.png"}),
        (f"first {long_word[:480]}", set()),  # words match completely
        ("狗" * 400, {"0.png"}),
        ("cat mouse", {"1.png"}),
        ("start word30000", {"2.png"}),
        ("end", set()),
    ):
        assert set(search_words(backend, query)) == names, query[:20]


def test_postgres_word_search_uses_its_indexes(tmp_path: Path) -> None:
    backend: Any = open_writer(make_postgres_url(tmp_path), 0)
    backend.initialize({"model": "m", "fingerprint": "f", "embed_dim": DIM})
    contents = [make_content(number) for number in range(3000)]
    images = []
    for number, content in enumerate(contents):
        images.append((make_image(f"/p/{number}.png", [f"caption{number} 编号"]), content.hash))
    backend.add_images(contents, images)
    backend.finish_indexing()
    match, parameters = postgres_backend._make_word_match_condition(WordQuery.parse(["caption7"]))
    assert "images_words" in str(backend._query(f"EXPLAIN SELECT content FROM images WHERE {match}", parameters))
    nearest = backend.search(QUERY, 10, Filter())
    number = next(number for number in range(3000) if f"/p/{number}.png" not in str(nearest))
    hits = backend.search(QUERY, 10, Filter(), words=[f"caption{number}"])  # with the HNSW graph
    assert hits[1].images[0].name == f"/p/{number}.png" and hits[1].matched == ("caption",)
    assert [hit.id for hit in hits[:1] + hits[2:]] == [hit.id for hit in nearest[:9]]
    assert hits[1].score == pytest.approx(QUERY @ backend.read_vector(hits[1].id), abs=1e-3)


# ---- failures of the server -----------------------------------------------------------------------------------------


def test_postgres_search_reconnects_after_a_restart(server: PostgresServer, tmp_path: Path) -> None:
    backend = create_index(tmp_path)
    add_images(backend, range(5))
    names = search_names(backend)
    server.kill()
    server.start()
    assert search_names(backend) == names  # although its connections were lost
    server.kill()
    for call in (lambda: search_names(backend), backend.count_images, lambda: add_images(backend, [9])):
        with pytest.raises(IndexUnavailableError, match=r"127\.0\.0\.1.*no connection to PostgreSQL"):
            call()
    server.start()
    assert search_names(backend) == names
    add_images(backend, [9])
    assert backend.count_images() == (6, 6)


def test_postgres_searches_survive_restarts_in_mid_search(server: PostgresServer, tmp_path: Path) -> None:
    """Every search in several threads returns complete hits or raises IndexUnavailableError."""
    backend = create_index(tmp_path)
    add_images(backend, range(50))
    expected, is_done = search_names(backend), threading.Event()
    errors: list[Exception] = []
    results: list[int] = []

    def search() -> None:
        while not is_done.is_set():
            try:
                results.append(search_names(backend) == expected)
            except IndexUnavailableError:
                is_done.wait(0.01)
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=search) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            done = len(results)
            while len(results) < done + 5 and not errors:
                is_done.wait(0.01)
            server.kill()
            server.start()
    finally:
        is_done.set()
        for thread in threads:
            thread.join()
    assert not errors and all(results)
    assert search_names(backend) == expected


def test_server_answers_503_while_the_database_is_down(
    server: PostgresServer, photos: Path, dual_encoder: DualEncoder, tmp_path: Path
) -> None:
    from fastapi.testclient import TestClient

    backend = create_backend("postgres", tmp_path)
    index_sources([photos], dual_encoder, backend)
    with TestClient(create_patient_app(dual_encoder, backend), base_url="http://localhost") as client:
        request = {"texts": ["a"], "filter": {"caption": "roter"}}
        expected = client.post("/search", json=request).json()
        assert expected["total"] == 1
        hit_id = expected["hits"][0]["id"]
        server.kill()
        for response in (client.post("/search", json=request), client.get(f"/thumbnail/{hit_id}")):
            assert response.status_code == 503
            assert response.headers["retry-after"] == "1"
            assert response.json()["error"]["type"] == "index unavailable"
            assert str(server.port) not in response.text
        client.app.state.service._counts_time = -1e9  # type: ignore[attr-defined]
        assert client.get("/health").status_code == 503
        assert "llm2clip_index_images NaN" in client.get("/metrics").text
        server.start()
        assert client.post("/search", json=request).json() == expected
        assert client.get("/health").json()["images"] == 7


def test_index_run_resumes_after_the_server_was_killed(
    server: PostgresServer, photos: Path, dual_encoder: DualEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = create_backend("postgres", tmp_path)
    calls = []

    def kill_server_at_third_call(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 3:
            server.kill()
            server.start()
        add_images(*args)

    add_images = backend.add_images
    with monkeypatch.context() as patch:
        patch.setattr(backend, "add_images", kill_server_at_third_call)
        # The lock was lost, so another run could be writing: the run must end.
        with pytest.raises(IndexUnavailableError, match=r"no connection|connection that holds the lock was lost"):
            index_sources([photos], dual_encoder, backend, batch_size=2)
    _, committed = backend.count_images()
    assert committed == 2
    report = index_sources([photos], dual_encoder, backend, batch_size=2)
    assert (backend.count_images(), report.embedded) == ((7, 6), 6 - committed)


def _delete_until_killed(url: str, marker: Path) -> None:
    backend = open_backend(url, write=True)
    with backend.lock():
        for number in range(3):
            add_images(backend, [number])
        with backend._db.open_transaction() as connection:  # type: ignore[attr-defined]
            connection.execute("DELETE FROM images")
            marker.touch()
            signal.pause()


def test_killed_writer_loses_nothing_that_was_committed(server: PostgresServer, tmp_path: Path) -> None:
    create_index(tmp_path)
    url = make_postgres_url(tmp_path / "postgres")
    marker = tmp_path / "deleted"
    process = start_process(_delete_until_killed, url, marker)
    wait_until(lambda: marker.exists() or not process.is_alive())
    backend = open_backend(url, write=True)
    with pytest.raises(FolderInUseError, match="another run is writing to"), backend.lock():
        pass
    assert len(search_names(backend)) == 3  # readers do not wait for the writer
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert backend.count_images() == (3, 3)
    wait_for_lock(backend)
    add_images(backend, [3])
    assert len(search_names(backend)) == 4


def wait_for_lock(backend: IndexBackend) -> None:
    """Acquire and release the lock once the server has noticed that the connection of a killed process is closed."""

    def try_lock() -> bool:
        try:
            with backend.lock():
                return True
        except FolderInUseError:
            return False

    wait_until(try_lock)


# ---- writers --------------------------------------------------------------------------------------------------------


def test_only_one_writer_holds_the_lock(server: PostgresServer, tmp_path: Path) -> None:
    first, second = create_index(tmp_path), open_backend(make_postgres_url(tmp_path / "postgres"), write=True)
    other = create_backend("postgres", tmp_path / "other")
    with first.lock():
        with pytest.raises(FolderInUseError, match="another run is writing to"), second.lock():
            pass
        with other.lock():  # another index in the same database
            pass
        add_images(first, [0])
        second.count_images()
        terminate = "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'"
        second._query(terminate, {})
        with pytest.raises(IndexUnavailableError):
            add_images(first, [1])
        with second.lock():
            with pytest.raises(IndexUnavailableError, match="connection that holds the lock was lost"):
                add_images(first, [1])
            add_images(second, [2])
    assert search_names(first) == {"0.png", "2.png"}


def test_add_is_atomic_and_remove_deletes_contents_without_images(tmp_path: Path) -> None:
    backend = create_index(tmp_path)
    with pytest.raises(OSError, match=r"schema=index_.*null value"):
        backend.add_images([make_content(0)], [(make_image("a"), b"hash 0"), (make_image("b"), b"unknown")])
    assert backend.count_images() == (0, 0)
    add_images(backend, [0, 1])
    backend.add_images([], [(make_image("/p/0.png"), b"hash 1")])  # content 0 has no image any more
    assert len(backend.search(QUERY, 9, Filter())) == 1
    backend.remove_images([])
    assert backend.count_images() == (2, 1)
    assert backend.find_existing_hashes([b"hash 0", b"hash 1"]) == {b"hash 1"}


# ---- opening an index -----------------------------------------------------------------------------------------------


def test_postgres_rejects_missing_indexes_and_other_versions(
    server: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError, match=r"the schema 'none' does not contain an llm2clip index"):
        open_backend(server.url("none"))
    backend = create_index(tmp_path)
    assert backend.read_metadata() == {"model": "m", "fingerprint": "f", "embed_dim": DIM}
    with backend._db.open_transaction() as connection:  # type: ignore[attr-defined]
        connection.execute("UPDATE metadata SET value = '1' WHERE key = 'format_version'")
    with pytest.raises(FormatVersionError, match=r"format version 1, but.* version 2.*`llm2clip index`"):
        open_backend(make_postgres_url(tmp_path / "postgres"))
    monkeypatch.setattr(postgres_database, "MIN_PGVECTOR", (99, 0))
    with pytest.raises(ValueError, match=r"pgvector 0\.\d+\.\d+ is too old; llm2clip requires 99\.0"):
        open_backend(make_postgres_url(tmp_path / "postgres"))
    with pytest.raises(IndexUnavailableError, match='database "none" does not exist'):
        open_backend(server.url("x").replace("/postgres?", "/none?"))


def test_postgres_connections_to_other_machines_are_encrypted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_sslmode(url: str) -> str | None:
        options = postgres_database.conninfo_to_dict(postgres_database.parse_index_url(url)[0])
        return options.get("sslmode")

    for local in ("127.0.0.1", "localhost", "[::1]", "", "%2Frun%2Fpostgresql", "localhost,127.0.0.1"):
        assert read_sslmode(f"postgresql://u:p@{local}/db") is None
        assert read_sslmode(f"postgresql://u:p@{local}/db?sslmode=disable") == "disable"
    for remote in ("192.0.2.1", "192.0.2.1:5433", "localhost,192.0.2.1"):
        assert read_sslmode(f"postgresql://u@{remote}/db") == "require"
        assert read_sslmode(f"postgresql://u@{remote}/db?sslmode=verify-full") == "verify-full"
        for mode in ("disable", "allow"):
            with pytest.raises(ValueError, match=r"unencrypted.*ssh -L"):
                read_sslmode(f"postgresql://u@{remote}/db?sslmode={mode}")
    for parameters in ("hostaddr=192.0.2.1", "host=192.0.2.1,192.0.2.2&hostaddr=,"):
        assert read_sslmode(f"postgresql://u@localhost/db?{parameters}") == "require"
    with monkeypatch.context() as patch:
        patch.setenv("PGHOST", "192.0.2.1")
        assert read_sslmode("postgresql:///db") == "require"
        patch.setenv("PGSSLMODE", "disable")
        with pytest.raises(ValueError, match="unencrypted"):
            read_sslmode("postgresql:///db")
    service_file = tmp_path / "services.conf"
    service_file.write_text("[photos]\nhost=192.0.2.1\nsslmode=allow\n")
    monkeypatch.setenv("PGSERVICEFILE", str(service_file))
    with pytest.raises(ValueError, match="unencrypted"):
        read_sslmode("postgresql:///db?service=photos")


def test_postgres_rejects_invalid_urls() -> None:
    for schema in ("", "a;b", 'a"b', "a.b", "pg_x", "public", "1a", "a" * 64, "ä"):
        with pytest.raises(ValueError, match="the schema must consist of ASCII letters"):
            open_backend(f"postgresql://localhost/db?schema={schema}")
    with pytest.raises(ValueError, match=r"must have the form postgresql://USER@HOST/DATABASE\?schema=NAME"):
        open_backend("postgresql://localhost/db?collection=photos")
    for address in ("u:PW@SECRET@h/x", "u:SECRET/PW@h/x", "u@localhost@192.0.2.1/x"):
        with pytest.raises(ValueError, match="must be percent-encoded") as error:
            open_backend(f"postgresql://{address}")
        assert "SECRET" not in str(error.value)


def test_hide_password_keeps_the_rest_of_a_location() -> None:
    for location, hidden in (
        ("postgresql://u:secret@h:5432/db?schema=s", "postgresql://u@h:5432/db?schema=s"),
        ("postgresql://h/db?user=u&password=secret&schema=s", "postgresql://h/db?user=u&password=***&schema=s"),
        ("postgresql://u:se/cr@et@h/db", "postgresql://u@h/db"),
        ("postgresql://u@h/db", "postgresql://u@h/db"),
        ("postgresql://u:PW@SECRET@h/x", "postgresql://u@h/x"),
        ("postgresql://u@h/x?passwd=secret&schema=s", "postgresql://u@h/x?passwd=***&schema=s"),
        ("postgresql://h/x?options=-c%20x%3Dsecret&pass%77ord=secret", "postgresql://h/x?options=***&pass%77ord=***"),
        ("a+http://u:secret@h/photos", "a+http://u@h/photos"),
        ("/folder:a@b?c=d", "/folder:a@b?c=d"),
    ):
        assert hide_password(location) == hidden


def test_commands_index_and_search_in_postgres_without_printing_the_password(
    server: PostgresServer, photos: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from llm2clip.cli import main

    url = make_postgres_url(tmp_path).replace("postgres@", "postgres:secret@")
    assert main(["index", str(photos), "--model", str(model_folder), "--out", url, "--workers", "0"]) == 0
    output = capsys.readouterr()
    assert "7 images, 6 distinct" in output.out and "schema=index_" in output.out
    assert f"Next: llm2clip search '{make_postgres_url(tmp_path)}' " in output.out
    assert main(["search", url, "--caption", "roter", "--paths"]) == 0
    found = capsys.readouterr()
    assert found.out.strip().endswith("0.png")
    server.kill()
    assert main(["search", url, "red"]) == 1
    error = capsys.readouterr().err
    assert "no connection to PostgreSQL" in error and "Traceback" not in error
    assert "secret" not in output.out + output.err + found.err + error
