"""Which operators treat each position of a sequence by itself, and when.

One table, from an operator to a rule that says whether a node of it works position by position
along the sequence axis of its token inputs. What is not in the table is taken to mix positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import onnx_ir as ir

from trivium.compiler.passing import attribute, constant, entering
from trivium.passes.sequence import Kind, Sequence, rank

ELEMENTWISE = frozenset(
    {
        "Abs", "Add", "And", "Cast", "Clip", "Cos", "Div", "Equal", "Erf", "Exp", "Gelu", "Greater",
        "GreaterOrEqual", "Identity", "Less", "LessOrEqual", "Log", "Max", "Min", "Mod", "Mul",
        "Neg", "Not", "Or", "Pow", "Reciprocal", "Relu", "Sigmoid", "Sin", "Sqrt", "Sub", "Swish",
        "Tanh", "Where",
    }
)  # fmt: skip

ALONG_AN_AXIS = {"Concat": 0, "LogSoftmax": -1, "ScatterElements": 0, "Softmax": -1, "Split": 0,
                 "TopK": -1}  # fmt: skip
"""Operators that work along one axis, and that axis by default."""

SHAPING = frozenset({"Expand", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
"""Operators that move axes, whose second input may hold lengths."""

Rule = Callable[[Sequence, ir.Node], bool]

RULES: dict[str, Rule] = {}
"""Operator of the standard domain -> its rule."""


rule = entering(RULES)
"""Register a rule for operators."""


def works_position_by_position(sequence: Sequence, node: ir.Node) -> bool:
    """Whether position t of a node's outputs depends on position t of its inputs alone."""
    found = RULES.get(node.op_type) if node.domain == "" else None
    return found is not None and found(sequence, node)


@rule(*ELEMENTWISE)
def _elementwise(sequence: Sequence, node: ir.Node) -> bool:
    output = _from_right(sequence, node.outputs[0])
    return all(
        _from_right(sequence, value) in (output, None) and len(sequence.axes(value)) <= 1
        for value in node.inputs
        if value is not None and sequence.kind(value) in (Kind.TOKEN, Kind.TOTAL)
    )


def _from_right(sequence: Sequence, value: ir.Value | None) -> int | None:
    axis = sequence.axis(value)
    return axis - rank(value) if axis is not None else None


@rule("MatMul")
def _matmul(sequence: Sequence, node: ir.Node) -> bool:
    left, right = node.inputs[0], node.inputs[1]
    return sequence.kind(right) is Kind.STATIC and sequence.axis(left) != rank(left) - 1


@rule("Gemm")
def _gemm(sequence: Sequence, node: ir.Node) -> bool:
    others = all(sequence.kind(value) is Kind.STATIC for value in node.inputs[1:])
    return others and not attribute(node, "transA", 0) and sequence.axis(node.inputs[0]) == 0


@rule("LayerNormalization", "RMSNormalization")
def _normalization(sequence: Sequence, node: ir.Node) -> bool:
    x, axis = node.inputs[0], attribute(node, "axis", -1)
    token_axis = sequence.axis(x)
    first = axis % rank(x)
    others = all(sequence.kind(value) is Kind.STATIC for value in node.inputs[1:])
    return token_axis is not None and token_axis < first and others


@rule(*ALONG_AN_AXIS)
def _along_an_axis(sequence: Sequence, node: ir.Node) -> bool:
    axis = attribute(node, "axis", ALONG_AN_AXIS[node.op_type])
    places = {
        sequence.axis(v)
        for v in node.inputs
        if v is not None and sequence.kind(v) in (Kind.TOKEN, Kind.TOTAL)
    }
    return len(places) == 1 and None not in places and axis % rank(node.inputs[0]) not in places


@rule("ReduceL2", "ReduceMax", "ReduceMean", "ReduceSum")
def _reduction(sequence: Sequence, node: ir.Node) -> bool:
    x = node.inputs[0]
    axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if axes is None or axes.size == 0:
        return False
    return sequence.axis(x) not in {int(axis) % rank(x) for axis in axes.ravel()}


@rule("Slice")
def _slice(sequence: Sequence, node: ir.Node) -> bool:
    x, axes = node.inputs[0], constant(node.inputs[3]) if len(node.inputs) > 3 else None
    cut = range(rank(x)) if axes is None else [int(axis) % rank(x) for axis in axes.ravel()]
    others = all(sequence.kind(value) is Kind.STATIC for value in node.inputs[1:])
    return others and sequence.axis(x) not in cut


@rule("Gather")
def _gather(sequence: Sequence, node: ir.Node) -> bool:
    data, indices = node.inputs[0], node.inputs[1]
    if sequence.kind(data) is Kind.STATIC:
        return True
    axis = attribute(node, "axis", 0) % rank(data)
    return sequence.kind(indices) is Kind.STATIC and sequence.axis(data) != axis


@rule("RotaryEmbedding")
def _rotary(sequence: Sequence, node: ir.Node) -> bool:
    x, cos, sin = node.inputs[0], node.inputs[1], node.inputs[2]
    places = node.inputs[3] if len(node.inputs) > 3 else None
    if sequence.axis(x) != rank(x) - 2:
        return False
    if places is None:
        return sequence.axes(cos) == [1] and sequence.axes(sin) == [1]
    tables = sequence.kind(cos) is Kind.STATIC and sequence.kind(sin) is Kind.STATIC
    return tables and sequence.axes(places) == [1]


@rule(*SHAPING)
def _shaping(sequence: Sequence, node: ir.Node) -> bool:
    """What one entry holds stays together; axes before it may be split, merged and flattened."""
    x, y = node.inputs[0], node.outputs[0]
    how = node.inputs[1] if len(node.inputs) > 1 else None
    if sequence.kind(how) not in (Kind.STATIC, Kind.LENGTH):
        return False
    if node.op_type == "Expand":
        return _from_right(sequence, x) == _from_right(sequence, y)
    if node.op_type != "Reshape":
        return True
    before, after = sequence.axis(x), sequence.axis(y)
    if before is None or after is None or x is None or x.shape is None or y.shape is None:
        return False
    outer, inner = _size(x.shape[: before + 1]), _size(x.shape[before + 1 :])
    known = outer is not None and inner is not None
    return known and outer == _size(y.shape[: after + 1]) and inner == _size(y.shape[after + 1 :])


def _size(dims: Iterable[int | ir.SymbolicDim]) -> tuple[int, list[str]] | None:
    """The product of dimensions: of the known ones, and the names of the others."""
    known, names = 1, list[str]()
    for dim in dims:
        if isinstance(dim, int):
            known *= dim
        elif dim.value is None:
            return None
        else:
            factors = dim.value.split("*")
            names += [factor for factor in factors if not factor.isdigit()]
            known *= math.prod(int(factor) for factor in factors if factor.isdigit())
    return known, sorted(names)
