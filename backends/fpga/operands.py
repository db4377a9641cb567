"""What the operators with an accumulator ask of their operands and attributes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trivium.backends.fpga import ir as fpga
from trivium.backends.fpga.arithmetic import requantizer
from trivium.backends.fpga.lower import Lowering
from trivium.backends.fpga.values import Quantization, Reals, Rounding, Weights
from trivium.compiler import passing
from trivium.compiler.errors import Unsupported

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    Array = np.ndarray[Any, Any]


def activation(lowering: Lowering, node: ir.Node, index: int) -> tuple[Reals, Quantization]:
    x = lowering.read(node.inputs[index])
    if not isinstance(x, Reals) or x.quantization is None:
        raise Unsupported("its operand is not the result of a DequantizeLinear")
    return x, x.quantization


def real_constant(lowering: Lowering, value: ir.Value) -> Array | None:
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


def rounded_to(scales: Array, to: Rounding, accumulator: fpga.Range) -> fpga.Requantize:
    import numpy as np

    # Divided in float32, as ONNX Runtime's kernels do.
    ratio = scales.astype(np.float32) / np.float32(to.quantization.scale)
    zero_point = to.quantization.zero_point
    try:
        return requantizer(ratio, zero_point, to.lo, to.hi, accumulator)
    except ValueError as error:
        raise Unsupported(str(error)) from None


def window_of(
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
