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
from itertools import cycle, pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm2clip.cpu_tuning import keep_freed_memory, onednn_matmul
from llm2clip.data.images import load_image
from llm2clip.data.transforms import EvalTransform
from llm2clip.evaluate.metrics import compute_percentile_interval, draw_bootstrap_counts
from llm2clip.reports import format_interval
from llm2clip.train.initial_model import create_initial_model
from llm2clip.train.losses import info_nce
from reproduce_data import (
    BASELINE,
    CAPTIONS_TEST,
    FOREIGN_TEST,
    LLM_CC,
    LLM_RAW,
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
NOT_TESTED = "not tested"

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
    """Result of testing a claim.

    Args:
        number: Number of the claim, from 1 to 6. See `TITLES`.
        header, rows: Header and rows of the results table.
        comparisons: Comparisons that determine the verdict.
        notes: Remarks on how to interpret the result.
        points: Labels of the points on the plot's x axis. Empty if the claim has no curves.
        curves: Values at each of the `points`, keyed by curve name.
    """

    number: int
    header: list[str] = field(default_factory=list)
    rows: list[list[Any]] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    points: list[str] = field(default_factory=list)
    curves: dict[str, list[Interval]] = field(default_factory=dict)

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
        """Verdict on the claim, or NOT_TESTED if there are no comparisons.

        If the comparisons have different verdicts, the claim's verdict is PARTLY_HOLDS if any comparison holds;
        otherwise CONTRADICTED if any comparison is contradicted; otherwise INCONCLUSIVE.
        """
        verdicts = {comparison.verdict for comparison in self.comparisons}
        if not verdicts:
            return NOT_TESTED
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
    order = [MULTILINGUAL_RAW, BASELINE, MULTILINGUAL_CC]  # sorted by expected recall, lowest first
    if experiments.data.text_pairs:
        order.insert(2, MULTILINGUAL_TC)
    else:
        claim.notes.append(
            "There is no TC row because no general text pairs are available. To add it, install Debian's wordnet-base, "
            "delete claims/2.json in the run directory and rerun the same command."
        )
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
    """Test claim 3: measure how much caption tuning improves retrieval for queries of increasing length."""
    tests = list(experiments.data.long_caption_tests)
    claim = Claim(3, points=tests)
    claim.header = ["text tower, T2I R@1", *tests]
    hits = {}
    for name in (BASELINE, LLM_CC, MULTILINGUAL_RAW, MULTILINGUAL_CC):
        hits[name] = [experiments.measure_hits(name, test, "T2I") for test in tests]
        label = experiments.get_label(name)
        claim.rows.append([label, *map(_compute_mean_percent, hits[name])])
        claim.curves[label] = [bootstrap_interval(test_hits) for test_hits in hits[name]]
    for name, reference in ((LLM_CC, BASELINE), (MULTILINGUAL_CC, BASELINE), (MULTILINGUAL_CC, MULTILINGUAL_RAW)):
        gains = [high - low for high, low in zip(hits[name], hits[reference], strict=True)]
        label = f"gain of {experiments.get_label(name)} over {experiments.get_label(reference)}"
        claim.rows.append([label, *map(_compute_mean_percent, gains)])
        first, last = f"{label}, first sentence", "the same gain, whole caption"
        claim.comparisons.append(compare_hits(first, last, "T2I R@1", gains[0], gains[-1]))
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
    metric = f"{MEAN_RECALL}, {experiments.config.foreign_column}"
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
    claim = Claim(6)
    claim.header = ["source of text embeddings", "seconds per step", "relative to CLIP", "trained parameters, M"]
    times = measure_step_times(experiments, LLM_CC)
    cached, clip = times.compute_median(CACHED_TEACHER), times.compute_median(CLIP_TEXT_TOWER)
    for variant, parameters in times.parameters.items():
        median = times.compute_median(variant)
        claim.rows.append([variant, f"{median:.3f}", f"{median / clip:.2f}x", parameters])

    limits = {
        f"{CLIP_TEXT_TOWER}, plus 10%": [1.1 * seconds for seconds in times.seconds[CLIP_TEXT_TOWER]],
        LLM_IN_LOOP: times.seconds[LLM_IN_LOOP],
    }
    for variant, seconds in limits.items():
        differences = [high - low for low, high in zip(times.seconds[CACHED_TEACHER], seconds, strict=True)]
        claim.comparisons.append(
            Comparison(
                low=CACHED_TEACHER,
                high=variant,
                metric="seconds",
                low_interval=_compute_quartiles(times.seconds[CACHED_TEACHER]),
                high_interval=_compute_quartiles(seconds),
                difference=_compute_quartiles(differences),
            )
        )
    claim.notes.append(
        f"Medians over {experiments.config.cost_steps} steps with {times.batch_size} images and one caption per image. "
        "Steps of the variants were interleaved. Intervals are interquartile ranges."
    )
    train = experiments.data.train_records
    num_texts, num_steps = sum(len(record.texts) for record in train), len(train) / times.batch_size
    caption_seconds = (times.compute_median(LLM_IN_LOOP) - cached) / times.batch_size
    claim.notes.append(
        f"Filling the store is a one-time cost of {caption_seconds * 1000:.0f} ms per caption: "
        f"{num_texts * caption_seconds / 60:.0f} minutes for {num_texts:,} texts of this length. An epoch of "
        f"{len(train):,} images takes {num_steps * cached / 60:.0f} minutes with the store, compared with "
        f"{num_steps * clip / 60:.0f} minutes with CLIP's text tower."
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


class ClipTextTower(nn.Module):
    """Text tower with the architecture used in CLIP ViT-B/32 (arXiv 2103.00020): 12 layers, width 512, 77 tokens.

    The weights are randomly initialised, because their values do not affect the step time.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection

        self.model = CLIPTextModelWithProjection(CLIPTextConfig(projection_dim=embed_dim))

    def forward(self, ids: Tensor) -> Tensor:
        """Return L2-normalised embeddings of shape (N, embed_dim), given token ids of shape (N, 77)."""
        return F.normalize(self.model(input_ids=ids).text_embeds.float(), dim=-1)


@dataclass(frozen=True)
class StepTimes:
    """Training step times for each variant."""

    seconds: dict[str, list[float]]  # duration of each step, keyed by variant
    parameters: dict[str, float]  # number of trained parameters in millions, keyed by variant
    batch_size: int  # number of images per step, each with one caption

    def compute_median(self, variant: str) -> float:
        return statistics.median(self.seconds[variant])


@onednn_matmul()
def measure_step_times(experiments: Experiments, name: str) -> StepTimes:
    """Measure training step times for each variant, using the caption encoder called `name`.

    Steps of the variants are interleaved, so other processes on the machine slow down all variants equally.
    """
    config, train = experiments.config, experiments.data.train_records
    records = [record for record in train if record.texts][: config.cost_images]
    texts = [record.texts[0] for record in records]
    store = experiments.embed_texts(name, [text for record in train for text in record.texts])
    encoder = experiments.load_encoder(name)
    model = create_initial_model(experiments.make_align_config(0), store)
    device = model.device
    keep_freed_memory(device)
    text_tower = ClipTextTower(config.embed_dim).to(device)
    transform = EvalTransform(model.tower.preprocess)
    images = [load_image(record.image) for record in records if record.image is not None]
    pixels = torch.stack([transform(image) for image in images]).to(device)
    ids = torch.randint(1, CLIP_END_TOKEN - 1, (len(texts), CLIP_CONTEXT_LENGTH), device=device)
    ids[:, -1] = CLIP_END_TOKEN

    def adapt(embeddings: Tensor) -> Tensor:
        """Map LLM embeddings of shape (N, D) to text embeddings of shape (N, embed_dim)."""
        return cast(Tensor, model(embeddings=embeddings.to(device).float())[1])

    embed_texts: dict[str, Callable[[], Tensor]] = {
        CACHED_TEACHER: lambda: adapt(torch.from_numpy(store.take(store.find_rows(texts)))),
        CLIP_TEXT_TOWER: lambda: text_tower(ids),
        # Autograd does not support inference tensors, so copy the embeddings to a normal tensor.
        LLM_IN_LOOP: lambda: adapt(encoder.encode(texts).clone()),
    }
    model_parameters = list(model.parameters())
    vision_parameters = [*model.tower.parameters(), *model.projection.parameters(), model.logit_scale]
    parameters: dict[str, list[nn.Parameter]] = {
        CACHED_TEACHER: model_parameters,
        CLIP_TEXT_TOWER: [*vision_parameters, *text_tower.parameters()],
        LLM_IN_LOOP: model_parameters,
    }
    optimizers = {variant: torch.optim.AdamW(parameters[variant], lr=1e-6) for variant in embed_texts}
    seconds: dict[str, list[float]] = {variant: [] for variant in embed_texts}
    model.train()
    num_steps = len(embed_texts) * (config.cost_steps + 1)
    for step, variant in zip(range(num_steps), cycle(embed_texts), strict=False):
        start = time.perf_counter()
        image, _, scale, _ = model(pixels)
        info_nce(image, embed_texts[variant](), scale).backward()
        optimizers[variant].step()
        optimizers[variant].zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if step >= len(embed_texts):  # the first step of each variant is a warm-up
            seconds[variant].append(time.perf_counter() - start)
    counts = {variant: sum(p.numel() for p in parameters[variant]) / 1e6 for variant in embed_texts}
    return StepTimes(seconds, counts, batch_size=len(texts))
