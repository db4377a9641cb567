"""A model, recipes and data, ready to answer: what comes out if these layers follow that recipe?"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from trivium.compiler import dataset, metrics, plugins, prepare, recipe, samples, shapes
from trivium.compiler import model as models
from trivium.compiler import targets as target_names
from trivium.compiler.dataset import Dataset
from trivium.compiler.errors import BadInput
from trivium.compiler.evaluate import OUTPUT_BYTES
from trivium.compiler.explain import instrument
from trivium.compiler.explain.diff import FLOATS, Difference, difference
from trivium.compiler.metrics import Evaluation
from trivium.compiler.prepare import Progress, silent
from trivium.compiler.recipe import Applied, Context, Recipe, Step
from trivium.compiler.types import Target, Workload

Array = np.ndarray[Any, np.dtype[Any]]

ACTIVATION_BYTES = 256 << 20
"""Most bytes of activations, before and after the recipe together, that one run should hold."""

KEPT_BYTES = 256 << 20
"""Most bytes of outputs of the source model that are kept (in a file) to compare with."""


@dataclass(frozen=True)
class Answer:
    """The metric, and the noise at the first output relative to its signal (a power ratio)."""

    evaluation: Evaluation
    noise: float | None


@dataclass(frozen=True)
class Changed:
    """What a recipe made of the model.

    Attributes:
        after: The model after all its passes.
        stages: The model after each pass that changed it, the last one left out.
        applied: What each pass did.
    """

    recipe: Recipe
    after: ir.Model
    found: Difference
    stages: tuple[tuple[str, ir.Model], ...]
    applied: tuple[Applied, ...]


@dataclass
class Study:
    """See the module; made by `open_study`.

    Attributes:
        plain: In normal form.
        before: What layers are compared with: ``plain`` after the passes that only get it ready for
            the lossy ones (equalize, smooth-quant). One layer of what they did is no layer's error.
        data, part: What to evaluate on, and the part of it that single layers are judged on.
        layers: Name, and the numbers of the recipes that change it, in the switches' order.
        agreement: Whether the data has no labels, so that the source model's outputs are those.
    """

    source: Path
    plain: ir.Model
    before: ir.Model
    changed: tuple[Changed, ...]
    data: Dataset
    part: Dataset
    metric: str
    target: Target
    backend: str
    shape: tuple[str, ...]
    context: Context
    agreement: bool
    layers: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    _folder: Any = None
    _run: instrument.Run | None = None
    _references: dict[int, list[Path]] = field(default_factory=dict)

    def choice(self, chosen: Mapping[str, int]) -> Array:
        """Switches: layer -> number of the recipe that it follows; the others stay float."""
        return np.array([chosen.get(name, 0) for name, _ in self.layers], np.int64)

    def all_of(self, number: int) -> dict[str, int]:
        """The choice of a recipe for every layer that it changes."""
        return {name: number for name, numbers in self.layers if number in numbers}

    def ask(self, chosen: Mapping[str, int], data: Dataset | None = None) -> Answer:
        """Evaluate with some layers lossy; on ``part`` unless other data is given."""
        switches = {instrument.SWITCHES: self.choice(chosen)}
        assert self._run is not None
        run = self._run
        return self.judge(lambda feed: run({**feed, **switches})[0], data)

    def ask_model(self, model: ir.Model, data: Dataset | None = None) -> Answer:
        """Evaluate another model of the same inputs."""
        opened = instrument.session(model.clone())
        return self.judge(lambda feed: opened(feed)[0], data)

    def judge(self, run: Any, data: Dataset | None = None) -> Answer:
        """Evaluate a function from feeds to the first output."""
        chosen = self.part if data is None else data
        shown = metrics.make(self.metric)
        signal = noise = 0.0
        references = self._reference(chosen)
        for index, (feed, rows, count) in enumerate(self._batches(chosen)):
            output = np.asarray(run(feed))[:count]
            if references is not None:
                expected = np.load(references[index], mmap_mode="r")
                if self.agreement:
                    rows = {**rows, "y": expected}
                if output.dtype.kind == "f" or expected.dtype.kind == "f":
                    wide = expected.astype(np.float64)
                    signal += float((wide**2).sum())
                    noise += float(((output.astype(np.float64) - wide) ** 2).sum())
            shown.update({"output": output}, rows)
        return Answer(shown.result(), _ratio(noise, signal))

    def _reference(self, data: Dataset) -> list[Path] | None:
        """The source model's outputs on data, kept in files; none if they are not needed."""
        if data is not self.part and not self.agreement:
            return None
        key = id(data)
        if key not in self._references:
            paths = []
            assert self._run is not None
            for index, (feed, _, count) in enumerate(self._batches(data)):
                none = {instrument.SWITCHES: self.choice({})}
                output = np.asarray(self._run({**feed, **none})[0])[:count]
                path = Path(self._folder.name) / f"{len(self._references)}_{index}.npy"
                np.save(path, output)
                paths.append(path)
            self._references[key] = paths
        return self._references[key]

    def _batches(self, data: Dataset) -> Iterator[tuple[dict[str, Array], dict[str, Array], int]]:
        inputs = models.signature(self.before)[0]
        return data.batches(inputs, batch_of(self.before, data))

    def measure(self, number: int) -> list[tuple[instrument.Probe, float | None]]:
        """The noise of every layer and value under a recipe, in one run over ``part``."""
        changed = self.changed[number - 1]
        model, probes = instrument.measuring(self.before, changed.after, changed.found)
        if not probes:
            return []
        run = instrument.session(model)
        sums = np.zeros(2 * len(probes))
        for feed, _, _ in self._batches(self.part):
            sums += np.array(run(feed), np.float64)
        return [
            (probe, _ratio(float(sums[2 * i + 1]), float(sums[2 * i])))
            for i, probe in enumerate(probes)
        ]


