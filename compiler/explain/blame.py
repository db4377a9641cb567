"""Which pass, which layer and which tensor of a recipe costs how much."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from trivium.compiler.explain.instrument import Probe
from trivium.compiler.explain.study import Answer, Changed, Study, decibels
from trivium.compiler.metrics import Evaluation
from trivium.compiler.prepare import Progress, silent
from trivium.compiler.recipe import asks_for

if TYPE_CHECKING:
    from trivium.compiler.explain.budget import Fitted


@dataclass(frozen=True)
class TensorBlame:
    """What storing a tensor in fewer bits costs.

    Attributes:
        stored: The dtype that it is stored in.
        noise: Power of the error over that of the tensor; 0 is exact, None unknown.
    """

    name: str
    stored: str
    weight: bool
    noise: float | None


@dataclass(frozen=True)
class LayerBlame:
    """What a layer costs.

    Attributes:
        local: Noise at its own output when what it reads is float.
        cumulative: Noise at its output when everything before it is lossy too.
        output: Noise at the model's first output when it alone is lossy.
        metric: The metric when it alone is lossy.
        drop: How much worse than the source's that is; see `Evaluation.drop_from`.
    """

    name: str
    op_type: str
    local: float | None
    cumulative: float | None
    output: float | None
    metric: float
    drop: float
    tensors: tuple[TensorBlame, ...]


@dataclass(frozen=True)
class PassBlame:
    """The model after a pass: noise at its output, the metric, and what the pass itself added."""

    name: str
    output: float | None
    metric: float
    drop: float


@dataclass(frozen=True)
class Blame:
    """A recipe, taken apart.

    Attributes:
        value: The metric of the whole recipe, over all of the data.
        layers: In graph order; `worst` sorts them.
        path: Noise along the graph: every value that both graphs have, in graph order.
    """

    recipe: str
    value: float
    drop: float
    output: float | None
    passes: tuple[PassBlame, ...]
    layers: tuple[LayerBlame, ...]
    path: tuple[tuple[str, float | None], ...]
    notes: tuple[str, ...]

    @property
    def worst(self) -> list[LayerBlame]:
        """The layers, those that disturb the model's output most first."""
        return sorted(self.layers, key=lambda layer: -(layer.output or 0.0))


@dataclass(frozen=True)
class Explanation:
    """The blame of one or more recipes on a model.

    Attributes:
        baseline: The source model's own metric on all of the data.
        judged_on: How many samples single layers were judged on.
        budget: The mix of precisions that keeps a limit, where one was asked for.
    """

    model: str
    metric: str
    baseline: Evaluation
    judged_on: int
    recipes: tuple[Blame, ...]
    notes: tuple[str, ...] = ()
    budget: Fitted | None = None

    def to_json(self) -> dict[str, Any]:
        """What ``trivium explain --json`` prints."""
        return {
            "kind": "explanation",
            "model": self.model,
            "metric": self.metric,
            "higher_is_better": self.baseline.higher_is_better,
            "baseline": {"value": self.baseline.value, "samples": self.baseline.samples},
            "judged_on": self.judged_on,
            "recipes": [_blame_json(one) for one in self.recipes],
            "budget": None if self.budget is None else self.budget.to_json(),
            "notes": list(self.notes),
        }


def _blame_json(blame: Blame) -> dict[str, Any]:
    return {
        "recipe": blame.recipe,
        "value": blame.value,
        "drop": blame.drop,
        **_both("output", blame.output),
        "passes": [
            {"name": p.name, "value": p.metric, "drop": p.drop, **_both("output", p.output)}
            for p in blame.passes
        ],
        "layers": [
            {
                "name": layer.name,
                "op_type": layer.op_type,
                **_both("local", layer.local),
                **_both("cumulative", layer.cumulative),
                **_both("output", layer.output),
                "value": layer.metric,
                "drop": layer.drop,
                "tensors": [
                    {
                        "name": tensor.name,
                        "stored": tensor.stored,
                        "weight": tensor.weight,
                        "noise": tensor.noise,
                        "snr_db": decibels(tensor.noise),
                    }
                    for tensor in layer.tensors
                ],
            }
            for layer in blame.layers
        ],
        "path": [{"value": name, "noise": noise} for name, noise in blame.path],
        "notes": list(blame.notes),
    }


