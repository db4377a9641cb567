"""Set the weights to zero that matter least on what really flows into them (Wanda)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_ir as ir

from trivium.compiler.passing import Pass, attribute, changed, decline, from_context, option, weight
from trivium.compiler.types import Preserves
from trivium.passes.moments import powers
from trivium.passes.pruning import summed_axis, weights
from trivium.passes.quantization import layers

if TYPE_CHECKING:
    from trivium.compiler.backend import Tensors

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class PruneWanda(Pass):
    """Zero the weights of least magnitude times the norm of their input, by output (Sun, 2023).

    Every output loses the same share of the weights that it sums, or m - n of every m neighbours
    if ``m`` is given. Nothing is trained, and no weight is changed that stays.

    Left alone: biases, embeddings, convolutions by groups, weights below ``min_elements``, and
    those whose inputs the calibration data never reaches.
    """

    name: ClassVar[str] = "prune-wanda"
    preserves: ClassVar[Preserves] = "lossy"

    sparsity: float = option(0.5, "Share of each output's weights to set to zero, 0 to 1")
    n: int = option(2, "Weights kept of each group, if there are groups")
    m: int = option(0, "Weights in a group; 0 prunes by the share alone")
    min_elements: int = option(256, "Weights with fewer elements stay as they are")
    exclude: tuple[str, ...] = option((), layers.EXCLUDE)

    calibration: Iterable[Tensors] | None = from_context("calibration")

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity <= 1:
            raise ValueError(f"sparsity is {self.sparsity:g}: give a share from 0 to 1")
        if self.m and not 0 < self.n <= self.m:
            raise ValueError(f"{self.n}:{self.m} keeps nothing or more than there is")

    def run(self, model: ir.Model) -> bool:
        chosen = []
        for value, node in weights(model, self.exclude, self.min_elements):
            x = node.inputs[0]
            if x is None or attribute(node, "group", 1) != 1 or len(value.uses()) > 1:
                decline(value, "has groups, or several readers with inputs of their own")
            elif x.dtype == ir.DataType.FLOAT and x.const_value is None:
                chosen.append((value, node, x))
        if not chosen:
            return False
        places = {x: _inputs(node) for _, node, x in chosen}
        seen = powers(model, list(places.items()), self.calibration, about=self.name)
        modified = False
        for value, node, x in chosen:
            array = weight(value)
            assert array is not None
            assert value.const_value is not None
            axis = summed_axis(node, array.ndim)
            if x not in seen or len(seen[x]) != array.shape[axis]:
                decline(value, "the calibration data says nothing of its inputs")
                continue
            if self.m and array.shape[axis] < self.m:
                decline(value, f"{array.shape[axis]} summed values make no group of {self.m}")
                continue
            mask = self._lost(array, axis, _outputs(node, array.ndim), np.sqrt(seen[x]))
            if array[mask].any():
                value.const_value = changed(
                    value.const_value,
                    lambda full, mask=mask: np.where(mask, np.float32(0), full),  # type: ignore[misc]
                )
                modified = True
        return modified

    def _lost(self, array: Array, axis: int, out: int, norms: Array) -> Array:
        """Which weights go: a mask in the form of the weight."""
        score = np.abs(np.moveaxis(array, axis, -1)) * norms.astype(np.float32)
        if self.m:
            whole = score.shape[-1] // self.m * self.m
            groups = score[..., :whole].reshape(-1, self.m)
            order = np.argsort(-groups, axis=1, kind="stable")
            lost = np.zeros_like(groups, dtype=bool)
            np.put_along_axis(lost, order[:, self.n :], True, axis=1)
            mask = np.zeros(score.shape, bool)
            mask[..., :whole] = lost.reshape(*score.shape[:-1], whole)
            return np.moveaxis(mask, -1, axis)
        rows = np.moveaxis(np.moveaxis(score, -1, axis), out, 0)
        flat = rows.reshape(len(rows), -1)
        count = int(self.sparsity * flat.shape[1])
        lost = np.zeros(flat.shape, bool)
        np.put_along_axis(lost, np.argsort(flat, axis=1, kind="stable")[:, :count], True, axis=1)
        return np.moveaxis(lost.reshape(rows.shape), 0, out)


def _inputs(node: ir.Node) -> int:
    """The axis of a product's first operand that it sums over."""
    if node.op_type in ("Conv", "ConvTranspose"):
        return 1
    return 0 if node.op_type == "Gemm" and attribute(node, "transA", 0) else -1


def _outputs(node: ir.Node, rank: int) -> int:
    """The axis of its weight along which outputs lie."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1
    return rank - 1 if summed_axis(node, rank) == rank - 2 else rank - 2
