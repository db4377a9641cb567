"""Zeros during training: those that a pruning recipe made stay, or come step by step.

With a gradual schedule (Zhu and Gupta, 2017) training starts dense, and the sparsity rises along
``s = s_final * (1 - (1 - t)^3)``; each time the pass itself is run on the weights as they are then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from trivium.backends.xla.gradients import write_back
from trivium.backends.xla.lowering.lazy import jnp
from trivium.backends.xla.training.twin import SCALE, Twin
from trivium.compiler import recipe
from trivium.compiler.errors import BadInput
from trivium.compiler.recipe import Context, Recipe, Step
from trivium.passes.pruning import weights

Array = np.ndarray[Any, np.dtype[Any]]

GRADUAL = ("prune-magnitude", "prune-n-m")
"""Passes whose sparsity can rise step by step: they look at the weights alone."""

FIXED = {
    "prune-structured": "takes units out, and the graph that is trained keeps its shapes",
    "prune-layers": "takes layers out, and the graph that is trained keeps its nodes",
    "prune-wanda": "ranks by what flows through the source model, not the one in training",
    "prune-sparsegpt": "changes the weights that stay, which training is changing as well",
}
"""Why the other pruning passes have to run before the first update."""

STAGES = 10
"""How often the sparsity rises in a gradual schedule."""


def makes_zeros(chosen: Recipe) -> bool:
    """Whether a recipe prunes single weights, so that their zeros are to be held."""
    return any(step.name.startswith("prune-") for step in chosen.steps)


def masks(made: Twin) -> dict[str, Any]:
    """What to keep of each weight of a product that has zeros: everything else."""
    found = {}
    for value, _ in weights(made.graph, (), 1):
        name = value.name or ""
        parameter = made.start.get(name)
        if parameter is None:
            continue
        # Of a quantized weight what rounds to zero cannot be told from what was pruned.
        shown = made.weights({name: parameter, **_scale(made, name)}, {})[name]
        kept = np.asarray(shown) != 0
        if not kept.all():
            found[name] = jnp.asarray(kept)
    return found


def _scale(made: Twin, name: str) -> dict[str, Any]:
    key = name + SCALE
    return {key: made.start[key]} if key in made.start else {}


@dataclass(frozen=True)
class Schedule:
    """How a recipe's sparsity is reached.

    Attributes:
        steps: The pruning steps, run again at each stage.
        ends: The update after which the full sparsity holds; 0 where it holds from the start.
    """

    steps: tuple[Step, ...]
    ends: int

    def due(self, step: int) -> float | None:
        """The share of the sparsity to bring about before an update; None to leave things."""
        if not self.steps or step > self.ends:
            return None
        every = max(1, self.ends // STAGES)
        if step == self.ends:
            return 1.0
        return None if step % every else 1 - (1 - step / self.ends) ** 3

    def masks(self, made: Twin, parameters: dict[str, Any], share: float) -> dict[str, Any]:
        """Prune the weights as they are to a share of the final sparsity."""
        scratch = made.graph.clone()
        current = {n: v for n, v in parameters.items() if not n.endswith(SCALE)}
        write_back(scratch, current)
        recipe.run(Recipe("gradual", tuple(_partly(s, share) for s in self.steps)), scratch)
        found = {}
        for value, _ in weights(scratch, (), 1):
            if value.name in parameters and value.const_value is not None:
                kept = value.const_value.numpy() != 0
                if not kept.all():
                    found[value.name] = jnp.asarray(kept)
        return found


def _partly(step: Step, share: float) -> Step:
    """A pruning step with a share of its sparsity."""
    options = {key.replace("-", "_"): value for key, value in step.options.items()}
    if step.name == "prune-n-m":
        n, m = options.get("n", 2), options.get("m", 4)
        return Step(step.name, {**options, "n": m - round(share * (m - n)), "m": m})
    return Step(step.name, {**options, "sparsity": share * float(options.get("sparsity", 0.5))})


def divided(chosen: Recipe, share: float, updates: int) -> tuple[Recipe, Schedule]:
    """Take the pruning steps out of a recipe that is to reach its sparsity while training.

    Args:
        share: Of the updates over which it does; 0 leaves the recipe as it is.

    Raises:
        BadInput: There is no pruning that could be gradual.
    """
    if not share:
        return chosen, Schedule((), 0)
    taken = tuple(step for step in chosen.steps if step.name in GRADUAL)
    if not taken:
        whys = [f"{s.name} {FIXED[s.name]}" for s in chosen.steps if s.name in FIXED]
        reason = f": {'; '.join(whys)}" if whys else ""
        raise BadInput(
            f"the recipe {chosen.name!r} has no pass whose sparsity could rise{reason}",
            about="--gradual",
            remedy=f"use one of {', '.join(GRADUAL)}"
            + (", or leave --gradual out" if whys else ""),
        )
    for step in taken:
        recipe.instantiate(step, Context())
    left = tuple(step for step in chosen.steps if step not in taken)
    return Recipe(chosen.name, left, chosen.description), Schedule(
        taken, max(1, int(share * updates))
    )


def zeros(model: ir.Model) -> float:
    """The share of zeros among the weights of products."""
    total = count = 0
    for value, _ in weights(model, (), 1):
        if value.const_value is not None:
            array = value.const_value.numpy()
            total, count = total + array.size, count + int(np.count_nonzero(array == 0))
    return count / total if total else 0.0
