"""What is trained on: LLaVA's own files of conversations, and records turned into questions and answers."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from llm2clip.data.image_refs import FileImage, is_inside
from llm2clip.data.records import Record
from llm2clip.data.skip_log import SkipLog
from llm2clip.io_utils import read_json
from llm2clip.llava.chat_template import Conversation, plain_prompt
from llm2clip.llava.pope import Sampling, make_questions

BRIEF = (
    "Describe the picture in one sentence.",
    "What does the picture show, in one sentence?",
    "Give a short caption for this picture.",
    "Say in one sentence what is in the picture.",
)
DETAILED = (
    "Describe the picture in detail.",
    "What can be seen in the picture? Go into detail.",
    "Give a long description of this picture.",
    "Write a paragraph about what the picture shows.",
)


def read_llava(file: str | Path, images: str | Path | None, log: SkipLog) -> list[Conversation]:
    """Conversations of a file in LLaVA's form, such as blip_laion_cc_sbu_558k.json and llava_v1_5_mix665k.json.

    A row is {"id", "image", "conversations": [{"from": "human", "value"}, {"from": "gpt", "value"}, ...]}; `image` may
    be absent. A .jsonl file has one a line. Rows that are no such thing, and those whose image is not there, are
    skipped and listed.

    Args:
        file: .json or .jsonl.
        images: the folder that the paths of images are relative to; None is the file's own.
        log: where skipped rows go.

    Raises:
        ValueError: the file is no list.
        TooManySkipped: too many rows are none.
    """
    file = Path(file)
    root = Path(images) if images is not None else file.parent
    found = []
    for number, row in _rows(file):
        log.count_row()
        try:
            found.append(_conversation(row, root, str(number)))
        except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
            reason = "no image" if isinstance(error, FileNotFoundError) else "no conversation"
            log.skip(str(file), number, reason, error)
    log.check()
    return found


def _rows(file: Path) -> Iterator[tuple[int, Any]]:
    if file.suffix == ".jsonl":
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        yield number, json.loads(line)
                    except ValueError as error:
                        yield number, error
        return
    rows = read_json(file)
    if not isinstance(rows, list):
        raise ValueError(f"{file} is no list of conversations")
    yield from enumerate(rows, 1)


def _conversation(row: Any, root: Path, number: str) -> Conversation:
    """Raises KeyError, TypeError or ValueError if the row is none, FileNotFoundError without its image."""
    if isinstance(row, ValueError):
        raise row
    said = row["conversations"]
    if said and said[0]["from"] != "human":
        said = said[1:]  # as LLaVA reads it
    if len(said) < 2 or len(said) % 2 or [one["from"] for one in said] != ["human", "gpt"] * (len(said) // 2):
        raise ValueError("human and gpt do not take turns")
    values = [plain_prompt(one["value"]) for one in said]
    if not all(values[1::2]):
        raise ValueError("an answer is empty")
    image = None
    if row.get("image"):
        if not is_inside(row["image"]):
            raise ValueError(f"{row['image']} leads out of {root}")
        path = root / row["image"]
        if not path.is_file():
            raise FileNotFoundError(str(path))
        image = FileImage(str(path))
    return Conversation(str(row.get("id", number)), image, tuple(zip(values[::2], values[1::2], strict=True)))


def captioning_conversations(records: Iterable[Record], seed: int = 0) -> list[Conversation]:
    """Each caption of each picture as the answer to a question that asks for one of its length."""
    rng, found = random.Random(seed), []
    for record in records:
        if record.image is None:
            continue
        for caption in (*record.captions, *record.short_captions):
            found.append(Conversation(record.id, record.image, ((rng.choice(BRIEF), caption),)))
        for caption in record.long_captions:
            found.append(Conversation(record.id, record.image, ((rng.choice(DETAILED), caption),)))
    return found


def instruction_conversations(records: Iterable[Record], seed: int = 0) -> list[Conversation]:
    """The captions of each picture one by one, and in one conversation more what is in it and what is not: yes and no,
    as often one as the other."""
    records = list(records)
    found = captioning_conversations(records, seed)
    asked: dict[int, list[tuple[str, str]]] = {}
    for question in make_questions(records, Sampling.RANDOM, seed=seed):
        asked.setdefault(question.record, []).append((question.text, question.answer.capitalize() + "."))
    rng = random.Random(seed)
    for number, turns in asked.items():
        rng.shuffle(turns)
        found.append(Conversation(records[number].id, records[number].image, tuple(turns)))
    return found
