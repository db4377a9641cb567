"""GPTQ (Frantar et al., 2022): round one row after another, and let the rest make up for it.

The error of a product is ``tr(D' H D)``, where D is the error of its [K, N] weight and H = X'X the
second moment of its inputs. Rows are rounded in the order of their weight in H; what a row loses is
taken over by those that are left, as far as H says that they see the same inputs.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from trivium.passes.quantization import blocks, linear
from trivium.passes.quantization.blocks import Blocks, Form

Array = np.ndarray[Any, np.dtype[Any]]

_STEP = 128
"""Rows after which the update of all later rows is made up at once."""


def quantize(matrix: Array, form: Form, moment: Array, *, damping: float = 0.01) -> Blocks:
    """Quantize a [K, N] matrix for inputs of a given second moment.

    Args:
        matrix: The weight.
        form: How it is stored. The grids of all blocks are fitted first, so that the order of the
            rows is free.
        moment: [K, K], of the inputs.
        damping: Of the mean of the moment's diagonal, added to it: moments of few samples are
            singular.
    """
    rows = len(matrix)
    diagonal = np.diag(moment).copy()
    made = blocks.searched(matrix, form, np.maximum(diagonal, 1e-12 * diagonal.max(initial=1.0)))
    order = np.argsort(-diagonal, kind="stable")
    factor = inverse_factor(moment[np.ix_(order, order)], damping)
    left = matrix[order].astype(np.float32)
    block_of = order // form.block_size
    for start in range(0, rows, _STEP):
        end = min(start + _STEP, rows)
        losses = np.empty((end - start, left.shape[1]), np.float32)
        for i in range(start, end):
            scale, zero = made.scales[block_of[i]], made.zeros[block_of[i]]
            codes = linear.quantize(left[i], scale, zero, form.codes)
            made.codes[order[i]] = codes
            loss = (left[i] - linear.dequantize(codes, scale, zero)) / factor[i, i]
            left[i + 1 : end] -= factor[i, i + 1 : end, None] * loss
            losses[i - start] = loss
        left[end:] -= factor[start:end, end:].T @ losses
    return made


def inverse_factor(moment: Array, damping: float) -> Array:
    """The upper Cholesky factor of the inverse of a moment, damped until it has one.

    With rows and columns reversed, the moment's own lower factor is the inverse of what is wanted:
    one factorization does, and a triangle is inverted where it lies.
    """
    matrix = np.array(moment[::-1, ::-1], np.float64, order="C")
    diagonal = np.einsum("ii->i", matrix)
    mean = float(diagonal.mean()) or 1.0
    # An input that is never used has no say; its row is rounded as it is.
    diagonal[diagonal == 0] = mean
    for _ in range(8):
        diagonal += damping * mean
        try:
            lower = np.linalg.cholesky(matrix)
        except np.linalg.LinAlgError:
            damping *= 10
            continue
        del matrix, diagonal
        _invert(lower)
        return np.ascontiguousarray(lower[::-1, ::-1], np.float32)
    return np.eye(len(moment), dtype=np.float32)


def _invert(lower: Array) -> None:
    """Invert a lower triangular matrix in place, some rows at a time."""
    for start in range(0, len(lower), _STEP):
        end = min(start + _STEP, len(lower))
        own = np.linalg.inv(lower[start:end, start:end])
        lower[start:end, :start] = -own @ (lower[start:end, :start] @ lower[:start, :start])
        lower[start:end, start:end] = np.tril(own)
