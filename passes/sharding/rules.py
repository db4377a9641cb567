"""What each operator ties, sums over and needs whole: one table, from an operator to its rule.

An operator without a rule is not understood, and needs all of everything that it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import onnx_ir as ir

from trivium.compiler.passing import attribute, constant, is_constant
from trivium.passes.positionwise import ELEMENTWISE
from trivium.passes.sharding.axes import Axes, Axis, rank, size, values_of

Rule = Callable[[Axes, ir.Node], None]

RULES: dict[str, Rule] = {}
"""Operator of the standard domain -> its rule."""


def rule(*op_types: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators."""

    def register(function: Rule) -> Rule:
        for op_type in op_types:
            if op_type in RULES:
                raise ValueError(f"two rules for {op_type}")
            RULES[op_type] = function
        return function

    return register


def apply(axes: Axes, node: ir.Node) -> str | None:
    """Apply the rule of a node; return why it is not understood, if it is not."""
    found = RULES.get(node.op_type) if node.domain == "" else None
    ranked = all(value.shape is not None for value in values_of(node))
    if found is not None and ranked:
        found(axes, node)
        return None
    reason = (
        f"no rule says how {node.domain or 'ai.onnx'}::{node.op_type} can be split"
        if found is None
        else f"{node.op_type} reads or makes a value of unknown rank"
    )
    for value in node.inputs:
        for axis in range(rank(value) if value is not None and value.shape is not None else 0):
            axes.block((value, axis), reason)  # type: ignore[arg-type]  # ranked, so no None
    return reason


@rule("Shape", "Size", "Range", "ConstantOfShape", "Constant")
def _about_shapes(axes: Axes, node: ir.Node) -> None:
    """Nothing is read but shapes, which are whole on every device."""


_MORE_ELEMENTWISE = (
    "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "BitwiseAnd", "BitwiseNot", "BitwiseOr",
    "Ceil", "Celu", "Cosh", "Elu", "Floor", "HardSigmoid", "HardSwish", "IsInf", "IsNaN",
    "LeakyRelu", "Mean", "Mish", "PRelu", "Round", "Selu", "Sign", "Sinh", "Softplus", "Softsign",
    "Sum", "Tan", "ThresholdedRelu", "Xor",
)  # fmt: skip


@rule(*ELEMENTWISE, *_MORE_ELEMENTWISE)
def _elementwise(axes: Axes, node: ir.Node) -> None:
    for value in node.inputs:
        if value is not None and rank(value):
            _broadcast(axes, value, node.outputs[0])


def _broadcast(axes: Axes, value: ir.Value, result: ir.Value, keep: int = 0) -> None:
    """Tie the axes of an operand to those of the result that they run along, from the right.

    Args:
        keep: How many of the last axes to leave alone.
    """
    shift = rank(result) - rank(value)
    for axis in range(rank(value) - keep):
        if axis + shift < 0:
            continue
        if size((value, axis)) != 1 or size((result, axis + shift)) == 1:
            axes.tie((value, axis), (result, axis + shift))


@rule("MatMul")
def _matmul(axes: Axes, node: ir.Node) -> None:
    left, right = _operands(node, 2)
    result = node.outputs[0]
    inner = (right, max(rank(right) - 2, 0))
    axes.tie((left, rank(left) - 1), inner)
    axes.reduce(inner, result)
    if rank(right) > 1:
        axes.tie((right, rank(right) - 1), (result, rank(result) - 1))
    if rank(left) > 1:
        axes.tie((left, rank(left) - 2), (result, rank(result) - (2 if rank(right) > 1 else 1)))
    if rank(left) > 1 and rank(right) > 1:
        _broadcast(axes, left, result, keep=2)
        _broadcast(axes, right, result, keep=2)


@rule("Gemm")
def _gemm(axes: Axes, node: ir.Node) -> None:
    (left, right), result = _operands(node, 2), node.outputs[0]
    over = attribute(node, "transA", 0), attribute(node, "transB", 0)
    inner = (right, 1 if over[1] else 0)
    axes.tie((left, 0 if over[0] else 1), inner)
    axes.reduce(inner, result)
    axes.tie((left, 1 if over[0] else 0), (result, 0))
    axes.tie((right, 0 if over[1] else 1), (result, 1))
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        _broadcast(axes, node.inputs[2], result)


@rule("Conv")
def _conv(axes: Axes, node: ir.Node) -> None:
    (x, weight), y = _operands(node, 2), node.outputs[0]
    axes.tie((x, 0), (y, 0))
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    channels: list[Axis] = [(weight, 0), (y, 1), *([(bias, 0)] if bias is not None else [])]
    axes.tie(*channels)
    if attribute(node, "group", 1) == 1:
        axes.tie((x, 1), (weight, 1))
        axes.reduce((weight, 1), y)
    else:
        for axis in ((x, 1), (weight, 0), (weight, 1)):
            axes.block(axis, "its channels are in groups")
    for value in (x, weight):
        _block(axes, value, range(2, rank(value)), "a convolution slides along it")


