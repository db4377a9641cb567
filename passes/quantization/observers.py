"""What calibration learns of one tensor, batch by batch, in memory that does not grow.

An observer sees every batch once and keeps a few numbers or a histogram, never a value. The table
`OBSERVERS` is where another method joins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

BINS = 2048

TRACE = 1e-4
"""Of a count, for what the grid cannot give (the smoothing that MXNet and ONNX Runtime use)."""


class Observer(Protocol):
    """Learns the range of a tensor.

    Attributes:
        seen: How many values it was shown.
    """

    seen: int

    def update(self, values: Array) -> None:
        """Take in the values of one batch (any shape, finite)."""
        ...

    def range(self) -> tuple[float, float]:
        """The range to quantize; called after the last batch."""
        ...


OBSERVERS: dict[str, Callable[[int], Observer]] = {}
"""Calibration method -> how to make its observer, given the number of codes of the grid."""


def observer(name: str) -> Callable[[type[Any]], type[Any]]:
    """Register an observer under the name that recipes use."""

    def register(cls: type[Any]) -> type[Any]:
        if name in OBSERVERS:
            raise ValueError(f"two observers are called {name!r}")
        OBSERVERS[name] = cls
        return cls

    return register


@observer("minmax")
class MinMax:
    """The least and largest value ever seen."""

    def __init__(self, codes: int = 256) -> None:
        self.seen = 0
        self.low, self.high = float("inf"), float("-inf")

    def update(self, values: Array) -> None:
        if values.size == 0:
            return
        self.seen += values.size
        self.low = min(self.low, float(values.min()))
        self.high = max(self.high, float(values.max()))

    def range(self) -> tuple[float, float]:
        return (self.low, self.high) if self.seen else (0.0, 0.0)


class Histogram(MinMax):
    """Counts of the magnitudes ``|x|`` in equal bins from 0 to ``limit``.

    ``limit`` doubles when a larger magnitude turns up: pairs of bins merge, so that one pass over
    the data is enough and no count is ever split.
    """

    def __init__(self, codes: int = 256) -> None:
        super().__init__(codes)
        self.codes = codes
        self.limit = 0.0
        self.counts = np.zeros(BINS, np.int64)

    def update(self, values: Array) -> None:
        if values.size == 0:
            return
        super().update(values)
        largest = max(-self.low, self.high)
        if largest <= 0:
            self.counts[0] += values.size
            return
        self._reach(largest)
        magnitudes = np.abs(values.reshape(-1))
        magnitudes *= np.float32(BINS / self.limit)
        index = magnitudes.astype(np.intp)
        np.minimum(index, BINS - 1, out=index)
        self.counts += np.bincount(index, minlength=BINS)

    def _reach(self, largest: float) -> None:
        if self.limit == 0.0:
            self.limit = largest
        while self.limit < largest:
            merged = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.concatenate([merged, np.zeros(BINS // 2, np.int64)])
            self.limit *= 2


@observer("entropy")
class Entropy(Histogram):
    """The range that loses least information (Kullback-Leibler divergence) when clipped to it.

    The method of Migacz, "8-bit inference with TensorRT" (GTC 2017): over thresholds t, the
    histogram of the magnitudes clipped to t against the same histogram on the grid's codes.
    """

    def range(self) -> tuple[float, float]:
        low, high = super().range()
        if self.limit == 0.0:
            return low, high
        signed = low < 0
        levels = self.codes // 2 if signed else self.codes
        bins = divergence_threshold(self.counts, levels)
        threshold = self.limit * bins / BINS
        return max(low, -threshold), min(high, threshold)


def divergence_threshold(counts: Array, levels: int, *, stride: int = 8) -> int:
    """Return how many of the histogram's first bins to keep.

    Args:
        counts: Histogram of magnitudes, equal bins from zero.
        levels: Codes that the grid has for them.
        stride: Thresholds tried are ``levels``, ``levels + stride``, ... bins.
    """
    counts = counts.astype(np.float64)
    # The first bin holds the exact zeros (padding, ReLU), which every threshold represents
    # exactly; left in, they would drown all else.
    counts[0] = counts[1]
    used = int(np.flatnonzero(counts)[-1]) + 1 if counts.any() else 0
    if used <= levels:
        return max(used, 1)
    best, chosen = float("inf"), used
    tail = np.concatenate([np.cumsum(counts[::-1])[::-1], [0.0]])
    for bins in sorted({*range(levels, used, stride), used}):
        divergence = _divergence(counts[:bins], tail[bins], levels)
        # Of equals the widest: a histogram of a few spikes loses nothing wherever it is cut.
        if divergence <= best + 1e-12:
            best, chosen = divergence, bins
    return chosen


def _divergence(kept: Array, clipped: float, levels: int) -> float:
    """KL(P || Q): P the kept bins with what was clipped in the last, Q its image on the levels."""
    starts = np.arange(levels) * len(kept) // levels
    occupied = kept > 0
    sums = np.add.reduceat(kept, starts)
    filled = np.add.reduceat(occupied.astype(np.float64), starts)
    widths = np.diff(np.append(starts, len(kept)))
    spread = np.repeat(sums / np.maximum(filled, 1.0), widths)
    approximation = np.where(occupied, spread, 0.0)
    reference = kept.copy()
    reference[-1] += clipped
    if approximation[-1] == 0:
        # Where only clipped values land, Q has nothing: a trace keeps the divergence finite.
        approximation[-1] = TRACE
    total_p, total_q = reference.sum(), approximation.sum()
    if total_p == 0 or total_q == 0:
        return float("inf")
    at = reference > 0
    p, q = reference[at] / total_p, approximation[at] / total_q
    return float(np.sum(p * np.log(p / q)))
