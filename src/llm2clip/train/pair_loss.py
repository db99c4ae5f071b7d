"""Tune's loss: pairs of texts through the caption encoder in batches of similar length, then InfoNCE over all of them.

A caption has 12 tokens or 200: padding a whole batch to its longest wastes half the compute, so texts are sorted by
length and go through in batches of a token budget; with gradient caching, one of them is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from torch import Tensor, nn

from llm2clip.data.hashing import text_key
from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.models.length_batching import TokenizedTexts
from llm2clip.train.distributed import RaggedGather
from llm2clip.train.fsdp import extra_forward_passes
from llm2clip.train.grad_cache import cached_backward


@dataclass
class PairCollator(SentenceTransformerDataCollator):
    """Rows of pairs to token ids, not padded: all first texts, all second ones, all negatives. `preprocess_fn` is the
    encoder's `tokenize`."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        others = [row["positive"] for row in rows] + [text for row in rows for text in row["negatives"]]
        texts = [row["anchor"] for row in rows] + others
        found = self.preprocess_fn(texts, [row["instruction"] for row in rows] + [""] * len(others))
        names = torch.tensor([text_key(text) for text in texts])
        return {"tokens": found.ids, "unpooled": found.prompt_lengths, "names": names, "pairs": len(rows)}


class PairLoss(nn.Module):
    """The loss of a batch of `PairCollator`, as the trainer calls it."""

    def __init__(
        self,
        encoder: CaptionEncoder,
        temperature: float,
        batch_tokens: int,
        *,
        symmetric: bool = True,
        widths: Sequence[int] = (),
        grad_cache: bool = False,
    ) -> None:
        """
        Args:
            encoder: the caption encoder that is trained.
            temperature: cosines are divided by it.
            batch_tokens: tokens in a forward pass, padding included.
            symmetric: second texts look for first ones, too.
            widths: the mean of the losses of the whole vector and of its first so many numbers (Matryoshka, arXiv
                2205.13147).
            grad_cache: keep no activations between passes.
        """
        super().__init__()
        self.model = encoder.st  # the trainer puts the distributed wrapper here
        self._encoder = [encoder]
        self.scale = 1 / temperature
        self.batch_tokens = batch_tokens
        self.symmetric, self.widths, self.grad_cache = symmetric, tuple(widths), grad_cache

    def forward(self, features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        batch = next(iter(features))
        passes = list(self._passes(batch["tokens"], batch["unpooled"]))
        shortest = passes[-1][1]
        spare = extra_forward_passes(self.model, len(passes), self._encoder[0].device)
        passes += [([], lambda: shortest()[:0])] * spare
        back = torch.tensor([row for rows, _ in passes for row in rows]).argsort()

        def loss(vectors: Tensor) -> Tensor:
            return self._of_vectors(vectors[back], batch["pairs"], batch["names"].to(vectors.device))

        if self.grad_cache and torch.is_grad_enabled():
            parts = [lambda run=run: (run(),) for _, run in passes]
            return cached_backward(parts, loss, self.model, self._encoder[0].device)
        return loss(torch.cat([run() for _, run in passes]))

    def _passes(self, tokens: list[list[int]], unpooled: list[int]) -> Iterator[tuple[list[int], Callable[[], Tensor]]]:
        """The forward passes of a batch: which rows, and what gives their vectors."""
        encoder = self._encoder[0]
        for length, rows in TokenizedTexts(tokens, [], unpooled).batches(self.batch_tokens):

            def run(rows: list[int] = rows, length: int = length) -> Tensor:
                inputs = encoder.collate([tokens[r] for r in rows], length)
                vectors: Tensor = self.model(inputs)["sentence_embedding"].float()
                return vectors

            yield rows, run

    def _of_vectors(self, vectors: Tensor, pairs: int, names: Tensor) -> Tensor:
        losses = []
        for width in (vectors.shape[1], *self.widths):
            unit = F.normalize(vectors[:, :width], dim=-1)
            first, second, negatives = unit[:pairs], unit[pairs : 2 * pairs], unit[2 * pairs :]
            losses.append(pair_loss(first, second, self.scale, names, negatives, self.symmetric))
        return torch.stack(losses).mean()


def pair_loss(
    first: Tensor,
    second: Tensor,
    scale: float,
    ids: Tensor,
    negatives: Tensor | None = None,
    symmetric: bool = True,
    gather: bool = True,
) -> Tensor:
    """InfoNCE over pairs of texts: each first text finds its second among all second texts and all known negatives.

    No text counts against itself: a candidate with the text of the query or of its answer is left out. In a distributed
    run the candidates of all processes are gathered with gradients; averaged over processes, as DDP does, the gradients
    are those of one process with the whole batch.

    Args:
        first, second: (N, D) of this process, L2-normalised; row i of both is a pair; N is the same everywhere.
        scale: factor on the cosines, 1 / temperature.
        ids: (2 N + M,) int64 naming the texts of `first`, `second` and `negatives`.
        negatives: (M, D) known wrong answers, of any of the queries; M may differ among processes.
        symmetric: each second text must find its first, too; the negatives have no part in that.
        gather: take the candidates of all processes, which then must all call this.

    Returns:
        float32 scalar: mean over this process's pairs, and over both directions if symmetric.
    """
    n = len(first)
    if negatives is None:
        negatives = first[:0]
    first, second, negatives = (x.float() for x in (first, second, negatives))
    first_ids, second_ids, wrong_ids = ids[:n], ids[n : 2 * n], ids[2 * n :]
    pairs, others = RaggedGather(n, first.device, gather), RaggedGather(len(negatives), first.device, gather)
    firsts, seconds = pairs.all(first, gradients=True), pairs.all(second, gradients=True)
    wrong = others.all(negatives, gradients=True)
    firsts_ids, seconds_ids, wrong_ids = pairs.all(first_ids), pairs.all(second_ids), others.all(wrong_ids)
    target = torch.arange(n, device=first.device) + pairs.first

    def direction(queries: Tensor, asked: Tensor, answers: Tensor, items: Tensor, items_ids: Tensor) -> Tensor:
        same = (items_ids[None, :] == asked[:, None]) | (items_ids[None, :] == answers[:, None])
        logits = scale * queries @ items.T
        return F.cross_entropy(logits.masked_fill(same.scatter(1, target[:, None], False), -torch.inf), target)

    with torch.autocast(first.device.type, enabled=False):
        candidates, candidate_ids = torch.cat([seconds, wrong]), torch.cat([seconds_ids, wrong_ids])
        loss = direction(first, first_ids, second_ids, candidates, candidate_ids)
        if symmetric:
            loss = (loss + direction(second, second_ids, first_ids, firsts, firsts_ids)) / 2
    return loss
