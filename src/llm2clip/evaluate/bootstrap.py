"""Metrics with a bootstrap over images, for confidence intervals and for paired differences between two models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llm2clip.evaluate.benchmarks.base import ImageId
from llm2clip.evaluate.recall import bootstrap_counts, percentile_interval


@dataclass(frozen=True)
class BootstrapMetrics:
    """Metrics in percent, and their values in resamples of the images.

    Args:
        images: Index or id of each evaluated image.
        values: Value of each metric.
        resamples: Values of a metric in all resamples, float64 (resamples,). NaN where the metric is undefined. Metrics
            that are missing here have no confidence interval.
    """

    images: tuple[ImageId, ...]
    values: Mapping[str, float]
    resamples: Mapping[str, np.ndarray]

    @classmethod
    def compute(
        cls, images: Sequence[ImageId], names: Sequence[str], metrics: Callable[[np.ndarray], Sequence[float]]
    ) -> BootstrapMetrics:
        """Compute metrics on all images and on each resample.

        Args:
            images: Index or id of each evaluated image.
            names: Names of the metrics.
            metrics: Function that returns all metrics if image i is counted `weights[i]` times.
        """
        samples = np.array([metrics(weights.numpy()) for weights in bootstrap_counts(len(images))], np.float64)
        values = [float(value) for value in metrics(np.ones(len(images)))]
        return cls(
            images=tuple(images),
            values=dict(zip(names, values, strict=True)),
            resamples=dict(zip(names, samples.T, strict=True)),
        )

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """95% confidence interval of each metric."""
        return {name: self._interval(samples, (0.0, 100.0)) for name, samples in self.resamples.items()}

    def difference(self, baseline: BootstrapMetrics) -> dict[str, Any]:
        """Return each metric minus the metric of a baseline, in percentage points, and paired 95% intervals.

        The resamples are paired, because `bootstrap_counts` draws the same images for both models.

        Returns:
            {"metrics": {NAME: difference}, "intervals": {NAME: (low, high)}}. There are no intervals if the models were
            evaluated on different images.
        """
        names = [name for name in self.values if name in baseline.values]
        intervals = {}
        for name in names:
            if self.images == baseline.images and name in self.resamples:
                differences = self.resamples[name] - baseline.resamples[name]
                intervals[name] = self._interval(differences, (-100.0, 100.0))
        metrics = {name: self.values[name] - baseline.values[name] for name in names}
        return {"metrics": metrics, "intervals": intervals}

    def _interval(self, samples: np.ndarray, bounds: tuple[float, float]) -> tuple[float, float]:
        defined = torch.from_numpy(samples[~np.isnan(samples)])
        low, high = percentile_interval(defined, len(self.images), bounds).tolist()
        return low, high
