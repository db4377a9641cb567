"""Settle what a dimension of -1 stands for in the shapes that torch's exporter computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from trivium.compiler.passing import (
    NodePass,
    attribute,
    constant,
    graph_of,
    initializer,
    is_op,
    producer,
    splice,
)
from trivium.compiler.types import Preserves


@dataclass(frozen=True)
class FillShapes(NodePass):
    """Rewrite ``where(shape == -1, 1, shape)``, whose parts are known, to the shape itself.

    It is how ``expand(-1, n)`` is exported: -1 keeps what is there, as 1 does for Expand.
    Left alone: a shape of which a part is neither a constant nor a dimension of something.
    """

    name: ClassVar[str] = "fill-shapes"
    preserves: ClassVar[Preserves] = "exact"

    def rewrite(self, node: ir.Node) -> bool:
        equal = producer(node.inputs[0], "Equal") if is_op(node, "Where") else None
        parts = producer(node.inputs[2], "Concat") if equal is not None else None
        if equal is None or parts is None or node.inputs[2] not in equal.inputs:
            return False
        marker = equal.inputs[1 - list(equal.inputs).index(node.inputs[2])]
        if _filler(marker) != -1 or _filler(node.inputs[1]) != 1:
            return False
        sizes = [_size(part) for part in parts.inputs]
        if any(size is None for size in sizes):
            return False
        graph = graph_of(node)
        filled: list[ir.Value | None] = []
        for part, size in zip(parts.inputs, sizes, strict=True):
            if isinstance(size, np.ndarray) and (size == -1).any():
                ones = np.where(size == -1, 1, size)
                part = initializer(graph, ones, f"{node.outputs[0].name}_part")
            filled.append(part)
        splice([node], ir.node("Concat", filled, {"axis": 0}, name=node.name))
        return True


def _filler(value: ir.Value | None) -> int | None:
    """The one integer that a vector is made of."""
    array = constant(value)
    if array is not None:
        return int(array.flat[0]) if array.size and (array == array.flat[0]).all() else None
    filled = producer(value, "ConstantOfShape")
    if filled is not None:
        tensor = attribute(filled, "value", None)
        return 0 if tensor is None else int(tensor.numpy().reshape(-1)[0])
    product = producer(value, "Mul")
    if product is None:
        return None
    factors = [_filler(factor) for factor in product.inputs]
    return None if None in factors else int(np.prod([f for f in factors if f is not None]))


def _size(value: ir.Value | None) -> np.ndarray[tuple[int], np.dtype[np.int64]] | bool | None:
    """A constant part of a shape; True for one that is a dimension, and so not negative."""
    array = constant(value)
    if array is not None:
        return array.astype(np.int64)
    while (node := producer(value, "Unsqueeze", "Squeeze", "Cast", "Gather", "Slice")) is not None:
        value = node.inputs[0]
    return True if producer(value, "Shape") is not None else None
