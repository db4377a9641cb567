"""What the builders of small networks share: naming, weights as initializers, the model's frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from trivium.compiler.model import OPSET

if TYPE_CHECKING:
    import numpy as np

IR_VERSION = 11


class Network:
    """A graph under construction: float32, one input, one chain of operators or several.

    Args:
        name: Of the graph.
        input_name, input_shape: The one input; a symbolic dimension is its name.
    """

    def __init__(self, name: str, input_name: str, input_shape: Sequence[int | str]) -> None:
        self.input = ir.Value(
            name=input_name,
            shape=ir.Shape(input_shape),
            type=ir.TensorType(ir.DataType.FLOAT),
        )
        self._name = name
        self._nodes: list[ir.Node] = []
        self._weights: list[ir.Value] = []

    def weight(self, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
        """Store an array as an initializer."""
        tensor = ir.tensor(array, name=name)
        value = ir.Value(
            name=name,
            shape=ir.Shape(array.shape),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self._weights.append(value)
        return value

    def op(self, op_type: str, name: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        """Append an operator with one output, called like the node."""
        node = ir.node(op_type, inputs, attributes, name=name)
        node.outputs[0].name = name
        self._nodes.append(node)
        return node.outputs[0]

    def model(self, output: ir.Value, shape: Sequence[int | str]) -> ir.Model:
        """Close the graph with its one output."""
        output.shape, output.type = ir.Shape(shape), ir.TensorType(ir.DataType.FLOAT)
        graph = ir.Graph(
            [self.input],
            [output],
            nodes=self._nodes,
            initializers=self._weights,
            opset_imports={"": OPSET},
            name=self._name,
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="trivium")
