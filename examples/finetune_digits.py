"""Fine-tune a small CNN on scikit-learn's digits, from ONNX to ONNX: no training framework.

    python examples/finetune_digits.py [OUT.onnx]

The graph is ONNX text with random weights; `trivium.differentiable` makes it a JAX function, Adam
runs on its pytree of weights, and ONNX Runtime scores the file that is written back.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import trivium
from trivium.backends.xla.gradients import write_back

GRAPH = """<ir_version: 10, opset_import: ["": 21]>
digits (float[n, 1, 8, 8] x) => (float[n, 10] logits) {
   a = Conv<pads = [1, 1, 1, 1]>(x, w1, b1)
   b = Relu(a)
   c = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(b)
   d = Conv<pads = [1, 1, 1, 1]>(c, w2, b2)
   e = Relu(d)
   f = GlobalAveragePool(e)
   g = Flatten(f)
   logits = Gemm(g, w3, b3)
}"""

SHAPES = {"w1": (16, 1, 3, 3), "w2": (32, 16, 3, 3), "w3": (32, 10)}


def untrained(seed: int = 0) -> ir.Model:
    """The network with He-initialized weights and zero biases."""
    rng = np.random.default_rng(seed)
    proto = onnx.parser.parse_model(GRAPH)
    for index, (name, shape) in enumerate(SHAPES.items(), 1):
        fan = shape[0] if len(shape) == 2 else int(np.prod(shape[1:]))
        weight = rng.normal(0, np.sqrt(2 / fan), shape).astype(np.float32)
        bias = np.zeros(shape[1] if len(shape) == 2 else shape[0], np.float32)
        for key, array in ((name, weight), (f"b{index}", bias)):
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array, key))
    return ir.from_proto(proto)


def accuracy(path: Path, x: Any, y: Any) -> float:
    """Top-1 accuracy on ONNX Runtime."""
    (logits,) = ort.InferenceSession(path).run(None, {"x": x})
    return float((np.argmax(logits, axis=1) == y).mean())


def train(graph: Any, x: Any, y: Any, steps: int = 300, rate: float = 0.01) -> dict[str, Any]:
    """Adam on cross entropy, batches of 64; returns the new weights."""

    def loss(weights: Any, x: Any, y: Any) -> Any:
        scores = jax.nn.log_softmax(graph(weights, {"x": x})["logits"])
        return -jnp.take_along_axis(scores, y[:, None], axis=1).mean()

    @jax.jit
    def step(weights: Any, mean: Any, square: Any, count: Any, x: Any, y: Any) -> Any:
        gradient = jax.grad(loss)(weights, x, y)
        mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mean, gradient)
        square = jax.tree.map(lambda s, g: 0.999 * s + 0.001 * g * g, square, gradient)
        size = rate * jnp.sqrt(1 - 0.999**count) / (1 - 0.9**count)
        weights = jax.tree.map(
            lambda w, m, s: w - (size * m / (jnp.sqrt(s) + 1e-8)).astype(w.dtype),
            weights,
            mean,
            square,
        )
        return weights, mean, square

    rng = np.random.default_rng(1)
    weights = dict(graph.weights)
    mean = square = jax.tree.map(jnp.zeros_like, weights)
    for count in range(1, steps + 1):
        batch = rng.choice(len(x), 64, replace=False)
        weights, mean, square = step(weights, mean, square, np.float32(count), x[batch], y[batch])
    return weights


def main(out: Path) -> None:
    """Train, write back, and print the accuracy before and after."""
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=0.25, random_state=0)
    model = untrained()
    ir.save(model, out)
    before = accuracy(out, x_test, y_test)
    graph = trivium.differentiable(model)
    with graph.precise():
        weights = train(graph, x_train, y_train)
    write_back(model, weights)
    ir.save(model, out)
    print(
        f"accuracy on {len(y_test)} digits: {before:.3f} before, "
        f"{accuracy(out, x_test, y_test):.3f} after; written to {out}"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "digits.onnx"))
