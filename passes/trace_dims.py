"""Ask for a dimension where it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from trivium.compiler.passing import (
    NodePass,
    attribute,
    constant,
    dims,
    graph_of,
    initializer,
    is_op,
    producer,
    replace,
    scalar,
    splice,
    unread,
)
from trivium.compiler.types import Preserves

_SAME_SHAPE = frozenset(
    {"Abs", "Cast", "Dropout", "Elu", "Erf", "Exp", "Gelu", "HardSwish", "Identity", "LeakyRelu",
     "Log", "LogSoftmax", "Mish", "Neg", "Reciprocal", "Relu", "Sigmoid", "Softmax", "Softplus",
     "Sqrt", "Swish", "Tanh"}
)  # fmt: skip


@dataclass(frozen=True)
class TraceDims(NodePass):
    """Rewrite "the last dimension of q k^T" to "the last dimension of k", and so on to the source;
    one that is known becomes a constant.

    Arithmetic on shapes then no longer keeps intermediate values alive, and equal questions become
    the same node. Only single elements of a Shape are traced.
    """

    name: ClassVar[str] = "trace-dims"
    preserves: ClassVar[Preserves] = "exact"

    def rewrite(self, node: ir.Node) -> bool:
        shape = producer(node.inputs[0], "Shape") if is_op(node, "Gather", "Slice") else None
        if shape is None or shape.attributes or shape.inputs[0] is None:
            return False
        if unread(node.outputs[0]):
            return False
        known = dims(shape.inputs[0])
        axis = asked_axis(node, len(known)) if known is not None else None
        if axis is None or known is None:
            return False
        size = known[axis]
        if size is not None:
            made = np.full(_asked_shape(node), size, np.int64)
            stem = f"{node.outputs[0].name}_known"
            replace(node.outputs[0], initializer(graph_of(node), made, stem))
            return True
        source, traced = origin(shape.inputs[0], axis)
        if source is shape.inputs[0]:
            return False
        again = ir.node("Shape", [source])
        rank = len(dims(source) or ())
        again.outputs[0].shape, again.outputs[0].type = (
            ir.Shape([rank]),
            ir.TensorType(ir.DataType.INT64),
        )
        splice([node], [again, _ask(node, again.outputs[0], traced)])
        return True


def asked_axis(node: ir.Node, rank: int) -> int | None:
    """Which one element of the Shape a node takes."""
    if is_op(node, "Gather"):
        index = constant(node.inputs[1])
        return int(index.reshape(-1)[0]) % rank if index is not None and index.size == 1 else None
    parts = [constant(value) for value in node.inputs[1:5]]
    if any(part is None or part.size != 1 for part in parts):
        return None
    start, end = (int(part.reshape(-1)[0]) for part in parts[:2] if part is not None)
    if len(parts) == 4 and parts[3] is not None and int(parts[3].reshape(-1)[0]) != 1:
        return None
    if not -rank <= start < rank:
        return None
    first = start % rank
    last = min(end, rank) if end >= 0 else end + rank
    return first if last == first + 1 else None


def _asked_shape(node: ir.Node) -> tuple[int, ...]:
    """The shape in which one dimension is asked for."""
    index = constant(node.inputs[1]) if is_op(node, "Gather") else None
    return (1,) if index is None else index.shape


def _ask(node: ir.Node, shape: ir.Value, axis: int) -> ir.Node:
    graph, stem = graph_of(node), f"{node.outputs[0].name}_axis"
    if is_op(node, "Gather"):
        form = constant(node.inputs[1])
        assert form is not None
        index = initializer(graph, np.full(form.shape, axis, np.int64), stem)
        return ir.node("Gather", [shape, index], {"axis": 0}, name=node.name)
    ends = [
        initializer(graph, np.array([number], np.int64), f"{stem}_{what}")
        for number, what in ((axis, "start"), (axis + 1, "end"))
    ]
    return ir.node("Slice", [shape, *ends], name=node.name)


def origin(value: ir.Value, axis: int) -> tuple[ir.Value, int]:
    """The earliest value that has this dimension, and as which axis."""
    while (step := _before(value, axis)) is not None:
        value, axis = step
    return value, axis


def _before(value: ir.Value, axis: int) -> tuple[ir.Value, int] | None:
    node = value.producer()
    if node is None or node.domain != "" or not node.inputs or value is not node.outputs[0]:
        return None
    first = node.inputs[0]
    if first is None or dims(first) is None:
        return None
    rank = len(dims(first) or ())
    if node.op_type in _SAME_SHAPE:
        return first, axis
    if node.op_type == "Transpose":
        return first, int(attribute(node, "perm", range(rank)[::-1])[axis])
    if node.op_type == "MatMul":
        second = node.inputs[1]
        if second is None or len(dims(second) or ()) != rank or rank < 2 or axis < rank - 2:
            return None
        if axis == rank - 2 and producer(first, "Softmax") is not None:
            # Attention, once recognized, makes no probabilities whose rows could be counted.
            return None
        return (second if axis == rank - 1 else first), axis
    if node.op_type in ("Add", "Sub", "Mul", "Div", "Pow"):
        for index in (0, 1):
            other, kept = node.inputs[1 - index], node.inputs[index]
            if scalar(other) is None or kept is None:
                continue
            if len(dims(other) or ()) <= len(dims(kept) or ()):
                return kept, axis
    return None
