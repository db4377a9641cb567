"""Products whose blocked weights do not end with a whole block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from trivium.compiler.passing import (
    NodePass,
    attribute,
    dims,
    graph_of,
    initializer,
    is_constant,
    is_op,
    producer,
    splice,
)
from trivium.compiler.types import Preserves


@dataclass(frozen=True)
class FillLastBlock(NodePass):
    """Fill the last block of ``MatMul(x, DequantizeLinear(codes))`` up, and ``x`` with zeros.

    OpenVINO's frontend takes blocked weights only where the blocks come out even.

    Left alone: blocks that do not lie along the axis that is summed over, weights that something
    else reads.
    """

    name: ClassVar[str] = "openvino-fill-last-block"
    preserves: ClassVar[Preserves] = "exact"

    def rewrite(self, node: ir.Node) -> bool:
        if not is_op(node, "MatMul"):
            return False
        x, restored = node.inputs
        dequantize = producer(restored, "DequantizeLinear")
        if dequantize is None or x is None or restored is None or not dims(x):
            return False
        size, codes = attribute(dequantize, "block_size", 0), dequantize.inputs[0]
        shape = dims(codes)
        if not size or codes is None or shape is None or not is_constant(codes):
            return False
        rows, columns = shape if len(shape) == 2 else (None, None)
        if attribute(dequantize, "axis", 1) != 0 or rows is None or columns is None:
            return False
        missing = -rows % size
        if not missing or len(restored.uses()) > 1:
            return False
        graph = graph_of(node)
        filled = initializer(graph, _filled(codes.const_value, missing), f"{codes.name}_filled")
        whole = ir.node("DequantizeLinear", [filled, *dequantize.inputs[1:]], dequantize.attributes)
        whole.outputs[0].type = restored.type
        whole.outputs[0].shape = ir.Shape([rows + missing, columns])
        padding = [
            initializer(graph, np.array([0, missing], np.int64), "fill_last_block"),
            None,
            initializer(graph, np.array([-1], np.int64), "last_axis"),
        ]
        wider = ir.node("Pad", [x, *padding])
        wider.outputs[0].type = x.type
        if x.shape is not None:
            wider.outputs[0].shape = ir.Shape([*list(x.shape)[:-1], rows + missing])
        product = ir.node("MatMul", [wider.outputs[0], whole.outputs[0]], name=node.name)
        splice([node, dequantize], [wider, whole, product])
        return True


def _filled(tensor: ir.TensorProtocol | None, missing: int) -> ir.TensorProtocol:
    """Codes with rows of zeros after them; computed when they are written."""
    assert tensor is not None
    rows, columns = tensor.shape.numpy()

    def compute() -> ir.TensorProtocol:
        return ir.tensor(np.pad(tensor.numpy(), ((0, missing), (0, 0))), dtype=tensor.dtype)

    shape = ir.Shape((rows + missing, columns))
    return ir.LazyTensor(compute, tensor.dtype, shape, cache=False)
