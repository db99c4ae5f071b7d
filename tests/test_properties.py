"""What must hold for any input: records of any rows, stores of any keys and any damage, metrics of any vectors."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from llm2clip.data.hashing import epoch_permutation, unique_captions
from llm2clip.data.records import Source, open_records
from llm2clip.data.skip_log import SkipLog
from llm2clip.evaluate.caption_retrieval import caption_retrieval_accuracy
from llm2clip.evaluate.ranks import positive_ranks, two_way_ranks
from llm2clip.evaluate.recall import chance_recall, recall, retrieval_metrics
from llm2clip.store.key_index import KeyIndex, build_key_index
from llm2clip.store.layout import StoreError
from llm2clip.store.maintenance import merge_stores, repair_store
from llm2clip.store.store import EmbeddingStore, ReadMode
from llm2clip.store.writer import StoreWriter

# The same examples in each run: a run that fails fails again.
some = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
few = settings(some, max_examples=25)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(["captions", "caption", "text", "long_captions", "image", "id", "split", "x"])


# ---- records -------------------------------------------------------------------------------------------------------


@some
@given(st.lists(st.lists(TEXT, min_size=1, max_size=4), min_size=1, max_size=6))
@example([["a\u2028b", "\ufeff", " \x1c "]])  # ends of lines that are none, and white space that is not a space
def test_captions_come_back_as_they_were_written(rows: list[list[str]]) -> None:
    """From JSON lines and from parquet: stripped, in order; empty ones are dropped, and rows of only those skipped."""
    kept = [tuple(text.strip() for text in captions if text.strip()) for captions in rows]
    assume(any(kept))
    with TemporaryDirectory() as folder:
        lines, table = Path(folder, "x.jsonl"), Path(folder, "x.parquet")
        lines.write_text("".join(json.dumps({"captions": r}, ensure_ascii=False) + "\n" for r in rows), "utf-8")
        pq.write_table(pa.table({"captions": rows}), table)
        for file in (lines, table):
            log = SkipLog(max_skipped=1.0)
            assert [r.captions for r in open_records(file, log)] == [captions for captions in kept if captions]
            assert log.skipped == ({"no caption": kept.count(())} if () in kept else {})
            assert log.dropped.total() == sum(not text.strip() for captions in rows for text in captions)


@some
@given(st.lists(st.dictionaries(NAMES, JSON, max_size=4) | JSON, min_size=1, max_size=8))
def test_each_row_is_a_record_or_is_counted(rows: list[Any]) -> None:
    """Rows of any shape: nothing is lost, and nothing but an error of ours is raised."""
    with TemporaryDirectory() as folder:
        file = Path(folder, "x.jsonl")
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        log, records, said = SkipLog(max_skipped=1.0), [], ""
        try:
            for record in open_records(file, log):
                records.append(record)
        except ValueError as error:
            said = str(error)
        assert "x.jsonl" in said if said else records
        if "no column of captions" in said:  # said at the end, when all rows have been looked at
            assert not records
        assert len(records) + log.skipped.total() == log.rows_seen == len(rows)
        assert all(record.texts for record in records)


@some
@given(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="@\0"), min_size=1, max_size=12),
    st.lists(st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=6), max_size=3),
)
def test_a_source_is_read_as_it_is_shown(path: str, splits: list[str]) -> None:
    source = Source(path, tuple(splits))
    assert Source.parse(str(source)) == source == Source.parse({"path": path, "splits": splits})


@some
@given(st.integers(0, 50), st.integers(0, 2**31), st.integers(0, 9))
def test_an_epoch_has_each_item_once(n: int, seed: int, epoch: int) -> None:
    order = epoch_permutation(n, seed, epoch)
    assert sorted(order) == list(range(n)) and np.array_equal(order, epoch_permutation(n, seed, epoch))


# ---- the store -----------------------------------------------------------------------------------------------------

CAPTIONS = st.lists(TEXT, min_size=1, max_size=6)
IDENTITY = {"weights": "abc"}


def vectors_of(captions: Sequence[str], width: int = 3) -> np.ndarray:
    """A vector for each text, the same for the same text, and numbers that float16 holds."""
    return np.array([np.random.default_rng(list(text.encode())).integers(-99, 99, width) for text in captions], float)


def written(folder: Path, shards: Sequence[Sequence[str]], dtype: str = "float16") -> None:
    writer = StoreWriter(folder, IDENTITY, 3, dtype)
    for number, captions in enumerate(shards):
        writer.write(number, captions, [len(c) for c in captions], vectors_of(captions))
    writer.finish()


@few
@given(
    st.lists(CAPTIONS, min_size=1, max_size=4),
    st.data(),
    st.sampled_from(["float16", "float32", "int8"]),
    st.sampled_from(["mmap", "pread"]),
)
def test_a_store_is_a_dictionary(shards: list[list[str]], data: st.DataObject, dtype: str, read_mode: ReadMode) -> None:
    """Captions in any order, repeated within and across shards, asked for in any order and as often as one likes."""
    everything = unique_captions(caption for captions in shards for caption in captions)
    asked = data.draw(st.lists(st.sampled_from(everything), max_size=12))
    with TemporaryDirectory() as folder:
        written(Path(folder), shards, dtype)
        store = EmbeddingStore(folder, read_mode)
        assert len(store) == len(everything)
        found, right = store.take(store.rows(asked)), vectors_of(asked).reshape(-1, 3)
        assert found.dtype == np.float32
        largest = np.abs(right).max(1, initial=0, keepdims=True)
        assert (np.abs(found - right) <= (largest / 127 / 2 + 1e-5 if dtype == "int8" else 0)).all()
        absent = data.draw(TEXT.filter(lambda text: text not in everything))
        assert absent not in store and all(caption in store for caption in asked)
        with pytest.raises(StoreError, match="no embedding of the caption"):
            store.rows([*asked, absent])
        store.verify()


@few
@given(st.lists(CAPTIONS, min_size=1, max_size=3), st.lists(CAPTIONS, min_size=1, max_size=3))
def test_merged_stores_hold_what_each_of_them_holds(first: list[list[str]], second: list[list[str]]) -> None:
    with TemporaryDirectory() as folder:
        a, b, both = (Path(folder, name) for name in "abc")
        written(a, first)
        written(b, second)
        for _ in range(2):  # a merge that is given again changes nothing
            store = merge_stores(both, [a, b])
            captions = unique_captions(caption for shard in (*first, *second) for caption in shard)
            assert len(store) == len(captions)
            assert np.array_equal(store.take(store.rows(captions)), vectors_of(captions))
            store.verify()


@some
@given(st.lists(CAPTIONS, min_size=2, max_size=3), st.data())
def test_a_damaged_store_says_so_and_is_repaired(shards: list[list[str]], data: st.DataObject) -> None:
    """One byte of one file is another: opening or verifying tells, and after a repair no vector is a wrong one."""
    captions = unique_captions(caption for shard in shards for caption in shard)
    with TemporaryDirectory() as name:
        folder = Path(name)
        written(folder, shards)
        file = folder / data.draw(st.sampled_from(sorted(path.name for path in folder.iterdir())))
        content = bytearray(file.read_bytes())
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] ^= data.draw(st.integers(1, 255))
        file.write_bytes(content)
        said = ""
        try:
            store = EmbeddingStore(folder)
            store.verify()
            # What is not told is not harmful: such a byte is one that nothing depends on.
            assert np.array_equal(store.take(store.rows(captions)), vectors_of(captions))
        except StoreError as error:
            said = str(error)
        assert not said or folder.name in said
        repair_store(folder)
        store = EmbeddingStore(folder)
        store.verify()
        left = [caption for caption in captions if caption in store]
        assert np.array_equal(store.take(store.rows(left)), vectors_of(left).reshape(-1, 3))
        lost = set(captions) - set(left)
        assert not lost or any(lost <= set(shard) for shard in shards), "more than a shard is lost"


@some
@given(st.lists(st.lists(st.binary(min_size=2, max_size=2), max_size=8), max_size=4), st.integers(0, 3))
def test_an_index_finds_the_first_row_of_a_key(parts: list[list[bytes]], head: int) -> None:
    """Keys that share their first half, or all of it, against a dictionary."""
    parts = [[key[:1] * 8 + key[1:] * 8 if head else key * 8 for key in some] for some in parts]
    arrays = [np.frombuffer(b"".join(some), np.uint8).reshape(-1, 16) for some in parts]
    first: dict[bytes, int] = {}
    for row, key in enumerate(key for some in parts for key in some):
        first.setdefault(key, row)
    asked = [*first, b"\0" * 16, b"\xff" * 16, *(key[:8] + b"\x01" * 8 for key in first)]
    with TemporaryDirectory() as folder:
        file = Path(folder, "index.npy")
        assert build_key_index(file, arrays) == len(first)
        found = KeyIndex(file).find(np.frombuffer(b"".join(asked), np.uint8).reshape(-1, 16))
        assert found.tolist() == [first.get(key, -1) for key in asked]
        del found


# ---- metrics -------------------------------------------------------------------------------------------------------


@st.composite
def collections(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Images, texts and the image of each, every image with one at least. Vectors of small whole numbers: products are
    exact, and ties are many."""
    images = draw(st.integers(1, 7))
    owner = [*range(images), *draw(st.lists(st.integers(0, images - 1), max_size=9))]
    owner = draw(st.permutations(owner))
    number = st.integers(-2, 2).map(float)
    vectors = [
        torch.tensor(draw(st.lists(st.lists(number, min_size=3, max_size=3), min_size=n, max_size=n)))
        for n in (images, len(owner))
    ]
    return vectors[0], vectors[1], owner


