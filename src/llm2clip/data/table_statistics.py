"""Statistics of record tables: caption lengths, image sizes, splits and languages."""

import functools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llm2clip.data.image_refs import IMAGE_KINDS
from llm2clip.data.records import CAPTION_FIELDS, NO_SPLIT, TEXT_FIELDS
from llm2clip.data.table import NO_IMAGE

STATISTICS_COLUMNS = ("image_kind", "image_name", "width", "height", "split", *TEXT_FIELDS)
LANGUAGE_CHARACTERS = 1000  # number of characters of a text that are used to identify its language
KINDS_WITH_NAME = pa.array([number for number, kind in enumerate(IMAGE_KINDS) if kind.has_file_name], pa.int8())
_SUFFIX = r"\.(?P<suffix>[A-Za-z0-9]{1,5})$"


class Histogram(Counter[int]):
    """Counts of integers, from which exact percentiles are computed without storing all values."""

    def add(self, values: pa.Array | pa.ChunkedArray) -> None:
        """Count the values of an integer array. Nulls are ignored."""
        self.update(count_values(values.drop_null()))

    @property
    def count(self) -> int:
        return self.total()

    @property
    def maximum(self) -> int:
        return max(self)

    @property
    def mean(self) -> float:
        return sum(value * count for value, count in self.items()) / self.count

    def percentile(self, percent: float) -> int:
        """Return the smallest value that is greater than or equal to at least `percent` percent of all values."""
        return int(np.percentile(list(self), percent, weights=list(self.values()), method="inverted_cdf"))

    def count_below(self, limit: int) -> int:
        return sum(count for value, count in self.items() if value < limit)


@dataclass
class TextStatistics:
    """Lengths of the texts in a column, and the number of records with at least one text."""

    num_records: int = 0
    words: Histogram = field(default_factory=Histogram)
    characters: Histogram = field(default_factory=Histogram)

    def add(self, texts: pa.Array) -> None:
        self.num_records += pc.sum(pc.greater(pc.list_value_length(texts), 0)).as_py() or 0
        values = pc.list_flatten(texts)
        self.words.add(count_words(values))
        self.characters.add(pc.utf8_length(values))


@dataclass
class TableStatistics:
    """Statistics of a record table. Image sizes are in pixels, as given in the file headers (before EXIF rotation)."""

    num_records: int = 0
    num_images: int = 0  # number of records with an image
    texts: dict[str, TextStatistics] = field(default_factory=lambda: {name: TextStatistics() for name in TEXT_FIELDS})
    captions_per_image: Histogram = field(default_factory=Histogram)  # counts the captions in all caption fields
    splits: dict[str, tuple[int, int]] = field(default_factory=dict)  # split -> number of records and images
    kinds: Counter[int] = field(default_factory=Counter)  # index into `IMAGE_KINDS` -> number of images
    suffixes: Counter[str] = field(default_factory=Counter)  # lower-case file name suffix -> number of images
    widths: Histogram = field(default_factory=Histogram)
    heights: Histogram = field(default_factory=Histogram)
    short_sides: Histogram = field(default_factory=Histogram)

    def add(self, batch: pa.RecordBatch) -> None:
        """Add records with the columns `STATISTICS_COLUMNS`."""
        has_image = pc.not_equal(batch["image_kind"], NO_IMAGE)
        self.num_records += len(batch)
        for name in TEXT_FIELDS:
            self.texts[name].add(batch[name])
        self._add_splits(batch["split"], has_image)
        images = batch.filter(has_image)
        self.num_images += len(images)
        self.captions_per_image.add(count_captions(images))
        self.kinds.update(count_values(images["image_kind"]))
        self._add_suffixes(images)
        measured = images.filter(pc.greater(images["width"], 0))  # excludes images with an unread header
        self.widths.add(measured["width"])
        self.heights.add(measured["height"])
        self.short_sides.add(pc.min_element_wise(measured["width"], measured["height"]))

    def _add_suffixes(self, images: pa.RecordBatch) -> None:
        files = images.filter(pc.is_in(images["image_kind"], KINDS_WITH_NAME))
        suffixes = pc.struct_field(pc.extract_regex(files["image_name"], _SUFFIX), "suffix")
        for suffix, count in count_values(suffixes).items():
            self.suffixes[(suffix or b"").decode().lower()] += count

    def _add_splits(self, splits: pa.Array, has_image: pa.Array) -> None:
        num_images = count_values(splits.filter(has_image))
        for value, count in count_values(splits).items():
            name = value.decode("utf-8", "backslashreplace") if value else NO_SPLIT
            records, images = self.splits.get(name, (0, 0))
            self.splits[name] = records + count, images + num_images[value]


def compute_statistics(batches: Iterable[pa.RecordBatch]) -> TableStatistics:
    """Compute the statistics of a table from record batches with the columns `STATISTICS_COLUMNS`."""
    statistics = TableStatistics()
    for batch in batches:
        statistics.add(batch)
    return statistics


def count_words(texts: pa.Array) -> pa.Array:
    """Count the words of each text, like `len(text.split())`. The texts must not start with whitespace."""
    return pc.list_value_length(pc.utf8_split_whitespace(texts))


def count_captions(batch: pa.RecordBatch) -> pa.Array:
    """Count the captions of each record, over all caption fields."""
    lengths = [pc.fill_null(pc.list_value_length(batch[name]), 0) for name in CAPTION_FIELDS]
    return functools.reduce(pc.add, lengths)


def count_values(values: pa.Array) -> Counter:
    """Count the occurrences of each value. Nulls are counted as None."""
    distinct = pc.value_counts(values)
    return Counter(dict(zip(distinct.field("values").to_pylist(), distinct.field("counts").to_pylist(), strict=True)))


def count_languages(texts: Iterable[str]) -> Counter[str]:
    """Count the texts per language code, such as "en". Texts without linguistic content have the code "zxx".

    Identification is unreliable for short texts. One in 250 English captions of about ten words is misidentified.
    """
    from py3langid import classify

    return Counter(classify(text[:LANGUAGE_CHARACTERS])[0] for text in texts)
