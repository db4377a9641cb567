"""Gradients for passes that rank by them: what the loss, or the output, would miss of each weight.

With labels the loss is the task's. Without, a model that is its own teacher has no loss to speak
of; what is differentiated then is the likelihood of labels drawn from its own scores (the Fisher
information), or a random direction of its output where that is no score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from trivium.backends.xla.lowering import precise
from trivium.backends.xla.lowering.lazy import jax, jnp
from trivium.backends.xla.training.data import LABELS, Data
from trivium.backends.xla.training.losses import Objective, cross_entropy, objective
from trivium.backends.xla.training.settings import Settings
from trivium.backends.xla.training.twin import twin

Array = np.ndarray[Any, np.dtype[Any]]

BATCHES = 8
"""Batches that a ranking sees."""


def provider(data: Data, settings: Settings) -> Callable[[ir.Model], Iterator[Mapping[str, Array]]]:
    """What `trivium.compiler.recipe.Context` offers to passes as ``gradients``."""

    def gradients(model: ir.Model) -> Iterator[Mapping[str, Array]]:
        made = twin(model, model, scales=False)
        goal = objective(
            settings,
            made.graph,
            labelled=data.labels is not None,
            tokens=data.tokens,
            distill=data.labels is None,
        )

        def loss(parameters: Any, batch: Any, noise: Any) -> Any:
            feeds = {name: array for name, array in batch.items() if name != LABELS}
            run = partial(made.run, parameters, {})
            outputs = jax.vmap(run)(feeds) if data.fixed_batch else run(feeds)
            if goal.task is not None:
                return goal(outputs, {}, batch)
            return _unlabelled(goal, outputs, noise)

        differentiate = jax.jit(jax.grad(loss))
        for index in range(min(BATCHES, max(1, data.count // settings.batch))):
            batch = data.batch(index, settings.batch, settings.seed)
            with precise():
                key = jax.random.key(settings.seed + index)
                found = differentiate(made.start, batch, key)
                yield {name: np.asarray(array) for name, array in found.items()}

    return gradients


def _unlabelled(goal: Objective, outputs: Mapping[str, Any], key: Any) -> Any:
    total: Any = jnp.zeros((), "float32")
    for name in goal.outputs:
        value = outputs[name]
        if goal.kinds[name] == "kl":
            drawn = jax.random.categorical(key, jax.lax.stop_gradient(value))
            total = total + cross_entropy(value, drawn)
        else:
            signs = jax.random.rademacher(key, value.shape, value.dtype)
            total = total + jnp.mean(value * signs)
    return total.astype("float32")