def rank(scores: list[float], right: set[int]) -> int:
    """How many wrong answers are as good as the best right one, or better."""
    best = max(scores[j] for j in right)
    return sum(score >= best for j, score in enumerate(scores) if j not in right)


@some
@given(collections(), st.sampled_from([16, 32, 512]))
def test_ranks_are_those_of_counting(collection: tuple[torch.Tensor, torch.Tensor, list[int]], tile: int) -> None:
    images, texts, owner = collection
    of_image, of_text = two_way_ranks(images, texts, owner, tile)
    scores = (images.double() @ texts.double().T).tolist()
    texts_of = [{t for t, i in enumerate(owner) if i == image} for image in range(len(images))]
    assert of_image.tolist() == [rank(scores[i], texts_of[i]) for i in range(len(images))]
    assert of_text.tolist() == [rank([row[t] for row in scores], {owner[t]}) for t in range(len(texts))]
    assert torch.equal(of_text, positive_ranks(texts, images, [[i] for i in owner], tile))
    assert torch.equal(of_image, positive_ranks(images, texts, [sorted(some) for some in texts_of], tile))


@few
@given(collections(), st.randoms(use_true_random=False))
def test_figures_do_not_depend_on_the_order(
    collection: tuple[torch.Tensor, torch.Tensor, list[int]], random: Any
) -> None:
    """Images and texts renumbered: the same recall; and it grows with k, from none to all."""
    images, texts, owner = collection
    renumbered, shuffled = list(range(len(images))), list(range(len(texts)))
    random.shuffle(renumbered)
    random.shuffle(shuffled)
    place = {old: new for new, old in enumerate(renumbered)}
    other = [place[owner[t]] for t in shuffled]
    before = retrieval_metrics(*two_way_ranks(images, texts, owner), owner)
    after = retrieval_metrics(*two_way_ranks(images[renumbered], texts[shuffled], other), other)
    for way in ("I2T", "T2I", "I2T chance", "T2I chance"):
        assert after[way] == pytest.approx(before[way])
        at = [before[way][f"R@{k}"] for k in (1, 5, 10)]
        assert 0 <= at[0] <= at[1] <= at[2] <= 100 + 1e-9
    for way in ("I2T", "T2I"):
        for name, (low, high) in before[f"{way} interval"].items():
            assert 0 <= low <= before[way][name] <= high <= 100, name


