"""POPE questions (arXiv 2305.10355) made from captions: yes-or-no questions that ask if an object is in the image.

The original POPE asks about objects marked by annotators, in images with at least three such objects. Here, an object
counts as present if any caption of the image names it, and as absent otherwise. Captions name most of the salient
objects but not everything in the image, so the answer "no" is sometimes wrong. This affects all models equally.

There are three strategies for sampling absent objects:

    random        absent objects sampled uniformly
    popular       the absent objects that captions in the data set name most often
    adversarial   the absent objects that most often co-occur with the present object of the previous question
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from pathlib import Path

from llm2clip.data.image_refs import ImageRef
from llm2clip.data.records import Record

OBJECTS_FILE = Path(__file__).with_name("objects.txt")
UNCOUNTABLE = ("snow",)
OBJECTS_PER_IMAGE = 3  # maximum number of present objects per image, and of absent objects per image (the paper's k)


class Sampling(StrEnum):
    """Strategy for sampling absent objects. See the module docstring."""

    RANDOM = "random"
    POPULAR = "popular"
    ADVERSARIAL = "adversarial"


@dataclass(frozen=True, slots=True)
class PopeQuestion:
    """A question about an object in an image. `record` is the index of the image's record. `answer` is yes or no."""

    record: int
    image: ImageRef
    object: str
    text: str
    answer: str


def make_questions(
    records: Iterable[Record],
    sampling: Sampling,
    per_image: int = OBJECTS_PER_IMAGE,
    seed: int = 0,
    objects_file: Path = OBJECTS_FILE,
) -> list[PopeQuestion]:
    """Make equal numbers of questions with the answers yes and no for each image.

    Args:
        records: captioned images. Records without an image, or whose captions do not name any object, are ignored.
        sampling: strategy for sampling absent objects.
        per_image: maximum number of present objects, and of absent objects, per image.
        seed: random seed.
        objects_file: file with objects and their synonyms. See `read_objects`.
    """
    names = read_objects(objects_file)
    present_objects: dict[int, list[str]] = {}  # by record index
    images: dict[int, ImageRef] = {}
    for number, record in enumerate(records):
        if record.image is None:
            continue
        present = sorted(mentioned_objects(record.texts, names))
        if present:
            present_objects[number] = present
            images[number] = record.image
    frequency, co_occurrence = _count_objects(present_objects.values())
    rng = random.Random(seed)
    questions = []
    for number, present in present_objects.items():
        absent = sorted(set(frequency) - set(present))
        rng.shuffle(absent)
        for present_object in rng.sample(present, min(per_image, len(present), len(absent))):
            # Sorting is stable, so ties keep their shuffled order. The random strategy does not sort.
            if sampling is Sampling.POPULAR:
                absent.sort(key=frequency.__getitem__, reverse=True)
            elif sampling is Sampling.ADVERSARIAL:
                absent.sort(key=co_occurrence[present_object].__getitem__, reverse=True)
            absent_object = absent.pop(0)
            for name, answer in ((present_object, "yes"), (absent_object, "no")):
                questions.append(PopeQuestion(number, images[number], name, _question_text(name), answer))
    return questions


def mentioned_objects(texts: Iterable[str], names: dict[str, str]) -> set[str]:
    """Return the objects mentioned in the texts. Longer names match first, so that "hot dog" does not count as a dog.

    Args:
        texts: captions of one image.
        names: mapping from names to objects, as returned by `read_objects`.
    """
    pattern = _name_pattern(tuple(names))
    return {names[match.lower()] for text in texts for match in pattern.findall(text)}


@lru_cache
def read_objects(file: Path) -> dict[str, str]:
    """Read objects and their synonyms. Return a dict that maps every name, singular or plural, to its object.

    Each line is `object` or `object: synonym, synonym`; # starts a comment. Plurals are formed by rules.

    Raises:
        ValueError: two objects share a name.
    """
    names: dict[str, str] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        line = line.partition("#")[0].strip()
        if not line:
            continue
        object_name, _, synonyms = line.partition(":")
        object_name = object_name.strip()
        for name in (object_name, *synonyms.split(",")):
            name = " ".join(name.lower().split())
            if not name:
                continue
            for form in (name, _plural(name)):
                if names.setdefault(form, object_name) != object_name:
                    raise ValueError(f"{file}: {form!r} is a name for both {names[form]!r} and {object_name!r}")
    return names


def _count_objects(objects_per_image: Iterable[list[str]]) -> tuple[Counter[str], dict[str, Counter[str]]]:
    """Count the images that contain each object, and the images that contain both objects of each pair."""
    frequency: Counter[str] = Counter()
    co_occurrence: dict[str, Counter[str]] = {}
    for objects in objects_per_image:
        frequency.update(objects)
        for name in objects:
            co_occurrence.setdefault(name, Counter()).update(other for other in objects if other != name)
    return frequency, co_occurrence


@lru_cache
def _name_pattern(names: Sequence[str]) -> re.Pattern[str]:
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)", re.IGNORECASE)


def _plural(word: str) -> str:
    if re.search(r"(s|x|z|ch|sh)$", word):
        return word + "es"
    return word[:-1] + "ies" if re.search(r"[^aeiou]y$", word) else word + "s"


def _question_text(name: str) -> str:
    if name in UNCOUNTABLE:
        return f"Is there {name} in the image?"
    article = "an" if name[0] in "aeiou" else "a"
    return f"Is there {article} {name} in the image?"
