"""What each unit is worth: by its weights, by what flows through it, or by what the loss would say.

Scores are comparable within a group, and between groups once each is divided by the group's mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from trivium.compiler.passing import is_constant, weight
from trivium.passes.coupling.units import Group, Units

Array = np.ndarray[Any, np.dtype[Any]]


def by_magnitude(units: Units, group: Group) -> Array:
    """Mean square of a unit's weights, each weight in units of its own mean square."""
    wide = [axis for axis in group.weights if len(axis[0].shape or ()) > 1] or group.weights
    total = np.zeros(len(group.labels))
    for value, axis in wide:
        array = weight(value)
        assert array is not None
        squares = np.moveaxis(array.astype(np.float64) ** 2, axis, 0)
        each = squares.reshape(len(squares), -1).mean(axis=1)
        total += _collect(units, group, value, axis, each / (each.mean() or 1.0), mean=True)
    return total


def read_by(units: Units, group: Group) -> list[tuple[ir.Node, ir.Value, int]]:
    """The products that a group's units are summed away in: node, operand, axis."""
    axes = set(group.axes)
    found = []
    for node, operand, axis in units.elements.products:
        value = node.inputs[operand]
        if value is not None and (value, axis) in axes and not is_constant(value):
            found.append((node, value, axis))
    return found


def by_activation(units: Units, group: Group, powers: Mapping[ir.Value, Array]) -> Array:
    """What flows into the products: root mean square of a unit times the norm of what reads it."""
    total = np.zeros(len(group.labels))
    for node, value, axis in read_by(units, group):
        power = powers.get(value)
        reader = node.inputs[1]
        inner = next((i for v, i in group.weights if v is reader), None)
        array = weight(reader)
        if power is None or array is None or inner is None:
            continue
        squares = np.moveaxis(array.astype(np.float64) ** 2, inner, 0).reshape(
            array.shape[inner], -1
        )
        flow = np.sqrt(power[: len(squares)] * squares.sum(axis=1))
        total += _collect(units, group, value, axis, flow / (flow.mean() or 1.0), mean=False)
    return total


def by_taylor(
    units: Units, groups: Iterable[Group], batches: Iterable[Mapping[str, Array]]
) -> dict[int, Array]:
    """The square of the loss's first-order change without each unit (Molchanov et al., 2019).

    Args:
        batches: Gradients by the weights' names, one mapping for each batch.

    Returns:
        Scores by the place of the group.
    """
    chosen = list(groups)
    scores = {index: np.zeros(len(group.labels)) for index, group in enumerate(chosen)}
    for gradients in batches:
        for index, group in enumerate(chosen):
            change = np.zeros(len(group.labels))
            for value, axis in group.weights:
                array, gradient = weight(value), gradients.get(value.name or "")
                if array is None or gradient is None:
                    continue
                product = np.moveaxis(array * gradient, axis, 0).reshape(array.shape[axis], -1)
                change += _collect(units, group, value, axis, product.sum(axis=1), mean=False)
            scores[index] += change**2
    return scores


def _collect(
    units: Units, group: Group, value: ir.Value, axis: int, each: Array, *, mean: bool
) -> Array:
    """Sum (or average) what there is for each place of an axis by the units of a group."""
    labels = units.places(value, axis)
    inside = np.isin(labels, group.labels)
    where = np.searchsorted(group.labels, labels[inside])
    size = len(group.labels)
    total = np.bincount(where, weights=each[inside], minlength=size)
    if not mean:
        return total
    return np.asarray(total / np.maximum(np.bincount(where, minlength=size), 1))
