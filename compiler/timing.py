"""Timing calls honestly: warm-up, the median of many, and its 95% interval by order statistics."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Timing:
    """Seconds of one call.

    Attributes:
        median_s: Of all calls after the warm-up.
        ci_s: 95% interval of the median, without assuming a distribution.
    """

    median_s: float
    ci_s: tuple[float, float]
    calls: int

    def to_json(self) -> dict[str, Any]:
        return {"latency_s": self.median_s, "ci_s": list(self.ci_s), "calls": self.calls}


def time_calls(
    call: Callable[[], object],
    *,
    budget_s: float = 2.0,
    warm_up: int = 3,
    least: int = 11,
    most: int = 1000,
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """Time a call until ``budget_s`` is spent, ``least`` times at least and ``most`` at most."""
    for _ in range(warm_up):
        call()
    seconds: list[float] = []
    started = clock()
    while len(seconds) < most and (len(seconds) < least or clock() - started < budget_s):
        begin = clock()
        call()
        seconds.append(clock() - begin)
    return summarize(seconds)


def summarize(seconds: Sequence[float]) -> Timing:
    """The median of some timings and its interval."""
    ordered = sorted(seconds)
    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else sum(ordered[middle - 1 : middle + 1]) / 2
    low, high = median_ranks(len(ordered))
    return Timing(median, (ordered[low], ordered[high]), len(ordered))


def median_ranks(count: int, confidence: float = 0.95) -> tuple[int, int]:
    """Indices of the ordered values between which the true median lies.

    The number of values below the median is binomial with p = 1/2; the widest symmetric pair is
    returned when ``count`` is too small for the confidence asked for.
    """
    tail = (1.0 - confidence) / 2
    below = 0.0
    low = 0
    for rank in range(count // 2):
        below += math.comb(count, rank) / 2.0**count if count < 1000 else 0.0
        if below > tail:
            break
        low = rank
    if count >= 1000:
        low = max(int(count / 2 - 1.96 * math.sqrt(count) / 2), 0)
    return low, count - 1 - low
