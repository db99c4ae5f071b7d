"""Conversations as batches that a model trains on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from llm2clip.cache.features import image_keys
from llm2clip.cache.store import EmbeddingStore
from llm2clip.data.decoding import decoded
from llm2clip.llava.pixels import Pixels
from llm2clip.llava.prompts import IGNORED, Conversation, mark

log = logging.getLogger(__name__)


class Conversations(Dataset):
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
        """
        self.conversations, self.tokenizer, self.tokens = list(conversations), processor.tokenizer, tokens
        self.max_length, self.store, self.pixels = max_length, store, Pixels(processor)
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
        one = self.conversations[index]
        marked = mark(one, self.tokenizer, self.tokens)
        item: dict[str, Any] = {"ids": marked.ids[: self.max_length], "labels": marked.labels[: self.max_length]}
        if one.image is None:
            return item
        if self.store is not None:
            item["seen"] = torch.from_numpy(self.store.take([self.rows[index]])[0]).view(self.tokens, -1)
            return item
        seen = decoded(one.image, self.pixels)
        if isinstance(seen, str):  # its place stays empty, so that a batch is a batch
            log.warning("%s cannot be decoded (%s): the next conversation is taken in its place", one.image, seen)
            return self[(index + 1) % len(self)]
        item["seen"] = seen
        return item


class Collate:
    """Items to a batch: padded on the right with `pad`, which is neither read nor learned."""

    def __init__(self, pad: int, features: bool) -> None:
        self.pad, self.features = pad, features

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """input_ids, labels and attention_mask (B, T) int64; pixel_values of those with pictures, float32."""
        longest = max(len(item["ids"]) for item in items)
        batch: dict[str, Any] = {
            "input_ids": _padded([item["ids"] for item in items], longest, self.pad),
            "labels": _padded([item["labels"] for item in items], longest, IGNORED),
            "attention_mask": _padded([[1] * len(item["ids"]) for item in items], longest, 0),
        }
        if seen := [item["seen"] for item in items if "seen" in item]:
            batch["pixel_values"] = torch.stack(seen)
            if self.features:
                batch["vision_feature_select_strategy"] = "full"
        return batch


def _padded(rows: Sequence[list[int]], length: int, value: int) -> Tensor:
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])
