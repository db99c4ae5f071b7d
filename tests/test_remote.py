"""Sources in object storage and on web servers: the same records as from disk, also if requests fail."""

import asyncio
import hashlib
import json
import os
import pickle
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import HANG_TIMEOUT
from format_fixtures import (
    FORMATS,
    ROWS,
    as_folder_with_captions,
    as_glob_of_tars,
    as_images_with_json,
    as_parquet_of_bytes,
    as_tar,
    image_bytes,
    tar_members,
    write_jsonl,
    write_tar,
)
from llm2clip.cli import main
from llm2clip.cli.commands import format_command
from llm2clip.data import build_table, remote, storage
from llm2clip.data.build_table import build_record_table
from llm2clip.data.formats import build_file_part, find_source_files, read_rows
from llm2clip.data.image_order import EpochImageOrders
from llm2clip.data.image_refs import FileImage, ParquetImage, TarImage
from llm2clip.data.images import iter_image_batches
from llm2clip.data.records import open_records
from llm2clip.data.remote import CacheFullError
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.storage import RemoteError, ReplacedFileError
from llm2clip.io_utils import FatalDataError, get_cache_dir, hide_url_secrets
from llm2clip.runs.output_folder import convert_to_plain_types
from llm2clip.runs.run_description import describe_run
from llm2clip.search.build import _parse_index_source
from remote_fixtures import START_S3_SERVER, WebServer, upload_folder

for package in ("aiohttp", "fsspec", "moto", "s3fs"):
    pytest.importorskip(package, reason="requires the packages of the extra `remote`")

DATA = bytes(range(256)) * 40


def read_all(path: str, log: SkipLog | None = None) -> list[tuple[Any, ...]]:
    """Read everything in a source, with the bytes of the images."""
    records = list(open_records(path, log))
    return [(r.id, r.texts, r.split, r.image.read() if r.image else None) for r in records]


