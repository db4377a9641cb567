"""Put activations back together that exporters took apart."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from trivium.compiler.passing import NodePass, attribute, is_op, producer, scalar, splice
from trivium.compiler.types import Preserves
from trivium.passes.expressions import Product, close, plus_number, product

Maker = Callable[[ir.Value, ir.Value, float], "ir.Node | None"]
_FORMS: list[Maker] = []


def _form(maker: Maker) -> Maker:
    _FORMS.append(maker)
    return maker


@dataclass(frozen=True)
class RecognizeActivations(NodePass):
    """Rewrite ``0.5 x (1 + erf(x / sqrt 2))`` and its like to Gelu, Swish, HardSwish and Mish.

    The order and nesting of the products and the place of the constants do not matter.

    Left alone: products with further factors, and constants that are not those of the activation.
    """

    name: ClassVar[str] = "recognize-activations"
    preserves: ClassVar[Preserves] = "numeric"

    def rewrite(self, node: ir.Node) -> bool:
        if not is_op(node, "Mul", "Div") or _is_inner(node):
            return False
        found = product(node.outputs[0])
        made = _match(found)
        if made is None:
            return False
        made.name = node.name
        splice([node], made)
        return True


def _is_inner(node: ir.Node) -> bool:
    """Whether a larger product takes this one in; that one is looked at as a whole."""
    result = node.outputs[0]
    if result.is_graph_output() or len(result.uses()) != 1:
        return False
    reader, index = next(iter(result.uses()))
    return is_op(reader, "Mul") or (is_op(reader, "Div") and index == 0)


def _match(found: Product) -> ir.Node | None:
    if len(found.factors) != 2:
        return None
    for x, gate in (found.factors, reversed(found.factors)):
        for form in _FORMS:
            made = form(x, gate, found.coefficient)
            if made is not None:
                return made
    return None


@_form
def _gelu_erf(x: ir.Value, gate: ir.Value, coefficient: float) -> ir.Node | None:
    """``0.5 * x * (1 + erf(x / sqrt 2))``"""
    added = plus_number(gate)
    erf = producer(added[0], "Erf") if added is not None and added[1] == 1 else None
    if erf is None or not close(coefficient, 0.5):
        return None
    inner = product(erf.inputs[0])
    if inner.factors != [x] or not close(inner.coefficient, math.sqrt(0.5)):
        return None
    return ir.node("Gelu", [x], {"approximate": "none"})


@_form
def _gelu_tanh(x: ir.Value, gate: ir.Value, coefficient: float) -> ir.Node | None:
    """``0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))``"""
    added = plus_number(gate)
    tanh = producer(added[0], "Tanh") if added is not None and added[1] == 1 else None
    if tanh is None or not close(coefficient, 0.5):
        return None
    inner = product(tanh.inputs[0])
    if not close(inner.coefficient, math.sqrt(2 / math.pi)):
        return None
    if len(inner.factors) == 1:
        matches = _is_cubic(inner.factors[0], x)
    else:
        matches = any(
            factor is x and _is_one_plus_square(other, x)
            for factor, other in (inner.factors, reversed(inner.factors))
        )
    return ir.node("Gelu", [x], {"approximate": "tanh"}) if matches else None


_CUBIC = 0.044715


def _is_cubic(value: ir.Value, x: ir.Value) -> bool:
    """``x + 0.044715 x^3``"""
    node = producer(value, "Add")
    if node is None:
        return False
    for index in (0, 1):
        if node.inputs[index] is x:
            term = product(node.inputs[1 - index])
            return close(term.coefficient, _CUBIC) and _power(term.factors, x) == 3
    return False


def _is_one_plus_square(value: ir.Value, x: ir.Value) -> bool:
    """``1 + 0.044715 x^2``"""
    added = plus_number(value)
    if added is None or added[1] != 1:
        return False
    term = product(added[0])
    return close(term.coefficient, _CUBIC) and _power(term.factors, x) == 2


def _power(factors: list[ir.Value], x: ir.Value) -> int | None:
    """The power of ``x`` that factors multiply to, or None if anything else is among them."""
    total = 0
    for factor in factors:
        if factor is x:
            total += 1
            continue
        power = producer(factor, "Pow")
        if power is not None and power.inputs[0] is x:
            exponent = scalar(power.inputs[1])
        else:
            square = producer(factor, "Mul")
            same = square is not None and list(square.inputs) == [x, x]
            exponent = 2.0 if same else None
        if exponent not in (2.0, 3.0):
            return None
        total += int(exponent)
    return total


@_form
def _swish(x: ir.Value, gate: ir.Value, coefficient: float) -> ir.Node | None:
    """``x * sigmoid(alpha x)``"""
    sigmoid = producer(gate, "Sigmoid")
    if sigmoid is None or coefficient != 1:
        return None
    if sigmoid.inputs[0] is x:
        return ir.node("Swish", [x], {"alpha": 1.0})
    inner = product(sigmoid.inputs[0])
    if inner.factors != [x]:
        return None
    return ir.node("Swish", [x], {"alpha": inner.coefficient})


@_form
def _hard_swish(x: ir.Value, gate: ir.Value, coefficient: float) -> ir.Node | None:
    """``x * hardsigmoid(x)`` or ``x * clip(x + 3, 0, 6) / 6``"""
    sigmoid = producer(gate, "HardSigmoid")
    if sigmoid is not None:
        alpha, beta = attribute(sigmoid, "alpha", 0.2), attribute(sigmoid, "beta", 0.5)
        right = close(alpha, 1 / 6) and close(beta, 0.5) and coefficient == 1
        return ir.node("HardSwish", [x]) if right and sigmoid.inputs[0] is x else None
    clip = producer(gate, "Clip")
    added = plus_number(clip.inputs[0]) if clip is not None else None
    if clip is None or added is None or added[0] is not x or not close(added[1], 3):
        return None
    bounds = [scalar(value) for value in clip.inputs[1:3]]
    right = bounds == [0.0, 6.0] and close(coefficient, 1 / 6)
    return ir.node("HardSwish", [x]) if right else None


@_form
def _mish(x: ir.Value, gate: ir.Value, coefficient: float) -> ir.Node | None:
    """``x * tanh(softplus(x))``"""
    tanh = producer(gate, "Tanh")
    softplus = producer(tanh.inputs[0], "Softplus") if tanh is not None else None
    if softplus is None or softplus.inputs[0] is not x or coefficient != 1:
        return None
    return ir.node("Mish", [x])
