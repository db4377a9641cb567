"""What calibration learns of one tensor, batch by batch, in memory that does not grow.

An observer sees every batch once and keeps a few numbers or a histogram, never a value. The table
`OBSERVERS` is where another method joins; what a histogram is made into is in `thresholds`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import numpy as np

from trivium.compiler.passing import entering
from trivium.passes.quantization import thresholds
from trivium.passes.quantization.sharing import Inputs

Array = np.ndarray[Any, np.dtype[Any]]

BINS = 2048

MOMENTUM = 0.9
"""Weight of what a moving average held before a batch."""

QUANTILE = 0.99999
"""Share of the values that the percentile method keeps."""

WAYS = 3
"""How many ranges there are to choose from."""


class Observer(Protocol):
    """Learns the range of a tensor.

    Attributes:
        seen: How many values it was shown.
    """

    @property
    def seen(self) -> int: ...

    def update(self, values: Array) -> None:
        """Take in the values of one batch (any shape, finite)."""
        ...

    def range(self) -> tuple[float, float]:
        """The range to quantize; called after the last batch."""
        ...

    def state(self) -> Mapping[str, Array]:
        """What it has learnt, to be stored."""
        ...

    def restore(self, state: Mapping[str, Array]) -> None:
        """Go on from what was stored."""
        ...


OBSERVERS: dict[str, Callable[[int], Observer]] = {}
"""Calibration method -> how to make its observer, given the number of codes of the grid."""

observer = entering(OBSERVERS)


class Stored:
    """An observer whose whole state is a few attributes."""

    kept: ClassVar[tuple[str, ...]] = ()

    def state(self) -> Mapping[str, Array]:
        return {name: np.asarray(getattr(self, name)) for name in self.kept}

    def restore(self, state: Mapping[str, Array]) -> None:
        for name in self.kept:
            value = state[name]
            setattr(self, name, value if value.ndim else value.item())


@observer("minmax")
class MinMax(Stored):
    """The least and largest value ever seen."""

    kept: ClassVar[tuple[str, ...]] = ("seen", "low", "high")

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


@observer("moving-average")
class MovingAverage(Stored):
    """The moving average of each batch's least and largest value."""

    kept: ClassVar[tuple[str, ...]] = ("seen", "low", "high")

    def __init__(self, codes: int = 256) -> None:
        self.seen = 0
        self.low = self.high = 0.0

    def update(self, values: Array) -> None:
        if values.size == 0:
            return
        low, high = float(values.min()), float(values.max())
        share = MOMENTUM if self.seen else 0.0
        self.low = share * self.low + (1 - share) * low
        self.high = share * self.high + (1 - share) * high
        self.seen += values.size

    def range(self) -> tuple[float, float]:
        return self.low, self.high