@some
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(6, 12), st.integers(1, 12))
def test_chance_is_the_share_of_draws_that_hit(positives: list[int], items: int, k: int) -> None:
    drawn = min(k, items)
    exact = [1 - math.comb(items - p, drawn) / math.comb(items, drawn) for p in positives]
    assert chance_recall(positives, items, (k,))[f"R@{k}"] == pytest.approx(100 * sum(exact) / len(exact))


@some
@given(st.lists(st.integers(0, 12), min_size=1), st.integers(1, 12))
def test_recall_is_the_share_below_k(ranks: list[int], k: int) -> None:
    assert recall(torch.tensor(ranks), (k,))[f"R@{k}"] == pytest.approx(100 * sum(r < k for r in ranks) / len(ranks))


class Hashing:
    """A text encoder that gives each text numbers of its own; texts that begin alike are near each other."""

    def encode(self, captions: Sequence[str], *, progress: bool = True) -> torch.Tensor:
        return F.normalize(torch.from_numpy(vectors_of([c[:1] for c in captions]) + 0.01).float(), dim=-1)

    def count_truncated(self, captions: Sequence[str]) -> int | None:
        return None


@few
@given(st.lists(st.lists(TEXT.filter(bool), max_size=3), min_size=1, max_size=6))
def test_caption_accuracy_of_any_captions(images: list[list[str]]) -> None:
    """Between 0 and 100, the mean of what each image hits, and within its interval's reach; images are left out or
    counted; the other protocol counts each caption of those."""
    different = [c for c in map(unique_captions, images) if len(c) > 1]
    if not different:
        with pytest.raises(ValueError, match="two captions"):
            caption_retrieval_accuracy(images, Hashing(), progress=False)
        return
    found = caption_retrieval_accuracy(images, Hashing(), all_pairs=True, return_hits=True, num_mistakes=9, progress=False)
    assert found["images"] == len(different) and found["excluded"] == len(images) - len(different)
    assert found["CRA"] == pytest.approx(100 * sum(found["hits"]) / len(different))
    assert found["captions"] == sum(map(len, different)) and set(found["hits"]) <= {0, 0.5, 1}
    vectors = Hashing().encode([c for pair in different for c in pair[:2]]).double()
    scores = (vectors[::2] @ vectors[1::2].T).round(decimals=6).tolist()
    hits = [(rank(row, {i}) == 0) for i, row in enumerate(scores)]
    hits += [(rank([row[i] for row in scores], {i}) == 0) for i in range(len(scores))]
    assert found["CRA"] == pytest.approx(100 * sum(hits) / len(hits))
    assert all(m["retrieved cosine"] >= m["correct cosine"] for m in found["mistakes"])
