"""Conv, ConvTranspose, Gemm and MatMul by a stored weight, as what they have in common: a sum of
products for each output channel, which can be scaled and shifted by changing weight and bias.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from trivium.compiler.passing import (
    attribute,
    constant,
    decline,
    dims,
    graph_of,
    initializer,
    is_constant,
    producer,
    read_once,
    replace,
)

LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_LAZY_BYTES = 1 << 20


def linear(value: ir.Value | None) -> ir.Node | None:
    """The linear operator with a stored weight of known shape that makes ``value`` for one reader.

    None, with the reason noted, if a rewrite of it would cost more than it saves.
    """
    node = producer(value, *LINEAR)
    if node is None or value is None:
        return None
    weight = node.inputs[1]
    if (
        not is_constant(weight)
        or weight is None
        or (node.op_type == "MatMul" and _rank(weight) != 2)
    ):
        return None
    if not read_once(value):
        decline(value, "something else reads it")
        return None
    if len(weight.uses()) > 1 or weight.is_graph_output():
        decline(weight, "several operators share this weight")
        return None
    return node


def channels(node: ir.Node) -> int:
    """How many output channels a linear operator has."""
    shape = _shape(node.inputs[1])
    if node.op_type == "Conv":
        return shape[0]
    if node.op_type == "ConvTranspose":
        return shape[1] * int(attribute(node, "group", 1))
    return shape[0] if attribute(node, "transB", 0) else shape[1]


def per_channel(node: ir.Node, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | None:
    """A constant that is added to or multiplies the output, as one number for each channel.

    None if it varies along another axis or would widen the output.
    """
    count = channels(node)
    if node.op_type in ("Conv", "ConvTranspose"):
        rank, axis = _rank(node.inputs[1]), 1
    else:
        known = dims(node.outputs[0])
        # A product has at least the channel axis, whatever the rank of its other operand.
        rank = len(known) if known is not None else 1
        axis = rank - 1
    if array.ndim > rank:
        return None
    shape = (1,) * (rank - array.ndim) + array.shape
    if any(size != 1 for index, size in enumerate(shape) if index != axis):
        return None
    if shape[axis] not in (1, count):
        return None
    return np.broadcast_to(array.reshape(-1).astype(np.float64), (count,))


def rescale(
    node: ir.Node,
    last: ir.Node,
    scale: np.ndarray[Any, Any] | None,
    shift: np.ndarray[Any, Any] | None,
) -> bool:
    """Replace ``last(node(x))`` by ``node(x)`` with ``* scale + shift`` in its weight and bias.

    Args:
        node: From `linear`; ``last`` is the one reader of its output.
        scale, shift: For each channel, or None for one and zero.
    """
    weight, bias = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
    assert weight is not None
    offset = np.zeros(channels(node))
    if bias is not None:
        found = _bias(node, bias)
        if found is None:
            return decline(bias, "this bias is not a constant for each channel")
        offset = found
    if scale is not None:
        offset = offset * scale
        node.replace_input_with(1, _scaled(node, weight, scale))
    if shift is not None:
        offset = offset + shift
    if bias is not None or shift is not None:
        dtype = weight.dtype.numpy() if weight.dtype is not None else np.float32
        stored = initializer(
            _top(node), offset.astype(dtype), f"{(bias or node.outputs[0]).name}_folded"
        )
        if bias is None:
            node.resize_inputs(3)
        node.replace_input_with(2, stored)
        if node.op_type == "Gemm" and "beta" in node.attributes:
            del node.attributes["beta"]
    result = last.outputs[0]
    node.outputs[0].shape = result.shape
    replace(result, node.outputs[0])
    graph_of(last).remove(last, safe=True)
    return True


def can_shift(node: ir.Node) -> bool:
    """Whether the operator has a bias; MatMul has none."""
    return node.op_type != "MatMul"


def _bias(node: ir.Node, bias: ir.Value) -> np.ndarray[Any, Any] | None:
    array = constant(bias) if is_constant(bias) else None
    if array is None:
        return None
    found = per_channel(node, array) if node.op_type == "Gemm" else array.astype(np.float64)
    return found * float(attribute(node, "beta", 1.0)) if found is not None else None


def _scaled(node: ir.Node, weight: ir.Value, scale: np.ndarray[Any, Any]) -> ir.Value:
    """A new weight; a large one is computed when it is needed, not now."""
    tensor = weight.const_value
    assert tensor is not None
    factors = _factors(node, scale)
    shape = tensor.shape.numpy()

    def compute() -> ir.TensorProtocol:
        array = tensor.numpy()
        product = (array.astype(np.float64) * factors).astype(array.dtype)
        return ir.tensor(product.reshape(shape), dtype=tensor.dtype)

    made: ir.TensorProtocol = (
        compute()
        if tensor.nbytes <= _LAZY_BYTES
        else ir.LazyTensor(compute, dtype=tensor.dtype, shape=ir.Shape(shape))
    )
    return initializer(_top(node), made, f"{weight.name}_folded")


def _factors(node: ir.Node, scale: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The scale in a shape that broadcasts over the weight."""
    shape = _shape(node.inputs[1])
    if node.op_type == "Conv":
        return scale.reshape(-1, *[1] * (len(shape) - 1))
    if node.op_type == "ConvTranspose":
        group = int(attribute(node, "group", 1))
        each = scale.reshape(group, 1, shape[1])
        rows = np.broadcast_to(each, (group, shape[0] // group, shape[1])).reshape(shape[:2])
        return rows.reshape(*shape[:2], *[1] * (len(shape) - 2))
    return scale.reshape(-1, 1) if attribute(node, "transB", 0) else scale.reshape(1, -1)


def _top(node: ir.Node) -> ir.Graph:
    """The main graph, where every constant of normal form lives."""
    weight = node.inputs[1]
    assert weight is not None
    return weight.graph or graph_of(node)


def _shape(weight: ir.Value | None) -> tuple[int, ...]:
    tensor = weight.const_value if weight is not None else None
    assert tensor is not None
    return tuple(tensor.shape.numpy())


def _rank(weight: ir.Value | None) -> int:
    return len(_shape(weight))
