"""Property-based tests (Hypothesis): records of any rows, stores with any keys or damage, metrics of any embeddings."""

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
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from llm2clip.data.records import open_records
from llm2clip.data.skip_log import SkipLog
from llm2clip.evaluate.metrics import compute_chance_recall, compute_positive_ranks, two_way_ranks
from llm2clip.store.layout import StoreError
from llm2clip.store.maintenance import repair_store
from llm2clip.store.store import EmbeddingStore
from llm2clip.store.writer import StoreWriter

# derandomize: every run uses the same examples, so that a failure repeats.
default_settings = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
slow_settings = settings(default_settings, max_examples=25)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(["captions", "caption", "text", "long_captions", "image", "id", "split", "x"])


# ---- records -------------------------------------------------------------------------------------------------------


@default_settings
@given(st.lists(st.lists(TEXT, min_size=1, max_size=4), min_size=1, max_size=6))
@example([["a\u2028b", "\ufeff", " \x1c "]])  # not a line break for JSON lines; no white space; white space
def test_open_records_returns_stripped_captions_in_order(rows: list[list[str]]) -> None:
    """JSON lines and Parquet: empty captions are dropped, and rows without any other caption are skipped."""
    expected = [tuple(text.strip() for text in captions if text.strip()) for captions in rows]
    assume(any(expected))
    with TemporaryDirectory() as folder:
        jsonl, parquet = Path(folder, "x.jsonl"), Path(folder, "x.parquet")
        jsonl.write_text("".join(json.dumps({"captions": r}, ensure_ascii=False) + "\n" for r in rows), "utf-8")
        pq.write_table(pa.table({"captions": rows}), parquet)
        for file in (jsonl, parquet):
            log = SkipLog(max_skipped=1.0)
            assert [r.captions for r in open_records(file, log)] == [captions for captions in expected if captions]
            assert log.skipped == ({"no caption": expected.count(())} if () in expected else {})
            assert log.dropped.total() == sum(not all(text.strip() for text in captions) for captions in rows)


@default_settings
@given(st.lists(st.dictionaries(NAMES, JSON, max_size=4) | JSON, min_size=1, max_size=8))
def test_open_records_returns_or_counts_each_row(rows: list[Any]) -> None:
    """Rows of any shape: each is a record or is counted as skipped, and only ValueError is raised."""
    with TemporaryDirectory() as folder:
        file = Path(folder, "x.jsonl")
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        log, records, message = SkipLog(max_skipped=1.0), [], ""
        try:
            for record in open_records(file, log):
                records.append(record)
        except ValueError as error:
            message = str(error)
        assert "x.jsonl" in message if message else records
        if "no caption column" in message:  # raised after all rows
            assert not records
        assert len(records) + log.skipped.total() == log.rows_seen == len(rows)
        assert all(record.texts for record in records)


# ---- the store -----------------------------------------------------------------------------------------------------

CAPTIONS = st.lists(TEXT, min_size=1, max_size=6)
IDENTITY = {"weights": "abc"}


def embeddings_of(captions: Sequence[str], embed_dim: int = 3) -> np.ndarray:
    """Return an embedding that depends on the text only, with values that float16 represents exactly."""
    rows = [np.random.default_rng(list(text.encode())).integers(-99, 99, embed_dim) for text in captions]
    return np.array(rows, float)


def write_store(folder: Path, shards: Sequence[Sequence[str]], dtype: str = "float16") -> None:
    writer = StoreWriter(folder, IDENTITY, 3, dtype)
    for number, captions in enumerate(shards):
        writer.write(number, captions, [len(c) for c in captions], embeddings_of(captions))
    writer.finish()


@slow_settings
@given(
    st.lists(CAPTIONS, min_size=1, max_size=4),
    st.data(),
    st.sampled_from(["float16", "float32", "int8"]),
    st.booleans(),
)
def test_store_matches_a_dictionary(shards: list[list[str]], data: st.DataObject, dtype: str, read_ahead: bool) -> None:
    """Captions repeat within and across shards; lookups repeat and are in any order."""
    distinct = list(dict.fromkeys(caption for captions in shards for caption in captions))
    queries = data.draw(st.lists(st.sampled_from(distinct), max_size=12))
    with TemporaryDirectory() as folder:
        write_store(Path(folder), shards, dtype)
        store = EmbeddingStore(folder, read_ahead)
        assert len(store) == len(distinct)
        result, expected = store.take(store.find_rows(queries)), embeddings_of(queries).reshape(-1, 3)
        assert result.dtype == np.float32
        largest = np.abs(expected).max(1, initial=0, keepdims=True)
        assert (np.abs(result - expected) <= (largest / 127 / 2 + 1e-5 if dtype == "int8" else 0)).all()
        missing = data.draw(TEXT.filter(lambda text: text not in distinct))
        assert missing not in store and all(caption in store for caption in queries)
        with pytest.raises(StoreError, match="no embedding for the caption"):
            store.find_rows([*queries, missing])
        store.verify()


