"""What a recipe does to a model's metric, as each backend has it placed, on ONNX Runtime."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trivium.compiler import evaluate, prepare, recipe, samples
from trivium.compiler import model as models
from trivium.compiler import targets as target_names
from trivium.compiler.errors import BadInput, TriviumError
from trivium.compiler.metrics import Evaluation
from trivium.compiler.passing import Placing
from trivium.compiler.prepare import Progress, silent
from trivium.compiler.recipe import Context, Recipe

if TYPE_CHECKING:
    import onnx_ir as ir

CALIBRATED_ON = 128
"""Samples of the data that passes calibrate on where no others are given."""


def judge(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    metric: str = "accuracy",
    calibration: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Callable[[Recipe, str], Mapping[str, Any]]:
    """Return a function from a recipe and a backend to metric, value, drop and samples.

    The batch stays open. A recipe that cannot be run or evaluated gets the ``reason`` instead of
    a value. Backends have quantization placed differently: each placement is evaluated once, by
    ONNX Runtime on the CPU.

    Raises:
        BadInput: The source model cannot be evaluated on the data.
    """
    path = Path(model)
    before = models.load(path)
    prepare.run_recipe(before, recipe.read("none"), Context())
    plain = _runner(before.clone())
    rows = evaluate.read_data(Path(data), plain, path, metric=metric)
    labelled = metric == "perplexity" or metric.startswith("map:") or "y" in rows.rows
    against = None if labelled else plain
    progress("evaluating: the source")
    base = evaluate.score(plain, rows, metric, against=against)
    feeds: Sequence[Any]
    if calibration is not None:
        feeds = samples.read_npz(calibration, plain.inputs)
    else:
        feeds = [feed for feed, *_ in rows.pick(CALIBRATED_ON, seed).batches(plain.inputs)]
    cpu = target_names.find("cpu")
    known: dict[tuple[str, ...], Mapping[str, Any]] = {}

    def of(chosen: Recipe, context: Context) -> Mapping[str, Any]:
        if not chosen.steps:
            return _row(metric, base, base)
        progress(f"evaluating: {chosen.name} as {context.backend} has it")
        made = before.clone()
        try:
            recipe.run(chosen, made, context)
            value = evaluate.score(_runner(made), rows, metric, against=against)
        except TriviumError as error:
            return {"metric": metric, "value": None, "drop": None, "reason": str(error)}
        return _row(metric, value, base)

    def once(chosen: Recipe, backend: str) -> Mapping[str, Any]:
        context = Context(cpu, feeds, seed=seed, backend=backend)
        lock = recipe.lock(chosen, seed=seed, model_sha256="", calibration=None)
        made = [recipe.instantiate(step, context) for step in chosen.steps]
        key = (lock, *(one.placed_for() for one in made if isinstance(one, Placing)))
        if key not in known:
            known[key] = of(chosen, context)
        return known[key]

    return once


def _row(metric: str, value: Evaluation, base: Evaluation) -> dict[str, Any]:
    drop = value.drop_from(base)
    return {"metric": metric, "value": value.value, "drop": drop, "samples": value.samples}


def _runner(model: ir.Model) -> evaluate.Runner:
    """A model, legalized for this CPU, ready to be evaluated."""
    cpu = target_names.find("cpu")
    for legalizing in prepare.choose_backend(cpu, None).legalize(cpu):
        legalizing(model)
    inputs, outputs = models.signature(model)
    with tempfile.TemporaryDirectory(prefix="trivium-") as folder:
        path = models.save(model, Path(folder) / "model.onnx")[0]
        run = evaluate.session_run(path, [info.name for info in outputs])
    return evaluate.Runner(run, inputs, outputs)


def require_data(max_drop: float | None, data: str | None) -> None:
    """Raise ``BadInput`` if a drop is limited that nothing measures."""
    if max_drop is not None and data is None:
        raise BadInput("needs data to evaluate on", about="--max-drop", remedy="give --data FILE")
