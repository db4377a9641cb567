"""Sharding rules of operators that keep the shape, and of those that run along some axes."""

from __future__ import annotations

import onnx_ir as ir

from trivium.compiler.passing import attribute
from trivium.passes.positionwise import ELEMENTWISE
from trivium.passes.sharding.axes import Axes, rank
from trivium.passes.sharding.table import (
    block_axes,
    broadcast,
    known_axes,
    operands,
    rule,
    tie_all_but,
)

_MORE_ELEMENTWISE = (
    "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "BitwiseAnd", "BitwiseNot", "BitwiseOr",
    "Ceil", "Celu", "Cosh", "Elu", "Floor", "HardSigmoid", "HardSwish", "IsInf", "IsNaN",
    "LeakyRelu", "Mean", "Mish", "PRelu", "Round", "Selu", "Sign", "Sinh", "Softplus", "Softsign",
    "Sum", "Tan", "ThresholdedRelu", "Xor",
)  # fmt: skip


@rule("Shape", "Size", "Range", "ConstantOfShape", "Constant")
def _about_shapes(axes: Axes, node: ir.Node) -> None:
    """Nothing is read but shapes, which are whole on every device."""


@rule(*ELEMENTWISE, *_MORE_ELEMENTWISE)
def _elementwise(axes: Axes, node: ir.Node) -> None:
    for value in node.inputs:
        if value is not None and rank(value):
            broadcast(axes, value, node.outputs[0])


@rule("LayerNormalization", "RMSNormalization")
def _normalization(axes: Axes, node: ir.Node) -> None:
    x = operands(node, 1)[0]
    first = attribute(node, "axis", -1) % rank(x)
    for y in node.outputs:
        for axis in range(first):
            axes.tie((x, axis), (y, axis))
    block_axes(axes, x, range(first, rank(x)), f"{node.op_type} normalizes over it")
    result = node.outputs[0]
    block_axes(axes, result, range(first, rank(x)), f"{node.op_type} normalizes over it")


@rule("Softmax", "LogSoftmax", "CumSum", "LpNormalization")
def _along_an_axis(axes: Axes, node: ir.Node) -> None:
    x, y = operands(node, 1)[0], node.outputs[0]
    axis = attribute(node, "axis", -1)
    if node.op_type == "CumSum":
        axis = known_axes(axes, node, 1)
        if axis is None:
            return
        (axis,) = axis
    tie_all_but(axes, x, y, [axis % rank(x)], f"{node.op_type} runs along it")


@rule("TopK")
def _top_k(axes: Axes, node: ir.Node) -> None:
    x = operands(node, 1)[0]
    for y in node.outputs:
        tie_all_but(axes, x, y, [attribute(node, "axis", -1) % rank(x)], "TopK compares along it")


@rule("ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum",
      "ReduceSumSquare")  # fmt: skip
def _reduction(axes: Axes, node: ir.Node) -> None:
    x, y = operands(node, 1)[0], node.outputs[0]
    operand = node.inputs[1] if len(node.inputs) > 1 else None
    given = known_axes(axes, node, 1) if operand is not None else []
    if given is None:
        return
    if not given and attribute(node, "noop_with_empty_axes", 0):
        given, gone = [], set[int]()
    else:
        gone = {axis % rank(x) for axis in given} or set(range(rank(x)))
    block_axes(axes, x, sorted(gone), f"{node.op_type} reduces over it")
    kept = [axis for axis in range(rank(x)) if axis not in gone]
    keeps = attribute(node, "keepdims", 1)
    for place, axis in enumerate(kept):
        axes.tie((x, axis), (y, axis if keeps else place))
