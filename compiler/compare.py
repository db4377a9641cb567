"""One model against many targets: what each would take, cost and refuse; measured where it can be.

The model is brought to normal form and through each recipe once; every target then gets a clone of
it, legalized by its backend and priced by that backend's cost model. None of this needs a backend's
toolchain. A figure that is unknown is ``None``, with the reason in ``notes``.
"""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

from trivium.compiler import (
    build,
    decoder_candidates,
    kernels,
    measurements,
    plugins,
    prepare,
    recipe,
    shapes,
)
from trivium.compiler import model as models
from trivium.compiler import targets as target_names
from trivium.compiler.cost import does_not_fit
from trivium.compiler.errors import BadInput, TriviumError
from trivium.compiler.job import SAMPLES
from trivium.compiler.prepare import Progress, silent
from trivium.compiler.prices import Table, priced
from trivium.compiler.recipe import Context
from trivium.compiler.rows import NO_CHANGE, name_of, noted, row, seconds_of, workload_json
from trivium.compiler.timing import time_calls
from trivium.compiler.types import Candidate, Target, TensorInfo, Workload

if TYPE_CHECKING:
    import onnx_ir as ir

    from trivium.compiler.backend import Backend, Tensors
    from trivium.compiler.recipe import Recipe

Backends = Sequence[str] | Literal["all"] | None
Quality = Callable[["Recipe", str], Mapping[str, Any]]
"""From a recipe and a backend to what `Candidate.quality` holds."""


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
            "workload": workload_json(self.workload),
            "rows": self.rows,
            "best": name_of(self.best) if self.best is not None else None,
        }


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Look for garbage seldom: a plan makes graphs of millions of objects that live on."""
    before = gc.get_threshold()
    gc.set_threshold(1_000_000, 50, 50)
    try:
        yield
    finally:
        gc.set_threshold(*before)


@_rare_collections()
def compare(
    model: str | os.PathLike[str],
    targets: Sequence[str | Target] | None = None,
    *,
    recipes: Sequence[str | Recipe] = ("none",),
    shape: Sequence[str] = (),
    backends: Backends = None,
    batches: Sequence[int] = (),
    context: int | None = None,
    new_tokens: int | None = None,
    max_chips: int | None = None,
    prices: Table | None = None,
    quality: Quality | None = None,
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
        targets: Targets or their names (``tpu-v5e:*`` is every slice); by default all installed.
        recipes: Each is tried on each target.
        shape: ``NAME=1x128`` and ``DIM=128``; every symbolic dimension has to be bound.
        backends: Names to try where they serve a target; by default each target's default one,
            with ``"all"`` every one that serves it.
        batches: Sizes of the batch to try; throughput, energy and money are then of one sample.
        context: Price a decoder as it generates, its sequences at most so long; batches are then
            sequences that are generated together.
        new_tokens: Of that context, what is generated; the rest is the prompt.
        max_chips: Try every slice of every target up to so many chips.
        prices: Overrides the prices that Trivium carries; see `trivium.compiler.prices`.
        quality: Evaluates recipes as backends have them placed.
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
    found = _targets(targets, max_chips, prices or {})
    pairs = [(target, name) for target in found for name in _backends_of(target, backends)]
    elsewhere = measurements.read(measured) if measured is not None else None
    sha256 = models.content_hash(path) if elsewhere is not None else ""
    if context is not None:
        if shape or measure or measured is not None:
            raise BadInput(
                "a generator's shapes follow from its context, and it is timed once compiled",
                about="--context",
                remedy="leave --shape and --measure out; trivium bench times an artifact",
            )
        loads = [decoder_candidates.workload(context, new_tokens, n) for n in batches or (1,)]
    elif new_tokens is not None:
        raise BadInput("it is a part of a context", about="--new-tokens", remedy="give --context N")
    candidates: list[Candidate] = []
    chosen_recipes = [recipe.read(one) if isinstance(one, str) else one for one in recipes]
    read = {one.name: one for one in chosen_recipes}
    if len(read) < len(chosen_recipes):
        raise BadInput("two recipes of one name", about="--recipe", remedy="rename one of them")
    if context is not None:
        progress("reading the model")
        decoder = decoder_candidates.Decoder.read(path)
        for chosen in read.values():
            made_of = decoder.candidates(chosen, pairs, loads, progress)
            candidates += [_judged(one, chosen, quality) for one in made_of]
        return Comparison(path.name, loads[0], tuple(sorted(candidates, key=_order)))
    for batch in batches or (None,):
        progress("reading the model")
        source = _Source.read(path, shape, calibration, seed, batch)
        for chosen in read.values():
            for optimized in _optimized(source, chosen, pairs, progress):
                for target, name in optimized.pairs:
                    progress(f"predicting: {target.name} with {name}")
                    made = _candidate(optimized, target, name, chosen.name)
                    if elsewhere is not None:
                        known = elsewhere.of(made, sha256, source.workload)
                        made = replace(made, measured=known)
                    made = replace(made, batch=batch or 1)
                    candidates.append(_judged(made, chosen, quality))
    if measure:
        timed = _Measurement(
            path, shape, calibration, seed, options or {}, progress, read, bool(batches)
        )
        candidates = [timed.of(candidate) for candidate in candidates]
    return Comparison(path.name, source.workload, tuple(sorted(candidates, key=_order)))


def _judged(candidate: Candidate, chosen: Recipe, quality: Quality | None) -> Candidate:
    if quality is None or not candidate.feasible:
        return candidate
    return replace(candidate, quality=quality(chosen, candidate.backend))


def _targets(
    given: Sequence[str | Target] | None, max_chips: int | None, prices: Table
) -> list[Target]:
    found = []
    for one in given or all_targets():
        names = target_names.expand(one, max_chips) if isinstance(one, str) else []
        found += [target_names.find(name) for name in names] if isinstance(one, str) else [one]
    if not found:
        raise BadInput(f"no target has a slice of at most {max_chips} chips", about="--max-chips")
    return [priced(target, prices) for target in found]


def all_targets() -> list[str]:
    """The names of all installed targets."""
    return target_names.names()


@dataclass(frozen=True)
class _Source:
    """The model in normal form with its shapes bound, read once for all recipes and targets."""

    model: ir.Model
    workload: Workload
    feeds: Sequence[Tensors]
    seed: int

    @classmethod
    def read(
        cls,
        path: Path,
        shape: Sequence[str],
        calibration: str | os.PathLike[str] | Sequence[Tensors] | None,
        seed: int,
        batch: int | None = None,
    ) -> _Source:
        loaded = models.load(path)
        inputs = models.signature(loaded)[0]
        workload = shapes.parse(with_batch(shape, inputs, batch), inputs)
        shapes.bind(loaded, workload)
        shapes.require_static(models.signature(loaded)[0], "a prediction")
        feeds = _feeds(loaded, workload, calibration, seed)
        prepare.run_recipe(loaded, recipe.read("none"), Context(workload=workload))
        return cls(loaded, workload, feeds, seed)


@dataclass(frozen=True)
class _Optimized:
    """A model after a recipe, and the targets and backends that it was optimized for.

    Attributes:
        problem: Why the recipe could not be run, if it could not.
        unchanged: Whether the recipe has passes and none of them did anything.
        legalized: What backends made of it so far, by the passes that they ran.
        seen: What cost models asked of those graphs so far.
    """

    model: ir.Model
    workload: Workload
    pairs: list[tuple[Target, str]]
    problem: str = ""
    unchanged: bool = False
    legalized: dict[str, ir.Model] = field(default_factory=dict)
    seen: kernels.Seen = field(default_factory=WeakKeyDictionary)

    def legalize(self, backend: Backend, target: Target) -> prepare.Prepared:
        """Legalize for a target; targets for which a backend runs the same passes share a graph."""

        def before(passes: prepare.Passes) -> ir.Model:
            return self._after(backend, passes)

        with kernels.remembering(self.seen):
            passes = prepare.decided(backend.legalize(target), before)
        key = prepare.identity(backend, passes)
        if key not in self.legalized:
            model = self.model.clone()
            made = prepare.legalize(model, backend, target, self.workload, passes)
            self.legalized[key] = made.model
            return made
        return prepare.judge(self.legalized[key], backend, target, self.workload)

    def _after(self, backend: Backend, passes: prepare.Passes) -> ir.Model:
        if not passes:
            return self.model
        key = prepare.identity(backend, passes)
        if key not in self.legalized:
            self.legalized[key] = self.model.clone()
            recipe.apply(passes, self.legalized[key])
        return self.legalized[key]


def with_batch(shape: Sequence[str], inputs: Sequence[TensorInfo], batch: int | None) -> list[str]:
    """The user's shapes, and the dimension that leads every input bound to a batch.

    Raises:
        BadInput: There is no such dimension left to bind.
    """
    if batch is None:
        return list(shape)
    bound = {item.partition("=")[0] for item in shape}
    leading = {info.shape[0] for info in inputs if info.shape and info.name not in bound}
    free = sorted(dim for dim in leading if isinstance(dim, str) and dim not in (*bound, "?"))
    if not free:
        raise BadInput(
            "the model's batch is fixed", about=f"--batch {batch}", remedy="leave --batch out"
        )
    return [*shape, *(f"{dim}={batch}" for dim in free)]


def _optimized(
    source: _Source, chosen: Recipe, pairs: Sequence[tuple[Target, str]], progress: Progress
) -> Iterator[_Optimized]:
    """Sketch the recipe once, or once for each backend or target that its passes ask for."""
    groups: dict[tuple[str, str], list[tuple[Target, str]]] = {}
    by_target, by_backend = recipe.asks_for(chosen, "target"), recipe.asks_for(chosen, "backend")
    for target, backend in pairs:
        key = (target.name if by_target else "", backend if by_backend else "")
        groups.setdefault(key, []).append((target, backend))
    for key, group in groups.items():
        progress(" ".join(("recipe", chosen.name, *filter(None, key))))
        made = source.model.clone()
        context = Context(
            group[0][0] if by_target else None,
            source.feeds,
            source.workload,
            source.seed,
            group[0][1] if by_backend else None,
        )
        problem, unchanged = "", False
        try:
            unchanged = recipe.changes_nothing(recipe.sketch(chosen, made, context))
        except TriviumError as error:
            problem = f"recipe {chosen.name}: {error}"
        yield _Optimized(made, source.workload, group, problem, unchanged)


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
        prepared = optimized.legalize(backend, target)
        if prepared.refusals:
            return replace(made, refusals=prepared.refusals)
        with kernels.remembering(optimized.seen):
            estimate = prepare.predict(prepared, target)
    except TriviumError as error:
        return replace(made, refusals=(str(error),))
    unfit = does_not_fit(estimate, target)
    made = replace(made, estimate=estimate, refusals=(unfit,) if unfit else ())
    return noted(made, f"{NO_CHANGE} of this model") if optimized.unchanged else made


@dataclass(frozen=True)
class _Measurement:
    """How to build and time a candidate."""

    path: Path
    shape: Sequence[str]
    calibration: str | os.PathLike[str] | Sequence[Tensors] | None
    seed: int
    options: Mapping[str, str]
    progress: Progress
    recipes: Mapping[str, Recipe]
    batched: bool = False

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
                    recipe=self.recipes[candidate.recipe],
                    shape=self._shape(candidate),
                    calibration=self.calibration,
                    seed=self.seed,
                    options=self.options,
                )
                executable = artifact.load()
                if not executable.measures_target:
                    return candidate
                feed = self._feed(candidate)
                timing = time_calls(lambda: executable.run(feed))
        except TriviumError as error:
            return noted(candidate, f"not measured: {error}")
        return replace(candidate, measured={**timing.to_json(), "where": executable.where})

    def _shape(self, candidate: Candidate) -> list[str]:
        if not self.batched:
            return list(self.shape)
        inputs = models.signature(models.load(self.path))[0]
        return with_batch(self.shape, inputs, candidate.batch)

    def _feed(self, candidate: Candidate) -> Tensors:
        model = models.load(self.path)
        workload = shapes.parse(self._shape(candidate), models.signature(model)[0])
        shapes.bind(model, workload)
        return _feeds(model, workload, self.calibration, self.seed)[0]


def _order(candidate: Candidate) -> tuple[int, float, str]:
    seconds = seconds_of(candidate)
    group = 2 if not candidate.feasible else (1 if seconds is None else 0)
    return group, seconds or 0.0, name_of(candidate)
