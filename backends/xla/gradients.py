"""Any ONNX model as a differentiable function of its weights: what fine-tuning, distillation and
quantization-aware training stand on.

>>> graph = trivium.differentiable("model.onnx")                    # doctest: +SKIP
>>> loss = lambda weights: mse(graph(weights, {"x": x})["y"], target)
>>> with graph.precise():
...     gradients = jax.grad(loss)(graph.weights)
>>> write_back(graph.model, updated)

Gradients pass straight through each QuantizeLinear/DequantizeLinear pair, clipped where the value
was. Integer weights stay as they are: what is trained is what was float.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from trivium.backends.xla.lowering import Lowered, lower, precise
from trivium.backends.xla.lowering.dtypes import is_float
from trivium.backends.xla.lowering.lazy import jnp
from trivium.compiler import model as models
from trivium.compiler.errors import BadInput


@dataclass(frozen=True)
class Differentiable:
    """A model as a pure JAX function and the pytree of its trainable weights.

    Attributes:
        model: The model; `write_back` puts changed weights into it.
        weights: Float weights by name, as jax arrays.
        fixed: The other constants, which the function closes over.
        lowered: The lowering underneath.
    """

    model: ir.Model
    weights: Mapping[str, Any]
    fixed: Mapping[str, Any]
    lowered: Lowered

    def __call__(self, weights: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Compute the outputs; pure, so jit, grad and vmap apply."""
        return self.lowered.function({**self.fixed, **weights}, inputs)

    @property
    def precise(self) -> Callable[[], AbstractContextManager[None]]:
        """The scope to differentiate and compile in, so that 64-bit inputs stay whole."""
        return precise


def differentiable(source: str | os.PathLike[str] | ir.Model) -> Differentiable:
    """Turn a model, or an ``.onnx`` file, into a differentiable function.

    Raises:
        BadInput: The model has no float weights to differentiate by.
    """
    model = models.load(source) if isinstance(source, (str, os.PathLike)) else source
    lowered = lower(model, quantized="straight-through")
    with precise():
        arrays = {name: jnp.asarray(array) for name, array in lowered.read().items()}
    weights = {name: array for name, array in arrays.items() if is_float(array.dtype)}
    if not weights:
        raise BadInput(
            "the model has no float weights to differentiate by",
            about=model.graph.name or "model",
            remedy="start from the float model: quantized weights are integers",
        )
    fixed = {name: array for name, array in arrays.items() if name not in weights}
    return Differentiable(model, weights, fixed, lowered)


def write_back(model: ir.Model, weights: Mapping[str, Any]) -> None:
    """Put changed weights into a model, in place, in the dtype that each has there.

    Args:
        weights: By the names that `differentiable` gave them; any subset.

    Raises:
        BadInput: An unknown name, or another shape.
    """
    places = dict(lower(model).places)
    for name, array in weights.items():
        value = places.get(name)
        if value is None:
            raise BadInput(f"the model has no weight {name!r}", about="write_back")
        new = np.asarray(array)
        old = _tensor(value)
        if new.shape != tuple(old.shape.numpy()):
            raise BadInput(
                f"{new.shape} where the weight {name!r} is {tuple(old.shape.numpy())}",
                about="write_back",
            )
        _store(value, ir.tensor(new.astype(old.dtype.numpy()), name=old.name))


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    tensor = ir.convenience.get_const_tensor(value)
    assert tensor is not None
    return tensor


def _store(value: ir.Value, tensor: ir.TensorProtocol) -> None:
    node = value.producer()
    if node is None:
        value.const_value = tensor
        return
    node.attributes["value"] = ir.AttrTensor("value", tensor)
    value.const_value = None
