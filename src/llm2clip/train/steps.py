"""Which images, captions and crops a step of align sees: a function of (seed, step) alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from llm2clip.cache.features import image_keys
from llm2clip.cache.store import EmbeddingStore
from llm2clip.checkpoints import digest
from llm2clip.data.captions import epoch_order
from llm2clip.data.decoding import decoded
from llm2clip.data.images import TrainTransform
from llm2clip.data.records import KINDS, Record
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.recipes import AlignRecipe


def check_batch(images: int, recipe: AlignRecipe, world: int) -> int:
    """The images in a step on all devices.

    Raises:
        ValueError: there are fewer, or the recipe's numbers make no sense.
    """
    if unknown := recipe.mix.keys() - set(KINDS):
        raise ValueError(f"--align.mix knows the kinds {', '.join(KINDS)}, not {', '.join(sorted(unknown))}")
    if any(weight < 0 for weight in recipe.mix.values()):
        raise ValueError("--align.mix takes no negative numbers")
    recipe = capped(images, recipe, world)
    step = recipe.batch * world * recipe.accumulate
    if images < step:
        raise ValueError(f"{images} images are fewer than a batch of {step}; lower --align.batch or add images")
    return step


def capped(images: int, recipe: AlignRecipe, world: int) -> AlignRecipe:
    """The recipe with a batch of all images, where their features are cached and there are fewer than it wants."""
    if not recipe.cache_features:
        return recipe
    most = images // (world * recipe.accumulate)
    return dataclasses.replace(recipe, batch=max(1, min(recipe.batch, most)))


@dataclass(frozen=True)
class Batch:
    """What one process sees at once: N images and M of their captions."""

    images: Tensor
    """(N, 3, S, S) uint8 pixels, or (N, width) float32 features of the tower."""
    rows: np.ndarray
    """int64 (M,): the store's rows of the captions; equal rows are equal captions."""
    owner: np.ndarray
    """int64 (M,), ascending: the image of each caption."""
    names: list[str]
    """Of the images."""
    failures: dict[str, str]
    """Images that could not be decoded, and why; others of the batch stand in for them."""


