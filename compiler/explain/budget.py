"""From blame to a recipe: the fastest mix of precisions that keeps a limit on the accuracy's drop.

Each layer chooses a recipe or stays float. What a choice costs is the noise that it alone makes at
the model's output (noise of many small errors adds up); what it gains is what the target's cost
model says is lost when the layer is taken out of the recipe. For a ladder of noise limits the
knapsack is solved exactly; each solution is priced as the whole graph that it is, and evaluated on
the data. The fastest that keeps the limit becomes a recipe, which is run for real and evaluated
again.
"""

from __future__ import annotations

import glob
import math
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from trivium.compiler import evaluate, plugins, prepare, recipe, shapes
from trivium.compiler import model as models
from trivium.compiler.errors import BadInput, ToolchainMissing
from trivium.compiler.explain.blame import Blame
from trivium.compiler.explain.mix import mixed
from trivium.compiler.explain.study import Answer, Study
from trivium.compiler.metrics import Evaluation
from trivium.compiler.passing import dims, options_of
from trivium.compiler.prepare import Progress, silent
from trivium.compiler.recipe import Recipe, Step
from trivium.compiler.types import Estimate, Workload

Objective = Literal["latency", "memory"]
Choice = Mapping[str, int]

RUNGS = 10
"""How many noise limits are tried between the least noise and all of it."""

REFINED = 3
"""How often the gap between the last choice that keeps the limit and the next is halved."""


@dataclass(frozen=True)
class Point:
    """A choice on the front.

    Attributes:
        chosen: Layer -> number of its recipe; absent is float.
        noise: What the layers' own noises at the output add up to.
        evaluation, drop: On all of the data, lossy arithmetic as the graph says.
    """

    chosen: Choice
    estimate: Estimate
    weights_bytes: float
    noise: float
    evaluation: Evaluation
    drop: float

    def figure(self, objective: Objective) -> float:
        return self.weights_bytes if objective == "memory" else self.estimate.seconds or math.inf


