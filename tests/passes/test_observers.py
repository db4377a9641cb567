"""Observers: one batch after another gives what all at once would, and entropy is what it says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trivium.passes.quantization.observers import (
    BINS,
    OBSERVERS,
    Entropy,
    Histogram,
    MeanSquaredError,
    MinMax,
    MovingAverage,
    Percentile,
    observer,
)
from trivium.passes.quantization.thresholds import divergence_threshold

Array = np.ndarray[Any, Any]


def slow_threshold(counts: Array, levels: int, stride: int) -> int:
    """Migacz's method as his slides have it, bin by bin."""
    counts = counts.astype(float).copy()
    counts[0] = counts[1]
    used = max(i + 1 for i in range(len(counts)) if counts[i] > 0)
    if used <= levels:
        return used
    candidates = [*range(levels, used, stride), used]
    best, chosen = float("inf"), used
    for bins in candidates:
        reference = list(counts[:bins])
        reference[bins - 1] += sum(counts[bins:])
        quantized = [0.0] * bins
        for level in range(levels):
            first, end = level * bins // levels, (level + 1) * bins // levels
            total = sum(counts[first:end])
            occupied = [i for i in range(first, end) if counts[i] > 0]
            for i in occupied:
                quantized[i] = total / len(occupied)
        if quantized[-1] == 0:
            quantized[-1] = 1e-4
        divergence, total = 0.0, sum(quantized)
        for p, q in zip(reference, quantized, strict=True):
            if p > 0:
                divergence += p / sum(reference) * np.log(p / sum(reference) / (q / total))
        if divergence <= best + 1e-12:
            best, chosen = divergence, bins
    return chosen


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), levels=st.sampled_from([8, 16, 32]))
def test_the_threshold_is_the_one_of_the_slides(seed: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    tail = rng.choice(["normal", "laplace", "lognormal", "sparse"])
    draws: dict[str, Array] = {
        "normal": rng.standard_normal(2000),
        "laplace": rng.laplace(size=2000),
        "lognormal": rng.lognormal(size=2000),
        "sparse": rng.choice([0.0, 0.1, 0.5, 3.0], 2000),
    }
    values = draws[str(tail)]
    counts, _ = np.histogram(np.abs(values), bins=128)
    fast = divergence_threshold(counts, levels, stride=3)
    slow = slow_threshold(counts, levels, stride=3)
    assert fast == slow


def test_entropy_cuts_a_lone_outlier_and_keeps_a_full_range() -> None:
    rng = np.random.default_rng(0)
    body = rng.uniform(-1, 1, 100_000).astype(np.float32)
    cut = Entropy(256)
    cut.update(np.append(body, np.float32(40)))
    low, high = cut.range()
    assert low == body.min()
    assert 1 <= high < 8
    kept = Entropy(256)
    kept.update(body)
    assert kept.range() == pytest.approx((-1, 1), rel=0.02)


@settings(max_examples=50, deadline=None)
@given(
    batches=st.lists(
        st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20), min_size=1, max_size=8
    )
)
def test_batches_add_up(batches: list[list[float]]) -> None:
    arrays = [np.array(batch, np.float32) for batch in batches]
    whole = np.concatenate(arrays)
    for cls in (MinMax, Histogram):
        one = cls()
        for array in arrays:
            one.update(array)
        assert one.seen == whole.size
        assert (one.low, one.high) == (whole.min(), whole.max())
    histogram = Histogram()
    for array in arrays:
        histogram.update(array)
    assert histogram.counts.sum() + histogram.zeros == whole.size
    assert histogram.zeros == np.count_nonzero(whole == 0)
    if histogram.limit:
        # Every count lies in the bin of its value, to the rounding of a float32 product.
        ordered = np.sort(whole[whole != 0].astype(np.float64))
        width = histogram.limit / BINS
        bins = np.repeat(np.arange(2 * BINS), histogram.counts) - BINS
        assert (np.abs(ordered / width - bins - 0.5) <= 0.5 + 1e-2).all()


@pytest.mark.parametrize("name", sorted(OBSERVERS))
def test_a_stored_state_goes_on_where_it_was(name: str) -> None:
    rng = np.random.default_rng(1)
    first, second = rng.standard_normal(500), rng.standard_normal(500) * 3
    whole, part, later = (OBSERVERS[name](256) for _ in range(3))
    for batch in (first, second):
        whole.update(batch.astype(np.float32))
    part.update(first.astype(np.float32))
    later.restore(part.state())
    later.update(second.astype(np.float32))
    assert later.seen == whole.seen == 1000
    assert later.range() == whole.range()


def test_a_moving_average_forgets() -> None:
    average = MovingAverage()
    for high in (1.0, 2.0, 3.0):
        average.update(np.array([-1, high], np.float32))
    assert average.range() == pytest.approx((-1, 0.9 * (0.9 * 1 + 0.1 * 2) + 0.1 * 3))


@pytest.mark.parametrize("seed", range(3))
def test_percentile_is_numpy_s_to_the_width_of_a_bin(seed: int) -> None:
    values = np.random.default_rng(seed).laplace(1.0, 1.0, 400_000).astype(np.float32)
    values[:100_000] = np.maximum(values[:100_000], 0)
    one = Percentile()
    for batch in np.split(values, 4):
        one.update(batch)
    width = one.limit / BINS
    low, high = np.quantile(values, [5e-6, 1 - 5e-6])
    # Beside the width of a bin, a tail of two values may be cut between them.
    assert one.range() == pytest.approx((low, high), abs=width + 0.5)
    assert one.range()[1] < values.max()


def quantized_error(values: Array, low: float, high: float, codes: int) -> float:
    scale = (high - low) / (codes - 1)
    zero = np.rint(low / scale)
    lattice = np.clip(np.rint(values / scale), zero, zero + codes - 1) * scale
    return float(np.mean((values - lattice) ** 2))


@pytest.mark.parametrize("codes", [4, 16, 256])
@pytest.mark.parametrize("draw", ["normal", "laplace", "relu"])
def test_mse_is_near_the_best_of_a_search(draw: str, codes: int) -> None:
    rng = np.random.default_rng(2)
    values = {
        "normal": rng.standard_normal(8_000),
        "laplace": rng.laplace(size=8_000),
        "relu": np.maximum(rng.standard_normal(8_000), 0),
    }[draw].astype(np.float32)
    one = MeanSquaredError(codes)
    one.update(values)
    found = quantized_error(values, *one.range(), codes)
    lows, highs = (np.linspace(0.02, 1, 50) * end for end in (values.min(), values.max()))
    best = min(quantized_error(values, low, high, codes) for low in {*lows} for high in highs)
    assert found < 1.08 * best
    assert found <= quantized_error(values, values.min(), values.max(), codes) * (1 + 1e-6)


def test_two_observers_cannot_share_a_name() -> None:
    assert set(OBSERVERS) == {"minmax", "entropy", "moving-average", "percentile", "mse", "auto"}
    with pytest.raises(ValueError, match="two entries for minmax"):
        observer("minmax")(MinMax)
