"""What a claim comes to: comparisons of figures with their intervals, and a verdict.

One holds where the bootstrap intervals of its two sides do not touch; it points that way where only the interval of
their difference, image by image, is above zero; else the two are not told apart, or it is the other way round.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llm2clip.evaluate.recall import bootstrap_counts, percentile_interval

Interval = tuple[float, float, float]  # a mean, and the ends of its interval
HOLDS, WAY, ALIKE, REVERSED = "holds", "points that way", "not told apart", "the other way round"
UNTESTED = "not tested"
TITLES = {
    1: "Raw LLMs are poor caption encoders, and caption-contrastive tuning repairs it",
    2: "A raw LLM as the text tower hurts retrieval; tuned on captions it beats one tuned on general text pairs, which "
    "beats a text tower that is no LLM",
    3: "The gain is largest on long captions",
    4: "Training in English alone carries over to another language with a multilingual LLM, and not with an English "
    "encoder",
    5: "A larger LLM helps a little",
    6: "With the cached teacher, training costs what fine-tuning CLIP costs",
}


@dataclass
class Comparison:
    """Whether one figure is below another."""

    low: str
    high: str
    of: str
    low_figure: Interval
    high_figure: Interval
    difference: Interval

    @property
    def verdict(self) -> str:
        if self.low_figure[2] < self.high_figure[1]:
            return HOLDS
        if self.difference[1] > 0:
            return WAY
        return REVERSED if self.difference[2] < 0 else ALIKE


@dataclass
class Claim:
    """What one claim came to.

    Args:
        number: 1 to 6.
        paper: the paper's figures that it rests on, in a line.
        header, rows: a table of what was measured.
        comparisons: of which it is made.
        notes: what a reader must know to weigh it.
        points, curves: to draw: the names of the points, and of each curve its figures there.
    """

    number: int
    paper: str = ""
    header: list[str] = field(default_factory=list)
    rows: list[list[Any]] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    points: list[str] = field(default_factory=list)
    curves: dict[str, list[Interval]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return TITLES[self.number]

    @property
    def verdict(self) -> str:
        verdicts = {c.verdict for c in self.comparisons}
        if not verdicts:
            return UNTESTED
        if len(verdicts) == 1 and REVERSED not in verdicts:
            return verdicts.pop()
        if HOLDS in verdicts:
            return "holds in part"
        return "does not hold" if REVERSED in verdicts else ALIKE


def bootstrap_interval(values: Tensor) -> Interval:
    """Mean of values in percent, and its 95% interval by a bootstrap of images and of seeds.

    Args:
        values: (seeds, images), 0 to 1, or gains, -1 to 1. Where all are alike, as none found, the interval reaches
            3 / images further: the rule of three (JAMA 249:1743, 1983).
    """
    low, high = shown_ends(resampled_means(values))
    if values.min() == values.max():
        reach, least = 300 / values.shape[1], -100.0 if float(values.min()) < 0 else 0.0
        low, high = max(least, low - reach), min(100.0, high + reach)
    return 100 * float(values.mean()), low, high


def compare_hits(low: str, high: str, of: str, low_values: Tensor, high_values: Tensor) -> Comparison:
    """Of values (seeds, images) of either side, the same images in the same order, each side with seeds of its own."""
    low_ends, high_ends = bootstrap_interval(low_values), bootstrap_interval(high_values)
    middle = 100 * float(high_values.mean() - low_values.mean())
    reach = shown_ends(resampled_means(high_values, 1) - resampled_means(low_values))
    return Comparison(low, high, of, low_ends, high_ends, (middle, *reach))


def resampled_means(values: Tensor, side: int = 0) -> Tensor:
    """Means of images and seeds drawn anew, (resamples,); the images are the same for all sides, the seeds are not."""
    (seeds, images), values = values.shape, values.double()
    generator = torch.Generator().manual_seed(1 + side)

    def by_image() -> Tensor:
        return values[torch.randint(seeds, (seeds,), generator=generator)].mean(0)

    return torch.stack([by_image() @ times / images for times in bootstrap_counts(images)])


def shown_ends(means: Tensor) -> tuple[float, float]:
    """The ends of resampled means, in percent."""
    low, high = (100 * percentile_interval(means)).tolist()
    return low, high
