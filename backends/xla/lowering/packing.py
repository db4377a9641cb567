"""Weights as XLA's CPU reads them, transposed once when they are loaded instead of in every call.

Its products and convolutions take weights with the outputs last, and a weight that is an argument
in ONNX's order would be copied into that order by each run: of a ResNet-50 call that is a fifth, of
a small network a third.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from trivium.backends.xla.lowering.lazy import jnp

Order = tuple[int, ...]
"""A permutation of axes, as ``transpose`` takes it."""


def orders_of(named: Mapping[str, ir.Value]) -> dict[str, Order]:
    """Return the order of axes that each weight is to be handed over in, by name.

    Left out: what already lies that way, and what something else reads too.
    """
    found = {}
    for name, value in named.items():
        tensor = value.const_value
        rank = 0 if tensor is None else len(tensor.shape)
        if rank >= 2 and _outputs_first(value):
            found[name] = (*range(2, rank), 1, 0)
    return found


def packed(array: np.ndarray[Any, Any], order: Sequence[int] | None) -> np.ndarray[Any, Any]:
    """A weight of the model in the order that a program takes it in; None is the model's own."""
    return array if order is None else np.ascontiguousarray(array.transpose(order))


def unpacked(array: Any, order: Order | None) -> Any:
    """A weight in the model's order again; XLA folds this into what it does next."""
    if order is None:
        return array
    return jnp.transpose(array, [order.index(axis) for axis in range(len(order))])


def _outputs_first(value: ir.Value) -> bool:
    """Whether all that reads a value takes it, or what is dequantized from it, as weights with
    the outputs first and the inputs second.
    """
    uses = value.uses()
    if not uses or value.is_graph_output():
        return False
    return all(_reads_outputs_first(node, slot) for node, slot in uses)


def _reads_outputs_first(node: ir.Node, slot: int) -> bool:
    if node.domain != "":
        return False
    if node.op_type == "DequantizeLinear":
        return slot == 0 and _outputs_first(node.outputs[0])
    if node.op_type == "Gemm":
        return slot == 1 and bool(node.attributes.get_int("transB", 0))
    return node.op_type == "Conv" and slot == 1
