"""Sampling of captions for the `align` stage.

The captions sampled for an image depend only on the seed, the epoch and the image.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from llm2clip.config import AlignConfig
from llm2clip.data.random_streams import RandomStreams


class CaptionSource(Protocol):
    """Source of the text inputs for training: an embedding store, or tokenized captions in `clip_finetuning`."""

    manifest: dict[str, Any]

    def rows(self, captions: Iterable[str]) -> np.ndarray:
        """Return the row numbers of N captions, of shape (N,), int64."""
        ...

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Return the text inputs in N rows, of shape (N, ...)."""
        ...


class CaptionRows:
    """Store rows of each image's captions, in two flat arrays to save memory.

    Attributes:
        rows: Store rows of all captions, int64. The rows of each image are sorted and distinct.
        starts: Position of each image's first row in `rows`, of shape (images + 1,), int64.
    """

    def __init__(self, store: CaptionSource, captions: Iterable[Sequence[str]]) -> None:
        """
        Args:
            store: Store with the embeddings of all captions.
            captions: The captions of each image.

        Raises:
            StoreError: A caption is not in the store.
        """
        counts: list[int] = []

        def all_captions() -> Iterator[str]:
            for captions_of_image in captions:
                counts.append(len(captions_of_image))
                yield from captions_of_image

        rows = store.rows(all_captions())
        image_of_row = np.repeat(np.arange(len(counts)), counts)
        # Combine images and rows into single integers, which NumPy sorts faster than pairs.
        base = int(rows.max(initial=0)) + 1
        pairs = np.unique(image_of_row * base + rows)
        self.rows = pairs % base
        self.starts = np.concatenate([[0], np.cumsum(np.bincount(pairs // base, minlength=len(counts)))])

    def __getitem__(self, image: int) -> np.ndarray:
        """Return the distinct store rows of an image's captions, of shape (captions,), int64."""
        return self.rows[self.starts[image] : self.starts[image + 1]]


class CaptionSampler:
    """Samples captions for all images of a batch at once.

    The kind of each caption (such as short or long) is sampled according to the caption mix. Within a kind, captions
    are sampled without replacement, so an image with few captions of a kind may receive fewer captions than requested.
    If all of an image's kinds have weight 0, they are sampled with equal weights.

    For image i, random numbers are taken from `np.random.default_rng([seed, epoch, i])`: first a permutation of each
    kind's captions, then the kind of each caption.
    """

    def __init__(self, captions_by_kind: Sequence[CaptionRows], weights: Sequence[float], config: AlignConfig) -> None:
        """
        Args:
            captions_by_kind: Captions of each kind.
            weights: Sampling weight of each kind, at least 0.
            config: Settings for the `align` stage, which specify the seed and the number of captions per image.
        """
        self.captions_by_kind, self.weights = list(captions_by_kind), np.array(weights, np.float64)
        self.seed, self.captions_per_image = config.seed, config.captions_per_image

    def sample(self, epochs: np.ndarray, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sample captions of N images.

        Args:
            epochs: Epoch of each sample, of shape (N,), int64.
            images: Index of each sample's image, of shape (N,), int64.

        Returns:
            The store rows of the captions, and the position of each caption's image in `images`, which is ascending.
            Both are of shape (M,), int64.
        """
        starts = np.stack([captions.starts[images] for captions in self.captions_by_kind])
        counts = np.stack([captions.starts[images + 1] for captions in self.captions_by_kind]) - starts
        used = (counts > 0) & (self.weights[:, None] > 0)  # (kinds, N)
        used |= (counts > 0) & ~used.any(axis=0)
        counts = np.where(used, counts, 0)

        streams = RandomStreams(self.seed, epochs, images)
        shuffled = []
        for kind, captions in enumerate(self.captions_by_kind):
            positions = starts[kind, :, None] + np.arange(counts[kind].max(initial=0))
            rows = captions.rows[np.minimum(positions, len(captions.rows) - 1)]  # (N, most captions of this kind)
            streams.shuffle(rows, counts[kind])
            shuffled.append(rows)
        if self.captions_per_image == 0:
            valid = [np.arange(rows.shape[1]) < counts[kind, :, None] for kind, rows in enumerate(shuffled)]
            image_of_caption, column = np.nonzero(np.concatenate(valid, axis=1))
            return np.concatenate(shuffled, axis=1)[image_of_caption, column], image_of_caption
        kinds = self._sample_kinds(used, streams)
        return _take_in_order(shuffled, counts, kinds)

    def _sample_kinds(self, used: np.ndarray, streams: RandomStreams) -> np.ndarray:
        """Sample the kind of each caption, as `Generator.choice` does.

        Args:
            used: Boolean mask of the kinds that can be sampled for each image, of shape (kinds, N).
            streams: Random number generators of the images.

        Returns:
            Kinds of shape (captions_per_image, N), int64.
        """
        numbers = np.stack([streams.random() for _ in range(self.captions_per_image)])
        kinds = np.empty(numbers.shape, np.int64)
        codes = 2 ** np.arange(len(used)) @ used  # images with the same code have the same kinds of captions
        for code in np.unique(codes):
            same_kinds = np.flatnonzero(codes == code)
            kinds_of_code = np.flatnonzero(used[:, same_kinds[0]])
            weights = self.weights[kinds_of_code]
            if not weights.any():
                weights = np.ones(len(kinds_of_code))
            cumulative = np.cumsum(weights / weights.sum())
            cumulative /= cumulative[-1]
            kinds[:, same_kinds] = kinds_of_code[cumulative.searchsorted(numbers[:, same_kinds], side="right")]
        return kinds


def _take_in_order(shuffled: list[np.ndarray], counts: np.ndarray, kinds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Take the next row of the sampled kind for each caption; skip the caption if no rows of that kind are left.

    Args:
        shuffled: Permuted rows of each kind, of shape (N, captions), int64.
        counts: Number of rows of each kind and image, of shape (kinds, N), int64.
        kinds: Sampled kinds, of shape (captions per image, N), int64.

    Returns:
        The rows, and the position of each row's image, which is ascending. Both are of shape (M,), int64.
    """
    images = np.arange(kinds.shape[1])
    taken = np.zeros_like(counts)
    rows, valid = np.zeros_like(kinds), np.zeros(kinds.shape, bool)
    for n, kind_of_image in enumerate(kinds):
        next_row = taken[kind_of_image, images]
        valid[n] = next_row < counts[kind_of_image, images]
        for kind, rows_of_kind in enumerate(shuffled):
            chosen = np.flatnonzero(valid[n] & (kind_of_image == kind))
            rows[n, chosen] = rows_of_kind[chosen, next_row[chosen]]
        taken[kind_of_image, images] += 1
    image_of_caption, caption = np.nonzero(valid.T)
    return rows[caption, image_of_caption], image_of_caption
