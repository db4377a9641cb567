"""One model against many targets: what each would take, cost and refuse; measured where it can be.

The model is brought to normal form and through each recipe once; every target then gets a clone of
it, legalized by its backend and priced by that backend's cost model. None of this needs a backend's
toolchain. A figure that is unknown is ``None``, with the reason in ``notes``.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trivium.compiler import build, measurements, plugins, prepare, recipe, shapes
from trivium.compiler import model as models
from trivium.compiler import targets as target_names
from trivium.compiler.cost import does_not_fit
from trivium.compiler.errors import BadInput, TriviumError
from trivium.compiler.job import SAMPLES
from trivium.compiler.prepare import Progress, silent
from trivium.compiler.timing import time_calls
from trivium.compiler.types import Candidate, Estimate, Target, Workload

if TYPE_CHECKING:
    import onnx_ir as ir

    from trivium.compiler.backend import Backend, Tensors
    from trivium.compiler.recipe import Recipe

Backends = Sequence[str] | Literal["all"] | None

SHOWN_REFUSALS = 20
"""A model of a foreign domain may be refused in thousands of nodes; a row keeps the first few."""


@dataclass(frozen=True)
class Comparison:
    """Every candidate for running a model, the best first.

    Attributes:
        model: Its file's name.
        candidates: Feasible ones by predicted latency, then those of unknown latency, then those
            that cannot run it.
    """

    model: str
    workload: Workload
    candidates: tuple[Candidate, ...]

    @property
    def best(self) -> Candidate | None:
        """The feasible candidate of the least predicted latency."""
        first = self.candidates[0] if self.candidates else None
        return first if first is not None and seconds_of(first) is not None else None

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One JSON-ready row for each candidate."""
        return [row(candidate) for candidate in self.candidates]

    def to_json(self) -> dict[str, Any]:
        """What ``trivium compare --json`` prints."""
        return {
            "model": self.model,
            "workload": measurements.sizes_of(self.workload),
            "rows": self.rows,
            "best": name_of(self.best) if self.best is not None else None,
        }


def compare(
    model: str | os.PathLike[str],
    targets: Sequence[str | Target] | None = None,
    *,
    recipes: Sequence[str | Recipe] = ("none",),
    shape: Sequence[str] = (),
    backends: Backends = None,
    measure: bool = False,
    measured: str | os.PathLike[str] | None = None,
    calibration: str | os.PathLike[str] | Sequence[Tensors] | None = None,
    seed: int = 0,
    options: Mapping[str, str] | None = None,
    progress: Progress = silent,
) -> Comparison:
    """Predict (and with ``measure`` time) a model on targets.

    Args:
        model: An ``.onnx`` file or a checkpoint folder.
        targets: Targets or their names; by default every installed one.
        recipes: Each is tried on each target.
        shape: ``NAME=1x128`` and ``DIM=128``; every symbolic dimension has to be bound.
        backends: Names to try where they serve a target; by default each target's default one,
            with ``"all"`` every one that serves it.
        measure: Build and time what really runs on its target here.
        measured: A file of timings taken elsewhere; see `measurements`.
        calibration: Representative inputs: an ``.npz`` file, or feeds.
        seed: Of the inputs that are drawn when no calibration is given.
        options: Options of the backends, for ``measure``.
        progress: Called with the name of each stage as it begins.

    Raises:
        BadInput: A dimension is left symbolic; the message names it and the flag.
    """
    path = Path(model)
    elsewhere = measurements.read(measured) if measured is not None else None
    found = [target_names.find(t) if isinstance(t, str) else t for t in targets or all_targets()]
    candidates: list[Candidate] = []
    workload = Workload()
    for given in recipes:
        chosen = recipe.read(given) if isinstance(given, str) else given
        pairs = [(target, name) for target in found for name in _backends_of(target, backends)]
        for optimized in _optimized(path, chosen, shape, calibration, seed, pairs, progress):
            workload = optimized.workload
            for target, name in optimized.pairs:
                progress(f"{target.name} with {name}")
                candidates.append(_candidate(optimized, target, name, chosen.name))
    if elsewhere is not None:
        sha256 = models.content_hash(path, models.load(path))
        candidates = [
            replace(one, measured=elsewhere.of(one, sha256, workload)) for one in candidates
        ]
    if measure:
        timed = _Measurement(path, shape, calibration, seed, options or {}, progress)
        candidates = [timed.of(candidate) for candidate in candidates]
    return Comparison(path.name, workload, tuple(sorted(candidates, key=_order)))


