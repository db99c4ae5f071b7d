"""Which pairs of texts a step of tune sees: two captions of one image, or a general text pair.

Everything here is a pure function of (seed, step): a run that was killed at step 1,234 goes on with exactly the
texts that it would have seen, and the order does not depend on how many machines read it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llm2clip.data.hard_negatives import caption_vectors, grouped_permutation
from llm2clip.data.hashing import unique_captions


@dataclass(frozen=True, slots=True)
class Pair:
    """Two texts that mean the same; texts that do not, if any are known; and an instruction that `first` is read after,
    outside the pooling."""

    first: str
    second: str
    negatives: tuple[str, ...] = ()
    prompt: str = ""

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.first, self.second)


@dataclass(frozen=True, slots=True)
class ImageCaptions:
    """All that is said of one image."""

    short: tuple[str, ...]
    long: tuple[str, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        return self.short + self.long


Item = ImageCaptions | Pair
PAIR_KINDS = (1.0, 1.0, 1.0)


def pair_batches(
    sources: Sequence[Sequence[Item]],
    weights: Sequence[float],
    batch: int,
    steps: int,
    seed: int,
    alike: int = 1,
    lengths: Sequence[float] = PAIR_KINDS,
) -> Iterator[list[Pair]]:
    """`steps` batches of `batch` pairs. All pairs of a batch are of one source, so that negatives are of a kind.

    Within a batch no image comes twice and no text comes twice, so that no other caption of an anchor's image is its
    negative. An item whose text would repeat waits for the next batch, and joins no new pass while it waits. Each pass
    over a source draws a new order and new pairs.

    Args:
        sources: each the captions of its images, or its text pairs; images without a pair are left out.
        weights: how often a batch is of each source; they need not sum to 1. None are the sources' sizes.
        batch: pairs in a batch.
        steps: number of batches.
        seed: of order and choice.
        alike: items that come together because their texts are alike, as harder negatives; 1 is at random.
        lengths: how often a pair of captions is of two short ones, a short and a long one, two long ones, where an
            image has such pairs.

    Raises:
        ValueError: there is not one positive weight a source, or a source has fewer usable items than a batch.
    """
    if len(lengths) != 3 or min(lengths) < 0:
        raise ValueError(f"lengths are three weights: short and short, short and long, long and long; got {lengths}")
    if any(not items for items in sources):
        raise ValueError("a source has no captions or pairs left to tune on")
    weights = list(weights) or [float(len(items)) for items in sources]
    if len(weights) != len(sources) or min(weights) <= 0:
        raise ValueError(f"{len(sources)} sources need as many positive weights, not {weights}")
    of_source = [_batches(items, batch, steps, seed + n, alike, lengths) for n, items in enumerate(sources)]
    share = np.asarray(weights) / np.sum(weights)
    for n in np.random.default_rng([seed, len(sources)]).choice(len(sources), steps, p=share):
        yield next(of_source[n])


def _batches(
    items: Sequence[Item], batch: int, steps: int, seed: int, alike: int, lengths: Sequence[float]
) -> Iterator[list[Pair]]:
    usable = pairable_items(items, batch, lengths)
    rng = np.random.default_rng(seed)
    at = caption_vectors([item.texts for item in usable]) if alike > 1 else np.empty((len(usable), 0))
    order: list[int] = []
    for _ in range(steps):
        pairs: list[Pair] = []
        seen: set[str] = set()
        taken: set[int] = set()
        waiting: list[int] = []
        failed = 0
        while len(pairs) < batch:
            if not order:
                late = set(waiting)
                order = [n for n in grouped_permutation(at, alike, rng).tolist() if n not in late]
            if not order:  # all others are in this batch: the late ones try other captions
                order, waiting = waiting, []
            number = order.pop()
            item = usable[number]
            pair = item if isinstance(item, Pair) else draw_pair(item, lengths, rng)
            if number in taken or pair.first in seen or pair.second in seen:
                waiting.append(number)
                failed += 1
                if failed > 10 * len(usable):
                    raise ValueError(f"found no {batch} pairs without a text in common; lower the batch")
                continue
            failed = 0
            taken.add(number)
            seen.update(pair.texts)
            pairs.append(pair)
        order.extend(reversed(waiting))  # who waits longest comes first
        yield pairs


def pairable_items(items: Sequence[Item], batch: int, lengths: Sequence[float] = PAIR_KINDS) -> list[Item]:
    """The items of a source that give a pair.

    Raises:
        ValueError: they are fewer than a batch.
    """
    usable = [item for item in items if isinstance(item, Pair) or can_pair(item, lengths)]
    if len(usable) < batch:
        kind = "text pairs" if items and isinstance(items[0], Pair) else "images with two different captions"
        raise ValueError(
            f"a batch of {batch} pairs needs as many {kind}; there are {len(usable)}: lower --tune.batch_size or add data"
        )
    return usable


def can_pair(captions: ImageCaptions, lengths: Sequence[float] = PAIR_KINDS) -> bool:
    """Whether an image has two different captions of lengths that are wanted."""
    return any(weight > 0 for _, weight in _kinds(captions, lengths))


def draw_pair(captions: ImageCaptions, lengths: Sequence[float], rng: np.random.Generator) -> Pair:
    """Two different captions of one image, their lengths chosen by weight among those that it has."""
    kinds = [(kind, weight) for kind, weight in _kinds(captions, lengths) if weight > 0]
    chosen = 0
    if len(kinds) > 1:
        share = np.array([weight for _, weight in kinds])
        chosen = int(rng.choice(len(kinds), p=share / share.sum()))
    one, other = kinds[chosen][0]
    if one is other:
        first, second = (one[i] for i in rng.choice(len(one), 2, replace=False))
        return Pair(first, second)
    texts = [str(rng.choice(one)), str(rng.choice(other))]
    return Pair(*(texts if rng.random() < 0.5 else reversed(texts)))


def _kinds(captions: ImageCaptions, lengths: Sequence[float]) -> list[tuple[tuple[list[str], list[str]], float]]:
    """The pairs of lists that two captions can be of, and their weights: short and short, short and long, long both."""
    short = unique_captions(captions.short)
    long = [c for c in unique_captions(captions.long) if c not in short]
    kinds = ((short, short), (short, long), (long, long))
    enough = (len(short) > 1, bool(short and long), len(long) > 1)
    return [(kind, weight) for kind, weight, there in zip(kinds, lengths, enough, strict=True) if there]