class Histogram(MinMax):
    """Counts of the values in equal bins from ``-limit`` to ``limit``.

    ``limit`` doubles when a larger magnitude turns up: pairs of bins merge, so that one pass over
    the data is enough and no count is ever split. The exact zeros, of which padding and ReLU make
    many, are counted apart.
    """

    kept: ClassVar[tuple[str, ...]] = ("seen", "low", "high", "limit", "zeros", "counts")

    def __init__(self, codes: int = 256) -> None:
        super().__init__(codes)
        self.codes = codes
        self.limit = 0.0
        self.zeros = 0
        self.counts = np.zeros(2 * BINS, np.int64)
        """First the bins of the negative values, from ``-limit`` up to 0."""

    def update(self, values: Array) -> None:
        if values.size == 0:
            return
        super().update(values)
        largest = max(-self.low, self.high)
        if largest <= 0:
            self.zeros += values.size
            return
        self._reach(largest)
        flat = values.reshape(-1)
        scaled = flat * np.float32(BINS / self.limit)
        np.floor(scaled, out=scaled)
        np.clip(scaled, -BINS, BINS - 1, out=scaled)
        index = scaled.astype(np.int32)
        index += BINS
        self.counts += np.bincount(index, minlength=2 * BINS)
        zeros = flat.size - int(np.count_nonzero(flat))
        self.zeros += zeros
        self.counts[BINS] -= zeros

    def _reach(self, largest: float) -> None:
        if self.limit == 0.0:
            self.limit = largest
        while self.limit < largest:
            merged = self.counts.reshape(-1, 2).sum(axis=1)
            edge = np.zeros(BINS // 2, np.int64)
            self.counts = np.concatenate([edge, merged, edge])
            self.limit *= 2

    @property
    def magnitudes(self) -> Array:
        """Counts of ``|x|`` without the zeros, in bins from 0 to ``limit``."""
        folded: Array = self.counts[BINS:] + self.counts[:BINS][::-1]
        return folded

    def quantiles(self) -> tuple[float, float]:
        """The range of `QUANTILE` of the values."""
        if self.limit == 0.0:
            return MinMax.range(self)
        counts = self.counts.copy()
        counts[BINS] += self.zeros
        edges = np.linspace(-self.limit, self.limit, 2 * BINS + 1)
        low, high = thresholds.quantiles(counts, edges, QUANTILE)
        return max(self.low, low), min(self.high, high)

    def clipped(self, threshold: float) -> tuple[float, float]:
        """The range seen, as far as it lies within ``threshold`` of zero."""
        return max(self.low, -threshold), min(self.high, threshold)


@observer("entropy")
class Entropy(Histogram):
    """The range that loses least information (Kullback-Leibler divergence) when clipped to it.

    The method of Migacz, "8-bit inference with TensorRT" (GTC 2017): over thresholds t, the
    histogram of the magnitudes clipped to t against the same histogram on the grid's codes.
    """

    def range(self) -> tuple[float, float]:
        if self.limit == 0.0:
            return super().range()
        levels = self.codes // 2 if self.low < 0 else self.codes
        bins = thresholds.divergence_threshold(self.magnitudes, levels)
        return self.clipped(self.limit * bins / BINS)


@observer("percentile")
class Percentile(Histogram):
    """The range that leaves out the same small share of the values at either end."""

    def range(self) -> tuple[float, float]:
        return self.quantiles()


@observer("mse")
class MeanSquaredError(Histogram):
    """The range whose grid gives back the values with the least mean squared error."""

    def range(self) -> tuple[float, float]:
        if self.limit == 0.0:
            return super().range()
        middles = (np.arange(2 * BINS) + 0.5 - BINS) * (self.limit / BINS)
        return thresholds.least_squares(self.counts, middles, (self.low, self.high), self.codes)


@observer("auto")
class Several(MeanSquaredError):
    """Ranges chosen in several ways, of which the pass takes the best."""

    def ways(self) -> tuple[tuple[float, float], ...]:
        """By the least squared error; all of it; by the share of the values."""
        return self.range(), MinMax.range(self), self.quantiles()


def ways(one: Observer) -> tuple[tuple[float, float], ...]:
    """The ranges to choose from: the one of the method, unless that has several."""
    inner = one.first if isinstance(one, Both) else one
    return inner.ways() if isinstance(inner, Several) else (one.range(),) * WAYS


class Channels(Stored):
    """Something of each channel of a tensor."""

    def __init__(self, axis: int) -> None:
        self.axis = axis
        self.seen = 0

    def _flat(self, values: Array) -> Array:
        """[values, channels]."""
        return np.moveaxis(values, self.axis, -1).reshape(-1, values.shape[self.axis])

    def range(self) -> tuple[float, float]:
        raise NotImplementedError("this learns of channels, not of a range")


class ChannelRanges(Channels):
    """The least and largest value of each channel, and its mean square."""

    kept: ClassVar[tuple[str, ...]] = ("seen", "low", "high", "total", "rows")

    def __init__(self, axis: int) -> None:
        super().__init__(axis)
        self.low: Array = np.zeros(0, np.float32)
        self.high: Array = np.zeros(0, np.float32)
        self.total: Array = np.zeros(1)
        self.rows = 0

    def update(self, values: Array) -> None:
        flat = self._flat(values)
        low, high = flat.min(axis=0), flat.max(axis=0)
        self.low = np.minimum(self.low, low) if self.seen else low
        self.high = np.maximum(self.high, high) if self.seen else high
        self.total = self.total + np.einsum("ij,ij->j", flat, flat)
        self.rows += len(flat)
        self.seen += values.size

    @property
    def inputs(self) -> Inputs:
        return Inputs(self.low, self.high, np.asarray(self.total / max(self.rows, 1)))


class ChannelMeans(Channels):
    """The sum of each channel, and so its mean."""

    kept: ClassVar[tuple[str, ...]] = ("seen", "total", "rows")

    def __init__(self, axis: int) -> None:
        super().__init__(axis)
        self.total: Array = np.zeros(1)
        self.rows = 0

    def update(self, values: Array) -> None:
        flat = self._flat(values)
        self.total = self.total + flat.sum(axis=0, dtype=np.float64)
        self.rows += len(flat)
        self.seen += values.size

    @property
    def mean(self) -> Array:
        return np.asarray(self.total / max(self.rows, 1))


class Both:
    """Two observers of one tensor; the range is that of the first."""

    def __init__(self, first: Observer, second: Observer) -> None:
        self.first, self.second = first, second

    @property
    def seen(self) -> int:
        return self.first.seen

    def update(self, values: Array) -> None:
        self.first.update(values)
        self.second.update(values)

    def range(self) -> tuple[float, float]:
        return self.first.range()

    def state(self) -> Mapping[str, Array]:
        first, second = self.first.state(), self.second.state()
        return {f"first.{k}": v for k, v in first.items()} | {
            f"second.{k}": v for k, v in second.items()
        }

    def restore(self, state: Mapping[str, Array]) -> None:
        for name, one in (("first.", self.first), ("second.", self.second)):
            one.restore({k.removeprefix(name): v for k, v in state.items() if k.startswith(name)})
