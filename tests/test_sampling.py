"""Which images, captions and crops a step of align sees."""

import dataclasses
import os
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from align_fixtures import ALIGN, fresh_model
from conftest import run_with_few_open_files
from format_fixtures import image_bytes
from llm2clip.config import AlignConfig
from llm2clip.data.image_refs import InMemoryImage
from llm2clip.data.records import CAPTION_FIELDS, Record
from llm2clip.data.table import RecordTable
from llm2clip.data.transforms import PreprocessConfig
from llm2clip.store.store import EmbeddingStore, find_caption_rows
from llm2clip.train.sampling import (
    AlignBatches,
    Batch,
    CaptionSampler,
    resolve_decoding_workers,
    resolve_images_per_step,
)
from test_counter_random import reference_hash

EFFICIENTNET = "test_efficientnet"


def make_batches(
    records: list[Record], store: EmbeddingStore, config: AlignConfig, world_size: int = 1, rank: int = 0
) -> AlignBatches:
    table = RecordTable.from_records(records)
    return AlignBatches(table, store, fresh_model(tower=EFFICIENTNET).tower.preprocess, config, (rank, world_size))


def captions_by_image(batch: Batch) -> list[tuple[str, list[int]]]:
    """Return the images of a batch and the store rows of their captions."""
    rows = [batch.caption_rows[batch.image_of_caption == n].tolist() for n in range(len(batch.images))]
    return list(zip(map(str, batch.image_refs), rows, strict=True))


def test_batches_do_not_depend_on_workers_or_ranks(records: list[Record], store: EmbeddingStore) -> None:
    batches = list(make_batches(records, store, ALIGN).iterate_batches(3))
    expected = torch.from_numpy(store.take(batches[0].caption_rows.numpy()))
    assert batches[0].embeddings.dtype == torch.float16 and torch.equal(
        batches[0].to(torch.device("cpu")).embeddings, expected
    )
    with_workers = list(make_batches(records, store, dataclasses.replace(ALIGN, workers=1)).iterate_batches(3))
    for a, b in zip(batches, with_workers, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.caption_rows, b.caption_rows) and torch.equal(a.image_of_caption, b.image_of_caption)
    half = dataclasses.replace(ALIGN, batch_size=5)
    ranks = [list(make_batches(records, store, half, world_size=2, rank=rank).iterate_batches(3)) for rank in range(2)]
    for batch, *parts in zip(batches, *ranks, strict=True):
        assert sorted(captions_by_image(batch)) == sorted(row for part in parts for row in captions_by_image(part))


def test_each_image_is_sampled_once_per_epoch_for_any_number_of_ranks(
    records: list[Record], store: EmbeddingStore
) -> None:
    """28 of 30 images per epoch; the samples of two ranks interleave to those of one process."""
    config = dataclasses.replace(ALIGN, epochs=3, batch_size=14)
    single = dataclasses.replace(config, batch_size=28)
    expected = [sample for step in make_batches(records, store, single).iterate_samples(0) for sample in step]
    ranks = [make_batches(records, store, config, world_size=2, rank=rank) for rank in range(2)]
    assert len(ranks[0]) == 3 and ranks[0].images_per_step == 28
    steps = [list(batches.iterate_samples(0)) for batches in ranks]
    interleaved = [
        sample for left, right in zip(*steps, strict=True) for pair in zip(left, right, strict=True) for sample in pair
    ]
    assert interleaved == expected
    for epoch in range(3):
        images = [image for sample_epoch, image in interleaved if sample_epoch == epoch]
        assert len(images) == len(set(images)) == 28 and set(images) < set(range(30))
    assert list(ranks[1].iterate_samples(2)) == steps[1][2:], "sampling must start at any step"


def test_epochs_may_be_fractional(records: list[Record], store: EmbeddingStore) -> None:
    steps = [len(make_batches(records, store, dataclasses.replace(ALIGN, epochs=epochs))) for epochs in (0.5, 1, 2.3)]
    assert steps == [2, 3, 7]


def test_caption_mix_weights_the_kinds_of_captions(records: list[Record], store: EmbeddingStore) -> None:
    mix = {"captions": 0.7, "long_captions": 0.3}
    batches = make_batches(records, store, dataclasses.replace(ALIGN, captions_per_image=4, caption_mix=mix))
    short, long = batches.captions.captions_by_kind
    samples = [(epoch, image) for epoch in range(20) for image in range(len(records))]
    sampled = []
    for epoch, image in samples:
        rows, image_of_caption = batches.captions.sample_captions(np.array([epoch]), np.array([image]))
        assert not image_of_caption.any()
        sampled.append(rows.tolist())
    first_is_long = [rows[0] in long[image] for (_, image), rows in zip(samples, sampled, strict=True)]
    assert np.mean(first_is_long) == pytest.approx(0.3, abs=0.06)
    for (_, image), rows in zip(samples, sampled, strict=True):
        assert len(rows) == len(set(rows)) and set(rows) <= {*short[image], *long[image]}


