"""Choosing a block size for each layer: the least time for the error of a reference size.

Large blocks are fast, because the time of a product follows the number of scales more than the
bytes; small ones are exact. A layer whose weights are alike takes large ones and leaves its share
of the error to those with outliers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from trivium.passes.quantization.blocks import Array, Form, nearest

REFERENCE = 64
"""The block size whose error, used everywhere, may not be exceeded."""

TIME = {32: 3.12, 64: 2.62, 128: 2.24, 256: 1.74}
"""Milliseconds of ONNX Runtime's MatMulNBits: 2048 by 5632, one row, one thread of a Zen 4."""


def error(matrix: Array, form: Form) -> float:
    """The squared error of round-to-nearest relative to the matrix."""
    whole = float(np.square(matrix, dtype=np.float64).sum())
    off = nearest(matrix, form).restored() - matrix
    return float(np.square(off, dtype=np.float64).sum()) / whole if whole else 0.0


def choose(errors: Sequence[Mapping[int, float]], elements: Sequence[int]) -> list[int]:
    """Return a block size for each layer.

    Args:
        errors: For each layer, its error with each block size.
        elements: How many weights it has.
    """
    largest = max(TIME)
    chosen = [largest] * len(errors)
    allowed = sum(one[REFERENCE] for one in errors)
    total = sum(one[largest] for one in errors)
    while total > allowed * (1 + 1e-9):
        # The step that takes most error for its time; each layer goes down its sizes in order.
        best, layer, size = 0.0, -1, 0
        for index, one in enumerate(errors):
            now = chosen[index]
            for smaller in (s for s in TIME if s < now):
                gain = one[now] - one[smaller]
                value = gain / ((TIME[smaller] - TIME[now]) * elements[index])
                if value > best:
                    best, layer, size = value, index, smaller
        if layer < 0:
            break
        total -= errors[layer][chosen[layer]] - errors[layer][size]
        chosen[layer] = size
    return chosen
