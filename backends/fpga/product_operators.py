"""Conv, Gemm and MatMul: products that wait for the QuantizeLinear after them, which tells where
their sums are rounded to (`values.Pending`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trivium.backends.fpga import ir as fpga
from trivium.backends.fpga.lower import Lowering, channels_first, lowers
from trivium.backends.fpga.operands import activation, real_constant, rounded_to, window_of
from trivium.backends.fpga.values import Pending, Quantization, Reals, Rounding, Value, Weights
from trivium.compiler import passing
from trivium.compiler.errors import Unsupported

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    Array = np.ndarray[Any, Any]


@lowers("Conv")
def _conv(lowering: Lowering, node: ir.Node) -> Value:
    x, quantization = activation(lowering, node, 0)
    weight = _weight(lowering, node)
    tensor = lowering.image(x)
    group = passing.attribute(node, "group", 1)
    channels, kernel = weight.integers.shape[0], weight.integers.shape[2:]
    window, shape = window_of(node, tensor, (kernel[0], kernel[1]), channels)
    scales = _scales(quantization, weight, 0, channels)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if group == 1:
        integers = weight.integers.transpose(0, 2, 3, 1)
    elif group == channels == tensor.channels:
        integers = weight.integers[:, 0]
    else:
        raise Unsupported(f"{group} groups of {tensor.channels} channels (only 1 or all of them)")
    return _product(
        lowering,
        node,
        x,
        quantization,
        integers,
        window,
        scales,
        shape,
        channels_first(shape),
        _bias(lowering, bias, channels),
    )


@lowers("Gemm", "MatMul")
def _dense(lowering: Lowering, node: ir.Node) -> Value:
    import numpy as np

    x, quantization = activation(lowering, node, 0)
    weight = _weight(lowering, node)
    if x.index.ndim != 1 or weight.integers.ndim != 2:
        raise Unsupported("only the product of a vector with a matrix")
    unsupported = [
        name
        for name, plain in (("alpha", 1.0), ("beta", 1.0), ("transA", 0))
        if passing.attribute(node, name, plain) != plain
    ]
    if unsupported:
        raise Unsupported(f"its {unsupported[0]} is {passing.attribute(node, unsupported[0])}")
    turned = bool(passing.attribute(node, "transB", 0))
    matrix = weight.integers if turned else weight.integers.T
    outputs = len(matrix)
    tensor = lowering.vector(x)
    # Column j of the matrix meets the value at position[j] of the stream.
    columns = np.empty_like(matrix)
    columns[:, lowering.positions(x)] = matrix
    height, width, channels = tensor.shape
    scales = _scales(quantization, weight, 0 if turned else 1, outputs)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return _product(
        lowering,
        node,
        x,
        quantization,
        columns.reshape(outputs, height, width, channels),
        fpga.Window((height, width)),
        scales,
        (1, 1, outputs),
        np.arange(outputs),
        _bias(lowering, bias, outputs),
    )


def _scales(quantization: Quantization, weight: Weights, axis: int, channels: int) -> Array:
    """float32 value of one accumulator step, for each output channel."""
    import numpy as np

    if weight.scale.size > 1 and weight.axis != axis:
        raise Unsupported(f"its weight's scales lie along axis {weight.axis}, not the outputs'")
    scales: Array = np.float32(quantization.scale) * weight.scale.reshape(-1)
    return np.broadcast_to(scales, (channels,)).astype(np.float32)


def _bias(lowering: Lowering, value: ir.Value | None, channels: int) -> Array:
    import numpy as np

    if value is None:
        return np.zeros(channels)
    real = real_constant(lowering, value)
    if real is None:
        raise Unsupported("its bias is not constant")
    try:
        return np.broadcast_to(real.reshape(-1), (channels,))
    except ValueError:
        raise Unsupported(f"its bias has {real.size} values for {channels} channels") from None


def _product(
    lowering: Lowering,
    node: ir.Node,
    x: Reals,
    quantization: Quantization,
    weight: Array,
    window: fpga.Window,
    scales: Array,
    shape: tuple[int, int, int],
    index: Array,
    bias: Array,
) -> Pending:
    """A convolution, depthwise if ``weight`` has no axis of input channels."""
    import numpy as np

    origin = node.name or node.op_type
    inputs = lowering.range_of(x.tensor)
    channels = len(weight)
    if any(window.pads) and quantization.zero_point not in inputs:
        raise Unsupported("its padding is outside of its input's range")
    # The bias in steps of the accumulator; stored as int32 with that very scale it is exact.
    steps = np.rint(bias / scales.astype(np.float64)).astype(np.int64)
    steps = steps - quantization.zero_point * weight.reshape(channels, -1).sum(1)
    accumulator = _accumulator(weight.reshape(channels, -1), steps, inputs)
    make: type[fpga.Convolution] | type[fpga.Depthwise]
    make = fpga.Convolution if weight.ndim == 4 else fpga.Depthwise

    def finish(name: str, to: Rounding | None) -> tuple[fpga.Layer, fpga.Range]:
        how = rounded_to(scales, to, accumulator) if to is not None else None
        layer = make(
            name,
            origin,
            (x.tensor,),
            name,
            window,
            weight,
            steps,
            quantization.zero_point,
            accumulator,
            how,
        )
        return layer, to.range if to is not None else accumulator

    def with_bias(more: Array) -> Pending:
        total = bias + np.broadcast_to(more.reshape(-1), (channels,))
        return _product(
            lowering, node, x, quantization, weight, window, scales, shape, index, total
        )

    return Pending(origin, shape, index, finish, scales, with_bias=with_bias)


def _accumulator(weight: Array, bias: Array, inputs: fpga.Range) -> fpga.Range:
    """Range of every partial sum over all inputs, whatever the order of summation."""
    import numpy as np

    ends = np.stack([weight * inputs.lo, weight * inputs.hi])
    lowest = bias + np.minimum(ends.min(0), 0).sum(1)
    highest = bias + np.maximum(ends.max(0), 0).sum(1)
    return fpga.Range(min(int(lowest.min()), 0), max(int(highest.max()), 0))


def _weight(lowering: Lowering, node: ir.Node) -> Weights:
    value = node.inputs[1]
    if passing.is_constant(value):
        raise Unsupported("its weight is float; quantize the model (recipe int8)")
    weight = lowering.read(value)
    if not isinstance(weight, Weights):
        raise Unsupported("its weight is computed, not stored")
    return weight
