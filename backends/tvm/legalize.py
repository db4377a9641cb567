"""Normal form -> what TVM's ONNX importer takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from trivium.backends.tvm.operators import wants_opening
from trivium.passes.decompose_functions import DecomposeFunctions


def passes() -> Sequence[ir.passes.PassBase]:
    """The passes of the backend, in order."""
    from onnx_ir.passes.common import (
        LiftConstantsToInitializersPass,
        RemoveInitializersFromInputsPass,
    )

    from trivium.passes.drop_empty_operands import DropEmptyOperands
    from trivium.passes.fold_constants import FoldConstants
    from trivium.passes.infer_shapes import InferShapes
    from trivium.passes.remove_dead_code import RemoveDeadCode

    return (
        RemoveInitializersFromInputsPass(),
        OpenUnsupported(),
        FoldConstants(),
        # The importer reads no Constant whose value is a list.
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        InferShapes(),
        DropEmptyOperands(),
        RemoveDeadCode(),
    )


@dataclass(frozen=True)
class OpenUnsupported(DecomposeFunctions):
    """Open what the importer has no converter for, or not in the form at hand."""

    name: ClassVar[str] = "tvm-open-unsupported"

    def wants(self, node: ir.Node) -> bool:
        return wants_opening(node)
