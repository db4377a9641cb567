"""Which stored floats are weights to train, by what reads them.

A constant that some operator takes as a parameter is one; a table of rotations, a mask, the
statistics of a normalization or a bound to clip to is not, though a gradient reaches it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

SLOTS: dict[str, tuple[int, ...]] = {
    "BatchNormalization": (1, 2),
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "Einsum": (0, 1, 2),
    "GRU": (1, 2, 3),
    "Gather": (0,),
    "Gemm": (0, 1, 2),
    "GroupNormalization": (1, 2),
    "InstanceNormalization": (1, 2),
    "LSTM": (1, 2, 3, 7),
    "LayerNormalization": (1, 2),
    "MatMul": (0, 1),
    "PRelu": (1,),
    "RMSNormalization": (1,),
    "RNN": (1, 2, 3),
}
"""Operator -> the inputs that are parameters of it."""

_ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div"})
_FOLLOWED = frozenset({"Cast", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


def is_trainable(value: ir.Value, array: np.ndarray[Any, Any]) -> bool:
    """Whether a constant is a weight: everything that reads it takes it as a parameter."""
    if not np.isfinite(array.astype(np.float32)).all():
        return False
    uses = list(value.uses())
    return bool(uses) and all(_is_parameter(node, index, array) for node, index in uses)


def _is_parameter(node: ir.Node, index: int, array: np.ndarray[Any, Any]) -> bool:
    if node.domain != "":
        return False
    if node.op_type in _FOLLOWED and index == 0:
        return is_trainable(node.outputs[0], array)
    if node.op_type in _ELEMENTWISE:
        # A bias or a gain is a vector; what has more extent is a mask or a table of positions.
        return array.size > 1 and max(array.shape, default=1) == array.size
    return index in SLOTS.get(node.op_type, ())
