"""Drop operands of Concat that hold nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from trivium.compiler.passing import NodePass, attribute, dims, is_op
from trivium.compiler.types import Preserves


@dataclass(frozen=True)
class DropEmptyOperands(NodePass):
    """Remove inputs of ``Concat`` whose length along its axis is zero.

    Function bodies leave them behind (RotaryEmbedding's, which joins the rotated part of a head to
    an untouched part that is mostly absent), and schedulers divide by the length of a loop.

    Left alone: a Concat of nothing but empty tensors.
    """

    name: ClassVar[str] = "drop-empty-operands"
    preserves: ClassVar[Preserves] = "exact"

    def rewrite(self, node: ir.Node) -> bool:
        if not is_op(node, "Concat"):
            return False
        axis = attribute(node, "axis", 0)
        kept = [value for value in node.inputs if not _empty(value, axis)]
        if not kept or len(kept) == len(node.inputs):
            return False
        for index, value in enumerate(kept):
            node.replace_input_with(index, value)
        node.resize_inputs(len(kept))
        return True


def _empty(value: ir.Value | None, axis: int) -> bool:
    shape = dims(value)
    return shape is not None and len(shape) > 0 and shape[axis] == 0
