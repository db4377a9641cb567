"""From a histogram to the range that a grid should cover: by information, by share, by error."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

TRACE = 1e-4
"""Of a count, for what the grid cannot give (the smoothing that MXNet and ONNX Runtime use)."""


def quantiles(counts: Array, edges: Array, share: float) -> tuple[float, float]:
    """Return the values below and above which lie ``(1 - share) / 2`` of the counts each.

    Args:
        counts: Of a histogram; within a bin values count as spread evenly.
        edges: Of its bins, one more than there are counts.
    """
    total = np.concatenate([[0], np.cumsum(counts)])
    rest = (1.0 - share) / 2 * total[-1]
    at = np.flatnonzero(counts)
    # np.interp needs a rising curve: only the bins that hold something.
    curve = np.append(total[at], total[-1])
    low_edges = np.append(edges[at], edges[at[-1] + 1])
    low = float(np.interp(rest, curve, low_edges))
    high_curve = np.concatenate([[0], total[at + 1]])
    high_edges = np.concatenate([[edges[at[0]]], edges[at + 1]])
    high = float(np.interp(total[-1] - rest, high_curve, high_edges))
    return low, high


def least_squares(
    counts: Array, middles: Array, span: tuple[float, float], codes: int, *, steps: int = 64
) -> tuple[float, float]:
    """Return the part of a range whose grid of ``codes`` values has the least squared error.

    Either end is drawn in, in ``steps`` steps towards zero, as long as that helps: first both by
    the same share, then each by itself.

    Args:
        counts: Of a histogram.
        middles: Of its bins.
        span: Least and largest value; zero is always included.
    """
    at = np.flatnonzero(counts)
    weights, values = counts[at].astype(np.float64), middles[at]
    low, high = min(span[0], 0.0), max(span[1], 0.0)

    def error(bounds: tuple[float, float]) -> float:
        scale = (bounds[1] - bounds[0]) / (codes - 1)
        if scale <= 0:
            return float(np.sum(weights * values**2))
        zero = np.rint(bounds[0] / scale)
        lattice = np.clip(np.rint(values / scale), zero, zero + codes - 1) * scale
        return float(np.sum(weights * (values - lattice) ** 2))

    shares = np.arange(steps, 0, -1) / steps
    best = min(((low * s, high * s) for s in shares), key=error)
    best = min(((low * s, best[1]) for s in shares), key=error)
    return min(((best[0], high * s) for s in shares), key=error)


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
