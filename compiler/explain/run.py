"""`explain`: a study opened, taken apart, and fitted to a budget where one is given."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from trivium.compiler.explain.blame import Explanation, blame
from trivium.compiler.explain.budget import Objective, fit_budget
from trivium.compiler.explain.study import open_study, require_layers
from trivium.compiler.prepare import Progress, silent
from trivium.compiler.recipe import Recipe
from trivium.compiler.types import Target


def explain(
    model: str | os.PathLike[str],
    recipes: Sequence[str | Recipe],
    data: str | os.PathLike[str],
    *,
    metric: str = "accuracy",
    shape: Sequence[str] = (),
    calibration: str | os.PathLike[str] | None = None,
    target: str | Target = "cpu",
    backend: str | None = None,
    samples: int = 128,
    window: int = 256,
    max_drop: float | None = None,
    objective: Objective = "latency",
    seed: int = 0,
    progress: Progress = silent,
) -> Explanation:
    """Say which pass, layer and tensor of each recipe costs how much.

    Args:
        model: An ``.onnx`` file or a checkpoint folder.
        recipes: Recipes that quantize, prune or cast; each is taken apart on its own.
        data: As for `trivium.compiler.evaluate.evaluate`; without labels the source model's
            outputs take their place.
        metric: As there.
        shape: As for a compile.
        calibration: Representative inputs for passes that calibrate; by default some of ``data``.
        target, backend: What the recipe's passes place their operators for, and whose speed counts.
        samples: On how many of the data's samples single layers are judged.
        max_drop: Find the mix of the recipes that is best by ``objective`` and whose metric drops
            by no more (points of a metric from 0 to 1, else a share of it).

    Raises:
        BadInput: The data does not fit, or no recipe changes any layer.
    """
    study = open_study(
        model,
        recipes,
        data,
        metric=metric,
        shape=shape,
        calibration=calibration,
        target=target,
        backend=backend,
        samples_each=samples,
        window=window,
        seed=seed,
        progress=progress,
    )
    require_layers(study)
    made = blame(study, calibrated_on_data=calibration is None, progress=progress)
    if max_drop is None:
        return made
    fitted = fit_budget(study, made.recipes, max_drop, objective=objective, progress=progress)
    return replace(made, budget=fitted)
