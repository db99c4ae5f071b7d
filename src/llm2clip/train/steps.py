"""Which images, captions and crops a step of align sees: a function of (seed, step) alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from llm2clip.cache.store import EmbeddingStore
from llm2clip.data.captions import epoch_order
from llm2clip.data.images import ImageError, TrainTransform, load
from llm2clip.data.records import Record
from llm2clip.data.refs import ImageRef
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.recipes import AlignRecipe
from llm2clip.train.engine import digest


def check_batch(images: int, batch: int) -> None:
    """Raises ValueError where there are too few images for one step."""
    if images < batch:
        raise ValueError(f"{images} images are fewer than a batch of {batch}; lower --align.batch or add images")


class Steps:
    """The batches of a run, from any step on."""

    def __init__(
        self,
        records: Sequence[Record],
        store: EmbeddingStore,
        model: LLM2CLIP,
        recipe: AlignRecipe,
        world: int = 1,
        rank: int = 0,
    ) -> None:
        usable = [r for r in records if r.image is not None]
        self.batch = recipe.batch * world
        check_batch(len(usable), self.batch)
        self.per_epoch = len(usable) // self.batch
        self.recipe, self.world, self.rank = recipe, world, rank
        self.count = len(usable)
        self.digest = digest(str(r.image) for r in usable)
        self.short = [store.rows(r.captions) for r in usable]
        self.long = [store.rows(r.long_captions) for r in usable]
        self.images = _Images(
            usable, TrainTransform(model.tower.preprocess, (recipe.crop, 1.0), recipe.hflip), recipe.seed
        )

    def __len__(self) -> int:
        return self.per_epoch * self.recipe.epochs

    def rows(self, epoch: int, index: int) -> list[int]:
        """The store's rows of the captions that image `index` gets in this epoch: one for each of the step's losses.

        Each is a long one with the recipe's probability; none comes again before all of its kind have come.
        """
        rng = np.random.default_rng([self.recipe.seed, epoch, index])
        short, long = rng.permutation(self.short[index]), rng.permutation(self.long[index])
        share = self.recipe.long_share if len(short) and len(long) else float(len(long) > 0)
        kinds = rng.random(self.recipe.captions) < share
        nth = np.where(kinds, np.cumsum(kinds), np.cumsum(~kinds)) - 1
        return [int((long if k else short)[n % len(long if k else short)]) for k, n in zip(kinds, nth, strict=True)]

    def batches(self, first: int) -> Iterator[tuple[Tensor, np.ndarray, dict[str, str]]]:
        """From step `first`: pixels (B, 3, S, S) uint8, store rows (captions, B), and images that failed, with why."""
        loader = DataLoader(
            self.images,
            batch_sampler=_Lazily(self, first),
            num_workers=self.recipe.workers,
            collate_fn=list,
            persistent_workers=False,
            multiprocessing_context="spawn" if self.recipe.workers else None,
            generator=torch.Generator(),
        )
        for items in loader:
            failures = {name: found for name, found, _, _ in items if isinstance(found, str)}
            good = [(found, epoch, i) for _, found, epoch, i in items if not isinstance(found, str)]
            if not good:
                raise ValueError(f"no image of a batch could be decoded, {next(iter(failures))} for one")
            # An image that fails is replaced by another of its batch; equal captions are no negatives in the loss.
            good += [good[n % len(good)] for n in range(len(items) - len(good))]
            rows = np.array([self.rows(epoch, i) for _, epoch, i in good]).T
            yield torch.stack([found for found, _, _ in good]), rows, failures

    def members(self, first: int) -> Iterator[list[tuple[int, int]]]:
        """(epoch, image) of this process's part of each step from `first` on."""
        order, drawn = np.empty(0, np.int64), -1
        for step in range(first, len(self)):
            epoch, at = divmod(step, self.per_epoch)
            if epoch != drawn:
                order, drawn = epoch_order(self.count, self.recipe.seed, epoch), epoch
            whole = order[at * self.batch : (at + 1) * self.batch]
            yield [(epoch, int(i)) for i in whole[self.rank :: self.world]]


class _Lazily(Sampler[list[tuple[int, int]]]):
    """The steps' members as a batch sampler that is worked out as it is read."""

    def __init__(self, steps: Steps, first: int) -> None:
        self.steps, self.first = steps, first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.steps.members(self.first)

    def __len__(self) -> int:
        return len(self.steps) - self.first


class _Images(Dataset):
    """(epoch, index) to the decoded and cropped image, the same in any worker."""

    def __init__(self, records: Sequence[Record], transform: TrainTransform, seed: int) -> None:
        self.refs = [r.image for r in records if r.image is not None]
        self.transform, self.seed = transform, seed

    def __getitem__(self, at: tuple[int, int]) -> tuple[str, Tensor | str, int, int]:
        epoch, index = at
        ref = self.refs[index]
        seed = int(np.random.SeedSequence([self.seed, epoch, index]).generate_state(1)[0])
        generator = torch.Generator().manual_seed(seed)
        return str(ref), decoded(ref, partial(self.transform, generator=generator)), epoch, index


def decoded(ref: ImageRef, transform: Callable[[Tensor], Tensor]) -> Tensor | str:
    """The transformed image, or why it cannot be decoded."""
    try:
        return transform(load(ref))
    except (ImageError, OSError) as error:
        return str(error)
