"""Masked next-token prediction: a causal LLM gets used to reading both ways before it is tuned (LLM2Vec, arXiv
2404.05961, section 2.2).

A share of a text's tokens is hidden, and each is predicted from the state of the token before it, as in the LLM's own
training, but with both sides in view. LLM2CLIP's ablation finds that it hardly matters.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from llm2clip.data.hashing import text_key
from llm2clip.distributed import is_distributed
from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.models.length_batching import length_batches
from llm2clip.models.packing import first_token_indices
from llm2clip.train.fsdp import extra_forward_passes

HIDDEN = 0.2  # of the tokens, as LLM2Vec does
MASK = "_"  # LLMs have no mask token; LLM2Vec hides with this one


@dataclass
class MaskingCollator(SentenceTransformerDataCollator):
    """Texts to token ids of which some are hidden. What is hidden in a row depends on the row's `seed` alone.

    Args:
        share: of the tokens that are hidden, each with this probability; at least one.
        mask: id of the token that hides them.
    """

    share: float = 0.2
    mask: int = 0

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        found = self.preprocess_fn([row["text"] for row in rows])
        whole, hidden, inputs = found.ids, [], []
        for row, ids, header in zip(rows, whole, found.prompt_lengths, strict=True):
            at = hidden_positions(len(ids), self.share, row["seed"], max(1, header))
            hidden.append(at)
            inputs.append([self.mask if i in at else token for i, token in enumerate(ids)])
        targets = [[ids[i] for i in at] for ids, at in zip(whole, hidden, strict=True)]
        return {"tokens": inputs, "hidden": hidden, "targets": targets}


def hidden_positions(length: int, share: float, seed: str, first: int = 1) -> list[int]:
    """Which of `length` tokens are hidden, at least one of those from `first` on: the very first has nothing before it,
    and a template's header tells nothing."""
    draws = torch.rand(max(0, length - first), generator=torch.Generator().manual_seed(text_key(seed)))
    found = [i + first for i, draw in enumerate(draws.tolist()) if draw < share]
    return found or ([int(draws.argmin()) + first] if len(draws) else [])


class MaskedTokenLoss(nn.Module):
    """Cross-entropy of the hidden tokens, mean over all of a batch of `MaskingCollator`."""

    output: Tensor

    def __init__(self, encoder: CaptionEncoder, batch_tokens: int) -> None:
        super().__init__()
        self.model = encoder.st  # the trainer puts the distributed wrapper here
        self.register_buffer("output", output_layer(encoder.llm).to(encoder.device), persistent=False)
        self._encoder = [encoder]
        self.batch_tokens = batch_tokens

    def forward(self, features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        batch, encoder = next(iter(features)), self._encoder[0]
        total = torch.tensor(float(sum(len(at) for at in batch["hidden"])), device=encoder.device)
        if is_distributed():  # processes have different numbers, and DDP takes their mean
            dist.all_reduce(total)
            total /= dist.get_world_size()
        losses = []
        passes = list(length_batches([len(ids) for ids in batch["tokens"]], self.batch_tokens))
        spare = extra_forward_passes(self.model, len(passes), encoder.device)
        for n, rows in enumerate([*passes, *[passes[-1]] * spare]):
            hidden = [batch["hidden"][r] if n < len(passes) else [] for r in rows]
            inputs = encoder.collate([batch["tokens"][r] for r in rows], 0)
            states = self.model(inputs)["token_embeddings"].flatten(0, 1)
            starts = first_token_indices(inputs)
            at = [start + i - 1 for start, of_row in zip(starts, hidden, strict=True) for i in of_row]
            targets = [t for r, of_row in zip(rows, hidden, strict=True) if of_row for t in batch["targets"][r]]
            before = states[torch.tensor(at, device=states.device, dtype=torch.long)]
            logits = F.linear(before, self.output.to(before.dtype)).float()
            answers = torch.tensor(targets, device=states.device, dtype=torch.long)
            losses.append(F.cross_entropy(logits, answers, reduction="sum"))
        return torch.stack(losses).sum() / total.clamp(min=1)


def output_layer(llm: Any) -> Tensor:
    """The frozen weights that turn a state into scores of tokens, (vocabulary, width): a caption encoder goes without
    them, so they are read from where it came from, unless they are its table of token embeddings.

    Raises:
        ValueError: they are not there, as in a folder that was saved without them.
    """
    if llm.config.tie_word_embeddings:
        table: Tensor = llm.get_input_embeddings().weight.detach()
        return table
    name = "lm_head.weight"
    index = cached_file(llm.name_or_path, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    shard = json.loads(Path(index).read_text())["weight_map"].get(name) if index else SAFE_WEIGHTS_NAME
    file = shard and cached_file(llm.name_or_path, shard, _raise_exceptions_for_missing_entries=False)
    if file:
        with safe_open(file, "pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118 (no mapping)
                return cast(Tensor, tensors.get_tensor(name).float())
    raise ValueError(
        f"{llm.name_or_path} has no {name}, which --tune.mntp_steps needs: give the LLM as it was published"
    )
