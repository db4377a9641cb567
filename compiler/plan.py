"""Choosing: constraints and an objective over the candidates of a comparison.

The choice uses predictions at their point, and measurements where there are any. Every loser keeps
the reason why it lost, and what would have to change for it to win.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from trivium.compiler import reasons, whatif
from trivium.compiler.compare import Backends, Quality, compare
from trivium.compiler.errors import BadInput, ConstraintUnmet
from trivium.compiler.prepare import Progress, silent
from trivium.compiler.prices import Table
from trivium.compiler.rows import name_of, row
from trivium.compiler.types import Candidate, Plan, Target

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
    aim, limits = reasons.OBJECTIVES[objective], constraints.to_json()
    keeping: list[tuple[float, Candidate]] = []
    unranked: list[Candidate] = []
    losing: list[Candidate] = []
    marked = whatif.pareto(candidates)
    for candidate in marked:
        if candidate.refusals:
            problem, change = reasons.refused(candidate)
        else:
            problem, change = reasons.problems(candidate, limits, marked)
        value = reasons.figure(candidate, aim)
        if problem:
            losing.append(replace(candidate, verdict=problem, wins_if=change))
        elif value is None:
            unranked.append(replace(candidate, verdict=reasons.unknown(candidate, aim)))
        else:
            keeping.append((value, candidate))
    # Of equals the one with the simpler recipe goes first.
    sign = -1.0 if aim.more_is_better else 1.0
    keeping.sort(key=lambda pair: (sign * pair[0], reasons.unchanged(pair[1])))
    ranked = [reasons.judged(value, c, keeping, aim) for value, c in keeping]
    if keeping:
        # What its figure would have to be is known even where the figure is not.
        best = keeping[0][0]
        unranked = [replace(c, wins_if=reasons.change(c, aim, None, best)) for c in unranked]
    # Those that can run it go before those that cannot.
    losing.sort(key=lambda candidate: not candidate.feasible)
    return Plan(objective, limits, (*ranked, *unranked, *losing))


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
        "answer": reasons.answer(chosen.candidates, chosen.objective, chosen.constraints) or None,
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
