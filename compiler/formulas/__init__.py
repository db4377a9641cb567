"""The work of every operator, one file for each group; importing this fills `FORMULAS`."""

from __future__ import annotations

from trivium.compiler.formulas import (
    dense,
    elementwise,
    microsoft,
    movement,
    reductions,
    special,
)

__all__ = ["dense", "elementwise", "microsoft", "movement", "reductions", "special"]
