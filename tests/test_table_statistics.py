"""Statistics of record tables, compared with plain Python."""

import random
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from llm2clip.data.records import CAPTION_FIELDS, TEXT_FIELDS
from llm2clip.data.table_statistics import (
    Histogram,
    TableStatistics,
    compute_statistics,
    count_captions,
    count_languages,
    count_words,
)

WORDS = ["a", "dog", "läuft", "一只狗", "🐕", "snow,", "it's", "\u05d0\u05d1"]
SPACES = [" ", "  ", "\t", "\u3000", "\u00a0", "\n"]


def make_rows(count: int) -> list[dict[str, Any]]:
    """Random rows. A third has no image, and some lists are null or empty."""
    rng = random.Random(0)

    def make_text() -> str:
        text = rng.choice(WORDS)
        for _ in range(rng.randrange(12)):
            text += rng.choice(SPACES) + rng.choice(WORDS)
        return text

    rows = []
    for n in range(count):
        has_image = n % 3 > 0
        row: dict[str, Any] = {"split": rng.choice([None, b"train", b"val", b"\xff"])}
        row["image_kind"] = rng.choice([0, 1, 2]) if has_image else -1
        row["image_name"] = rng.choice([b"a.JPG", b"b\xff.png", b"c.d.jpg", b"noname", None]) if has_image else None
        row["width"], row["height"] = (rng.randrange(1, 999), rng.randrange(1, 999)) if n % 5 else (0, 0)
        for field in TEXT_FIELDS:
            row[field] = rng.choice([None, [], [make_text()], [make_text(), make_text(), make_text()]])
        rows.append(row)
    return rows


def compute(rows: list[dict[str, Any]], batch_size: int) -> TableStatistics:
    types = {"split": pa.binary(), "image_name": pa.binary(), "image_kind": pa.int8()}
    types |= {"width": pa.int32(), "height": pa.int32()} | dict.fromkeys(TEXT_FIELDS, pa.list_(pa.string()))
    table = pa.Table.from_pylist(rows, pa.schema(list(types.items())))
    return compute_statistics(table.to_batches(max_chunksize=batch_size))


@pytest.mark.parametrize("batch_size", [7, 1000])
def test_statistics_match_plain_python(batch_size: int) -> None:
    rows = make_rows(300)
    images = [row for row in rows if row["image_kind"] >= 0]
    statistics = compute(rows, batch_size)
    assert (statistics.num_records, statistics.num_images) == (len(rows), len(images))
    for field in TEXT_FIELDS:
        texts = [text for row in rows for text in row[field] or []]
        result = statistics.texts[field]
        assert result.num_records == sum(bool(row[field]) for row in rows)
        assert result.words == make_histogram([len(text.split()) for text in texts])
        assert result.characters == make_histogram([len(text) for text in texts])
    captions = [sum(len(row[field] or []) for field in CAPTION_FIELDS) for row in images]
    assert statistics.captions_per_image == make_histogram(captions)
    splits = Counter({b"\xff": "\\xff", None: "none"}.get(row["split"]) or row["split"].decode() for row in rows)
    assert {name: records for name, (records, _) in statistics.splits.items()} == splits
    assert statistics.splits["val"][1] == sum(row["split"] == b"val" for row in images)
    assert statistics.kinds == Counter(row["image_kind"] for row in images)
    suffixes = {b"a.JPG": "jpg", b"b\xff.png": "png", b"c.d.jpg": "jpg"}
    files = [row for row in images if row["image_kind"] < 2]
    assert statistics.suffixes == Counter(suffixes.get(row["image_name"], "") for row in files)
    sizes = [(row["width"], row["height"]) for row in images if row["width"]]
    assert statistics.widths == make_histogram([width for width, _ in sizes])
    assert statistics.short_sides == make_histogram([min(size) for size in sizes])


def make_histogram(values: list[int]) -> Histogram:
    histogram = Histogram()
    histogram.add(pa.array(values, pa.int32()))
    return histogram


def test_histogram_percentiles_match_numpy() -> None:
    rng = np.random.default_rng(0)
    values = rng.geometric(0.01, 10_001)
    histogram = make_histogram([])
    for part in np.array_split(values, 7):
        histogram.add(pa.array(part))
    histogram.add(pa.array([None], pa.int64()))
    for percent in (0, 0.1, 5, 50, 95, 99.99, 100):
        assert histogram.percentile(percent) == np.percentile(values, percent, method="inverted_cdf")
    assert histogram.maximum == values.max() and histogram.mean == pytest.approx(values.mean())
    assert histogram.count == len(values) and histogram.count_below(50) == (values < 50).sum()


def test_words_are_counted_like_split() -> None:
    texts = ["one", "a  b", "a\u00a0b\u3000c", "a\u200bb", "a\tb\nc\x1cd", "x\u2028y\x85z", ""]
    assert count_words(pa.array(texts[:-1])).to_pylist() == [len(text.split()) for text in texts[:-1]]


def test_statistics_read_a_sliced_batch() -> None:
    batch = pa.record_batch({field: pa.array([["a"], ["b", "c"], None]) for field in CAPTION_FIELDS})
    assert count_captions(batch.slice(1)).to_pylist() == [6, 0]


def test_languages_are_identified() -> None:
    texts = ["Zwei Kinder spielen im Schnee.", "Un chien court dans l'herbe.", "一只狗在草地上奔跑", "two dogs in snow"]
    assert count_languages([*texts, texts[0] + " " * 10_000_000]) == {"de": 2, "fr": 1, "zh": 1, "en": 1}
