"""Embedding store: lookup, readers, atomic shards, resuming, repair, merging, and the key index."""

import hashlib
import json
import mmap
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from conftest import HANG_TIMEOUT, run_distributed, run_in_process
from llm2clip.cli import main
from llm2clip.cpu_tuning import get_available_memory
from llm2clip.data.records import Record
from llm2clip.io_utils import atomic_path
from llm2clip.models.loading import fingerprint
from llm2clip.models.text.caption_encoder import CaptionEncoder
from llm2clip.runs.output_folder import FolderInUseError, FormatVersionError, hold_folder_lock
from llm2clip.store import writer
from llm2clip.store.encode import embed
from llm2clip.store.layout import (
    KeyIndex,
    StoreError,
    build_key_index,
    read_refused_captions,
    read_shards,
    sort_keys,
)
from llm2clip.store.maintenance import merge_stores, repair_store
from llm2clip.store.store import EmbeddingStore, drop_refused_captions
from llm2clip.store.writer import StoreWriter, get_shard_path, write_incoming_captions

CAPTIONS = [f"caption number {i} of some" for i in range(50)]
IDENTITY = {"weights": "abc", "layers": 3}


def write_store(folder: Path, *shards: list[str], first: int = 0, dtype: str = "float16", **identity: Any) -> Path:
    """Write shards of captions whose embeddings have two dimensions and contain the number of the caption."""
    writer = StoreWriter(folder, IDENTITY | identity, 2, dtype)
    count = 0
    for number, captions in enumerate(shards, first):
        embeddings = np.repeat(np.arange(count, count + len(captions)), 2).reshape(-1, 2)
        writer.write(number, captions, [1] * len(captions), embeddings)
        count += len(captions)
    writer.finish()
    return folder


# ---- encoding and lookup -------------------------------------------------------------------------------------------


def test_store_finds_embeddings_by_caption_in_any_order(encoder: CaptionEncoder, tmp_path: Path) -> None:
    store = embed(CAPTIONS, encoder, tmp_path, shard_size=16)
    assert len(store.manifest["shards"]) == 4
    captions = [CAPTIONS[i] for i in (49, 3, 3, 17, 0, 32)]
    embeddings = store.take(store.find_rows(captions))
    assert embeddings.dtype == np.float32
    expected = encoder.encode(captions).numpy()
    assert np.allclose(embeddings, expected, rtol=1e-3, atol=1e-3)  # stored as float16
    with pytest.raises(StoreError, match=r"no embedding for the caption 'never seen'"):
        store.find_rows([CAPTIONS[0], CAPTIONS[1], "never seen", "nor this"])
    store.verify()


def test_store_opens_the_documented_layout(tmp_path: Path) -> None:
    """The files are written without any code of the store."""
    captions, embeddings = ["a dog", "two cats"], np.array([[1, 2, 3], [4, 5, 6]], np.float16)
    np.save(tmp_path / "embeddings-00000.npy", embeddings)
    file_digest = hashlib.sha256((tmp_path / "embeddings-00000.npy").read_bytes()).digest()
    sha256 = hashlib.sha256(file_digest).hexdigest()
    metadata = {
        "format_version": "1",
        "sha256": sha256,
        "rows": "2",
        "embed_dim": "3",
        "dtype": "float16",
        "identity": json.dumps(IDENTITY),
    }
    keys = pa.array([hashlib.sha256(caption.encode()).digest()[:16] for caption in captions], pa.binary(16))
    table = pa.table({"key": keys, "tokens": pa.array([2, 3], pa.int32())}).replace_schema_metadata(metadata)
    pq.write_table(table, tmp_path / "keys-00000.parquet", write_page_checksum=True)
    manifest = {
        "format_version": 1,
        "fingerprint": fingerprint(IDENTITY),
        "identity": IDENTITY,
        "embed_dim": 3,
        "dtype": "float16",
        "captions": 2,
        "shards": [{"number": 0, "start": 0, "rows": 2, "sha256": sha256}],
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    store = EmbeddingStore(tmp_path)
    store.verify()
    assert store.take(store.find_rows(["two cats", "a dog"])).tolist() == [[4, 5, 6], [1, 2, 3]]
    writer = StoreWriter(tmp_path, IDENTITY, 3)
    writer.write(1, ["new"], [1], np.full((1, 3), 7))
    writer.finish()
    store = EmbeddingStore(tmp_path)
    store.verify()
    assert store.take(store.find_rows(["new", "a dog"])).tolist() == [[7, 7, 7], [1, 2, 3]]


def test_embed_lists_truncated_captions(llm: Path, tmp_path: Path) -> None:
    encoder = CaptionEncoder.from_pretrained(llm, max_length=8, device="cpu")
    embed(["short", "far too long for eight"], encoder, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "truncated-00000.jsonl").read_text().splitlines()]
    assert rows == [{"caption": "far too long for eight"}]


