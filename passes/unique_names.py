"""Give every value and node a name of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
import onnx_ir.passes.common as common

from trivium.compiler.passing import Pass
from trivium.compiler.types import Preserves


@dataclass(frozen=True)
class UniqueNames(Pass):
    """Name what is unnamed, rename what clashes; inputs and outputs keep theirs."""

    name: ClassVar[str] = "unique-names"
    preserves: ClassVar[Preserves] = "exact"

    def run(self, model: ir.Model) -> bool:
        return common.NameFixPass()(model).modified
