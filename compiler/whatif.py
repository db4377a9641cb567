"""What would have to change for a candidate that lost to win, and which candidates nothing beats.

An answer is a figure that somebody can act on: the price of an hour at which it would be cheapest,
how much faster its bottleneck would have to be, the batch or the prompt that would let it in. It
reads after "would win if".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from trivium.compiler.report.units import bytes_, digits, seconds
from trivium.compiler.rows import figure_of, seconds_of
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
    """How much faster a call would have to be, and whether its bottleneck alone can do it."""
    call = "its generation" if candidate.tokens else "its call"
    now = seconds_of(candidate)
    if now is None:
        return f"{call} were {digits(times)} times faster"
    wanted = now / times
    text = f"{call} were {digits(times)} times faster: {seconds(wanted)} instead of {seconds(now)}"
    bound = (candidate.estimate.bound if candidate.estimate else None) or "none"
    if bound not in BOTTLENECK:
        return text
    takes = _share(candidate, now) * now
    left = now - takes
    what = f"{BOTTLENECK[bound]} {'take' if bound == 'link' else 'takes'} {seconds(takes)}"
    if left < wanted:
        return f"{text}; {what} of that, which would have to be {seconds(wanted - left)}"
    return f"{text}; {what} of that, and without it {seconds(left)} are left"


def _share(candidate: Candidate, now: float) -> float:
    """The part of a call that its bottleneck takes; what is in no kernel starts the call."""
    estimate = candidate.estimate
    if estimate is None or not estimate.by_op:
        return 1.0
    own = sum(op.seconds for op in estimate.by_op if op.bound == estimate.bound)
    if estimate.bound == "launch":
        own += max(now - sum(op.seconds for op in estimate.by_op), 0.0)
    return min(own / now, 1.0)


def sooner(candidate: Candidate, value: float, limit: float) -> str:
    """What would bring a first token within a limit: fewer prompts at once, or shorter ones."""
    times = value / limit
    text = f"its prompts were read {digits(times)} times faster"
    together = int(candidate.batch / times)
    if candidate.batch > 1 and together:
        return f"{text}, or about {together} of them went together instead of {candidate.batch}"
    prompt = int((candidate.serving or {}).get("prompt_tokens") or 0)
    each = int(prompt * candidate.batch / times)
    one = "each had" if candidate.batch == 1 else "one went alone and had"
    return f"{text}, or {one} about {each} tokens instead of {prompt}" if each else text


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


def thriftier(candidate: Candidate, joules: float, wanted: float) -> str:
    """The power, or the speed, at which a sample would take so much energy."""
    time = seconds_of(candidate)
    if not time:
        return ""
    watts, now = (one * candidate.samples / time for one in (wanted, joules))
    return (
        f"it drew {digits(watts)} W instead of {digits(now)} while it works, or were "
        f"{digits(joules / wanted)} times faster at that"
    )


def capped(candidate: Candidate, limit: float) -> str:
    """The cap at which its chips would keep a limit on power."""
    chips = candidate.target.chips
    each = "each of its chips" if chips > 1 else "it"
    return f"{each} were capped at {digits(limit / chips)} W, which would slow it down"


def smaller(candidate: Candidate, limit: float) -> str:
    """What would bring its memory under a limit."""
    peak = figure_of(candidate, "memory_bytes")
    over = "" if peak is None or peak <= limit else f" by {bytes_(peak - limit)}"
    fits = (candidate.serving or {}).get("largest_batch")
    known = candidate.target.memory_bytes
    several = fits and known is not None and limit >= known and candidate.batch > fits
    batch = f"a batch of {fits} or less" if several else "a smaller batch"
    ways = ["a recipe of fewer bits", *([batch] if candidate.batch > 1 else []), "more chips"]
    return f"it needed less memory{over}: {', '.join(ways[:-1])}, or {ways[-1]}"


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
    worst = float("inf")
    known = [figure_of(candidate, axis) for axis in AXES]
    figures = [worst if value is None else float(value) for value in known]
    drop = (candidate.quality or {}).get("drop")
    return [*figures, worst if drop is None else max(float(drop), 0.0)]


def _beats(one: list[float], other: list[float] | None) -> bool:
    if other is None:
        return False
    return all(a <= b for a, b in zip(one, other, strict=True)) and one != other