def test_embed_names_the_caption_that_is_not_a_valid_string(encoder: CaptionEncoder, tmp_path: Path) -> None:
    captions: list[Any] = ["a dog", "a cat", None]
    with pytest.raises(TypeError, match=r"text 2 must be a string \(got None\)"):
        embed(captions, encoder, tmp_path)
    with pytest.raises(ValueError, match=r"text 1 is not valid Unicode.*'caf\\udce9'"):
        embed(["a dog", "caf\udce9"], encoder, tmp_path)
    assert len(embed(captions[:2], encoder, tmp_path)) == 2


@pytest.fixture
def picky_encoder(encoder: CaptionEncoder, monkeypatch: pytest.MonkeyPatch) -> CaptionEncoder:
    """An encoder whose tokenizer fails on captions with the word bad."""
    tokenize = encoder.tokenize

    def failing_tokenize(captions: list[str], *rest: Any) -> Any:
        if any("bad" in caption for caption in captions):
            raise RuntimeError("cannot")
        return tokenize(captions, *rest)

    monkeypatch.setattr(encoder, "tokenize", failing_tokenize)
    return encoder


def test_embed_lists_captions_that_the_tokenizer_cannot_encode(picky_encoder: CaptionEncoder, tmp_path: Path) -> None:
    store = embed(["good", "bad", "", "fine"], picky_encoder, tmp_path)
    assert len(store) == 2 and "good" in store and "bad" not in store
    refused = [json.loads(line) for line in (tmp_path / "refused-00000.jsonl").read_text().splitlines()]
    assert refused == [{"caption": "bad", "why": "RuntimeError: cannot"}, {"caption": "", "why": "no tokens"}]
    again = embed(["bad", "", "good"], picky_encoder, tmp_path)
    assert [shard.number for shard in again.shards] == [0], "refused captions are not tried again"
    records = [Record("1", None, ("good", "bad"), ("bad",)), Record("2", None, ("bad",))]
    assert drop_refused_captions(records, store) == [Record("1", None, ("good",), ())]

    two_lines = "bad\u2028one"  # str.splitlines splits here
    embed([two_lines], picky_encoder, tmp_path / "second")
    merged = merge_stores(tmp_path / "merged", [tmp_path, tmp_path / "second"])
    assert read_refused_captions(merged.folder).keys() == {"bad", "", two_lines}