def all_targets() -> list[str]:
    """The names of all installed targets."""
    return target_names.names()


@dataclass(frozen=True)
class _Optimized:
    """A model after a recipe, and the targets and backends that it was optimized for.

    Attributes:
        problem: Why the recipe could not be run, if it could not.
    """

    model: ir.Model
    workload: Workload
    pairs: list[tuple[Target, str]]
    problem: str = ""


def _optimized(
    path: Path,
    chosen: Recipe,
    shape: Sequence[str],
    calibration: str | os.PathLike[str] | Sequence[Tensors] | None,
    seed: int,
    pairs: Sequence[tuple[Target, str]],
    progress: Progress,
) -> Iterator[_Optimized]:
    """Run the recipe once, or once for each backend or target that its passes ask for."""
    groups: dict[tuple[str, str], list[tuple[Target, str]]] = {}
    by_target, by_backend = recipe.asks_for(chosen, "target"), recipe.asks_for(chosen, "backend")
    for target, backend in pairs:
        key = (target.name if by_target else "", backend if by_backend else "")
        groups.setdefault(key, []).append((target, backend))
    for key, group in groups.items():
        progress(" ".join(("recipe", chosen.name, *key)))
        loaded = models.load(path)
        inputs, _ = models.signature(loaded)
        workload = shapes.parse(shape, inputs)
        bound = loaded.clone()
        shapes.bind(bound, workload)
        shapes.require_static(models.signature(bound)[0], "a prediction")
        feeds = _feeds(bound, workload, calibration, seed)
        problem = ""
        try:
            prepare.optimize(
                loaded,
                chosen,
                shape=shape,
                calibration=feeds,
                target=group[0][0] if by_target else None,
                backend=group[0][1] if by_backend else None,
                seed=seed,
            )
        except TriviumError as error:
            problem = f"recipe {chosen.name}: {error}"
        yield _Optimized(loaded, workload, group, problem)


def _feeds(
    model: ir.Model,
    workload: Workload,
    calibration: str | os.PathLike[str] | Sequence[Tensors] | None,
    seed: int,
) -> Sequence[Tensors]:
    from trivium.compiler import samples
    from trivium.compiler.feeds import read as read_feeds

    if isinstance(calibration, (str, os.PathLike)):
        return read_feeds(calibration, models.signature(model)[0])
    if calibration is not None:
        return calibration
    return samples.seeded(model, workload, count=SAMPLES, seed=seed)


def _backends_of(target: Target, wanted: Backends) -> list[str]:
    installed = plugins.names("trivium.backends")
    if wanted is None:
        return [target.backend]
    if wanted == "all":
        return [name for name in target.backends if name in installed] or [target.backend]
    unknown = [name for name in wanted if name not in installed]
    if unknown:
        raise BadInput(
            f"no backend named {unknown[0]!r}",
            about="--backend",
            remedy=f"known: {', '.join(installed)}",
        )
    return [name for name in target.backends if name in wanted]


def _candidate(
    optimized: _Optimized, target: Target, backend_name: str, recipe_name: str
) -> Candidate:
    """Legalize a clone for a target and price it; whatever goes wrong becomes a refusal."""
    made = Candidate(target, backend_name, recipe_name, None)
    if optimized.problem:
        return replace(made, refusals=(optimized.problem,))
    if backend_name not in plugins.names("trivium.backends"):
        return replace(made, refusals=(f"the backend {backend_name} is not installed",))
    backend: Backend = plugins.get("trivium.backends", backend_name)
    try:
        prepared = prepare.legalize(optimized.model.clone(), backend, target, optimized.workload)
        if prepared.refusals:
            return replace(made, refusals=prepared.refusals)
        estimate = prepare.predict(prepared, target)
    except TriviumError as error:
        return replace(made, refusals=(str(error),))
    unfit = does_not_fit(estimate, target)
    return replace(made, estimate=estimate, refusals=(unfit,) if unfit else ())


