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

from llm2clip.checkpoint import hash_texts
from llm2clip.config import AlignConfig
from llm2clip.data.hashing import epoch_permutation
from llm2clip.data.image_loader import decode_or_error
from llm2clip.data.images import TrainTransform
from llm2clip.data.records import CAPTION_FIELDS, Record
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.store.image_features import image_keys
from llm2clip.store.store import EmbeddingStore


def check_batch(images: int, config: AlignConfig, world: int) -> int:
    """The images in a step on all devices.

    Raises:
        ValueError: there are fewer, or the recipe's numbers make no sense.
    """
    if unknown := config.caption_mix.keys() - set(CAPTION_FIELDS):
        raise ValueError(
            f"--align.caption_mix knows the kinds {', '.join(CAPTION_FIELDS)}, not {', '.join(sorted(unknown))}"
        )
    if any(weight < 0 for weight in config.caption_mix.values()):
        raise ValueError("--align.caption_mix takes no negative numbers")
    config = limit_threads(images, config, world)
    step = config.batch_size * world * config.accumulate
    if images < step:
        raise ValueError(f"{images} images are fewer than a batch of {step}; lower --align.batch_size or add images")
    return step


def limit_threads(images: int, config: AlignConfig, world: int) -> AlignConfig:
    """The recipe with a batch of all images, where their features are cached and there are fewer than it wants."""
    if not config.cache_features:
        return config
    most = images // (world * config.accumulate)
    return dataclasses.replace(config, batch_size=max(1, min(config.batch_size, most)))


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


class CaptionIndex:
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


class AlignBatches:
    """The batches of a run, from any step on."""

    def __init__(
        self,
        records: Sequence[Record],
        store: EmbeddingStore,
        model: LLM2CLIP,
        config: AlignConfig,
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
            config = limit_threads(len(usable), config, world)
        self.step_size = check_batch(len(usable), config, world)
        self.per_epoch = len(usable) // self.step_size
        self.config, self.world, self.rank = config, world, rank
        self.count = len(usable)
        self.digest = hash_texts(str(r.image) for r in usable)
        self.captions = hash_texts(text for r in usable for text in r.texts)
        kinds = [kind for kind in CAPTION_FIELDS if any(getattr(r, kind) for r in usable)]
        self.by_kind = [CaptionIndex(store, (getattr(r, kind) for r in usable)) for kind in kinds]
        self.weights = np.array([config.caption_mix.get(kind, 0.0) for kind in kinds])
        transform = TrainTransform(model.tower.preprocess, config.min_crop_scale)
        self.images = _Images(usable, transform, config.seed)

    def __len__(self) -> int:
        return max(1, round(self.per_epoch * self.config.epochs))

    def rows(self, epoch: int, index: int) -> list[int]:
        """The store's rows of the captions that image `index` gets in this epoch.

        Each is of a kind drawn by the recipe's mix; none comes twice, so that they are fewer where a kind has fewer. An
        image that has only kinds of weight 0 takes from all that it has.
        """
        rng = np.random.default_rng([self.config.seed, epoch, index])
        kinds = [(some[index], weight) for some, weight in zip(self.by_kind, self.weights, strict=True)]
        kinds = [(rows, weight) for rows, weight in kinds if len(rows)]
        if not any(weight for _, weight in kinds):
            kinds = [(rows, 1.0) for rows, _ in kinds]
        kinds = [(rng.permutation(rows), weight) for rows, weight in kinds if weight]
        if not self.config.captions_per_image:
            return [int(row) for rows, _ in kinds for row in rows]
        share = np.array([weight for _, weight in kinds])
        drawn = rng.choice(len(kinds), self.config.captions_per_image, p=share / share.sum())
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
            num_workers=self.config.workers,
            collate_fn=list,
            persistent_workers=False,
            multiprocessing_context="spawn" if self.config.workers else None,
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
                order, drawn = epoch_permutation(self.count, self.config.seed, epoch), epoch
            whole = order[at * self.step_size : (at + 1) * self.step_size]
            for batch in np.split(whole, self.config.accumulate):
                yield [(epoch, int(i)) for i in batch[self.rank :: self.world]]


class _Lazily(Sampler[list[tuple[int, int]]]):
    """The steps' members as a batch sampler that is worked out as it is read."""

    def __init__(self, steps: AlignBatches, first: int) -> None:
        self.steps, self.first = steps, first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.steps.members(self.first)

    def __len__(self) -> int:
        return (len(self.steps) - self.first) * self.steps.config.accumulate


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
        return str(ref), decode_or_error(ref, partial(self.transform, generator=generator)), member
