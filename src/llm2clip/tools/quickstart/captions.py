"""English for an emoji, made by rule from its name, keywords and kind."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["describe", "kind", "long_caption", "plain_name"]

# The subgroups of the Unicode emoji list whose members are (but for a feather or two) one thing that a noun says. The
# others mix (a rock is filed under buildings, a chart under the office), so nothing is said of their kind.
KINDS = {
    "face-smiling": "smiling face", "face-affection": "affectionate face", "face-tongue": "face with its tongue out",
    "face-hand": "face with a hand", "face-neutral-skeptical": "neutral or skeptical face",
    "face-sleepy": "sleepy face", "face-unwell": "unwell face", "face-hat": "face with a hat",
    "face-glasses": "face with glasses",
    "face-concerned": "concerned face", "face-negative": "angry face", "cat-face": "cat face",
    "monkey-face": "monkey face", "heart": "heart", "hand-fingers-open": "hand", "hand-fingers-partial": "hand",
    "hand-single-finger": "pointing hand", "hand-fingers-closed": "closed hand", "hands": "pair of hands",
    "person": "person", "person-gesture": "person", "person-role": "person", "person-fantasy": "person",
    "person-activity": "person", "person-sport": "person", "person-resting": "person", "body-parts": "part of the body",
    "animal-mammal": "mammal", "animal-bird": "bird", "animal-amphibian": "amphibian", "animal-reptile": "reptile",
    "animal-marine": "sea animal", "animal-bug": "bug", "plant-flower": "flower", "plant-other": "plant",
    "food-fruit": "fruit", "food-vegetable": "vegetable", "food-prepared": "dish", "food-asian": "Asian dish",
    "food-sweet": "sweet", "drink": "drink", "place-religious": "place of worship", "award-medal": "award",
    "transport-water": "boat or ship", "clothing": "piece of clothing", "musical-instrument": "musical instrument",
    "religion": "religious symbol", "zodiac": "zodiac sign", "arrow": "arrow", "geometric": "geometric shape",
    "tool": "tool", "lock": "lock or key",
}  # fmt: skip
PERSONS = {"man", "woman", "person", "boy", "girl", "men", "women", "people", "adult"}
SOUNDS_LIKE_A = ("uni", "use", "eur", "one", "ufo", "uk")  # a vowel in writing only
SOUNDS_LIKE_AN = ("hour", "sos")


def plain_name(name: str) -> str:
    """A name of the package `emoji`, such as `:grinning_face:`, as people write it."""
    return " ".join(name.strip(":").replace("_", " ").split())


def kind(subgroup: str) -> str:
    """A noun for a subgroup, such as "smiling face" for "face-smiling"; empty where none is true of all members."""
    return KINDS.get(subgroup, "")


def describe(name: str, keywords: Sequence[str], subgroup: str) -> tuple[str | None, str]:
    """Two wordings that are not the name: by keywords that the name lacks (None if too few), and one of the picture.

    ("an emoji of a smiling face: eye, mouth, open", "a drawing of a grinning face")
    """
    noun = kind(subgroup)
    words = _beyond(f"{name} {noun}", keywords)
    of_picture = f"a drawing of {_named(name, noun)}"
    if not words or all(_stems(word) <= PERSONS for word in words):
        return None, of_picture
    if noun and noun not in PERSONS:
        return f"an emoji of {_with_article(noun)}: {', '.join(words)}", of_picture
    return f"an emoji of {_listed(words)}", of_picture


def long_caption(name: str, keywords: Sequence[str], group: str, subgroup: str) -> str:
    """Two sentences with all that is known, or one where that is little."""
    noun = kind(subgroup)
    words = [word for word in _beyond(f"{name} {noun}", keywords) if not _stems(word) <= PERSONS]
    what = f"it is {_with_article(noun)}" if noun and not _stems(noun) <= _stems(name) else ""
    meant = f"it stands for {_listed(words)}" if words else ""
    filed = f"it is one of the emoji for {group}" if group else ""
    facts = [fact for fact in (what, meant, filed) if fact]
    if len(facts) > 1:
        facts = [facts[0], *(fact.removeprefix("it ") for fact in facts[1:])]
    rest = " and ".join([", ".join(facts[:-1]), facts[-1]] if len(facts) > 1 else facts)
    first = f"A simple colour drawing of {_named(name, noun)} on a white background."
    return f"{first} {rest[0].upper()}{rest[1:]}." if rest else first


def _beyond(name: str, keywords: Sequence[str]) -> list[str]:
    """The keywords that add a word to the name. Man, woman and so on may repeat it: they tell variants apart."""
    known = _stems(name)
    told = (word for word in keywords if word in PERSONS or not _stems(word) <= known)
    return [word for word in told if sum(map(str.isalpha, word)) > 1]


def _stems(text: str) -> set[str]:
    """Its words, plurals made singular well enough to compare."""
    return {w[:-1] if len(w) > 3 and w.endswith("s") and not w.endswith("ss") else w for w in _words(text)}


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _listed(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else "".join(words)


def _named(name: str, noun: str) -> str:
    """With an article where the name is surely that of a thing: "a dog", but "ping pong", "foggy"."""
    return _with_article(name) if noun else name


def _with_article(name: str) -> str:
    """An article where there should be one: "an apple", "a unicorn", "grapes", "men wrestling"."""
    first = (_words(name) or [""])[0]
    head = (_words(re.split(r" with | of | in | on |:", name)[0]) or [""])[-1]
    plural = head.endswith("s") and not head.endswith(("ss", "us", "is"))
    if plural or first in {"men", "women", "people"}:
        return name
    if first.startswith(SOUNDS_LIKE_AN):
        return f"an {name}"
    vowel = first.startswith(tuple("aeiou")) and not first.startswith(SOUNDS_LIKE_A)
    return f"{'an' if vowel else 'a'} {name}"
