"""Pools: the largest value or the mean of a window, and means over the whole image."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from trivium.backends.fpga import ir as fpga
from trivium.backends.fpga.lower import Lowering, channels_first, lowers
from trivium.backends.fpga.operands import activation, rounded_to, window_of
from trivium.backends.fpga.values import Integers, Pending, Quantization, Reals, Rounding, Value
from trivium.compiler import passing
from trivium.compiler.errors import Unsupported

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    Array = np.ndarray[Any, Any]


@lowers("MaxPool")
def _max_pool(lowering: Lowering, node: ir.Node) -> Value:
    x = lowering.read(node.inputs[0])
    if len(node.outputs) > 1 and not passing.unread(node.outputs[1]):
        raise Unsupported("its indices are read")
    if not isinstance(x, (Integers, Reals)) or (isinstance(x, Reals) and not x.quantization):
        raise Unsupported("its operand is not quantized")
    tensor = lowering.image(x)
    window, shape = window_of(
        node, tensor, passing.attribute(node, "kernel_shape"), tensor.channels
    )
    name = lowering.unique("max_pool")
    layer = fpga.MaxPool(name, node.name or "MaxPool", (x.tensor,), name, window, tensor.range.lo)
    done = lowering.emit(layer, shape, tensor.range)
    return done if isinstance(x, Integers) else replace(x, tensor=name, index=done.index)


@lowers("AveragePool", "GlobalAveragePool", "ReduceMean")
def _average_pool(lowering: Lowering, node: ir.Node) -> Value:
    x, quantization = activation(lowering, node, 0)
    tensor = lowering.image(x)
    index = None
    if node.op_type == "AveragePool":
        kernel = tuple(passing.attribute(node, "kernel_shape"))
        window, shape = window_of(node, tensor, (kernel[0], kernel[1]), tensor.channels)
        if any(passing.attribute(node, "pads") or ()) or "SAME" in passing.attribute(
            node, "auto_pad", "NOTSET"
        ):
            raise Unsupported("an average with padding divides by a number that varies")
    else:
        window, shape = fpga.Window(tensor.shape[:2]), (1, 1, tensor.channels)
        index = _reduced(node, tensor.channels)
    return _mean(lowering, node, x, quantization, window, shape, index)


def _reduced(node: ir.Node, channels: int) -> Array | None:
    """The index of a mean over height and width that drops the axes; None if it keeps them."""
    import numpy as np

    if node.op_type != "ReduceMean":
        return None
    axes = passing.constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if axes is None or sorted(int(axis) % 4 for axis in axes.ravel()) != [2, 3]:
        raise Unsupported("a mean over other axes than height and width")
    return None if passing.attribute(node, "keepdims", 1) else np.arange(channels)


def _mean(
    lowering: Lowering,
    node: ir.Node,
    x: Reals,
    quantization: Quantization,
    window: fpga.Window,
    shape: tuple[int, int, int],
    index: Array | None,
) -> Pending:
    import numpy as np

    origin = node.name or node.op_type
    count = window.kernel[0] * window.kernel[1]
    inputs = lowering.range_of(x.tensor)
    offset = -count * quantization.zero_point
    accumulator = fpga.Range(
        min(offset + count * min(inputs.lo, 0), 0), max(offset + count * max(inputs.hi, 0), 0)
    )

    def finish(name: str, to: Rounding | None) -> tuple[fpga.Layer, fpga.Range]:
        if to is None:
            raise Unsupported("the graph returns floats that no QuantizeLinear rounds")
        scale = np.float32(quantization.scale) / np.float32(count)
        how = rounded_to(np.array([scale]), to, accumulator)
        layer = fpga.AveragePool(name, origin, (x.tensor,), name, window, offset, accumulator, how)
        return layer, to.range

    return Pending(origin, shape, channels_first(shape) if index is None else index, finish)
