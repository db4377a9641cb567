"""Operators with an accumulator: Conv, Gemm, MatMul, pools, Add. Each waits for the QuantizeLinear
after it (`values.Pending`), which tells where its result is rounded to.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from trivium.backends.fpga import ir as fpga
from trivium.backends.fpga.arithmetic import fixed_point_add, requantizer
from trivium.backends.fpga.lower import Lowering, channels_first, lowers
from trivium.backends.fpga.values import (
    Integers,
    Pending,
    Quantization,
    Reals,
    Rounding,
    Value,
    Weights,
)
from trivium.compiler import passing
from trivium.compiler.errors import Unsupported

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    Array = np.ndarray[Any, Any]


def _activation(lowering: Lowering, node: ir.Node, index: int) -> tuple[Reals, Quantization]:
    x = lowering.read(node.inputs[index])
    if not isinstance(x, Reals) or x.quantization is None:
        raise Unsupported("its operand is not the result of a DequantizeLinear")
    return x, x.quantization


def _weight(lowering: Lowering, node: ir.Node) -> Weights:
    value = node.inputs[1]
    if passing.is_constant(value):
        raise Unsupported("its weight is float; quantize the model (recipe int8)")
    weight = lowering.read(value)
    if not isinstance(weight, Weights):
        raise Unsupported("its weight is computed, not stored")
    return weight


def _real(lowering: Lowering, value: ir.Value) -> Array | None:
    """A constant operand, quantized or not, in real numbers (float64)."""
    import numpy as np

    stored = passing.constant(value)
    if stored is not None:
        return np.asarray(stored, np.float64)
    if isinstance(found := lowering.values.get(value), Weights):
        scale = found.scale.astype(np.float64)
        if scale.size > 1:
            rank = range(found.integers.ndim)
            scale = scale.reshape([-1 if i == found.axis else 1 for i in rank])
        real: Array = found.integers * scale
        return real
    return None


# --- products -------------------------------------------------------------------------------------


@lowers("Conv")
def _conv(lowering: Lowering, node: ir.Node) -> Value:
    x, quantization = _activation(lowering, node, 0)
    weight = _weight(lowering, node)
    tensor = lowering.image(x)
    group = passing.attribute(node, "group", 1)
    channels, kernel = weight.integers.shape[0], weight.integers.shape[2:]
    window, shape = _window(node, tensor, (kernel[0], kernel[1]), channels)
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

    x, quantization = _activation(lowering, node, 0)
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
    real = _real(lowering, value)
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
        how = _requantizer(scales, to, accumulator) if to is not None else None
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


def _requantizer(scales: Array, to: Rounding, accumulator: fpga.Range) -> fpga.Requantize:
    import numpy as np

    # Divided in float32, as ONNX Runtime's kernels do.
    ratio = scales.astype(np.float32) / np.float32(to.quantization.scale)
    zero_point = to.quantization.zero_point
    try:
        return requantizer(ratio, zero_point, to.lo, to.hi, accumulator)
    except ValueError as error:
        raise Unsupported(str(error)) from None


# --- windows --------------------------------------------------------------------------------------


def _window(
    node: ir.Node, tensor: fpga.Tensor, kernel: tuple[int, int], channels: int
) -> tuple[fpga.Window, tuple[int, int, int]]:
    """The window of a Conv or pool, and the shape of its result."""
    strides = passing.attribute(node, "strides") or (1, 1)
    dilations = passing.attribute(node, "dilations") or (1, 1)
    auto = passing.attribute(node, "auto_pad", "NOTSET")
    pads = tuple(passing.attribute(node, "pads") or (0, 0, 0, 0))
    if passing.attribute(node, "ceil_mode", 0):
        raise Unsupported("ceil_mode")
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    if auto.startswith("SAME"):
        starts, ends = [], []
        for size, span, stride in zip(tensor.shape, spans, strides, strict=False):
            total = max((-(-size // stride) - 1) * stride + span - size, 0)
            small, large = total // 2, total - total // 2
            starts.append(large if auto == "SAME_LOWER" else small)
            ends.append(small if auto == "SAME_LOWER" else large)
        pads = (*starts, *ends)
    elif auto == "VALID":
        pads = (0, 0, 0, 0)
    height, width = (
        (tensor.shape[axis] + pads[axis] + pads[axis + 2] - spans[axis]) // strides[axis] + 1
        for axis in (0, 1)
    )
    if height < 1 or width < 1:
        raise Unsupported(f"a kernel of {list(kernel)} on an image of {list(tensor.shape[:2])}")
    window = fpga.Window(
        kernel, (strides[0], strides[1]), (pads[0], pads[1]), (dilations[0], dilations[1])
    )
    return window, (height, width, channels)


@lowers("MaxPool")
def _max_pool(lowering: Lowering, node: ir.Node) -> Value:
    x = lowering.read(node.inputs[0])
    if len(node.outputs) > 1 and not passing.unread(node.outputs[1]):
        raise Unsupported("its indices are read")
    if not isinstance(x, (Integers, Reals)) or (isinstance(x, Reals) and not x.quantization):
        raise Unsupported("its operand is not quantized")
    tensor = lowering.image(x)
    window, shape = _window(node, tensor, passing.attribute(node, "kernel_shape"), tensor.channels)
    name = lowering.unique("max_pool")
    layer = fpga.MaxPool(name, node.name or "MaxPool", (x.tensor,), name, window, tensor.range.lo)
    done = lowering.emit(layer, shape, tensor.range)
    return done if isinstance(x, Integers) else replace(x, tensor=name, index=done.index)


@lowers("AveragePool", "GlobalAveragePool", "ReduceMean")
def _average_pool(lowering: Lowering, node: ir.Node) -> Value:
    x, quantization = _activation(lowering, node, 0)
    tensor = lowering.image(x)
    index = None
    if node.op_type == "AveragePool":
        kernel = tuple(passing.attribute(node, "kernel_shape"))
        window, shape = _window(node, tensor, (kernel[0], kernel[1]), tensor.channels)
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
        how = _requantizer(np.array([scale]), to, accumulator)
        layer = fpga.AveragePool(name, origin, (x.tensor,), name, window, offset, accumulator, how)
        return layer, to.range

    return Pending(origin, shape, channels_first(shape) if index is None else index, finish)


# --- sums -----------------------------------------------------------------------------------------


@lowers("Add")
def _add(lowering: Lowering, node: ir.Node) -> Value:
    for index, other in ((0, 1), (1, 0)):
        value, constant = node.inputs[index], node.inputs[other]
        pending = lowering.values.get(value) if value is not None else None
        if isinstance(pending, Pending) and constant is not None:
            return _add_bias(lowering, pending, constant)
    a, first = _activation(lowering, node, 0)
    b, second = _activation(lowering, node, 1)
    return _sum(lowering, node, (a, b), (first, second))


def _add_bias(lowering: Lowering, pending: Pending, value: ir.Value) -> Pending:
    real = _real(lowering, value)
    if real is None:
        raise Unsupported("it adds to floats that no QuantizeLinear has rounded")
    unclamped = pending.clamp == (float("-inf"), float("inf"))
    if pending.with_bias is None or not unclamped or real.size not in (1, pending.shape[2]):
        raise Unsupported("it adds a constant that is not a bias for each channel")
    axis = {1: -1, 3: -3}[pending.index.ndim]
    if real.size > 1 and (real.ndim < -axis or real.shape[axis] != pending.shape[2]):
        raise Unsupported("it adds a constant that is not a bias for each channel")
    return pending.with_bias(real)


def _sum(
    lowering: Lowering,
    node: ir.Node,
    operands: tuple[Reals, Reals],
    quantizations: tuple[Quantization, Quantization],
) -> Pending:
    import numpy as np

    origin = node.name or "Add"
    a, b = operands
    if a.index.shape != b.index.shape:
        raise Unsupported("it broadcasts one operand over the other")
    tensors = [lowering.image(x) if x.index.ndim == 3 else lowering.vector(x) for x in operands]
    if tensors[0].shape != tensors[1].shape or not np.array_equal(
        lowering.positions(a), lowering.positions(b)
    ):
        raise Unsupported("its operands arrive in different orders")
    ranges = (tensors[0].range, tensors[1].range)
    if max(r.bits for r in ranges) > 8:
        raise Unsupported("an operand has more than 8 bits")

    def finish(name: str, to: Rounding | None) -> tuple[fpga.Layer, fpga.Range]:
        if to is None:
            raise Unsupported("the graph returns floats that no QuantizeLinear rounds")
        multipliers, offset, shift, accumulator, mismatches = fixed_point_add(
            ranges,
            (quantizations[0].scale, quantizations[1].scale),
            (quantizations[0].zero_point, quantizations[1].zero_point),
            to.quantization.scale,
            to.quantization.zero_point,
            to.lo,
            to.hi,
        )
        layer = fpga.Add(
            name,
            origin,
            (a.tensor, b.tensor),
            name,
            multipliers,
            offset,
            shift,
            to.lo,
            to.hi,
            accumulator,
            mismatches,
        )
        return layer, to.range

    return Pending(origin, tensors[0].shape, lowering.positions(a), finish)
