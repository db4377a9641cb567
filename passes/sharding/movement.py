"""Sharding rules of operators that move, merge, cut and pick, and compute nothing."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import onnx_ir as ir

from trivium.compiler.passing import attribute, constant, is_constant
from trivium.passes.sharding.axes import Axes, rank, size
from trivium.passes.sharding.table import (
    block_axes,
    broadcast,
    known_axes,
    operands,
    rule,
    tie_all_but,
)

Run = tuple[list[int], list[int]]
"""Axes of one shape and the axes of another that hold the same elements."""

Dims = Sequence[int | ir.SymbolicDim]


@rule("Concat")
def _concat(axes: Axes, node: ir.Node) -> None:
    y = node.outputs[0]
    for x in operands(node, len(node.inputs)):
        axis = attribute(node, "axis") % rank(x)
        tie_all_but(axes, x, y, [axis], "Concat joins along it")


@rule("Split")
def _split(axes: Axes, node: ir.Node) -> None:
    x = operands(node, 1)[0]
    for y in node.outputs:
        axis = attribute(node, "axis", 0) % rank(x)
        tie_all_but(axes, x, y, [axis], "Split cuts it elsewhere", whole_result=False)


@rule("Slice")
def _slice(axes: Axes, node: ir.Node) -> None:
    x, y = operands(node, 1)[0], node.outputs[0]
    cut = range(rank(x)) if len(node.inputs) < 4 else known_axes(axes, node, 3)
    if cut is not None:
        places = [axis % rank(x) for axis in cut]
        tie_all_but(axes, x, y, places, "Slice cuts it", whole_result=False)


@rule("Pad")
def _pad(axes: Axes, node: ir.Node) -> None:
    x, y = operands(node, 1)[0], node.outputs[0]
    widths = constant(node.inputs[1])
    named = node.inputs[3] if len(node.inputs) > 3 else None
    along = list(range(rank(x))) if named is None else known_axes(axes, node, 3)
    if along is None:
        return
    if widths is not None:
        # The widths before come first, then those after.
        before, after = widths.reshape(2, -1).tolist()
        pairs = zip(along, before, after, strict=True)
        along = [axis for axis, *widths_of in pairs if any(widths_of)]
    tie_all_but(axes, x, y, [axis % rank(x) for axis in along], "Pad makes it longer")


@rule("Transpose")
def _transpose(axes: Axes, node: ir.Node) -> None:
    x, y = operands(node, 1)[0], node.outputs[0]
    order = attribute(node, "perm", list(reversed(range(rank(x)))))
    for place, axis in enumerate(order):
        axes.tie((x, axis), (y, place))


@rule("Unsqueeze", "Squeeze")
def _squeeze(axes: Axes, node: ir.Node) -> None:
    x, y = operands(node, 1)[0], node.outputs[0]
    many, few = (y, x) if node.op_type == "Unsqueeze" else (x, y)
    operand = node.inputs[1] if len(node.inputs) > 1 else None
    if operand is None:
        gone: Sequence[int] | None = [a for a in range(rank(x)) if size((x, a)) == 1]
    else:
        gone = known_axes(axes, node, 1)
    if gone is None:
        return
    places = {axis % rank(many) for axis in gone}
    kept = [axis for axis in range(rank(many)) if axis not in places]
    for place, axis in enumerate(kept):
        axes.tie((few, place), (many, axis))


@rule("Expand")
def _expand(axes: Axes, node: ir.Node) -> None:
    broadcast(axes, operands(node, 1)[0], node.outputs[0])


@rule("Reshape", "Flatten")
def _reshape(axes: Axes, node: ir.Node) -> None:
    """Axes that are merged or divided split with the first factor, which moves slowest."""
    x, y = operands(node, 1)[0], node.outputs[0]
    for before, after in factors(x, y):
        whole = [axis for axis in before if size((x, axis)) != 1]
        parts = [axis for axis in after if size((y, axis)) != 1]
        if whole and parts:
            axes.tie((x, whole[0]), (y, parts[0]))
        block_axes(axes, x, whole[1:], f"{node.op_type} merges it with an axis before it")
        block_axes(axes, y, parts[1:], f"{node.op_type} makes it of the last part of an axis")


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
    (data, indices), y = operands(node, 2), node.outputs[0]
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
