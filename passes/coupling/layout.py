"""What operators tie together that move elements about without changing them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from trivium.compiler.passing import attribute, constant, dims, graph_of, initializer
from trivium.passes.coupling.elements import Elements, Kept
from trivium.passes.coupling.rules import align, enter, label, pin_all, rank

Dims = tuple[int | None, ...]


@enter("Transpose")
def transpose(node: ir.Node, e: Elements) -> None:
    x, y = node.inputs[0], node.outputs[0]
    perm = attribute(node, "perm") or tuple(reversed(range(rank(x))))
    for place, axis in enumerate(perm):
        e.same(x, axis, y, place)


@enter("Concat")
def concat(node: ir.Node, e: Elements) -> None:
    y = node.outputs[0]
    joined = int(attribute(node, "axis", 0)) % max(rank(y), 1)
    pieces = [e.of(value, joined) for value in node.inputs]
    whole = e.of(y, joined)
    for value in node.inputs:
        for axis in range(rank(value)):
            if axis != joined:
                e.same(value, axis, y, axis)
    if whole is None or any(piece is None for piece in pieces):
        for value in (*node.inputs, y):
            e.pin(value, f"{label(node)} joins it with what has no fixed length", [joined])
        return
    e.tie(np.concatenate([piece for piece in pieces if piece is not None]), whole)


@enter("Split")
def split(node: ir.Node, e: Elements) -> None:
    x = node.inputs[0]
    cut = int(attribute(node, "axis", 0)) % max(rank(x), 1)
    pieces = [e.of(value, cut) for value in node.outputs]
    whole = e.of(x, cut)
    for part in node.outputs:
        for axis in range(rank(part)):
            if axis != cut:
                e.same(x, axis, part, axis)
    if whole is None or any(piece is None for piece in pieces):
        for value in (x, *node.outputs):
            e.pin(value, f"{label(node)} cuts it where it has no fixed length", [cut])
        return
    e.tie(whole, np.concatenate([piece for piece in pieces if piece is not None]))

    def fix(kept: Kept) -> None:
        left = [int(kept(value, cut).sum()) for value in node.outputs]
        if all(kept(value, cut).all() for value in node.outputs):
            return
        sizes = initializer(graph_of(node), np.array(left, np.int64), f"{node.name}_sizes")
        node.attributes.pop("num_outputs", None)
        if len(node.inputs) < 2:
            node.resize_inputs(2)
        node.replace_input_with(1, sizes)

    e.fixes.append(fix)


@enter("Pad")
def pad(node: ir.Node, e: Elements) -> None:
    """Constant channels at either end are elements of the result like any other."""
    x, y = node.inputs[0], node.outputs[0]
    widths = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    asked = node.inputs[3] if len(node.inputs) > 3 else None
    chosen = np.arange(rank(x)) if asked is None else constant(asked)
    if widths is None or chosen is None:
        pin_all(node, e, "pads by what is not stored in the model")
        return
    axes = [int(axis) % rank(x) for axis in chosen]
    before = dict(zip(axes, widths[: len(axes)].tolist(), strict=True))
    after = dict(zip(axes, widths[len(axes) :].tolist(), strict=True))
    plain = attribute(node, "mode", "constant") == "constant"
    grown = {a for a in axes if before[a] > 0 or after[a] > 0}
    for axis in range(rank(x)):
        low, high = before.get(axis, 0), after.get(axis, 0)
        if not low and not high:
            e.same(x, axis, y, axis)
            continue
        inside = e.of(y, axis)
        if not plain or low < 0 or high < 0 or inside is None:
            for value in (x, y):
                e.pin(value, f"{label(node)} changes its length", [axis])
            continue
        e.tie(e.of(x, axis), inside[low : len(inside) - high])

    def fix(kept: Kept) -> None:
        changed = widths.copy()
        for axis in grown:
            left = kept(y, axis)
            place = axes.index(axis)
            changed[place] = left[: before[axis]].sum()
            changed[place + len(axes)] = left[len(left) - after[axis] :].sum()
        if (changed != widths).any():
            value = initializer(graph_of(node), changed, f"{node.name}_pads")
            node.replace_input_with(1, value)

    e.fixes.append(fix)


@enter("Slice")
def slice_(node: ir.Node, e: Elements) -> None:
    x, y = node.inputs[0], node.outputs[0]
    axes = constant(node.inputs[3]) if len(node.inputs) > 3 else None
    starts = constant(node.inputs[1])
    if axes is None and starts is not None and len(node.inputs) <= 3:
        axes = np.arange(starts.size)
    if axes is None:
        pin_all(node, e, "cuts by what is not stored in the model")
        return
    cut = {int(axis) % max(rank(x), 1) for axis in axes}
    for axis in range(rank(x)):
        if axis in cut:
            for value in (x, y):
                e.pin(value, f"{label(node)} takes a part of it", [axis])
        else:
            e.same(x, axis, y, axis)


@enter("Gather")
def gather(node: ir.Node, e: Elements) -> None:
    x, index = node.inputs[:2]
    y = node.outputs[0]
    if index is None or dims(index) is None or dims(x) is None:
        pin_all(node, e)
        return
    taken = int(attribute(node, "axis", 0)) % max(rank(x), 1)
    for value, axes in ((x, [taken]), (index, None)):
        e.pin(value, f"{label(node)} picks by place", axes)
    e.pin(y, f"{label(node)} picks by place", range(taken, taken + rank(index)))
    for axis in range(rank(x)):
        if axis != taken:
            e.same(x, axis, y, axis if axis < taken else axis + rank(index) - 1)


@enter("Squeeze", "Unsqueeze")
def squeeze(node: ir.Node, e: Elements) -> None:
    x, y = node.inputs[0], node.outputs[0]
    narrow, wide = (y, x) if node.op_type == "Squeeze" else (x, y)
    given = constant(node.inputs[1]) if len(node.inputs) > 1 else attribute(node, "axes")
    if given is None or dims(wide) is None:
        pin_all(node, e, "has axes that are not stored in the model")
        return
    ones = {int(axis) % rank(wide) for axis in np.asarray(given).reshape(-1)}
    left = [axis for axis in range(rank(wide)) if axis not in ones]
    for place, axis in enumerate(left):
        e.same(narrow, place, wide, axis)


@enter("Expand")
def expand(node: ir.Node, e: Elements) -> None:
    x, y = node.inputs[0], node.outputs[0]
    align(x, y, e, node)
    e.pin(y, f"{label(node)} asks for its shape")


@enter("Resize")
def resize(node: ir.Node, e: Elements) -> None:
    x, y = node.inputs[0], node.outputs[0]
    scales = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if scales is None or scales.size != rank(x):
        pin_all(node, e, "asks for a shape")
        return
    for axis in range(rank(x)):
        if scales[axis] == 1:
            e.same(x, axis, y, axis)
        else:
            for value in (x, y):
                e.pin(value, f"{label(node)} changes its length", [axis])


@enter("Shape")
def shape(node: ir.Node, e: Elements) -> None:
    """A length that is asked for is not changed, except where only others are looked at."""
    x, y = node.inputs[0], node.outputs[0]
    start = int(attribute(node, "start", 0))
    end = int(attribute(node, "end", rank(x)))
    axes = list(range(rank(x)))[start:end]
    readers = [(n, constant(n.inputs[1]) if n.op_type == "Gather" else None) for n, _ in y.uses()]
    if readers and all(index is not None for _, index in readers) and not y.is_graph_output():
        picked = {int(i) for _, index in readers if index is not None for i in index.reshape(-1)}
        axes = [axes[place] for place in picked]
    e.pin(x, f"{label(node)} asks for its length", axes)


@enter("Flatten")
def flatten(node: ir.Node, e: Elements) -> None:
    regroup(node, e, fixed=True)


@enter("Reshape")
def reshape(node: ir.Node, e: Elements) -> None:
    regroup(node, e, fixed=False)


def regroup(node: ir.Node, e: Elements, *, fixed: bool) -> None:
    """Tie axes that a reshape keeps, splits or merges; of several, the outermost is followed."""
    x, y = node.inputs[0], node.outputs[0]
    before, after = dims(x), dims(y)
    if x is None or before is None or after is None:
        pin_all(node, e, "has an unknown rank")
        return
    for mine, theirs in blocks(before, after):
        if not mine or not theirs:
            for value, axes in ((x, mine), (y, theirs)):
                e.pin(value, f"{label(node)} regroups it in a way that is not followed", axes)
        elif len(mine) == len(theirs) == 1:
            e.same(x, mine[0], y, theirs[0])
        elif len(theirs) == 1:
            _merge(e, node, x, mine, y, theirs[0])
        elif len(mine) == 1:
            _merge(e, node, y, theirs, x, mine[0])
        else:
            for value, axes in ((x, mine), (y, theirs)):
                e.pin(value, f"{label(node)} regroups it in a way that is not followed", axes)
    if not fixed:
        _target(node, e, x, y)


def _merge(
    e: Elements, node: ir.Node, parts: ir.Value, axes: Sequence[int], whole: ir.Value, axis: int
) -> None:
    """Axes of ``parts``, in row-major order, are one axis of ``whole``."""
    sizes = dims(parts) or ()
    wide = [a for a in axes if sizes[a] != 1]
    elements = e.of(whole, axis)
    if not wide or elements is None:
        return
    outer = e.of(parts, wide[0])
    assert outer is not None
    members = elements.reshape(len(outer), -1)
    for column in range(members.shape[1]):
        e.tie(outer, members[:, column])
    for a in axes:
        if a != wide[0]:
            e.pin(parts, f"{label(node)} folds it into another axis", [a])


def blocks(before: Dims, after: Dims) -> list[tuple[list[int], list[int]]]:
    """Axes before and after that hold the same elements, block by block.

    A block with one side empty is one that cannot be told; its axes are not to be changed. Axes of
    unknown length are in no block.
    """
    low = 0
    while low < min(len(before), len(after)) and before[low] == after[low]:
        low += 1
    high = 0
    while high < min(len(before), len(after)) - low and before[-1 - high] == after[-1 - high]:
        high += 1
    found = [([i], [i]) for i in range(low) if before[i] is not None]
    found += [
        ([len(before) - back], [len(after) - back])
        for back in range(1, high + 1)
        if before[-back] is not None
    ]
    mine = list(range(low, len(before) - high))
    theirs = list(range(low, len(after) - high))
    # What is unknown can only be told apart if it comes first: the rest is then whole rows.
    while mine and before[mine[0]] is None:
        mine.pop(0)
    while theirs and after[theirs[0]] is None:
        theirs.pop(0)
    return found + _middle(before, mine, after, theirs)


def _middle(
    before: Dims, mine: list[int], after: Dims, theirs: list[int]
) -> list[tuple[list[int], list[int]]]:
    sizes = [before[i] for i in mine], [after[i] for i in theirs]
    products = [_product(side) for side in sizes]
    if None in products or products[0] != products[1]:
        return [(mine, []), ([], theirs)]
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(mine) or j < len(theirs):
        left, right = [i], [j]
        have = before[mine[i]] if i < len(mine) else 1
        want = after[theirs[j]] if j < len(theirs) else 1
        i, j = i + 1, j + 1
        while have != want:
            assert have is not None
            assert want is not None
            if have < want:
                left.append(i)
                have *= before[mine[i]] or 1
                i += 1
            else:
                right.append(j)
                want *= after[theirs[j]] or 1
                j += 1
        found.append(
            (
                [mine[n] for n in left if n < len(mine)],
                [theirs[n] for n in right if n < len(theirs)],
            )
        )
    return [(a, b) for a, b in found if a and b]


def _product(sizes: Sequence[int | None]) -> int | None:
    total = 1
    for size in sizes:
        if size is None:
            return None
        total *= size
    return total


def _target(node: ir.Node, e: Elements, x: ir.Value, y: ir.Value) -> None:
    """Where the target shape says a length itself, it has to be told of the new one."""
    asked = node.inputs[1]
    assert asked is not None
    parts = _parts(asked)
    if parts is None or len(parts) != rank(y):
        for value in (x, y):
            e.pin(value, f"{label(node)} computes its target shape")
        return

    def fix(kept: Kept) -> None:
        new: list[Any] = []
        for axis, part in enumerate(parts):
            length = dims(y)
            if isinstance(part, int) and part > 0 and length and length[axis] is not None:
                part = int(kept(y, axis).sum())
            new.append(part)
        if new == parts:
            return
        graph = graph_of(node)
        if all(isinstance(part, int) for part in new):
            target = initializer(graph, np.array(new, np.int64), f"{node.name}_shape")
        else:
            values = [
                initializer(graph, np.array([part], np.int64), f"{node.name}_size")
                if isinstance(part, int)
                else part
                for part in new
            ]
            joined = ir.node("Concat", values, {"axis": 0}, name=f"{node.name}_target")
            joined.outputs[0].type = ir.TensorType(ir.DataType.INT64)
            joined.outputs[0].shape = ir.Shape([len(new)])
            joined.outputs[0].name = f"{node.name}_target_shape"
            graph.insert_before(node, [joined])
            target = joined.outputs[0]
        node.replace_input_with(1, target)

    e.fixes.append(fix)


def _parts(asked: ir.Value) -> list[int | ir.Value] | None:
    """A target shape length by length: numbers where they are stored, else what computes them."""
    array = constant(asked)
    if array is not None:
        return [int(size) for size in array.reshape(-1)]
    maker = asked.producer()
    if maker is None or maker.op_type != "Concat":
        return None
    parts: list[int | ir.Value] = []
    for value in maker.inputs:
        array, size = constant(value), dims(value)
        if array is not None:
            parts += [int(item) for item in array.reshape(-1)]
        elif value is not None and size == (1,):
            parts.append(value)
        else:
            return None
    return parts
