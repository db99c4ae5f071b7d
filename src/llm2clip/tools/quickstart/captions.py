"""Rule-based English captions for emoji, built from the emoji's names, keywords and subgroups."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Nouns for the subgroups of the Unicode emoji list in which nearly all emoji show the same kind of object. All other
# subgroups are too diverse to be mentioned in captions: for example, the building subgroup contains a rock.
SUBGROUP_NOUNS = {
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
CONSONANT_SOUNDS = ("uni", "one")  # starts of words that begin with a vowel letter but take "a"


def make_keyword_caption(name: str, keywords: Sequence[str], subgroup: str) -> str | None:
    """Return a caption built from the keywords of an emoji, such as "an emoji of a smiling face: eye, mouth".

    Keywords that already occur in the name are omitted. Return None if no keywords remain, or only words for people.
    """
    noun = SUBGROUP_NOUNS.get(subgroup, "")
    words = _select_keywords(f"{name} {noun}", keywords)
    if not words or all(_find_stems(word) <= PERSONS for word in words):
        return None
    if noun and noun not in PERSONS:
        return f"an emoji of {_add_article(noun)}: {', '.join(words)}"
    return f"an emoji of {_join_words(words)}"


def make_drawing_caption(name: str, subgroup: str) -> str:
    """Return a caption such as "a drawing of a grinning face"."""
    return f"a drawing of {_format_name(name, subgroup)}"


def make_long_caption(name: str, keywords: Sequence[str], group: str, subgroup: str) -> str:
    """Return a long caption that contains everything known about an emoji.

    The caption has two sentences, or one if only the name is known.
    """
    drawing = f"A simple colour drawing of {_format_name(name, subgroup)} on a white background."
    noun = SUBGROUP_NOUNS.get(subgroup, "")
    words = [word for word in _select_keywords(f"{name} {noun}", keywords) if not _find_stems(word) <= PERSONS]
    facts = []
    if noun and not _find_stems(noun) <= _find_stems(name):
        facts.append(f"is {_add_article(noun)}")
    if words:
        facts.append(f"stands for {_join_words(words)}")
    if group:
        facts.append(f"is one of the emoji for {group}")
    return f"{drawing} It {_join_words(facts)}." if facts else drawing


def _select_keywords(text: str, keywords: Sequence[str]) -> list[str]:
    """Return the keywords that do not occur in a text.

    Words such as "man" and "woman" are always included, because they distinguish variants of the same emoji.
    """
    stems = _find_stems(text)
    additional = []
    for keyword in keywords:
        is_new = keyword in PERSONS or not _find_stems(keyword) <= stems
        num_letters = sum(char.isalpha() for char in keyword)
        if is_new and num_letters > 1:
            additional.append(keyword)
    return additional


def _find_stems(text: str) -> set[str]:
    """Return the words of a text. A simple rule converts plurals to singulars."""
    stems = set()
    for word in _split_words(text):
        is_plural = len(word) > 3 and word.endswith("s") and not word.endswith("ss")
        stems.add(word[:-1] if is_plural else word)
    return stems


def _split_words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _join_words(words: Sequence[str]) -> str:
    """Join words into a list such as "a, b and c"."""
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else "".join(words)


def _format_name(name: str, subgroup: str) -> str:
    """Return a name, with an article if it is a countable noun, as in "a dog".

    Only names in the subgroups of SUBGROUP_NOUNS get an article; "ping pong" and "foggy", for example, do not.
    """
    return _add_article(name) if subgroup in SUBGROUP_NOUNS else name


def _add_article(name: str) -> str:
    """Return a name as a noun phrase, such as "an apple" or "a unicorn".

    Plurals, such as "grapes" and "men wrestling", do not get an article.
    """
    first_word = (_split_words(name) or [""])[0]
    head_noun = (_split_words(re.split(" with | of | in | on ", name)[0]) or [""])[-1]
    is_plural = head_noun.endswith("s") and not head_noun.endswith(("ss", "us", "is"))
    if is_plural or first_word in {"men", "women", "people"}:
        return name
    starts_with_vowel = first_word.startswith(tuple("aeiou")) and not first_word.startswith(CONSONANT_SOUNDS)
    return f"{'an' if starts_with_vowel else 'a'} {name}"
