"""What an `Inserter` does to the graph's form, with no weight read: for predictions."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from trivium.compiler.passing import outline
from trivium.passes.quantization.insertion import Inserter
from trivium.passes.quantization.linear import Grid
from trivium.passes.quantization.placement import weight_axis
from trivium.passes.quantization.planning import Use

Array = np.ndarray[Any, np.dtype[Any]]


class Outliner(Inserter):
    """Puts outlines where codes would be stored, with scales of one."""

    def _quantize_constant(self, use: Use) -> Array:
        node, position = use
        return self._outlined(node, position, self.activations, None)

    def _quantize_weight(
        self, node: ir.Node, position: int, source: Array | None, bias_at: int | None
    ) -> None:
        axis = weight_axis(node, len(_shape(node, position))) if self.per_channel else None
        scale = self._outlined(node, position, self.weights(node), axis)
        if bias_at is not None and source is not None:
            size = int(np.prod(_shape(node, bias_at), dtype=np.int64))
            self._quantize_bias(node, bias_at, np.zeros(size, np.float32), scale)

    def _outlined(self, node: ir.Node, position: int, grid: Grid, axis: int | None) -> Array:
        value = node.inputs[position]
        assert value is not None
        shape = _shape(node, position)
        key = (value, axis, grid)
        if key not in self._stored:
            scale = np.ones(() if axis is None else shape[axis], np.float32)
            zero = np.zeros(scale.shape, np.int64)
            codes = outline(ir.DataType.INT8 if grid.signed else ir.DataType.UINT8, shape)
            restored = self._dequantized(value, codes, scale, zero, grid, axis, node)
            self._stored[key] = restored, scale
        restored, scale = self._stored[key]
        node.replace_input_with(position, restored)
        return scale


def _shape(node: ir.Node, position: int) -> tuple[int, ...]:
    value = node.inputs[position]
    return value.shape.numpy() if value is not None and value.shape is not None else ()
