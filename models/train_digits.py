"""Train the networks of `digits` and write them to ``weights/``: ``python -m
trivium.models.train_digits``. Needs scikit-learn and jax; deterministic on one machine, and
within rounding on another.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from trivium.compiler import model as models
from trivium.models import cnn, digits, mlp

EPOCHS = 60
BATCH = 32
DECAY = 1e-4


def main() -> None:
    """Train both networks, write them, and print their test accuracy."""
    train_x, train_y, test_x, test_y = digits.split()
    layers = _train(_init([(64, 64), (32, 64), (10, 32)]), _mlp_logits, train_x, train_y, rate=1e-3)
    models.save(mlp.build(layers, [1, 8, 8], name="digits_mlp"), digits.mlp())
    layers = _train(
        _init([(8, 1, 3, 3), (16, 8, 3, 3), (10, 64)]), _cnn_logits, train_x, train_y, rate=2e-3
    )
    models.save(cnn.build(layers[:2], layers[2], [1, 8, 8], name="digits_cnn"), digits.cnn())
    for path in (digits.mlp(), digits.cnn()):
        print(f"{path.name}: {accuracy(path, test_x, test_y):.4f}")


def accuracy(path: Path, x: Any, y: Any) -> float:
    """The share of images that a model classifies as labelled."""
    from onnxruntime import InferenceSession

    session = InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: x})
    return float((logits.argmax(1) == y).mean())


def _init(shapes: list[tuple[int, ...]]) -> list[mlp.Layer]:
    """He initialization; the first axis is the output's."""
    rng = np.random.default_rng(0)
    return [
        (
            (rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))).astype(np.float32),
            np.zeros(shape[0], np.float32),
        )
        for shape in shapes
    ]


def _mlp_logits(layers: Any, x: Any) -> Any:
    import jax

    x = x.reshape(len(x), -1)
    for weight, bias in layers[:-1]:
        x = jax.nn.relu(x @ weight.T + bias)
    weight, bias = layers[-1]
    return x @ weight.T + bias


def _cnn_logits(layers: Any, x: Any) -> Any:
    import jax
    from jax import lax

    for weight, bias in layers[:-1]:
        x = lax.conv(x, weight, (1, 1), "SAME") + bias[:, None, None]
        x = jax.nn.relu(x)
        x = lax.reduce_window(x, -np.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
    weight, bias = layers[-1]
    return x.reshape(len(x), -1) @ weight.T + bias


def _train(layers: Any, logits: Any, x: Any, y: Any, *, rate: float) -> list[mlp.Layer]:
    """Adam on the cross entropy, the step size falling to zero along a cosine."""
    import jax
    import jax.numpy as jnp

    def loss(layers: Any, x: Any, y: Any) -> Any:
        weights = sum((weight**2).sum() for weight, _ in layers)
        chosen = jax.nn.log_softmax(logits(layers, x))[jnp.arange(len(y)), y]
        return DECAY * weights - chosen.mean()

    @jax.jit
    def step(layers: Any, first: Any, second: Any, count: Any, rate: Any, x: Any, y: Any) -> Any:
        gradient = jax.grad(loss)(layers, x, y)
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradient)
        second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, second, gradient)
        size = rate * jnp.sqrt(1 - 0.999**count) / (1 - 0.9**count)
        layers = jax.tree.map(
            lambda w, m, v: w - size * m / (jnp.sqrt(v) + 1e-8), layers, first, second
        )
        return layers, first, second

    rng = np.random.default_rng(0)
    first = second = jax.tree.map(jnp.zeros_like, layers)
    steps = len(x) // BATCH
    for count in range(EPOCHS * steps):
        if count % steps == 0:
            order = rng.permutation(len(x))
        chosen = order[(count % steps) * BATCH :][:BATCH]
        now = rate * 0.5 * (1 + np.cos(np.pi * count / (EPOCHS * steps)))
        layers, first, second = step(layers, first, second, count + 1.0, now, x[chosen], y[chosen])
    return [(np.asarray(weight), np.asarray(bias)) for weight, bias in layers]


if __name__ == "__main__":
    main()
