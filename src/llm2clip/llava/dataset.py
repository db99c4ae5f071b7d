"""Conversations about images as training data: chat template, labels of the answers, dataset, collator, sampler.

If the LLM has no chat template, Vicuna's template is used, as in LLaVA-1.5. In transformers' message format, a
message's content can be a list of text and image parts. A Jinja prefix converts such lists to text with `<image>`
tokens.
"""

import logging
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler

from llm2clip.data.image_loader import decode_or_error
from llm2clip.data.image_refs import ImageRef
from llm2clip.llava.image_features import LlavaTransform
from llm2clip.store.encode import make_image_keys
from llm2clip.store.store import EmbeddingStore

log = logging.getLogger(__name__)

IMAGE_TOKEN = "<image>"
IGNORE_INDEX = -100  # label of tokens outside answers, as in transformers and cross_entropy
PLACEHOLDER_MARKS = ("\ue000", "\ue001")  # delimiters of answer placeholders; see `tokenize_and_label`
MEGABATCH = 50  # number of batches per length-sorted group, as in LLaVA's sampler
MIN_TEXT_TOKENS = 64  # max_length must leave at least this many tokens for text
MAX_REPLACEMENTS = 1000  # maximum number of consecutive conversations to try

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


# ---- dataset and batches ---------------------------------------------------------------------------------------------


class ConversationDataset(Dataset):
    """Dataset of tokenized, labelled conversations, with images as either pixels or cached patch features."""

    def __init__(
        self,
        conversations: Sequence[Conversation],
        processor: Any,
        num_image_tokens: int,
        max_length: int,
        store: EmbeddingStore | None = None,
    ) -> None:
        """
        Args:
            num_image_tokens: number of `<image>` tokens per image.
            max_length: maximum number of tokens. Longer conversations are truncated.
            store: cached patch features of all images. If None, images are decoded instead.

        Raises:
            ValueError: `max_length` does not leave enough tokens for text.
        """
        minimum = num_image_tokens + MIN_TEXT_TOKENS
        if max_length < minimum:
            raise ValueError(
                f"--llava.max_length must be at least {minimum} (got {max_length}), "
                f"because each image takes up {num_image_tokens} tokens"
            )
        self.conversations = list(conversations)
        self.tokenizer = processor.tokenizer
        self.transform = LlavaTransform(processor)
        self.num_image_tokens = num_image_tokens
        self.max_length = max_length
        self.store = store
        self.store_rows: dict[int, int] = {}  # conversation index -> row of the conversation's image in the store
        if store is not None:
            images = {n: each.image for n, each in enumerate(self.conversations) if each.image is not None}
            self.store_rows = dict(zip(images, store.find_keys(make_image_keys(images.values())).tolist(), strict=True))

    def __len__(self) -> int:
        return len(self.conversations)

    def estimate_lengths(self) -> list[int]:
        """Estimate each conversation's length in tokens from its character count, because tokenizing is slow."""
        lengths = []
        for conversation in self.conversations:
            characters = sum(len(question) + len(answer) for question, answer in conversation.turns)
            tokens = characters // 4 + 8 * len(conversation.turns)
            tokens += self.num_image_tokens if conversation.image else 0
            lengths.append(min(self.max_length, tokens))
        return lengths

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a dict with `ids`, `labels` and, if there is an image, its pixels or patch features as `vision`.

        If a conversation cannot be used, log a warning and return the next usable conversation instead.

        Raises:
            ValueError: no usable conversation was found.
        """
        for offset in range(min(MAX_REPLACEMENTS, len(self))):
            item = self._load_item(index=(index + offset) % len(self))
            if isinstance(item, dict):
                return item
            log.warning("%s; using the next conversation instead", item)
        raise ValueError(f"{item}, and no other usable conversation was found")

    def _load_item(self, index: int) -> dict[str, Any] | str:
        """Return a conversation's item, or the reason why the conversation cannot be used."""
        conversation = self.conversations[index]
        try:
            labeled = tokenize_and_label(conversation, self.tokenizer, self.num_image_tokens)
        except (TypeError, ValueError) as error:
            return f"conversation {conversation.id} cannot be tokenized ({error})"
        item: dict[str, Any] = {"ids": labeled.ids[: self.max_length], "labels": labeled.labels[: self.max_length]}
        if all(label == IGNORE_INDEX for label in item["labels"]):
            return f"conversation {conversation.id} has no answer within {self.max_length} tokens"
        if conversation.image is None:
            return item
        if self.store is not None:
            features = self.store.take([self.store_rows[index]])[0]
            return item | {"vision": torch.from_numpy(features).view(self.num_image_tokens, -1)}
        pixels = decode_or_error(conversation.image, self.transform)
        if isinstance(pixels, str):
            return f"{conversation.image} cannot be decoded ({pixels})"
        return item | {"vision": pixels}


