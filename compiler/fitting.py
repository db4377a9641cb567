"""Fitting a few coefficients to a few measurements, in logarithms and with a prior.

Levenberg's damped steps on errors that count less the larger they are, so that a point or two that
went wrong do not move the rest. ``benchmarks/fitting.py`` does the same with scipy for thousands of
points; here numpy has to do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from trivium.compiler.calibration import spread_of

Array = np.ndarray[Any, Any]
Predict = Callable[[Mapping[str, float]], Array]
"""Seconds of every point for some coefficients."""


def fit(
    predict: Predict,
    seconds: Array,
    prior: Mapping[str, float],
    free: Sequence[str],
    bounds: Mapping[str, tuple[float, float]],
    pull: float = 0.03,
    start: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Choose the free coefficients; those that the points say nothing of stay at the prior.

    Args:
        pull: How much an e-fold off the prior weighs, against an e-fold off the points.
        start: Where to begin, if not at the prior.
    """
    low = np.log([bounds[name][0] for name in free])
    high = np.log([bounds[name][1] for name in free])
    center = np.clip(np.log([prior[name] for name in free]), low, high)
    first = np.clip(np.log([(start or prior)[name] for name in free]), low, high)

    def made(logs: Array) -> dict[str, float]:
        return {**prior, **dict(zip(free, np.exp(logs).tolist(), strict=True))}

    def errors(logs: Array) -> Array:
        off = np.log(seconds / predict(made(logs)))
        # Beyond a half an error grows with its root: an outlier pulls, but not without end.
        robust = np.sign(off) * np.where(np.abs(off) < 0.5, np.abs(off), np.sqrt(np.abs(off) / 2))
        return np.concatenate([robust / np.sqrt(len(seconds)), pull * (logs - center)])

    now, damping = first, 1e-3
    value = errors(now)
    for _ in range(60):
        step = 1e-3
        slopes = np.stack(
            [(errors(now + step * one) - value) / step for one in np.eye(len(now))], axis=1
        )
        moved = False
        for _ in range(8):
            square = slopes.T @ slopes + damping * np.eye(len(now))
            then = np.clip(now - np.linalg.solve(square, slopes.T @ value), low, high)
            new = errors(then)
            if new @ new < value @ value:
                moved = (value @ value - new @ new) > 1e-9
                now, value, damping = then, new, damping / 3
                break
            damping *= 4
        if not moved:
            break
    return made(now)


def spread(
    predict: Predict,
    seconds: Array,
    prior: Mapping[str, float],
    free: Sequence[str],
    bounds: Mapping[str, tuple[float, float]],
    parts: int = 5,
    start: Mapping[str, float] | None = None,
) -> float:
    """What points say of themselves: each part (as many as points: each of them) predicted by a
    fit to the others, begun at ``start``."""
    found: list[float] = []
    index = np.arange(len(seconds))
    for part in range(min(parts, len(seconds))):
        out = index % parts == part
        c = fit(_only(predict, ~out), seconds[~out], prior, free, bounds, start=start)
        found += np.log(seconds[out] / predict(c)[out]).tolist()
    return spread_of(found)


def _only(predict: Predict, rows: Array) -> Predict:
    return lambda c: np.asarray(predict(c)[rows])
