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
    MinMax,
    divergence_threshold,
    observer,
)

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
    assert histogram.counts.sum() == whole.size
    if histogram.limit:
        # Every count lies in the bin of its value, to the rounding of a float32 product.
        magnitudes = np.sort(np.abs(whole.astype(np.float64)))
        width = histogram.limit / BINS
        bins = np.repeat(np.arange(BINS), histogram.counts)
        # What came while all was zero is in the first bin, whatever the limit became.
        assert (np.abs(magnitudes / width - bins - 0.5) <= 0.5 + 1e-2).all()


def test_two_observers_cannot_share_a_name() -> None:
    assert set(OBSERVERS) == {"minmax", "entropy"}
    with pytest.raises(ValueError, match="two observers are called 'minmax'"):
        observer("minmax")(MinMax)
