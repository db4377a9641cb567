"""A thin layer over onnx_ir in which an architecture reads like its paper.

Nodes and values are named after the scope that they are made in; constants are stored once; the
weights of a checkpoint become initializers under their own names, mapped and not read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir

from trivium.compiler.model import OPSET
from trivium.models.checkpoint import Checkpoint

Dim = int | str


class Builder:
    """Builds one graph at the opset of normal form.

    Args:
        name: Of the graph.
        checkpoint: Where `weight` and the layers find their tensors.
    """

    def __init__(self, name: str, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.graph = ir.Graph([], [], nodes=[], name=name, opset_imports={"": OPSET})
        self._scope: list[str] = []
        self._names: dict[str, int] = {}

    def model(self) -> ir.Model:
        """Return the model, every value typed and shaped as far as inference goes."""
        from trivium.passes.infer_shapes import InferShapes

        model = ir.Model(self.graph, ir_version=11, producer_name="trivium")
        InferShapes()(model)
        return model

    @contextmanager
    def scope(self, name: str | int) -> Iterator[None]:
        """Name what is made inside the block ``<outer scopes>.<name>...``."""
        self._scope.append(str(name))
        try:
            yield
        finally:
            self._scope.pop()

    @contextmanager
    def absolute_scope(self, name: str) -> Iterator[None]:
        """Name what is made inside the block ``<name>...``: for what several scopes share."""
        outer, self._scope = self._scope, [name]
        try:
            yield
        finally:
            self._scope = outer

    def path(self, name: str) -> str:
        """The full name of something in the current scope."""
        return ".".join([*self._scope, name])

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[Dim]) -> ir.Value:
        """Add a graph input."""
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.graph.inputs.append(value)
        return value

    def output(self, name: str, value: ir.Value, shape: Sequence[Dim]) -> None:
        """Return a float32 ``value`` from the graph under ``name``."""
        value.name = name
        self.typed(value, ir.DataType.FLOAT, shape)
        self.graph.outputs.append(value)

    def op(
        self, op_type: str, *inputs: ir.Value | None, name: str = "", **attributes: Any
    ) -> ir.Value:
        """Add a node of the standard domain with one output and return that."""
        (output,) = self.ops(op_type, 1, *inputs, name=name, **attributes)
        return output

    def ops(
        self,
        op_type: str,
        outputs: int,
        *inputs: ir.Value | None,
        name: str = "",
        **attributes: Any,
    ) -> Sequence[ir.Value]:
        """Add a node of the standard domain and return its outputs."""
        unique = self._unique(self.path(name or op_type))
        given = {key: value for key, value in attributes.items() if value is not None}
        node = ir.node(op_type, list(inputs), given, num_outputs=outputs, name=unique)
        for index, value in enumerate(node.outputs):
            value.name = f"{unique}.{index}" if outputs > 1 else f"{unique}.out"
        self.graph.append(node)
        return node.outputs

    def _unique(self, name: str) -> str:
        count = self._names[name] = self._names.get(name, 0) + 1
        return name if count == 1 else f"{name}_{count}"

    def typed(self, value: ir.Value, dtype: ir.DataType, shape: Sequence[Dim]) -> ir.Value:
        """Say what inference could not find out by itself (``seq`` after a Range) and return it."""
        value.type = ir.TensorType(dtype)
        value.shape = ir.Shape(shape)
        return value

    def constant(self, content: Any, dtype: Any = np.int64) -> ir.Value:
        """Store a small constant, once for each content."""
        array = np.asarray(content, dtype)
        name = f"{array.dtype}({array.tolist()})".replace(" ", "")
        return self.store(ir.tensor(array, name=name))

    def store(self, tensor: ir.TensorProtocol) -> ir.Value:
        """Store a tensor under its name, once for each name."""
        name = tensor.name or ""
        found = self.graph.initializers.get(name)
        if found is not None:
            return found
        value = ir.Value(
            name=name,
            shape=ir.Shape(tensor.shape.numpy()),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.graph.register_initializer(value)
        return value

    # Layers, with the names that their weights have in the checkpoint.

    def weight(self, name: str, *shape: int, transpose: bool = False) -> ir.Value:
        """The checkpoint's tensor ``name`` as float32; ``shape`` is that of the result."""
        return self.store(self.checkpoint.tensor(name, shape, transpose=transpose))

    def linear(
        self,
        x: ir.Value,
        name: str,
        inputs: int,
        outputs: int,
        *,
        bias: bool = True,
        transpose: bool = True,
    ) -> ir.Value:
        """``x @ weight + bias``, the weight stored as [outputs, inputs] unless not to transpose."""
        weight = self.weight(f"{name}.weight", inputs, outputs, transpose=transpose)
        y = self.op("MatMul", x, weight)
        return self.op("Add", y, self.weight(f"{name}.bias", outputs)) if bias else y

    def layer_norm(self, x: ir.Value, name: str, size: int, epsilon: float) -> ir.Value:
        """Layer normalization over the last axis."""
        scale, bias = self.weight(f"{name}.weight", size), self.weight(f"{name}.bias", size)
        return self.op("LayerNormalization", x, scale, bias, epsilon=epsilon)

    def rms_norm(self, x: ir.Value, name: str, size: int, epsilon: float) -> ir.Value:
        """Root mean square normalization over the last axis."""
        scale = self.weight(f"{name}.weight", size)
        return self.op("RMSNormalization", x, scale, epsilon=epsilon)

    def activation(self, x: ir.Value, kind: str) -> ir.Value:
        """One of `ACTIVATIONS`, by the name that config.json gives it."""
        op_type, attributes = ACTIVATIONS[kind]
        return self.op(op_type, x, **attributes)


ACTIVATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "gelu": ("Gelu", {}),
    "gelu_new": ("Gelu", {"approximate": "tanh"}),
    "gelu_pytorch_tanh": ("Gelu", {"approximate": "tanh"}),
    "quick_gelu": ("Swish", {"alpha": 1.702}),
    "relu": ("Relu", {}),
    "sigmoid": ("Sigmoid", {}),
    "silu": ("Swish", {}),
    "swish": ("Swish", {}),
    "tanh": ("Tanh", {}),
}
"""Activation name in config.json -> operator and attributes."""
