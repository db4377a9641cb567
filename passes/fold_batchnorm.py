"""Fold BatchNormalization into the Conv, ConvTranspose or Gemm before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from trivium.compiler.passing import NodePass, attribute, constant, is_op, unread
from trivium.compiler.types import Preserves
from trivium.passes.linear import can_shift, linear, rescale


@dataclass(frozen=True)
class FoldBatchNorm(NodePass):
    """Rewrite ``BatchNormalization(Conv(x))`` to ``Conv(x)`` with other weights.

    Left alone: training mode, a convolution that something else reads, statistics that are not
    constants, and a MatMul, which has no bias.
    """

    name: ClassVar[str] = "fold-batchnorm"
    preserves: ClassVar[Preserves] = "numeric"

    def rewrite(self, node: ir.Node) -> bool:
        if not is_op(node, "BatchNormalization") or attribute(node, "training_mode", 0):
            return False
        if not all(unread(value) for value in node.outputs[1:]):
            return False
        before = linear(node.inputs[0])
        if before is None or not can_shift(before):
            return False
        arrays = [constant(value) for value in node.inputs[1:5]]
        gamma, beta, mean, variance = (
            array.astype(np.float64) if array is not None else None for array in arrays
        )
        if gamma is None or beta is None or mean is None or variance is None:
            return False
        scale = gamma / np.sqrt(variance + float(attribute(node, "epsilon", 1e-5)))
        return rescale(before, node, scale, beta - mean * scale)
