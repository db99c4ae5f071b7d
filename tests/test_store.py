"""The store: vectors by caption, shards whole or absent, other encoders refused, work resumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from llm2clip.cli import main
from llm2clip.data.records import Record
from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.pipeline import readable
from llm2clip.store.dedup import PendingCaptions, ingest
from llm2clip.store.encode import embed
from llm2clip.store.key_index import KeyIndex, build_key_index, sorted_partitions, split_keys
from llm2clip.store.layout import StoreError, atomic_path, read_shards
from llm2clip.store.lock import folder_lock
from llm2clip.store.maintenance import merge_stores, repair_store
from llm2clip.store.store import EmbeddingStore, refused_captions
from llm2clip.store.writer import StoreWriter

CAPTIONS = [f"caption number {i} of some" for i in range(50)]
IDENTITY = {"weights": "abc", "layers": 3}


def test_vectors_are_found_by_text_in_any_order(encoder: CaptionEncoder, tmp_path: Path) -> None:
    store = embed(CAPTIONS, encoder, tmp_path, shard_size=16)
    assert len(store.manifest["shards"]) == 4
    asked = [CAPTIONS[i] for i in (49, 3, 3, 17, 0, 32)]
    found = store.take(store.rows(asked))
    assert found.dtype == np.float32
    direct = encoder.encode(asked).numpy()
    assert np.allclose(found, direct, rtol=1e-3, atol=1e-3)  # float16
    with pytest.raises(StoreError, match=r"no vector for the caption 'never seen'"):
        store.rows([CAPTIONS[0], CAPTIONS[1], "never seen", "nor this"])
    store.verify()


def test_a_repeated_caption_is_encoded_once(encoder: CaptionEncoder, tmp_path: Path) -> None:
    assert len(embed(["a", "b", "a", "a"], encoder, tmp_path)) == 2


def test_new_captions_leave_old_shards_alone(encoder: CaptionEncoder, tmp_path: Path) -> None:
    embed(CAPTIONS[:20], encoder, tmp_path, shard_size=16)
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("embeddings-*")}
    store = embed(CAPTIONS, encoder, tmp_path, shard_size=16)
    after = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("embeddings-*")}
    assert len(store) == 50 and before.items() <= after.items()


def test_killed_between_shards_it_goes_on(
    encoder: CaptionEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    write = StoreWriter.write

    def dies(self: StoreWriter, number: int, *rest: object) -> None:
        if number == 2:
            raise KeyboardInterrupt
        written.append(number)
        write(self, number, *rest)  # type: ignore[arg-type]

    before = set(threading.enumerate())
    monkeypatch.setattr(StoreWriter, "write", dies)
    with pytest.raises(KeyboardInterrupt) as stopped:
        embed(CAPTIONS, encoder, tmp_path, shard_size=16)
    assert stopped.tb and not any("Pool" in t.name for t in set(threading.enumerate()) - before)  # ended, not left
    monkeypatch.setattr(StoreWriter, "write", write)
    store = embed(CAPTIONS, encoder, tmp_path, shard_size=16)
    assert written == [0, 1]
    whole = embed(CAPTIONS, encoder, tmp_path / "whole", shard_size=16)
    assert np.array_equal(store.take(store.rows(CAPTIONS)), whole.take(whole.rows(CAPTIONS)))


def test_killed_inside_a_shard_it_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = StoreWriter(tmp_path, IDENTITY, 4)

    def dies(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("llm2clip.store.writer.pq.write_table", dies)  # embeddings are down, keys are not
        writer.write(0, ["a"], [1], np.zeros((1, 4)))
    assert read_shards(tmp_path) == []
    assert not list(tmp_path.glob(".*.tmp"))
    writer.write(0, ["a"], [1], np.ones((1, 4)))
    writer.finish()
    assert EmbeddingStore(tmp_path).take([0]).tolist() == [[1.0] * 4]


KILLED = """
import os, signal, sys
import llm2clip.store.writer as writer
from llm2clip.store.encode import embed
from llm2clip.models.caption_encoder import CaptionEncoder