@default_settings
@given(st.lists(CAPTIONS, min_size=2, max_size=3), st.data())
def test_damaged_byte_is_detected_and_repaired(shards: list[list[str]], data: st.DataObject) -> None:
    """Change one byte of one file: opening or verifying raises, and after a repair no embedding is wrong."""
    captions = list(dict.fromkeys(caption for shard in shards for caption in shard))
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_store(folder, shards)
        file = folder / data.draw(st.sampled_from(sorted(path.name for path in folder.iterdir())))
        content = bytearray(file.read_bytes())
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] ^= data.draw(st.integers(1, 255))
        file.write_bytes(content)
        message = ""
        try:
            store = EmbeddingStore(folder)
            store.verify()
            # An undetected change must be harmless.
            assert np.array_equal(store.take(store.find_rows(captions)), embeddings_of(captions))
        except StoreError as error:
            message = str(error)
        assert not message or folder.name in message
        repair_store(folder)
        store = EmbeddingStore(folder)
        store.verify()
        remaining = [caption for caption in captions if caption in store]
        assert np.array_equal(store.take(store.find_rows(remaining)), embeddings_of(remaining).reshape(-1, 3))
        lost = set(captions) - set(remaining)
        assert not lost or any(lost <= set(shard) for shard in shards), "more than one shard is lost"


# ---- metrics -------------------------------------------------------------------------------------------------------


@st.composite
def retrieval_sets(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Draw images, texts, and the image of each text; each image has a text.

    Embeddings are small integers: dot products are exact, and ties are frequent.
    """
    images = draw(st.integers(1, 7))
    image_of_text = [*range(images), *draw(st.lists(st.integers(0, images - 1), max_size=9))]
    image_of_text = draw(st.permutations(image_of_text))
    value = st.integers(-2, 2).map(float)
    embeddings = [
        torch.tensor(draw(st.lists(st.lists(value, min_size=3, max_size=3), min_size=n, max_size=n)))
        for n in (images, len(image_of_text))
    ]
    return embeddings[0], embeddings[1], image_of_text


def rank(scores: list[float], positives: set[int]) -> int:
    """Count the negatives that score at least as high as the best positive."""
    best = max(scores[j] for j in positives)
    return sum(score >= best for j, score in enumerate(scores) if j not in positives)


@default_settings
@given(retrieval_sets(), st.sampled_from([16, 32, 512]))
def test_ranks_match_counting(retrieval_set: tuple[torch.Tensor, torch.Tensor, list[int]], tile: int) -> None:
    images, texts, image_of_text = retrieval_set
    image_ranks, text_ranks = two_way_ranks(images, texts, image_of_text, tile)
    scores = (images.double() @ texts.double().T).tolist()
    texts_of_image = [{t for t, i in enumerate(image_of_text) if i == image} for image in range(len(images))]
    assert image_ranks.tolist() == [rank(scores[i], texts_of_image[i]) for i in range(len(images))]
    text_scores = [[row[t] for row in scores] for t in range(len(texts))]
    assert text_ranks.tolist() == [rank(text_scores[t], {image_of_text[t]}) for t in range(len(texts))]
    one_way = compute_positive_ranks(texts, images, [[i] for i in image_of_text], tile)
    assert text_ranks.tolist() == [int(ranks[0]) for ranks in one_way]
    one_way = compute_positive_ranks(images, texts, [sorted(ts) for ts in texts_of_image], tile)
    assert image_ranks.tolist() == [int(ranks[0]) for ranks in one_way]


@default_settings
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(6, 12), st.integers(1, 12))
def test_chance_recall_is_the_hypergeometric_probability(positives: list[int], items: int, k: int) -> None:
    drawn = min(k, items)
    exact = [1 - math.comb(items - p, drawn) / math.comb(items, drawn) for p in positives]
    assert compute_chance_recall(positives, items, (k,))[f"R@{k}"] == pytest.approx(100 * sum(exact) / len(exact))
