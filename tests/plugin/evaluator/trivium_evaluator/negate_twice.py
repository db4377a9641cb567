"""Remove ``Neg(Neg(x))``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from trivium.compiler.passing import NodePass, producer, replace
from trivium.compiler.types import Preserves


@dataclass(frozen=True)
class NegateTwice(NodePass):
    """Replace ``Neg(Neg(x))`` by ``x``."""

    name: ClassVar[str] = "negate-twice"
    preserves: ClassVar[Preserves] = "exact"

    def rewrite(self, node: ir.Node) -> bool:
        inner = producer(node.inputs[0], "Neg") if node.op_type == "Neg" else None
        if inner is None or inner.inputs[0] is None or not node.outputs[0].uses():
            return False
        replace(node.outputs[0], inner.inputs[0])
        return True