@dataclass(frozen=True)
class _Measurement:
    """How to build and time a candidate."""

    path: Path
    shape: Sequence[str]
    calibration: str | os.PathLike[str] | Sequence[Tensors] | None
    seed: int
    options: Mapping[str, str]
    progress: Progress

    def of(self, candidate: Candidate) -> Candidate:
        """The candidate with its measurement, if it really runs on its target here."""
        if not candidate.feasible or candidate.target.family != "cpu":
            return candidate
        self.progress(f"measuring {name_of(candidate)}")
        try:
            with tempfile.TemporaryDirectory(prefix="trivium-") as folder:
                artifact = build.compile(
                    self.path,
                    candidate.target,
                    out=Path(folder) / "artifact",
                    backend=candidate.backend,
                    recipe=candidate.recipe,
                    shape=self.shape,
                    calibration=self.calibration,
                    seed=self.seed,
                    options=self.options,
                )
                executable = artifact.load()
                if not executable.measures_target:
                    return candidate
                feed = self._feed()
                timing = time_calls(lambda: executable.run(feed))
        except TriviumError as error:
            return _noted(candidate, f"not measured: {error}")
        return replace(candidate, measured={**timing.to_json(), "where": executable.where})

    def _feed(self) -> Tensors:
        model = models.load(self.path)
        workload = shapes.parse(self.shape, models.signature(model)[0])
        shapes.bind(model, workload)
        return _feeds(model, workload, self.calibration, self.seed)[0]


def _noted(candidate: Candidate, note: str) -> Candidate:
    estimate = candidate.estimate or Estimate(None)
    return replace(candidate, estimate=replace(estimate, notes=(*estimate.notes, note)))


# --- rows ----------------------------------------------------------------------------------------


def seconds_of(candidate: Candidate) -> float | None:
    """The predicted latency of a feasible candidate."""
    if not candidate.feasible or candidate.estimate is None:
        return None
    return candidate.estimate.seconds


def _order(candidate: Candidate) -> tuple[int, float, str]:
    seconds = seconds_of(candidate)
    group = 2 if not candidate.feasible else (1 if seconds is None else 0)
    return group, seconds or 0.0, name_of(candidate)


def name_of(candidate: Candidate) -> str:
    """``target/backend/recipe``."""
    return f"{candidate.target.name}/{candidate.backend}/{candidate.recipe}"


def row(candidate: Candidate) -> dict[str, Any]:
    """A candidate as JSON; unknown is ``null`` with the reason in ``notes``.

    Throughput counts calls, one in flight (or the period of a pipeline); energy is that of one
    call; dollars are for a million calls.
    """
    target, estimate = candidate.target, candidate.estimate or Estimate(None)
    seconds = estimate.seconds
    period = estimate.period_s if estimate.period_s is not None else seconds
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
        "throughput_per_s": None if not period else 1.0 / period,
        "pipelined": estimate.period_s is not None,
        "memory_bytes": estimate.bytes_peak,
        "memory_interval_bytes": _pair(intervals.get("bytes_peak")),
        "memory_available_bytes": target.memory_bytes,
        "energy_j": estimate.joules,
        "energy_interval_j": _pair(intervals.get("joules")),
        "usd_per_million": _million(estimate.dollars),
        "usd_per_million_interval": _pair(intervals.get("dollars"), 1e6),
        "bound": estimate.bound if seconds is not None else None,
        "resources": dict(estimate.resources),
        "roofline": _roofline(target, estimate),
        "measured": dict(candidate.measured) if candidate.measured is not None else None,
        "calibration": estimate.calibration,
        "notes": [*estimate.notes, *target.notes],
    }


def _million(dollars: float | None) -> float | None:
    return None if dollars is None else dollars * 1e6


def _pair(interval: tuple[float, float] | None, scale: float = 1.0) -> list[float] | None:
    return None if interval is None else [interval[0] * scale, interval[1] * scale]


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
