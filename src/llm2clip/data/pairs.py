"""Which pairs of captions a step of tune sees.

Everything here is a pure function of (seed, step): a run that was killed at step 1,234 goes on with exactly the
captions that it would have seen, and the order does not depend on how many machines read it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from llm2clip.data.alike import grouped_order, points
from llm2clip.data.captions import unique


def caption_pairs(
    images: Sequence[Sequence[str]], batch: int, steps: int, seed: int, alike: int = 1
) -> Iterator[list[tuple[str, str]]]:
    """`steps` batches of `batch` pairs for caption-contrastive tuning: two different captions of one image each.

    Within a batch no image comes twice and no text comes twice, so that no other caption of an anchor's image is its
    negative. An image whose text would repeat waits for the next batch. Each pass over the images draws a new
    order and new pairs.

    Args:
        images: the captions of each image; images with fewer than two different ones are left out.
        batch: pairs in a batch.
        steps: number of batches.
        seed: of order and choice.
        alike: images that come together because their captions are alike, as harder negatives; 1 is at random.

    Raises:
        ValueError: there are fewer images with two different captions than pairs in a batch.
    """
    usable = [texts for texts in (unique(i) for i in images) if len(texts) > 1]
    if len(usable) < batch:
        raise ValueError(
            f"a batch of {batch} pairs needs as many images with two different captions; there are {len(usable)}: "
            "lower the batch or add data"
        )
    rng = np.random.default_rng(seed)
    at = points(usable) if alike > 1 else np.empty((len(usable), 0))
    order: list[int] = []
    for _ in range(steps):
        pairs: list[tuple[str, str]] = []
        seen: set[str] = set()
        taken: set[int] = set()
        waiting: list[int] = []
        failed = 0
        while len(pairs) < batch:
            if not order:
                order = grouped_order(at, alike, rng).tolist()
            image = order.pop()
            texts = usable[image]
            first, second = (texts[i] for i in rng.choice(len(texts), 2, replace=False))
            if image in taken or first in seen or second in seen:
                waiting.append(image)
                failed += 1
                if failed > 10 * len(usable):
                    raise ValueError(f"found no {batch} images without a caption in common; lower the batch")
                continue
            failed = 0
            taken.add(image)
            seen.update((first, second))
            pairs.append((first, second))
        order.extend(waiting)
        yield pairs


def mixed_pairs(
    sources: Sequence[Sequence[Sequence[str]]],
    weights: Sequence[float],
    batch: int,
    steps: int,
    seed: int,
    alike: int = 1,
) -> Iterator[list[tuple[str, str]]]:
    """As `caption_pairs` from several sources: all pairs of a batch are of one, so that negatives are of a kind.

    Args:
        sources: each the captions of each of its images.
        weights: how often a batch is of each source; they need not sum to 1. None are needed for one source.
        batch, steps, seed, alike: as in `caption_pairs`.

    Raises:
        ValueError: there is not one positive weight a source, or a source has fewer images than a batch.
    """
    if len(sources) == 1:
        weights = [1.0]
    if len(weights) != len(sources) or min(weights) <= 0:
        raise ValueError(f"{len(sources)} sources need as many positive weights, not {list(weights)}")
    batches = [caption_pairs(images, batch, steps, seed + n, alike) for n, images in enumerate(sources)]
    share = np.asarray(weights) / np.sum(weights)
    for n in np.random.default_rng([seed, len(sources)]).choice(len(sources), steps, p=share):
        yield next(batches[n])