llm, out, captions = sys.argv[1], sys.argv[2], sys.argv[3:]
encoder = CaptionEncoder.from_pretrained(llm, device="cpu")

def at_its_third_call(name, owner):
    real, calls = getattr(owner, name), []
    def call(file, *rest, **options):
        calls.append(1)
        if len(calls) == 3:
            if hasattr(file, "write"):
                file.write(b"half of it")
                file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return real(file, *rest, **options)
    setattr(owner, name, call)

for name, owner in (("save", writer.np), ("write_table", writer.pq), ("summarise", writer)):
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
    else:
        at_its_third_call(name, owner)
        embed(captions, encoder, f"{out}/{name}", shard_size=16, precision="fp32")
        sys.exit(1)  # it was not killed
"""


def test_killed_at_any_moment_nothing_is_lost(encoder: CaptionEncoder, llm: Path, tmp_path: Path) -> None:
    """`kill -9` within a shard's vectors, before its keys, and before the manifest knows of the shards."""
    command = [sys.executable, "-c", KILLED, str(llm), str(tmp_path), *CAPTIONS]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    whole = embed(CAPTIONS, encoder, tmp_path / "whole", shard_size=16, precision="fp32")
    for moment, shards in (("save", 2), ("write_table", 2), ("summarise", 4)):
        left = tmp_path / moment
        assert len(read_shards(left)) == shards and (left / ".incoming").exists()
        store = embed(CAPTIONS, encoder, left, shard_size=16, precision="fp32")
        store.verify()
        assert np.array_equal(store.take(store.rows(CAPTIONS)), whole.take(whole.rows(CAPTIONS)))
        assert not (left / ".incoming").exists()


def test_another_encoders_store_is_refused_by_name(tmp_path: Path) -> None:
    StoreWriter(tmp_path, IDENTITY, 4)
    with pytest.raises(StoreError, match=r"\(layers: 3 there, 2 here\)"):  # and nothing that is the same
        StoreWriter(tmp_path, {**IDENTITY, "layers": 2}, 4)
    with pytest.raises(StoreError, match=r"\(layers: 3 there, None here; template: None there, 'x' here\)"):
        StoreWriter(tmp_path, {"weights": "abc", "template": "x"}, 4)


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


DAMAGE: dict[str, tuple[Callable[[Path], object], bool]] = {  # whether opening shows it, or only reading all does
    "embeddings-00001.npy, a bit": (lambda f: flip(f / "embeddings-00001.npy", -1), False),
    "embeddings-00001.npy, cut": (lambda f: os.truncate(f / "embeddings-00001.npy", 200), True),
    "embeddings-00001.npy, gone": (lambda f: (f / "embeddings-00001.npy").unlink(), True),
    "embeddings-00001.npy, no array": (lambda f: flip(f / "embeddings-00001.npy", 0), True),
    "keys-00001.parquet, a bit": (lambda f: flip(f / "keys-00001.parquet", 40), False),
    "keys-00001.parquet, cut": (lambda f: os.truncate(f / "keys-00001.parquet", 100), False),
    "keys-00001.parquet, gone": (lambda f: (f / "keys-00001.parquet").unlink(), False),
    "scales-00001.npy, a bit": (lambda f: flip(f / "scales-00001.npy", -1), False),
    "scales-00001.npy, gone": (lambda f: (f / "scales-00001.npy").unlink(), True),
    "index-*.npy, a bit": (lambda f: flip(next(f.glob("index-*.npy")), -1), False),
    "manifest.json, cut": (lambda f: os.truncate(f / "manifest.json", 30), True),
    "manifest.json, a start": (lambda f: change(f / "manifest.json", '"start": 16', '"start": 14'), True),
    "manifest.json, its encoder": (lambda f: change(f / "manifest.json", '"layers": ', '"layers": 1'), True),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_found_and_repaired(encoder: CaptionEncoder, tmp_path: Path, what: str) -> None:
    """Whatever is hit: it is named, dropped, and only what it held is encoded again."""
    store = embed(CAPTIONS, encoder, tmp_path, shard_size=16, dtype="int8" if "scales" in what else "float16")
    before = store.take(store.rows(CAPTIONS))
    kept = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("embeddings-*") if "-00001" not in p.name}
    hit, shows_at_once = DAMAGE[what]
    hit(tmp_path)
    if shows_at_once:
        with pytest.raises(StoreError, match=what.split(",")[0]):
            EmbeddingStore(tmp_path)
    else:
        with pytest.raises(StoreError, match=r"damaged shards 00001;|index-.* is damaged"):
            EmbeddingStore(tmp_path).verify()
    repair_store(tmp_path)
    EmbeddingStore(tmp_path).verify()
    again = embed(CAPTIONS, encoder, tmp_path, shard_size=16, dtype=store.manifest["dtype"])
    again.verify()
    assert np.array_equal(again.take(again.rows(CAPTIONS)), before)
    assert kept.items() <= {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("embeddings-*")}.items()


