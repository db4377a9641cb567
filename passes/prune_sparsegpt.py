"""Set weights to zero, and let those that stay make up for it on what flows in (SparseGPT)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_ir as ir

from trivium.compiler.errors import BadInput
from trivium.compiler.passing import Pass, attribute, decline, from_context, is_op, option, weight
from trivium.compiler.types import Preserves
from trivium.passes.pruning import weights
from trivium.passes.quantization import layers
from trivium.passes.quantization.gptq import inverse_factor
from trivium.passes.quantization.moments import Moment
from trivium.passes.quantization.walk import Walk

if TYPE_CHECKING:
    from trivium.compiler.backend import Tensors

Array = np.ndarray[Any, np.dtype[Any]]

_STEP = 128
"""Rows that are decided on at a time."""

_DAMPING = 0.01


@dataclass(frozen=True)
class PruneSparseGPT(Pass):
    """Prune row by row of a weight, the rest taking over what goes (Frantar and Alistarh, 2023).

    A weight's worth is its square by the diagonal of the inverse second moment of its inputs;
    what goes is made up for by the weights that the moment says see the same inputs. Layers are
    pruned in order: later ones see what the earlier ones give by then. A share is taken of every
    128 inputs of an output; with ``m``, m - n of every m neighbours go (input channels of a
    convolution, at each place of its kernel).

    Left alone: biases, embeddings, transposed convolutions and those by groups, weights below
    ``min_elements`` or with more inputs than ``max_inputs``, and weights that are as sparse as that
    already.
    """

    name: ClassVar[str] = "prune-sparsegpt"
    preserves: ClassVar[Preserves] = "lossy"

    sparsity: float = option(0.5, "Share of the weights to set to zero, 0 to 1")
    n: int = option(2, "Weights kept of each group, if there are groups")
    m: int = option(0, "Weights in a group; 0 prunes by the share alone")
    min_elements: int = option(256, "Weights with fewer elements stay as they are")
    max_inputs: int = option(16384, "Weights that sum more inputs stay: the moment is its square")
    exclude: tuple[str, ...] = option((), layers.EXCLUDE)

    calibration: Iterable[Tensors] | None = from_context("calibration")

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity <= 1:
            raise ValueError(f"sparsity is {self.sparsity:g}: give a share from 0 to 1")
        if self.m and (not 0 < self.n <= self.m or _STEP % self.m):
            raise ValueError(f"{self.n}:{self.m} is no pattern in {_STEP}")

    def run(self, model: ir.Model) -> bool:
        chosen = [(value, node) for value, node in self._weights(model) if self._fits(value, node)]
        if not chosen:
            return False
        if self.calibration is None:
            raise BadInput(
                "needs representative inputs",
                about=self.name,
                remedy="give them with --calib FILE.npz, or use prune-magnitude or prune-n-m",
            )
        by_input: dict[ir.Value, list[tuple[ir.Value, ir.Node]]] = {}
        for value, node in chosen:
            x = node.inputs[0]
            assert x is not None
            by_input.setdefault(x, []).append((value, node))
        order = {node: index for index, node in enumerate(model.graph)}
        first = {
            x: min((node for _, node in group), key=order.__getitem__)
            for x, group in by_input.items()
        }
        at = {node: x for x, node in first.items()}
        modified = False
        walk = Walk(model, self.calibration, list(by_input), cuts=set(at))
        for segment in walk:
            for x in [at[node] for node in segment.nodes if node in at]:
                modified |= self._prune(walk, segment, x, by_input[x])
        return modified

    def _weights(self, model: ir.Model) -> Iterable[tuple[ir.Value, ir.Node]]:
        return weights(model, self.exclude, self.min_elements)

    def _fits(self, value: ir.Value, node: ir.Node) -> bool:
        x = node.inputs[0]
        if not is_op(node, "Conv", "Gemm", "MatMul") or attribute(node, "group", 1) != 1:
            return decline(value, "is a transposed convolution, or has groups")
        if x is None or x.const_value is not None or node.graph is None or len(value.uses()) > 1:
            return decline(value, "has several readers, each with inputs of its own")
        array = weight(value)
        assert array is not None
        if node.op_type != "Conv" and array.ndim != 2:
            return decline(value, f"has {array.ndim} dimensions")
        matrix = _matrix(node, array)
        if len(matrix) > self.max_inputs:
            return decline(value, f"sums {len(matrix)} inputs, more than max_inputs")
        inputs = array.shape[1] if node.op_type == "Conv" else len(matrix)
        if self.m and inputs % self.m:
            return decline(value, f"{inputs} inputs make no whole groups of {self.m}")
        return not self._is_sparse(matrix)

    def _is_sparse(self, matrix: Array) -> bool:
        if self.m:
            groups = matrix.reshape(-1, self.m, matrix.shape[1])
            return bool((np.count_nonzero(groups, axis=1) <= self.n).all())
        return bool(np.count_nonzero(matrix == 0) >= int(self.sparsity * matrix.size))

    def _prune(
        self, walk: Walk, segment: Any, x: ir.Value, group: list[tuple[ir.Value, ir.Node]]
    ) -> bool:
        moments: dict[tuple[Any, ...], Moment] = {}
        for (array,) in walk.run(segment, [x], keep=False):
            fresh: set[tuple[Any, ...]] = set()
            for _, node in group:
                key = _geometry(node)
                if key not in fresh:
                    moments.setdefault(key, Moment()).update(node, array)
                    fresh.add(key)
        modified = False
        for value, node in group:
            moment = moments.get(_geometry(node))
            if moment is None or moment.total is None or moment.spoiled:
                decline(value, "the calibration data says nothing of its inputs")
                continue
            stored, old = weight(value), value.const_value
            assert stored is not None
            assert old is not None
            matrix = _matrix(node, stored)
            second = _moment(node, stored, moment.matrix)
            made = _restored(node, stored, prune(matrix, second, self.sparsity, self.n, self.m))
            value.const_value = ir.tensor(made, dtype=old.dtype, name=old.name)
            modified = True
        return modified


def prune(matrix: Array, moment: Array, sparsity: float, n: int, m: int) -> Array:
    """Prune a [K, N] matrix for inputs of a given second moment [K, K].

    Args:
        sparsity: The share to go where ``m`` is 0; else ``n`` of every ``m`` rows of a column stay.
    """
    left = matrix.astype(np.float32).copy()
    unused = np.diag(moment) == 0
    left[unused] = 0
    factor = inverse_factor(moment, _DAMPING)
    worth = np.square(np.diag(factor))[:, None]
    due = 0.0
    for start in range(0, len(left), _STEP):
        end = min(start + _STEP, len(left))
        losses = np.empty((end - start, left.shape[1]), np.float32)
        lost = np.zeros(losses.shape, bool)
        if not m:
            # What rounding leaves over is taken from the next rows: the share holds for the whole.
            due += sparsity * lost.size
            score = (np.square(left[start:end]) / worth[start:end]).reshape(-1)
            count = round(due)
            due -= count
            if count:
                lost.reshape(-1)[np.argpartition(score, count - 1)[:count]] = True
        for i in range(start, end):
            if m and not (i - start) % m:
                score = np.square(left[i : i + m]) / worth[i : i + m]
                worst = np.argsort(score, axis=0, kind="stable")[: m - n]
                np.put_along_axis(lost[i - start : i - start + m], worst, True, axis=0)
            gone = np.where(lost[i - start], left[i], np.float32(0))
            left[i] -= gone
            loss = gone / factor[i, i]
            left[i + 1 : end] -= factor[i, i + 1 : end, None] * loss
            losses[i - start] = loss
        left[end:] -= factor[start:end, end:].T @ losses
    return left


def _matrix(node: ir.Node, array: Array) -> Array:
    """A weight as [K, N], the input channels of a convolution next to each other at each place."""
    if node.op_type == "Conv":
        return np.moveaxis(array, 1, -1).reshape(len(array), -1).T
    return array.T if node.op_type == "Gemm" and attribute(node, "transB", 0) else array


def _restored(node: ir.Node, array: Array, matrix: Array) -> Array:
    if node.op_type == "Conv":
        places = (len(array), *array.shape[2:], array.shape[1])
        return np.ascontiguousarray(np.moveaxis(matrix.T.reshape(places), -1, 1))
    turned = node.op_type == "Gemm" and attribute(node, "transB", 0)
    return np.ascontiguousarray(matrix.T if turned else matrix)


def _moment(node: ir.Node, array: Array, moment: Array) -> Array:
    """The moment in the order of `_matrix`'s rows; it is made channel by channel."""
    if node.op_type != "Conv":
        return moment
    places = np.arange(len(moment)).reshape(array.shape[1], -1).T.reshape(-1)
    return moment[np.ix_(places, places)]


def _geometry(node: ir.Node) -> tuple[Any, ...]:
    """What the moment of a node's input depends on besides the input."""
    if node.op_type != "Conv":
        return (node.op_type, attribute(node, "transA", 0))
    weights = node.inputs[1]
    kernel = tuple(weights.shape or ())[2:] if weights is not None else ()
    names = ("strides", "dilations", "pads", "auto_pad")
    return (kernel, *(str(attribute(node, name)) for name in names))
