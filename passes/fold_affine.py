"""Fold products with and sums of constants into the linear operator before them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from trivium.compiler.passing import NodePass, constant, decline, is_op
from trivium.compiler.types import Preserves
from trivium.passes.linear import can_shift, linear, per_channel, rescale


@dataclass(frozen=True)
class FoldAffine(NodePass):
    """Rewrite ``Conv(x) * s``, ``/ s``, ``+ t``, ``- t`` and ``t - Conv(x)`` to ``Conv(x)``.

    The same for ConvTranspose, Gemm and, where nothing is added, MatMul.

    Left alone: a constant that is not one number for each output channel, integers, and operators
    that something else reads.
    """

    name: ClassVar[str] = "fold-affine"
    preserves: ClassVar[Preserves] = "numeric"

    def rewrite(self, node: ir.Node) -> bool:
        if not is_op(node, "Mul", "Div", "Add", "Sub") or len(node.inputs) != 2:
            return False
        for index in (0, 1):
            array = constant(node.inputs[1 - index])
            if array is None or array.dtype.kind not in "fV":
                continue
            if index == 1 and node.op_type == "Div":
                continue
            before = linear(node.inputs[index])
            if before is None:
                continue
            additive = node.op_type in ("Add", "Sub")
            if additive and not can_shift(before):
                continue
            number = per_channel(before, array)
            if number is None:
                return decline(
                    node, f"its constant {list(array.shape)} is not one for each channel"
                )
            if node.op_type == "Mul":
                return rescale(before, node, number, None)
            if node.op_type == "Div":
                return (number != 0).all() and rescale(before, node, 1 / number, None)
            if node.op_type == "Add":
                return rescale(before, node, None, number)
            turned = index == 1
            return rescale(
                before, node, -1.0 + 0 * number if turned else None, number if turned else -number
            )
        return False
