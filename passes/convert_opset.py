"""Bring a model to the opset of normal form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from trivium.compiler.model import OPSET
from trivium.compiler.passing import Pass, option
from trivium.compiler.types import Preserves


@dataclass(frozen=True)
class ConvertOpset(Pass):
    """Convert the standard domain to opset 24 with onnx's version converter."""

    name: ClassVar[str] = "convert-opset"
    preserves: ClassVar[Preserves] = "exact"

    version: int = option(OPSET, "The opset to convert to")

    def run(self, model: ir.Model) -> bool:
        if model.opset_imports.get("", self.version) == self.version:
            return False
        from onnxscript.version_converter import ConvertVersionPass

        return bool(ConvertVersionPass(self.version, fallback=True)(model).modified)