def open_study(
    source: str | os.PathLike[str],
    recipes: Sequence[str | Recipe],
    data: str | os.PathLike[str],
    *,
    metric: str = "accuracy",
    shape: Sequence[str] = (),
    calibration: str | os.PathLike[str] | None = None,
    target: str | Target = "cpu",
    backend: str | None = None,
    samples_each: int = 128,
    window: int = 256,
    seed: int = 0,
    progress: Progress = silent,
) -> Study:
    """Run the recipes and build the model whose layers can be switched; see `explain`."""
    metrics.make(metric)
    path = Path(source)
    progress("reading the model")
    loaded = models.load(path)
    workload = shapes.parse(shape, models.signature(loaded)[0])
    rows = _data(loaded, workload, Path(data), path, metric, window)
    found = target_names.find(target) if isinstance(target, str) else target
    engine = prepare.choose_backend(found, backend).name
    plain, _ = prepare.optimize(loaded, "none", shape=shape)
    size = _output_bytes(plain, rows)
    kept = max(1, min(samples_each, KEPT_BYTES // max(1, size)))
    part = rows.pick(kept, seed)
    inputs = models.signature(plain)[0]
    feeds: Sequence[Any]
    if calibration is not None:
        feeds = samples.read_npz(calibration, inputs)
    else:
        feeds = [feed for feed, _, _ in part.batches(inputs, batch_of(plain, part))]
    context = Context(found, feeds, workload, seed, engine)
    chosen = [recipe.read(given) if isinstance(given, str) else given for given in recipes]
    before = _made_ready(plain, chosen, context)
    changed = []
    for one in chosen:
        progress(f"recipe {one.name}")
        changed.append(_change(plain, before, one, context))
    made = Study(
        path, plain, before, tuple(changed), rows, part, metric, found, engine, tuple(shape),
        context,
        agreement=metric != "perplexity" and not metric.startswith("map:") and "y" not in rows.rows,
    )  # fmt: skip
    progress("building the model whose layers can be switched")
    model, made.layers = instrument.switchable(before, [one.found for one in changed])
    made._run = instrument.session(model)
    made._folder = tempfile.TemporaryDirectory(prefix="trivium-explain-")
    return made


def _data(
    model: ir.Model, workload: Workload, data: Path, path: Path, metric: str, window: int
) -> Dataset:
    bound = model.clone()
    shapes.bind(bound, workload)
    inputs = models.signature(bound)[0]
    if metric == "perplexity":
        return dataset.read_tokens(data, inputs, path, window=window)
    return dataset.read(data, inputs)


def _lead(chosen: Recipe) -> tuple[Step, ...]:
    """The passes before the first lossy one, of a recipe that has one: they keep all outputs."""
    for index, step in enumerate(chosen.steps):
        if plugins.get("trivium.passes", step.name).preserves == "lossy":
            return chosen.steps[:index]
    return ()


def _made_ready(plain: ir.Model, recipes: Sequence[Recipe], context: Context) -> ir.Model:
    """The model after the passes that lead any of the recipes."""
    before = plain.clone()
    done: list[Step] = []
    for chosen in recipes:
        for step in _lead(chosen):
            if step not in done:
                recipe.run(replace(chosen, steps=(step,)), before, context)
                done.append(step)
    return before


def _change(plain: ir.Model, before: ir.Model, chosen: Recipe, context: Context) -> Changed:
    lead = len(_lead(chosen))
    after = plain.clone()
    stages: list[tuple[str, ir.Model]] = []
    applied: list[Applied] = []
    for index, step in enumerate(chosen.steps):
        if index == lead:
            after = before.clone()
        rows = recipe.run(replace(chosen, steps=(step,)), after, context)
        applied += rows
        if any(row.modified for row in rows):
            stages.append((step.name, after.clone()))
    return Changed(chosen, after, difference(before, after), tuple(stages), tuple(applied))


def _output_bytes(model: ir.Model, data: Dataset) -> int:
    """Bytes of the first output for one sample."""
    return 4 * math.prod(_sizes(model.graph.outputs[0], _known(model, data))[1:])


def _known(model: ir.Model, data: Dataset) -> dict[str, int]:
    known = {}
    for value in model.graph.inputs:
        if value.shape is None or value.name not in data.feeds:
            continue
        for dim, size in zip(value.shape, data.feeds[value.name or ""].shape, strict=False):
            if not isinstance(dim, int):
                known[str(dim.value)] = int(size)
    return known


def _sizes(value: ir.Value, known: Mapping[str, int]) -> list[int]:
    dims = value.shape if value.shape is not None else ()
    return [dim if isinstance(dim, int) else known.get(str(dim.value), 1) for dim in dims]


def batch_of(model: ir.Model, data: Dataset) -> int:
    """How many samples a run takes so that all activations together stay small.

    What is symbolic and leads is the batch, whatever its name.
    """
    known = _known(model, data)
    held = 0
    for node in model.graph:
        for value in node.outputs:
            if value.dtype in FLOATS:
                held += 4 * math.prod(_sizes(value, known)[1:])
    most = min(
        ACTIVATION_BYTES // max(1, 3 * held), OUTPUT_BYTES // max(1, _output_bytes(model, data))
    )
    return max(1, min(dataset.BATCH, most))


def _ratio(noise: float, signal: float) -> float | None:
    """Noise over signal; None where either is beyond floating point, or there is no signal."""
    if not math.isfinite(noise) or not math.isfinite(signal):
        return None
    if signal <= 0.0:
        return 0.0 if noise == 0.0 else None
    return noise / signal


def decibels(noise: float | None) -> float | None:
    """A signal-to-noise ratio in dB; None for no noise at all, or an unknown one."""
    return None if not noise else -10.0 * math.log10(noise)


def require_layers(study: Study) -> None:
    """Raise ``BadInput`` if no recipe changed any layer."""
    if study.layers:
        return
    names = ", ".join(one.recipe.name for one in study.changed)
    declined = [reason for one in study.changed for row in one.applied for reason in row.declined]
    notes = [note for one in study.changed for note in one.found.notes]
    why = (notes or declined or ["it found nothing to change"])[0]
    raise BadInput(f"the recipe {names} changes no layer: {why}", about=str(study.source))
