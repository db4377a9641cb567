"""Set the weights of least magnitude to zero."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from trivium.compiler.passing import Pass, changed, option, sketching, weight
from trivium.compiler.types import Preserves
from trivium.passes.pruning import weights
from trivium.passes.quantization import layers

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class PruneMagnitude(Pass):
    """Zero a share of the weights, those nearest to zero, in place.

    With ``scope`` layer every weight loses the same share; with global one threshold holds for
    all, so that layers with small weights lose more. The graph keeps its form: what gains from
    zeros is compression, and engines with sparse kernels.

    Left alone: biases, embeddings, weights below ``min_elements``, weights with NaN or infinity.
    """

    name: ClassVar[str] = "prune-magnitude"
    preserves: ClassVar[Preserves] = "lossy"

    sparsity: float = option(0.5, "Share of the weights to set to zero, 0 to 1")
    scope: str = option(
        "layer", "Whether the share holds for each layer or over all", choices=("layer", "global")
    )
    min_elements: int = option(256, "Weights with fewer elements stay as they are")
    exclude: tuple[str, ...] = option((), layers.EXCLUDE)

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity <= 1:
            raise ValueError(f"sparsity is {self.sparsity:g}: give a share from 0 to 1")

    def run(self, model: ir.Model) -> bool:
        if sketching():
            return False  # zeros change no form
        chosen = [value for value, _ in weights(model, self.exclude, self.min_elements)]
        threshold = global_threshold(chosen, self.sparsity) if self.scope == "global" else None
        modified = False
        for value in chosen:
            modified |= _zero(value, self._mask if threshold is None else _below(threshold))
        return modified

    def _mask(self, array: Array) -> Array:
        return smallest(array, int(self.sparsity * array.size))


def _below(threshold: float) -> Callable[[Array], Array]:
    return lambda array: np.asarray(np.abs(array) < threshold)


def smallest(array: Array, count: int) -> Array:
    """A mask of the ``count`` elements of least magnitude."""
    mask = np.zeros(array.size, bool)
    if count > 0:
        mask[np.argpartition(np.abs(array).reshape(-1), count - 1)[:count]] = True
    return mask.reshape(array.shape)


def _zero(value: ir.Value, choose: Callable[[Array], Array]) -> bool:
    """Zero what ``choose`` marks; return whether anything was not zero yet."""
    array = weight(value)
    assert array is not None
    assert value.const_value is not None
    if not np.count_nonzero(array[choose(array)]):
        return False
    value.const_value = changed(
        value.const_value, lambda full: np.where(choose(full), np.float32(0), full)
    )
    return True


def global_threshold(values: list[ir.Value], sparsity: float) -> float:
    """The magnitude below which a share of all weights lies, exactly, one weight in memory.

    The bits of nonnegative floats are ordered as they are, so that two passes of counting 16 bits
    each select the one at any rank.
    """
    total = sum(int(np.prod(value.shape.numpy())) for value in values if value.shape is not None)
    rank = int(sparsity * total)
    if rank <= 0 or not values:
        return 0.0
    if rank >= total:
        return float("inf")
    upper, before = _select(_counts(values, None), rank)
    lower, _ = _select(_counts(values, upper), rank - before)
    return float(np.array([(upper << 16) | lower], np.uint32).view(np.float32)[0])


def _counts(values: list[ir.Value], upper: int | None) -> Array:
    counts = np.zeros(1 << 16, np.int64)
    for value in values:
        array = weight(value)
        assert array is not None
        bits = np.abs(array).reshape(-1).view(np.uint32)
        chosen = bits >> 16 if upper is None else bits[bits >> 16 == upper] & np.uint32(0xFFFF)
        counts += np.bincount(chosen.astype(np.intp), minlength=1 << 16)
    return counts


def _select(counts: Array, rank: int) -> tuple[int, int]:
    """The bin that holds the element of a rank, and how many come before the bin."""
    ends = np.cumsum(counts)
    index = int(np.searchsorted(ends, rank, side="right"))
    return index, int(ends[index] - counts[index])