@rule("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool")
def _pool(axes: Axes, node: ir.Node) -> None:
    x = _operands(node, 1)[0]
    for y in node.outputs:
        axes.tie((x, 0), (y, 0))
        axes.tie((x, 1), (y, 1))
    _block(axes, x, range(2, rank(x)), "a window slides along it")


@rule("BatchNormalization")
def _batch_normalization(axes: Axes, node: ir.Node) -> None:
    x, *parameters = _operands(node, 5)
    for axis in range(rank(x)):
        axes.tie((x, axis), (node.outputs[0], axis))
    for value in parameters:
        axes.tie((x, 1), (value, 0))


@rule("LayerNormalization", "RMSNormalization")
def _normalization(axes: Axes, node: ir.Node) -> None:
    x = _operands(node, 1)[0]
    first = attribute(node, "axis", -1) % rank(x)
    for y in node.outputs:
        for axis in range(first):
            axes.tie((x, axis), (y, axis))
    _block(axes, x, range(first, rank(x)), f"{node.op_type} normalizes over it")
    result = node.outputs[0]
    _block(axes, result, range(first, rank(x)), f"{node.op_type} normalizes over it")


@rule("Softmax", "LogSoftmax", "CumSum", "LpNormalization")
def _along_an_axis(axes: Axes, node: ir.Node) -> None:
    x, y = _operands(node, 1)[0], node.outputs[0]
    axis = attribute(node, "axis", -1)
    if node.op_type == "CumSum":
        axis = _known(axes, node, 1)
        if axis is None:
            return
        (axis,) = axis
    _tie_all_but(axes, x, y, [axis % rank(x)], f"{node.op_type} runs along it")


@rule("TopK")
def _top_k(axes: Axes, node: ir.Node) -> None:
    x = _operands(node, 1)[0]
    for y in node.outputs:
        _tie_all_but(axes, x, y, [attribute(node, "axis", -1) % rank(x)], "TopK compares along it")


@rule("Concat")
def _concat(axes: Axes, node: ir.Node) -> None:
    y = node.outputs[0]
    for x in _operands(node, len(node.inputs)):
        axis = attribute(node, "axis") % rank(x)
        _tie_all_but(axes, x, y, [axis], "Concat joins along it")


@rule("Split")
def _split(axes: Axes, node: ir.Node) -> None:
    x = _operands(node, 1)[0]
    for y in node.outputs:
        axis = attribute(node, "axis", 0) % rank(x)
        _tie_all_but(axes, x, y, [axis], "Split cuts it elsewhere", whole_result=False)


@rule("Slice")
def _slice(axes: Axes, node: ir.Node) -> None:
    x, y = _operands(node, 1)[0], node.outputs[0]
    cut = range(rank(x)) if len(node.inputs) < 4 else _known(axes, node, 3)
    if cut is not None:
        places = [axis % rank(x) for axis in cut]
        _tie_all_but(axes, x, y, places, "Slice cuts it", whole_result=False)


@rule("ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum",
      "ReduceSumSquare")  # fmt: skip
def _reduction(axes: Axes, node: ir.Node) -> None:
    x, y = _operands(node, 1)[0], node.outputs[0]
    operand = node.inputs[1] if len(node.inputs) > 1 else None
    given = _known(axes, node, 1) if operand is not None else []
    if given is None:
        return
    if not given and attribute(node, "noop_with_empty_axes", 0):
        given, gone = [], set[int]()
    else:
        gone = {axis % rank(x) for axis in given} or set(range(rank(x)))
    _block(axes, x, sorted(gone), f"{node.op_type} reduces over it")
    kept = [axis for axis in range(rank(x)) if axis not in gone]
    keeps = attribute(node, "keepdims", 1)
    for place, axis in enumerate(kept):
        axes.tie((x, axis), (y, axis if keeps else place))


@rule("Transpose")
def _transpose(axes: Axes, node: ir.Node) -> None:
    x, y = _operands(node, 1)[0], node.outputs[0]
    order = attribute(node, "perm", list(reversed(range(rank(x)))))
    for place, axis in enumerate(order):
        axes.tie((x, axis), (y, place))


