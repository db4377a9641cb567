"""Compute at compile time what depends on constants only."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from trivium.compiler.passing import Pass, option
from trivium.compiler.types import Preserves

_WITH_BODIES = frozenset({"If", "Loop", "Scan", "SequenceMap"})

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

        modified = False
        before = _state(model)
        branches = any(node.op_type in _WITH_BODIES for node in model.graph)
        # onnxscript goes through the nodes once; what a folded If leaves behind can fold again.
        # What it reports leaves out the shapes that it finds.
        for _ in range(50):
            fold_constants(
                model,
                input_size_limit=self.input_limit,
                output_size_limit=self.output_limit,
                should_fold=lambda node: False if node.op_type in _KEPT else None,
            )
            after = _state(model)
            if after == before:
                break
            modified, before = True, after
            if not branches:
                break
        return modified


def _state(model: ir.Model) -> Hashable:
    """What folding can change: nodes, what they read, and what is known of the values."""
    return tuple(
        (
            node.op_type,
            tuple(value.name if value is not None else None for value in node.inputs),
            tuple(node.attributes),
            tuple((value.name, str(value.shape), str(value.type)) for value in node.outputs),
        )
        for graph in model.graphs()
        for node in graph
    )
