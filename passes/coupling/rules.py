"""What each operator ties together: products, normalizations and everything elementwise.

The operators that move elements about are in `layout`. What has no rule is pinned on all sides.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from trivium.compiler.passing import attribute, constant, dims, entering, opset_of
from trivium.passes.coupling.elements import Array, Elements, Kept

Rule = Callable[[ir.Node, Elements], None]
RULES: dict[str, Rule] = {}
enter = entering(RULES)

UNARY = (
    "Abs", "Acos", "Asin", "Atan", "BitwiseNot", "Cast", "Ceil", "Celu", "Clip", "Cos", "Dropout",
    "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN",
    "LeakyRelu", "Log", "Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Shrink",
    "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Swish", "Tan", "Tanh",
    "ThresholdedRelu",
)  # fmt: skip
BROADCAST = (
    "Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max",
    "Mean", "Min", "Mod", "Mul", "Or", "PRelu", "Pow", "Sub", "Sum", "Where", "Xor",
)  # fmt: skip
POOLS = ("AveragePool", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "LpPool", "MaxPool")
REDUCTIONS = (
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean",
    "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare",
)  # fmt: skip


def rank(value: ir.Value | None) -> int:
    return len(dims(value) or ())


def label(node: ir.Node) -> str:
    return f"{node.name or node.outputs[0].name} ({node.op_type})"


def pin_all(node: ir.Node, e: Elements, why: str = "cannot be followed") -> None:
    """Keep everything around a node as it is."""
    for value in (*node.inputs, *node.outputs):
        e.pin(value, f"{label(node)} {why}")


@enter(*UNARY)
def unary(node: ir.Node, e: Elements) -> None:
    x = node.inputs[0]
    for y in node.outputs:
        for axis in range(rank(x)):
            e.same(x, axis, y, axis)


@enter(*BROADCAST)
def broadcast(node: ir.Node, e: Elements) -> None:
    y = node.outputs[0]
    for x in node.inputs:
        align(x, y, e, node)


def align(x: ir.Value | None, y: ir.Value, e: Elements, node: ir.Node) -> None:
    """Tie the axes of an operand to those of the result, counted from the last."""
    mine, theirs = dims(x), dims(y)
    if x is None:
        return
    if mine is None or theirs is None:
        e.pin(x, f"{label(node)} has operands of unknown rank")
        e.pin(y, f"{label(node)} has operands of unknown rank")
        return
    for back in range(1, len(mine) + 1):
        if mine[-back] == 1 and theirs[-back] != 1:
            continue
        e.same(x, len(mine) - back, y, len(theirs) - back)


@enter("Conv")
def conv(node: ir.Node, e: Elements) -> None:
    x, w = node.inputs[:2]
    y, bias = node.outputs[0], node.inputs[2] if len(node.inputs) > 2 else None
    e.same(x, 0, y, 0)
    for value in (x, w, y):
        e.pin(value, f"{label(node)} slides over it", range(2, rank(value)))
    if bias is not None:
        e.same(bias, 0, y, 1)
    e.same(w, 0, y, 1)
    _made(e, w, 0)
    group = int(attribute(node, "group", 1))
    if group == 1:
        e.same(x, 1, w, 1)
        e.products.append((node, 0, 1))
    else:
        _grouped(node, e, x, w, y, group)


def _grouped(
    node: ir.Node, e: Elements, x: ir.Value | None, w: ir.Value | None, y: ir.Value, group: int
) -> None:
    """A group goes whole: all it reads and all it makes."""
    into, out = e.of(x, 1), e.of(y, 1)
    e.pin(w, f"{label(node)} has groups", [1])
    if into is None or out is None:
        pin_all(node, e)
        return
    into, out = into.reshape(group, -1), out.reshape(group, -1)
    for members in (into, out):
        for column in range(1, members.shape[1]):
            e.tie(members[:, 0], members[:, column])
    e.tie(into[:, 0], out[:, 0])

    def fix(kept: Kept) -> None:
        assert x is not None
        left = int(kept(x, 1).reshape(group, -1)[:, 0].sum())
        node.attributes["group"] = ir.AttrInt64("group", left)

    e.fixes.append(fix)


def _made(e: Elements, weight: ir.Value | None, axis: int) -> None:
    if weight is not None:
        e.makers.append((weight, axis))


@enter("ConvTranspose")
def conv_transpose(node: ir.Node, e: Elements) -> None:
    if attribute(node, "group", 1) != 1:
        pin_all(node, e, "has groups")
        return
    x, w = node.inputs[:2]
    y = node.outputs[0]
    e.same(x, 0, y, 0)
    e.same(x, 1, w, 0)
    e.same(w, 1, y, 1)
    _made(e, w, 1)
    if len(node.inputs) > 2:
        e.same(node.inputs[2], 0, y, 1)
    for value in (x, w, y):
        e.pin(value, f"{label(node)} slides over it", range(2, rank(value)))
    e.products.append((node, 0, 1))


@enter("Gemm")
def gemm(node: ir.Node, e: Elements) -> None:
    a, b = node.inputs[:2]
    y = node.outputs[0]
    row, summed = (1, 0) if attribute(node, "transA", 0) else (0, 1)
    inner, column = (1, 0) if attribute(node, "transB", 0) else (0, 1)
    e.same(a, row, y, 0)
    e.same(a, summed, b, inner)
    e.same(b, column, y, 1)
    _made(e, b, column)
    e.products.append((node, 0, summed))
    if len(node.inputs) > 2:
        align(node.inputs[2], y, e, node)


@enter("MatMul")
def matmul(node: ir.Node, e: Elements) -> None:
    a, b = node.inputs[:2]
    y = node.outputs[0]
    first, second, result = rank(a), rank(b), rank(y)
    if first < 2 or second < 2:
        pin_all(node, e, "has a vector")
        return
    e.same(a, first - 1, b, second - 2)
    e.same(a, first - 2, y, result - 2)
    e.same(b, second - 1, y, result - 1)
    _made(e, b, second - 1)
    e.products.append((node, 0, first - 1))
    sizes = dims(y) or ()
    for x, own in ((a, first), (b, second)):
        for back in range(3, own + 1):
            size = (dims(x) or ())[own - back]
            if size != 1 or sizes[result - back] == 1:
                e.same(x, own - back, y, result - back)


@enter("BatchNormalization", "InstanceNormalization")
def by_channel(node: ir.Node, e: Elements) -> None:
    x, *parameters = node.inputs
    y = node.outputs[0]
    for axis in range(rank(x)):
        e.same(x, axis, y, axis)
    for value in parameters:
        e.same(value, 0, y, 1)
    if node.op_type == "InstanceNormalization":
        e.pin(x, f"{label(node)} takes its mean over it", range(2, rank(x)))
    for value in node.outputs[1:]:
        e.pin(value, f"{label(node)} is in training form")


@enter("LayerNormalization", "RMSNormalization")
def over_features(node: ir.Node, e: Elements) -> None:
    x, *parameters = node.inputs
    first = int(attribute(node, "axis", -1)) % max(rank(x), 1)
    why = f"{label(node)} takes its statistics over it"
    for y in node.outputs[:1]:
        for axis in range(rank(x)):
            e.same(x, axis, y, axis)
    e.pin(x, why, range(first, rank(x)))
    for value in (*parameters, *node.outputs[1:]):
        e.pin(value, why)


@enter("Softmax", "LogSoftmax", "Hardmax")
def softmax(node: ir.Node, e: Elements) -> None:
    unary(node, e)
    x = node.inputs[0]
    axis = int(attribute(node, "axis", -1)) % max(rank(x), 1)
    e.pin(x, f"{label(node)} sums over it", [axis])


@enter("CumSum")
def cumulative(node: ir.Node, e: Elements) -> None:
    pin_all(node, e, "runs along it")


@enter("LRN")
def response(node: ir.Node, e: Elements) -> None:
    unary(node, e)
    e.pin(node.inputs[0], f"{label(node)} sums over neighbours of it", [1])


@enter(*POOLS)
def pool(node: ir.Node, e: Elements) -> None:
    x = node.inputs[0]
    for y in node.outputs:
        for axis in range(min(2, rank(x))):
            e.same(x, axis, y, axis)
        e.pin(y, f"{label(node)} slides over it", range(2, rank(y)))
    e.pin(x, f"{label(node)} slides over it", range(2, rank(x)))


@enter(*REDUCTIONS)
def reduction(node: ir.Node, e: Elements) -> None:
    x, y = node.inputs[0], node.outputs[0]
    axes = _axes(node)
    if axes is None:
        pin_all(node, e, "reduces axes that are not stored in the model")
        return
    gone = {axis % rank(x) for axis in axes} if rank(x) else set()
    if not axes and not attribute(node, "noop_with_empty_axes", 0):
        gone = set(range(rank(x)))
    e.pin(x, f"{label(node)} reduces it", sorted(gone))
    place = 0
    for axis in range(rank(x)):
        if axis not in gone:
            e.same(x, axis, y, place)
        place += axis not in gone or bool(attribute(node, "keepdims", 1))


def _axes(node: ir.Node) -> list[int] | None:
    """The axes of a reduction, an attribute once and an operand later; empty for none given."""
    given = attribute(node, "axes")
    if given is not None:
        return list(given)
    if len(node.inputs) < 2 or node.inputs[1] is None:
        return []
    array = constant(node.inputs[1])
    return None if array is None else [int(axis) for axis in array.reshape(-1)]


@enter("QuantizeLinear", "DequantizeLinear")
def quantization(node: ir.Node, e: Elements) -> None:
    x, *parameters = node.inputs
    if attribute(node, "block_size", 0):
        pin_all(node, e, "has blocks")
        return
    unary(node, e)
    axis = int(attribute(node, "axis", 1))
    for value in parameters:
        if value is not None and rank(value) == 1 and dims(value) != (1,):
            e.same(value, 0, x, axis % max(rank(x), 1))


@enter("Attention")
def attention(node: ir.Node, e: Elements) -> None:
    """Heads: of the queries in a group, with the key and value that they share."""
    q, k, v = node.inputs[:3]
    y = node.outputs[0]
    if any(value is not None and value.name for value in (*node.inputs[4:], *node.outputs[1:])):
        # A cache is an input of the model: its heads are the caller's.
        pin_all(node, e, "keeps a cache")
        return
    flat = rank(q) == 3
    axis = 2 if flat else 1
    shape, keys = dims(q), dims(k)
    if shape is None or keys is None or shape[axis] is None or keys[axis] is None:
        pin_all(node, e)
        return
    own = int(attribute(node, "q_num_heads", 0) if flat else shape[1] or 0)
    shared = int(attribute(node, "kv_num_heads", 0) if flat else keys[1] or 0)
    rows = [_heads(e, value, axis, heads) for value, heads in ((q, own), (k, shared), (v, shared))]
    made = _heads(e, y, axis, own)
    if made is None or not own or not shared or any(row is None for row in rows):
        pin_all(node, e)
        return
    query, key, value_row = rows
    assert query is not None
    assert key is not None
    e.tie(key, value_row)
    e.tie(query, made)
    e.tie(query, np.repeat(key, own // shared))
    for value in (q, k, v, y):
        assert value is not None
        e.heads.append((value, axis))
        others = [i for i in range(rank(value)) if i not in (0, axis)]
        e.pin(value, f"{label(node)} computes along it", others)
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        e.pin(node.inputs[3], f"{label(node)} is masked by it")
    if flat:
        e.fixes.append(lambda kept: _fewer_heads(node, kept, (q, own), (k, shared)))


def _heads(e: Elements, value: ir.Value | None, axis: int, heads: int) -> Array | None:
    """The first element of each head, the others of it tied to that one."""
    elements = e.of(value, axis)
    if elements is None or not heads or len(elements) % heads:
        return None
    members = elements.reshape(heads, -1)
    for column in range(1, members.shape[1]):
        e.tie(members[:, 0], members[:, column])
    return np.asarray(members[:, 0])


def _fewer_heads(
    node: ir.Node, kept: Kept, q: tuple[ir.Value | None, int], k: tuple[ir.Value | None, int]
) -> None:
    for name, (value, heads) in (("q_num_heads", q), ("kv_num_heads", k)):
        assert value is not None
        left = int(kept(value, 2).reshape(heads, -1)[:, 0].sum())
        node.attributes[name] = ir.AttrInt64(name, left)


@enter("RotaryEmbedding")
def rotary(node: ir.Node, e: Elements) -> None:
    x, y = node.inputs[0], node.outputs[0]
    heads = int(attribute(node, "num_heads", 0))
    axis = 2 if rank(x) == 3 else 1
    if opset_of(node) < 23 or (axis == 2 and not heads):
        pin_all(node, e)
        return
    for value in node.inputs[1:]:
        e.pin(value, f"{label(node)} rotates by it")
    for other in range(rank(x)):
        e.same(x, other, y, other)
        if other not in (0, axis):
            e.pin(x, f"{label(node)} computes along it", [other])
    if axis == 2 and _heads(e, x, axis, heads) is None:
        pin_all(node, e)
        return

    def fix(kept: Kept) -> None:
        assert x is not None
        left = int(kept(x, 2).reshape(heads, -1)[:, 0].sum())
        node.attributes["num_heads"] = ir.AttrInt64("num_heads", left)

    if axis == 2:
        e.fixes.append(fix)