def _both(name: str, noise: float | None) -> dict[str, float | None]:
    """A noise ratio and the same in dB; the dB are null for no noise at all."""
    return {f"{name}_noise": noise, f"{name}_snr_db": decibels(noise)}


def blame(
    study: Study, *, calibrated_on_data: bool = False, progress: Progress = silent
) -> Explanation:
    """Take every recipe of a study apart."""
    progress("the source model")
    whole = study.ask({}, study.data)
    part = study.ask({})
    found = [_blame(study, number, part, progress) for number in range(1, len(study.changed) + 1)]
    notes = []
    if study.agreement:
        notes.append("the data has no labels: the metric is agreement with the source model")
    if calibrated_on_data and any(_calibrates(one) for one in study.changed):
        notes.append("calibrated on the samples that layers are judged on; give others: --calib")
    return Explanation(
        study.source.name,
        study.metric,
        whole.evaluation,
        len(study.part),
        tuple(_whole(study, one, whole, number) for number, one in enumerate(found, start=1)),
        tuple(notes),
    )


def _calibrates(changed: Changed) -> bool:
    return asks_for(changed.recipe, "calibration")


def _whole(study: Study, found: Blame, baseline: Answer, number: int) -> Blame:
    """A blame with the metric of the whole recipe over all of the data."""
    answer = study.ask_model(study.changed[number - 1].after, study.data)
    drop = answer.evaluation.drop_from(baseline.evaluation)
    return replace(found, value=answer.evaluation.value, drop=drop)


def _blame(study: Study, number: int, baseline: Answer, progress: Progress) -> Blame:
    changed = study.changed[number - 1]
    name = changed.recipe.name
    progress(f"{name}, the noise of every layer")
    measured = study.measure(number)
    local, cumulative, tensors, path = _sorted(measured)
    layers = []
    mine = changed.found.layers
    for index, layer in enumerate(mine, start=1):
        progress(f"{name}, one layer at a time: {index} of {len(mine)}")
        answer = study.ask({layer.name: number})
        layers.append(
            LayerBlame(
                layer.name,
                layer.op_type,
                local.get(layer.name),
                cumulative.get(layer.name),
                answer.noise,
                answer.evaluation.value,
                answer.evaluation.drop_from(baseline.evaluation),
                tuple(tensors.get(layer.name, ())),
            )
        )
    progress(f"{name}, pass by pass")
    passes = []
    for step, model in changed.stages:
        answer = study.ask_model(model)
        drop = answer.evaluation.drop_from(baseline.evaluation)
        passes.append(PassBlame(step, answer.noise, answer.evaluation.value, drop))
    last = passes[-1] if passes else None
    return Blame(
        name,
        last.metric if last else baseline.evaluation.value,
        last.drop if last else 0.0,
        last.output if last else 0.0,
        tuple(passes),
        tuple(layers),
        tuple(path),
        changed.found.notes,
    )


Noises = dict[str, float | None]


def _sorted(
    measured: Sequence[tuple[Probe, float | None]],
) -> tuple[Noises, Noises, dict[str, list[TensorBlame]], list[tuple[str, float | None]]]:
    """Probes by what they say: the worst output of each layer, its tensors, the path."""
    local: Noises = {}
    cumulative: Noises = {}
    tensors: dict[str, list[TensorBlame]] = {}
    path: list[tuple[str, float | None]] = []
    for probe, noise in measured:
        if probe.kind == "tensor":
            found = TensorBlame(probe.value, probe.stored, probe.weight, noise)
            tensors.setdefault(probe.layer, []).append(found)
            continue
        into = local if probe.kind == "local" else cumulative
        known = into.get(probe.layer)
        into[probe.layer] = noise if known is None else max(known, noise or 0.0)
        if probe.kind == "cumulative":
            path.append((probe.value, noise))
    return local, cumulative, tensors, path
