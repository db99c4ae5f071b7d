"""Training conversations from files in LLaVA's format and from captioned images.

Captioned images are turned into two kinds of conversations: captioning, and yes-or-no questions about objects. The
questions follow POPE (arXiv 2305.10355) with random sampling. POPE asks about objects marked by annotators. Here, an
object counts as present if any of the image's captions mentions it, and as absent otherwise. Captions mention most
salient objects but not everything in the image, so the answer "No" is sometimes wrong.
"""

import random
import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from llm2clip.data.build_table import open_table
from llm2clip.data.formats import find_format
from llm2clip.data.formats.base import BadRow, read_rows
from llm2clip.data.image_refs import FileImage, is_safe_relative_path
from llm2clip.data.records import Record
from llm2clip.data.skip_log import SkipLog
from llm2clip.llava.dataset import Conversation, clean_text

# These prompts are part of the training data: changing them changes the results.
SHORT_CAPTION_PROMPTS = (
    "Describe the picture in one sentence.",
    "What does the picture show, in one sentence?",
    "Give a short caption for this picture.",
    "Say in one sentence what is in the picture.",
)
LONG_CAPTION_PROMPTS = (
    "Describe the picture in detail.",
    "What can be seen in the picture? Go into detail.",
    "Give a long description of this picture.",
    "Write a paragraph about what the picture shows.",
)
# Appended to the first question of a conversation with short answers, as in LLaVA-1.5 and benchmarks.
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."

OBJECTS_FILE = Path(__file__).with_name("objects.txt")
UNCOUNTABLE = ("snow",)
OBJECTS_PER_IMAGE = 3  # maximum number of present objects per image, and of absent objects (k in POPE)


def read_conversations(
    sources: Sequence[str],
    from_records: Callable[[Sequence[Record], int], list[Conversation]],
    *,
    images: str | Path | None = None,
    columns: dict[str, str] | None = None,
    log: SkipLog,
    seed: int = 0,
) -> list[Conversation]:
    """Read conversations from files in LLaVA's format and from captioned images.

    Args:
        sources: paths of files or folders. Formats are detected automatically.
        from_records: `make_captioning_conversations` or `make_instruction_conversations`, for captioned images.
        images: image folder for files in LLaVA's format. See `read_llava`.
        columns: mapping from record fields to column names, for captioned images.
    """
    conversations: list[Conversation] = []
    for source in sources:
        if is_llava_file(source):
            conversations += read_llava(source, images, log)
        else:
            # Merge rows with the same image, because an object is present if any of the rows mentions it.
            conversations += from_records(open_table([source], columns or {}, log), seed)
    return conversations


def is_llava_file(name: str) -> bool:
    """Return True if `name` is a JSON or JSONL file in LLaVA's format."""
    path = Path(name)
    if path.suffix not in (".json", ".jsonl") or not path.is_file():
        return False
    with path.open("rb") as file:
        return b'"conversations"' in file.read(1 << 16)


def read_llava(file: str | Path, images: str | Path | None, log: SkipLog) -> list[Conversation]:
    """Read a file in LLaVA's format, such as blip_laion_cc_sbu_558k.json or llava_v1_5_mix665k.json.

    Each row is {"id", "image", "conversations": [{"from": "human", "value"}, {"from": "gpt", "value"}, ...]}, where
    `image` is optional. A .json file contains a list of rows, and a .jsonl file contains one row per line. Invalid rows
    and rows whose image file is missing are skipped and logged.

    Args:
        images: folder to which image paths are relative. Default: the folder that contains the file.

    Raises:
        ValueError: a .json file does not contain a list.
        TooManySkipped: too many rows were skipped.
    """
    file = Path(file)
    root = Path(images) if images is not None else file.parent
    conversations = []
    for _, number, row in read_rows(find_format(str(file))):
        log.count_rows(1)
        if isinstance(row, BadRow):
            log.skip(str(file), number, "no conversation", row.value)
            continue
        try:
            conversations.append(_parse_conversation(row, root, str(number)))
        except FileNotFoundError as error:
            log.skip(str(file), number, "no image", error)
        except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
            log.skip(str(file), number, "no conversation", error)
    log.check()
    return conversations


