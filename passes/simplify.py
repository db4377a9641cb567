"""The simplifications that feed one another, run until none finds anything left to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from trivium.compiler.passing import Pass
from trivium.compiler.types import Preserves
from trivium.passes.fill_shapes import FillShapes
from trivium.passes.fold_constants import FoldConstants
from trivium.passes.infer_shapes import InferShapes
from trivium.passes.lift_constants import LiftConstants
from trivium.passes.remove_dead_code import RemoveDeadCode
from trivium.passes.remove_identities import RemoveIdentities
from trivium.passes.remove_no_ops import RemoveNoOps
from trivium.passes.share_duplicates import ShareDuplicates
from trivium.passes.trace_dims import TraceDims
from trivium.passes.unflatten_softmax import UnflattenSoftmax
from trivium.passes.unflatten_transpose import UnflattenTranspose

ROUNDS = (
    LiftConstants(),
    RemoveIdentities(),
    InferShapes(),
    FoldConstants(),
    LiftConstants(),
    RemoveIdentities(),
    RemoveNoOps(),
    UnflattenSoftmax(),
    UnflattenTranspose(),
    FillShapes(),
    TraceDims(),
    RemoveDeadCode(),
    ShareDuplicates(),
)


@dataclass(frozen=True)
class Simplify(Pass):
    """Lift and fold constants, drop no-ops and dead code, share duplicates, infer shapes.

    A shape found lets arithmetic on shapes fold, which lets a Reshape's shape be found, and so on:
    the passes go round until a round changes nothing.
    """

    name: ClassVar[str] = "simplify"
    preserves: ClassVar[Preserves] = "numeric"

    def run(self, model: ir.Model) -> bool:
        modified = False
        # Each round folds at least one node; the bound is for rewrites that undo each other.
        for _ in range(50):
            changed = [one(model).modified for one in ROUNDS]
            modified |= any(changed)
            if not any(changed):
                break
        return modified
