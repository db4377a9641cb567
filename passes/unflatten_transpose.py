"""Undo the reshapes that torch's exporter puts around a Transpose of two axes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from trivium.compiler.passing import NodePass, attribute, is_op, producer, read_once, splice
from trivium.compiler.types import Preserves


@dataclass(frozen=True)
class UnflattenTranspose(NodePass):
    """Rewrite ``reshape(transpose(reshape(x, [-1, m, n]), [0, 2, 1]), [..., n, m])`` to one
    Transpose of the last two axes of ``x``.

    Left alone: reshapes that are not known to keep the last two axes.
    """

    name: ClassVar[str] = "unflatten-transpose"
    preserves: ClassVar[Preserves] = "exact"

    def rewrite(self, node: ir.Node) -> bool:
        turned = producer(node.inputs[0], "Transpose") if is_op(node, "Reshape") else None
        if turned is None or list(attribute(turned, "perm", ())) != [0, 2, 1]:
            return False
        flat = producer(turned.inputs[0], "Reshape")
        x = flat.inputs[0] if flat is not None else None
        if flat is None or x is None or not read_once(turned.outputs[0]):
            return False
        before, middle, after = x.shape, flat.outputs[0].shape, node.outputs[0].shape
        if before is None or middle is None or after is None:
            return False
        rank = len(before)
        if rank < 3 or len(after) != rank or len(middle) != 3:
            return False
        turned_back = [*before[:-2], before[-1], before[-2]]
        same = zip([*middle[1:], *after], [*before[-2:], *turned_back], strict=True)
        if not all(_known_equal(one, other) for one, other in same):
            return False
        perm = [*range(rank - 2), rank - 1, rank - 2]
        made = ir.node("Transpose", [x], {"perm": perm}, name=node.name)
        splice([node, turned], made)
        return True


def _known_equal(one: int | ir.SymbolicDim, other: int | ir.SymbolicDim) -> bool:
    return one == other and not (isinstance(one, ir.SymbolicDim) and one.value is None)
