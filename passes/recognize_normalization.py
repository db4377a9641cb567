"""Put LayerNormalization and RMSNormalization back together that exporters took apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from trivium.compiler.passing import (
    NodePass,
    attribute,
    constant,
    decline,
    dims,
    initializer,
    is_op,
    producer,
    read_once,
    scalar,
    splice,
)
from trivium.compiler.types import Preserves
from trivium.passes.expressions import plus_number


@dataclass(frozen=True)
class Normalized:
    """``(x - mean) / sqrt(variance + epsilon)``, or without the mean."""

    x: ir.Value
    axis: int
    epsilon: float
    centred: bool


@dataclass(frozen=True)
class RecognizeNormalization(NodePass):
    """Rewrite means, squares and roots over the last axes to the operator that they spell.

    Left alone: axes in the middle, a scale that is not known to fit the normalized axes, a
    normalized value that is read without its scale, and other dtypes than float32 and float64.
    """

    name: ClassVar[str] = "recognize-normalization"
    preserves: ClassVar[Preserves] = "numeric"

    def rewrite(self, node: ir.Node) -> bool:
        if is_op(node, "Add"):
            return _add_bias(node)
        if not is_op(node, "Mul"):
            return False
        for index in (0, 1):
            core, scale = node.inputs[index], node.inputs[1 - index]
            found = _normalized(core)
            if core is None or found is None or scale is None:
                continue
            if not read_once(core):
                return decline(core, "the normalized value is read without its scale")
            if not _fits(scale, found):
                return decline(scale, "not known to be of the normalized axes' shape")
            kind = "LayerNormalization" if found.centred else "RMSNormalization"
            inner = core.producer()
            assert inner is not None
            made = ir.node(
                kind,
                [found.x, _flat(scale, found)],
                {"axis": found.axis, "epsilon": found.epsilon},
                name=node.name,
            )
            splice([node, inner], made)
            return True
        return False


def _normalized(value: ir.Value | None) -> Normalized | None:
    """Read ``d / sqrt(mean(d * d) + epsilon)`` off the value."""
    node = value.producer() if value is not None else None
    if node is None:
        return None
    if is_op(node, "Div"):
        root = producer(node.inputs[1], "Sqrt")
        return _variance(node.inputs[0], root.inputs[0] if root is not None else None)
    if is_op(node, "Mul"):
        for index in (0, 1):
            inside = _inverse_root(node.inputs[1 - index])
            if inside is not None:
                return _variance(node.inputs[index], inside)
    return None


def _inverse_root(value: ir.Value | None) -> ir.Value | None:
    """What stands under ``1 / sqrt(...)``."""
    reciprocal = producer(value, "Reciprocal")
    if reciprocal is not None:
        root = producer(reciprocal.inputs[0], "Sqrt")
        return root.inputs[0] if root is not None else None
    division = producer(value, "Div")
    if division is not None and scalar(division.inputs[0]) == 1:
        root = producer(division.inputs[1], "Sqrt")
        return root.inputs[0] if root is not None else None
    power = producer(value, "Pow")
    if power is not None and scalar(power.inputs[1]) == -0.5:
        return power.inputs[0]
    return None


def _variance(deviation: ir.Value | None, inside: ir.Value | None) -> Normalized | None:
    added = plus_number(inside)
    mean = producer(added[0], "ReduceMean") if added is not None else None
    if added is None or mean is None or deviation is None:
        return None
    if not _is_square(mean.inputs[0], deviation):
        return None
    known = dims(deviation)
    axis = _last_axes(mean, len(known)) if known is not None else None
    if axis is None or deviation.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
        return None
    subtraction = producer(deviation, "Sub")
    if subtraction is not None and known is not None:
        centre = producer(subtraction.inputs[1], "ReduceMean")
        x = subtraction.inputs[0]
        if centre is not None and centre.inputs[0] is x and x is not None:
            return (
                Normalized(x, axis, added[1], True)
                if (_last_axes(centre, len(known)) == axis)
                else None
            )
    return Normalized(deviation, axis, added[1], False)


def _is_square(value: ir.Value | None, of: ir.Value) -> bool:
    node = value.producer() if value is not None else None
    if is_op(node, "Pow") and node is not None:
        return node.inputs[0] is of and scalar(node.inputs[1]) == 2
    return is_op(node, "Mul") and node is not None and list(node.inputs) == [of, of]


def _last_axes(mean: ir.Node, rank: int) -> int | None:
    """The first axis, counted from the end, of a mean over the last axes that keeps them."""
    axes = constant(mean.inputs[1]) if len(mean.inputs) > 1 else None
    if axes is None or not axes.size or not attribute(mean, "keepdims", 1):
        return None
    given = sorted(int(axis) % rank for axis in axes)
    if given != list(range(given[0], rank)):
        return None
    return given[0] - rank


def _fits(scale: ir.Value, found: Normalized) -> bool:
    have, want = dims(scale), dims(found.x)
    if have is None or want is None:
        return False
    tail = want[found.axis :]
    lead = have[: max(0, len(have) - len(tail))]
    return have[len(lead) :] == tail and None not in tail and all(size == 1 for size in lead)


def _flat(scale: ir.Value, found: Normalized) -> ir.Value:
    """The scale without leading axes of one, which the operators do not take."""
    array = constant(scale, limit=None) if len(dims(scale) or ()) > -found.axis else None
    if array is None or scale.graph is None:
        return scale
    graph = scale.graph
    assert isinstance(graph, ir.Graph)
    return initializer(
        graph, np.squeeze(array, tuple(range(array.ndim + found.axis))), f"{scale.name}_flat"
    )


def _add_bias(node: ir.Node) -> bool:
    for index in (0, 1):
        normal = producer(node.inputs[index], "LayerNormalization")
        bias = node.inputs[1 - index]
        if normal is None or bias is None or len(normal.inputs) > 2:
            continue
        x = normal.inputs[0]
        if x is None or len(normal.outputs) > 1 or not read_once(normal.outputs[0]):
            continue
        found = Normalized(x, int(attribute(normal, "axis", -1)), 0.0, True)
        if found.axis >= 0 or not _fits(bias, found):
            continue
        made = ir.node(
            "LayerNormalization",
            [*normal.inputs, _flat(bias, found)],
            {key: attr.value for key, attr in normal.attributes.items()},
            name=node.name,
        )
        splice([node, normal], made)
        return True
    return False
