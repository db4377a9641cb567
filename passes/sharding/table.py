"""The table of sharding rules, from an operator to what it ties, sums over and needs whole, and
the words that rules are written in. The rules are in a file for each group of operators (`rules`
has all of them). An operator without one is not understood, and needs whole all that it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from trivium.compiler.passing import constant, entering
from trivium.passes.sharding.axes import Axes, Axis, rank, size, values_of

Rule = Callable[[Axes, ir.Node], None]

RULES: dict[str, Rule] = {}
"""Operator of the standard domain -> its rule."""


rule = entering(RULES)
"""Register a rule for operators."""


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


def broadcast(axes: Axes, value: ir.Value, result: ir.Value, keep: int = 0) -> None:
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


def operands(node: ir.Node, count: int) -> list[ir.Value]:
    """The first operands of a node, which are there."""
    found = [value for value in node.inputs[:count] if value is not None]
    assert len(found) == count
    return found


def known_axes(axes: Axes, node: ir.Node, index: int) -> list[int] | None:
    """The axes that an operand names; all of the first operand is blocked where it is computed."""
    array = constant(node.inputs[index])
    if array is not None:
        return [int(axis) for axis in array.ravel()]
    x = operands(node, 1)[0]
    block_axes(axes, x, range(rank(x)), f"{node.op_type} computes which axes it works on")
    return None


def block_axes(axes: Axes, value: ir.Value, places: Sequence[int], reason: str) -> None:
    """Say that a node needs some axes of a value whole."""
    for axis in places:
        axes.block((value, axis), reason)


def tie_unless_one(axes: Axes, one: Axis, other: Axis) -> None:
    """Tie an axis to another, unless it has one entry for all of that."""
    if size(one) != 1:
        axes.tie(one, other)


def tie_all_but(
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
