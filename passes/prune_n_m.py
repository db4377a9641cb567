"""Keep n of every m neighbouring weights: the pattern of sparse tensor cores (2:4)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from trivium.compiler.passing import Pass, changed, decline, option, sketching, weight
from trivium.compiler.types import Preserves
from trivium.passes.pruning import summed_axis, weights
from trivium.passes.quantization import layers

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class PruneNM(Pass):
    """Of every ``m`` weights that one product sums, keep the ``n`` of largest magnitude.

    Groups lie along the axis that is summed over (K of a product, input channels of a
    convolution), where NVIDIA's sparse tensor cores want them.

    Left alone: an incomplete last group, weights with fewer than ``m`` values along that axis,
    biases, embeddings, weights below ``min_elements``, weights with NaN or infinity.
    """

    name: ClassVar[str] = "prune-n-m"
    preserves: ClassVar[Preserves] = "lossy"

    n: int = option(2, "Weights kept of each group")
    m: int = option(4, "Weights in a group")
    min_elements: int = option(256, "Weights with fewer elements stay as they are")
    exclude: tuple[str, ...] = option((), layers.EXCLUDE)

    def __post_init__(self) -> None:
        if not 0 < self.n <= self.m:
            raise ValueError(f"{self.n}:{self.m} keeps nothing or more than there is")

    def run(self, model: ir.Model) -> bool:
        if sketching():
            return False  # zeros change no form
        modified = False
        for value, node in weights(model, self.exclude, self.min_elements):
            array = weight(value)
            assert array is not None
            assert value.const_value is not None
            axis = summed_axis(node, array.ndim)
            length = array.shape[axis]
            if length < self.m:
                decline(value, f"{length} values along the summed axis make no group of {self.m}")
                continue
            if length % self.m:
                decline(value, f"the last {length % self.m} of {length} values make no whole group")
            if (self._prune(array, axis) != array).any():
                value.const_value = changed(value.const_value, partial(self._prune, axis=axis))
                modified = True
        return modified

    def _prune(self, array: Array, axis: int) -> Array:
        last = np.moveaxis(array.copy(), axis, -1)
        whole = last.shape[-1] // self.m * self.m
        groups = np.ascontiguousarray(last[..., :whole]).reshape(-1, self.m)
        order = np.argsort(-np.abs(groups), axis=1, kind="stable")
        np.put_along_axis(groups, order[:, self.n :], 0, axis=1)
        last[..., :whole] = groups.reshape(last[..., :whole].shape)
        return np.ascontiguousarray(np.moveaxis(last, -1, axis))
