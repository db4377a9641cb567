"""What the pruning passes share: which weights there are, and the axis that a product sums over."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from trivium.compiler.passing import attribute, decline, is_constant, is_op, weight
from trivium.passes.quantization import layers

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def weights(
    model: ir.Model, exclude: tuple[str, ...], min_elements: int
) -> Iterator[tuple[ir.Value, ir.Node]]:
    """Every float32 weight that can be pruned, with the first node that reads it as one.

    Declined: weights with NaN or infinity, which have no order of magnitude.
    """
    for value in list(model.graph.initializers.values()):
        if value.dtype != ir.DataType.FLOAT or not is_constant(value):
            continue
        uses = [(node, index) for node, index in value.uses()]
        readers = [node for node, index in uses if index == 1 and is_op(node, *WEIGHTED)]
        if not readers or len(readers) != len(uses):
            continue
        if any(layers.excluded(node, exclude) for node in readers):
            continue
        array = weight(value)
        assert array is not None
        if array.ndim < 2 or array.size < min_elements:
            continue
        if not np.isfinite(array).all():
            bad = array.size - int(np.count_nonzero(np.isfinite(array)))
            decline(value, f"{bad} of {array.size} values are NaN or infinite")
            continue
        yield value, readers[0]


def summed_axis(node: ir.Node, rank: int) -> int:
    """The axis of a weight that the product sums over, input channels of a convolution included."""
    if node.op_type == "Conv":
        return 1
    if node.op_type == "ConvTranspose":
        return 0
    if node.op_type == "Gemm":
        return 1 if attribute(node, "transB", 0) else 0
    return rank - 2