def test_embed_keeps_the_refused_list_of_a_shard_that_was_never_written(
    picky_encoder: CaptionEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("llm2clip.store.writer.StoreWriter.write", interrupt)
        embed(["bad 1", "a", "bad 2", "b"], picky_encoder, tmp_path, shard_size=2)
    embed(["bad 1", "a", "bad 2", "b"], picky_encoder, tmp_path, shard_size=2)
    assert list(read_refused_captions(tmp_path)) == ["bad 1", "bad 2"]


def test_embed_auto_precision_follows_the_store(
    encoder: CaptionEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": False}, raising=False)
    assert embed(CAPTIONS[:9], encoder, tmp_path / "slow").manifest["identity"]["precision"] == "fp32"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    assert embed(CAPTIONS, encoder, tmp_path / "slow").manifest["identity"]["precision"] == "fp32"
    assert embed(CAPTIONS, encoder, tmp_path / "fast").manifest["identity"]["precision"] == "bf16"
    with pytest.raises(StoreError, match="precision: 'bf16', expected 'fp32'"):
        embed(CAPTIONS, encoder, tmp_path / "fast", precision="fp32")


def test_embed_writes_the_same_store_with_two_processes(encoder: CaptionEncoder, llm: Path, tmp_path: Path) -> None:
    run_distributed(2, _embed_rank, str(llm), str(tmp_path / "two"))
    two, one = EmbeddingStore(tmp_path / "two"), embed(CAPTIONS, encoder, tmp_path / "one", shard_size=8)
    assert two.manifest["shards"] == one.manifest["shards"]
    assert np.array_equal(_embeddings(two), _embeddings(one))


def _embed_rank(llm: str, folder: str) -> None:
    embed(CAPTIONS, CaptionEncoder.from_pretrained(llm, device="cpu"), folder, shard_size=8)


# ---- interrupts ----------------------------------------------------------------------------------------------------


def test_interrupted_embed_closes_its_threads_and_keeps_complete_shards(
    encoder: CaptionEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = StoreWriter.write

    def interrupted_write(self: StoreWriter, number: int, *rest: Any) -> None:
        if number == 2:
            raise KeyboardInterrupt
        write(self, number, *rest)

    threads_before = set(threading.enumerate())
    monkeypatch.setattr(StoreWriter, "write", interrupted_write)
    with pytest.raises(KeyboardInterrupt) as interrupt:
        embed(CAPTIONS, encoder, tmp_path, shard_size=16)
    new_threads = set(threading.enumerate()) - threads_before
    assert interrupt.tb and not any("Pool" in thread.name for thread in new_threads)
    assert [shard.number for shard in read_shards(tmp_path)] == [0, 1]


def _embeddings(store: EmbeddingStore) -> np.ndarray:
    return store.take(store.find_rows(CAPTIONS))


def _embed_and_kill(llm: Path, folder: Path, moment: str) -> None:
    """Embed captions, and kill the process at the third shard: when it calls the writer's function `moment`."""
    owner: Any = {"save": writer.np, "write_table": writer.pq, "write_manifest": writer}[moment]
    function, calls = getattr(owner, moment), []
    calls_before = 4 if moment == "write_table" else 0  # for the captions of the missing shards

    def call(first: Any, *rest: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == calls_before + 3:
            if moment == "save":
                Path(first).write_bytes(b"half of the file")
            os.kill(os.getpid(), signal.SIGKILL)
        return function(first, *rest, **options)

    setattr(owner, moment, call)
    torch.set_num_threads(1)
    embed(CAPTIONS, CaptionEncoder.from_pretrained(llm, device="cpu"), folder, shard_size=16, precision="fp32")


def test_embed_resumes_after_kill_at_any_moment(encoder: CaptionEncoder, llm: Path, tmp_path: Path) -> None:
    """SIGKILL while embeddings are written, before the keys, and before the last manifest."""
    uninterrupted = embed(CAPTIONS, encoder, tmp_path / "uninterrupted", shard_size=16, precision="fp32")
    for moment, shards in (("save", 2), ("write_table", 2), ("write_manifest", 4)):
        folder = tmp_path / moment
        assert run_in_process(_embed_and_kill, llm, folder, moment) == -signal.SIGKILL
        assert len(read_shards(folder)) == shards and (folder / ".incoming").exists()
        store = embed(CAPTIONS, encoder, folder, shard_size=16, precision="fp32")
        store.verify()
        assert np.array_equal(_embeddings(store), _embeddings(uninterrupted))
        assert not (folder / ".incoming").exists() and not list(folder.glob(".*.part*"))


def _lock_and_wait(folder: Path, connection: Any) -> None:
    with hold_folder_lock(folder):
        connection.send("locked")
        connection.recv()


def test_embed_raises_until_the_process_with_the_lock_is_killed(encoder: CaptionEncoder, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    connection, other_end = context.Pipe()
    process = context.Process(target=_lock_and_wait, args=(tmp_path, other_end))
    process.start()
    assert connection.recv() == "locked"
    with pytest.raises(FolderInUseError, match="another run is writing to"):
        embed(CAPTIONS, encoder, tmp_path)
    process.kill()
    process.join()
    assert len(embed(CAPTIONS, encoder, tmp_path)) == 50


def test_atomic_path_removes_a_hard_link_to_the_file_itself(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("this store")
    with atomic_path(tmp_path / "target") as temporary:
        temporary.unlink()
        os.link(tmp_path / "target", temporary)  # renaming one hard link of a file to another does nothing
    assert not temporary.exists()


# ---- checks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("identity", "embed_dim", "dtype", "message"),
    [
        ({**IDENTITY, "layers": 2}, 4, "int8", r"\(layers: 3, expected 2\)"),  # settings that agree are not listed
        ({"weights": "abc", "a": "x"}, 4, "int8", r"\(a: None, expected 'x'; layers: 3, expected None\)"),
        (IDENTITY, 3, "int8", "has embed_dim 4, expected 3"),
        (IDENTITY, 4, "float16", "has dtype int8, expected float16"),
    ],
)
def test_writer_names_what_differs_from_the_store(
    identity: dict[str, Any], embed_dim: int, dtype: str, message: str, tmp_path: Path
) -> None:
    StoreWriter(tmp_path, IDENTITY, 4, "int8")
    with pytest.raises(StoreError, match=message):
        StoreWriter(tmp_path, identity, embed_dim, dtype)


def test_writer_rejects_invalid_embeddings(tmp_path: Path) -> None:
    keys = np.zeros((1, 16), np.uint8)
    for dtype in ("float32", "int8", "float16"):
        writer = StoreWriter(tmp_path / dtype, IDENTITY, 2, dtype)
        for value in (np.nan, np.inf, *([70000.0] if dtype == "float16" else [])):
            with pytest.raises(StoreError, match=f"embedding of key 0{{32}} contains non-finite values in {dtype}"):
                writer.write(0, [], [1], np.array([[1, value]]), keys)
            with pytest.raises(StoreError, match=f"embedding of 'second' contains non-finite values in {dtype}"):
                writer.write(0, ["first", "second"], [1, 1], np.array([[1, 2], [1, value]]))
    writer = StoreWriter(tmp_path, IDENTITY, 2)
    for args in (([1], np.ones((1, 3)), keys), ([1, 2], np.ones((1, 2)), keys), ([1], np.ones((1, 2)), keys[:, :8])):
        with pytest.raises(StoreError, match="requires 2-dimensional embeddings"):
            writer.write(0, [], *args)
    with pytest.raises(StoreError, match="is not valid Unicode text"):
        writer.write(0, ["\ud800"], [1], np.ones((1, 2)))
    assert read_shards(tmp_path) == []


def test_writer_rejects_a_shard_of_another_encoder(tmp_path: Path) -> None:
    write_store(tmp_path / "ours", ["ours"], first=4)
    write_store(tmp_path / "theirs", ["theirs"], first=6, layers=9)
    for path in (tmp_path / "theirs").glob("*-00006.*"):
        (tmp_path / "ours" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(StoreError, match="differs from the other shards in encoder, dimension or dtype"):
        StoreWriter(tmp_path / "ours", IDENTITY, 2).finish()
    assert "keys-00006.parquet" in repair_store(tmp_path / "ours")
    assert "ours" in EmbeddingStore(tmp_path / "ours") and "theirs" not in EmbeddingStore(tmp_path / "ours")


# ---- damage and repair ---------------------------------------------------------------------------------------------


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


# Each kind of damage, and whether opening the store detects it; otherwise only `verify` does.
DAMAGE: dict[str, tuple[Callable[[Path], object], bool]] = {
    "embeddings-00001.npy, flipped bit": (lambda f: flip(f / "embeddings-00001.npy", -1), False),
    "embeddings-00001.npy, truncated": (lambda f: os.truncate(f / "embeddings-00001.npy", 200), True),
    "embeddings-00001.npy, missing": (lambda f: (f / "embeddings-00001.npy").unlink(), True),
    "embeddings-00001.npy, no array": (lambda f: flip(f / "embeddings-00001.npy", 0), True),
    "keys-00001.parquet, flipped bit": (lambda f: flip(f / "keys-00001.parquet", 40), False),
    "keys-00001.parquet, truncated": (lambda f: os.truncate(f / "keys-00001.parquet", 100), False),
    "keys-00001.parquet, missing": (lambda f: (f / "keys-00001.parquet").unlink(), False),
    "scales-00001.npy, flipped bit": (lambda f: flip(f / "scales-00001.npy", -1), False),
    "scales-00001.npy, missing": (lambda f: (f / "scales-00001.npy").unlink(), True),
    "index-*.npy, flipped bit": (lambda f: flip(next(f.glob("index-*.npy")), -1), False),
    "manifest.json, truncated": (lambda f: os.truncate(f / "manifest.json", 30), True),
    "manifest.json, first row": (lambda f: change(f / "manifest.json", '"start": 16', '"start": 14'), True),
    "manifest.json, identity": (lambda f: change(f / "manifest.json", '"layers": ', '"layers": 1'), True),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_repair_deletes_only_what_is_damaged(encoder: CaptionEncoder, tmp_path: Path, damage: str) -> None:
    """The damaged file is named and deleted, and only its captions are encoded again."""
    store = embed(CAPTIONS, encoder, tmp_path, shard_size=16, dtype="int8" if "scales" in damage else "float16")
    before = _embeddings(store)
    intact = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("embeddings-*") if "-00001" not in p.name}
    apply_damage, detected_on_opening = DAMAGE[damage]
    apply_damage(tmp_path)
    if detected_on_opening:
        with pytest.raises(StoreError, match=damage.split(",")[0]):
            EmbeddingStore(tmp_path)
    else:
        with pytest.raises(StoreError, match=r"corrupt shards: 00001\.|index-.* is corrupt"):
            EmbeddingStore(tmp_path).verify()
    repair_store(tmp_path)
    EmbeddingStore(tmp_path).verify()
    again = embed(CAPTIONS, encoder, tmp_path, shard_size=16, dtype=store.manifest["dtype"])
    again.verify()
    assert np.array_equal(_embeddings(again), before)
    assert intact.items() <= {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("embeddings-*")}.items()


def test_store_rebuilds_a_missing_or_damaged_index(encoder: CaptionEncoder, tmp_path: Path) -> None:
    store = embed(CAPTIONS, encoder, tmp_path, shard_size=16)
    (index,) = tmp_path.glob("index-*.npy")
    content = index.read_bytes()
    for damaged in (b"", content[:50], None):
        index.unlink()
        if damaged is not None:
            index.write_bytes(damaged)
        assert EmbeddingStore(tmp_path).find_rows(CAPTIONS).tolist() == store.find_rows(CAPTIONS).tolist()
        assert index.read_bytes() == content


def test_store_of_another_format_version_is_rejected_and_not_repaired(tmp_path: Path) -> None:
    write_store(tmp_path, ["a"])
    change(tmp_path / "manifest.json", '"format_version": 1', '"format_version": 2')
    message = r"has format version 2, but.* version 1\. Update llm2clip: pip install"
    for open_store in (EmbeddingStore, lambda folder: StoreWriter(folder, IDENTITY, 2)):
        with pytest.raises(FormatVersionError, match=message):
            open_store(tmp_path)
    keys = tmp_path / "keys-00000.parquet"
    table = pq.read_table(keys)
    metadata = table.schema.metadata
    pq.write_table(table.replace_schema_metadata(metadata | {b"format_version": b"2"}), keys)
    with pytest.raises(FormatVersionError, match=message):
        repair_store(tmp_path)
    assert keys.exists()
    pq.write_table(table, keys)
    with pytest.raises(FormatVersionError, match=message):
        repair_store(tmp_path)
    assert keys.exists()


def test_repair_without_manifest_keeps_the_encoder_of_most_shards(tmp_path: Path) -> None:
    for name, number, layers in (("alien", 0, 9), ("one", 1, 3), ("two", 2, 3)):
        write_store(tmp_path / name, [name], first=number, layers=layers)
        for path in (tmp_path / name).glob("*-0000*"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    repair_store(tmp_path)
    store = EmbeddingStore(tmp_path)
    assert store.manifest["identity"] == IDENTITY and "alien" not in store and "one" in store and "two" in store


def test_repair_deletes_leftovers_of_killed_processes(encoder: CaptionEncoder, tmp_path: Path) -> None:
    embed(CAPTIONS, encoder, tmp_path, shard_size=16)
    files = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert repair_store(tmp_path) == []
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == files
    leftovers = {
        "embeddings-00009.npy",
        ".keys-00009.77.part.parquet",
        ".embeddings-00010.npy.78.part",
    }
    for name in leftovers:
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / ".embeddings-00010.npy.78.part").unlink()
    (tmp_path / ".embeddings-00010.npy.78.part").mkdir()
    (tmp_path / "index-0123456789ab.npy").write_bytes(b"index of deleted shards")
    assert set(repair_store(tmp_path)) == leftovers
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == files
    for path in tmp_path.glob("keys-*"):
        path.write_bytes(b"")
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(StoreError, match="has no intact manifest and no intact shard"):
        repair_store(tmp_path)


# ---- merging -------------------------------------------------------------------------------------------------------


def test_merge_links_or_copies_each_shard_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = write_store(tmp_path / "a", ["a"], first=4, dtype="int8")
    b = write_store(tmp_path / "b", ["c", "b"], first=4, dtype="int8")
    for out, link in (("deep/linked", os.link), ("copied", None)):
        if link is None:
            monkeypatch.setattr("os.link", lambda *paths: (_ for _ in ()).throw(OSError("another disk")))
        store = merge_stores(tmp_path / out, [a, b, a])
        assert [shard.number for shard in store.shards] == [0, 1] and store.manifest["dtype"] == "int8"
        assert store.take(store.find_rows(["b", "a"])).tolist() == [[1, 1], [0, 0]]
        store.verify()
    write_store(a, ["new"], first=5, dtype="int8")
    assert "new" in merge_stores(tmp_path / "copied", [a, b]), "a shard after one that exists already"


def test_merge_rejects_different_and_damaged_stores(tmp_path: Path) -> None:
    ours = write_store(tmp_path / "ours", ["a"])
    for name, message, options in (
        ("half", "half has dtype int8, expected float16", {"dtype": "int8"}),
        ("encoder", "different encoder", {"layers": 9}),
    ):
        with pytest.raises(StoreError, match=message):
            merge_stores(tmp_path / "merged", [ours, write_store(tmp_path / name, ["b"], **options)])
    with pytest.raises(StoreError, match="no stores to merge"):
        merge_stores(tmp_path / "merged", [])
    flip(ours / "embeddings-00000.npy", -1)
    with pytest.raises(StoreError, match=r"corrupt shards: \[0\]"):
        merge_stores(tmp_path / "merged", [ours])


# ---- readers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read_ahead", [False, True])
def test_int8_rows_are_within_half_a_quantization_step(tmp_path: Path, read_ahead: bool) -> None:
    """Repeated rows of many shards, in any order. See test_properties.py for the other dtypes."""
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(70, 12)).astype(np.float32) * 10 ** rng.uniform(-2, 1, (70, 1)).astype(np.float32)
    embeddings[3] = 0
    writer = StoreWriter(tmp_path, IDENTITY, 12, "int8")
    for number, start in enumerate(range(0, 70, 16)):
        texts = [str(i) for i in range(start, min(start + 16, 70))]
        writer.write(number, texts, [1] * len(texts), embeddings[start : start + 16])
    writer.finish()
    store = pickle.loads(pickle.dumps(EmbeddingStore(tmp_path, read_ahead)))
    order = rng.integers(0, 70, 200)
    tolerance = np.abs(embeddings).max(1, keepdims=True) / 254 + 1e-6
    result = store.take(store.find_rows([str(i) for i in order]))
    assert (np.abs(result - embeddings[order]) <= tolerance[order]).all()
    assert store.take([]).shape == (0, 12)
    for row in (-1, 70):
        with pytest.raises(IndexError, match="row numbers must be between 0 and 69"):
            store.take([row])


@pytest.mark.parametrize("read_ahead", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows_read_in_chunks_into_an_array_are_exact(
    tmp_path: Path, read_ahead: bool, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Repeated rows of three shards in any order, with chunks of three rows that cross the shards' bounds."""
    embeddings = np.random.default_rng(0).normal(size=(20, 4)).astype(dtype)
    writer = StoreWriter(tmp_path, IDENTITY, 4, dtype)
    for number, start in enumerate(range(0, 20, 7)):
        texts = [str(i) for i in range(start, min(start + 7, 20))]
        writer.write(number, texts, [1] * len(texts), embeddings[start : start + 7].astype(np.float32))
    writer.finish()
    store = EmbeddingStore(tmp_path, read_ahead)
    monkeypatch.setattr(store, "_chunk_bytes", 3 * embeddings[0].nbytes)
    rows = np.random.default_rng(1).integers(0, 20, 50)
    out = np.full((50, 4), np.nan, np.float32)
    assert store.take(rows, out=out) is out
    assert out.tobytes() == store.take(rows).tobytes() == embeddings[rows].astype(np.float32).tobytes()


@pytest.mark.parametrize("read_ahead", [False, True])
def test_readers_limit_and_close_open_files(tmp_path: Path, read_ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm2clip.store.store.MAX_OPEN_FILES", 2)
    store = EmbeddingStore(write_store(tmp_path, *([str(n)] for n in range(9)), dtype="int8"), read_ahead)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        assert store.take([8, 0, 5, 1])[:, 0].tolist() == [8, 0, 5, 1]
        assert np.allclose(store.take(range(9))[:, 1], range(9), atol=1e-5)
    assert len(os.listdir("/proc/self/fd")) <= before + 4
    del store  # not part of a reference cycle, so the files are closed without a garbage collection
    assert len(os.listdir("/proc/self/fd")) <= before, "files stay open"


def test_available_memory_respects_the_control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert get_available_memory(tmp_path / "none") > 1 << 20
    machine = 5_000_000  # the memory of the real machine changes while the test runs
    monkeypatch.setattr("llm2clip.cpu_tuning.psutil.virtual_memory", lambda: SimpleNamespace(available=machine))
    assert get_available_memory(tmp_path / "none") == machine
    for limit, available in (("max\n", machine), ("3000000\n", 1000000)):
        (tmp_path / "memory.max").write_text(limit)
        (tmp_path / "memory.current").write_text("2000000\n")
        assert get_available_memory(tmp_path) == available
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 600000\nactive_file 7\n")
    assert get_available_memory(tmp_path) == 1600000, "inactive page cache counts as available"
    (tmp_path / "memory.current").unlink()
    assert get_available_memory(tmp_path) == machine


def test_store_requests_only_the_pages_of_the_rows_if_it_takes_half_of_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = StoreWriter(tmp_path, IDENTITY, 3000, "float32")
    writer.write(0, list("abcdef"), [1] * 6, np.arange(18000, dtype=np.float32).reshape(6, 3000))
    writer.finish()  # 72,000 bytes of embeddings; a row takes 12,000 bytes
    for memory, read_ahead in ((144001, False), (144000, True)):
        monkeypatch.setattr("llm2clip.store.store.get_available_memory", lambda memory=memory: memory)
        store = EmbeddingStore(tmp_path)
        assert store._uses_madvise == pickle.loads(pickle.dumps(store))._uses_madvise == read_ahead
    requests: list[tuple[int, ...]] = []
    array: Any = SimpleNamespace(offset=128, _mmap=SimpleNamespace(madvise=lambda *args: requests.append(args)))
    store._prefetch_memory_pages(array, np.array([0, 2, 4]))
    starts = [128 + row * 12000 for row in (0, 2, 4)]
    first_bytes = [start // mmap.PAGESIZE * mmap.PAGESIZE for start in starts]
    assert requests == [
        (mmap.MADV_WILLNEED, first_byte, start + 12000 - first_byte)
        for start, first_byte in zip(starts, first_bytes, strict=True)
    ]
    assert store.take([5, 0])[:, 0].tolist() == [15000, 0]


@pytest.mark.parametrize("read_ahead", [False, True])
def test_store_can_be_read_in_forked_workers(tmp_path: Path, read_ahead: bool) -> None:
    store = EmbeddingStore(write_store(tmp_path, *(CAPTIONS[i : i + 8] for i in range(0, 50, 8))), read_ahead)
    expected = [store.take([row]) for row in range(50)]  # starts the threads of this process
    loader = torch.utils.data.DataLoader(
        RowDataset(store),
        batch_size=5,
        num_workers=2,
        collate_fn=list,
        multiprocessing_context="fork",
        timeout=HANG_TIMEOUT,
    )
    assert np.array_equal([embedding for batch in loader for embedding in batch], expected)


class RowDataset(torch.utils.data.Dataset[np.ndarray]):
    def __init__(self, store: EmbeddingStore) -> None:
        self.store = store

    def __len__(self) -> int:
        return 50

    def __getitem__(self, row: int) -> np.ndarray:
        return self.store.take([row])


# ---- command -------------------------------------------------------------------------------------------------------


def test_store_command(encoder: CaptionEncoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    embed(CAPTIONS[:30], encoder, tmp_path / "a", shard_size=16, precision="fp32")
    embed(CAPTIONS[20:], encoder, tmp_path / "b", shard_size=16, precision="fp32")

    def run(*args: str | Path) -> str:
        status = main(["store", *map(str, args)])
        printed = capsys.readouterr()
        return printed.out if status == 0 else printed.err

    assert "30 captions in 2 shards" in run("verify", tmp_path / "a")
    assert "50 captions" in run("merge", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "c")
    flip(tmp_path / "c/embeddings-00001.npy", -1)
    assert "corrupt shards: 00001" in run("verify", tmp_path / "c")
    assert "embeddings-00001.npy" in run("repair", tmp_path / "c")
    assert "not a store" in run("verify", tmp_path / "nowhere")


# ---- key index and deduplication -----------------------------------------------------------------------------------


@pytest.fixture
def keys() -> np.ndarray:
    """Keys, some of which are repeated or have equal first halves."""
    keys = np.random.default_rng(0).integers(0, 256, (3000, 16), dtype=np.uint8)
    keys[500:600] = keys[:100]
    keys[700:800, :8] = keys[800, :8]
    return keys


def test_key_index_matches_a_dictionary(keys: np.ndarray, tmp_path: Path) -> None:
    expected: dict[bytes, int] = {}
    for row, key in enumerate(map(bytes, keys)):
        expected.setdefault(key, row)
    distinct = build_key_index(tmp_path / "index.npy", keys)
    assert distinct == len(expected)
    index = KeyIndex(tmp_path / "index.npy")
    missing = np.random.default_rng(1).integers(0, 256, (500, 16), dtype=np.uint8)
    same_first_half = keys[800:801].copy()
    same_first_half[0, 15] ^= 1
    below_all = keys[np.lexsort(keys.T[::-1])[:1]].copy()  # with the second half of the smallest key
    below_all[0, :8] = 0
    queries = np.concatenate([keys, missing, same_first_half, below_all])
    assert index.find_keys(queries).tolist() == [expected.get(bytes(key), -1) for key in queries]
    assert list(tmp_path.iterdir()) == [tmp_path / "index.npy"], "temporary files are deleted"
    assert (
        index.is_intact_index_of(keys)
        and not index.is_intact_index_of(keys[:-1])
        and not index.is_intact_index_of(keys[::-1])
    )
    assert build_key_index(tmp_path / "none.npy", keys[:0]) == 0
    assert KeyIndex(tmp_path / "none.npy").find_keys(queries)[0] == -1


def test_sort_keys_sorts_by_key_and_position_in_parts(keys: np.ndarray) -> None:
    parts = list(sort_keys(keys))
    assert len(parts) == 16 and max(part.shape[1] for part in parts) < 400  # 100 keys have the same first half
    halves = keys.view(">u8").astype(np.uint64).T
    order = np.lexsort((np.arange(3000), halves[1], halves[0]))
    expected = np.stack([*halves[:, order], order.astype(np.uint64)])
    assert np.array_equal(np.concatenate(parts, axis=1), expected)


def test_missing_shards_contain_each_new_caption_once_in_the_order_of_the_stream(
    encoder: CaptionEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm2clip.store.writer.CHUNK_SIZE", 7)
    store = embed(["d", "z"], encoder, tmp_path / "store")
    rng = np.random.default_rng(0)
    stream = [str(i) for i in rng.integers(0, 40, 200)] + ["z", "a", "d", "a"]
    expected = [caption for caption in dict.fromkeys(stream) if caption not in "dz"]
    for size in (5, 100):
        incoming = tmp_path / str(size)
        incoming.mkdir()
        write_incoming_captions(iter(stream), incoming, store, size, first_shard=3)
        shards = [expected[start : start + size] for start in range(0, len(expected), size)]
        assert sorted(incoming.iterdir()) == [get_shard_path(incoming, 3 + n) for n in range(len(shards))]
        assert [pq.read_table(file)["text"].to_pylist() for file in sorted(incoming.iterdir())] == shards
    (tmp_path / "none").mkdir()
    write_incoming_captions([], tmp_path / "none", None, 5, first_shard=0)
    assert not list((tmp_path / "none").iterdir())
