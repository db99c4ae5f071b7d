"""Conversations as batches that a model trains on."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from llm2clip.data.image_loader import decode_or_error
from llm2clip.llava.chat_template import IGNORED, Conversation, tokenize_and_label
from llm2clip.llava.image_features import LlavaImageProcessor
from llm2clip.store.image_features import image_keys
from llm2clip.store.store import EmbeddingStore

log = logging.getLogger(__name__)

TOGETHER = 50  # batches whose conversations are sorted by length together, as in LLaVA's own sampler
PATIENCE = 1000  # conversations in a row that cannot be used, after which something else is wrong


class ConversationDataset(Dataset):
    """Conversations as token ids, labels, and what the LLM is shown of their pictures."""

    def __init__(
        self,
        conversations: Sequence[Conversation],
        processor: Any,
        tokens: int,
        max_length: int,
        store: EmbeddingStore | None = None,
    ) -> None:
        """
        Args:
            conversations: with pictures that can be read.
            processor: of the model.
            tokens: of a picture.
            max_length: tokens of the longest conversation; longer ones lose their end.
            store: of the pictures' patch features; without one they are decoded.

        Raises:
            ValueError: a picture leaves no room for words.
        """
        if max_length < tokens + 64:
            raise ValueError(f"a picture is {tokens} tokens: --llava.max_length must be {tokens + 64} at least")
        self.conversations, self.tokenizer, self.tokens = list(conversations), processor.tokenizer, tokens
        self.max_length, self.store, self.pixels = max_length, store, LlavaImageProcessor(processor)
        self.rows = np.full(len(self.conversations), -1, np.int64)
        if store is not None:
            shown = [n for n, one in enumerate(self.conversations) if one.image is not None]
            self.rows[shown] = store.find(image_keys(one.image for one in self.conversations if one.image is not None))

    def __len__(self) -> int:
        return len(self.conversations)

    def lengths(self) -> list[int]:
        """About how many tokens each has: by its letters, for reading all of them would take long."""
        found = []
        for one in self.conversations:
            letters = sum(len(question) + len(answer) for question, answer in one.turns)
            found.append(min(self.max_length, letters // 4 + 8 * len(one.turns) + (self.tokens if one.image else 0)))
        return found

    def __getitem__(self, index: int) -> dict[str, Any]:
        """ids, labels, and `seen` where there is a picture. In the place of one that cannot be used comes the next.

        Raises:
            ValueError: none of many can be used.
        """
        for step in range(min(PATIENCE, len(self))):
            item = self._item((index + step) % len(self))
            if isinstance(item, dict):
                return item
            log.warning("%s; the next conversation is taken in its place", item)
        raise ValueError(f"{item}, and nothing after it can be used")

    def _item(self, index: int) -> dict[str, Any] | str:
        """A conversation, or why it cannot be used."""
        one = self.conversations[index]
        try:
            marked = tokenize_and_label(one, self.tokenizer, self.tokens)
        except (TypeError, ValueError) as error:
            return f"conversation {one.id} cannot be read by the LLM ({error})"
        item: dict[str, Any] = {"ids": marked.ids[: self.max_length], "labels": marked.labels[: self.max_length]}
        if all(label == IGNORED for label in item["labels"]):
            return f"conversation {one.id} has no answer within {self.max_length} tokens"
        if one.image is None:
            return item
        if self.store is not None:
            item["seen"] = torch.from_numpy(self.store.take([self.rows[index]])[0]).view(self.tokens, -1)
            return item
        seen = decode_or_error(one.image, self.pixels)
        if isinstance(seen, str):
            return f"{one.image} cannot be decoded ({seen})"
        item["seen"] = seen
        return item


class LlavaCollator:
    """Items to a batch: padded on the right, which is neither read nor learned."""

    def __init__(self, pad: int, image: int, tokens: int, empty: Tensor) -> None:
        """
        Args:
            pad: token that fills.
            image: token that stands for a patch of a picture.
            tokens: patches of a picture.
            empty: what is shown of a picture, of none.
        """
        self.pad, self.image, self.tokens, self.empty = pad, image, tokens, empty

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """input_ids and attention_mask (B, T) int64; pixel_values of those with pictures, float32; and labels (B, K) of
        the last K places, from the one before the first answer on: logits of what comes before, system prompt and
        picture most of it, would be of no use.

        Where no conversation has a picture an empty one stands behind the end of the first, where nothing sees it: the
        projector is then in use in every batch and on every device, as DDP and FSDP want it.
        """
        rows = [list(item["ids"]) for item in items]
        labels = [list(item["labels"]) for item in items]
        seen = [item["seen"] for item in items if "seen" in item]
        if not seen:
            rows[0] += [self.image] * self.tokens
            labels[0] += [IGNORED] * self.tokens
            seen = [self.empty]
        longest = max(map(len, rows))
        first = min(next(n for n, label in enumerate(own) if label != IGNORED) for own in labels)
        kept = longest - max(0, first - 1)
        return {
            "input_ids": _padded(rows, longest, self.pad),
            "labels": _padded(labels, longest, IGNORED)[:, -kept:],
            "logits_to_keep": kept,
            "attention_mask": _padded([[1] * len(row) for row in rows], longest, 0),
            "pixel_values": torch.stack(seen),
            "vision_feature_layer": -1,  # of what `Given` gives, which has been chosen already
            "vision_feature_select_strategy": "full",
        }


class LengthGroupedSampler(Sampler):
    """Indices such that batches are of conversations of similar length: sorted within a few dozens of batches, which
    then come in any order. The same in every process and after a stop: seed and epoch say it all."""

    def __init__(self, lengths: Sequence[int], batch: int, seed: int) -> None:
        self.lengths, self.batch, self.seed, self.epoch = np.asarray(lengths), batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(len(self.lengths))
        whole = len(order) // self.batch * self.batch
        rows, rest = order[:whole].reshape(-1, self.batch), order[whole:]
        batches: list[np.ndarray] = []
        for part in np.array_split(rows, max(1, math.ceil(len(rows) / TOGETHER))):
            some = part.reshape(-1)
            batches += list(some[np.argsort(-self.lengths[some], kind="stable")].reshape(-1, self.batch))
        for n in rng.permutation(len(batches)):
            yield from map(int, batches[n])
        yield from map(int, rest)  # the last batch, which is not whole


def _padded(rows: Sequence[list[int]], length: int, value: int) -> Tensor:
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])
