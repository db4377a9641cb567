"""Put Attention back together that exporters took apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from trivium.compiler.passing import (
    NodePass,
    attribute,
    constant,
    decline,
    dims,
    is_op,
    producer,
    read_once,
    scalar,
    splice,
)
from trivium.compiler.types import Preserves
from trivium.passes.trace_dims import asked_axis, origin

_MASKED = -1e4
"""At this and below, the exponential of a masked score is zero in every float dtype."""

_SWAP = (0, 1, 3, 2)


@dataclass
class Scores:
    """``scale * q @ k`` and what was added to it; ``k`` may still be transposed.

    Attributes:
        may_mask_all: Whether a boolean mask may leave a row without a key.
    """

    q: ir.Value
    k_transposed: ir.Value
    scale: float
    mask: ir.Value | None = None
    may_mask_all: bool = False


@dataclass(frozen=True)
class RecognizeAttention(NodePass):
    """Rewrite ``softmax(scale * q k^T + mask) v`` over heads to Attention.

    The scale may stand at q, at k or at the scores; the mask may be added or chosen by Where; keys
    and values that were repeated for groups of heads are taken as they were before.

    A row whose keys are all masked has no softmax; a guard that turns its NaN into zeros goes,
    since Attention has it built in.

    Left alone: operands of other than four axes, scores or probabilities that something else reads,
    a mask that is not known to cover the keys, and a Where without a guard that could mask all keys
    of a row.
    """

    name: ClassVar[str] = "recognize-attention"
    preserves: ClassVar[Preserves] = "numeric"

    def rewrite(self, node: ir.Node) -> bool:
        if not is_op(node, "MatMul") or node.inputs[0] is None:
            return False
        v = node.inputs[1]
        probabilities, guarded = _unguarded(node.inputs[0])
        softmax = _softmax(probabilities)
        if softmax is None:
            return False
        if not read_once(node.inputs[0]) or not (guarded or read_once(probabilities)):
            return decline(softmax.outputs[0], "something else reads the probabilities")
        found = _scores(softmax.inputs[0], guarded)
        if found is None or v is None:
            return False
        for value in (found.q, found.k_transposed, v):
            if len(dims(value) or ()) != 4:
                return decline(value, "an operand of attention that is not known to have four axes")
        problem = _mask_problem(found)
        if problem is not None and found.mask is not None:
            return decline(found.mask, problem)
        k, turn = _untransposed(found.k_transposed)
        k, v = _unrepeated(k, v, found.q)
        attributes = {"scale": found.scale}
        inputs = [found.q, k, v, *([found.mask] if found.mask is not None else [])]
        made = ir.node("Attention", inputs, attributes, name=node.name)
        splice([node], [*turn, made])
        return True


def _unguarded(value: ir.Value) -> tuple[ir.Value, bool]:
    """``x`` of ``where(isnan(x), 0, x)`` and whether that is what the value is."""
    choice = producer(value, "Where")
    if choice is None:
        return value, False
    test, zero, inner = producer(choice.inputs[0], "IsNaN"), choice.inputs[1], choice.inputs[2]
    if test is None or inner is None or test.inputs[0] is not inner or scalar(zero) != 0:
        return value, False
    readers = {node for node, _ in inner.uses()}
    alone = readers == {test, choice} and read_once(test.outputs[0])
    return (inner, True) if alone and not inner.is_graph_output() else (value, False)


def _softmax(value: ir.Value | None) -> ir.Node | None:
    """The Softmax over the last axis that makes a value."""
    softmax = producer(value, "Softmax")
    if softmax is None:
        return None
    axis = attribute(softmax, "axis", -1)
    known = dims(softmax.inputs[0])
    last = axis == -1 or (known is not None and axis == len(known) - 1)
    return softmax if last else None


# --- scores ---------------------------------------------------------------------------------------


def _scores(value: ir.Value | None, guarded: bool) -> Scores | None:
    node = value.producer() if value is not None else None
    if node is None or value is None or not read_once(value):
        return None
    if is_op(node, "MatMul"):
        return _product(node)
    if is_op(node, "Mul", "Div"):
        return _scaled_scores(node, guarded)
    if is_op(node, "Add"):
        for index in (0, 1):
            inner, mask = _scores(node.inputs[index], guarded), node.inputs[1 - index]
            if inner is not None and inner.mask is None and mask is not None:
                inner.mask = mask
                return inner
    if is_op(node, "Where"):
        inner, filler = _scores(node.inputs[1], guarded), scalar(node.inputs[2])
        if inner is not None and inner.mask is None and filler is not None and filler <= _MASKED:
            inner.mask = node.inputs[0]
            inner.may_mask_all = guarded and filler == -np.inf
            return inner
    return None


def _product(node: ir.Node) -> Scores | None:
    q, left = _unscaled(node.inputs[0])
    k, right = _unscaled(node.inputs[1])
    return Scores(q, k, left * right) if q is not None and k is not None else None


def _scaled_scores(node: ir.Node, guarded: bool) -> Scores | None:
    for index in (0, 1) if node.op_type == "Mul" else (0,):
        number = scalar(node.inputs[1 - index])
        inner = _scores(node.inputs[index], guarded) if number else None
        # A mask inside of a scaled sum would be scaled as well.
        if inner is not None and number and inner.mask is None:
            inner.scale *= number if node.op_type == "Mul" else 1 / number
            return inner
    return None


def _unscaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """A value without the constants that multiply it, and their product."""
    node = value.producer() if value is not None else None
    if node is None or not is_op(node, "Mul", "Div"):
        return value, 1.0
    for index in (0, 1) if node.op_type == "Mul" else (0,):
        number = scalar(node.inputs[1 - index])
        if number and len(dims(node.inputs[1 - index]) or ()) <= 1:
            inner, rest = _unscaled(node.inputs[index])
            return inner, rest * (number if node.op_type == "Mul" else 1 / number)
    return value, 1.0


# --- masks ----------------------------------------------------------------------------------------


def _mask_problem(found: Scores) -> str | None:
    """Why Attention would read the mask in another way than the graph did."""
    mask = found.mask
    if mask is None:
        return None
    shape, keys = mask.shape, found.k_transposed.shape
    if shape is None or keys is None or not 2 <= len(shape) <= 4:
        return "a mask that is not known to have two to four axes"
    if mask.dtype == ir.DataType.BOOL:
        if not found.may_mask_all and not _keeps_one(mask):
            return "it may mask all keys of a row"
    elif mask.dtype != found.q.dtype:
        return f"a mask of {mask.dtype} for scores of {found.q.dtype}"
    # A mask that is shorter than the keys is padded by Attention, and repeated by Add.
    if not _equal(shape[-1], keys[-1]) and not _cut_to(mask, found.k_transposed):
        return f"its last axis {shape[-1]} is not known to be that of the keys {keys[-1]}"
    return None


def _equal(one: int | ir.SymbolicDim, other: int | ir.SymbolicDim) -> bool:
    return one == other and not (isinstance(one, ir.SymbolicDim) and one.value is None)


def _cut_to(mask: ir.Value, keys: ir.Value) -> bool:
    """Whether the mask's columns were cut to the length of the keys, by their Shape."""
    cut = producer(_uncast(mask), "Slice")
    if cut is None or len(cut.inputs) < 4 or not _starts_at_zero(cut):
        return False
    axes, rank = constant(cut.inputs[3]), len(dims(cut.inputs[0]) or ())
    if axes is None or [int(axis) % rank for axis in axes] != [rank - 1]:
        return False
    length = cut.inputs[2]
    while (node := producer(length, "Unsqueeze", "Squeeze", "Reshape", "Cast")) is not None:
        length = node.inputs[0]
    asked = producer(length, "Gather", "Slice")
    shape = producer(asked.inputs[0], "Shape") if asked is not None else None
    if asked is None or shape is None or shape.attributes:
        return False
    source = shape.inputs[0]
    axis = asked_axis(asked, len(dims(source) or ())) if source is not None else None
    return source is not None and axis is not None and origin(source, axis) == origin(keys, 3)


