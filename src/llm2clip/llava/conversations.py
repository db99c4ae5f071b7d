"""Training conversations from files in LLaVA's format and from captioned images, and chat templates.

Captioned images are converted to captioning conversations, and to conversations with yes-or-no questions about objects,
as in POPE (arXiv 2305.10355) with random sampling. An object is considered present if any caption of the image mentions
the object, and absent otherwise. Because captions are incomplete, the answer "No" is sometimes wrong.

If the LLM has no chat template, Vicuna's template is used, as in LLaVA-1.5. A Jinja prefix extends templates to
messages with images: it converts lists of text and images to text with `<image>` tokens.
"""

import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from llm2clip.data.build_table import build_record_table
from llm2clip.data.formats import BadRow, build_file_part, read_rows
from llm2clip.data.image_refs import FileImage, ImageRef, is_safe_relative_path
from llm2clip.data.records import Record
from llm2clip.data.skip_log import SkipLog
from llm2clip.io_utils import DataFormatError

IMAGE_TOKEN = "<image>"
IGNORE_INDEX = -100  # label of tokens that are ignored by the loss, as in cross_entropy
PLACEHOLDER_MARKS = ("\ue000", "\ue001")  # delimiters of answer placeholders (see `tokenize_and_label`)
# Changes to the prompts affect training results.
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
# Appended to the first question of a conversation with short answers, as in LLaVA-1.5 and in benchmarks.
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."

OBJECTS_FILE = Path(__file__).with_name("objects.txt")
UNCOUNTABLE = ("snow",)
OBJECTS_PER_IMAGE = 3  # maximum number of present objects and of absent objects per image (k in POPE)

