"""All captions of an image at once, for training: as a PyTorch dataset, and in an order that a slow disk likes.

Rows of one image are neighbours in a store, and mostly one read. On a disk that is far or cold, random reads are still
too slow: there images are shuffled in two steps. The store is cut into blocks, the blocks are drawn in random order,
some of them at once are read from end to end, and the images in these are shuffled. Each epoch has another order, and a
batch mixes images of as many places as blocks are read at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from llm2clip.cache.store import EmbeddingStore


class CaptionRows(Dataset[Tensor]):
    """Of each image the vectors of all its captions: (captions, width) float32, ragged over images.

    What it holds of the captions are two arrays of row numbers, which forked workers share; vectors stay in the store.
    """

    def __init__(self, store: EmbeddingStore, captions: Iterable[Sequence[str]]) -> None:
        """
        Args:
            store: holds every caption.
            captions: of each image, in its order.

        Raises:
            StoreError: a caption was never encoded.
        """
        self.store = store
        counts: list[int] = []

        def flat() -> Iterator[str]:
            for some in captions:
                counts.append(len(some))
                yield from some

        self.rows = store.rows(flat())
        self.starts = np.cumsum([0, *counts])

    def __len__(self) -> int:
        return len(self.starts) - 1

    def rows_of(self, image: int) -> np.ndarray:
        """The store's rows of an image's captions, int64."""
        return self.rows[self.starts[image] : self.starts[image + 1]]

    def __getitem__(self, image: int) -> Tensor:
        return torch.from_numpy(self.store.take(self.rows_of(image)))

    def __getitems__(self, images: Sequence[int]) -> list[Tensor]:
        """Several images' vectors, read in one go: what a DataLoader asks for."""
        rows = [self.rows_of(image) for image in images]
        vectors = torch.from_numpy(self.store.take(np.concatenate([np.empty(0, np.int64), *rows])))
        return list(vectors.split([len(r) for r in rows]))

    def block_shuffled(
        self, seed: int, epoch: int, *, block: int = 1 << 15, at_once: int = 8
    ) -> Iterator[tuple[int, Tensor]]:
        """All images that have captions, once each in a random order, with their vectors; the store is read in blocks.

        Args:
            seed, epoch: the order is a function of them.
            block: rows in a block: of 1,024 float16 numbers 32,768 are 64 MB.
            at_once: blocks that are in memory together.
        """
        having = np.flatnonzero(np.diff(self.starts))
        home = self.rows[self.starts[having]] // block  # an image lives where its first caption does
        rng = np.random.default_rng([seed, epoch])
        total = sum(shard.rows for shard in self.store.shards)
        order = rng.permutation(-(-total // block))
        for first in range(0, len(order), at_once):
            blocks = np.sort(order[first : first + at_once])
            held = np.concatenate([np.arange(b * block, min((b + 1) * block, total)) for b in blocks])
            images = rng.permutation(having[np.isin(home, blocks)])
            if not len(images):
                continue
            vectors = self.store.take(held)
            for image in images:
                rows = self.rows_of(int(image))
                at = np.minimum(np.searchsorted(held, rows), len(held) - 1)
                found = vectors[at]
                if len(away := np.flatnonzero(held[at] != rows)):  # a caption that another image had first
                    found[away] = self.store.take(rows[away])
                yield int(image), torch.from_numpy(found)