def _uncast(value: ir.Value) -> ir.Value:
    while (cast := producer(value, "Cast")) is not None and cast.inputs[0] is not None:
        value = cast.inputs[0]
    return value


def _keeps_one(mask: ir.Value) -> bool:
    """Whether every row of a mask keeps at least one key, for certain."""
    array = constant(mask, limit=1 << 26)
    if array is not None:
        return bool(array.any(axis=-1).all())
    start = _uncast(mask)
    while (cut := producer(start, "Slice")) is not None:
        axes = constant(cut.inputs[3]) if len(cut.inputs) > 3 else None
        rank = len(dims(cut.inputs[0]) or ())
        if axes is None or not rank or cut.inputs[0] is None:
            return False
        if any(int(axis) % rank == rank - 1 for axis in axes) and not _starts_at_zero(cut):
            return False
        start = cut.inputs[0]
    array = constant(start, limit=1 << 26)
    # The first column survives every cut of the columns that begins at zero.
    return array is not None and bool(array[..., 0].all())


def _starts_at_zero(cut: ir.Node) -> bool:
    starts = constant(cut.inputs[1])
    steps = constant(cut.inputs[4]) if len(cut.inputs) > 4 else np.ones(1)
    return (
        starts is not None and steps is not None and not starts.any() and bool((steps == 1).all())
    )


