"""Tally, mergeable sums by key; and Distribution, the distribution of a quantity read off such sums.

Histograms have bins 2 % wide on a logarithmic scale, so a percentile is within 1 % of the nearest-rank percentile of
the values; below 1e-10 counts as 0. Minimum, maximum, means and counts are exact. All values are in nats.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

TINY, GROWTH = 1e-10, 1.02  # nats below which a value counts as 0, and the width of a histogram's bins
LOG_GROWTH = math.log(GROWTH)


@dataclass
class Tally:
    """Sums by integer key: keys [K] ascending, sums [K, C] float64."""

    keys: np.ndarray
    sums: np.ndarray

    @staticmethod
    def of(keys: np.ndarray, *weights: np.ndarray | None) -> "Tally":
        """One column of sums for each weight [N]; None counts."""
        if not len(keys):
            return Tally(np.zeros(0, np.int64), np.zeros((0, len(weights))))
        low, high = int(keys.min()), int(keys.max())
        if high - low < 1 << 22:
            distinct, index = np.arange(low, high + 1), keys - low
        else:
            distinct, index = np.unique(keys, return_inverse=True)
        sums = np.stack([np.bincount(index, w, len(distinct)).astype(np.float64) for w in weights], -1)
        present = np.bincount(index, minlength=len(distinct)) > 0
        return Tally(distinct[present], sums[present])

    def merge(self, other: "Tally") -> "Tally":
        """Sum of two tallies with equal columns."""
        return Tally.of(np.concatenate([self.keys, other.keys]), *np.concatenate([self.sums, other.sums]).T)

    def between(self, low: int, half: int) -> "Tally":
        """The part with low <= key < low + 2 * half, its keys counted from the middle of that."""
        part = slice(*np.searchsorted(self.keys, [low, low + 2 * half]))
        return Tally(self.keys[part] - low - half, self.sums[part])


def bin_numbers(values: np.ndarray) -> np.ndarray:
    """Signed number of each finite value's bin: 0 below TINY, n for TINY * GROWTH^(n-1) <= value < TINY * GROWTH^n."""
    size = np.abs(values)
    with np.errstate(divide="ignore"):
        number = np.floor((np.log(size) - math.log(TINY)) / LOG_GROWTH) + 1
    return np.copysign(np.where(size < TINY, 0.0, number), values).astype(np.int64)


def middle(number: int) -> float:
    """The value that stands for a bin."""
    return math.copysign(TINY * math.exp((abs(number) - 0.5) * LOG_GROWTH), number) if number else 0.0


def percentile_of(numbers: np.ndarray, counts: np.ndarray, percent: int | float) -> float:
    """The nearest-rank percentile of a histogram with ascending bin numbers."""
    rank = round((counts.sum() - 1) * percent / 100)
    return middle(int(numbers[np.searchsorted(np.cumsum(counts), rank, side="right")]))


def moments(values: np.ndarray, valid: np.ndarray, sequence: np.ndarray) -> list[Any]:
    """The sums that a Distribution is read off: values [N] where `valid`, sequence [N] numbers a token's sequence.

    Over sequences with a finite value: 1, n, s, n^2, n*s, s^2 (n finite values adding up to s). Over those of them
    without a non-finite value: 1, s, s^2. Non-finite values.
    """
    finite = np.isfinite(values) & valid
    n, nonfinite = np.bincount(sequence, finite), np.bincount(sequence, valid & ~finite)
    s = np.bincount(sequence, np.where(finite, values, 0.0))
    whole = s[(n > 0) & (nonfinite == 0)]
    return [
        np.sum(n > 0),
        n.sum(),
        s.sum(),
        n @ n,
        n @ s,
        s @ s,
        len(whole),
        whole.sum(),
        whole @ whole,
        nonfinite.sum(),
    ]


@dataclass
class Distribution:
    """Distribution of one quantity's finite values (at least one) over tokens and over sequences."""

    low: float
    high: float
    moments: np.ndarray  # see `moments`
    bins: Tally

    @property
    def count(self) -> int:
        """Finite values."""
        return int(self.moments[1])

    @property
    def nonfinite(self) -> int:
        return int(self.moments[9])

    @property
    def mean(self) -> float:
        """Over tokens."""
        return float(self.moments[2] / self.moments[1])

    @property
    def standard_error(self) -> float | None:
        """Standard error of `mean`, clustered by sequence; None for fewer than two sequences.

        With G sequences of n_g values adding up to s_g, mean m = sum s / sum n, the variance of a ratio of sums:
        G / (G - 1) * sum_g (s_g - m n_g)^2 / (sum_g n_g)^2. Cluster-robust ("CR1") standard error of a mean.
        """
        g, n, _, nn, ns, ss = self.moments[:6].tolist()
        residual = ss - 2 * self.mean * ns + self.mean**2 * nn
        return math.sqrt(max(residual, 0.0) * g / (g - 1)) / n if g > 1 else None

    @property
    def sequence_mean(self) -> float | None:
        """Mean over sequences of the sum over a sequence's tokens, without those that have a non-finite value."""
        return float(self.moments[7] / self.moments[6]) if self.moments[6] else None

    @property
    def sequence_standard_error(self) -> float | None:
        """Standard error of `sequence_mean`: standard deviation / sqrt(sequences); None for fewer than two."""
        g, s, ss = self.moments[6:9].tolist()
        return math.sqrt(max(ss - s * s / g, 0.0) / (g - 1) / g) if g > 1 else None

    def percentile(self, percent: int | float) -> float:
        """Within 1 % of the nearest-rank percentile."""
        return min(max(percentile_of(self.bins.keys, self.bins.sums[:, 0], percent), self.low), self.high)

    def histogram(self, bins: int = 60) -> tuple[list[float], list[int], int]:
        """For drawing: edges (at most bins + 1, ascending, evenly spaced on a logarithmic axis), the counts between
        them, and how many values lie below the first edge (those under 1e-10, and negative ones)."""
        positive = self.bins.keys > 0
        numbers, counts = self.bins.keys[positive], self.bins.sums[positive, 0]
        below = self.count - int(counts.sum())
        if not len(numbers):
            return [], [], below
        first = int(numbers[0])
        width = -(-(int(numbers[-1]) - first + 1) // bins)
        drawn = np.bincount((numbers - first) // width, counts).astype(int).tolist()
        return [TINY * math.exp((first - 1 + i * width) * LOG_GROWTH) for i in range(len(drawn) + 1)], drawn, below
