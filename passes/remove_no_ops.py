"""Remove operators that return what they were given."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from trivium.compiler.passing import (
    NodePass,
    attribute,
    constant,
    dims,
    entering,
    graph_of,
    is_op,
    producer,
    replace,
    unread,
)
from trivium.compiler.types import Preserves

Rule = Callable[[ir.Node], "ir.Value | None"]
_RULES: dict[str, Rule] = {}


_rule = entering(_RULES)


@dataclass(frozen=True)
class RemoveNoOps(NodePass):
    """Remove Dropout at inference, casts to the same type, reshapes to the same shape, transposes
    that cancel, slices of everything, and their like; merge neighbours of one kind.

    Left alone: a no-op that makes an output of a graph from one of its inputs, and whatever cannot
    be proven from types and shapes.
    """

    name: ClassVar[str] = "remove-no-ops"
    preserves: ClassVar[Preserves] = "exact"

    def rewrite(self, node: ir.Node) -> bool:
        rule = _RULES.get(node.op_type) if is_op(node, node.op_type) else None
        if rule is None or not node.inputs:
            return False
        same = rule(node)
        if same is None:
            return _merge(node)
        result = node.outputs[0]
        maker = same.producer()
        if result.is_graph_output() and (
            maker is None or maker.graph is not node.graph or same.is_graph_output()
        ):
            return False
        if not all(unread(value) for value in node.outputs[1:]):
            return False
        replace(result, same)
        graph_of(node).remove(node, safe=True)
        return True


# --- what equals its input ------------------------------------------------------------------------


@_rule("Dropout")
def _dropout(node: ir.Node) -> ir.Value | None:
    training = node.inputs[2] if len(node.inputs) > 2 else None
    if training is not None:
        flag = constant(training)
        if flag is None or bool(flag):
            return None
    return node.inputs[0]


@_rule("Cast")
def _cast(node: ir.Node) -> ir.Value | None:
    source, target = node.inputs[0], attribute(node, "to")
    if source is None or source.dtype is None:
        return None
    if source.dtype == target:
        return source
    # A widening and back: every value survives.
    inner = producer(source, "Cast")
    origin = inner.inputs[0] if inner is not None else None
    if origin is None or origin.dtype is None or origin.dtype != target:
        return None
    return origin if (int(origin.dtype), int(source.dtype)) in _WIDER else None


_FLOAT_ORDER = (ir.DataType.FLOAT16, ir.DataType.FLOAT, ir.DataType.DOUBLE)
_SIGNED_ORDER = (ir.DataType.INT8, ir.DataType.INT16, ir.DataType.INT32, ir.DataType.INT64)
_WIDER = {
    (int(order[i]), int(order[j]))
    for order in (_FLOAT_ORDER, _SIGNED_ORDER)
    for i in range(len(order))
    for j in range(i + 1, len(order))
} | {(int(ir.DataType.BFLOAT16), int(ir.DataType.FLOAT))}


@_rule("Reshape", "Flatten")
def _reshape(node: ir.Node) -> ir.Value | None:
    """Element counts agree, so that one dimension may be unknown."""
    before, after = dims(node.inputs[0]), dims(node.outputs[0])
    if before is None or after is None or len(before) != len(after) or 0 in before:
        return None
    known = [have == want and have is not None for have, want in zip(before, after, strict=True)]
    return node.inputs[0] if known.count(False) <= 1 else None


@_rule("Expand")
def _expand(node: ir.Node) -> ir.Value | None:
    target = constant(node.inputs[1])
    known = dims(node.inputs[0])
    if target is not None and known is not None and target.size <= len(known):
        tail = known[len(known) - target.size :]
        if all(int(n) in (1, have) for n, have in zip(target, tail, strict=True)):
            return node.inputs[0]
    return node.inputs[0] if _same_static_shape(node.inputs[0], node.outputs[0]) else None


@_rule("Tile")
def _tile(node: ir.Node) -> ir.Value | None:
    repeats = constant(node.inputs[1])
    return node.inputs[0] if repeats is not None and (repeats == 1).all() else None


def _same_static_shape(one: ir.Value | None, other: ir.Value) -> bool:
    """Whether both shapes are numbers, and equal."""
    if one is None or one.shape is None or other.shape is None:
        return False
    return one.shape.is_static() and other.shape.is_static() and one.shape == other.shape


@_rule("Transpose")
def _transpose(node: ir.Node) -> ir.Value | None:
    perm = attribute(node, "perm")
    return node.inputs[0] if perm is not None and list(perm) == sorted(perm) else None


_NO_END = int(np.iinfo(np.int32).max)
"""What exporters write for "to the end"; some write less, which counts beyond `_NO_MEMORY`."""

_NO_MEMORY = 1 << 44
"""More elements than any tensor has: an end that cuts off only what lies behind cuts nothing."""


@_rule("Slice")
def _slice(node: ir.Node) -> ir.Value | None:
    """Axis by axis: from the start, in steps of one, to an end that is the axis's or beyond."""
    source, starts, ends = node.inputs[0], constant(node.inputs[1]), constant(node.inputs[2])
    steps = constant(node.inputs[4]) if len(node.inputs) > 4 else np.ones(1)
    if starts is None or ends is None or steps is None or starts.any() or (steps != 1).any():
        return None
    if _same_static_shape(source, node.outputs[0]) or (ends >= _NO_END).all():
        return source
    sizes = dims(source)
    axes = constant(node.inputs[3]) if len(node.inputs) > 3 else np.arange(len(ends))
    if sizes is None or axes is None or 0 in sizes:
        return None
    known = math.prod(size for size in sizes if size is not None)
    beyond = min(_NO_END, _NO_MEMORY // known + 1)
    for axis, end in zip(axes.tolist(), ends.tolist(), strict=True):
        size = sizes[axis]
        if end < (beyond if size is None else size):
            return None
    return source


@_rule("Pad")
def _pad(node: ir.Node) -> ir.Value | None:
    pads = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    return node.inputs[0] if pads is not None and not pads.any() else None


@_rule("Concat", "Sum", "Max", "Min", "Mean")
def _single(node: ir.Node) -> ir.Value | None:
    return node.inputs[0] if len(node.inputs) == 1 else None


@_rule("Squeeze")
def _squeeze(node: ir.Node) -> ir.Value | None:
    return _undone(node, "Unsqueeze")


@_rule("Unsqueeze")
def _unsqueeze(node: ir.Node) -> ir.Value | None:
    return _undone(node, "Squeeze")


def _undone(node: ir.Node, opposite: str) -> ir.Value | None:
    inner = producer(node.inputs[0], opposite)
    if inner is None or len(inner.inputs) < 2 or len(node.inputs) < 2:
        return None
    mine, theirs = constant(node.inputs[1]), constant(inner.inputs[1])
    if mine is None or theirs is None or not np.array_equal(mine, theirs):
        return None
    # Counted from the end, the same numbers mean other axes before and after.
    return inner.inputs[0] if (mine >= 0).all() else None


@_rule("Add", "Sub", "Mul", "Div", "Pow")
def _neutral(node: ir.Node) -> ir.Value | None:
    neutral = 0 if node.op_type in ("Add", "Sub") else 1
    sides = (0, 1) if node.op_type in ("Add", "Mul") else (0,)
    for side in sides:
        kept, other = node.inputs[side], node.inputs[1 - side]
        array = constant(other)
        if array is None or kept is None or kept.dtype != node.outputs[0].dtype:
            continue
        if (array != neutral).any() or not array.size:
            continue
        rank = dims(kept)
        if array.size == 1 and rank is not None and array.ndim <= len(rank):
            return kept
        if _same_static_shape(kept, node.outputs[0]):
            return kept
    return None


# --- neighbours of one kind -----------------------------------------------------------------------


def _merge(node: ir.Node) -> bool:
    if node.op_type == "Transpose":
        return _merge_transposes(node)
    if node.op_type == "Reshape":
        return _skip_reshape(node)
    return False


def _merge_transposes(node: ir.Node) -> bool:
    inner = producer(node.inputs[0], "Transpose")
    outer_perm = attribute(node, "perm")
    inner_perm = attribute(inner, "perm") if inner is not None else None
    if inner is None or outer_perm is None or inner_perm is None:
        return False
    perm = [int(inner_perm[axis]) for axis in outer_perm]
    node.attributes["perm"] = ir.AttrInt64s("perm", perm)
    node.replace_input_with(0, inner.inputs[0])
    if all(unread(value) for value in inner.outputs):
        graph_of(inner).remove(inner, safe=True)
    return True


def _skip_reshape(node: ir.Node) -> bool:
    """A reshape to a shape of numbers does not care how its input was shaped before."""
    inner = producer(node.inputs[0], "Reshape", "Flatten", "Squeeze", "Unsqueeze")
    shape = constant(node.inputs[1])
    if inner is None or shape is None or attribute(node, "allowzero", 0) or (shape == 0).any():
        return False
    node.replace_input_with(0, inner.inputs[0])
    if all(unread(value) for value in inner.outputs):
        graph_of(inner).remove(inner, safe=True)
    return True