@pytest.mark.parametrize("captions_per_image", [0, 1, 4, 9])
@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0), (0.0, 0.0, 3.0), (0.5, 0.3, 0.2), (1.0, 0.0, 7.0)], ids=str)
def test_captions_of_a_batch_are_those_sampled_for_each_image_separately(
    captions_per_image: int, weights: tuple[float, ...]
) -> None:
    """The reference samples the captions of each image in Python."""
    rng = np.random.default_rng(0)
    kinds = []
    for most in (6, 1, 11):  # every image has a caption of the second kind
        captions = [rng.integers(0, 40, rng.integers(0 if most > 1 else 1, most + 1)) for _ in range(200)]
        kinds.append([[str(row) for row in rows] for rows in captions])
    records = [Record(str(n), None, *(tuple(captions[n]) for captions in kinds)) for n in range(200)]
    table = RecordTable.from_records(records)
    indexes = list(find_caption_rows(table, NumberedCaptions(), CAPTION_FIELDS, "identity").values())
    config = dataclasses.replace(ALIGN, captions_per_image=captions_per_image, seed=12)
    epochs, images = rng.integers(0, 3, 300), rng.integers(0, 200, 300)
    sampler = CaptionSampler(indexes, weights, config)
    rows, image_of_caption = sampler.sample_captions(epochs, images)
    assert rows.dtype == image_of_caption.dtype == np.int64
    for n, (epoch, image) in enumerate(zip(epochs.tolist(), images.tolist(), strict=True)):
        captions_by_kind = [sorted({int(row) for row in captions[image]}) for captions in kinds]
        expected = sample_captions(captions_by_kind, weights, captions_per_image, (12, epoch, image))
        assert rows[image_of_caption == n].tolist() == expected
        alone, _ = sampler.sample_captions(epochs[n : n + 1], images[n : n + 1])
        assert alone.tolist() == expected, "the other images of a batch make no difference"
    assert (np.diff(image_of_caption) >= 0).all()


def sample_captions(
    captions_by_kind: list[list[int]], kind_weights: Sequence[float], captions_per_image: int, seed: tuple[int, ...]
) -> list[int]:
    """Sample the captions of a single image with the reference hash."""
    kinds = [kind for kind, rows in enumerate(captions_by_kind) if rows]
    weights = [kind_weights[kind] for kind in kinds]
    if not any(weights):
        weights = [1.0] * len(kinds)
    shuffled = []
    for kind in kinds:
        rows = captions_by_kind[kind]
        order = sorted(range(len(rows)), key=lambda n, kind=kind: reference_hash(*seed, 2, kind, n))  # type: ignore[misc]
        shuffled.append([rows[n] for n in order])
    if captions_per_image == 0:
        return [row for rows, weight in zip(shuffled, weights, strict=True) if weight for row in rows]
    sampled = []
    for draw in range(captions_per_image):
        number = (reference_hash(*seed, 1, draw) >> 11) / 2**53 * sum(weights)
        kind = next(n for n in range(len(kinds)) if number < sum(weights[: n + 1]))
        if shuffled[kind]:
            sampled.append(shuffled[kind].pop(0))
    return sampled


def test_resolve_images_per_step_rejects_wrong_settings() -> None:
    assert resolve_images_per_step(30, ALIGN, world_size=2) == 20
    large = dataclasses.replace(ALIGN, batch_size=100)  # a step uses all images of a small data set
    assert [resolve_images_per_step(31, large, ranks) for ranks in (1, 2, 3)] == [31, 30, 30]
    smallest = dataclasses.replace(ALIGN, batch_size=2)
    assert resolve_images_per_step(2, smallest, world_size=1) == 2
    for images, world_size in ((0, 1), (1, 1), (3, 4)):
        with pytest.raises(ValueError, match=f"needs at least {max(2, world_size)} images .* has {images:,}"):
            resolve_images_per_step(images, ALIGN, world_size)
    with pytest.raises(ValueError, match="unknown kinds of captions: dense"):
        resolve_images_per_step(30, dataclasses.replace(ALIGN, caption_mix={"dense": 1}), world_size=1)


def test_decoding_workers_follow_cores_and_local_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    auto = dataclasses.replace(ALIGN, workers=None)
    assert resolve_decoding_workers(dataclasses.replace(ALIGN, workers=3)) == 3
    for cores, local_ranks, expected in ((2, 1, 1), (16, 1, 8), (64, 8, 4), (128, 1, 16), (4, 8, 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_ranks))
        assert resolve_decoding_workers(auto) == expected


class NumberedCaptions:
    """Caption source for captions that are numbers. The row of each caption is its number."""

    def __init__(self) -> None:
        self.manifest: dict[str, Any] = {}

    def find_rows(self, captions: Iterable[str]) -> np.ndarray:
        return np.array([int(caption) for caption in captions])

    def take(self, rows: np.ndarray) -> np.ndarray:
        return rows[:, None].astype(np.float32)


PREPROCESS = PreprocessConfig(8, "squash", 1.0, "bicubic", (0.5,) * 3, (0.5,) * 3)


def test_workers_send_large_batches_with_few_open_files() -> None:
    """The usual limit is 1,024 open files. A batch may contain more images than that."""
    run_with_few_open_files(_load_large_batches)


def _load_large_batches() -> None:
    data, broken = image_bytes(0), b"not an image"
    records = [Record(str(n), InMemoryImage(broken if n % 100 == 7 else data, str(n)), (str(n),)) for n in range(300)]
    model: Any = SimpleNamespace(tower=SimpleNamespace(preprocess=PREPROCESS))
    config = dataclasses.replace(ALIGN, batch_size=150, epochs=1, workers=1)
    table = RecordTable.from_records(records)
    batches = list(AlignBatches(table, NumberedCaptions(), model.tower.preprocess, config).iterate_batches(0))
    assert [len(batch.images) for batch in batches] == [150, 150]
    assert sorted(name for batch in batches for name in batch.failures) == ["107", "207", "7"]