# --- keys and values ------------------------------------------------------------------------------


def _untransposed(value: ir.Value) -> tuple[ir.Value, list[ir.Node]]:
    """Keys as (batch, heads, length, size), and the Transpose that this takes, if it takes one."""
    node = producer(value, "Transpose")
    source, perm = value, list(_SWAP)
    if node is not None and node.inputs[0] is not None:
        old = list(attribute(node, "perm", (3, 2, 1, 0)))
        source, perm = node.inputs[0], [old[axis] for axis in _SWAP]
    if perm == [0, 1, 2, 3]:
        return source, []
    turned = ir.node("Transpose", [source], {"perm": perm})
    result = turned.outputs[0]
    if source.shape is not None:
        result.shape = ir.Shape([source.shape[axis] for axis in perm])
    result.type = source.type
    return result, [turned]


def _unrepeated(k: ir.Value, v: ir.Value, q: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Keys and values before they were repeated for groups of heads, if both were."""
    keys, values = _before_repeat(k), _before_repeat(v)
    if keys is None or values is None:
        return k, v
    heads, groups = (dims(q) or ())[1], (dims(keys) or ())[1]
    same = (dims(values) or ())[1] == groups
    if heads is None or groups is None or not same or heads % groups:
        return k, v
    return keys, values


def _before_repeat(value: ir.Value) -> ir.Value | None:
    """``x`` of ``reshape(expand(unsqueeze(x, 2)))``, which repeats every head several times."""
    reshape = producer(value, "Reshape")
    expand = producer(reshape.inputs[0], "Expand") if reshape is not None else None
    unsqueeze = producer(expand.inputs[0], "Unsqueeze") if expand is not None else None
    if expand is None or unsqueeze is None:
        return None
    axes = constant(unsqueeze.inputs[1]) if len(unsqueeze.inputs) > 1 else None
    source = unsqueeze.inputs[0]
    before, wide, after = dims(source), dims(expand.outputs[0]), dims(value)
    if axes is None or list(axes) not in ([2], [-3]):
        return None
    if before is None or wide is None or after is None:
        return None
    if (len(before), len(wide), len(after)) != (4, 5, 4):
        return None
    groups, times, heads, size = before[1], wide[2], after[1], before[3]
    known = None not in (groups, times, heads, size)
    whole = known and groups * times == heads and wide[1] == groups  # type: ignore[operator]  # known
    return source if whole and wide[4] == size == after[3] else None
