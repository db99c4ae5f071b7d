"""Tests of the LLM2CLIP paper's claims (arXiv 2411.04997), with verdicts based on bootstrap confidence intervals.

Each comparison predicts that a value A is lower than a value B. The verdict depends on the 95% confidence intervals of
A, B and the difference B - A, which is paired by image:

- holds: A's interval lies entirely below B's interval.
- weak support: A's and B's intervals overlap, but the interval of B - A is above zero.
- contradicted: the interval of B - A is below zero.
- inconclusive: none of the above.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from llm2clip.cpu_tuning import keep_freed_memory, use_onednn_matmul
from llm2clip.data.images import load_image
from llm2clip.data.transforms import EvalTransform
from llm2clip.evaluate.metrics import compute_percentile_interval, draw_bootstrap_counts
from llm2clip.reports import format_interval
from llm2clip.train.initial_model import create_initial_model
from llm2clip.train.losses import info_nce
from reproduce_data import (
    BASELINE,
    CAPTIONS_TEST,
    FOREIGN_COLUMN,
    FOREIGN_TEST,
    LLM_CC,
    LLM_RAW,
    LONG_CAPTION_TESTS,
    MULTILINGUAL_CC,
    MULTILINGUAL_RAW,
    MULTILINGUAL_TC,
    Experiments,
)

Interval = tuple[float, float, float]  # value, lower limit, upper limit
RETRIEVAL_HEADER = ["text tower", "I2T R@1", "T2I R@1", "mean", "95% interval"]
MEAN_RECALL = "mean of R@1"

HOLDS = "holds"
WEAK_SUPPORT = "weak support"
INCONCLUSIVE = "inconclusive"
CONTRADICTED = "contradicted"
PARTLY_HOLDS = "partly holds"

# Variants of the training step, named after the source of the text embeddings.
CACHED_TEACHER = "cached teacher"
CLIP_TEXT_TOWER = "CLIP's text tower, also trained"
LLM_IN_LOOP = "LLM in the loop"

# CLIP's text tower pads texts to 77 tokens, and its embedding is the output at the end token.
CLIP_CONTEXT_LENGTH = 77
CLIP_END_TOKEN = 49407

TITLES = {
    1: "Raw LLMs are poor caption encoders, and caption-contrastive tuning fixes this",
    2: "Using a raw LLM as text tower hurts retrieval. An LLM tuned on captions (CC) beats one tuned on general text "
    "pairs (TC), which beats a text encoder that is not an LLM",
    3: "The gain is largest on long captions",
    4: "English training transfers to another language with a multilingual LLM, but not with an English encoder",
    5: "A larger LLM helps",
    6: "With cached teacher embeddings, a training step costs no more than a CLIP fine-tuning step",
}


@dataclass
class Comparison:
    """Comparison of two values of a metric, where `low` is expected to be lower than `high`.

    `difference` is the value of `high` minus the value of `low`, with its confidence interval.
    """

    low: str
    high: str
    metric: str
    low_interval: Interval
    high_interval: Interval
    difference: Interval

    @property
    def verdict(self) -> str:
        """Verdict: HOLDS, WEAK_SUPPORT, INCONCLUSIVE or CONTRADICTED."""
        if self.low_interval[2] < self.high_interval[1]:
            return HOLDS
        if self.difference[1] > 0:
            return WEAK_SUPPORT
        return CONTRADICTED if self.difference[2] < 0 else INCONCLUSIVE


@dataclass
class Claim:
    """Result of testing a claim of `TITLES`: a table, and comparisons that determine the verdict."""

    number: int
    header: list[str] = field(default_factory=list)
    rows: list[list[Any]] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Claim:
        """Create a claim from the output of `dataclasses.asdict`."""
        comparisons = [Comparison(**comparison) for comparison in fields["comparisons"]]
        return cls(**{**fields, "comparisons": comparisons})

    @property
    def title(self) -> str:
        return TITLES[self.number]

    @property
    def verdict(self) -> str:
        """Verdict on the claim: that of all comparisons or, if they differ, whether any holds or is contradicted."""
        verdicts = {comparison.verdict for comparison in self.comparisons}
        if len(verdicts) == 1:
            return verdicts.pop()
        if HOLDS in verdicts:
            return PARTLY_HOLDS
        return CONTRADICTED if CONTRADICTED in verdicts else INCONCLUSIVE


# ---- tests of the claims ---------------------------------------------------------------------------------------------


def measure_caption_retrieval(experiments: Experiments) -> Claim:
    """Test claim 1: measure caption retrieval accuracy (CRA) for raw LLMs, tuned LLMs and the baseline."""
    claim = Claim(1)
    claim.header = ["caption encoder", "CRA, %", "95% interval", "images"]
    names = (LLM_RAW, BASELINE, LLM_CC, MULTILINGUAL_RAW, MULTILINGUAL_CC)
    results = {name: experiments.measure_caption_retrieval(name) for name in names}
    for name, result in results.items():
        interval = format_interval(result["CRA interval"])
        claim.rows.append([experiments.get_label(name), result["CRA"], interval, result["images"]])
    claim.rows.append(["chance", results[LLM_RAW]["chance"], "", ""])
    hits = {name: torch.tensor([result["hits"]], dtype=torch.float64) for name, result in results.items()}
    pairs = [(LLM_RAW, BASELINE), (LLM_RAW, LLM_CC), (MULTILINGUAL_RAW, BASELINE), (MULTILINGUAL_RAW, MULTILINGUAL_CC)]
    claim.comparisons = _compare_pairs(experiments, pairs, "CRA", hits)
    return claim


def compare_text_towers(experiments: Experiments) -> Claim:
    """Test claim 2: measure image-text retrieval with each text tower."""
    claim = Claim(2)
    order = [MULTILINGUAL_RAW, BASELINE, MULTILINGUAL_TC, MULTILINGUAL_CC]  # sorted by expected recall, lowest first
    hits = _fill_retrieval_table(experiments, claim, [LLM_RAW, LLM_CC, *order], CAPTIONS_TEST)
    pairs = [*pairwise(order), (BASELINE, MULTILINGUAL_CC), (MULTILINGUAL_RAW, MULTILINGUAL_CC), (LLM_RAW, LLM_CC)]
    claim.comparisons = _compare_pairs(experiments, dict.fromkeys(pairs), MEAN_RECALL, hits)
    num_pairs = experiments.config.steps * experiments.config.batch_size
    claim.notes.append(
        "The paper's LLM has 8 billion parameters and was tuned on millions of captions; the LLMs here were tuned on "
        f"{num_pairs:,} pairs. The default baseline, all-MiniLM-L6-v2, was trained on 1.2 billion pairs, including "
        "COCO and Flickr30k captions (see its model card)."
    )
    return claim


def compare_long_captions(experiments: Experiments) -> Claim:
    """Test claim 3: measure how much caption tuning improves retrieval with short and with long queries."""
    claim = Claim(3, header=["text tower, T2I R@1", *LONG_CAPTION_TESTS])
    hits = {}
    for name in (BASELINE, LLM_CC, MULTILINGUAL_RAW, MULTILINGUAL_CC):
        hits[name] = [experiments.measure_hits(name, test, "T2I") for test in LONG_CAPTION_TESTS]
        claim.rows.append([experiments.get_label(name), *map(_compute_mean_percent, hits[name])])
    for name, reference in ((LLM_CC, BASELINE), (MULTILINGUAL_CC, BASELINE), (MULTILINGUAL_CC, MULTILINGUAL_RAW)):
        short_gain, long_gain = (high - low for high, low in zip(hits[name], hits[reference], strict=True))
        label = f"gain of {experiments.get_label(name)} over {experiments.get_label(reference)}"
        first, last = f"{label}, first sentence", "the same gain, whole caption"
        claim.comparisons.append(compare_hits(first, last, "T2I R@1", short_gain, long_gain))
    num_images = hits[LLM_CC][0].shape[1]
    claim.notes.append(
        f"Measured on {num_images:,} images not used for training. Chance R@1 is {100 / num_images:.1f}%."
    )
    return claim


def compare_other_languages(experiments: Experiments) -> Claim:
    """Test claim 4: measure retrieval in a language that was used in neither the `tune` nor the `align` stage."""
    claim = Claim(4)
    hits = _fill_retrieval_table(experiments, claim, (BASELINE, LLM_CC, MULTILINGUAL_CC), FOREIGN_TEST)
    pairs = [(BASELINE, MULTILINGUAL_CC), (LLM_CC, MULTILINGUAL_CC)]
    metric = f"{MEAN_RECALL}, {FOREIGN_COLUMN}"
    claim.comparisons = _compare_pairs(experiments, pairs, metric, hits)
    return claim


def compare_llm_sizes(experiments: Experiments) -> Claim:
    """Test claim 5: compare two LLMs tuned on the same number of pairs."""
    claim = Claim(5)
    hits = _fill_retrieval_table(experiments, claim, (LLM_CC, MULTILINGUAL_CC), CAPTIONS_TEST)
    claim.comparisons = _compare_pairs(experiments, [(LLM_CC, MULTILINGUAL_CC)], MEAN_RECALL, hits)
    claim.notes.append(
        "The two LLMs differ in more than size: their training data and the number of layers used are also different. "
        "The smaller LLM is fully fine-tuned, whereas the larger LLM is tuned with LoRA."
    )
    return claim


def measure_training_cost(experiments: Experiments) -> Claim:
    """Test claim 6: measure the duration of training steps for each source of text embeddings."""
    claim = Claim(6, header=["source of text embeddings", "seconds per step", "trained parameters, M"])
    seconds, parameters = measure_steps(experiments, LLM_CC)
    for variant, times in seconds.items():
        claim.rows.append([variant, f"{statistics.median(times):.3f}", parameters[variant]])
    limits = {
        f"{CLIP_TEXT_TOWER}, plus 10%": [1.1 * time for time in seconds[CLIP_TEXT_TOWER]],
        LLM_IN_LOOP: seconds[LLM_IN_LOOP],
    }
    cached = seconds[CACHED_TEACHER]
    for variant, times in limits.items():
        differences = [high - low for low, high in zip(cached, times, strict=True)]
        intervals = map(_compute_quartiles, (cached, times, differences))
        claim.comparisons.append(Comparison(CACHED_TEACHER, variant, "seconds", *intervals))
    claim.notes.append(
        f"Medians over {experiments.config.cost_steps} steps with {experiments.config.cost_images} images and one "
        "caption per image. Steps of the variants were interleaved. Intervals are interquartile ranges."
    )
    return claim


CLAIMS: dict[int, Callable[[Experiments], Claim]] = {
    1: measure_caption_retrieval,
    2: compare_text_towers,
    3: compare_long_captions,
    4: compare_other_languages,
    5: compare_llm_sizes,
    6: measure_training_cost,
}


def _fill_retrieval_table(experiments: Experiments, claim: Claim, names: Sequence[str], test: str) -> dict[str, Tensor]:
    """Measure image-text retrieval and add one row per caption encoder to the claim's table.

    Returns:
        Per-image hits of shape (seeds, images), averaged over both retrieval directions, keyed by caption encoder.
    """
    claim.header = RETRIEVAL_HEADER
    mean_hits = {}
    for name in names:
        i2t, t2i = experiments.measure_hits(name, test, "I2T"), experiments.measure_hits(name, test, "T2I")
        mean_hits[name] = (i2t + t2i) / 2
        mean, low, high = bootstrap_interval(mean_hits[name])
        recalls = [_compute_mean_percent(i2t), _compute_mean_percent(t2i), mean]
        claim.rows.append([experiments.get_label(name), *recalls, format_interval((low, high))])
    return mean_hits


def _compare_pairs(
    experiments: Experiments, pairs: Iterable[tuple[str, str]], metric: str, hits: dict[str, Tensor]
) -> list[Comparison]:
    """Compare pairs of caption encoders, where the first encoder of each pair is expected to score lower."""
    comparisons = []
    for low, high in pairs:
        labels = experiments.get_label(low), experiments.get_label(high)
        comparisons.append(compare_hits(*labels, metric, hits[low], hits[high]))
    return comparisons


def _compute_mean_percent(hits: Tensor) -> float:
    return 100 * float(hits.mean())


def _compute_quartiles(values: Sequence[float]) -> Interval:
    """Return (median, lower quartile, upper quartile)."""
    low, median, high = statistics.quantiles(values, n=4)
    return median, low, high


# ---- bootstrap -------------------------------------------------------------------------------------------------------


def compare_hits(low: str, high: str, metric: str, low_hits: Tensor, high_hits: Tensor) -> Comparison:
    """Compare two models on the same images. `low_hits` and `high_hits` have shape (seeds, images)."""
    means = _resample_means(high_hits, seed=2) - _resample_means(low_hits, seed=1)
    return Comparison(
        low=low,
        high=high,
        metric=metric,
        low_interval=bootstrap_interval(low_hits),
        high_interval=bootstrap_interval(high_hits),
        difference=_make_interval(high_hits.mean() - low_hits.mean(), means, low_hits.shape[1], (-1.0, 1.0)),
    )


def bootstrap_interval(values: Tensor) -> Interval:
    """Return the mean and its 95% confidence interval in percent, computed by bootstrapping over images and seeds.

    Args:
        values: Per-image hits or differences between hits, of shape (seeds, images).
    """
    bounds = (-1.0 if float(values.min()) < 0 else 0.0, 1.0)
    return _make_interval(values.mean(), _resample_means(values, seed=1), values.shape[1], bounds)


def _make_interval(mean: Tensor, means: Tensor, num_images: int, bounds: tuple[float, float]) -> Interval:
    """Return `mean` and its confidence interval in percent, given the means of the bootstrap resamples."""
    low, high = (100 * compute_percentile_interval(means, num_images, bounds)).tolist()
    return 100 * float(mean), low, high


def _resample_means(values: Tensor, seed: int) -> Tensor:
    """Draw bootstrap resamples of images and training seeds. Return their means, of shape (resamples,).

    The resampled images depend only on the number of images, so they are the same for both models in a comparison.
    Training seeds are resampled separately for each model, using `seed` as the random seed.
    """
    num_seeds, num_images = values.shape
    values = values.double()
    generator = torch.Generator().manual_seed(seed)
    means = []
    for image_counts in draw_bootstrap_counts(num_images):
        drawn_seeds = torch.randint(num_seeds, (num_seeds,), generator=generator)
        by_image = values[drawn_seeds].mean(0)  # (images,)
        means.append(by_image @ image_counts / num_images)
    return torch.stack(means)


# ---- duration of training steps --------------------------------------------------------------------------------------


@use_onednn_matmul()
def measure_steps(experiments: Experiments, name: str) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Measure training steps with each source of text embeddings, using the caption encoder called `name`.

    Steps of the variants are interleaved, so other processes on the machine slow down all variants equally. CLIP's text
    tower has the architecture of ViT-B/32 (arXiv 2103.00020), and random weights.

    Returns:
        The seconds of each step, and the number of trained parameters in millions, keyed by variant.
    """
    config, train = experiments.config, experiments.data.train_records
    records = [record for record in train if record.texts][: config.cost_images]
    texts = [record.texts[0] for record in records]
    store = experiments.embed_texts(name, [text for record in train for text in record.texts])
    encoder = experiments.load_encoder(name)
    model = create_initial_model(experiments.make_align_config(0), store).train()
    keep_freed_memory(model.device)
    clip_text_tower = CLIPTextModelWithProjection(CLIPTextConfig(projection_dim=config.embed_dim))
    transform = EvalTransform(model.tower.preprocess)
    pixels = torch.stack([transform(load_image(record.image)) for record in records if record.image is not None])
    ids = torch.randint(1, CLIP_END_TOKEN - 1, (len(texts), CLIP_CONTEXT_LENGTH))
    ids[:, -1] = CLIP_END_TOKEN
    embed_texts: dict[str, Callable[[], Tensor]] = {
        CACHED_TEACHER: lambda: model(embeddings=torch.from_numpy(store.take(store.find_rows(texts))).float())[1],
        CLIP_TEXT_TOWER: lambda: F.normalize(clip_text_tower(input_ids=ids).text_embeds, dim=-1),
        # Autograd does not support inference tensors, so copy the embeddings to a normal tensor.
        LLM_IN_LOOP: lambda: model(embeddings=encoder.encode(texts).clone())[1],
    }
    vision_parameters = [*model.tower.parameters(), *model.projection.parameters(), model.logit_scale]
    parameters = {
        CACHED_TEACHER: list(model.parameters()),
        CLIP_TEXT_TOWER: [*vision_parameters, *clip_text_tower.parameters()],
        LLM_IN_LOOP: list(model.parameters()),
    }
    optimizers = {variant: torch.optim.AdamW(parameters[variant], lr=1e-6) for variant in embed_texts}
    seconds: dict[str, list[float]] = {variant: [] for variant in embed_texts}
    for step in range(config.cost_steps + 1):
        for variant, embed in embed_texts.items():
            start = time.perf_counter()
            image, _, scale, _ = model(pixels)
            info_nce(image, embed(), scale).backward()
            optimizers[variant].step()
            optimizers[variant].zero_grad()
            if step:  # the first step of each variant is a warm-up
                seconds[variant].append(time.perf_counter() - start)
    return seconds, {variant: sum(p.numel() for p in parameters[variant]) / 1e6 for variant in embed_texts}