def test_no_flipped_bit_is_read_as_right(tmp_path: Path) -> None:
    """Anywhere in a small store: it is found, or changes nothing; repair always leaves a sound store."""
    writer = StoreWriter(tmp_path / "store", IDENTITY, 2)
    for number in range(2):
        texts = [f"{number} {n}" for n in range(2)]
        writer.write(number, texts, [1, 2], np.arange(4).reshape(2, 2) + 10 * number)
    writer.finish()
    texts = [f"{number} {n}" for number in range(2) for n in range(2)]
    before = EmbeddingStore(tmp_path / "store").take(EmbeddingStore(tmp_path / "store").rows(texts))
    files = {p: p.read_bytes() for p in (tmp_path / "store").iterdir() if p.name != ".lock"}
    rng = np.random.default_rng(0)
    found = 0
    for path, whole in files.items():
        for at in range(0, len(whole), 1 + len(whole) // 60):
            data = bytearray(whole)
            data[at] ^= 1 << int(rng.integers(8))
            path.write_bytes(data)
            try:
                store = EmbeddingStore(tmp_path / "store")
                store.verify()
                assert np.array_equal(store.take(store.rows(texts)), before), (path, at)
            except StoreError:
                found += 1
            repair_store(tmp_path / "store")
            EmbeddingStore(tmp_path / "store").verify()
            for each, content in files.items():
                each.write_bytes(content)
    assert found > 100


def test_an_index_that_is_lost_is_made_again(encoder: CaptionEncoder, tmp_path: Path) -> None:
    store = embed(CAPTIONS, encoder, tmp_path, shard_size=16)
    (index,) = tmp_path.glob("index-*.npy")
    whole = index.read_bytes()
    for left in (b"", whole[:50], None):
        index.unlink()
        if left is not None:
            index.write_bytes(left)
        assert EmbeddingStore(tmp_path).rows(CAPTIONS).tolist() == store.rows(CAPTIONS).tolist()
        assert index.read_bytes() == whole


def test_a_shard_of_another_encoder_is_not_taken_in(tmp_path: Path) -> None:
    for name, identity in (("ours", IDENTITY), ("theirs", {**IDENTITY, "layers": 9})):
        writer = StoreWriter(tmp_path / name, identity, 2)
        writer.write(len(name), [name], [1], np.ones((1, 2)))
        writer.finish()
    for path in (tmp_path / "theirs").glob("*-00006.*"):
        (tmp_path / "ours" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(StoreError, match="is not of this store's encoder"):
        StoreWriter(tmp_path / "ours", IDENTITY, 2).finish()
    assert "keys-00006.parquet" in repair_store(tmp_path / "ours")
    assert "ours" in EmbeddingStore(tmp_path / "ours") and "theirs" not in EmbeddingStore(tmp_path / "ours")


def test_without_a_manifest_a_store_is_what_most_of_its_shards_are(tmp_path: Path) -> None:
    for name, number, layers in (("alien", 0, 9), ("one", 1, 3), ("two", 2, 3)):
        writer = StoreWriter(tmp_path / name, {**IDENTITY, "layers": layers}, 2)
        writer.write(number, [name], [1], np.ones((1, 2)))
        for path in (tmp_path / name).glob("*-0000*"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    repair_store(tmp_path)
    store = EmbeddingStore(tmp_path)
    assert store.manifest["identity"] == IDENTITY and "alien" not in store and "one" in store and "two" in store


def test_what_does_not_fit_a_store_is_not_written(tmp_path: Path) -> None:
    keys = np.zeros((1, 16), np.uint8)
    for dtype in ("float32", "int8", "float16"):
        writer = StoreWriter(tmp_path / dtype, IDENTITY, 2, dtype)
        for bad in (np.nan, np.inf, *([70000.0] if dtype == "float16" else [])):
            with pytest.raises(StoreError, match=f"vector of the key 0{{32}} does not fit {dtype}"):
                writer.write_keyed(0, keys, [1], np.array([[1, bad]]))
            with pytest.raises(StoreError, match=f"vector of 'second' does not fit {dtype}"):
                writer.write(0, ["first", "second"], [1, 1], np.array([[1, 2], [1, bad]]))
    writer = StoreWriter(tmp_path, IDENTITY, 2)
    for args in ((keys, [1], np.ones((1, 3))), (keys, [1, 2], np.ones((1, 2))), (keys[:, :8], [1], np.ones((1, 2)))):
        with pytest.raises(StoreError, match="takes vectors of 2 numbers"):
            writer.write_keyed(0, *args)
    with pytest.raises(StoreError, match="is not a text"):
        writer.write(0, ["\ud800"], [1], np.ones((1, 2)))
    with pytest.raises(StoreError, match="holds width 2, not 3"):
        StoreWriter(tmp_path, IDENTITY, 3)
    assert read_shards(tmp_path) == []


def test_a_link_that_a_kill_left_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "source").write_text("theirs")
    with atomic_path(tmp_path / "target") as tmp:
        name = tmp
        tmp.write_text("")
    os.link(tmp_path / "source", name)
    with atomic_path(tmp_path / "target") as tmp:
        tmp.write_text("ours")
    assert (tmp_path / "source").read_text() == "theirs" and (tmp_path / "target").read_text() == "ours"
    with atomic_path(tmp_path / "target") as tmp:
        os.link(tmp_path / "target", tmp)  # two names of one file: renaming does nothing
    assert not name.exists()


def test_repair_clears_what_a_kill_left_and_leaves_the_rest(encoder: CaptionEncoder, tmp_path: Path) -> None:
    embed(CAPTIONS, encoder, tmp_path, shard_size=16)
    files = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert repair_store(tmp_path) == []
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == files
    left = {"embeddings-00009.npy", ".keys-00009.parquet.77.tmp", ".index-1.npy-xyz", ".index-2.npy-xyz"}
    for name in left:
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / ".index-2.npy-xyz").unlink()
    (tmp_path / ".index-2.npy-xyz").mkdir()
    (tmp_path / "index-0123456789ab.npy").write_bytes(b"of shards that are no more")
    assert set(repair_store(tmp_path)) == left
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == files
    for path in tmp_path.glob("keys-*"):
        path.write_bytes(b"")
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(StoreError, match=r"nothing of .* is whole"):
        repair_store(tmp_path)


def test_a_full_disk_leaves_whole_shards_only(
    encoder: CaptionEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, calls = np.save, []

    def full(file: Any, array: np.ndarray, **options: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            file.write(b"half of it")
            raise OSError(28, "No space left on device")
        save(file, array, **options)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr("llm2clip.store.writer.np.save", full)
        embed(CAPTIONS, encoder, tmp_path, shard_size=16)
    assert [s.number for s in read_shards(tmp_path)] == [0, 1]
    assert not list(tmp_path.glob(".*.tmp"))
    store = embed(CAPTIONS, encoder, tmp_path, shard_size=16)
    store.verify()
    assert len(store) == 50 and not (tmp_path / ".incoming").exists()


def test_two_runs_do_not_fill_one_store(encoder: CaptionEncoder, tmp_path: Path) -> None:
    with folder_lock(tmp_path), pytest.raises(StoreError, match="another run is filling"):
        embed(CAPTIONS, encoder, tmp_path)
    assert len(embed(CAPTIONS, encoder, tmp_path)) == 50


def test_captions_that_the_tokenizer_refuses_are_listed(
    encoder: CaptionEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenize = encoder.tokenize

    def fails(captions: list[str], *rest: Any) -> Any:
        if any("bad" in c for c in captions):
            raise RuntimeError("cannot")
        return tokenize(captions, *rest)

    monkeypatch.setattr(encoder, "tokenize", fails)
    store = embed(["good", "bad", "", "fine"], encoder, tmp_path)
    assert len(store) == 2 and "good" in store and "bad" not in store
    refused = [json.loads(line) for line in (tmp_path / "refused-00000.jsonl").read_text().splitlines()]
    assert refused == [{"caption": "bad", "why": "RuntimeError: cannot"}, {"caption": "", "why": "no tokens"}]
    odd = "bad\u2028one"  # Python takes it for the end of a line
    embed([odd], encoder, tmp_path / "odd")
    both = merge_stores(tmp_path / "both", [tmp_path, tmp_path / "odd"])
    assert refused_captions(both.folder) == {"bad", "", odd}
    again = embed(["bad", "", "good"], encoder, tmp_path)  # they are not tried again
    assert [s.number for s in again.shards] == [0]
    records = [Record("1", None, ("good", "bad"), ("bad",)), Record("2", None, ("bad",))]
    assert readable(records, store) == [Record("1", None, ("good",), ())]

    def dies(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("llm2clip.store.writer.StoreWriter.write", dies)
        embed(["bad 1", "a", "bad 2", "b"], encoder, tmp_path / "killed", shard_size=2)
    embed(["bad 1", "a", "bad 2", "b"], encoder, tmp_path / "killed", shard_size=2)
    assert refused_captions(tmp_path / "killed") == {"bad 1", "bad 2"}, "the list of a shard that never came is kept"


def test_a_caption_that_was_encoded_twice_moves_no_other(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, IDENTITY, 1)
    writer.write(0, ["a", "b"], [1, 1], np.array([[1], [2]]))
    writer.write(1, ["b", "c"], [1, 1], np.array([[2], [3]]))
    writer.finish()
    store = EmbeddingStore(tmp_path)
    assert store.take(store.rows(["c", "b", "a"])).ravel().tolist() == [3, 2, 1]


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, IDENTITY, 2)
    with pytest.raises(StoreError, match="too big"), np.errstate(over="ignore"):
        writer.write(0, ["fine", "too big"], [1, 1], np.array([[1, 1], [1e6, 0]]))
    assert read_shards(tmp_path) == []


def test_cut_captions_are_listed(llm: Path, tmp_path: Path) -> None:
    encoder = CaptionEncoder.from_pretrained(llm, max_length=8, device="cpu")
    embed(["short", "far too long for eight"], encoder, tmp_path)
    listed = [json.loads(line) for line in (tmp_path / "truncated-00000.jsonl").read_text().splitlines()]
    assert listed == [{"caption": "far too long for eight"}]


def test_a_store_keeps_its_dtype(tmp_path: Path) -> None:
    StoreWriter(tmp_path, IDENTITY, 4, "int8")
    with pytest.raises(StoreError, match="holds dtype int8, not float16"):
        StoreWriter(tmp_path, IDENTITY, 4)


def test_stores_of_several_machines_become_one(encoder: CaptionEncoder, tmp_path: Path) -> None:
    parts = [tmp_path / name for name in "abc"]
    for part, captions in zip(parts, (CAPTIONS[:20], CAPTIONS[10:35], CAPTIONS[35:]), strict=True):
        embed(captions, encoder, part, shard_size=8)
    whole = embed(CAPTIONS, encoder, tmp_path / "whole")
    store = merge_stores(tmp_path / "merged", parts)
    assert len(store) == 50
    assert np.allclose(store.take(store.rows(CAPTIONS)), whole.take(whole.rows(CAPTIONS)), atol=1e-3)
    assert len(merge_stores(tmp_path / "merged", parts).shards) == len(store.shards)  # given again, it adds nothing
    store.verify()
    StoreWriter(tmp_path / "other", IDENTITY, 32)
    with pytest.raises(StoreError, match="another encoder"):
        merge_stores(tmp_path / "more", [parts[0], tmp_path / "other"])
    flip(parts[1] / "embeddings-00000.npy", -1)
    with pytest.raises(StoreError, match="damaged"):
        merge_stores(tmp_path / "more", parts)


def test_stores_of_one_kind_become_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where files cannot be linked; a store given twice adds nothing; another kind is refused by name."""
    for name, width, dtype in (("a", 2, "int8"), ("b", 2, "int8"), ("wide", 3, "int8"), ("half", 2, "float16")):
        writer = StoreWriter(tmp_path / name, IDENTITY, width, dtype)
        writer.write(4, [name], [1], np.full((1, width), len(name)))
        writer.finish()
    a, b = tmp_path / "a", tmp_path / "b"
    for out, link in (("deep/linked", os.link), ("copied", None)):
        if link is None:
            monkeypatch.setattr("os.link", lambda *paths: (_ for _ in ()).throw(OSError("another disk")))
        store = merge_stores(tmp_path / out, [a, b, a])
        assert [shard.number for shard in store.shards] == [0, 1] and store.manifest["dtype"] == "int8"
        assert store.take(store.rows(["b", "a"])).tolist() == [[1, 1], [1, 1]]
        store.verify()
    for other, says in (("wide", r"wide has width 3, .*a 2$"), ("half", r"half has dtype float16, .*a int8$")):
        with pytest.raises(StoreError, match=says):
            merge_stores(tmp_path / "more", [a, tmp_path / other])
    writer = StoreWriter(a, IDENTITY, 2, "int8")
    writer.write(5, ["new"], [1], np.ones((1, 2)))
    writer.finish()
    assert "new" in merge_stores(tmp_path / "copied", [a, b]), "what comes after a shard that is there already"
    with pytest.raises(StoreError, match=r"^name the stores to merge$"):
        merge_stores(tmp_path / "more", [])


def test_auto_precision_is_that_of_the_store(
    encoder: CaptionEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": False}, raising=False)
    assert embed(CAPTIONS[:9], encoder, tmp_path / "slow").manifest["identity"]["precision"] == "fp32"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    assert embed(CAPTIONS, encoder, tmp_path / "slow").manifest["identity"]["precision"] == "fp32"
    assert embed(CAPTIONS, encoder, tmp_path / "fast").manifest["identity"]["precision"] == "bf16"
    with pytest.raises(StoreError, match="precision: 'bf16' there, 'fp32' here"):
        embed(CAPTIONS, encoder, tmp_path / "fast", precision="fp32")


def test_the_store_command(
    encoder: CaptionEncoder, llm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    embed(CAPTIONS[:30], encoder, tmp_path / "a", shard_size=16, precision="fp32")
    embed(CAPTIONS[20:], encoder, tmp_path / "b", shard_size=16, precision="fp32")

    def run(*args: str | Path) -> str:
        status = main(["store", *map(str, args)])
        printed = capsys.readouterr()
        return printed.out if status == 0 else printed.err

    assert "30 captions in 2 shards" in run("verify", tmp_path / "a")
    assert "50 captions" in run("merge", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "c")
    run("export", tmp_path / "c", "--parquet", tmp_path / "c.parquet")
    assert "50 captions" in run("import", "--parquet", tmp_path / "c.parquet", "--out", tmp_path / "d")
    theirs = pq.read_table(tmp_path / "c.parquet").replace_schema_metadata()
    pq.write_table(theirs, tmp_path / "nameless.parquet")
    assert "name it" in run("import", "--parquet", tmp_path / "nameless.parquet", "--out", tmp_path / "e")
    named = run("import", "--parquet", tmp_path / "nameless.parquet", "--out", tmp_path / "e", "--encoder.path", llm)
    assert "50 captions" in named
    assert EmbeddingStore(tmp_path / "e").manifest["identity"] == EmbeddingStore(tmp_path / "c").manifest["identity"]
    assert "name either" in run("export", tmp_path / "c")
    flip(tmp_path / "c/embeddings-00001.npy", -1)
    assert "damaged shards 00001" in run("verify", tmp_path / "c")
    assert "embeddings-00001.npy" in run("repair", tmp_path / "c")
    assert "not a store" in run("verify", tmp_path / "nowhere")


def test_two_processes_write_what_one_writes(encoder: CaptionEncoder, llm: Path, tmp_path: Path) -> None:
    """The shards of both ranks, split statically, are those of a single process."""
    from conftest import distributed

    distributed(2, _embed_rank, str(llm), str(tmp_path / "two"))
    two, one = EmbeddingStore(tmp_path / "two"), embed(CAPTIONS, encoder, tmp_path / "one", shard_size=8)
    assert two.manifest["shards"] == one.manifest["shards"]
    assert torch.equal(torch.from_numpy(two.take(two.rows(CAPTIONS))), torch.from_numpy(one.take(one.rows(CAPTIONS))))


def _embed_rank(llm: str, folder: str) -> None:
    embed(CAPTIONS, CaptionEncoder.from_pretrained(llm, device="cpu"), folder, shard_size=8)


# ---- keys to rows ---------------------------------------------------------------------------------------------------


def test_an_index_of_many_parts_is_a_dictionary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sorted in small parts, with repeated keys, equal first halves, and keys that are not there."""
    monkeypatch.setattr("llm2clip.store.key_index.PART", 100)
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 256, (3000, 16), dtype=np.uint8)
    keys[500:600] = keys[:100]
    keys[700:800, :8] = keys[800, :8]
    expected: dict[bytes, int] = {}
    for row, key in enumerate(map(bytes, keys)):
        expected.setdefault(key, row)
    different = build_key_index(tmp_path / "index.npy", (keys[i : i + 64] for i in range(0, 3000, 64)))
    assert different == len(expected)
    index = KeyIndex(tmp_path / "index.npy")
    asked = np.concatenate([keys, rng.integers(0, 256, (500, 16), dtype=np.uint8), keys[800:801]])
    asked[-1, 15] ^= 1  # the same first half, nowhere
    first = keys[np.lexsort(keys.T[::-1])[0]].copy()
    first[:8] = 0  # below all others, with the second half of the one that is above it
    asked = np.concatenate([asked, first[None]])
    assert index.find(asked).tolist() == [expected.get(bytes(key), -1) for key in asked]
    assert list(tmp_path.iterdir()) == [tmp_path / "index.npy"]
    records = np.stack([*split_keys(keys), np.arange(3000, dtype=np.uint64)], axis=1)
    records.tofile(tmp_path / "records")
    parts = list(sorted_partitions(tmp_path / "records", 3000))
    assert len(parts) == 32 and max(map(len, parts)) < 250, "memory is that of a part"
    assert np.array_equal(np.concatenate(parts), records[np.lexsort(records.T[::-1])])
    assert build_key_index(tmp_path / "none.npy", []) == 0 and KeyIndex(tmp_path / "none.npy").find(asked)[0] == -1


def test_incoming_captions_keep_their_order(
    encoder: CaptionEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm2clip.store.dedup.GROUP", 7)
    monkeypatch.setattr("llm2clip.store.key_index.PART", 10)
    store = embed(["d", "z"], encoder, tmp_path / "store")
    rng = np.random.default_rng(0)
    stream = [str(i) for i in rng.integers(0, 40, 200)] + ["z", "a", "d", "a"]
    (tmp_path / "in").mkdir()
    ingest(iter(stream), tmp_path / "in", store)
    incoming = PendingCaptions(tmp_path / "in")
    expected = [c for c in dict.fromkeys(stream) if c not in "dz"]
    assert len(incoming) == len(expected)
    for size in (1, 5, 100):
        found = [c for start in range(0, len(incoming), size) for c in incoming[start : start + size]]
        assert found == expected
    (tmp_path / "none").mkdir()
    ingest([], tmp_path / "none", None)
    assert len(PendingCaptions(tmp_path / "none")) == 0
