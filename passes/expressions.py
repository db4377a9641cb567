"""Reading expressions the way their authors meant them: products and sums without regard to the
order, the nesting and the place of the constants in them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from trivium.compiler.passing import is_op, read_once, scalar


@dataclass
class Product:
    """``coefficient * factors[0] * factors[1] * ...``; ``nodes`` are the operators it took."""

    coefficient: float = 1.0
    factors: list[ir.Value] = field(default_factory=list)
    nodes: list[ir.Node] = field(default_factory=list)


def product(value: ir.Value | None) -> Product:
    """Flatten a tree of Mul, Div by a number and Neg, into values that something else reads too."""
    found = Product()
    _flatten(value, found, root=True)
    return found


def _flatten(value: ir.Value | None, found: Product, *, root: bool) -> None:
    if value is None:
        return
    number = scalar(value)
    if number is not None and (value.shape is None or len(value.shape) <= 1):
        found.coefficient *= number
        return
    node = value.producer()
    if node is None or not (root or read_once(value)):
        found.factors.append(value)
        return
    if is_op(node, "Mul"):
        found.nodes.append(node)
        for operand in node.inputs:
            _flatten(operand, found, root=False)
        return
    divisor = scalar(node.inputs[1]) if is_op(node, "Div") else None
    if divisor:
        found.nodes.append(node)
        found.coefficient /= divisor
        _flatten(node.inputs[0], found, root=False)
        return
    found.factors.append(value)


def plus_number(value: ir.Value | None) -> tuple[ir.Value, float] | None:
    """``x`` and ``c`` of ``x + c``."""
    node = value.producer() if value is not None else None
    if not is_op(node, "Add") or node is None:
        return None
    for index in (0, 1):
        number, other = scalar(node.inputs[index]), node.inputs[1 - index]
        if number is not None and other is not None:
            return other, number
    return None


def close(one: float, other: float) -> bool:
    """Whether a constant is the one meant, as exporters round it."""
    return abs(one - other) <= 1e-4 * abs(other)
