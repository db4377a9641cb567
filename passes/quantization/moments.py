"""What the rounding of a weight should know of its inputs: their second moment, kept online.

For a product H = X'X; for a convolution X are the patches that its kernel sees, for each group its
own. The squared error of the outputs is then ``tr(D' H D)`` for an error D of the weight.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from trivium.compiler.passing import attribute, dims

Array = np.ndarray[Any, np.dtype[Any]]

_PATCHES = 1 << 22
"""Elements of patches laid out at a time."""


@dataclass
class Moment:
    """The sum of X'X over all samples.

    Attributes:
        total: [groups, K, K] in float32; None before the first sample.
        rows: How many rows X had.
    """

    total: Array | None = None
    rows: int = 0
    spoiled: bool = field(default=False)

    def update(self, node: ir.Node, array: Array) -> None:
        """Take in one batch of the input 0 of a MatMul, Gemm or Conv."""
        if not np.isfinite(array).all():
            self.spoiled = True
            return
        for part in patches(node, array):
            product = np.matmul(part.transpose(0, 2, 1), part)
            if self.total is None:
                self.total = product
            else:
                self.total += product
            self.rows += part.shape[1]

    @property
    def matrix(self) -> Array:
        """[K, K] for what has one group."""
        assert self.total is not None
        return np.asarray(self.total[0])


def patches(node: ir.Node, array: Array) -> Any:
    """The batch as [groups, rows, K], a part at a time."""
    array = array.astype(np.float32, copy=False)
    if node.op_type != "Conv":
        if node.op_type == "Gemm" and attribute(node, "transA", 0):
            array = array.T
        yield array.reshape(1, -1, array.shape[-1])
        return
    shape = [size or 1 for size in dims(node.inputs[1]) or ()]
    kernel = shape[2:]
    groups = int(attribute(node, "group", 1))
    strides = attribute(node, "strides", None) or [1] * len(kernel)
    dilations = attribute(node, "dilations", None) or [1] * len(kernel)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    pads = _pads(node, array.shape[2:], reach, strides)
    per_sample = max(1, array[0].size * int(np.prod(kernel)))
    step = max(1, _PATCHES // per_sample)
    axes = tuple(range(2, 2 + len(kernel)))
    for start in range(0, len(array), step):
        part = np.pad(array[start : start + step], [(0, 0), (0, 0), *pads])
        windows = np.lib.stride_tricks.sliding_window_view(part, reach, axis=axes)
        steps = [*strides, *dilations]
        windows = windows[(slice(None), slice(None), *(slice(None, None, s) for s in steps))]
        # [n, groups, channels, *places, *kernel] -> [groups, n * places, channels * kernel]
        count, channels = windows.shape[:2]
        split = windows.reshape(count, groups, channels // groups, *windows.shape[2:])
        places = list(range(3, 3 + len(kernel)))
        inner = list(range(3 + len(kernel), 3 + 2 * len(kernel)))
        laid = split.transpose(1, 0, *places, 2, *inner)
        yield laid.reshape(groups, -1, channels // groups * int(np.prod(kernel)))


def _pads(
    node: ir.Node, sizes: tuple[int, ...], reach: list[int], strides: list[int]
) -> list[tuple[int, int]]:
    automatic = attribute(node, "auto_pad", "NOTSET")
    if automatic in ("SAME_UPPER", "SAME_LOWER"):
        pads = []
        for size, window, stride in zip(sizes, reach, strides, strict=True):
            total = max(0, (-(-size // stride) - 1) * stride + window - size)
            small, large = total // 2, total - total // 2
            pads.append((small, large) if automatic == "SAME_UPPER" else (large, small))
        return pads
    given = attribute(node, "pads", None) if automatic == "NOTSET" else None
    given = given or [0] * (2 * len(reach))
    return list(zip(given[: len(reach)], given[len(reach) :], strict=True))
