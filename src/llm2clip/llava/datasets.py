"""Training conversations from files in LLaVA's format and from captioned images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from llm2clip.data.columns import BadRow
from llm2clip.data.image_refs import FileImage, is_inside
from llm2clip.data.readers.text import read_json_rows
from llm2clip.data.records import Record
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.splits import read_merged_records
from llm2clip.llava.chat_template import Conversation, clean_text


def read_conversations(
    sources: Sequence[str],
    from_records: Callable[[Iterable[Record], int], list[Conversation]],
    *,
    images: str | Path | None = None,
    columns: dict[str, str] | None = None,
    log: SkipLog,
    seed: int = 0,
) -> list[Conversation]:
    """Read conversations from files in LLaVA's format and from captioned images.

    Args:
        sources: paths of files or folders, whose formats are detected automatically.
        from_records: `make_captioning_conversations` or `make_instruction_conversations`.
        images: folder that contains the images of files in LLaVA's format. See `read_llava`.
        columns: mapping from record fields to column names in the sources.
        seed: random seed, passed to `from_records`.
    """
    conversations: list[Conversation] = []
    for source in sources:
        if is_llava_file(source):
            conversations += read_llava(source, images, log)
        else:
            # Merge rows with the same image: an object must not count as absent if any of the rows names it.
            records = [record for _, record in read_merged_records([source], columns or {}, log)]
            conversations += from_records(records, seed)
    return conversations


def is_llava_file(name: str) -> bool:
    """Return True if a source is a JSON or JSONL file in LLaVA's format."""
    path = Path(name)
    if path.suffix not in (".json", ".jsonl") or not path.is_file():
        return False
    with path.open("rb") as file:
        return b'"conversations"' in file.read(1 << 16)


def read_llava(file: str | Path, images: str | Path | None, log: SkipLog) -> list[Conversation]:
    """Read a file in LLaVA's format, such as blip_laion_cc_sbu_558k.json or llava_v1_5_mix665k.json.

    Each row is {"id", "image", "conversations": [{"from": "human", "value"}, {"from": "gpt", "value"}, ...]}. `image`
    is optional. A .json file contains a list of rows. A .jsonl file contains one row per line. Invalid rows are skipped
    and logged, as are rows whose image file is missing.

    Args:
        file: .json or .jsonl file.
        images: folder to which image paths are relative. Default: the folder that contains the file.

    Raises:
        ValueError: a .json file does not contain a list.
        TooManySkipped: too many rows were skipped.
    """
    file = Path(file)
    root = Path(images) if images is not None else file.parent
    conversations = []
    for _, number, row in read_json_rows(str(file)):
        log.count_row()
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
        messages = messages[1:]  # LLaVA's code drops the first message if it is not from the user
    speakers = [message["from"] for message in messages]
    if not speakers or speakers != ["human", "gpt"] * (len(speakers) // 2):
        raise ValueError("messages must alternate between 'human' and 'gpt', starting with 'human'")
    texts = [clean_text(message["value"]) for message in messages]
    if not all(texts[1::2]):
        raise ValueError("an answer is empty")
    image = None
    if row.get("image"):
        if not is_inside(row["image"]):
            raise ValueError(f"{row['image']} is outside {root}")
        path = root / row["image"]
        if not path.is_file():
            raise FileNotFoundError(str(path))
        image = FileImage(str(path))
    turns = tuple(zip(texts[::2], texts[1::2], strict=True))
    return Conversation(str(row.get("id", number)), image, turns)