@rule("Unsqueeze", "Squeeze")
def _squeeze(axes: Axes, node: ir.Node) -> None:
    x, y = _operands(node, 1)[0], node.outputs[0]
    many, few = (y, x) if node.op_type == "Unsqueeze" else (x, y)
    operand = node.inputs[1] if len(node.inputs) > 1 else None
    if operand is None:
        gone: Sequence[int] | None = [a for a in range(rank(x)) if size((x, a)) == 1]
    else:
        gone = _known(axes, node, 1)
    if gone is None:
        return
    places = {axis % rank(many) for axis in gone}
    kept = [axis for axis in range(rank(many)) if axis not in places]
    for place, axis in enumerate(kept):
        axes.tie((few, place), (many, axis))


@rule("Expand")
def _expand(axes: Axes, node: ir.Node) -> None:
    _broadcast(axes, _operands(node, 1)[0], node.outputs[0])


@rule("Reshape", "Flatten")
def _reshape(axes: Axes, node: ir.Node) -> None:
    """Axes that are merged or divided split with the first factor, which moves slowest."""
    x, y = _operands(node, 1)[0], node.outputs[0]
    for before, after in factors(x, y):
        whole = [axis for axis in before if size((x, axis)) != 1]
        parts = [axis for axis in after if size((y, axis)) != 1]
        if whole and parts:
            axes.tie((x, whole[0]), (y, parts[0]))
        _block(axes, x, whole[1:], f"{node.op_type} merges it with an axis before it")
        _block(axes, y, parts[1:], f"{node.op_type} makes it of the last part of an axis")


Run = tuple[list[int], list[int]]


def factors(x: ir.Value, y: ir.Value) -> list[Run]:
    """Cut two shapes with the same elements into the shortest runs of axes of the same product."""
    assert x.shape is not None
    assert y.shape is not None
    before, after = x.shape.dims, y.shape.dims
    runs: list[Run] = []
    i = j = 0
    while i < len(before) and j < len(after):
        left, right = [i], [j]
        while before[i] != after[j]:
            a, b = _product(before, left), _product(after, right)
            if a is None or b is None:
                return runs + _from_the_right(before, after, i, j)
            if a == b:
                break
            grown, dims = (left, before) if a < b else (right, after)
            if grown[-1] + 1 == len(dims):
                return runs
            grown.append(grown[-1] + 1)
        runs.append((left, right))
        i, j = left[-1] + 1, right[-1] + 1
    return runs


Dims = Sequence[int | ir.SymbolicDim]


def _product(dims: Dims, places: Sequence[int]) -> int | None:
    """The number of elements of some axes, or None if one is symbolic."""
    sizes = [dim for place in places if isinstance(dim := dims[place], int)]
    return prod(sizes) if len(sizes) == len(places) else None


def _from_the_right(before: Dims, after: Dims, i: int, j: int) -> list[Run]:
    """The runs from axes i and j on, where a symbolic axis is merged or divided: one of them all,
    up to the axes at the end that are equal.
    """
    runs: list[Run] = []
    m, n = len(before), len(after)
    while m > i + 1 and n > j + 1 and before[m - 1] == after[n - 1]:
        m, n = m - 1, n - 1
        runs.append(([m], [n]))
    return [(list(range(i, m)), list(range(j, n))), *reversed(runs)]


@rule("Gather")
def _gather(axes: Axes, node: ir.Node) -> None:
    (data, indices), y = _operands(node, 2), node.outputs[0]
    axis = attribute(node, "axis", 0) % rank(data)
    if axis == 0 and is_constant(data) and rank(data) == 2:
        # Each device looks up the rows that it has; what the others find is summed.
        axes.reduce((data, 0), y)
    else:
        axes.block((data, axis), "Gather picks from it")
    for place in range(axis):
        axes.tie((data, place), (y, place))
    for place in range(rank(indices)):
        axes.tie((indices, place), (y, axis + place))
    for place in range(axis + 1, rank(data)):
        axes.tie((data, place), (y, place + rank(indices) - 1))


@rule("DequantizeLinear", "QuantizeLinear")
def _quantization(axes: Axes, node: ir.Node) -> None:
    x, y = _operands(node, 1)[0], node.outputs[0]
    for axis in range(rank(x)):
        axes.tie((x, axis), (y, axis))
    for value in node.inputs[1:3]:
        if value is None or rank(value) == 0 or size((value, 0)) == 1 == rank(value):
            continue
        if rank(value) == 1:
            axes.tie((value, 0), (x, attribute(node, "axis", 1) % rank(x)))
            continue
        for axis in range(rank(x)):
            axes.tie((value, axis), (x, axis))


