"""Training loss of the `tune` stage: InfoNCE over pairs of texts, encoded in batches of similar length.

Captions have 10 to 200 tokens, so padding a complete batch to its longest text would waste half the compute. The texts
are therefore sorted by length and encoded in forward passes with a limited number of tokens each. If there are several
passes, gradient caching keeps the activations of only one pass in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from llm2clip.data.texts import text_key
from llm2clip.models.text.batching import TokenizedTexts
from llm2clip.models.text.caption_encoder import CaptionEncoder
from llm2clip.models.text.packing import copy_to_device
from llm2clip.runs.ranks import RaggedGather, max_over_ranks
from llm2clip.train.grad_cache import cached_backward


def pair_loss(
    anchor: Tensor,
    positive: Tensor,
    scale: float,
    text_ids: Tensor,
    negatives: Tensor | None = None,
    symmetric: bool = True,
    gather: bool = True,
) -> Tensor:
    """Compute InfoNCE over pairs of texts. Each anchor retrieves its positive from all positives and hard negatives.

    Candidates that are identical to the anchor or its positive are not used as negatives. In a distributed run, the
    candidates of all ranks are gathered with gradients. Averaged over ranks, as in DDP, the gradients equal those of a
    single process with the complete batch.

    Args:
        anchor, positive: Embeddings of this rank's pairs, of shape (N, D), L2-normalised. Row i of `anchor` and row i
            of `positive` form a pair. N must be the same on all ranks.
        scale: Factor applied to the cosine similarities (1 / temperature).
        text_ids: Ids of the anchors, positives and negatives, in this order, of shape (2 N + M,), int64. Identical
            texts must have the same id.
        negatives: Embeddings of the hard negatives, of shape (M, D), L2-normalised. They are negatives for all anchors.
            M may differ between ranks.
        symmetric: If True, each positive must also retrieve its anchor from all anchors.
        gather: If True, use the candidates of all ranks; all ranks must then call this function.

    Returns:
        The loss as a float32 scalar, averaged over this rank's pairs. If symmetric, it is the mean of both directions.
    """
    n = len(anchor)
    if negatives is None:
        negatives = anchor[:0]
    anchor, positive, negatives = anchor.float(), positive.float(), negatives.float()
    anchor_ids, positive_ids, negative_ids = text_ids[:n], text_ids[n : 2 * n], text_ids[2 * n :]

    # Gather the texts of all ranks.
    pairs = RaggedGather(n, anchor.device, gather)
    extra = RaggedGather(len(negatives), anchor.device, gather)
    all_anchors, all_positives = pairs.gather(anchor, gradients=True), pairs.gather(positive, gradients=True)
    all_negatives = extra.gather(negatives, gradients=True)
    all_anchor_ids, all_positive_ids = pairs.gather(anchor_ids), pairs.gather(positive_ids)
    candidate_ids = torch.cat([all_positive_ids, extra.gather(negative_ids)])
    target = torch.arange(n, device=anchor.device) + pairs.offset  # index of each pair among the pairs of all ranks

    def retrieval_loss(query: Tensor, query_ids: Tensor, answer_ids: Tensor, items: Tensor, item_ids: Tensor) -> Tensor:
        """Return the cross-entropy loss of retrieving each query's target item."""
        excluded = (item_ids[None, :] == query_ids[:, None]) | (item_ids[None, :] == answer_ids[:, None])
        excluded = excluded.scatter(1, target[:, None], False)  # never exclude the target itself
        logits = scale * query @ items.T  # (queries, items)
        return F.cross_entropy(logits.masked_fill(excluded, -torch.inf), target)

    with torch.autocast(anchor.device.type, enabled=False):
        candidates = torch.cat([all_positives, all_negatives])
        loss = retrieval_loss(anchor, anchor_ids, positive_ids, candidates, candidate_ids)
        if symmetric:
            loss = (loss + retrieval_loss(positive, positive_ids, anchor_ids, all_anchors, all_anchor_ids)) / 2
    return loss


@dataclass
class PairCollator(SentenceTransformerDataCollator):
    """Data collator that tokenizes a batch of pairs without padding.

    The output lists the anchors first, then the positives, then the hard negatives. `preprocess_fn` must be the
    encoder's `tokenize` method.
    """

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        anchors = [row["anchor"] for row in rows]
        others = [row["positive"] for row in rows]
        others += [text for row in rows for text in row["negatives"]]
        instructions = [row["instruction"] for row in rows] + [""] * len(others)
        tokenized = self.preprocess_fn(anchors + others, instructions)
        return {
            "tokens": tokenized.ids,
            "prompt_lengths": tokenized.prompt_lengths,
            "text_ids": torch.tensor([text_key(text) for text in anchors + others]),
            "pairs": len(rows),
        }