class LlavaCollator:
    """Collator that right-pads conversations to the longest one in the batch."""

    def __init__(self, tokenizer: Any, num_image_tokens: int, empty_image: Tensor) -> None:
        """
        Args:
            empty_image: pixels or patch features of a blank image, which is added to batches without images.
        """
        self.pad_id: int = tokenizer.pad_token_id
        self.image_id: int = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.num_image_tokens = num_image_tokens
        self.empty_image = empty_image

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the model inputs for a batch.

        For B conversations padded to T tokens, input_ids and attention_mask are int64 tensors of shape (B, T).
        pixel_values contains the pixels or patch features of all images. labels has shape (B, K), where K =
        logits_to_keep. The loss ignores the system prompt and the image, so logits are computed only for the last K
        positions, starting at the token before the batch's earliest answer.

        If no conversation has an image, a blank image is appended to the first conversation, where causal attention
        hides it from the text. The projector then receives gradients in every batch on every rank, as DDP and FSDP
        require.
        """
        rows = [torch.tensor(item["ids"]) for item in items]
        row_labels = [torch.tensor(item["labels"]) for item in items]
        vision = [item["vision"] for item in items if "vision" in item]
        if not vision:
            rows[0] = F.pad(rows[0], (0, self.num_image_tokens), value=self.image_id)
            row_labels[0] = F.pad(row_labels[0], (0, self.num_image_tokens), value=IGNORE_INDEX)
            vision = [self.empty_image]
        labels = pad_sequence(row_labels, batch_first=True, padding_value=IGNORE_INDEX)
        first_answer = int((labels != IGNORE_INDEX).any(0).nonzero()[0])  # position of the first answer token
        start = max(0, first_answer - 1)
        return {
            "input_ids": pad_sequence(rows, batch_first=True, padding_value=self.pad_id),
            "labels": labels[:, start:],
            "logits_to_keep": labels.shape[1] - start,
            "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
            "pixel_values": torch.stack(vision),
            # PrecomputedVision returns a single layer that contains only the selected tokens.
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        }


class LengthGroupedSampler(Sampler):
    """Sampler that puts conversations of similar length into the same batch.

    Indices are shuffled and divided into groups of about 50 batches. Each group is sorted by length and split into
    batches, which are then shuffled. The order depends only on the seed and the epoch, so it is the same on all ranks
    and in resumed runs.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(len(self.lengths))
        batched = len(order) // self.batch_size * self.batch_size
        rows, remainder = order[:batched].reshape(-1, self.batch_size), order[batched:]
        batches: list[np.ndarray] = []
        for megabatch in np.array_split(rows, max(1, math.ceil(len(rows) / MEGABATCH))):
            indices = megabatch.reshape(-1)
            longest_first = indices[np.argsort(-self.lengths[indices], kind="stable")]
            batches += list(longest_first.reshape(-1, self.batch_size))
        for n in rng.permutation(len(batches)):
            yield from map(int, batches[n])
        yield from map(int, remainder)  # the last, incomplete batch
