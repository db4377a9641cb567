"""One step of an optimizer, as ``ai.onnx.preview.training`` defines it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trivium.backends.xla.lowering.lazy import jnp
from trivium.backends.xla.lowering.registry import handles
from trivium.backends.xla.lowering.trace import Op

DOMAIN = "ai.onnx.preview.training"


def _each(groups: int, operands: tuple[Any, ...], step: Callable[..., tuple[Any, ...]]) -> Any:
    """Apply a step to each of the optimized tensors; operands and results come kind by kind."""
    count = len(operands) // groups
    rows = [step(*operands[index::count]) for index in range(count)]
    return tuple(value for kind in zip(*rows, strict=True) for value in kind)


@handles("Momentum", domain=DOMAIN)
def momentum(op: Op, rate: Any, time: Any, *operands: Any) -> Any:
    decay = op.attr("norm_coefficient")
    alpha = op.attr("alpha")
    beta = jnp.where(time > 0, op.attr("beta"), 1.0)
    nesterov = op.attr("mode") == "nesterov"

    def step(x: Any, gradient: Any, velocity: Any) -> tuple[Any, ...]:
        regular = decay * x + gradient
        new = (alpha * velocity + beta * regular).astype(x.dtype)
        direction = regular + alpha * new if nesterov else new
        return (x - rate * direction).astype(x.dtype), new

    return _each(3, operands, step)


@handles("Adagrad", domain=DOMAIN)
def adagrad(op: Op, rate: Any, time: Any, *operands: Any) -> Any:
    decay, epsilon = op.attr("norm_coefficient", 0.0), op.attr("epsilon", 1e-6)
    current = rate / (1 + time * op.attr("decay_factor", 0.0))

    def step(x: Any, gradient: Any, squares: Any) -> tuple[Any, ...]:
        regular = decay * x + gradient
        total = squares + regular * regular
        new = x - current * regular / (jnp.sqrt(total) + epsilon)
        return new.astype(x.dtype), total.astype(x.dtype)

    return _each(3, operands, step)


@handles("Adam", domain=DOMAIN)
def adam(op: Op, rate: Any, time: Any, *operands: Any) -> Any:
    decay, after = op.attr("norm_coefficient", 0.0), op.attr("norm_coefficient_post", 0.0)
    alpha, beta = op.attr("alpha", 0.9), op.attr("beta", 0.999)
    epsilon = op.attr("epsilon", 1e-6)
    corrected = rate * jnp.sqrt(1 - beta**time) / (1 - alpha**time)
    current = jnp.where(time > 0, corrected, rate)

    def step(x: Any, gradient: Any, mean: Any, square: Any) -> tuple[Any, ...]:
        regular = decay * x + gradient
        v = alpha * mean + (1 - alpha) * regular
        h = beta * square + (1 - beta) * regular * regular
        new = x - current * v / (jnp.sqrt(h) + epsilon)
        new = (1 - after) * new
        return new.astype(x.dtype), v.astype(x.dtype), h.astype(x.dtype)

    return _each(4, operands, step)