class CaptionRows:
    """Of each image the store's rows of its captions, ragged over images: two arrays, whatever the number of images."""

    def __init__(self, store: EmbeddingStore, captions: Iterable[Sequence[str]]) -> None:
        """
        Args:
            store: holds every caption.
            captions: of each image, in its order.

        Raises:
            StoreError: a caption was never encoded.
        """
        counts: list[int] = []

        def flat() -> Iterator[str]:
            for some in captions:
                counts.append(len(some))
                yield from some

        self.rows = store.rows(flat())
        self.starts = np.cumsum([0, *counts])

    def __getitem__(self, image: int) -> np.ndarray:
        """int64 (captions,), each row once however often its caption comes."""
        return np.unique(self.rows[self.starts[image] : self.starts[image + 1]])


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
        features: EmbeddingStore | None = None,
    ) -> None:
        """
        Args:
            records: those with an image are seen.
            store: of their captions.
            model: whose tower the images are for.
            recipe: batch, captions, mix and crops.
            world, rank: this process among the others.
            features: of the images, by `image_name`, in place of pixels; images that it lacks are left out, and a batch
                larger than all of them is all of them.

        Raises:
            ValueError: there are fewer images than a step takes, or the recipe's numbers make no sense.
        """
        usable = [r for r in records if r.image is not None]
        self.features, self.feature_rows = features, np.empty(0, np.int64)
        if features is not None:
            found = features.find(image_keys([r.image for r in usable if r.image is not None]))
            usable = [r for r, row in zip(usable, found, strict=True) if row >= 0]
            self.feature_rows = found[found >= 0]
            recipe = capped(len(usable), recipe, world)
        self.step_size = check_batch(len(usable), recipe, world)
        self.per_epoch = len(usable) // self.step_size
        self.recipe, self.world, self.rank = recipe, world, rank
        self.count = len(usable)
        self.digest = digest(str(r.image) for r in usable)
        self.captions = digest(text for r in usable for text in r.texts)
        kinds = [kind for kind in KINDS if any(getattr(r, kind) for r in usable)]
        self.by_kind = [CaptionRows(store, (getattr(r, kind) for r in usable)) for kind in kinds]
        self.weights = np.array([recipe.mix.get(kind, 0.0) for kind in kinds])
        transform = TrainTransform(model.tower.preprocess, (recipe.crop, 1.0), recipe.hflip, recipe.augment)
        self.images = _Images(usable, transform, recipe.seed)

    def __len__(self) -> int:
        return max(1, round(self.per_epoch * self.recipe.epochs))

    def rows(self, epoch: int, index: int) -> list[int]:
        """The store's rows of the captions that image `index` gets in this epoch.

        Each is of a kind drawn by the recipe's mix; none comes twice, so that they are fewer where a kind has fewer. An
        image that has only kinds of weight 0 takes from all that it has.
        """
        rng = np.random.default_rng([self.recipe.seed, epoch, index])
        kinds = [(some[index], weight) for some, weight in zip(self.by_kind, self.weights, strict=True)]
        kinds = [(rows, weight) for rows, weight in kinds if len(rows)]
        if not any(weight for _, weight in kinds):
            kinds = [(rows, 1.0) for rows, _ in kinds]
        kinds = [(rng.permutation(rows), weight) for rows, weight in kinds if weight]
        if not self.recipe.captions:
            return [int(row) for rows, _ in kinds for row in rows]
        share = np.array([weight for _, weight in kinds])
        drawn = rng.choice(len(kinds), self.recipe.captions, p=share / share.sum())
        nth = [int((drawn[:n] == kind).sum()) for n, kind in enumerate(drawn)]
        return [int(kinds[k][0][n]) for k, n in zip(drawn, nth, strict=True) if n < len(kinds[k][0])]

    def batches(self, first: int) -> Generator[Batch]:
        """From step `first`, `accumulate` of them a step."""
        if self.features is not None:
            for members in self.members(first):
                taken = self.features.take(self.feature_rows[[i for _, i in members]])
                yield self._batch(torch.from_numpy(taken), members, {})
            return
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
            failures = {name: found for name, found, _ in items if isinstance(found, str)}
            good = [(found, member) for _, found, member in items if not isinstance(found, str)]
            if not good:
                raise ValueError(f"no image of a batch could be decoded, {next(iter(failures))} for one")
            # An image that fails is replaced by another of its batch; equal captions are no negatives in the loss.
            good += [good[n % len(good)] for n in range(len(items) - len(good))]
            yield self._batch(torch.stack([found for found, _ in good]), [member for _, member in good], failures)

    def _batch(self, images: Tensor, members: list[tuple[int, int]], failures: dict[str, str]) -> Batch:
        rows = [self.rows(epoch, i) for epoch, i in members]
        owner = np.repeat(np.arange(len(rows)), [len(some) for some in rows])
        names = [str(self.images.refs[i]) for _, i in members]
        return Batch(images, np.array([row for some in rows for row in some]), owner, names, failures)

    def members(self, first: int) -> Iterator[list[tuple[int, int]]]:
        """(epoch, image) of this process's part of each batch from step `first` on."""
        order, drawn = np.empty(0, np.int64), -1
        for step in range(first, len(self)):
            epoch, at = divmod(step, self.per_epoch)
            if epoch != drawn:
                order, drawn = epoch_order(self.count, self.recipe.seed, epoch), epoch
            whole = order[at * self.step_size : (at + 1) * self.step_size]
            for batch in np.split(whole, self.recipe.accumulate):
                yield [(epoch, int(i)) for i in batch[self.rank :: self.world]]


class _Lazily(Sampler[list[tuple[int, int]]]):
    """The steps' members as a batch sampler that is worked out as it is read."""

    def __init__(self, steps: Steps, first: int) -> None:
        self.steps, self.first = steps, first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.steps.members(self.first)

    def __len__(self) -> int:
        return (len(self.steps) - self.first) * self.steps.recipe.accumulate


class _Images(Dataset):
    """(epoch, index) to the decoded and cropped image, the same in any worker."""

    def __init__(self, records: Sequence[Record], transform: TrainTransform, seed: int) -> None:
        self.refs = [r.image for r in records if r.image is not None]
        self.transform, self.seed = transform, seed

    def __getitem__(self, member: tuple[int, int]) -> tuple[str, Tensor | str, tuple[int, int]]:
        epoch, index = member
        ref = self.refs[index]
        seed = int(np.random.SeedSequence([self.seed, epoch, index]).generate_state(1)[0])
        generator = torch.Generator().manual_seed(seed)
        return str(ref), decoded(ref, partial(self.transform, generator=generator)), member