def _parse_conversation(row: dict[str, Any], root: Path, number: str) -> Conversation:
    """Convert a row in LLaVA's format to a conversation.

    Raises:
        FileNotFoundError: the image file is missing.
        AttributeError, KeyError, TypeError, ValueError: the row is invalid.
    """
    messages = row["conversations"]
    if messages and messages[0]["from"] != "human":
        messages = messages[1:]  # as in LLaVA's code, drop the first message if it is not from the user
    speakers = [message["from"] for message in messages]
    if not speakers or speakers != ["human", "gpt"] * (len(speakers) // 2):
        raise ValueError("messages must alternate between 'human' and 'gpt', starting with 'human'")
    texts = [clean_text(message["value"]) for message in messages]
    if not all(texts[1::2]):
        raise ValueError("an answer is empty")
    image = None
    if row.get("image"):
        if not is_safe_relative_path(row["image"]):
            raise ValueError(f"{row['image']} is outside {root}")
        path = root / row["image"]
        if not path.is_file():
            raise FileNotFoundError(str(path))
        image = FileImage(str(path))
    turns = tuple(zip(texts[::2], texts[1::2], strict=True))
    return Conversation(str(row.get("id", number)), image, turns)


# ---- captioned images -----------------------------------------------------------------------------------------------


def make_captioning_conversations(records: Iterable[Record], seed: int = 0) -> list[Conversation]:
    """Make one conversation per caption: a random captioning prompt, and the caption as the answer."""
    rng = random.Random(seed)
    conversations = []
    for record in records:
        if record.image is None:
            continue
        for caption in (*record.captions, *record.short_captions):
            turn = (rng.choice(SHORT_CAPTION_PROMPTS), caption)
            conversations.append(Conversation(record.id, record.image, (turn,)))
        for caption in record.long_captions:
            turn = (rng.choice(LONG_CAPTION_PROMPTS), caption)
            conversations.append(Conversation(record.id, record.image, (turn,)))
    return conversations


def make_instruction_conversations(records: Sequence[Record], seed: int = 0) -> list[Conversation]:
    """Make captioning conversations, and one conversation per image with yes-or-no questions about objects."""
    return make_captioning_conversations(records, seed) + make_object_conversations(records, seed)


def make_object_conversations(
    records: Sequence[Record], seed: int = 0, objects_file: Path = OBJECTS_FILE
) -> list[Conversation]:
    """Make one conversation per image with yes-or-no questions about objects. Half of the answers are "Yes".

    Records that have no image or whose captions mention no objects are ignored.
    """
    names = read_objects(objects_file)
    objects_in_images = []  # (record, its objects) for each image whose captions mention objects
    for record in records:
        objects = sorted(find_mentioned_objects(record.texts, names))
        if record.image is not None and objects:
            objects_in_images.append((record, objects))
    all_objects = {name for _, objects in objects_in_images for name in objects}
    questions = []  # (record, its questions and answers)
    rng = random.Random(seed)
    for record, present in objects_in_images:
        absent = sorted(all_objects - set(present))
        rng.shuffle(absent)
        count = min(OBJECTS_PER_IMAGE, len(present), len(absent))
        turns = []
        for present_object, absent_object in zip(rng.sample(present, count), absent, strict=False):
            turns += [(_format_question(present_object), "Yes"), (_format_question(absent_object), "No")]
        if turns:
            questions.append((record, turns))
    rng = random.Random(seed)
    conversations = []
    for record, turns in questions:
        rng.shuffle(turns)
        first_question, first_answer = turns[0]
        turns[0] = (first_question + SHORT_ANSWER, first_answer)
        conversations.append(Conversation(record.id, record.image, tuple(turns)))
    return conversations


def find_mentioned_objects(texts: Iterable[str], names: dict[str, str]) -> set[str]:
    """Return the objects mentioned in the texts. Longer names match first, so "hot dog" does not count as a dog.

    `names` maps names to objects, as returned by `read_objects`.
    """
    pattern = _compile_name_pattern(tuple(names))
    return {names[match.lower()] for text in texts for match in pattern.findall(text)}


@lru_cache
def read_objects(file: Path) -> dict[str, str]:
    """Read a list of objects and synonyms. Return a dict that maps each singular or plural name to its object.

    Each line is `object` or `object: synonym, synonym`. Text after # is a comment. Plurals follow from spelling rules.

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
            for form in (name, _pluralize(name)):
                if names.setdefault(form, object_name) != object_name:
                    raise ValueError(f"{file}: {form!r} is a name for both {names[form]!r} and {object_name!r}")
    return names


@lru_cache
def _compile_name_pattern(names: Sequence[str]) -> re.Pattern[str]:
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)", re.IGNORECASE)


def _pluralize(word: str) -> str:
    if re.search(r"(s|x|z|ch|sh)$", word):
        return word + "es"
    return word[:-1] + "ies" if re.search(r"[^aeiou]y$", word) else word + "s"


def _format_question(name: str) -> str:
    if name in UNCOUNTABLE:
        return f"Is there {name} in the image?"
    article = "an" if name[0] in "aeiou" else "a"
    return f"Is there {article} {name} in the image?"