@rule("RotaryEmbedding")
def _rotary(axes: Axes, node: ir.Node) -> None:
    x, y = _operands(node, 1)[0], node.outputs[0]
    time = rank(x) - 2
    for axis in range(rank(x)):
        axes.tie((x, axis), (y, axis))
    if rank(x) == 3:
        axes.count((x, 2), "attention heads", attribute(node, "num_heads"))
    else:
        _block(axes, x, [3], "its halves are rotated together")
    places = node.inputs[3] if len(node.inputs) > 3 else None
    for value in [places] if places is not None else node.inputs[1:3]:
        if value is not None:
            _tie_unless_one(axes, (value, 0), (x, 0))
            _tie_unless_one(axes, (value, 1), (x, time))


@rule("TensorScatter")
def _tensor_scatter(axes: Axes, node: ir.Node) -> None:
    (cache, update), y = _operands(node, 2), node.outputs[0]
    along = attribute(node, "axis", -2) % rank(cache)
    for value in (cache, update):
        _tie_all_but(axes, value, y, [along], "TensorScatter writes along it")
    where = node.inputs[2] if len(node.inputs) > 2 else None
    if where is not None:
        _tie_unless_one(axes, (where, 0), (cache, 0))


@rule("Attention")
def _attention(axes: Axes, node: ir.Node) -> None:
    """Heads split, each with its keys and values; times and the inside of a head do not.

    Fewer key/value heads than devices stay whole on each of them, if each device's query heads
    share one.
    """
    query, key, value = _operands(node, 3)
    y = node.outputs[0]
    packed = rank(query) == 3
    heads_axis = 2 if packed else 1
    optional = [*node.inputs[3:7], *[None] * (7 - len(node.inputs))]
    mask, past_key, past_value, lengths = optional[:4]
    presents = [one for one in node.outputs[1:3] if one.name]
    heads = _heads(node, query, "q_num_heads")
    groups = _heads(node, key, "kv_num_heads")
    keys: list[ir.Value] = [key, value]
    caches = [one for one in (past_key, past_value, *presents) if one is not None]
    for one in (query, y, *keys, *caches):
        axes.tie((query, 0), (one, 0))
    axes.tie((query, heads_axis), (y, heads_axis))
    sides: list[Axis] = [(one, heads_axis) for one in keys] + [(one, 1) for one in caches]
    if heads is not None:
        axes.count((query, heads_axis), "attention heads", heads)
    tensor = axes.tensor
    if heads is not None and groups is not None and groups < tensor and not tensor % groups:
        for axis in sides:
            axes.block(axis, f"{groups} key/value heads are fewer than the {tensor} devices")
    else:
        axes.tie((query, heads_axis), *sides)
        if groups is not None:
            axes.count((query, heads_axis), "key/value heads", groups)
    times = [(one, 1 if packed else 2) for one in (query, *keys)] + [(one, 2) for one in caches]
    inside = [(one, 3) for one in (*([] if packed else [query, *keys]), *caches)]
    for axis in times:
        axes.block(axis, "each query meets each key")
    for axis in inside:
        axes.block(axis, "the scores sum over it")
    axes.tie((query, 1 if packed else 2), (y, 1 if packed else 2))
    if lengths is not None:
        axes.tie((lengths, 0), (query, 0))
    if mask is not None and rank(mask) == 4:
        _tie_unless_one(axes, (mask, 0), (query, 0))
        if not packed:
            _tie_unless_one(axes, (mask, 1), (query, 1))


def _heads(node: ir.Node, value: ir.Value, name: str) -> int | None:
    return attribute(node, name) if rank(value) == 3 else size((value, 1))


def _operands(node: ir.Node, count: int) -> list[ir.Value]:
    found = [value for value in node.inputs[:count] if value is not None]
    assert len(found) == count
    return found


def _known(axes: Axes, node: ir.Node, index: int) -> list[int] | None:
    """The axes that an operand names; all of the first operand is blocked where it is computed."""
    array = constant(node.inputs[index])
    if array is not None:
        return [int(axis) for axis in array.ravel()]
    x = _operands(node, 1)[0]
    _block(axes, x, range(rank(x)), f"{node.op_type} computes which axes it works on")
    return None


def _block(axes: Axes, value: ir.Value, places: Sequence[int], reason: str) -> None:
    for axis in places:
        axes.block((value, axis), reason)


def _tie_unless_one(axes: Axes, one: Axis, other: Axis) -> None:
    if size(one) != 1:
        axes.tie(one, other)


def _tie_all_but(
    axes: Axes,
    x: ir.Value,
    y: ir.Value,
    places: Sequence[int],
    reason: str,
    *,
    whole_result: bool = True,
) -> None:
    """Tie two values of one rank axis by axis, but for those that the operator needs whole."""
    for axis in range(rank(x)):
        if axis not in places:
            axes.tie((x, axis), (y, axis))
            continue
        axes.block((x, axis), reason)
        if whole_result:
            axes.block((y, axis), reason)
