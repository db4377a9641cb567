"""Why a candidate won or lost, in words: the figures that are held to limits and to each other.

A figure is measured where it was, else predicted at its point; whether two are really apart is
asked of their intervals.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from trivium.compiler import whatif
from trivium.compiler.report import units
from trivium.compiler.rows import NO_CHANGE, figure_of, interval_of, name_of
from trivium.compiler.types import Candidate, Estimate

OVER = 1.095
"""From this factor on a limit is missed by so many times, below it by so many percent."""

WORTH_A_WORD = 1.05
"""How much better another way on the same target has to be to be named."""


@dataclass(frozen=True)
class Figure:
    """A quantity of a candidate: how it is called, printed, and whether more is better."""

    label: str
    unit: str
    key: str
    more_is_better: bool = False


OBJECTIVES: dict[str, Figure] = {
    "latency": Figure("latency", "s", "latency_s"),
    "throughput": Figure("throughput", "calls/s", "throughput_per_s", more_is_better=True),
    "cost": Figure("cost", "USD per million calls", "usd_per_million"),
    "energy": Figure("energy", "J", "energy_per_sample_j"),
}

LIMITS: dict[str, Figure] = {
    "max_latency_s": OBJECTIVES["latency"],
    "min_throughput_per_s": OBJECTIVES["throughput"],
    "max_memory_bytes": Figure("memory", "bytes", "memory_bytes"),
    "max_usd_per_million": OBJECTIVES["cost"],
    "max_watts": Figure("power", "W", "watts"),
    "max_drop": Figure("drop of the metric", "", "drop"),
    "max_first_token_s": Figure("time to the first token", "s", "first_token_s"),
}

_TIMED = ("latency_s", "throughput_per_s")


def figure(candidate: Candidate, wanted: Figure) -> float | None:
    """A quantity of a candidate, measured if it was; ``None`` if unknown."""
    if wanted.key == "watts":
        watts = candidate.target.watts
        return None if watts is None else watts * candidate.target.chips
    if wanted.key == "drop":
        drop = (candidate.quality or {}).get("drop")
        return None if drop is None else float(drop)
    if wanted.key == "first_token_s":
        first = (candidate.serving or {}).get("first_token_s")
        return None if first is None else float(first)
    if candidate.measured is not None and wanted.key in _TIMED:
        seconds = float(candidate.measured["latency_s"])
        return seconds if wanted.key == "latency_s" else candidate.batch / seconds
    return figure_of(candidate, wanted.key)


def interval(candidate: Candidate, wanted: Figure) -> tuple[float, float] | None:
    """Where a figure lies with 80%; of a measured one, where its median does."""
    if candidate.measured is not None and wanted.key in _TIMED:
        seconds = float(candidate.measured["latency_s"])
        low, high = candidate.measured.get("ci_s") or (seconds, seconds)
        if wanted.key == "latency_s":
            return float(low), float(high)
        return candidate.batch / high, candidate.batch / low
    return interval_of(candidate, wanted.key)


def overlap(one: Candidate, other: Candidate, wanted: Figure) -> bool:
    """Whether the intervals of a figure of two candidates touch."""
    a, b = interval(one, wanted), interval(other, wanted)
    return bool(a and b and a[0] <= b[1] and b[0] <= a[1])


def shown(value: float, of: Figure, candidate: Candidate) -> str:
    """A figure with its unit."""
    if of.unit == "s":
        return units.seconds(value)
    if of.unit == "bytes":
        return units.bytes_(value)
    if of.unit == "J":
        return units.scaled(value, "J") + (" per token" if candidate.tokens else "")
    counted = of.unit.replace("calls", "tokens") if candidate.tokens else of.unit
    return f"{value:.3g} {counted}".rstrip()


# --- what a limit says ---------------------------------------------------------------------------


def refused(candidate: Candidate) -> tuple[str, str]:
    """Why a candidate cannot run, and what would let it."""
    first, more = candidate.refusals[0], len(candidate.refusals) - 1
    verdict = f"cannot run it: {first}" + (f" (and {more} more)" if more else "")
    available = candidate.target.memory_bytes
    if first.startswith("needs ") and available is not None:
        return verdict, whatif.smaller(candidate, available)
    return verdict, ""


def problems(
    candidate: Candidate, limits: Mapping[str, float], others: Sequence[Candidate]
) -> tuple[str, str]:
    """All limits that a candidate does not keep, and what would have to change for each.

    Args:
        others: All candidates, to name what of them would keep a limit on the same target.
    """
    found = [_problem(candidate, name, limit, others) for name, limit in limits.items()]
    told = [pair for pair in found if pair[0]]
    changes = dict.fromkeys(change for _, change in told)
    # Half of an answer would let nobody in.
    wins_if = "" if "" in changes else ", and ".join(changes)
    return "; ".join(problem for problem, _ in told), wins_if


def _problem(
    candidate: Candidate, name: str, limit: float, others: Sequence[Candidate]
) -> tuple[str, str]:
    known = LIMITS[name]
    value = figure(candidate, known)
    if value is None:
        reason = f"{known.label} unknown, so the limit cannot be checked{_why(candidate, known)}"
        return reason, change(candidate, known, None, limit)
    if not (value < limit if known.more_is_better else value > limit):
        return "", ""
    relation = "below" if known.more_is_better else "above"
    text = (
        f"{known.label} {shown(value, known, candidate)} is {relation} the limit of "
        f"{shown(limit, known, candidate)}{_by(value, limit)}"
    )
    if known.key == "drop":
        return text, _gentler(candidate, limit, others)
    return text, change(candidate, known, value, limit)


def _by(value: float, limit: float) -> str:
    """How far a figure is off its limit."""
    if not value or not limit:
        return ""
    times = max(value / limit, limit / value)
    return f" (by {times - 1:.1%})" if times < OVER else f" ({times:.2g} times)"


def _gentler(candidate: Candidate, limit: float, others: Sequence[Candidate]) -> str:
    """Recipes by which the same engine on the same target keeps a limit on the drop."""
    where = (candidate.target.name, candidate.backend)
    names = {
        one.recipe
        for one in others
        if (one.target.name, one.backend) == where
        and one.feasible
        and (drop := figure(one, LIMITS["max_drop"])) is not None
        and drop <= limit
    }
    if not names:
        return "a recipe lost less (--recipe), or the limit were wider"
    return f"its recipe were {' or '.join(sorted(names))}, which keeps the limit"


def unknown(candidate: Candidate, aim: Figure) -> str:
    """That a candidate cannot be ranked, and why."""
    return f"{aim.label} unknown{_why(candidate, aim)}"


def change(candidate: Candidate, known: Figure, value: float | None, wanted: float) -> str:
    """What would bring a figure to what is wanted."""
    if value is not None and abs(value - wanted) <= 0.005 * abs(wanted):
        return ""  # as good as the best, or all but
    if known.key == "usd_per_million":
        return whatif.cheaper(candidate, wanted)
    if value is None or not wanted:
        return ""
    if known.key == "energy_per_sample_j":
        return whatif.thriftier(candidate, value, wanted)
    if known.key == "memory_bytes":
        return whatif.smaller(candidate, wanted)
    if known.key == "watts":
        return whatif.capped(candidate, wanted)
    if known.key == "first_token_s":
        return whatif.sooner(candidate, value, wanted)
    if known.key == "latency_s":
        return whatif.faster(candidate, value / wanted)
    if known.key == "throughput_per_s":
        return whatif.faster(candidate, wanted / value)
    return ""


_REASON = {"usd_per_million": "price", "energy_per_sample_j": "power", "watts": "power"}
"""The word by which a note is the reason why a figure is unknown."""


def _why(candidate: Candidate, known: Figure) -> str:
    if known.key == "drop":
        reason = (candidate.quality or {}).get("reason", "the recipe was not evaluated")
        return f": {reason}"
    notes = (candidate.estimate or Estimate(None)).notes
    reasons = [note for note in notes if note.startswith(("no published", "not predicted"))]
    word = _REASON.get(known.key, "")
    named = [note for note in reasons if word in note]
    if word and not named and candidate.estimate and candidate.estimate.seconds is not None:
        return f": no published {word} of {candidate.target.name}"
    return f": {(named or reasons)[0]}" if reasons else ""


# --- who won -------------------------------------------------------------------------------------


def unchanged(candidate: Candidate) -> bool:
    """Whether the recipe did nothing to the model."""
    notes = (candidate.estimate or Estimate(None)).notes
    return any(note.startswith(NO_CHANGE) for note in notes)


def judged(
    value: float, candidate: Candidate, ranked: Sequence[tuple[float, Candidate]], aim: Figure
) -> Candidate:
    """A candidate that keeps the limits, with what it lost by."""
    best_value, best = ranked[0]
    if candidate is best:
        return replace(candidate, verdict="best")
    twin = _twin(value, candidate, ranked)
    if twin is not None:
        verdict = f"the same as {name_of(twin)}: its recipe changes nothing of this model"
        return replace(candidate, verdict=verdict)
    times = f"{value / best_value:.2f} times" if best_value else "more than"
    if aim.more_is_better:
        times = f"{value / best_value:.2f} of"
    verdict = f"{aim.label} {shown(value, aim, candidate)}: {times} that of {name_of(best)}"
    if overlap(candidate, best, aim):
        verdict += "; their intervals overlap"
    verdict += _better_there(value, candidate, ranked, aim)
    wins_if = change(candidate, aim, value, best_value)
    return replace(candidate, verdict=verdict, wins_if=wins_if)


def _twin(
    value: float, candidate: Candidate, ranked: Iterable[tuple[float, Candidate]]
) -> Candidate | None:
    """The candidate whose graph it is, where its recipe did nothing."""
    if not unchanged(candidate):
        return None
    where = (candidate.target.name, candidate.backend, candidate.batch)
    for other_value, other in ranked:
        same = (other.target.name, other.backend, other.batch) == where
        if same and other_value == value and other is not candidate and not unchanged(other):
            return other
    return None


def _better_there(
    value: float, candidate: Candidate, ranked: Sequence[tuple[float, Candidate]], aim: Figure
) -> str:
    """The best way to run it on the same target, where that is not this one, nor the winner."""
    where = candidate.target.name
    first, one = next(pair for pair in ranked if pair[1].target.name == where)
    times = (first / value if aim.more_is_better else value / first) if value and first else 1.0
    if one is candidate or one is ranked[0][1] or times < WORTH_A_WORD:
        return ""
    batch = f"/batch {one.batch}" if one.batch != candidate.batch else ""
    return f"; {one.backend}/{one.recipe}{batch} there: {shown(first, aim, one)}"


def answer(candidates: Sequence[Candidate], objective: str, limits: Mapping[str, float]) -> str:
    """What was chosen, in a few sentences; empty where nothing was."""
    if not candidates or candidates[0].verdict != "best":
        return ""
    best, aim = candidates[0], OBJECTIVES[objective]
    text = f"{name_of(best)}: {aim.label} {shown(figure(best, aim) or 0.0, aim, best)}"
    around = interval(best, aim)
    if around is not None:
        low, high = (shown(edge, aim, best) for edge in around)
        number, _, unit = low.partition(" ")
        text += f" (80%: {number if high.partition(' ')[2] == unit else low} to {high})"
    kept = [_kept(best, name, limit) for name, limit in limits.items() if LIMITS[name] is not aim]
    text += "".join(f"; {one}" for one in kept)
    others = [
        one
        for one in candidates[1:]
        if one.feasible and " that of " in one.verdict and one.target.name != best.target.name
    ]
    if others:
        after = shown(figure(others[0], aim) or 0.0, aim, others[0])
        text += f". Next on another target: {name_of(others[0])}, {after}"
    rivals = {one.target.name for one in others if overlap(one, best, aim)}
    if rivals:
        count = f"{len(rivals)} other target{'s' if len(rivals) > 1 else ''}"
        text += f". The interval of {count} reaches into its own: measure before it matters"
    basis = best.estimate.calibration if best.estimate is not None else ""
    return f"{text}. Calibration: {basis}" if basis else text


def _kept(candidate: Candidate, name: str, limit: float) -> str:
    known = LIMITS[name]
    value = shown(figure(candidate, known) or 0.0, known, candidate)
    return f"{known.label} {value} of at {'least' if known.more_is_better else 'most'} " + shown(
        limit, known, candidate
    )
