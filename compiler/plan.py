"""Choosing: constraints and an objective over the candidates of a comparison.

The choice uses predictions at their point, and measurements where there are any; a candidate whose
interval reaches past a limit is told so. Every loser keeps the reason why it lost.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from trivium.compiler import whatif
from trivium.compiler.compare import Backends, Quality, compare
from trivium.compiler.errors import BadInput, ConstraintUnmet
from trivium.compiler.prepare import Progress, silent
from trivium.compiler.prices import Table
from trivium.compiler.rows import name_of, row
from trivium.compiler.types import Candidate, Estimate, Plan, Target

if TYPE_CHECKING:
    from trivium.compiler.backend import Tensors
    from trivium.compiler.recipe import Recipe

Objective = Literal["latency", "throughput", "cost", "energy"]


@dataclass(frozen=True)
class Constraints:
    """Limits that a candidate has to keep; ``None`` is no limit.

    Attributes:
        max_memory_bytes: On one chip.
        max_usd_per_million: Of calls.
        max_watts: The power caps of all chips together.
        max_drop: Of the metric that recipes are evaluated by; see `Evaluation.drop_from`.
        max_first_token_s: Of a generator, from the prompts' arrival.
    """

    max_latency_s: float | None = None
    min_throughput_per_s: float | None = None
    max_memory_bytes: float | None = None
    max_usd_per_million: float | None = None
    max_watts: float | None = None
    max_drop: float | None = None
    max_first_token_s: float | None = None

    def to_json(self) -> dict[str, float]:
        return {name: value for name, value in asdict(self).items() if value is not None}


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

GENERATING = {
    "throughput_per_s": "tokens/s",
    "usd_per_million": "USD per million tokens",
    "energy_per_sample_j": "J per token",
}
"""Units of a generator's figures, by key."""

LIMITS: dict[str, Figure] = {
    "max_latency_s": OBJECTIVES["latency"],
    "min_throughput_per_s": OBJECTIVES["throughput"],
    "max_memory_bytes": Figure("memory", "bytes", "memory_bytes"),
    "max_usd_per_million": OBJECTIVES["cost"],
    "max_watts": Figure("power", "W", "watts"),
    "max_drop": Figure("drop of the metric", "", "drop"),
    "max_first_token_s": Figure("time to the first token", "s", "first_token_s"),
}


