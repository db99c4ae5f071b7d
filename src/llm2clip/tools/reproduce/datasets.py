"""What the claims are tested with: captions to tune on, general text pairs, images to align with and to retrieve."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

from llm2clip.config import EvaluateConfig, ReproduceConfig, TuneConfig
from llm2clip.data.merged_records import read_merged_records
from llm2clip.data.pairs import ImageCaptions, Pair
from llm2clip.data.records import Record, Source
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.splits import read_splits, with_captions
from llm2clip.data.text_pairs import read_text_pairs
from llm2clip.data.tuning_sources import read_tuning_sources
from llm2clip.distributed import print_once

WORDNET = Path("/usr/share/wordnet")
PARTS = ("noun", "verb", "adj", "adv")


class ClaimData:
    """The data of the claims, each part read when it is first asked for.

    Raises:
        ValueError: on reading a part whose sources are not there.
    """

    def __init__(self, folder: Path, config: ReproduceConfig, log: SkipLog) -> None:
        self.folder, self.config, self.log = folder, config, log

    def _read(self, sources: Sequence[str], images: bool = True) -> list[Record]:
        found = read_merged_records(
            [str(self.folder / s) for s in sources], {}, self.log, "header" if images else "unchecked"
        )
        return [record for _, record in found]

    @cached_property
    def tune(self) -> list[ImageCaptions]:
        """Captions by image, and two long ones of each that has four: its first captions joined, and its last."""
        sources = [str(self.folder / s) for s in self.config.tune]
        dense = [s for s in self.config.long_caption_sources if (self.folder / Source.parse(s).path).exists()]
        excluded = [str(self.folder / s) for s in [*self.config.exclude, *self.config.test, *self.config.cra, *dense]]
        (items,) = read_tuning_sources([], [], TuneConfig(data=sources, exclude=excluded, steps=0), {}, self.log)
        return [
            dataclasses.replace(i, long=i.long or split_in_two(i.short)) for i in items if isinstance(i, ImageCaptions)
        ]

    @cached_property
    def pairs(self) -> list[Pair]:
        """General text pairs, of no pictures; none where there are none."""
        if self.config.text_pairs:
            return [pair for s in self.config.text_pairs for pair in read_text_pairs(str(self.folder / s), self.log)]
        return list(glosses(WORDNET)) if (WORDNET / f"data.{PARTS[0]}").exists() else []

    @cached_property
    def cra(self) -> list[tuple[str, ...]]:
        """The captions of each image, for caption retrieval."""
        return [r.captions for r in self._read(self.config.cra, images=False)]

    @cached_property
    def train(self) -> list[Record]:
        """Images to align with, none of them tested on; of every third the captions joined are its long caption, where
        it has no other: of all would be half of the time that embedding takes."""
        tested = {
            r.image.key
            for r in self._read([*self.config.test, *self.config.long_caption_sources])
            if r.image is not None
        }
        found = [r for r in self._read(self.config.train) if r.image is not None]
        kept = [r for r in found if r.image is not None and r.image.key not in tested]
        if len(kept) < len(found):
            print_once(f"{len(found) - len(kept):,} images left out of training since they are tested on")
        return [
            dataclasses.replace(r, long_captions=r.long_captions or (join_sentences(r.captions) if n % 3 == 0 else ()))
            for n, r in enumerate(kept)
        ]

    @cached_property
    def short(self) -> list[Record]:
        """Images to retrieve by their captions."""
        return self._held_out([])["captions"]

    @cached_property
    def foreign(self) -> list[Record]:
        """The same images by captions in another language.

        Raises:
            ValueError: there is no such column, or none is named.
        """
        if not self.config.foreign_column:
            raise ValueError("no column of captions in another language is named: --reproduce.foreign_column")
        return self._held_out([self.config.foreign_column])[self.config.foreign_column]

    @cached_property
    def dense(self) -> dict[str, list[Record]]:
        """Images with a long caption, by how much of it is the query, from the first sentence to the whole.

        Raises:
            ValueError: there are none.
        """
        parts = [
            (r, sentences(r.long_captions[0])) for r in self._read(self.config.long_caption_sources) if r.long_captions
        ]
        if not parts:
            raise ValueError("no images with long captions: name some with --reproduce.long_caption_sources")
        tests = {
            f"{n} sentence{'s' if n > 1 else ''}": [with_captions(r, (" ".join(some[:n]),)) for r, some in parts]
            for n in range(1, 1 + min(len(some) for _, some in parts))
            if any(len(some) > n for _, some in parts)  # else it is the whole
        }
        return {**tests, "whole": [with_captions(r, (r.long_captions[0],)) for r, _ in parts]}

    def test(self, name: str) -> list[Record]:
        """Images to retrieve: `captions`, `foreign`, or a name in `dense`."""
        return self.short if name == "captions" else self.foreign if name == "foreign" else self.dense[name]

    def _held_out(self, fields: list[str]) -> dict[str, list[Record]]:
        sources = [str(self.folder / s) for s in self.config.test]
        return read_splits([], EvaluateConfig(data=sources, fields=fields), {}, self.log).held_out


def split_in_two(captions: Sequence[str]) -> tuple[str, ...]:
    """Two long texts of one image without a caption in common; none of fewer than four captions."""
    middle = len(captions) // 2
    return (" ".join(captions[:middle]), " ".join(captions[middle:])) if len(captions) > 3 else ()


def join_sentences(captions: Sequence[str]) -> tuple[str, ...]:
    """All captions of an image as one, if there are several."""
    return (" ".join(captions),) if len(captions) > 1 else ()


def sentences(text: str) -> list[str]:
    """The sentences of a text, by their full stops."""
    return re.split(r"(?<=[.!?])\s+", text.strip())


def glosses(folder: Path) -> Iterator[Pair]:
    """Pairs from WordNet's data files: a word or a sentence that uses it, and what it means.

    A line is "offset file type count word id word id ... | definition; "example"; ..." (wndb(5WN)).
    """
    for part in PARTS:
        for line in (folder / f"data.{part}").read_text(encoding="latin-1").splitlines():
            if line.startswith(" "):  # the licence
                continue
            head, _, gloss = line.partition("|")
            fields = head.split()
            words = [word.split("(")[0].replace("_", " ") for word in fields[4 : 4 + 2 * int(fields[3], 16) : 2]]
            definition, _, example = gloss.strip().partition('; "')
            meaning = definition.strip()
            yield Pair(", ".join(words), meaning, (), "Given a word, find its meaning:")
            if example:
                instruction = "Given a sentence, find the word that it is an example of:"
                yield Pair(example.rstrip('"').split('"; "')[0], f"{words[0]}: {meaning}", (), instruction)
