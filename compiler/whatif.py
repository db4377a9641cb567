"""What would have to change for a candidate that lost to win, and which candidates nothing beats.

An answer is a figure that somebody can act on: the price of an hour at which it would be cheapest,
how much faster its bottleneck would have to be, the limit that would let it in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from trivium.compiler.report.units import bytes_, digits, seconds
from trivium.compiler.rows import row, seconds_of
from trivium.compiler.types import Candidate

BOTTLENECK = {
    "compute": "its arithmetic",
    "memory": "its memory",
    "launch": "starting calls and kernels",
    "link": "its links",
}

AXES = ("latency_s", "energy_per_sample_j", "usd_per_million", "memory_bytes")
"""What the Pareto front is over, with the accuracy's drop where that is known; less is better."""


def faster(candidate: Candidate, times: float) -> str:
    """How much faster a call would have to be, and what takes its time."""
    bound = (candidate.estimate.bound if candidate.estimate else None) or "none"
    where = f", most of which is {BOTTLENECK[bound]}" if bound in BOTTLENECK else ""
    now = seconds_of(candidate)
    wanted = "" if now is None else f": {seconds(now / times)} instead of {seconds(now)}"
    return f"its call were {digits(times)} times faster{wanted}{where}"


def cheaper(candidate: Candidate, usd_per_million: float) -> str:
    """The price of an hour at which a million samples would cost so much."""
    time = seconds_of(candidate)
    if not time:
        return ""
    target = candidate.target
    hourly = usd_per_million / 1e6 * candidate.samples / time * 3600.0 / target.chips
    now = target.usd_per_hour
    known = f"instead of ${digits(now)}" if now is not None else "(its price is unknown: --prices)"
    chip = " of a chip" if target.chips > 1 else ""
    return f"an hour{chip} cost ${digits(hourly)} or less {known}"


def thriftier(candidate: Candidate, joules_per_sample: float) -> str:
    """The power at which a sample would take so much energy."""
    time = seconds_of(candidate)
    if not time:
        return ""
    watts = joules_per_sample * candidate.samples / time
    return f"it drew {digits(watts)} W or less while it works"


def smaller(candidate: Candidate, limit: float) -> str:
    """What would bring its memory under a limit."""
    peak = row(candidate)["memory_bytes"]
    over = "" if peak is None else f" by {bytes_(peak - limit)}"
    return f"it needed less memory{over}: a recipe of fewer bits, a smaller batch, or more chips"


def pareto(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Mark the candidates that no other beats; those that cannot run are not marked.

    One beats another that is at least as good in every figure and better in one. What is unknown
    is the worst, so that ignorance wins nothing; without a latency a candidate is not on the front.
    """
    figures = [_figures(candidate) for candidate in candidates]
    marked = []
    for candidate, mine in zip(candidates, figures, strict=True):
        runs = candidate.feasible and seconds_of(candidate) is not None
        beaten = any(
            other is not mine and _beats(other, mine) for other in figures if other is not None
        )
        marked.append(replace(candidate, pareto=runs and mine is not None and not beaten))
    return marked


def _figures(candidate: Candidate) -> list[float] | None:
    if not candidate.feasible or seconds_of(candidate) is None:
        return None
    shown = row(candidate)
    worst = float("inf")
    figures = [worst if shown[axis] is None else float(shown[axis]) for axis in AXES]
    drop = (candidate.quality or {}).get("drop")
    return [*figures, worst if drop is None else max(float(drop), 0.0)]


def _beats(one: list[float], other: list[float] | None) -> bool:
    if other is None:
        return False
    return all(a <= b for a, b in zip(one, other, strict=True)) and one != other
