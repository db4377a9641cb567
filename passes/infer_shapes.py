"""Give every value the type and shape that inference can find."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
import onnx_ir.passes.common as common

from trivium.compiler.passing import Pass
from trivium.compiler.types import Preserves


@dataclass(frozen=True)
class InferShapes(Pass):
    """Run onnx's shape inference with data propagation, weights left aside."""

    name: ClassVar[str] = "infer-shapes"
    preserves: ClassVar[Preserves] = "exact"

    def run(self, model: ir.Model) -> bool:
        return common.ShapeInferencePass(strict_mode=False)(model).modified
