"""Remove what no output depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
import onnx_ir.passes.common as common

from trivium.compiler.passing import Pass
from trivium.compiler.types import Preserves


@dataclass(frozen=True)
class RemoveDeadCode(Pass):
    """Remove unread nodes, initializers, functions and opset imports."""

    name: ClassVar[str] = "remove-dead-code"
    preserves: ClassVar[Preserves] = "exact"

    def run(self, model: ir.Model) -> bool:
        modified = common.RemoveUnusedNodesPass()(model).modified
        modified |= common.RemoveUnusedFunctionsPass()(model).modified
        return common.RemoveUnusedOpsetsPass()(model).modified or modified
