"""Fold ``MatMul(x, w) + b`` into one Gemm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from trivium.compiler.passing import NodePass, decline, dims, is_op, producer, read_once, splice
from trivium.compiler.types import Preserves


@dataclass(frozen=True)
class FuseBias(NodePass):
    """Rewrite ``Add(MatMul(x, w), b)`` to ``Gemm(x, w, b)`` where both operands have two axes.

    Left alone: a product that something else reads, since it must be computed anyway, and a bias
    that would widen the product, since Gemm cannot.
    """

    name: ClassVar[str] = "fuse-bias"
    preserves: ClassVar[Preserves] = "numeric"

    def rewrite(self, node: ir.Node) -> bool:
        if not is_op(node, "Add"):
            return False
        for index in (0, 1):
            matmul = producer(node.inputs[index], "MatMul")
            bias = node.inputs[1 - index]
            if matmul is None or bias is None or bias.producer() is matmul:
                continue
            left, right, added = dims(matmul.inputs[0]), dims(matmul.inputs[1]), dims(bias)
            if left is None or right is None or added is None or (len(left), len(right)) != (2, 2):
                continue
            if not read_once(matmul.outputs[0]):
                return decline(matmul.outputs[0], "something else reads the product")
            if not _fits(added, (left[0], right[1])):
                return decline(bias, f"a bias of {list(added)} would widen the product")
            splice([node, matmul], ir.node("Gemm", [*matmul.inputs, bias], name=node.name))
            return True
        return False


def _fits(bias: tuple[int | None, ...], product: tuple[int | None, int | None]) -> bool:
    if len(bias) > 2:
        return False
    return all(
        have == 1 or (have is not None and have == want)
        for have, want in zip(reversed(bias), reversed(product), strict=False)
    )
