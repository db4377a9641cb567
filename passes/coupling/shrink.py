"""Taking units out of a graph: weights, shapes, and the attributes that count them."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from trivium.compiler.passing import outline, sketching, weight
from trivium.passes.coupling.units import Units

Array = np.ndarray[Any, np.dtype[Any]]


def shrink(units: Units, removed: set[int]) -> None:
    """Remove units from the graph that they were found in.

    Args:
        removed: Their labels; of every axis something has to be left.
    """
    gone = np.isin(units.labels, sorted(removed))

    def kept(value: ir.Value, axis: int) -> Array:
        elements = units.elements.of(value, axis)
        assert elements is not None
        return np.asarray(~gone[elements])

    cuts: dict[ir.Value, dict[int, Array]] = defaultdict(dict)
    for value, axis in units.elements.axes():
        keep = kept(value, axis)
        if not keep.all():
            assert keep.any(), f"nothing would be left of axis {axis} of {value.name}"
            cuts[value][axis] = keep
    for fix in units.elements.fixes:
        fix(kept)
    for value, axes in cuts.items():
        if value.const_value is not None:
            value.const_value = _smaller(value.const_value, axes)
        if value.shape is not None:
            shape = list(value.shape)
            for axis, keep in axes.items():
                shape[axis] = int(keep.sum())
            value.shape = ir.Shape(shape)


def _smaller(tensor: ir.TensorProtocol, axes: dict[int, Array]) -> ir.TensorProtocol:
    """A stored tensor without some places; what lies in a file is cut when it is asked for."""
    shape = list(tensor.shape.numpy())
    for axis, keep in axes.items():
        shape[axis] = int(keep.sum())
    if sketching():
        return outline(tensor.dtype, shape)
    if not isinstance(tensor, (ir.ExternalTensor, ir.LazyTensor)):
        return _cut(tensor, axes)
    made = partial(_cut, tensor, axes)
    return ir.LazyTensor(made, tensor.dtype, ir.Shape(shape), cache=False, name=tensor.name)


def _cut(tensor: ir.TensorProtocol, axes: dict[int, Array]) -> ir.TensorProtocol:
    array = weight(ir.Value(const_value=tensor))
    assert array is not None
    for axis, keep in axes.items():
        array = np.compress(keep, array, axis=axis)
    return ir.tensor(np.ascontiguousarray(array), dtype=tensor.dtype, name=tensor.name)
