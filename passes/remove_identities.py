"""Remove nodes that only rename a value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
import onnx_ir.passes.common as common

from trivium.compiler.passing import Pass
from trivium.compiler.types import Preserves


@dataclass(frozen=True)
class RemoveIdentities(Pass):
    """Remove Identity nodes; names of graph outputs stay."""

    name: ClassVar[str] = "remove-identities"
    preserves: ClassVar[Preserves] = "exact"

    def run(self, model: ir.Model) -> bool:
        return common.IdentityEliminationPass()(model).modified
