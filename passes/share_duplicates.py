"""Compute and store equal things once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
import onnx_ir.passes.common as common

from trivium.compiler.passing import Pass
from trivium.compiler.types import Preserves


@dataclass(frozen=True)
class ShareDuplicates(Pass):
    """Merge equal initializers and equal subexpressions."""

    name: ClassVar[str] = "share-duplicates"
    preserves: ClassVar[Preserves] = "exact"

    def run(self, model: ir.Model) -> bool:
        modified = common.DeduplicateInitializersPass()(model).modified
        return common.CommonSubexpressionEliminationPass()(model).modified or modified
