"""A candidate as a row: what JSON, CSV, the terminal and the HTML page show of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from trivium.compiler.types import Candidate, Estimate, Target, Workload

SHOWN_REFUSALS = 20
"""A model of a foreign domain may be refused in thousands of nodes; a row keeps the first few."""


NO_CHANGE = "the recipe changes nothing"
"""How the note begins that says so."""

_MISSING = ("no published", "not predicted", "no prediction")
"""How the notes begin that say why a figure is missing."""


def seconds_of(candidate: Candidate) -> float | None:
    """The predicted latency of a feasible candidate."""
    if not candidate.feasible or candidate.estimate is None:
        return None
    return candidate.estimate.seconds


def name_of(candidate: Candidate) -> str:
    """``target/backend/recipe``, and the batch if it is not one."""
    batch = f"/batch {candidate.batch}" if candidate.batch != 1 else ""
    return f"{candidate.target.name}/{candidate.backend}/{candidate.recipe}{batch}"


def workload_json(workload: Workload) -> dict[str, Any]:
    """The bound dimensions and shapes, and the tokens of a generation."""
    found: dict[str, Any] = {
        "dims": dict(workload.dims),
        "shapes": {name: list(shape) for name, shape in workload.shapes.items()},
    }
    if workload.new_tokens is not None:
        found |= {"prompt_tokens": workload.prompt_tokens, "new_tokens": workload.new_tokens}
    return found


def noted(candidate: Candidate, note: str) -> Candidate:
    """A candidate with one more note on its estimate."""
    estimate = candidate.estimate or Estimate(None)
    return replace(candidate, estimate=replace(estimate, notes=(*estimate.notes, note)))


def unpredicted(notes: Sequence[str]) -> list[str]:
    """The notes of an estimate that say why a figure is missing."""
    return [note for note in notes if note.startswith(_MISSING)]


def figure_of(candidate: Candidate, key: str) -> float | None:
    """A predicted figure by the key that it has in a row; ``None`` if unknown."""
    estimate, samples = candidate.estimate or Estimate(None), candidate.samples
    if key == "latency_s":
        return estimate.seconds
    if key == "memory_bytes":
        return estimate.bytes_peak
    if key == "energy_per_sample_j":
        return None if estimate.joules is None else estimate.joules / samples
    if key == "usd_per_million":
        return None if estimate.dollars is None else estimate.dollars * 1e6 / samples
    assert key == "throughput_per_s", key
    period = estimate.period_s if estimate.period_s is not None else estimate.seconds
    return samples / period if period else None


def interval_of(candidate: Candidate, key: str) -> tuple[float, float] | None:
    """The 80% interval of a predicted figure; ``None`` if unknown."""
    estimate, samples = candidate.estimate or Estimate(None), candidate.samples
    if key == "memory_bytes":
        return estimate.intervals.get("bytes_peak")
    if key in ("energy_per_sample_j", "usd_per_million"):
        name, scale = ("joules", 1.0) if key == "energy_per_sample_j" else ("dollars", 1e6)
        pair = estimate.intervals.get(name)
        return None if pair is None else (pair[0] * scale / samples, pair[1] * scale / samples)
    if estimate.lo is None or estimate.hi is None or not estimate.seconds:
        return None
    if key == "latency_s":
        return estimate.lo, estimate.hi
    value = figure_of(candidate, "throughput_per_s")
    if not value:
        return None
    return value * estimate.seconds / estimate.hi, value * estimate.seconds / estimate.lo


def row(candidate: Candidate) -> dict[str, Any]:
    """A candidate as JSON; unknown is ``null`` with the reason in ``notes``.

    Throughput counts calls, one in flight (or the period of a pipeline); energy is that of one
    call; dollars are for a million calls. Where batches are compared, throughput and dollars count
    samples; of a generator (its ``serving`` is no ``null``) they and energy count new tokens, and a
    call is a whole batch of generations.
    """
    target, estimate = candidate.target, candidate.estimate or Estimate(None)
    seconds = estimate.seconds
    intervals = estimate.intervals
    hidden = len(candidate.refusals) - SHOWN_REFUSALS
    more = (f"and {hidden} more",) if hidden > 0 else ()
    return {
        "target": target.name,
        "title": target.title,
        "family": target.family,
        "chips": target.chips,
        "backend": candidate.backend,
        "recipe": candidate.recipe,
        "feasible": candidate.feasible,
        "refusals": [*candidate.refusals[:SHOWN_REFUSALS], *more],
        "latency_s": seconds,
        "interval_s": None if estimate.lo is None else [estimate.lo, estimate.hi],
        "batch": candidate.batch,
        "throughput_per_s": figure_of(candidate, "throughput_per_s"),
        "pipelined": estimate.period_s is not None,
        "memory_bytes": estimate.bytes_peak,
        "memory_interval_bytes": _pair(intervals.get("bytes_peak")),
        "memory_available_bytes": target.memory_bytes,
        "energy_j": estimate.joules,
        "energy_interval_j": _pair(intervals.get("joules")),
        "energy_per_sample_j": figure_of(candidate, "energy_per_sample_j"),
        "usd_per_million": figure_of(candidate, "usd_per_million"),
        "usd_per_million_interval": _pair(interval_of(candidate, "usd_per_million")),
        "usd_per_hour": target.usd_per_hour,
        "price_source": target.sources.get("usd_per_hour"),
        "quality": dict(candidate.quality) if candidate.quality is not None else None,
        "serving": dict(candidate.serving) if candidate.serving is not None else None,
        "pareto": candidate.pareto,
        "bound": estimate.bound if seconds is not None else None,
        "resources": dict(estimate.resources),
        "roofline": _roofline(target, estimate),
        "operators": _operators(estimate),
        "measured": dict(candidate.measured) if candidate.measured is not None else None,
        "calibration": estimate.calibration,
        "notes": [*estimate.notes, *target.notes],
    }


def _pair(interval: tuple[float, float] | None) -> list[float] | None:
    return None if interval is None else list(interval)


def _operators(estimate: Estimate) -> list[dict[str, Any]]:
    """Where the time goes: seconds and kernels of every operator (or fusion), the longest first."""
    found: dict[str, dict[str, Any]] = {}
    for op in estimate.by_op:
        one = found.setdefault(op.op_type, {"op_type": op.op_type, "seconds": 0.0, "count": 0})
        one["count"] += 1
        one["seconds"] += op.seconds
        # Of the kernel that takes longest, where they differ.
        if op.seconds >= one.get("longest", 0.0):
            one["longest"], one["bound"] = op.seconds, op.bound
    return sorted(found.values(), key=lambda one: -float(one["seconds"]))


def _roofline(target: Target, estimate: Estimate) -> dict[str, Any] | None:
    """Where the model lies under its target's roof: intensity, rate, and the roof's two lines."""
    operations = sum(op.work.total_operations for op in estimate.by_op)
    moved = sum(op.work.bytes_moved for op in estimate.by_op)
    if not operations or not moved:
        return None
    seconds = estimate.seconds
    heaviest = sorted(estimate.by_op, key=lambda op: -op.seconds)[:12]
    return {
        "operations": operations,
        "bytes": moved,
        "rate": None if not seconds else operations / seconds,
        "peak_ops": max(target.peak_ops.values(), default=0.0) * target.chips or None,
        "memory_bytes_per_s": None
        if target.memory_bytes_per_s is None
        else target.memory_bytes_per_s * target.chips,
        "kernels": [
            {
                "name": op.name,
                "op_type": op.op_type,
                "seconds": op.seconds,
                "operations": op.work.total_operations,
                "bytes": op.work.bytes_moved,
                "bound": op.bound,
            }
            for op in heaviest
        ],
    }
