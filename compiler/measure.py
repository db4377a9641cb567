"""Timing what runs here: medians with a confidence interval, on the samples an artifact carries."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trivium.compiler.artifact import Artifact
from trivium.compiler.errors import BadInput
from trivium.compiler.verify import INPUTS, read_samples


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median and its 95% interval, from order statistics."""

    median: float
    lo: float
    hi: float
    runs: int


def time_runs(call: Callable[[], Any], *, runs: int = 100, seconds: float = 5.0) -> Timing:
    """Time a call after two warm-ups, until either bound is reached (five runs at least)."""
    for _ in range(2):
        call()
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 5 or (len(times) < runs and time.perf_counter() - started < seconds):
        before = time.perf_counter()
        call()
        times.append(time.perf_counter() - before)
    return summarize(times)


def summarize(times: list[float]) -> Timing:
    """Median and its distribution-free 95% interval (ranks n/2 -+ 0.98 sqrt(n))."""
    ordered = sorted(times)
    count = len(ordered)
    reach = 0.98 * count**0.5
    lo = ordered[max(0, int(count / 2 - reach))]
    hi = ordered[min(count - 1, int(count / 2 + reach))]
    middle = ordered[count // 2] if count % 2 else sum(ordered[count // 2 - 1 : count // 2 + 1]) / 2
    return Timing(middle, lo, hi, count)


def carried_feeds(artifact: Artifact) -> list[dict[str, Any]]:
    """The feeds that an artifact was verified on.

    Raises:
        BadInput: It carries none, because no reference could run at its compile.
    """
    path = artifact.path / INPUTS
    if not path.is_file():
        raise BadInput(
            "it carries no inputs", about=str(artifact.path), remedy="give --input X.npz"
        )
    return read_samples(path)
