"""Dynamic int8: integer products whose activations are quantized anew for each input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from trivium.compiler.passing import (
    NodePass,
    attribute,
    decline,
    dims,
    initializer,
    is_constant,
    is_op,
    is_plain_product,
    option,
    splice,
    unread,
    weight,
)
from trivium.compiler.types import Preserves
from trivium.passes.quantization import layers, linear

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class QuantizeDynamic(NodePass):
    """Rewrite ``x @ w`` to DynamicQuantizeLinear and MatMulInteger.

    The activation is uint8 with a range taken from its own values when the model runs, so that no
    calibration data is needed; the weight is int8, symmetric, by default with a scale for each
    column. These are the standard's own operators and what ONNX Runtime fuses to one kernel
    (DynamicQuantizeMatMul); the quantized activation is shared by all products that read it.

    Left alone: convolutions, for which engines have no such kernel; Gemm with factors; weights that
    are computed, not finite, or of other than two dimensions.
    """

    name: ClassVar[str] = "quantize-dynamic"
    preserves: ClassVar[Preserves] = "lossy"

    per_channel: bool = option(True, "Whether each column of a weight has its own scale")
    min_elements: int = option(1024, "Weights with fewer elements stay as they are")
    exclude: tuple[str, ...] = option((), layers.EXCLUDE)

    def run(self, model: ir.Model) -> bool:
        layers.note_unmatched(model, self.exclude)
        return super().run(model)

    def rewrite(self, node: ir.Node) -> bool:
        if not is_op(node, "MatMul", "Gemm") or layers.excluded(node, self.exclude):
            return False
        source, value = node.inputs[0], node.inputs[1]
        if source is None or value is None or source.dtype != ir.DataType.FLOAT:
            return False
        if not is_constant(value) or value.dtype != ir.DataType.FLOAT or is_constant(source):
            return False
        shape = dims(value)
        if shape is None or len(shape) != 2:
            return decline(node, "its weight is no matrix")
        if np.prod([size or 0 for size in shape]) < self.min_elements:
            return False
        if node.op_type == "Gemm" and not is_plain_product(node):
            return decline(node, "it has factors or reads its data transposed")
        array = weight(value)
        assert array is not None
        bad = array.size - int(np.count_nonzero(np.isfinite(array)))
        if bad:
            return decline(value, f"{bad} of {array.size} values are NaN or infinite")
        matrix = array.T if attribute(node, "transB", 0) else array
        graph = value.graph
        assert graph is not None
        codes, scale = self._codes(matrix)
        name = value.name or "weight"
        stored = initializer(graph, codes, f"{name}_quantized")
        factor = initializer(graph, scale, f"{name}_scale")
        zero = initializer(graph, np.zeros(scale.shape, np.int8), f"{name}_zero_point")
        made: list[ir.Node] = []
        quantized = _quantized(source, made)
        label = node.name or "product"
        product = ir.node(
            "MatMulInteger",
            [quantized.outputs[0], stored, quantized.outputs[2], zero],
            name=f"{label}_integer",
        )
        product.outputs[0].shape = node.outputs[0].shape
        product.outputs[0].type = ir.TensorType(ir.DataType.INT32)
        cast = ir.node("Cast", [product.outputs[0]], {"to": int(ir.DataType.FLOAT)})
        scales = ir.node("Mul", [quantized.outputs[1], factor], name=f"{label}_scales")
        result = ir.node("Mul", [cast.outputs[0], scales.outputs[0]], name=f"{label}_scaled")
        for value_of, like in ((cast, node.outputs[0].shape), (scales, factor.shape)):
            value_of.outputs[0].shape, value_of.outputs[0].type = (
                like,
                ir.TensorType(ir.DataType.FLOAT),
            )
        made += [product, cast, scales, result]
        if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
            result.outputs[0].shape = node.outputs[0].shape
            result.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
            made.append(ir.node("Add", [result.outputs[0], node.inputs[2]], name=label))
        splice([node], made)
        if unread(value) and value.is_initializer():
            graph.initializers.pop(name)
        return True

    def _codes(self, matrix: Array) -> tuple[Array, Array]:
        grid = linear.grid("int8")
        axis = 1 if self.per_channel else None
        scale, _ = linear.fit(*linear.extremes(matrix, axis), grid, symmetric=True)
        return linear.quantize(matrix, linear.along(scale, axis, 2), 0, grid), scale


def _quantized(source: ir.Value, made: list[ir.Node]) -> ir.Node:
    """The DynamicQuantizeLinear of a value: the one that there is, or a new one."""
    for node, _ in source.uses():
        if is_op(node, "DynamicQuantizeLinear"):
            return node
    node = ir.node("DynamicQuantizeLinear", [source], num_outputs=3)
    kinds = (ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.UINT8)
    for value, kind, shape in zip(
        node.outputs, kinds, (source.shape, ir.Shape([]), ir.Shape([])), strict=True
    ):
        value.shape, value.type = shape, ir.TensorType(kind)
    made.append(node)
    return node
