"""Moving a factor of each channel from an activation into the weights around it.

``y = f(x) W`` is the same as ``(f(x) / s) (s W)``; where f is a normalization or another product,
``1 / s`` goes into its weights for nothing. Equalization, SmoothQuant and AWQ differ only in the s
that they choose.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from trivium.compiler.passing import (
    attribute,
    changed,
    decline,
    dims,
    initializer,
    is_constant,
    is_op,
    read_once,
    unread,
)

Array = np.ndarray[Any, np.dtype[Any]]

PRODUCTS = ("Conv", "Gemm", "MatMul")
_NORMS = ("LayerNormalization", "RMSNormalization")
_HOMOGENEOUS = ("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Identity", "LeakyRelu",
                "MaxPool", "Relu")  # fmt: skip
"""Operators for which f(a x) = a f(x), for a > 0, channel by channel."""
_FLOAT = ("Attention", "Gelu", "Mul", "Swish", *_NORMS)
"""Operators whose output no engine gives as integers, so that a factor behind them interrupts no
chain of integers."""


@dataclass(frozen=True)
class Stored:
    """A constant that a node reads and that has an entry, or several, for each channel.

    Attributes:
        node, position: The input that it is.
        axis: Of the channels.
        groups: Of a convolution of whose weight only the channels of one group lie on the axis.
    """

    node: ir.Node
    position: int
    axis: int
    groups: int = 1

    @property
    def value(self) -> ir.Value:
        value = self.node.inputs[self.position]
        assert value is not None
        return value

    def largest(self) -> Array:
        """The largest magnitude of each channel."""
        tensor = self.value.const_value
        assert tensor is not None
        array = np.abs(np.asarray(tensor.numpy(), np.float32))
        if self.groups > 1:
            # [out, in / groups, ...] -> [groups, out / groups, in / groups, ...]
            split = array.reshape(self.groups, -1, *array.shape[1:])
            return np.asarray(split.max(axis=(1, *range(3, split.ndim)))).reshape(-1)
        others = tuple(i for i in range(array.ndim) if i != self.axis % array.ndim)
        return np.asarray(array.max(axis=others))

    def matrix(self) -> Array:
        """[K, N] of a product of matrices."""
        tensor = self.value.const_value
        assert tensor is not None
        array = np.asarray(tensor.numpy(), np.float32)
        return array.T if self.axis % array.ndim else array

    def multiply(self, graph: ir.Graph, factor: Array) -> None:
        """Let the node read a constant with each channel multiplied by its factor."""
        old = self.value
        tensor = old.const_value
        assert tensor is not None
        rank = len(tensor.shape)

        def change(array: Array) -> Array:
            if self.groups > 1:
                split = array.reshape(self.groups, -1, *array.shape[1:])
                wide = factor.reshape(self.groups, 1, -1, *[1] * (rank - 2))
                return (split * wide).reshape(array.shape).astype(array.dtype)
            shape = [-1 if i == self.axis % rank else 1 for i in range(rank)]
            return (array * factor.reshape(shape)).astype(array.dtype)

        name = (old.name or "weight").removesuffix("_scaled")
        made = initializer(graph, changed(tensor, change), f"{name}_scaled")
        self.node.replace_input_with(self.position, made)
        if unread(old) and old.is_initializer() and old.graph is graph:
            graph.initializers.pop(old.name or "")


@dataclass(frozen=True)
class Site:
    """An activation whose channels can be scaled.

    Attributes:
        value: The activation.
        readers: The weights of the products that read it.
        sources: What makes it, to be divided; none where only a multiplication can divide it, for
            those readers alone.
    """

    value: ir.Value
    readers: tuple[Stored, ...]
    sources: tuple[Stored, ...]
    channels: int

    @property
    def convolved(self) -> bool:
        """Whether the channels are on axis 1; else they are on the last."""
        return self.readers[0].node.op_type == "Conv"

    def scale(self, graph: ir.Graph, factor: Array) -> None:
        """Divide the activation by a factor for each channel, and multiply what reads it."""
        wide = factor.astype(np.float32)
        if not self.sources:
            self.insert(graph, 1 / wide)
        for source in self.sources:
            source.multiply(graph, 1 / wide)
        for reader in self.readers:
            reader.multiply(graph, wide)

    def insert(self, graph: ir.Graph, factor: Array) -> None:
        """Let the products read the activation multiplied by a factor for each channel."""
        name = f"{self.value.name}_smooth"
        stored = initializer(graph, factor, f"{name}_factor")
        node = ir.node("Mul", [self.value, stored], name=name)
        result = node.outputs[0]
        result.name, result.shape, result.type = name, self.value.shape, self.value.type
        maker = self.value.producer()
        assert maker is not None
        graph.insert_after(maker, [node])
        for reader in self.readers:
            reader.node.replace_input_with(0, result)


def sites(
    graph: ir.Graph, *, insert: bool = False, products: tuple[str, ...] = PRODUCTS
) -> Iterator[Site]:
    """Every activation of a graph that can be scaled, in order.

    Args:
        graph: The main graph.
        insert: Whether to give those too that cannot be scaled for nothing.
        products: Operators whose inputs are asked for.
    """
    seen = set[ir.Value]()
    for node in graph:
        value = node.inputs[0] if is_op(node, *products) else None
        if value is None or value in seen:
            continue
        seen.add(value)
        inserted = _inserted(value) if insert else None
        site = _site(value, quiet=inserted is not None) or inserted
        if site is not None:
            yield site


def _inserted(value: ir.Value) -> Site | None:
    """What only a multiplication can scale, for the products of matrices among its readers."""
    maker = value.producer()
    if value.dtype != ir.DataType.FLOAT or maker is None or not is_op(maker, *_FLOAT):
        return None
    if value.graph is None or maker.graph is not value.graph:
        return None
    readers = []
    for node, index in value.uses():
        reader = _reader(node) if index == 0 and node.op_type != "Conv" else None
        if reader is not None and node.graph is value.graph:
            readers.append(reader)
    counts = {_count(reader) for reader in readers}
    if len(counts) != 1 or None in counts:
        return None
    return Site(value, tuple(readers), (), counts.pop() or 0)


def _site(value: ir.Value, *, quiet: bool) -> Site | None:
    if value.is_graph_output() or value.producer() is None or value.dtype != ir.DataType.FLOAT:
        return None
    readers = []
    for node, index in value.uses():
        reader = _reader(node) if index == 0 else None
        if reader is None or node.graph is not value.graph:
            return None
        readers.append(reader)
    # Convolutions have their channels on axis 1, products on the last one.
    last = readers[0].node.op_type != "Conv"
    if len({reader.node.op_type == "Conv" for reader in readers}) > 1:
        return None
    sources = _sources(value, last)
    if not sources:
        if not quiet:
            decline(value, "what makes it cannot take a factor for each channel")
        return None
    counts = {_count(reader) for reader in readers}
    if len(counts) != 1 or None in counts:
        return None
    return Site(value, tuple(readers), tuple(sources), counts.pop() or 0)


def _count(reader: Stored) -> int | None:
    shape = dims(reader.value)
    size = shape[reader.axis] if shape is not None else None
    return size * reader.groups if size is not None else None


def _reader(node: ir.Node) -> Stored | None:
    """The weight of a product, by the channels of its input."""
    if not is_op(node, *PRODUCTS) or not is_constant(node.inputs[1]):
        return None
    shape = dims(node.inputs[1])
    if shape is None or len(shape) < 2 or (node.op_type == "MatMul" and len(shape) != 2):
        return None
    if node.inputs[1] is None or node.inputs[1].dtype != ir.DataType.FLOAT:
        return None
    if node.op_type == "Conv":
        return Stored(node, 1, 1, int(attribute(node, "group", 1)))
    if node.op_type == "Gemm":
        if attribute(node, "transA", 0):
            return None
        return Stored(node, 1, 1 if attribute(node, "transB", 0) else 0)
    return Stored(node, 1, 0)


def _sources(value: ir.Value, last: bool) -> list[Stored] | None:
    """The constants that make each channel of an activation, all of which have to be divided."""
    node = value.producer()
    if node is None or node.domain != "":
        return None
    if node.op_type in _NORMS and last:
        rank = len(dims(node.inputs[0]) or ())
        if attribute(node, "axis", -1) not in (-1, rank - 1):
            return None
        return _constants(node, [(1, 0), (2, 0)])
    if node.op_type == "Conv" and not last:
        return _constants(node, [(1, 0), (2, 0)])
    if node.op_type == "Gemm" and last:
        bias = len(dims(node.inputs[2]) or ()) - 1 if len(node.inputs) > 2 else 0
        return _constants(node, [(1, 0 if attribute(node, "transB", 0) else 1), (2, bias)])
    if node.op_type == "MatMul" and last:
        if len(dims(node.inputs[1]) or ()) != 2:
            return None
        return _constants(node, [(1, 1)])
    if node.op_type in _HOMOGENEOUS and not (last and "Pool" in node.op_type):
        return _through(node, 0, last)
    if node.op_type == "Attention" and last and _keeps_channels(node):
        return _through(node, 2, last)
    if node.op_type == "Mul":
        for position in (0, 1):
            if (factor := _per_channel(node, position, last)) is not None:
                return [factor]
            if (found := _through(node, position, last)) is not None:
                return found
    if node.op_type == "Add":
        for position in (0, 1):
            found = _through(node, 1 - position, last)
            added = _per_channel(node, position, last) if found else None
            if found is not None and added is not None:
                return [*found, added]
    return None


def _keeps_channels(node: ir.Node) -> bool:
    """Whether an Attention gives sums of the rows of its third input, channel by channel."""
    heads = attribute(node, "q_num_heads", 0), attribute(node, "kv_num_heads", 0)
    rank = len(dims(node.inputs[2]) or ())
    cached = any(value is not None for value in node.inputs[4:6])
    kept = any(value.uses() or value.is_graph_output() for value in node.outputs[1:])
    return rank == 3 and heads[0] == heads[1] > 0 and not cached and not kept


def _through(node: ir.Node, position: int, last: bool) -> list[Stored] | None:
    value = node.inputs[position]
    if value is None or is_constant(value) or not read_once(value):
        return None
    return _sources(value, last)


def _constants(node: ir.Node, places: list[tuple[int, int]]) -> list[Stored] | None:
    found = []
    for position, axis in places:
        value = node.inputs[position] if position < len(node.inputs) else None
        if value is None:
            continue
        shape = dims(value)
        if not is_constant(value) or value.dtype != ir.DataType.FLOAT or not shape:
            return None
        if position > 1 and (shape[axis] == 1 or (len(shape) > 1 and axis != len(shape) - 1)):
            return None
        found.append(Stored(node, position, axis))
    return found


def _per_channel(node: ir.Node, position: int, last: bool) -> Stored | None:
    """A constant operand that is one number for each channel of the last axis."""
    value, other = node.inputs[position], node.inputs[1 - position]
    shape, whole = dims(value), dims(other)
    if not last or not is_constant(value) or value is None or not shape or not whole:
        return None
    if shape[-1] != whole[-1] or shape[-1] == 1 or any(size != 1 for size in shape[:-1]):
        return None
    return Stored(node, position, len(shape) - 1)
