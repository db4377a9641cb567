"""Compute at compile time what depends on constants only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from trivium.compiler.passing import Pass, option
from trivium.compiler.types import Preserves

_KEPT = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})
"""Quantization is part of normal form: folding it would undo it."""


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Fold constant subgraphs and shape arithmetic.

    Left alone: results larger than ``output_limit`` bytes, which would cost more to store than to
    compute; what reads weights larger than ``input_limit``; quantization of weights.
    """

    name: ClassVar[str] = "fold-constants"
    preserves: ClassVar[Preserves] = "numeric"

    input_limit: int = option(1 << 16, "Largest input, in bytes, that is folded")
    output_limit: int = option(1 << 20, "Largest result, in bytes, that is stored")

    def run(self, model: ir.Model) -> bool:
        from onnxscript.optimizer import fold_constants

        result = fold_constants(
            model,
            input_size_limit=self.input_limit,
            output_size_limit=self.output_limit,
            should_fold=lambda node: False if node.op_type in _KEPT else None,
        )
        return bool(result.modified)