def plan(
    model: str | os.PathLike[str],
    constraints: Constraints | None = None,
    objective: Objective = "latency",
    *,
    targets: Sequence[str | Target] | None = None,
    recipes: Sequence[str | Recipe] = ("none",),
    shape: Sequence[str] = (),
    backends: Backends = "all",
    batches: Sequence[int] = (),
    context: int | None = None,
    new_tokens: int | None = None,
    max_chips: int | None = None,
    prices: Table | None = None,
    quality: Quality | None = None,
    measure: bool = False,
    calibration: str | os.PathLike[str] | Sequence[Tensors] | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Plan:
    """Pick a target, backend and recipe for a model; see `trivium.compiler.compare.compare`.

    Returns:
        All candidates, the chosen one first, each with its verdict; ``best`` is ``None`` when
        none keeps the constraints (`require_best` turns that into an error).
    """
    if objective not in get_args(Objective):
        raise BadInput(
            f"no objective {objective!r}",
            about="--objective",
            remedy=f"one of {', '.join(get_args(Objective))}",
        )
    compared = compare(
        model,
        targets,
        recipes=recipes,
        shape=shape,
        backends=backends,
        batches=batches,
        context=context,
        new_tokens=new_tokens,
        max_chips=max_chips,
        prices=prices,
        quality=quality,
        measure=measure,
        calibration=calibration,
        seed=seed,
        progress=progress,
    )
    return choose(compared.candidates, constraints or Constraints(), objective)


def choose(candidates: Sequence[Candidate], constraints: Constraints, objective: Objective) -> Plan:
    """Rank candidates and say of each why it won or lost."""
    aim = OBJECTIVES[objective]
    keeping: list[tuple[float, Candidate]] = []
    losing: list[Candidate] = []
    for candidate in whatif.pareto(candidates):
        problem, change = _problem(candidate, constraints, aim)
        if problem:
            losing.append(replace(candidate, verdict=problem, wins_if=change))
        else:
            keeping.append((figure(candidate, aim) or 0.0, candidate))
    keeping.sort(key=lambda pair: -pair[0] if aim.more_is_better else pair[0])
    ranked = [_judged(value, c, keeping[0], constraints, aim) for value, c in keeping]
    if keeping:
        losing = [_would_win(c, aim, keeping[0][0]) for c in losing]
    return Plan(objective, constraints.to_json(), (*ranked, *losing))


def _would_win(candidate: Candidate, aim: Figure, best: float) -> Candidate:
    """Say of a candidate whose own figure is unknown what it would have to be."""
    if not candidate.feasible or candidate.wins_if or figure(candidate, aim) is not None:
        return candidate
    return replace(candidate, wins_if=_change(candidate, aim, None, best))


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
    if candidate.measured is not None and wanted.key in ("latency_s", "throughput_per_s"):
        seconds = float(candidate.measured["latency_s"])
        return seconds if wanted.key == "latency_s" else candidate.batch / seconds
    value = row(candidate)[wanted.key]
    return None if value is None else float(value)


def _problem(candidate: Candidate, constraints: Constraints, aim: Figure) -> tuple[str, str]:
    """Why a candidate is out, or an empty text; and what would let it in."""
    if candidate.refusals:
        more = f" (and {len(candidate.refusals) - 1} more)" if len(candidate.refusals) > 1 else ""
        return f"cannot run it: {candidate.refusals[0]}{more}", ""
    for name, limit in constraints.to_json().items():
        known = LIMITS[name]
        value = figure(candidate, known)
        if value is None:
            change = _change(candidate, known, None, limit)
            return (
                f"{known.label} unknown, so the limit cannot be checked{_why(candidate, known)}",
                change,
            )
        wrong = value < limit if known.more_is_better else value > limit
        if wrong:
            times = limit / value if known.more_is_better else value / limit if limit else 0.0
            relation = "below" if known.more_is_better else "above"
            factor = f" ({times:.2g} times)" if times else ""
            problem = (
                f"{known.label} {_shown(value, known, candidate)} is {relation} the limit of "
                f"{_shown(limit, known, candidate)}{factor}"
            )
            return problem, _change(candidate, known, value, limit)
    if figure(candidate, aim) is None:
        return f"{aim.label} unknown{_why(candidate, aim)}", ""
    return "", ""


def _change(candidate: Candidate, known: Figure, value: float | None, wanted: float) -> str:
    """What would bring a figure to what is wanted."""
    if value is not None and abs(value - wanted) <= 0.005 * abs(wanted):
        return ""  # as good as the best, or all but
    if known.key == "usd_per_million":
        return whatif.cheaper(candidate, wanted)
    if value is None or not wanted:
        return ""
    if known.key == "energy_per_sample_j":
        return whatif.thriftier(candidate, wanted)
    if known.key == "memory_bytes":
        return whatif.smaller(candidate, wanted)
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


def _judged(
    value: float,
    candidate: Candidate,
    first: tuple[float, Candidate],
    constraints: Constraints,
    aim: Figure,
) -> Candidate:
    best_value, best = first
    if candidate is best:
        return replace(candidate, verdict="best")
    times = best_value / value if aim.more_is_better else value / best_value
    verdict = (
        f"{aim.label} {_shown(value, aim, candidate)}: {times:.2f} times that of {name_of(best)}"
    )
    if aim.more_is_better:
        verdict = f"{aim.label} {_shown(value, aim, candidate)}: "
        verdict += f"{1 / times:.2f} of that of {name_of(best)}"
    if _overlap(candidate, best):
        verdict += "; their intervals overlap"
    change = _change(candidate, aim, value, best_value)
    return replace(candidate, verdict=verdict, wins_if=change)


def _overlap(one: Candidate, other: Candidate) -> bool:
    a, b = row(one)["interval_s"], row(other)["interval_s"]
    return bool(a and b and a[0] <= b[1] and b[0] <= a[1])


def _shown(value: float, of: Figure, candidate: Candidate) -> str:
    if of.unit == "s":
        for scale, unit in ((1.0, "s"), (1e-3, "ms")):
            if value >= scale:
                return f"{value / scale:.3g} {unit}"
        return f"{value * 1e6:.3g} us"
    if of.unit == "bytes":
        return f"{value / 2**30:.3g} GiB"
    unit = GENERATING.get(of.key, of.unit) if candidate.tokens else of.unit
    return f"{value:.3g} {unit}"


def require_best(chosen: Plan) -> Candidate:
    """Return the winner.

    Raises:
        ConstraintUnmet: None keeps the constraints; the message names the nearest.
    """
    if chosen.best is not None:
        return chosen.best
    nearest = next((c for c in chosen.candidates if c.feasible), None)
    raise ConstraintUnmet(
        f"none of {len(chosen.candidates)} candidates qualifies",
        about="plan",
        remedy=f"the first of them, {name_of(nearest)}: {nearest.verdict}"
        if nearest is not None
        else "none of them can run the model; see trivium compare",
    )


def to_json(chosen: Plan) -> dict[str, Any]:
    """What ``trivium plan --json`` prints."""
    rows = [
        {**row(candidate), "verdict": candidate.verdict, "wins_if": candidate.wins_if or None}
        for candidate in chosen.candidates
    ]
    best = next((r for r in rows if r["verdict"] == "best"), None)
    return {
        "objective": chosen.objective,
        "constraints": dict(chosen.constraints),
        "candidates": rows,
        "best": best,
    }


# --- reading limits ------------------------------------------------------------------------------

SECONDS = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
BYTES = {
    **{"": 1.0, "B": 1.0, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12},
    **{"KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30, "TiB": 2.0**40},
}


def parse_seconds(text: str, *, flag: str = "--max-latency") -> float:
    """Read ``5ms``, ``0.2s`` or ``0.005``."""
    return _parse(text, SECONDS, flag, "5ms or 0.2s")


def parse_drop(text: str, *, flag: str = "--max-drop") -> float:
    """Read ``1%`` or ``0.01``; ``0`` is no drop at all."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)(%?)", text.strip())
    if match is None:
        raise BadInput("not a share", about=f"{flag} {text}", remedy="write 1% or 0.01")
    return float(match[1]) / (100.0 if match[2] else 1.0)


def parse_bytes(text: str, *, flag: str = "--max-memory") -> float:
    """Read ``16GiB``, ``512MB`` or a number of bytes."""
    return _parse(text, BYTES, flag, "16GiB or 512MB")


def _parse(text: str, units: dict[str, float], flag: str, example: str) -> float:
    match = re.fullmatch(r"([0-9]*\.?[0-9]+(?:[eE][-+]?\d+)?)\s*([^\W\d]*)", text.strip())
    number = float(match[1]) * units[match[2]] if match and match[2] in units else 0.0
    if not 0 < number < float("inf"):
        raise BadInput("not a positive quantity", about=f"{flag} {text}", remedy=f"write {example}")
    return number
