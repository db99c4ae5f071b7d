"""Claims, comparisons and verdicts, based on bootstrap confidence intervals.

A comparison states that value A is lower than value B. The verdict depends on the 95% confidence intervals of A, of B
and of the difference B - A, which is paired by image:

- The comparison holds if A's interval lies entirely below B's interval.
- The comparison has weak support if these two intervals overlap, but the interval of B - A is above zero.
- The comparison is contradicted if the interval of B - A is below zero.
- Otherwise, the comparison is inconclusive.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llm2clip.evaluate.bootstrap import bootstrap_counts, percentile_interval

Interval = tuple[float, float, float]  # value, lower limit, upper limit

HOLDS = "holds"
WEAK_SUPPORT = "weak support"
INCONCLUSIVE = "inconclusive"
CONTRADICTED = "contradicted"
PARTLY_HOLDS = "partly holds"
NOT_TESTED = "not tested"

TITLES = {
    1: "Raw LLMs are poor caption encoders, and caption-contrastive tuning fixes this",
    2: "A raw LLM as text tower hurts retrieval. An LLM tuned on captions (CC) beats one tuned on general text pairs "
    "(TC), which beats a text encoder that is not an LLM",
    3: "The gain is largest on long captions",
    4: "English training transfers to another language with a multilingual LLM, but not with an English encoder",
    5: "A larger LLM helps",
    6: "With cached teacher embeddings, a training step costs what a CLIP fine-tuning step costs",
}


@dataclass
class Comparison:
    """Comparison of two values, one of which should be lower than the other.

    Args:
        low: Name of the value that should be lower.
        high: Name of the value that should be higher.
        metric: Name of the compared metric.
        low_interval, high_interval: The two values with their confidence intervals.
        difference: Value of `high` minus value of `low`, with the confidence interval of this difference.
    """

    low: str
    high: str
    metric: str
    low_interval: Interval
    high_interval: Interval
    difference: Interval

    @property
    def verdict(self) -> str:
        """Verdict on the comparison: HOLDS, WEAK_SUPPORT, INCONCLUSIVE or CONTRADICTED."""
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
        header, rows: Header and rows of the table of measured results.
        comparisons: Comparisons that determine the verdict.
        notes: Notes on the interpretation of the result.
        points: Labels on the x axis of the plot. Empty if the claim has no curves.
        curves: Curves in the plot, keyed by name. Each is a list of values with their confidence intervals.
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
        """Create a claim from a dict returned by `to_dict`."""
        comparisons = [Comparison(**comparison) for comparison in fields["comparisons"]]
        return cls(**{**fields, "comparisons": comparisons})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-serialisable values."""
        return dataclasses.asdict(self)

    @property
    def title(self) -> str:
        return TITLES[self.number]

    @property
    def verdict(self) -> str:
        """Verdict on the claim.

        A verdict that all comparisons share is also the verdict on the claim. Otherwise, the verdict on the claim is
        PARTLY_HOLDS if a comparison holds, CONTRADICTED if a comparison is contradicted, and INCONCLUSIVE in all other
        cases. A claim without comparisons is NOT_TESTED.
        """
        verdicts = {comparison.verdict for comparison in self.comparisons}
        if not verdicts:
            return NOT_TESTED
        if len(verdicts) == 1:
            return verdicts.pop()
        if HOLDS in verdicts:
            return PARTLY_HOLDS
        return CONTRADICTED if CONTRADICTED in verdicts else INCONCLUSIVE


def compare_hits(low: str, high: str, metric: str, low_hits: Tensor, high_hits: Tensor) -> Comparison:
    """Compare the results of two models on the same images.

    Args:
        low: Name of the value that should be lower.
        high: Name of the value that should be higher.
        metric: Name of the compared metric.
        low_hits, high_hits: Per-image hits of each model, of shape (seeds, images), with images in the same order.
    """
    difference = 100 * float(high_hits.mean() - low_hits.mean())
    means = _resample_means(high_hits, seed=2) - _resample_means(low_hits, seed=1)
    return Comparison(
        low=low,
        high=high,
        metric=metric,
        low_interval=bootstrap_interval(low_hits),
        high_interval=bootstrap_interval(high_hits),
        difference=(difference, *_compute_percent_limits(means, low_hits.shape[1], (-1.0, 1.0))),
    )


def bootstrap_interval(values: Tensor) -> Interval:
    """Return the mean in percent with its 95% confidence interval, using a bootstrap over images and seeds.

    If all values are equal, for example because no image was retrieved correctly, the interval is exact instead. See
    `percentile_interval`.

    Args:
        values: Per-image hits, or differences between hits, of shape (seeds, images).
    """
    bounds = (-1.0 if float(values.min()) < 0 else 0.0, 1.0)
    return 100 * float(values.mean()), *_compute_percent_limits(
        _resample_means(values, seed=1), values.shape[1], bounds
    )


def _resample_means(values: Tensor, seed: int) -> Tensor:
    """Return the means of bootstrap resamples over images and training seeds, of shape (resamples,).

    The resampled images depend only on the number of images, so both models in a comparison use the same resamples.
    Training seeds are resampled separately for each model, using the random seed `seed`.
    """
    num_seeds, num_images = values.shape
    values = values.double()
    generator = torch.Generator().manual_seed(seed)
    means = []
    for image_counts in bootstrap_counts(num_images):
        drawn_seeds = torch.randint(num_seeds, (num_seeds,), generator=generator)
        by_image = values[drawn_seeds].mean(0)  # (images,)
        means.append(by_image @ image_counts / num_images)
    return torch.stack(means)


def _compute_percent_limits(means: Tensor, num_images: int, bounds: tuple[float, float]) -> tuple[float, float]:
    """Return the lower and upper limits of the 95% confidence interval in percent. See `percentile_interval`."""
    low, high = (100 * percentile_interval(means, num_images, bounds)).tolist()
    return low, high