@dataclass(frozen=True)
class Fitted:
    """What a budget came to.

    Attributes:
        front: All points tried, the fastest (or smallest) first.
        best: The one that became ``recipe``; ``None`` when nothing but float keeps the limit.
        verified, drop: The recipe run for real, on ONNX Runtime's own kernels, on all of the data.
    """

    limit: float
    objective: Objective
    target: str
    backend: str
    names: tuple[str, ...]
    plain: Point
    front: tuple[Point, ...]
    best: Point | None
    recipe: Recipe | None
    verified: Evaluation | None
    drop: float | None
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The part ``budget`` of what ``trivium explain --json`` prints."""
        return {
            "max_drop": self.limit,
            "objective": self.objective,
            "target": self.target,
            "backend": self.backend,
            "float": self._point(self.plain),
            "front": [self._point(point) for point in self.front],
            "best": None if self.best is None else self._point(self.best),
            "layers": {}
            if self.best is None
            else {name: self.names[number - 1] for name, number in self.best.chosen.items()},
            "recipe": None if self.recipe is None else to_toml(self.recipe),
            "verified": None
            if self.verified is None
            else {
                "value": self.verified.value,
                "samples": self.verified.samples,
                "drop": self.drop,
                "holds": self.drop is not None and self.drop <= self.limit,
            },
            "notes": list(self.notes),
        }

    def _point(self, point: Point) -> dict[str, Any]:
        counts = Counter(self.names[number - 1] for number in point.chosen.values() if number)
        estimate = point.estimate
        return {
            "seconds": estimate.seconds,
            "interval_s": None if estimate.lo is None else [estimate.lo, estimate.hi],
            "weights_bytes": point.weights_bytes,
            "layers": dict(counts),
            "noise": point.noise,
            "value": point.evaluation.value,
            "drop": point.drop,
            "best": point is self.best,
            "pareto": self._unbeaten(point),
        }

    def _unbeaten(self, point: Point) -> bool:
        """Whether no other point tried is at least as good in both, and better in one."""
        mine = point.figure(self.objective), point.drop
        others = [(p.figure(self.objective), p.drop) for p in self.front]
        return not any(
            other[0] <= mine[0] and other[1] <= mine[1] and other != mine for other in others
        )


def parse_budget(text: str) -> float:
    """Read ``max-drop=1%`` or ``max-drop=0.01``.

    Raises:
        BadInput: It is neither.
    """
    match = re.fullmatch(r"max-drop=([0-9]*\.?[0-9]+(?:[eE][-+]?\d+)?)(%?)", text.strip())
    if match is None:
        raise BadInput("not a budget", about=f"--budget {text}", remedy="write max-drop=1%")
    return float(match[1]) / (100.0 if match[2] else 1.0)


def fit_budget(
    study: Study,
    blames: Sequence[Blame],
    limit: float,
    *,
    objective: Objective = "latency",
    progress: Progress = silent,
) -> Fitted:
    """Find the best mix of a study's recipes whose metric drops by at most ``limit``.

    Args:
        blames: Of the study's recipes, in order: what each layer costs.
        limit: See `Evaluation.drop_from`.

    Raises:
        BadInput: A recipe has a lossy pass that cannot leave single layers alone.
        ToolchainMissing: scipy, which solves the knapsack, is not installed.
    """
    for changed in study.changed:
        _require_exclude(changed.recipe)
    search = _Search(study, blames, objective, progress)
    plain = search.point({})
    if objective == "latency" and plain.estimate.seconds is None:
        why = next(iter(plain.estimate.notes), "the cost model gives no latency")
        raise BadInput(f"no prediction: {why}", about=study.target.name)
    points = search.front(limit)
    kept = sorted(
        (p for p in points if p.drop <= limit and p.figure(objective) < plain.figure(objective)),
        key=lambda p: p.figure(objective),
    )
    notes = search.notes(plain)
    names = tuple(changed.recipe.name for changed in study.changed)
    best, written, verified, drop = None, None, None, None
    for point in kept:
        made = as_recipe(study, point.chosen)
        progress("the recipe, for real")
        answer = _verify(study, made)
        lost = answer.evaluation.drop_from(plain.evaluation)
        if lost <= limit:
            best, written, verified, drop = point, made, answer.evaluation, lost
            break
        notes.append(
            f"a choice of {sum(map(bool, point.chosen.values()))} layers kept the limit in "
            f"simulation and missed it for real (drop {lost:.3g})"
        )
    ordered = tuple(sorted(points, key=lambda p: p.figure(objective)))
    return Fitted(
        limit, objective, study.target.name, study.backend, names, plain, ordered, best,
        written, verified, drop, tuple(notes),
    )  # fmt: skip


def _require_exclude(chosen: Recipe) -> None:
    for step in chosen.steps:
        cls = plugins.get("trivium.passes", step.name)
        if cls.preserves == "lossy" and "exclude" not in {o.name for o in options_of(cls)}:
            raise BadInput(
                f"the pass {step.name} cannot leave single layers alone, so it fits no budget",
                about=f"recipe {chosen.name}",
                remedy="choose a recipe whose lossy passes have the option exclude",
            )


@dataclass
class _Search:
    study: Study
    blames: Sequence[Blame]
    objective: Objective
    progress: Progress

    def __post_init__(self) -> None:
        self.found = [changed.found for changed in self.study.changed]
        self.noise = {
            (layer.name, number): layer.output if layer.output is not None else math.inf
            for number, blame in enumerate(self.blames, start=1)
            for layer in blame.layers
        }
        self.workload = _workload(self.study)
        self._points: dict[tuple[tuple[str, int], ...], Point] = {}

    def price(self, chosen: Choice) -> tuple[Estimate, float]:
        """Predict the graph of a choice on the target; its weights in bytes."""
        study = self.study
        model = mixed(study.before, self.found, chosen)
        shapes.bind(model, self.workload)
        weights = sum(
            v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value
        )
        backend = prepare.choose_backend(study.target, study.backend)
        prepared = prepare.legalize(model, backend, study.target, self.workload)
        if prepared.refusals:
            return Estimate(None, notes=(prepared.refusals[0],)), float(weights)
        return prepare.predict(prepared, study.target), float(weights)

    def point(self, chosen: Choice) -> Point:
        """A choice, priced and evaluated."""
        kept = {name: number for name, number in chosen.items() if number}
        key = tuple(sorted(kept.items()))
        if key not in self._points:
            estimate, weights = self.price(kept)
            answer = self.study.ask(kept, self.study.data)
            noise = sum(self.noise[item] for item in kept.items())
            base = self._points.get(())
            drop = answer.evaluation.drop_from(base.evaluation) if base is not None else 0.0
            self._points[key] = Point(kept, estimate, weights, noise, answer.evaluation, drop)
        return self._points[key]

    def gains(self) -> dict[tuple[str, int], float]:
        """What taking each layer out of its recipe would lose, by the cost model (or in bytes).

        Layers of one form (operator, attributes, shapes) lose the same.
        """
        gains: dict[tuple[str, int], float] = {}
        for number, one in enumerate(self.found, start=1):
            everything = self.study.all_of(number)
            whole = self._cost(everything)
            known: dict[Any, float] = {}
            for index, layer in enumerate(one.layers, start=1):
                name = self.study.changed[number - 1].recipe.name
                self.progress(f"{name}, what each layer gains: {index} of {len(one.layers)}")
                form = _form(layer.before)
                if form not in known:
                    without = {k: v for k, v in everything.items() if k != layer.name}
                    known[form] = self._cost(without) - whole
                gains[layer.name, number] = known[form]
        return gains

    def _cost(self, chosen: Choice) -> float:
        estimate, weights = self.price(chosen)
        return weights if self.objective == "memory" else estimate.seconds or math.inf

    def front(self, limit: float) -> list[Point]:
        """Solve for a ladder of noise limits, and more finely where the drop crosses the limit."""
        gains = {k: g for k, g in self.gains().items() if g > 0 and math.isfinite(self.noise[k])}
        if gains:
            noises = [max(self.noise[key], 1e-12) for key in gains]
            low, high = math.log(min(noises)), math.log(max(sum(noises), min(noises) * 1.01))
            rungs = [math.exp(low + (high - low) * i / (RUNGS - 1)) for i in range(RUNGS)]
            tried = {rung: self._solve(gains, rung, i) for i, rung in enumerate(rungs, start=1)}
            for _ in range(REFINED):
                keeping = [r for r, p in tried.items() if p.drop <= limit]
                beyond = [r for r in tried if r > max(keeping, default=0.0)]
                if not keeping or not beyond:
                    break
                middle = math.sqrt(max(keeping) * min(beyond))
                tried[middle] = self._solve(gains, middle, len(tried) + 1)
        for number in range(1, len(self.found) + 1):
            self.point(self.study.all_of(number))
        return list(self._points.values())

    def _solve(self, gains: Mapping[tuple[str, int], float], limit: float, rung: int) -> Point:
        self.progress(f"mixes of precision: {rung}")
        return self.point(knapsack(gains, self.noise, limit))

    def notes(self, plain: Point) -> list[str]:
        """Which recipes gain nothing on this target: to be said before they cost accuracy."""
        notes = []
        for number, changed in enumerate(self.study.changed, start=1):
            point = self.point(self.study.all_of(number))
            here, there = point.figure(self.objective), plain.figure(self.objective)
            what = "no smaller" if self.objective == "memory" else "no faster"
            if here >= there:
                notes.append(
                    f"{changed.recipe.name} is predicted {what} than float on "
                    f"{self.study.target.name} ({there / here:.2f} times)"
                )
        return notes


def knapsack(
    gains: Mapping[tuple[str, int], float], noise: Mapping[tuple[str, int], float], limit: float
) -> dict[str, int]:
    """The choice of the largest gain whose noise stays within a limit, exactly.

    Args:
        gains, noise: By layer and number of the recipe; a layer takes one recipe or none.

    Raises:
        ToolchainMissing: scipy is not installed.
    """
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ImportError as error:
        raise ToolchainMissing(
            "scipy is not installed", about="--budget", remedy="pip install 'trivium[tune]'"
        ) from error
    keys = list(gains)
    layers = {name: row for row, name in enumerate(dict.fromkeys(name for name, _ in keys))}
    once = np.zeros((len(layers), len(keys)))
    for column, (name, _) in enumerate(keys):
        once[layers[name], column] = 1.0
    # Scaled, so that the solver's absolute tolerances mean the same for every model.
    cost = -np.array([gains[key] for key in keys]) / max(gains.values())
    weight = np.array([[noise[key] / limit for key in keys]])
    solved = milp(
        cost,
        constraints=[LinearConstraint(weight, ub=1.0), LinearConstraint(once, ub=1.0)],
        integrality=np.ones(len(keys)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if solved.x is None:
        return {}
    return {name: number for (name, number), x in zip(keys, solved.x, strict=True) if x > 0.5}


def _form(node: ir.Node) -> Any:
    """What layers have in common that cost the same: operator, attributes, shapes."""
    attributes = tuple(sorted((k, str(a)) for k, a in node.attributes.items()))
    shapes_in = tuple(dims(value) for value in node.inputs)
    return node.op_type, attributes, shapes_in, tuple(dims(value) for value in node.outputs)


def _workload(study: Study) -> Workload:
    """What is predicted: the user's shapes, a batch of one, the data's sizes for the rest."""
    given = study.context.workload
    dims_bound = dict(given.dims)
    for value in study.before.graph.inputs:
        rows = study.data.feeds.get(value.name or "")
        if rows is None or value.shape is None:
            continue
        for axis, (dim, size) in enumerate(zip(value.shape, rows.shape, strict=False)):
            if not isinstance(dim, int):
                dims_bound.setdefault(str(dim.value), 1 if axis == 0 else int(size))
    return replace(given, dims=dims_bound)


def as_recipe(study: Study, chosen: Choice) -> Recipe:
    """A choice as a recipe: the recipes' passes, each told which layers to leave alone."""
    steps: list[Step] = []
    used = [n for n in range(1, len(study.changed) + 1) if n in chosen.values()]
    for number in used:
        touched = [name for name, numbers in study.layers if number in numbers]
        left = [glob.escape(name) for name in touched if chosen.get(name, 0) != number]
        for step in study.changed[number - 1].recipe.steps:
            cls = plugins.get("trivium.passes", step.name)
            known = {option.name for option in options_of(cls)}
            options = dict(step.options)
            if "exclude" in known and left:
                options["exclude"] = [*options.get("exclude", ()), *left]
            steps.append(Step(step.name, options))
    names = "+".join(study.changed[number - 1].recipe.name for number in used)
    return Recipe(f"{names}-mixed", tuple(steps))


def to_toml(made: Recipe) -> str:
    """A recipe as a file that ``--recipe`` takes."""
    import tomli_w

    tables = [{"name": step.name, **_plain(step.options)} for step in made.steps]
    document = {"name": made.name, "description": made.description, "pass": tables}
    return tomli_w.dumps(document)


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(v) if isinstance(v, tuple) else v for key, v in options.items()}


def _verify(study: Study, made: Recipe) -> Answer:
    """Run a recipe as a compile would, and evaluate it on ONNX Runtime with all its fusions."""
    parsed = recipe.parse(to_toml(made))
    model = study.plain.clone()
    recipe.run(parsed, model, study.context)
    cpu = prepare.choose_backend(study.target, study.backend)
    if study.target.family == "cpu":
        for legalizing in cpu.legalize(study.target):
            legalizing(model)
    names = [output.name or "" for output in model.graph.outputs]
    with tempfile.TemporaryDirectory(prefix="trivium-explain-") as folder:
        path = models.save(model, Path(folder) / "model.onnx")[0]
        run = evaluate.session_run(path, names)
    return study.judge(lambda feed: next(iter(run(feed).values())), study.data)
