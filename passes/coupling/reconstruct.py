"""Least squares after pruning: what still reads a layer's inputs makes up for those that go.

For a product Y = X W of which the inputs R go and S stay, ``W_S + (X_S'X_S)^-1 X_S'X_R W_R`` gives
the outputs with the least squared error on the calibration data.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from trivium.compiler.passing import attribute, decline, dims, is_constant, is_op, weight
from trivium.passes.coupling.units import Units
from trivium.passes.quantization.moments import Moment
from trivium.passes.quantization.walk import Walk

if TYPE_CHECKING:
    from trivium.compiler.backend import Tensors

Array = np.ndarray[Any, np.dtype[Any]]

_DAMPING = 1e-3
"""Of the mean of the moment's diagonal, added to it."""


def reconstruct(
    model: ir.Model, units: Units, removed: set[int], feeds: Iterable[Tensors], *, largest: int
) -> None:
    """Change the weights of products that read what is about to go; rows that go become zero.

    Layers are taken in order: later ones see what the earlier ones give by then.

    Args:
        removed: Labels of the units.
        largest: Products that sum more inputs are left alone: the moment is its square.
    """
    found = _readers(model.graph, units, removed, largest)
    if not found:
        return
    inputs = {node: node.inputs[0] for node in found}
    walk = Walk(model, feeds, [v for v in inputs.values() if v is not None], cuts=set(found))
    for segment in walk:
        for node in (one for one in segment.nodes if one in found):
            x = inputs[node]
            assert x is not None
            moment = Moment()
            for (array,) in walk.run(segment, [x], keep=False):
                moment.update(node, array)
            if moment.total is None or moment.spoiled:
                decline(node, "its input is unknown or NaN on the calibration data")
                continue
            _replace(node, found[node], moment.matrix)


def _readers(
    graph: ir.Graph, units: Units, removed: set[int], largest: int
) -> dict[ir.Node, Array]:
    """Products with a weight of their own, and which of its inputs go."""
    known = set(units.elements.axes())
    gone_labels = sorted(removed)
    found = {}
    for node in graph:
        if not is_op(node, "Conv", "Gemm", "MatMul") or attribute(node, "group", 1) != 1:
            continue
        value, x = node.inputs[1], node.inputs[0]
        if value is None or x is None or not is_constant(value) or len(value.uses()) > 1:
            continue
        shape = dims(value)
        if attribute(node, "transA", 0) or shape is None or None in shape:
            continue
        if node.op_type != "Conv" and len(shape) != 2:
            continue
        axis = _axis(node)
        total = int(np.prod([size or 0 for size in shape])) // (shape[_outputs(node)] or 1)
        if (value, axis) not in known:
            continue
        gone = np.isin(units.places(value, axis), gone_labels)
        if not gone.any() or gone.all():
            continue
        if total > largest:
            decline(node, f"sums {total} inputs: what goes is not made up for")
            continue
        found[node] = gone
    return found


def _axis(node: ir.Node) -> int:
    """Of the inputs of a product's weight."""
    return 1 if node.op_type == "Conv" or attribute(node, "transB", 0) else 0


def _outputs(node: ir.Node) -> int:
    return 0 if _axis(node) else 1


def _replace(node: ir.Node, gone: Array, moment: Array) -> None:
    value = node.inputs[1]
    array = weight(value)
    assert value is not None
    assert array is not None
    turned = _axis(node) == 1
    # [N, K...] -> [K, N]; the places of a kernel follow their channel, as in the moment.
    matrix = array.reshape(len(array), -1).T if turned else array
    wide = np.repeat(gone, len(matrix) // len(gone))
    made = least_squares(matrix, wide, moment)
    shaped = made.T.reshape(array.shape) if turned else made
    old = value.const_value
    assert old is not None
    stored = np.ascontiguousarray(shaped.astype(array.dtype))
    value.const_value = ir.tensor(stored, dtype=old.dtype, name=old.name)


def least_squares(matrix: Array, gone: Array, moment: Array) -> Array:
    """The [K, N] matrix without some rows that keeps the outputs best.

    Args:
        gone: [K], whether a row has to be zero.
        moment: [K, K], of the inputs.
    """
    stay = ~gone
    second = moment.astype(np.float64)
    inner = second[np.ix_(stay, stay)]
    inner[np.diag_indices_from(inner)] += _DAMPING * max(float(np.diag(inner).mean()), 1e-30)
    lost = second[np.ix_(stay, gone)] @ matrix[gone].astype(np.float64)
    made = np.zeros_like(matrix)
    made[stay] = matrix[stay] + np.linalg.solve(inner, lost)
    return made