@pytest.fixture(autouse=True)
def clean_remote_state(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    """Give each test an empty cache, no pinned versions, and short delays. Wait for its background downloads."""
    monkeypatch.setenv("LLM2CLIP_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("_versions", "_failures"):
        monkeypatch.setattr(remote, name, {})
    monkeypatch.setattr(storage, "_filesystems", {})
    monkeypatch.setattr(remote, "_unlisted_allowances", {})
    monkeypatch.setattr(remote, "TOUCH_SECONDS", -1)
    monkeypatch.setattr(storage, "FIRST_DELAY", 0.01)
    yield
    remote._pending.clear()
    for _ in range(remote.PREFETCH_THREADS):
        assert remote._free_threads.acquire(timeout=HANG_TIMEOUT)
    for _ in range(remote.PREFETCH_THREADS):
        remote._free_threads.release()


@pytest.fixture
def web_server() -> Generator[WebServer]:
    server = WebServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def s3_endpoint() -> Generator[str]:
    """Start an S3 server in a process of its own, and return its address."""
    process = subprocess.Popen(
        [sys.executable, "-c", START_S3_SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    process.communicate()


@pytest.fixture
def bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Create an empty bucket, and return its name."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    name = "bucket-" + hashlib.md5(request.node.name.encode()).hexdigest()[:12]
    storage.get_filesystem("s3").mkdir(name)
    return name


# ---- records ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", FORMATS, ids=lambda write: write.__name__)
def test_records_from_s3_equal_those_from_disk(folder: Path, bucket: str, write: Callable[[Path], str]) -> None:
    path = write(folder)
    upload_folder(folder, bucket)
    logs = SkipLog(), SkipLog()
    records = read_all(path.replace(str(folder), f"s3://{bucket}"), logs[0])
    assert records == read_all(path, logs[1]) and len(records) == len(ROWS)
    assert logs[0].summary() == logs[1].summary()


@pytest.mark.parametrize(
    "write",
    [as_folder_with_captions, as_glob_of_tars, as_images_with_json, as_parquet_of_bytes],
    ids=lambda write: write.__name__,
)
def test_records_from_a_web_server_equal_those_from_disk(
    folder: Path, web_server: WebServer, write: Callable[[Path], str]
) -> None:
    path = write(folder)
    web_server.add_folder(folder)
    assert read_all(path.replace(str(folder), web_server.url)) == read_all(path)


def test_tables_and_batches_from_s3_equal_those_from_disk(folder: Path, bucket: str) -> None:
    for number in range(3):
        members = [(f"{number}.{i}".replace(".", "-") + ".jpg", image_bytes(number)) for i in range(2)]
        members += [(name.replace(".jpg", ".txt"), f"caption {name}".encode()) for name, _ in members]
        write_tar(folder / f"{number:03}.tar", sorted(members))
    upload_folder(folder, bucket)
    tables = [build_record_table([f"{root}/{{000..002}}.tar"], {}, SkipLog()) for root in (folder, f"s3://{bucket}")]
    assert list(tables[0].iterate_texts(["captions"])) == list(tables[1].iterate_texts(["captions"]))
    assert [len(table) for table in tables] == [3, 3]  # copies are merged
    assert tables[0].get_numeric_column("image_hash").tolist() == tables[1].get_numeric_column("image_hash").tolist()
    images = [pickle.loads(pickle.dumps(table.get_images())) for table in tables]
    batches = [list(iter_image_batches(refs, lambda pixels: pixels.sum(), workers=0)) for refs in images]
    assert batches[0] == batches[1] and not batches[0][0][2]


def test_batches_download_the_next_shards_ahead(
    folder: Path, web_server: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(20):
        write_tar(folder / f"{number:03}.tar", [("a.jpg", image_bytes(number)), ("a.txt", b"caption")])
    web_server.add_folder(folder)
    urls = [f"{web_server.url}/{number:03}.tar" for number in range(20)]
    table = build_record_table([f"{web_server.url}/{{000..019}}.tar"], {}, SkipLog())
    wait_until_cached(urls)  # background threads may still be downloading
    orders = EpochImageOrders(table, np.ones(20, bool), seed=1)
    assert orders.image_order == "shards"
    monkeypatch.setenv("LLM2CLIP_CACHE", str(tmp_path / "empty-cache"))
    first_image = int(orders.take(0, 0, 1)[0])
    wait_until_cached(urls)
    num_requests = web_server.count("GET")
    orders.take(0, 1, 2)
    image = table.get_images()[first_image]
    assert image is not None and image.read() == image_bytes(first_image)
    assert web_server.count("GET") == num_requests


def wait_until_cached(urls: list[str]) -> None:
    deadline = time.monotonic() + 60
    while not all(map(is_cached, urls)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_changed_file_is_read_again(folder: Path, bucket: str) -> None:
    source = f"s3://{bucket}/x.tar"
    for rows in (ROWS[:2], ROWS):
        write_tar(folder / "x.tar", tar_members(folder, rows))
        upload_folder(folder, bucket)
        assert len(build_record_table([source], {}, SkipLog())) == len(rows)


def test_parquet_images_of_a_web_server_are_read_from_the_cache(tmp_path: Path, web_server: WebServer) -> None:
    cells = [os.urandom(1000) for _ in range(8)]
    pq.write_table(pa.table({"image": cells}), tmp_path / "x.parquet", row_group_size=2)
    web_server.add_folder(tmp_path)
    for row in (5, 2):
        assert ParquetImage(f"{web_server.url}/x.parquet", row, "image").read() == cells[row]
    assert [request[0] for request in web_server.requests].count("GET") == 1


def test_folders_globs_and_braces_are_resolved_in_order(bucket: str) -> None:
    names = ["b/1.tar", "b/0.tar", "b/.hidden.tar", "c.tar", "note.txt", "b/deep/2.tar"]
    storage.get_filesystem("s3").pipe({f"{bucket}/{name}": b"x" for name in names})
    root = f"s3://{bucket}"
    folder_files = [build_file_part(f"{root}/b/{n}.tar") for n in range(2)]
    assert find_source_files(f"{root}/b/*.tar") == folder_files
    assert find_source_files(f"{root}/b/{{1..0}}.tar") == folder_files[::-1]
    assert find_source_files(f"{root}/b")[-2:] == find_source_files(f"{root}/b/")[-2:] == folder_files
    other_files = [build_file_part(f"{root}/c.tar"), build_file_part(f"{root}/b/deep/2.tar")]
    assert find_source_files(root, all_files=True) == [other_files[0], *folder_files, other_files[1]]
    for missing in ("x.tar", "x/*.tar", "x/{0..1}.tar", "x"):
        with pytest.raises(FileNotFoundError, match=f"{root}/x.*: no such file or folder"):
            find_source_files(f"{root}/{missing}")
    storage.get_filesystem("s3").pipe({f"{bucket}/z.zip": b"x"})
    with pytest.raises(ValueError, match=r"z\.zip: unknown format; unpack the archive"):
        find_source_files(f"{root}/z.zip")


# ---- paths in data ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "name", "joined"),
    [
        ("s3://b/data", "a.jpg", "s3://b/data/a.jpg"),
        ("s3://b/data", "../a.jpg", "s3://b/a.jpg"),
        ("s3://b/data", "../../../a.jpg", "s3://b/a.jpg"),
        ("s3://b/data", "/etc/passwd", "s3://b/etc/passwd"),
        ("s3://b/data", "x\\a.jpg", "s3://b/data/x/a.jpg"),
        ("s3://b", "a.jpg", "s3://b/a.jpg"),
        ("hf://datasets/o/n@v1/d", "../../../../x.jpg", "hf://datasets/o/n@v1/x.jpg"),
        ("https://h:1/d", "a b?.jpg", "https://h:1/d/a%20b%3F.jpg"),
        ("https://h/d", "https://other/x.jpg", "https://h/d/https%3A/other/x.jpg"),
        ("", "https://other/x.jpg", "./https://other/x.jpg"),
        ("/data", "s3://b/x.jpg", "/data/s3://b/x.jpg"),
        ("/data", "../a.jpg", "/data/../a.jpg"),
    ],
)
def test_paths_in_data_stay_on_their_side(folder: str, name: str, joined: str) -> None:
    assert storage.join_path(folder, name) == joined


def test_remote_caption_files_cannot_name_local_files(folder: Path, web_server: WebServer) -> None:
    image = folder / ROWS[0]["image"]
    web_server.files["/x.jsonl"] = json.dumps({"image": str(image), "caption": "c"}).encode()
    web_server.files["/captions.txt"] = f"{image},c".encode()
    for name in ("x.jsonl", "captions.txt"):
        log = SkipLog(max_skipped=1)
        with pytest.raises(ValueError, match="no records"):
            list(open_records(f"{web_server.url}/{name}", log))
        assert log.skipped == {"missing image": 1}


def test_local_caption_files_cannot_name_remote_files(
    tmp_path: Path, web_server: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # so that the caption file's folder is ""
    web_server.files["/a.jpg"] = image_bytes(0)
    write_jsonl(Path("x.jsonl"), [{"image": f"{web_server.url}/a.jpg", "caption": "c"}])
    Path("captions.txt").write_text(f"{web_server.url}/a.jpg,c")
    for name in ("x.jsonl", "captions.txt"):
        (record,) = open_records(name, image_check="unchecked")
        with pytest.raises(FileNotFoundError):
            record.image.read()  # type: ignore[union-attr]
    assert not web_server.requests


# ---- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "fault"),
    [*product(["http", "s3"], ["reset", "truncate", "slow", "500", "503", "429"]), ("http", "other range")],
)
def test_temporary_faults_are_retried(
    web_server: WebServer, monkeypatch: pytest.MonkeyPatch, scheme: str, fault: str
) -> None:
    monkeypatch.setattr(storage, "READ_TIMEOUT", 0.3)
    monkeypatch.setattr(storage, "BLOCK_BYTES", 4000)
    monkeypatch.setenv("AWS_ENDPOINT_URL", web_server.url)
    web_server.files["/b/x.tar"] = DATA
    url = "s3://b/x.tar" if scheme == "s3" else f"{web_server.url}/b/x.tar"
    assert remote.get_remote_version(url).startswith(f"{len(DATA)}-etag-")
    web_server.faults += ["", fault, fault]  # in the second block
    with remote.open_file(url) as file:
        assert file.read() == DATA
    assert not web_server.faults
    ranges = [request[2] for request in web_server.requests if request[0] == "GET"]
    assert ranges == [f"bytes={start}-{end}" for start, end in [(0, 3999), *[(4000, 7999)] * 3, (8000, 10239)]]


def test_servers_without_ranges_are_read_from_the_start(web_server: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "BLOCK_BYTES", 4000)
    web_server.has_ranges = False
    web_server.files["/x.tar"] = DATA
    web_server.faults += ["truncate"]
    assert Path(remote.get_local_path(f"{web_server.url}/x.tar")).read_bytes() == DATA
    assert web_server.count("GET") == 2


def test_delays_grow(web_server: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    delays: list[float] = []
    monkeypatch.setattr(storage.time, "sleep", delays.append)
    monkeypatch.setattr(storage, "FIRST_DELAY", 1.0)
    web_server.files["/x.tar"] = DATA
    url = f"{web_server.url}/x.tar"
    remote.get_remote_version(url)
    web_server.faults += ["503"] * 7
    remote.get_local_path(url)
    assert all(0.5 * 2**i <= delay <= 2**i for i, delay in enumerate(delays[:5])) and len(delays) == 7


def test_a_failing_shard_is_named_and_skipped(folder: Path, web_server: WebServer) -> None:
    as_tar(folder)
    web_server.add_folder(folder)
    web_server.files |= {f"/{n}.tar": web_server.files["/x.tar"] for n in range(2)}
    web_server.files["/0.tar"] += b"x"
    url, log = f"{web_server.url}/{{0..1}}.tar?key=SECRET", SkipLog(max_skipped=0.3)
    sources = find_source_files(url)
    web_server.broken = {"/0.tar"}
    records = list(open_records(url, log))
    assert len(records) == len(ROWS) and len(sources) == 2
    assert log.skipped == {"unreadable file": 1}
    assert log.examples == [
        f"{web_server.url}/0.tar, row 1: unreadable file: {web_server.url}/0.tar: HTTP status 503 (after 8 attempts)"
    ]
    num_requests = len(web_server.requests)
    with pytest.raises(RemoteError):
        TarImage(sources[0].path, 512, 10).read()  # no further attempts for each of its images
    assert len(web_server.requests) == num_requests


def test_the_next_run_tries_again_to_read_a_failed_shard(
    folder: Path, web_server: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, rows in (("0", ROWS[:1]), ("1", ROWS[1:])):
        write_tar(folder / f"{name}.tar", tar_members(folder, rows))
    web_server.add_folder(folder)
    url = f"{web_server.url}/{{0..1}}.tar"
    web_server.broken = {"/0.tar"}
    assert [len(build_record_table([url], {}, SkipLog(max_skipped=0.5))) for _ in range(2)] == [2, 2]
    web_server.broken = set()
    assert len(build_record_table([url], {}, SkipLog(max_skipped=0.5))) == 2  # all processes of a run use the same rows
    monkeypatch.setattr(build_table, "START_TIME", time.time_ns())
    monkeypatch.setattr(remote, "_failures", {})
    assert len(build_record_table([url], {}, SkipLog())) == 3


def test_permanent_errors_are_not_retried(web_server: WebServer) -> None:
    web_server.files["/x.tar"] = DATA
    for status, message in (("403", "HTTP status 403. Check your credentials"), ("404", "no such file or folder")):
        url = f"{web_server.url}/x.tar?{status}"
        remote.get_remote_version(url)
        before = web_server.count("GET")
        web_server.faults += [status]
        with pytest.raises(RemoteError, match=message):
            remote.get_local_path(url)
        assert web_server.count("GET") == before + 1
    with pytest.raises(RemoteError, match=r"127\.0\.0\.1:1/x\.tar: .*after 4 attempts"):
        find_source_files("http://127.0.0.1:1/x.tar")


@pytest.mark.parametrize("scheme", ["http", "s3"])
def test_a_file_that_is_replaced_during_a_run_stops_the_run(
    folder: Path, web_server: WebServer, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", web_server.url)
    as_tar(folder)
    web_server.add_folder(folder, "/b")
    url = "s3://b/x.tar" if scheme == "s3" else f"{web_server.url}/b/x.tar"
    images = [record.image for record in open_records(url)]
    web_server.files["/b/x.tar"] = web_server.files["/b/x.tar"].replace(b"cat", b"dog")
    assert [image.read() for image in images if image]  # from the cache
    for file in remote.get_cache_folder().rglob("*.tar"):
        file.unlink()
    with pytest.raises(ReplacedFileError, match=rf"{url} was replaced during the run"):
        list(iter_image_batches(images, lambda pixels: 0, workers=0))  # type: ignore[arg-type]
    with pytest.raises(ReplacedFileError, match="was replaced"):
        list(open_records_without_lookup(url))


def open_records_without_lookup(url: str) -> Any:
    return read_rows(build_file_part(url))


def test_a_file_that_is_replaced_between_two_blocks_is_rejected(
    web_server: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "BLOCK_BYTES", 4000)
    monkeypatch.setenv("AWS_ENDPOINT_URL", web_server.url)
    web_server.files["/b/x.tar"] = DATA
    fetch = storage.fetch_byte_range

    def fetch_and_replace(*args: Any) -> None:
        fetch(*args)
        web_server.files["/b/x.tar"] = DATA[::-1]

    monkeypatch.setattr(storage, "fetch_byte_range", fetch_and_replace)
    for url in ("s3://b/x.tar", f"{web_server.url}/b/x.tar"):
        web_server.files["/b/x.tar"] = DATA
        with pytest.raises(ReplacedFileError):
            remote.get_local_path(url)
    assert not list(remote.get_cache_folder().rglob("*.tar"))


# ---- cache -----------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_files_are_removed(web_server: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(remote.SIZE_VARIABLE, str(3.5 * len(DATA) / 1e9))
    urls = [f"{web_server.url}/{n}.tar" for n in range(4)]
    web_server.files |= {f"/{n}.tar": DATA for n in range(4)}
    with remote.open_file(urls[0]) as in_use:
        for url in [urls[1], urls[2], urls[1], urls[3]]:
            remote.get_local_path(url)
            time.sleep(0.02)
        assert [is_cached(url) for url in urls] == [True, True, False, True]
        assert in_use.read() == DATA
    monkeypatch.setenv(remote.SIZE_VARIABLE, str(0.5 * len(DATA) / 1e9))
    with pytest.raises(CacheFullError, match=r"2\.tar: .* limited to .* Raise the limit"):
        remote.get_local_path(urls[2])
    monkeypatch.setenv(remote.SIZE_VARIABLE, "x")
    with pytest.raises(ValueError, match="must be a number of gigabytes"):
        remote.get_local_path(urls[2])


def is_cached(url: str) -> bool:
    return remote.get_cached_path(url, remote.get_remote_version(url)).exists()


def test_a_full_disk_stops_the_run(folder: Path, web_server: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    as_tar(folder)
    web_server.add_folder(folder)
    url = f"{web_server.url}/x.tar"

    def fetch_to_full_disk(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "fetch_byte_range", fetch_to_full_disk)
    with pytest.raises(CacheFullError, match=r"x\.tar: cannot write .*No space left .* LLM2CLIP_CACHE"):
        list(open_records(url))
    assert not is_cached(url)


def test_a_full_disk_frees_the_cache(web_server: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    urls = [f"{web_server.url}/{n}.tar" for n in range(2)]
    web_server.files |= {f"/{n}.tar": DATA for n in range(2)}
    remote.get_local_path(urls[0])
    fetch = storage.fetch_byte_range

    def fetch_if_space(*args: Any) -> None:
        if is_cached(urls[0]):
            raise OSError(28, "No space left on device")
        fetch(*args)

    monkeypatch.setattr(storage, "fetch_byte_range", fetch_if_space)
    assert Path(remote.get_local_path(urls[1])).read_bytes() == DATA
    assert not is_cached(urls[0])


def test_two_processes_download_a_file_once(web_server: WebServer) -> None:
    web_server.files["/x.tar"] = DATA * 100
    code = "import sys; from llm2clip.data.remote import open_file; print(len(open_file(sys.argv[1]).read()))"
    command = [sys.executable, "-c", code, f"{web_server.url}/x.tar"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0] for process in processes] == [f"{len(DATA) * 100}\n"] * 2
    assert web_server.count("GET") == 1


def test_prefetch_downloads_in_the_background(web_server: WebServer) -> None:
    web_server.files |= {f"/{n}.tar": DATA for n in range(10)}
    urls = [f"{web_server.url}/{n}.tar" for n in range(10)]
    remote.prefetch_remote_files([*urls, f"{web_server.url}/missing.tar", "/local.tar"])
    wait_until_cached(urls)
    num_requests = web_server.count("GET")
    for url in urls:
        with remote.open_file(url) as file:
            assert file.read() == DATA
    assert web_server.count("GET") == num_requests


def test_prefetch_has_few_threads_and_prefers_the_latest_call(monkeypatch: pytest.MonkeyPatch) -> None:
    started, threads, proceed = [], set(), threading.Event()

    def download(url: str) -> None:
        started.append(url)
        threads.add(threading.current_thread())
        proceed.wait()

    monkeypatch.setattr(remote, "get_local_path", download)
    for call in range(20):
        remote.prefetch_remote_files([f"http://host/{call}-{n}.tar" for n in range(10)])
    while len(started) < remote.PREFETCH_THREADS:
        time.sleep(0.001)
    proceed.set()
    while "http://host/19-9.tar" not in started:
        time.sleep(0.001)
    assert len(threads) == remote.PREFETCH_THREADS
    assert {f"http://host/19-{n}.tar" for n in range(4, 10)} <= set(started)
    assert len(started) <= remote.PREFETCH_THREADS + 10


def test_damaged_files_are_downloaded_again(web_server: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    web_server.files["/x.tar"] = DATA
    path = Path(remote.get_local_path(f"{web_server.url}/x.tar"))
    for damaged in (DATA[:100], b"x" * len(DATA)):
        path.write_bytes(damaged)
        assert Path(remote.get_local_path(f"{web_server.url}/x.tar")).read_bytes() == DATA
    num_requests = len(web_server.requests)
    assert Path(remote.get_local_path(f"{web_server.url}/x.tar")).read_bytes() == DATA
    assert len(web_server.requests) == num_requests
    path.unlink()
    os.mkfifo(path)  # reading it would never end
    with pytest.raises(OSError, match="is not a regular file"):
        remote.get_local_path(f"{web_server.url}/x.tar")
    assert remote._remove_cached_files(list(remote._list_cached_files()), 1) == 0
    path.unlink()
    monkeypatch.setattr(remote.os, "utime", lambda *_: None)
    with pytest.raises(FatalDataError, match="does not store modification times"):
        remote.get_local_path(f"{web_server.url}/x.tar")


def test_listings_of_web_servers_are_limited(web_server: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    web_server.files |= {f"/d/{number}.jpg": b"" for number in range(9)}
    assert len(remote.list_folder(f"{web_server.url}/d/")) == 9
    monkeypatch.setattr(storage, "MAX_LISTING_BYTES", 100)
    with pytest.raises(RemoteError, match=r"/d/: ValueError: the folder listing exceeds 100 bytes"):
        remote.list_folder(f"{web_server.url}/d/")
    monkeypatch.setattr(remote, "_list_remote_folder", lambda _: ["a.jpg", "d/"])  # the folder contains itself
    with pytest.raises(RemoteError, match=r"/d/d/d: more than 30,000 folders, or more than 16 nested folders"):
        list(remote.walk_folder(f"{web_server.url}/d/"))
    monkeypatch.setattr(remote, "MAX_FOLDERS", 3)
    with pytest.raises(RemoteError, match=r"/d/d/d/d: more than 3 folders"):
        list(remote.walk_folder(f"{web_server.url}/d/"))


# ---- credentials -----------------------------------------------------------------------------------------------------


def test_messages_contain_no_credentials(web_server: WebServer, tmp_path: Path) -> None:
    url = f"{web_server.url}/x.jsonl?sig=SECRET"
    web_server.files["/x.jsonl"] = b'{"image": "missing.jpg", "caption": "c"}\nnot json\n'
    log = SkipLog(tmp_path / "skipped.jsonl", max_skipped=0.0)
    with pytest.raises(ValueError, match="2 of 2 rows skipped") as error:
        list(open_records(url, log))
    assert "SECRET" not in str(error.value) + (tmp_path / "skipped.jsonl").read_text()
    web_server.faults += ["403"]
    for failing in (f"{web_server.url}/gone.tar?sig=SECRET", "http://127.0.0.1:1/x.tar?sig=SECRET"):
        with pytest.raises(RemoteError) as remote_error:
            find_source_files(failing)
        assert "SECRET" not in str(remote_error.value)
        assert remote_error.value.__cause__ is None and remote_error.value.__suppress_context__
    assert "SECRET" not in str(FileImage(url)) + str(TarImage(url, 0, 1)) + str(ParquetImage(url, 0, "image"))
    with pytest.raises(ValueError, match=r"^https://host/x\.tar: a URL must not contain a user name"):
        find_source_files("https://user:SECRET@host/x.tar")
    text = "cannot read https://u:p@h.org/a.tar?x=1&y=2: HTTP status 403, s3://b/a?.tar"
    assert hide_url_secrets(text) == "cannot read https://h.org/a.tar: HTTP status 403, s3://b/a?.tar"


def test_reports_and_commands_contain_no_credentials(
    web_server: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    web_server.files |= {"/x.jsonl": b'{"image": "a.png", "caption": "a dog"}\n', "/a.png": image_bytes(0)}
    args = ["data", f"{web_server.url}/x.jsonl?X-Amz-Signature=SECRET&x=1", "--report", str(tmp_path / "page.html")]
    monkeypatch.setattr(sys, "argv", ["llm2clip", *args])
    monkeypatch.setattr(build_table, "get_cache_dir", lambda: tmp_path / "cache")
    assert main(args) == 0
    page = (tmp_path / "page.html").read_text()
    assert f"{web_server.url}/x.jsonl" in page and "SECRET" not in page + capsys.readouterr().out
    assert "SECRET" not in f"{describe_run(0)} {format_command(*args)} {convert_to_plain_types({'data': args})}"
    assert stat.S_IMODE((tmp_path / "cache/records").stat().st_mode) == 0o700  # image URLs keep their signatures
    monkeypatch.setenv("LLM2CLIP_CACHE", str(tmp_path / "new/cache"))
    assert stat.S_IMODE(get_cache_dir().stat().st_mode) == 0o700


def test_redirects_to_other_hosts_carry_no_credentials(
    web_server: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password SECRET")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    target = WebServer()
    target.files["/x.tar"] = DATA
    web_server.headers = {"Location": f"http://localhost:{target.port}/x.tar"}
    web_server.faults += ["302"] * 10
    assert Path(remote.get_local_path(f"{web_server.url}/x.tar")).read_bytes() == DATA
    assert all(request[3].startswith("Basic ") for request in web_server.requests)
    assert target.requests and not any(request[3] for request in target.requests)
    target.close()


@pytest.mark.parametrize(
    ("headers", "is_allowed"),
    [
        ({"Location": "https://h/x"}, True),
        ({"Location": "/x"}, True),
        ({"Location": "//h/x"}, True),
        ({"Location": "http://h/x"}, False),
        ({"Location": "HTTP://h/x"}, False),
        ({"Location": "ht\ttp://h/x"}, False),
        ({"Location": "\thttp://h/x"}, False),
        ({"Location": "\x01 http://h/x"}, False),
        ({"URI": "http://h/x"}, False),
    ],
)
def test_redirects_from_https_to_http_are_rejected(headers: dict[str, str], is_allowed: bool) -> None:
    redirect = SimpleNamespace(url=SimpleNamespace(scheme="https"), response=SimpleNamespace(headers=headers))
    with nullcontext() if is_allowed else pytest.raises(ValueError, match="https to http"):
        asyncio.run(storage._check_redirect(None, None, redirect))


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "botocore.session", None)
    with pytest.raises(ImportError, match=r"s3:// requires additional .* Run pip install 'llm2clip\[remote\]'"):
        find_source_files("s3://bucket/x.tar")


def test_remote_images_cannot_be_indexed() -> None:
    with pytest.raises(ValueError, match=r"s3://b/x\.tar: only local images can be indexed"):
        _parse_index_source("s3://b/x.tar", {})
