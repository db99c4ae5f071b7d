"""Chat templates for conversations about an image, and tokenization with labels for the answers only.

If the LLM has no chat template, Vicuna's template is used, as in LLaVA-1.5. In transformers' message format, a
message's content can be a list of text and image parts. A Jinja prefix converts such lists to text with `<image>`
tokens.
"""

import re
from dataclasses import dataclass
from typing import Any

from llm2clip.data.image_refs import ImageRef

IMAGE_TOKEN = "<image>"
IGNORE_INDEX = -100  # label of tokens outside answers, as in transformers and cross_entropy
PLACEHOLDER_MARKS = ("\ue000", "\ue001")  # delimiters of answer placeholders; see `tokenize_and_label`

_FLATTEN_CONTENT = """{%- set flat = namespace(messages=[]) -%}
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
_VICUNA_TEMPLATE = """{{- 'A chat between a curious user and an artificial intelligence assistant. ' -}}
{{- "The assistant gives helpful, detailed, and polite answers to the user's questions. " -}}
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}{{- 'USER: ' + message['content'] + ' ' -}}
  {%- elif message['role'] == 'assistant' -%}{{- 'ASSISTANT: ' + message['content'] + eos_token -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Question-answer pairs, optionally about an image. The image precedes the first question."""

    id: str
    image: ImageRef | None
    turns: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class LabeledTokens:
    """A conversation's token ids, and one label per token: the token id within answers, IGNORE_INDEX elsewhere."""

    ids: list[int]
    labels: list[int]


def get_chat_template(tokenizer: Any) -> str:
    """Return the Jinja prefix followed by the LLM's chat template, or by Vicuna's template if the LLM has none."""
    template = tokenizer.chat_template
    if template is not None and template.startswith(_FLATTEN_CONTENT):
        return str(template)
    return _FLATTEN_CONTENT + (template or _VICUNA_TEMPLATE)


def find_answer_end_token(tokenizer: Any) -> int:
    """Check the chat template on a sample conversation, and return the id of the token that ends an answer.

    Raises:
        ValueError: the sample's labels do not decode to its answers, or `tokenize_and_label` rejects the template.
    """
    conversation = Conversation("", None, (("A question?", "An answer."), ("Another?", "Yes.")))
    labels = [label for label in tokenize_and_label(conversation, tokenizer, 0).labels if label != IGNORE_INDEX]
    decoded = tokenizer.decode(labels, skip_special_tokens=True)
    if re.sub(r"\s", "", decoded) != "Ananswer.Yes.":
        raise ValueError(f"the LLM's chat template changes 'An answer.' and 'Yes.' to {decoded!r}. Use another LLM")
    return labels[-1]


def to_messages(conversation: Conversation) -> list[dict[str, Any]]:
    """Convert a conversation to the message format of transformers' processors."""
    messages: list[dict[str, Any]] = []
    for n, (question, answer) in enumerate(conversation.turns):
        content: list[dict[str, Any]] = [{"type": "text", "text": clean_text(question)}]
        if n == 0 and conversation.image is not None:
            content.insert(0, {"type": "image"})
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": clean_text(answer)}]})
    return messages


def clean_text(text: str) -> str:
    """Strip whitespace and remove `<image>` tokens. The chat template inserts its own `<image>` tokens.

    Raises:
        ValueError: the text is not valid Unicode or contains a character from PLACEHOLDER_MARKS.
    """
    text.encode()  # raises UnicodeEncodeError for lone surrogates (such as half an emoji), which no tokenizer accepts
    if any(mark in text for mark in PLACEHOLDER_MARKS):
        raise ValueError("the private-use characters U+E000 and U+E001 are reserved and must not occur in a text")
    while IMAGE_TOKEN in text:  # removing one token can create another: <im<image>age>
        text = text.replace(IMAGE_TOKEN, "")
    return text.strip()


def tokenize_and_label(conversation: Conversation, tokenizer: Any, num_image_tokens: int) -> LabeledTokens:
    """Tokenize a conversation and label its answers, including the special token that ends each answer.

    The chat template is first rendered with numbered placeholders in place of the answers. This locates the exact span
    of each answer with any template.

    Args:
        num_image_tokens: number of tokens per image.

    Raises:
        ValueError: the template drops an answer or has no special token after an answer.
    """
    messages = to_messages(conversation)
    answers = []
    for n, message in enumerate(messages[1::2]):
        answers.append(message["content"][0]["text"])
        message["content"][0]["text"] = _make_placeholder(n)
    rendered = tokenizer.apply_chat_template(
        messages, chat_template=get_chat_template(tokenizer), tokenize=False, add_generation_prompt=False
    )
    special_tokens = _get_special_tokens(tokenizer)
    text = ""
    spans = []  # (start, end) of each answer in the text, including the token that ends the answer
    for n, answer in enumerate(answers):
        before, placeholder, rendered = rendered.partition(_make_placeholder(n))
        if not placeholder:
            raise ValueError("the LLM's chat template drops an answer. Use another LLM")
        end_token = next((token for token in special_tokens if rendered.lstrip().startswith(token)), None)
        if end_token is None:
            raise ValueError(
                "the LLM's chat template has no special token after an answer, so the model would not learn to stop. "
                "Use another LLM"
            )
        length = rendered.index(end_token) + len(end_token)
        ending, rendered = rendered[:length], rendered[length:]
        start = len(text) + len(before)
        text += before + answer + ending
        spans.append((start, len(text)))
    return _label_spans(text, spans, tokenizer, num_image_tokens)


def _make_placeholder(n: int) -> str:
    return f"{PLACEHOLDER_MARKS[0]}{n}{PLACEHOLDER_MARKS[1]}"


def _get_special_tokens(tokenizer: Any) -> list[str]:
    """Return all special tokens except `<image>`, longest first.

    `all_special_tokens` omits some added tokens that are marked as special, so `added_tokens_decoder` is also read.
    """
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted({*tokenizer.all_special_tokens, *added} - {IMAGE_TOKEN}, key=len, reverse=True)


def _label_spans(text: str, spans: list[tuple[int, int]], tokenizer: Any, num_image_tokens: int) -> LabeledTokens:
    """Tokenize a text, expand each `<image>` to `num_image_tokens` tokens, and label the tokens within `spans`."""
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
        # Check only the token's end, because some tokenizers merge the space before an answer into its first token.
        in_answer = any(span_start < end <= span_end for span_start, span_end in spans)
        ids.append(token)
        labels.append(token if in_answer else IGNORE_INDEX)
    return LabeledTokens(ids, labels)
