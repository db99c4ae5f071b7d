"""Yes-or-no questions about what a picture shows, from its captions: POPE (arXiv 2305.10355) of any captioned set.

POPE asks about objects that annotators marked in pictures with three or more. Here an object is there if a caption of
the picture names it, and absent if none does: five captions name most of what stands out, and not all of what is there,
so a "no" is sometimes wrong, for every model alike.

    random        absent objects as they come
    popular       the absent objects that are named most often in the whole set
    adversarial   the absent objects that are named most often together with the one just asked about
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

OBJECTS = Path(__file__).with_name("objects.txt")
UNCOUNTED = ("snow",)
EACH = 3  # objects of a picture that are asked about, and as many that are absent: the paper's k


class Sampling(StrEnum):
    """Which absent objects are asked about."""

    RANDOM = "random"
    POPULAR = "popular"
    ADVERSARIAL = "adversarial"


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a picture; `answer` is yes or no, `record` the number of the picture's record."""

    record: int
    image: ImageRef
    object: str
    text: str
    answer: str


def make_questions(
    records: Iterable[Record], sampling: Sampling, each: int = EACH, seed: int = 0, objects: Path = OBJECTS
) -> list[Question]:
    """As many questions with yes as with no, picture after picture.

    Args:
        records: with images and captions; those whose captions name none of the objects are left out.
        sampling: of the absent objects.
        each: objects of a picture, at most, and as many absent ones.
        seed: of the choices.
        objects: a file with an object a line and what else it is called: see `objects.txt` beside this file.
    """
    names = read_objects(objects)
    shown = [(n, r, sorted(mentioned_objects(r.texts, names))) for n, r in enumerate(records) if r.image is not None]
    shown = [(n, record, found) for n, record, found in shown if found]
    often: Counter[str] = Counter(name for *_, found in shown for name in found)
    beside: dict[str, Counter[str]] = {name: Counter() for name in often}
    for *_, found in shown:
        for name in found:
            beside[name].update(other for other in found if other != name)
    rng, questions = random.Random(seed), []
    for number, record, found in shown:
        assert record.image is not None
        absent = sorted(set(often) - set(found))
        rng.shuffle(absent)
        for yes in rng.sample(found, min(each, len(found), len(absent))):
            rank = {Sampling.RANDOM: Counter[str](), Sampling.POPULAR: often}.get(sampling, beside[yes])
            absent.sort(key=lambda name, rank=rank: -rank[name])  # type: ignore[misc]
            no = absent.pop(0)
            questions.append(Question(number, record.image, yes, _question(yes), "yes"))
            questions.append(Question(number, record.image, no, _question(no), "no"))
    return questions


def mentioned_objects(texts: Iterable[str], names: dict[str, str]) -> set[str]:
    """The objects that some texts name: the longest names first, so that a hot dog is no dog."""
    pattern = _pattern(tuple(names))
    return {names[found.lower()] for text in texts for found in pattern.findall(text)}


@lru_cache
def _pattern(names: Sequence[str]) -> re.Pattern[str]:
    longest = sorted(names, key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest))})(?!\w)", re.IGNORECASE)


@lru_cache
def read_objects(file: Path) -> dict[str, str]:
    """What objects are called to the object, from lines of `object: other, names`; # begins a comment. Plurals are
    added by rule.

    Raises:
        ValueError: two objects go by one name.
    """
    found: dict[str, str] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        line = line.partition("#")[0].strip()
        if not line:
            continue
        name, _, others = line.partition(":")
        for one in [name, *others.split(",")]:
            one = " ".join(one.lower().split())
            for form in (one, _plural(one)) if one else ():
                if found.setdefault(form, name.strip()) != name.strip():
                    raise ValueError(f"{file}: {form!r} is both {found[form]!r} and {name.strip()!r}")
    return found


def _plural(word: str) -> str:
    if re.search(r"(s|x|z|ch|sh)$", word):
        return word + "es"
    return word[:-1] + "ies" if re.search(r"[^aeiou]y$", word) else word + "s"


def _question(name: str) -> str:
    if name in UNCOUNTED:
        return f"Is there {name} in the image?"
    return f"Is there {'an' if name[0] in 'aeiou' else 'a'} {name} in the image?"
