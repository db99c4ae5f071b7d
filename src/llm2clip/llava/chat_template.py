"""A conversation about a picture as the tokens that the LLM reads, with the answers marked.

The LLM's own chat template is kept where it has one, and LLaVA-1.5's (Vicuna's) taken where it has none. In front of it
stands a piece that turns lists of contents, as transformers' processors give them, into text with `<image>`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from llm2clip.data.image_refs import ImageRef

IMAGE = "<image>"
PLACE = ("\ue000", "\ue001")  # around the number of an answer, while the template is filled in
IGNORED = -100  # the label of a token that is no answer, as transformers' losses have it

_FLAT = """{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
  {%- set content = namespace(text='') -%}
  {%- if message['content'] is string -%}
    {%- set content.text = message['content'] -%}
  {%- else -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] == 'image' -%}{%- set content.text = content.text + '<image>\n' -%}
      {%- elif part['type'] == 'text' -%}{%- set content.text = content.text + part['text'] -%}{%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {%- set flat.messages = flat.messages + [{'role': message['role'], 'content': content.text}] -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""
_VICUNA = """{{- 'A chat between a curious user and an artificial intelligence assistant. ' -}}
{{- "The assistant gives helpful, detailed, and polite answers to the user's questions. " -}}
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}{{- 'USER: ' + message['content'] + ' ' -}}
  {%- elif message['role'] == 'assistant' -%}{{- 'ASSISTANT: ' + message['content'] + eos_token -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Questions with their answers, about a picture or about none; `image` stands before the first question."""

    id: str
    image: ImageRef | None
    turns: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class LabeledTokens:
    """Token ids of a conversation, and of each its label: itself where it is part of an answer, else IGNORED."""

    ids: list[int]
    labels: list[int]


def get_chat_template(tokenizer: Any) -> str:
    """For a processor: takes contents with images, and ends in the LLM's own template, or Vicuna's."""
    own = tokenizer.chat_template
    if own is not None and own.startswith(_FLAT):
        return str(own)
    return _FLAT + (own or _VICUNA)


def check_template(tokenizer: Any) -> None:
    """Raises ValueError if answers cannot be found again in what the template makes of a conversation."""
    one = Conversation("", None, (("A question?", "An answer."), ("Another?", "Yes.")))
    marked = tokenize_and_label(one, tokenizer, 0)
    answers = tokenizer.decode([label for label in marked.labels if label != IGNORED], skip_special_tokens=True)
    if re.sub(r"\s", "", answers) != "Ananswer.Yes.":
        raise ValueError(f"the LLM's chat template hides the answers: they read {answers!r}")


def to_messages(conversation: Conversation) -> list[dict[str, Any]]:
    """The conversation as transformers' processors take it."""
    found: list[dict[str, Any]] = []
    for n, (question, answer) in enumerate(conversation.turns):
        content: list[dict[str, Any]] = [{"type": "text", "text": plain_prompt(question)}]
        if n == 0 and conversation.image is not None:
            content.insert(0, {"type": "image"})
        found += [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": plain_prompt(answer)}]},
        ]
    return found


def plain_prompt(text: str) -> str:
    """Without marks of a picture, whose place is known, and without space around.

    Raises:
        ValueError: it is not valid Unicode, or holds what `mark` puts in the place of an answer.
    """
    text.encode()  # half of an emoji, say, which no tokenizer takes
    if PLACE[0] in text or PLACE[1] in text:
        raise ValueError(f"the characters {PLACE[0]!r} and {PLACE[1]!r} are for private use")
    while IMAGE in text:  # again, for one within another
        text = text.replace(IMAGE, "")
    return text.strip()


def answer_end_tokens(tokenizer: Any) -> set[int]:
    """The special tokens that end answers in the template."""
    marked = tokenize_and_label(Conversation("", None, (("A question?", "An answer."),)), tokenizer, 0)
    return {max((n, label) for n, label in enumerate(marked.labels) if label != IGNORED)[1]}


def tokenize_and_label(conversation: Conversation, tokenizer: Any, tokens: int) -> LabeledTokens:
    """Tokens of a conversation; answers with the special token that ends them are labelled.

    Args:
        conversation: its last answer included.
        tokenizer: the processor's.
        tokens: of a picture.

    Raises:
        ValueError: the template loses an answer, or has nothing that ends it.
    """
    said = to_messages(conversation)
    answers = [entry["content"][0]["text"] for entry in said[1::2]]
    for n, entry in enumerate(said[1::2]):
        entry["content"][0]["text"] = _place(n)
    whole = tokenizer.apply_chat_template(
        said, chat_template=get_chat_template(tokenizer), tokenize=False, add_generation_prompt=False
    )
    text, spans = "", []
    for n, answer in enumerate(answers):
        before, found, whole = whole.partition(_place(n))
        if not found:
            raise ValueError("the LLM's chat template drops an answer")
        end = next((s for s in _specials(tokenizer) if whole.lstrip().startswith(s)), None)
        if end is None:
            raise ValueError("the LLM's chat template has no special token after an answer, so that it would not end")
        text += before
        ended = whole[: whole.index(end) + len(end)]
        spans.append((len(text), len(text) + len(answer) + len(ended)))
        text += answer + ended
        whole = whole[len(ended) :]
    return _tokens(text, spans, tokenizer, tokens)


def _tokens(text: str, spans: list[tuple[int, int]], tokenizer: Any, tokens: int) -> LabeledTokens:
    starts_itself = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    read = tokenizer(text, add_special_tokens=not starts_itself, return_offsets_mapping=True)
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    ids: list[int] = []
    labels: list[int] = []
    for token, (_, end) in zip(read["input_ids"], read["offset_mapping"], strict=True):
        times = tokens if token == image else 1
        ids += [token] * times
        # A space before an answer is part of its first token in some tokenizers: what ends in an answer is of it.
        answer = any(a < end <= b for a, b in spans)
        labels += [token if answer and token != image else IGNORED] * times
    return LabeledTokens(ids, labels)


def _place(n: int) -> str:
    return f"{PLACE[0]}{n}{PLACE[1]}"


def _specials(tokenizer: Any) -> list[str]:
    """All that the tokenizer reads as one token of its own; transformers counts only some of them as special."""
    added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    return sorted({*tokenizer.all_special_tokens, *added} - {IMAGE}, key=len, reverse=True)
