"""Data sets for testing the claims: texts for `tune`, images for `align`, and held-out images for retrieval."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

from llm2clip.config import EvaluateConfig, ReproduceConfig, TuneConfig
from llm2clip.data.build_table import mask_same_images, open_table
from llm2clip.data.pairs import ImageCaptions, Pair, read_text_pairs, read_tuning_sources
from llm2clip.data.records import Record, Source
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.splits import read_splits, replace_captions
from llm2clip.data.table import RecordTable
from llm2clip.runs.ranks import print_once

WORDNET = Path("/usr/share/wordnet")  # from Debian's wordnet-base package
PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")
CAPTIONS_TEST, FOREIGN_TEST = "captions", "foreign"  # arguments of `ClaimData.get_test_records`


class ClaimData:
    """Data sets for all claims. Each is read on first access, which raises ValueError if a source is missing."""

    def __init__(self, folder: Path, config: ReproduceConfig, log: SkipLog) -> None:
        self.folder = folder
        self.config = config
        self.log = log

    @cached_property
    def tuning_captions(self) -> list[ImageCaptions]:
        """Captions for the `tune` stage.

        Images with at least four short captions and no long captions get two long captions from `join_halves`.
        """
        long_sources = self.config.long_caption_sources
        existing = [source for source in long_sources if (self.folder / Source.parse(source).path).exists()]
        excluded = [*self.config.exclude, *self.config.test, *self.config.cra, *existing]
        config = TuneConfig(data=self._resolve_paths(self.config.tune), exclude=self._resolve_paths(excluded), steps=0)
        (items,) = read_tuning_sources(None, [], config, {}, self.log)
        images = [item for item in items if isinstance(item, ImageCaptions)]
        return [dataclasses.replace(image, long=image.long or join_halves(image.short)) for image in images]

    @cached_property
    def text_pairs(self) -> list[Pair]:
        """General text pairs from the configured sources. Default: from WordNet, if it is installed."""
        if self.config.text_pairs:
            sources = self._resolve_paths(self.config.text_pairs)
            return [pair for source in sources for pair in read_text_pairs(source, self.log)]
        return list(read_wordnet(WORDNET)) if (WORDNET / f"data.{PARTS_OF_SPEECH[0]}").exists() else []

    @cached_property
    def cra_captions(self) -> list[tuple[str, ...]]:
        """Captions of each image used to measure caption retrieval accuracy (CRA)."""
        return [record.captions for record in self._read_records(self.config.cra, images=False)]

    @cached_property
    def train_records(self) -> list[Record]:
        """Training images for the `align` stage, excluding test images.

        Every third image gets a long caption, made by joining its short captions, unless it already has one. Doing this
        for all images would double the embedding time.
        """
        tested = [*self.config.test, *self.config.long_caption_sources]
        records = self._read_records(self.config.train)
        records = records.select(records.has_image)
        train = list(records.select(~mask_same_images(self._read_records(tested), records)))
        if len(train) < len(records):
            print_once(f"{len(records) - len(train):,} test images excluded from training")
        for n, record in enumerate(train):
            if n % 3 == 0 and not record.long_captions and len(record.captions) > 1:
                train[n] = dataclasses.replace(record, long_captions=(" ".join(record.captions),))
        return train

    @cached_property
    def caption_test_records(self) -> Sequence[Record]:
        """Test images with their English captions."""
        return self._read_held_out([])["captions"]

    @cached_property
    def foreign_test(self) -> Sequence[Record]:
        """Test images with captions in another language."""
        column = self.config.foreign_column
        if not column:
            raise ValueError("no column with captions in another language: set --reproduce.foreign_column")
        return self._read_held_out([column])[column]

    @cached_property
    def long_caption_tests(self) -> dict[str, list[Record]]:
        """Retrieval tests with long captions, keyed by query length.

        In the first test, each query is the first sentence of a caption. Each subsequent test adds one sentence to
        each query, and the last test uses complete captions.
        """
        records = [record for record in self._read_records(self.config.long_caption_sources) if record.long_captions]
        if not records:
            raise ValueError("no images with long captions: set --reproduce.long_caption_sources")
        sentences = [split_sentences(record.long_captions[0]) for record in records]
        fewest, most = min(map(len, sentences)), max(map(len, sentences))
        tests = {}
        for n in range(1, fewest + 1):
            if n == most:  # all captions have n sentences, so this test would duplicate the last one
                break
            name = "1 sentence" if n == 1 else f"{n} sentences"
            queries = [" ".join(parts[:n]) for parts in sentences]
            tests[name] = [replace_captions(record, (query,)) for record, query in zip(records, queries, strict=True)]
        tests["whole caption"] = [replace_captions(record, (record.long_captions[0],)) for record in records]
        return tests

    def get_test_records(self, name: str) -> Sequence[Record]:
        """Return the records of a test: CAPTIONS_TEST, FOREIGN_TEST or a key of `long_caption_tests`."""
        if name == CAPTIONS_TEST:
            return self.caption_test_records
        if name == FOREIGN_TEST:
            return self.foreign_test
        return self.long_caption_tests[name]

    def _resolve_paths(self, sources: Sequence[str]) -> list[str]:
        return [str(self.folder / source) for source in sources]

    def _read_records(self, sources: Sequence[str], images: bool = True) -> RecordTable:
        return open_table(self._resolve_paths(sources), {}, self.log, "header" if images else "unchecked")

    def _read_held_out(self, fields: list[str]) -> dict[str, RecordTable]:
        config = EvaluateConfig(data=self._resolve_paths(self.config.test), fields=fields)
        return read_splits([], config, {}, self.log).held_out


def join_halves(captions: Sequence[str]) -> tuple[str, ...]:
    """Join each half of an image's captions into a long caption. Return () if there are fewer than four captions."""
    if len(captions) < 4:
        return ()
    middle = len(captions) // 2
    return " ".join(captions[:middle]), " ".join(captions[middle:])


def split_sentences(text: str) -> list[str]:
    """Split a text into sentences at full stops, exclamation marks and question marks."""
    return re.split(r"(?<=[.!?])\s+", text.strip())


def read_wordnet(folder: Path) -> Iterator[Pair]:
    """Yield text pairs from WordNet's data files.

    Each entry yields the pair (words, definition). Entries with an example sentence also yield the pair (sentence, word
    that it illustrates). The line format is `offset file type count word id word id ... | definition; "example"; ...`;
    see the manual page wndb(5WN).
    """
    for part_of_speech in PARTS_OF_SPEECH:
        for line in (folder / f"data.{part_of_speech}").read_text(encoding="latin-1").splitlines():
            if line.startswith(" "):  # lines of the licence text start with a space
                continue
            entry, _, gloss = line.partition("|")
            fields = entry.split()
            num_words = int(fields[3], 16)
            words = [word.split("(")[0].replace("_", " ") for word in fields[4 : 4 + 2 * num_words : 2]]
            definition, _, examples = gloss.strip().partition('; "')
            meaning = definition.strip()
            yield Pair(", ".join(words), meaning, (), "Given a word, find its meaning:")
            if examples:
                first_example = examples.rstrip('"').split('"; "')[0]
                instruction = "Given a sentence, find the word that it is an example of:"
                yield Pair(first_example, f"{words[0]}: {meaning}", (), instruction)
