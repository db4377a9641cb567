"""Undo the reshapes that a conversion from old opsets puts around Softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from trivium.compiler.passing import NodePass, attribute, dims, is_op, producer, read_once, splice
from trivium.compiler.types import Preserves


@dataclass(frozen=True)
class UnflattenSoftmax(NodePass):
    """Rewrite ``reshape(softmax(flatten(x)), shape(x))`` over the last axis to ``softmax(x)``.

    Before opset 13 Softmax took its input for a matrix. Left alone: a Softmax over several axes at
    once, which has no other spelling.
    """

    name: ClassVar[str] = "unflatten-softmax"
    preserves: ClassVar[Preserves] = "numeric"

    def rewrite(self, node: ir.Node) -> bool:
        softmax = (
            producer(node.inputs[0], "Softmax", "LogSoftmax", "Hardmax")
            if is_op(node, "Reshape")
            else None
        )
        flat = producer(softmax.inputs[0], "Flatten", "Reshape") if softmax is not None else None
        if softmax is None or flat is None or not read_once(softmax.outputs[0]):
            return False
        x = flat.inputs[0]
        known = dims(x)
        if x is None or known is None or attribute(softmax, "axis", -1) not in (-1, 1):
            return False
        if not _keeps_rows(flat, known) or not _restores(node, x):
            return False
        splice([node, softmax, flat], ir.node(softmax.op_type, [x], {"axis": -1}, name=node.name))
        return True


def _keeps_rows(flat: ir.Node, known: tuple[int | None, ...]) -> bool:
    """Whether the rows of the matrix are the last axis of its source."""
    if is_op(flat, "Flatten"):
        return int(attribute(flat, "axis", 1)) % len(known) == len(known) - 1
    matrix = dims(flat.outputs[0])
    return matrix is not None and len(matrix) == 2 and matrix[1] == known[-1] is not None


def _restores(node: ir.Node, x: ir.Value) -> bool:
    shape = producer(node.inputs[1], "Shape")
    if shape is not None and shape.inputs[0] is x and not shape.attributes:
        return True
    before, after = dims(x), dims(node.outputs[0])
    return (
        before is not None
        and after is not None
        and len(before) == len(after)
        and sum(a != b or a is None for a, b in zip(before, after, strict=True)) <= 1
    )
