"""Tune's loss: pairs of texts through the caption encoder in batches of similar length, then InfoNCE over all of them.

A caption has 12 tokens or 200: padding a whole batch to its longest wastes half the compute, so texts are sorted by
length and go through in batches of a token budget. With gradient caching (GradCache, arXiv 2101.06983) those batches
are forgotten after the forward pass and done again, one at a time, for the backward pass: memory is that of one of
them whatever the number of pairs, gradients are the same, and the price is one more forward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from torch import Tensor, nn

from llm2clip.data.captions import text_id
from llm2clip.models.batches import Tokens
from llm2clip.models.text import CaptionEncoder
from llm2clip.train.losses import pair_loss
from llm2clip.train.sharding import spare_passes


@dataclass
class PairCollator(SentenceTransformerDataCollator):
    """Rows of pairs to token ids, not padded: all first texts, all second ones, all negatives. `preprocess_fn` is the
    encoder's `tokenize`."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        others = [row["second"] for row in rows] + [text for row in rows for text in row["negatives"]]
        texts = [row["first"] for row in rows] + others
        found = self.preprocess_fn(texts, [row["prompt"] for row in rows] + [""] * len(others))
        names = torch.tensor([text_id(text) for text in texts])
        return {"tokens": found.ids, "unpooled": found.unpooled, "names": names, "pairs": len(rows)}


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
        spare = spare_passes(self.model, len(passes), self._encoder[0].device)
        passes += [([], lambda: shortest()[:0])] * spare
        back = torch.tensor([row for rows, _ in passes for row in rows]).argsort()

        def loss(vectors: Tensor) -> Tensor:
            return self._of_vectors(vectors[back], batch["pairs"], batch["names"].to(vectors.device))

        if self.grad_cache and torch.is_grad_enabled():
            return self._cached(passes, loss)
        return loss(torch.cat([run() for _, run in passes]))

    def _passes(self, tokens: list[list[int]], unpooled: list[int]) -> Iterator[tuple[list[int], Callable[[], Tensor]]]:
        """The forward passes of a batch: which rows, and what gives their vectors."""
        encoder = self._encoder[0]
        for length, rows in Tokens(tokens, [], unpooled).batches(self.batch_tokens):

            def run(rows: list[int] = rows, length: int = length) -> Tensor:
                inputs = encoder.features([tokens[r] for r in rows], length)
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

    def _cached(
        self, passes: Sequence[tuple[list[int], Callable[[], Tensor]]], loss: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """The loss, whose backward pass runs the encoder again on each part."""
        states, parts = [], []
        with torch.no_grad():
            for _, run in passes:
                states.append(_random_state(self._encoder[0].device))
                parts.append(run())
        vectors = torch.cat(parts).requires_grad_()
        value = loss(vectors)
        value.backward()
        assert vectors.grad is not None
        gradients = vectors.grad.split([len(part) for part in parts])

        def again(upstream: Tensor) -> None:
            after = _random_state(self._encoder[0].device)
            for n, ((_, run), state, gradient) in enumerate(zip(passes, states, gradients, strict=True)):
                apart = n < len(passes) - 1 and isinstance(self.model, nn.parallel.DistributedDataParallel)
                with torch.enable_grad(), self.model.no_sync() if apart else contextlib.nullcontext():
                    _set_random_state(state)  # the same dropout as before
                    (run() * gradient * upstream).sum().backward()
            _set_random_state(after)

        value = value.detach().requires_grad_()
        value.register_hook(again)
        return value


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