_FLATTEN_CONTENT = Path(__file__).with_name("flatten_content.jinja").read_text(encoding="utf-8")
_VICUNA_TEMPLATE = Path(__file__).with_name("vicuna.jinja").read_text(encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Conversation:
    """Pairs of questions and answers, optionally about an image, which precedes the first question."""

    id: str
    image: ImageRef | None
    turns: tuple[tuple[str, str], ...]


class LabelledTokens(NamedTuple):
    """Token ids and labels of a conversation. The label of a token is its id in answers, and IGNORE_INDEX elsewhere."""

    ids: list[int]
    labels: list[int]


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
        from_records: Function that converts captioned images to conversations: `make_captioning_conversations` or
            `make_instruction_conversations`.
        images: Folder with the images for files in LLaVA's format. See `read_llava_file`.
        columns: Column names in sources of captioned images, keyed by record field.
    """
    conversations: list[Conversation] = []
    for source in sources:
        if is_llava_file(source):
            conversations += read_llava_file(source, images, log)
        else:
            # Rows with the same image are merged, because each row can mention different objects.
            try:
                records = build_record_table([source], columns or {}, log)
            except DataFormatError as error:
                fields = 'image and conversations: [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]'
                raise DataFormatError(f"{error}. A file in LLaVA's format must have the fields {fields}") from error
            conversations += from_records(records, seed)
    return conversations


def is_llava_file(name: str) -> bool:
    """Return True if `name` is a JSON or JSONL file in LLaVA's format."""
    path = Path(name)
    if path.suffix not in (".json", ".jsonl") or not path.is_file():
        return False
    with path.open("rb") as file:
        return b'"conversations"' in file.read(1 << 16)


def read_llava_file(file: str | Path, images: str | Path | None, log: SkipLog) -> list[Conversation]:
    """Read a file in LLaVA's format, such as blip_laion_cc_sbu_558k.json or llava_v1_5_mix665k.json.

    Each row is {"id", "image", "conversations": [{"from": "human", "value"}, {"from": "gpt", "value"}, ...]}. "image"
    is optional. It is relative to the folder `images` or, by default, to the folder of the file. Invalid rows, and rows
    whose image file does not exist, are skipped and logged.

    Raises:
        ValueError: A .json file does not contain a JSON list.
        TooManySkippedError: Too many rows were skipped.
    """
    file = Path(file)
    root = Path(images) if images is not None else file.parent
    conversations = []
    for _, number, row in read_rows(build_file_part(str(file))):
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
    messages = row["conversations"]
    if messages and messages[0]["from"] != "human":
        messages = messages[1:]  # LLaVA's code also drops a first message that is not from the user
    speakers = [message["from"] for message in messages]
    if not speakers or speakers != ["human", "gpt"] * (len(speakers) // 2):
        raise ValueError("messages must alternate between 'human' and 'gpt', starting with 'human'")
    texts = [clean_conversation_text(message["value"]) for message in messages]
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
    """Make one conversation per caption. The question is a random captioning prompt, and the caption is the answer."""
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
    """Make captioning conversations, and conversations with yes-or-no questions about objects."""
    return make_captioning_conversations(records, seed) + make_object_conversations(records, seed)


def make_object_conversations(
    records: Sequence[Record], seed: int = 0, objects_file: Path = OBJECTS_FILE
) -> list[Conversation]:
    """Make one conversation per image, with yes-or-no questions about objects. Half of the answers are "Yes".

    Records that have no image, or whose captions mention no objects, are ignored.
    """
    names = read_object_synonyms(objects_file)
    objects_in_images = []  # (record, objects mentioned in its captions)
    for record in records:
        objects = sorted(find_mentioned_objects(record.texts, names))
        if record.image is not None and objects:
            objects_in_images.append((record, objects))
    all_objects = {name for _, objects in objects_in_images for name in objects}
    rng, order_rng = random.Random(seed), random.Random(seed)
    conversations = []
    for record, present in objects_in_images:
        absent = sorted(all_objects - set(present))
        rng.shuffle(absent)
        count = min(OBJECTS_PER_IMAGE, len(present), len(absent))
        turns = []
        for present_object, absent_object in zip(rng.sample(present, count), absent, strict=False):
            turns.append((_make_presence_question(present_object), "Yes"))
            turns.append((_make_presence_question(absent_object), "No"))
        if turns:
            order_rng.shuffle(turns)
            first_question, first_answer = turns[0]
            turns[0] = (first_question + SHORT_ANSWER, first_answer)
            conversations.append(Conversation(record.id, record.image, tuple(turns)))
    return conversations


def find_mentioned_objects(texts: Iterable[str], names: dict[str, str]) -> set[str]:
    """Return the objects that the texts mention. Longer names are matched first, so "hot dog" does not match "dog"."""
    pattern = _compile_name_pattern(tuple(names))
    return {names[match.lower()] for text in texts for match in pattern.findall(text)}


@lru_cache
def read_object_synonyms(file: Path) -> dict[str, str]:
    """Read a list of objects and synonyms. Return a dict that maps each name, singular or plural, to an object.

    Lines have the form `object` or `object: synonym, synonym`. Text after # is a comment. Plurals are formed by rules.

    Raises:
        ValueError: Two objects have the same name.
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


def _make_presence_question(name: str) -> str:
    if name in UNCOUNTABLE:
        return f"Is there {name} in the image?"
    article = "an" if name[0] in "aeiou" else "a"
    return f"Is there {article} {name} in the image?"


# ---- chat template ---------------------------------------------------------------------------------------------------


def get_chat_template(tokenizer: Any) -> str:
    """Return the LLM's chat template, or Vicuna's as a fallback, with a Jinja prefix that handles images."""
    template = tokenizer.chat_template
    if template is not None and template.startswith(_FLATTEN_CONTENT):
        return str(template)
    return _FLATTEN_CONTENT + (template or _VICUNA_TEMPLATE)


def find_end_of_turn_token(tokenizer: Any) -> int:
    """Check the chat template on a sample conversation. Return the id of the end-of-turn token.

    Raises:
        ValueError: The template modifies an answer, or `tokenize_and_label` does not support the template.
    """
    conversation = Conversation("", None, (("A question?", "An answer."), ("Another?", "Yes.")))
    labels = [label for label in tokenize_and_label(conversation, tokenizer, 0).labels if label != IGNORE_INDEX]
    decoded = tokenizer.decode(labels, skip_special_tokens=True)
    if re.sub(r"\s", "", decoded) != "Ananswer.Yes.":
        raise ValueError(f"the LLM's chat template changes 'An answer.' and 'Yes.' to {decoded!r}. Use another LLM")
    return labels[-1]


def convert_to_chat_messages(conversation: Conversation) -> list[dict[str, Any]]:
    """Convert a conversation to messages in the format of transformers' processors."""
    messages: list[dict[str, Any]] = []
    for n, (question, answer) in enumerate(conversation.turns):
        content: list[dict[str, Any]] = [{"type": "text", "text": clean_conversation_text(question)}]
        if n == 0 and conversation.image is not None:
            content.insert(0, {"type": "image"})
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": clean_conversation_text(answer)}]})
    return messages


def clean_conversation_text(text: str) -> str:
    """Strip whitespace, and remove `<image>` tokens, because the chat template inserts its own.

    Raises:
        ValueError: The text is not valid Unicode or contains a character from PLACEHOLDER_MARKS.
    """
    text.encode()  # raises UnicodeEncodeError for lone surrogates, which no tokenizer accepts
    if any(mark in text for mark in PLACEHOLDER_MARKS):
        raise ValueError("a text must not contain the private-use characters U+E000 and U+E001, which are reserved")
    while IMAGE_TOKEN in text:  # removing a token can create another, as in <im<image>age>
        text = text.replace(IMAGE_TOKEN, "")
    return text.strip()


def tokenize_and_label(conversation: Conversation, tokenizer: Any, num_image_tokens: int) -> LabelledTokens:
    """Tokenize a conversation and label its answers, including end-of-turn tokens.

    To find the exact span of each answer, the chat template is first rendered with numbered placeholders instead of the
    answers. An image is represented by `num_image_tokens` tokens.

    Raises:
        ValueError: The chat template omits an answer, or has no special token after an answer.
    """
    messages = convert_to_chat_messages(conversation)
    answers = []
    for n, message in enumerate(messages[1::2]):
        answers.append(message["content"][0]["text"])
        message["content"][0]["text"] = _make_answer_placeholder(n)
    rendered = tokenizer.apply_chat_template(
        messages, chat_template=get_chat_template(tokenizer), tokenize=False, add_generation_prompt=False
    )
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    # `all_special_tokens` does not contain all added tokens.
    special_tokens = sorted({*tokenizer.all_special_tokens, *added} - {IMAGE_TOKEN}, key=len, reverse=True)
    text = ""
    spans = []  # (start, end) of each answer, including its end-of-turn token
    for n, answer in enumerate(answers):
        before, placeholder, rendered = rendered.partition(_make_answer_placeholder(n))
        if not placeholder:
            raise ValueError("the LLM's chat template omits an answer. Use another LLM")
        end_token = next((token for token in special_tokens if rendered.lstrip().startswith(token)), None)
        if end_token is None:
            raise ValueError(
                "the LLM's chat template has no special token after an answer, so the model would not learn to end its "
                "answers. Use another LLM"
            )
        length = rendered.index(end_token) + len(end_token)
        ending, rendered = rendered[:length], rendered[length:]
        start = len(text) + len(before)
        text += before + answer + ending
        spans.append((start, len(text)))
    return _label_answer_spans(text, spans, tokenizer, num_image_tokens)


def _make_answer_placeholder(n: int) -> str:
    return f"{PLACEHOLDER_MARKS[0]}{n}{PLACEHOLDER_MARKS[1]}"


def _label_answer_spans(
    text: str, spans: list[tuple[int, int]], tokenizer: Any, num_image_tokens: int
) -> LabelledTokens:
    has_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    encoded = tokenizer(text, add_special_tokens=not has_bos, return_offsets_mapping=True)
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    ids: list[int] = []
    labels: list[int] = []
    for token, (_, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        if token == image_id:
            ids += [token] * num_image_tokens
            labels += [IGNORE_INDEX] * num_image_tokens
            continue
        # Check the end of each token, because some tokenizers merge the space before an answer into its first token.
        in_answer = any(span_start < end <= span_end for span_start, span_end in spans)
        ids.append(token)
        labels.append(token if in_answer else IGNORE_INDEX)
    return LabelledTokens(ids, labels)