class PairLoss(nn.Module):
    """Loss module for the sentence-transformers trainer, which computes `pair_loss` on batches from `PairCollator`."""

    def __init__(
        self,
        encoder: CaptionEncoder,
        temperature: float,
        batch_tokens: int,
        *,
        symmetric: bool = True,
        matryoshka_dims: Sequence[int] = (),
        grad_cache: bool = False,
    ) -> None:
        """
        Args:
            encoder: Caption encoder to train.
            temperature: Temperature by which cosine similarities are divided.
            batch_tokens: Maximum number of tokens per forward pass, including padding.
            symmetric: See `pair_loss`.
            matryoshka_dims: Truncated embedding sizes to train in addition to the full size (Matryoshka, arXiv
                2205.13147). The loss is the mean over all sizes.
            grad_cache: If True, use gradient caching for batches that take several forward passes, so that the
                activations of only one pass are in memory at a time.
        """
        super().__init__()
        self.model = encoder.st  # the trainer replaces this with its distributed wrapper
        self._encoder = [encoder]  # in a list, so that the encoder is not registered as a submodule
        self.scale = 1 / temperature
        self.batch_tokens = batch_tokens
        self.symmetric, self.matryoshka_dims, self.grad_cache = symmetric, tuple(matryoshka_dims), grad_cache

    def forward(self, features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """Return the loss of a batch. `features` must contain exactly one element, the batch."""
        batch, device = next(iter(features)), self._encoder[0].device
        passes = list(self._passes(batch["tokens"], batch["prompt_lengths"]))
        rows_in_order = [row for rows, _ in passes for row in rows]
        order = copy_to_device(torch.tensor(rows_in_order).argsort(), device)  # to restore the order of the batch

        runs = [run for _, run in passes]

        def run_without_output() -> Tensor:
            """Rerun the last pass, which has the shortest texts, and discard its output."""
            return passes[-1][1]()[:0]

        sharded, most_passes = isinstance(self.model, FSDPModule), len(passes)
        if sharded or self.grad_cache:
            most_passes = max_over_ranks(len(passes), device)
        if sharded:  # ranks with fewer passes add dummy passes, so that all ranks run the same number
            runs += [run_without_output] * (most_passes - len(passes))

        def loss_function(embeddings: Tensor) -> Tensor:
            return self._loss(embeddings[order], batch["pairs"], batch["text_ids"].to(embeddings.device))

        # Gradient caching would run a single pass twice for no benefit. It changes the order of collective operations,
        # so all ranks must make the same choice.
        if self.grad_cache and most_passes > 1 and torch.is_grad_enabled():
            return cached_backward([partial(_as_tuple, run) for run in runs], loss_function, self.model, device)
        return loss_function(torch.cat([run() for run in runs]))

    def _passes(
        self, tokens: list[list[int]], prompt_lengths: list[int]
    ) -> Iterator[tuple[list[int], Callable[[], Tensor]]]:
        """Yield the row indices of each forward pass over a batch, and a function that encodes these rows."""
        for prompt_length, rows in TokenizedTexts(tokens, [], prompt_lengths).batches(self.batch_tokens):
            yield rows, partial(self._encode, [tokens[row] for row in rows], prompt_length)

    def _encode(self, tokens: list[list[int]], prompt_length: int) -> Tensor:
        embeddings: Tensor = self.model(self._encoder[0].collate(tokens, prompt_length))["sentence_embedding"]
        return embeddings.float()

    def _loss(self, embeddings: Tensor, pairs: int, text_ids: Tensor) -> Tensor:
        losses = []
        for dim in (embeddings.shape[1], *self.matryoshka_dims):
            unit = F.normalize(embeddings[:, :dim], dim=-1)
            anchor, positive, negatives = unit[:pairs], unit[pairs : 2 * pairs], unit[2 * pairs :]
            losses.append(pair_loss(anchor, positive, self.scale, text_ids, negatives, self.symmetric))
        return torch.stack(losses).mean()


def _as_tuple(run: Callable[[], Tensor]) -> tuple[Tensor]:
    return (run(),)
