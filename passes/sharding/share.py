"""What one device of a mesh holds, computes and sends: for the cost model of a spread program.

The mesh and the specs are those of the annotations, whoever made them: a value's spec names, for
each of its axes, the axes of the mesh that it is spread along.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import onnx_ir as ir

from trivium.compiler.links import Kind
from trivium.compiler.passing import attribute, is_op
from trivium.compiler.work import value_bytes
from trivium.passes.sharding.axes import Axes, rank
from trivium.passes.sharding.rules import apply

Specs = Mapping[ir.Value, Sequence[Sequence[str]]]


@dataclass(frozen=True)
class Collective:
    """A sum over devices, or a gathering, that a node asks for.

    Attributes:
        devices: How many take part.
        size: Bytes of the result on one of them.
    """

    kind: Kind
    value: str
    devices: int
    size: float


def local(model: ir.Model, mesh: Mapping[str, int], specs: Specs) -> ir.Model:
    """Return the model as one device sees it: every axis as long as its share, weights by shape."""
    own = model.clone()
    for before, after in _pairs(model.graph, own.graph):
        parts = _parts(specs.get(before, ()), mesh)
        if after.shape is None or all(n == 1 for n in parts.values()):
            continue
        dims = list(after.shape)
        for axis, n in parts.items():
            length = dims[axis]
            dims[axis] = -(-length // n) if isinstance(length, int) else length
        after.shape = ir.Shape(dims)
        tensor = after.const_value
        if tensor is not None:
            after.const_value = _by_shape(tensor, after.shape)
    for before_node, node in zip(model.graph, own.graph, strict=True):
        if is_op(node, "Attention") and before_node.inputs[0] is not None:
            _share_heads(node, before_node, mesh, specs)
    return own


def _pairs(one: ir.Graph, other: ir.Graph) -> Iterator[tuple[ir.Value, ir.Value]]:
    """The values of a graph and of its clone."""
    yield from zip(one.inputs, other.inputs, strict=True)
    for name, value in one.initializers.items():
        yield value, other.initializers[name]
    for before, after in zip(one, other, strict=True):
        yield from zip(before.outputs, after.outputs, strict=True)


def _by_shape(tensor: ir.TensorProtocol, shape: ir.Shape) -> ir.TensorProtocol:
    def content() -> ir.TensorProtocol:
        raise ValueError(f"the share of {tensor.name} has a shape only")

    return ir.LazyTensor(content, tensor.dtype, shape, cache=False, name=tensor.name)


def _share_heads(node: ir.Node, before: ir.Node, mesh: Mapping[str, int], specs: Specs) -> None:
    """Where heads are merged with what is in them, the attributes say how many there are."""
    for name, index in (("q_num_heads", 0), ("kv_num_heads", 1)):
        value, heads = before.inputs[index], attribute(node, name)
        if heads and value is not None and value.shape is not None and rank(value) == 3:
            parts = _parts(specs.get(value, ()), mesh).get(2, 1)
            node.attributes[name] = ir.AttrInt64(name, max(1, heads // parts))


def collectives(graph: ir.Graph, mesh: Mapping[str, int], specs: Specs) -> Iterator[Collective]:
    """What has to travel for each node to compute its share from the shares of its inputs.

    A sum over a split axis is an all-reduce. An input that is split where the node, or the spec
    of its result, needs it whole is gathered, once for all who read it.

    Raises:
        BadInput: A shape is not static.
    """
    gathered: set[ir.Value] = set()
    for node in graph:
        split = {
            value: parts
            for value in (*node.inputs, *node.outputs)
            if value is not None and (parts := _parts(specs.get(value, ()), mesh))
        }
        if not split:
            continue
        axes = Axes(_heads_over(node, split))
        understood = apply(axes, node) is None
        summed: dict[ir.Value, int] = {}
        for value in dict.fromkeys(v for v in node.inputs if v is not None and v in split):
            for axis, n in split[value].items():
                results = axes.results((value, axis)) if understood else []
                for result in results:
                    summed[result] = max(summed.get(result, 1), n)
                if results or not _needs_whole(axes, node, value, axis, n, split, understood):
                    continue
                if value not in gathered and not value.is_initializer():
                    gathered.add(value)
                    size = value_bytes(value) * n / prod(split[value].values())
                    yield Collective("all-gather", value.name or "", n, size)
        for result, n in summed.items():
            size = value_bytes(result) / prod(split.get(result, {}).values())
            yield Collective("all-reduce", result.name or "", n, size)


def _heads_over(node: ir.Node, split: Mapping[ir.Value, Mapping[int, int]]) -> int:
    """Over how many devices an Attention's query heads are split, which its rule must know."""
    query = node.inputs[0] if is_op(node, "Attention") else None
    if query is None or query.shape is None:
        return 1
    return split.get(query, {}).get(2 if rank(query) == 3 else 1, 1)


def _needs_whole(
    axes: Axes,
    node: ir.Node,
    value: ir.Value,
    axis: int,
    n: int,
    split: Mapping[ir.Value, Mapping[int, int]],
    understood: bool,
) -> bool:
    if not understood or axes.blocked((value, axis)) is not None:
        return True
    results = set(node.outputs)
    tied = [(v, a) for v, a in axes.members((value, axis)) if v in results]
    # Tied to nothing: the node reads no more of it than its shape.
    return any(split.get(v, {}).get(a, 1) != n for v, a in tied)


def _parts(spec: Sequence[Sequence[str]], mesh: Mapping[str, int]) -> dict[int, int]:
    """Axis -> into how many parts it is split; those that are whole are left out."""
    counts = {axis: prod(mesh[name] for name in names) for axis, names in enumerate(spec)}
    return {axis: n for axis, n in counts.items() if n > 1}
