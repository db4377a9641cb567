"""Compute what is packed into one product by a product for each part."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from trivium.compiler.passing import (
    NodePass,
    attribute,
    constant,
    dims,
    graph_of,
    initializer,
    is_constant,
    is_op,
    producer,
    read_once,
    splice,
    weight,
)
from trivium.compiler.types import Preserves


@dataclass(frozen=True)
class SplitProjections(NodePass):
    """Rewrite ``Split(MatMul(x, w) + b)`` to one product for each part, with columns of ``w``.

    GPT-2 and Phi-3 pack queries, keys and values so. On one device the packed product is faster;
    spread over several, equal parts of it are not heads, and it can only be whole on each. To be
    run before ``shard``. Columns are read when they are asked for: no weight is in memory twice.

    Left alone: a product that something else reads, weights that are not stored as they are
    (quantized ones), and a Split whose sizes are computed.
    """

    name: ClassVar[str] = "split-projections"
    preserves: ClassVar[Preserves] = "numeric"

    def rewrite(self, node: ir.Node) -> bool:
        packed = node.inputs[0] if is_op(node, "Split") else None
        if packed is None or not read_once(packed):
            return False
        add = producer(packed, "Add")
        product, bias = _biased(add) if add is not None else (packed, None)
        matmul = producer(product, "MatMul")
        if matmul is None or product is None or not read_once(product):
            return False
        x, stored = matmul.inputs
        edges = _edges(node, dims(stored))
        if x is None or stored is None or edges is None or not is_constant(stored):
            return False
        made: list[ir.Node] = []
        outputs = []
        for output, (start, stop) in zip(node.outputs, pairwise(edges), strict=True):
            part = ir.node("MatMul", [x, _columns(node, stored, start, stop)])
            made.append(part)
            if bias is not None:
                part.outputs[0].type, part.outputs[0].shape = output.type, output.shape
                made.append(ir.node("Add", [part.outputs[0], _columns(node, bias, start, stop)]))
            outputs.append((output, made[-1].outputs[0]))
        splice([node, *([add] if add is not None else []), matmul], made, outputs=outputs)
        return True


def _biased(add: ir.Node) -> tuple[ir.Value | None, ir.Value | None]:
    """The product and the stored vector that an Add sums; (None, None) if it is another sum."""
    for product, bias in (add.inputs, reversed(add.inputs)):
        if bias is not None and is_constant(bias) and len(dims(bias) or ()) == 1:
            return product, bias
    return None, None


def _edges(node: ir.Node, shape: tuple[int | None, ...] | None) -> list[int] | None:
    """Where a Split cuts the columns of a matrix, from 0 to their number; None if it does not."""
    packed = dims(node.inputs[0])
    if packed is None or shape is None or len(shape) != 2 or shape[1] is None:
        return None
    if attribute(node, "axis", 0) % len(packed) != len(packed) - 1:
        return None
    given = node.inputs[1] if len(node.inputs) > 1 else None
    if given is not None:
        array = constant(given)
        sizes = None if array is None else [int(size) for size in array]
    else:
        # As the standard has it: equal parts, the last one smaller.
        size = -(-shape[1] // len(node.outputs))
        sizes = [size] * (len(node.outputs) - 1)
        sizes.append(shape[1] - sum(sizes))
    if sizes is None or len(sizes) != len(node.outputs) or sum(sizes) != shape[1]:
        return None
    return [0, *accumulate(sizes)] if min(sizes) > 0 else None


def _columns(node: ir.Node, value: ir.Value, start: int, stop: int) -> ir.Value:
    """A part of a stored matrix or vector, cut along the last axis when it is read."""
    tensor = value.const_value
    assert tensor is not None
    source = ir.Value(name=value.name, const_value=tensor)

    def cut() -> ir.TensorProtocol:
        array: np.ndarray[Any, Any] | None = weight(source)
        assert array is not None
        return ir.tensor(np.ascontiguousarray(array[..., start:stop]), dtype=tensor.dtype)

    name = f"{value.name}[{start}:{stop}]"
    shape = ir.Shape([*tensor.shape.numpy()[:-1], stop - start])
    part = ir.LazyTensor(cut, tensor.dtype, shape, cache=False, name=name)
    return initializer(graph_of(node), part, name)
