"""Tests of the LLM2CLIP paper's claims (arXiv 2411.04997), and comparisons with the paper's results."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from llm2clip.tools.reproduce.datasets import CAPTIONS_TEST, FOREIGN_TEST
from llm2clip.tools.reproduce.experiments import (
    BASELINE,
    LLM_CC,
    LLM_RAW,
    MULTILINGUAL_CC,
    MULTILINGUAL_RAW,
    MULTILINGUAL_TC,
    Experiments,
)
from llm2clip.tools.reproduce.statistics import Claim, Comparison, Interval, bootstrap_interval, compare_hits
from llm2clip.tools.reproduce.step_time import CACHED_TEACHER, CLIP_TEXT_TOWER, LLM_IN_LOOP, measure_step_times

RETRIEVAL_HEADER = ["text tower", "I2T R@1", "T2I R@1", "mean", "95% interval"]
MEAN_RECALL = "mean of R@1"


def caption_retrieval(experiments: Experiments) -> Claim:
    """Test claim 1: measure the caption retrieval accuracy (CRA) of raw LLMs, tuned LLMs and the baseline."""
    claim = Claim(1)
    claim.header = ["caption encoder", "CRA, %", "95% interval", "images"]
    names = (LLM_RAW, BASELINE, LLM_CC, MULTILINGUAL_RAW, MULTILINGUAL_CC)
    results = {name: experiments.caption_retrieval(name) for name in names}
    for name, result in results.items():
        interval = _format_limits(*result["CRA interval"])
        claim.rows.append([experiments.label(name), result["CRA"], interval, result["images"]])
    claim.rows.append(["chance", results[LLM_RAW]["chance"], "", ""])
    hits = {name: torch.tensor([result["hits"]], dtype=torch.float64) for name, result in results.items()}
    pairs = [
        (LLM_RAW, BASELINE),
        (LLM_RAW, LLM_CC),
        (MULTILINGUAL_RAW, BASELINE),
        (MULTILINGUAL_RAW, MULTILINGUAL_CC),
    ]
    claim.comparisons = _compare_pairs(experiments, pairs, "CRA", hits)
    return claim


def text_towers(experiments: Experiments) -> Claim:
    """Test claim 2: measure image-text retrieval with each text tower."""
    claim = Claim(2)
    order = [MULTILINGUAL_RAW, BASELINE, MULTILINGUAL_CC]  # from the lowest to the highest expected recall
    if experiments.data.text_pairs:
        order.insert(2, MULTILINGUAL_TC)
    else:
        claim.notes.append(
            "There is no TC row because no general text pairs are available. To add it, install Debian's wordnet-base, "
            "delete claims/2.json in the run directory and run the same command again."
        )
    hits = _fill_retrieval_table(experiments, claim, [LLM_RAW, LLM_CC, *order], CAPTIONS_TEST)
    pairs = [
        *pairwise(order),
        (BASELINE, MULTILINGUAL_CC),
        (MULTILINGUAL_RAW, MULTILINGUAL_CC),
        (LLM_RAW, LLM_CC),
    ]
    claim.comparisons = _compare_pairs(experiments, dict.fromkeys(pairs), MEAN_RECALL, hits)
    num_pairs = experiments.config.steps * experiments.config.batch_size
    claim.notes.append(
        "The paper's LLM has 8 billion parameters and was tuned on millions of captions; the LLMs here were tuned on "
        f"{num_pairs:,} pairs. The default baseline, all-MiniLM-L6-v2, was trained on 1.2 billion pairs, including the "
        "captions of COCO and Flickr30k (see its model card)."
    )
    return claim


def long_captions(experiments: Experiments) -> Claim:
    """Test claim 3: measure how much tuning on captions improves retrieval for queries of increasing length."""
    tests = list(experiments.data.long_caption_tests)
    claim = Claim(3, points=tests)
    claim.header = ["text tower, T2I R@1", *tests]
    hits = {}
    for name in (BASELINE, LLM_CC, MULTILINGUAL_RAW, MULTILINGUAL_CC):
        hits[name] = [experiments.hits(name, test, "T2I") for test in tests]
        label = experiments.label(name)
        claim.rows.append([label, *map(_compute_mean_percent, hits[name])])
        claim.curves[label] = [bootstrap_interval(test_hits) for test_hits in hits[name]]
    for name, reference in (
        (LLM_CC, BASELINE),
        (MULTILINGUAL_CC, BASELINE),
        (MULTILINGUAL_CC, MULTILINGUAL_RAW),
    ):
        gains = [high - low for high, low in zip(hits[name], hits[reference], strict=True)]
        label = f"gain of {experiments.label(name)} over {experiments.label(reference)}"
        claim.rows.append([label, *map(_compute_mean_percent, gains)])
        first, last = f"{label}, first sentence", "the same gain, whole caption"
        claim.comparisons.append(compare_hits(first, last, "T2I R@1", gains[0], gains[-1]))
    num_images = hits[LLM_CC][0].shape[1]
    claim.notes.append(f"{num_images:,} images not used for training; R@1 by chance is {100 / num_images:.1f}%.")
    return claim


def other_languages(experiments: Experiments) -> Claim:
    """Test claim 4: measure retrieval in a language that was not used in the `tune` or `align` stage."""
    claim = Claim(4)
    hits = _fill_retrieval_table(experiments, claim, (BASELINE, LLM_CC, MULTILINGUAL_CC), FOREIGN_TEST)
    pairs = [(BASELINE, MULTILINGUAL_CC), (LLM_CC, MULTILINGUAL_CC)]
    metric = f"{MEAN_RECALL}, {experiments.config.foreign_column}"
    claim.comparisons = _compare_pairs(experiments, pairs, metric, hits)
    return claim


def larger_llm(experiments: Experiments) -> Claim:
    """Test claim 5: compare two LLMs that were tuned on the same number of pairs."""
    claim = Claim(5)
    hits = _fill_retrieval_table(experiments, claim, (LLM_CC, MULTILINGUAL_CC), CAPTIONS_TEST)
    claim.comparisons = _compare_pairs(experiments, [(LLM_CC, MULTILINGUAL_CC)], MEAN_RECALL, hits)
    claim.notes.append(
        "The two LLMs differ in more than size: they also have different training data and numbers of layers used. All "
        "weights of the smaller LLM are tuned, whereas the larger LLM is tuned with LoRA."
    )
    return claim


def training_cost(experiments: Experiments) -> Claim:
    """Test claim 6: measure the duration of training steps."""
    claim = Claim(6)
    claim.header = ["source of text embeddings", "seconds per step", "relative to CLIP", "trained parameters, M"]
    times = measure_step_times(experiments, LLM_CC)
    cached, clip = times.median(CACHED_TEACHER), times.median(CLIP_TEXT_TOWER)
    for variant, parameters in times.parameters.items():
        median = times.median(variant)
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
        "The variants were timed alternately. Intervals are interquartile ranges."
    )
    train = experiments.data.train
    num_texts, num_steps = sum(len(record.texts) for record in train), len(train) / times.batch_size
    caption_seconds = (times.median(LLM_IN_LOOP) - cached) / times.batch_size
    claim.notes.append(
        f"Filling the store takes {caption_seconds * 1000:.0f} ms per caption, which is a one-time cost: "
        f"{num_texts * caption_seconds / 60:.0f} minutes for {num_texts:,} texts of this length. An epoch over "
        f"{len(train):,} images takes {num_steps * cached / 60:.0f} minutes with the store and "
        f"{num_steps * clip / 60:.0f} minutes with CLIP's text tower."
    )
    return claim


CLAIMS: dict[int, Callable[[Experiments], Claim]] = {
    1: caption_retrieval,
    2: text_towers,
    3: long_captions,
    4: other_languages,
    5: larger_llm,
    6: training_cost,
}


def _fill_retrieval_table(experiments: Experiments, claim: Claim, names: Sequence[str], test: str) -> dict[str, Tensor]:
    """Measure image-text retrieval, and add one row per caption encoder to the claim's table.

    Returns:
        Per-image hits of each caption encoder, of shape (seeds, images), averaged over both retrieval directions.
    """
    claim.header = RETRIEVAL_HEADER
    mean_hits = {}
    for name in names:
        i2t, t2i = experiments.hits(name, test, "I2T"), experiments.hits(name, test, "T2I")
        mean_hits[name] = (i2t + t2i) / 2
        mean, low, high = bootstrap_interval(mean_hits[name])
        row = [
            experiments.label(name),
            _compute_mean_percent(i2t),
            _compute_mean_percent(t2i),
            mean,
            _format_limits(low, high),
        ]
        claim.rows.append(row)
    return mean_hits


def _compare_pairs(
    experiments: Experiments, pairs: Iterable[tuple[str, str]], metric: str, hits: dict[str, Tensor]
) -> list[Comparison]:
    """Compare pairs of caption encoders. The first encoder in each pair is expected to score lower."""
    comparisons = []
    for low, high in pairs:
        labels = experiments.label(low), experiments.label(high)
        comparisons.append(compare_hits(*labels, metric, hits[low], hits[high]))
    return comparisons


def _compute_mean_percent(hits: Tensor) -> float:
    return 100 * float(hits.mean())


def _compute_quartiles(values: Sequence[float]) -> Interval:
    """Return the median, the lower quartile and the upper quartile."""
    low, median, high = statistics.quantiles(values, n=4)
    return median, low, high


def _format_limits(low: float, high: float) -> str:
    return f"{low:.1f} to {high:.1f}"
