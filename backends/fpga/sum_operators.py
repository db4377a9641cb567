"""Add: of two streams, of a bias, of a constant; and arithmetic with a constant, by table."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from trivium.backends.fpga import ir as fpga
from trivium.backends.fpga.arithmetic import fixed_point_add
from trivium.backends.fpga.lower import Lowering, lowers
from trivium.backends.fpga.operands import activation, real_constant
from trivium.backends.fpga.values import Pending, Quantization, Reals, Rounding, Value
from trivium.compiler.errors import Unsupported

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    Array = np.ndarray[Any, Any]


@lowers("Sub", "Mul", "Div")
def _with_scalar(lowering: Lowering, node: ir.Node) -> Value:
    """Of quantized values with one constant: a function of one value, so a table."""
    for index, other in ((0, 1), (1, 0)):
        scalar = _scalar(lowering, node.inputs[other])
        if scalar is None:
            continue
        x = lowering.read(node.inputs[index])
        if isinstance(x, Reals):
            operands = (x.values, scalar) if index == 0 else (scalar, x.values)
            values = _ARITHMETIC[node.op_type](*operands)
            return replace(x, quantization=None, values=values)
    raise Unsupported("only one quantized operand and one constant number")


def _scalar(lowering: Lowering, value: ir.Value | None) -> Array | None:
    """A constant operand of one element, in float32."""
    import numpy as np

    real = real_constant(lowering, value) if value is not None else None
    return np.asarray(real.reshape(()), np.float32) if real is not None and real.size == 1 else None


_ARITHMETIC: dict[str, Callable[[Array, Array], Array]] = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    "Div": operator.truediv,
}


@lowers("Add", "Sum")
def _add(lowering: Lowering, node: ir.Node) -> Value:
    if len(node.inputs) != 2:
        raise Unsupported(f"a sum of {len(node.inputs)} operands, not 2")
    for index, other in ((0, 1), (1, 0)):
        value, constant = node.inputs[index], node.inputs[other]
        pending = lowering.values.get(value) if value is not None else None
        if isinstance(pending, Pending) and constant is not None:
            return _add_bias(lowering, pending, constant)
        if _scalar(lowering, constant) is not None:
            return _with_scalar(lowering, node)
        if constant is not None and real_constant(lowering, constant) is not None:
            raise Unsupported(
                "it adds a constant to what is rounded already; fuse the bias before quantizing"
            )
    a, first = activation(lowering, node, 0)
    b, second = activation(lowering, node, 1)
    return _sum(lowering, node, (a, b), (first, second))


def _add_bias(lowering: Lowering, pending: Pending, value: ir.Value) -> Pending:
    real = real_constant(lowering, value)
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
