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

from trivium.compiler.compare import Backends, compare, name_of, row
from trivium.compiler.errors import BadInput, ConstraintUnmet
from trivium.compiler.prepare import Progress, silent
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
    """

    max_latency_s: float | None = None
    min_throughput_per_s: float | None = None
    max_memory_bytes: float | None = None
    max_usd_per_million: float | None = None
    max_watts: float | None = None

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
    "energy": Figure("energy", "J", "energy_j"),
}

LIMITS: dict[str, Figure] = {
    "max_latency_s": OBJECTIVES["latency"],
    "min_throughput_per_s": OBJECTIVES["throughput"],
    "max_memory_bytes": Figure("memory", "bytes", "memory_bytes"),
    "max_usd_per_million": OBJECTIVES["cost"],
    "max_watts": Figure("power", "W", "watts"),
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
    for candidate in candidates:
        problem = _problem(candidate, constraints, aim)
        if problem:
            losing.append(replace(candidate, verdict=problem))
        else:
            keeping.append((figure(candidate, aim) or 0.0, candidate))
    keeping.sort(key=lambda pair: -pair[0] if aim.more_is_better else pair[0])
    ranked = [_judged(value, c, keeping[0], constraints, aim) for value, c in keeping]
    return Plan(objective, constraints.to_json(), (*ranked, *losing))


def figure(candidate: Candidate, wanted: Figure) -> float | None:
    """A quantity of a candidate, measured if it was; ``None`` if unknown."""
    if wanted.key == "watts":
        watts = candidate.target.watts
        return None if watts is None else watts * candidate.target.chips
    if candidate.measured is not None and wanted.key in ("latency_s", "throughput_per_s"):
        seconds = float(candidate.measured["latency_s"])
        return seconds if wanted.key == "latency_s" else 1.0 / seconds
    value = row(candidate)[wanted.key]
    return None if value is None else float(value)


def _problem(candidate: Candidate, constraints: Constraints, aim: Figure) -> str:
    """Why a candidate is out, or an empty text."""
    if candidate.refusals:
        more = f" (and {len(candidate.refusals) - 1} more)" if len(candidate.refusals) > 1 else ""
        return f"cannot run it: {candidate.refusals[0]}{more}"
    for name, limit in constraints.to_json().items():
        known = LIMITS[name]
        value = figure(candidate, known)
        if value is None:
            return f"{known.label} unknown, so the limit cannot be checked{_why(candidate)}"
        wrong = value < limit if known.more_is_better else value > limit
        if wrong:
            times = limit / value if known.more_is_better else value / limit
            relation = "below" if known.more_is_better else "above"
            return (
                f"{known.label} {_shown(value, known)} is {relation} the limit of "
                f"{_shown(limit, known)} ({times:.2g} times)"
            )
    if figure(candidate, aim) is None:
        return f"{aim.label} unknown{_why(candidate)}"
    return ""


def _why(candidate: Candidate) -> str:
    notes = (candidate.estimate or Estimate(None)).notes
    reasons = [note for note in notes if note.startswith(("no published", "not predicted"))]
    return f": {reasons[0]}" if reasons else ""


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
    verdict = f"{aim.label} {_shown(value, aim)}: {times:.2f} times that of {name_of(best)}"
    if aim.more_is_better:
        verdict = f"{aim.label} {_shown(value, aim)}: {1 / times:.2f} of that of {name_of(best)}"
    if _overlap(candidate, best):
        verdict += "; their intervals overlap"
    return replace(candidate, verdict=verdict)


def _overlap(one: Candidate, other: Candidate) -> bool:
    a, b = row(one)["interval_s"], row(other)["interval_s"]
    return bool(a and b and a[0] <= b[1] and b[0] <= a[1])


def _shown(value: float, of: Figure) -> str:
    if of.unit == "s":
        for scale, unit in ((1.0, "s"), (1e-3, "ms")):
            if value >= scale:
                return f"{value / scale:.3g} {unit}"
        return f"{value * 1e6:.3g} us"
    if of.unit == "bytes":
        return f"{value / 2**30:.3g} GiB"
    return f"{value:.3g} {of.unit}"


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
    rows = [{**row(candidate), "verdict": candidate.verdict} for candidate in chosen.candidates]
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


def parse_bytes(text: str, *, flag: str = "--max-memory") -> float:
    """Read ``16GiB``, ``512MB`` or a number of bytes."""
    return _parse(text, BYTES, flag, "16GiB or 512MB")


def _parse(text: str, units: dict[str, float], flag: str, example: str) -> float:
    match = re.fullmatch(r"([0-9]*\.?[0-9]+(?:[eE][-+]?\d+)?)\s*([^\W\d]*)", text.strip())
    number = float(match[1]) * units[match[2]] if match and match[2] in units else 0.0
    if not 0 < number < float("inf"):
        raise BadInput("not a positive quantity", about=f"{flag} {text}", remedy=f"write {example}")
    return number
