"""From the nodes of a graph to the kernels that an engine launches, and what is live between them.

An engine fuses: a Relu melts into its Conv, a DequantizeLinear into whatever reads it, a Reshape
vanishes. Which operators melt is the engine's business (`Fused`); what melting saves is counted
here: a value that only its own kernel reads is neither written nor read.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import onnx_ir as ir

from trivium.compiler.passing import is_op
from trivium.compiler.types import Work
from trivium.compiler.work import (
    AttentionSize,
    Demand,
    Product,
    Site,
    bodies,
    demand_of,
    is_weight,
    reads_of,
    value_bytes,
    writes_of,
)

Made = TypeVar("Made")

Fused = Callable[[ir.Node], bool]
"""Whether an operator melts into the kernel that makes its input."""

ALIASES = (
    *("Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Dropout", "BitCast"),
    *("Optional", "OptionalGetElement", "DequantizeLinear"),
)
"""Operators whose readers read their first input instead: other names for the same bytes, and
DequantizeLinear, which engines undo while they read."""


@dataclass(frozen=True)
class Kernel:
    """What an engine runs in one go.

    Attributes:
        name: Of its first node.
        op_types: Of its nodes, in order.
        dense, vector: Operations by dtype, see `trivium.compiler.work`.
        weight_bytes: Read from weights, whatever the batch.
        activation_bytes: Read and written besides.
        times: How often it runs in one call.
        products, attentions: Sizes of its dense operations, where they are known; the dtypes are
            the keys of ``dense``.
    """

    name: str
    op_types: tuple[str, ...]
    dense: Mapping[str, float] = field(default_factory=dict)
    vector: Mapping[str, float] = field(default_factory=dict)
    weight_bytes: float = 0.0
    read_bytes: float = 0.0
    written_bytes: float = 0.0
    times: float = 1.0
    products: tuple[Product, ...] = ()
    attentions: tuple[AttentionSize, ...] = ()

    @property
    def activation_bytes(self) -> float:
        return self.read_bytes + self.written_bytes

    @cached_property
    def asks(self) -> Hashable:
        """What a machine can tell it from another by: all but its name and how often it runs."""
        return (
            self.op_types,
            tuple(self.dense.items()),
            tuple(self.vector.items()),
            (self.weight_bytes, self.read_bytes, self.written_bytes),
            self.products,
            self.attentions,
        )

    @cached_property
    def work(self) -> Work:
        """All its runs in one call."""
        operations = dict(self.dense)
        for dtype, count in self.vector.items():
            operations[dtype] = operations.get(dtype, 0.0) + count
        return Work(
            {dtype: count * self.times for dtype, count in operations.items()},
            (self.weight_bytes + self.read_bytes) * self.times,
            self.written_bytes * self.times,
            self.weight_bytes,
        )


@dataclass(frozen=True)
class Breakdown:
    """What of a graph a cost model needs, whatever the machine.

    Attributes:
        activation_bytes: The most that is live at once, see `peak_activation_bytes`.
        cache_bytes: What of that are caches.
    """

    kernels: tuple[Kernel, ...]
    activation_bytes: float
    cache_bytes: float = 0.0


Seen = WeakKeyDictionary[ir.Graph, dict[Hashable, Any]]
_seen: ContextVar[Seen | None] = ContextVar("graphs broken down", default=None)


@contextmanager
def remembering(seen: Seen) -> Iterator[None]:
    """Work out once what is asked of a graph; none of ``seen`` may change any more."""
    token = _seen.set(seen)
    try:
        yield
    finally:
        _seen.reset(token)


def remembered(graph: ir.Graph, key: Hashable, make: Callable[[], Made]) -> Made:
    """What ``make`` says of a graph: from the last time, inside of `remembering`."""
    seen = _seen.get()
    if seen is None:
        return make()
    known = seen.setdefault(graph, {})
    if key not in known:
        known[key] = make()
    found: Made = known[key]
    return found


def break_down(graph: ir.Graph, fused: Fused) -> Breakdown:
    """The kernels of a graph and what is live between them.

    Raises:
        BadInput, Unsupported: As `kernels_of`.
    """
    return remembered(
        graph,
        fused,
        lambda: Breakdown(
            tuple(kernels_of(graph, fused)),
            peak_activation_bytes(graph, fused),
            sum(value_bytes(value) for value in written_in_place(graph)),
        ),
    )


def is_alias(node: ir.Node) -> bool:
    """Whether a node is another name for its first input: one of `ALIASES`, or what gives the
    dequantized the type that it is read in."""
    if is_op(node, "Cast"):
        value = node.inputs[0]
        maker = value.producer() if value is not None else None
        return maker is not None and is_op(maker, "DequantizeLinear")
    return is_op(node, *ALIASES)


def root(value: ir.Value) -> ir.Value:
    """The value whose bytes a reader of ``value`` reads."""
    node = value.producer()
    while node is not None and is_alias(node) and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value


def kernels_of(graph: ir.Graph, fused: Fused) -> list[Kernel]:
    """Group the nodes of a graph (bodies of control flow included) into kernels, in order.

    Raises:
        BadInput: A shape is not static, or a trip count is unknown.
        Unsupported: An operator has no work formula.
    """
    return list(_kernels(Grouping(graph, fused)))


class Grouping:
    """Which group each node of a graph belongs to, and who reads what."""

    def __init__(self, graph: ir.Graph, fused: Fused) -> None:
        self.nodes = [node for node in graph if not is_alias(node)]
        self.returned = {root(value) for value in graph.outputs}
        self.readers: dict[ir.Value, list[ir.Node]] = {}
        for node in self.nodes:
            for value in _read_by(node):
                self.readers.setdefault(value, []).append(node)
        self.group: dict[ir.Node, int] = {}
        for index, node in enumerate(self.nodes):
            self.group[node] = self._joined(node) if fused(node) else index
            if self.group[node] < 0:
                self.group[node] = index

    def _joined(self, node: ir.Node) -> int:
        """The group of a producer whose result only ``node`` reads, or -1."""
        for value in _read_by(node):
            maker = value.producer()
            if maker in self.group and len(self.readers[value]) == 1:
                assert maker is not None
                if value not in self.returned:
                    return self.group[maker]
        return -1

    def leaves(self, value: ir.Value) -> bool:
        """Whether a value is seen outside of the group that makes it."""
        maker = value.producer()
        mine = self.group.get(maker) if maker is not None else None
        outside = any(self.group[reader] != mine for reader in self.readers.get(value, ()))
        return outside or value in self.returned


def _read_by(node: ir.Node) -> list[ir.Value]:
    """Roots of the inputs of a node and of what its bodies read from around it, each once."""
    values = [value for value in node.inputs if value is not None]
    for attr in node.attributes.values():
        if isinstance(attr, ir.Attr) and attr.type == ir.AttributeType.GRAPH:
            values += list(_captured(attr.as_graph()))
    return list(dict.fromkeys(root(value) for value in values))


def _captured(body: ir.Graph) -> Iterator[ir.Value]:
    own = set(body.inputs)
    for node in body.all_nodes():
        own.update(node.outputs)
    for node in body.all_nodes():
        for value in node.inputs:
            if value is not None and value not in own and value.graph is not body:
                yield value


def _kernels(grouping: Grouping) -> Iterator[Kernel]:
    members: dict[int, list[ir.Node]] = {}
    for node in grouping.nodes:
        members.setdefault(grouping.group[node], []).append(node)
    for nodes in members.values():
        yield _kernel(nodes, grouping)
        for node in nodes:
            for body, times in bodies(node):
                inner = Grouping(body, _never)
                for kernel in _kernels(inner):
                    yield replace(kernel, times=kernel.times * times)


def _never(node: ir.Node) -> bool:
    """Inside of control flow nothing is assumed to fuse."""
    return False


def _kernel(nodes: list[ir.Node], grouping: Grouping) -> Kernel:
    dense: dict[str, float] = {}
    vector: dict[str, float] = {}
    weights: dict[ir.Value, float] = {}
    reads: dict[ir.Value, float] = {}
    written = 0.0
    demands = []
    here = grouping.group[nodes[0]]
    for node in nodes:
        demand = demand_of(node)
        demands.append(demand)
        site = Site(node)
        _add(dense, demand.dtype or site.dtype, demand.dense)
        _add(vector, site.dtype, demand.vector)
        for index, (value, size) in enumerate(
            zip(node.inputs, reads_of(node, demand), strict=True)
        ):
            if value is None:
                continue
            source = root(value)
            maker = source.producer()
            if maker is not None and grouping.group.get(maker) == here and maker is not node:
                continue
            place = weights if is_weight(source) else reads
            counted = _read_bytes(index, value, source, size, demand)
            place[source] = max(place.get(source, 0.0), counted)
        for value, size in zip(node.outputs, writes_of(node, demand), strict=True):
            written += size if grouping.leaves(value) else 0.0
    return Kernel(
        nodes[0].name or nodes[0].op_type,
        tuple(node.op_type for node in nodes),
        dense,
        vector,
        sum(weights.values()),
        sum(reads.values()),
        written,
        products=tuple(one.product for one in demands if one.product is not None),
        attentions=tuple(one.attention for one in demands if one.attention is not None),
    )


def _read_bytes(
    index: int, value: ir.Value, source: ir.Value, size: float, demand: Demand
) -> float:
    """Bytes read of an input: of its root where an alias (a DequantizeLinear) stands between."""
    if source is value:
        return size
    if index in demand.reads:
        whole = value_bytes(value)
        return value_bytes(source) * min(size / whole, 1.0) if whole else 0.0
    return value_bytes(source)


def _add(table: dict[str, float], dtype: str, count: float) -> None:
    if count:
        table[dtype] = table.get(dtype, 0.0) + count


_APPENDING: dict[str, dict[int, int]] = {
    "TensorScatter": {0: 0},
    "Attention": {1: 4, 2: 5},
    "GroupQueryAttention": {1: 3, 2: 4},
}
"""Operators that add to a cache: which output is which input with the new entries."""


def written_in_place(graph: ir.Graph) -> dict[ir.Value, ir.Value]:
    """Caches as a call leaves them, each with what it found: whoever drives a generator gives both
    the same memory, or lets the engine keep them."""
    found = {}
    for node in graph:
        for out, into in _APPENDING.get(node.op_type, {}).items():
            if out >= len(node.outputs) or into >= len(node.inputs):
                continue
            value, cache = node.outputs[out], node.inputs[into]
            if value.is_graph_output() and cache is not None and cache.is_graph_input():
                found[value] = cache
    return found


def peak_activation_bytes(graph: ir.Graph, fused: Fused) -> float:
    """The most bytes of inputs, outputs and intermediate values that are live at once.

    Nodes run in the graph's order; inputs stay for the whole call; a value that never leaves its
    kernel takes no memory. A cache is counted as long as the call leaves it.
    """
    grouping = Grouping(graph, fused)
    kept = written_in_place(graph)
    inputs = {value for value in graph.inputs if not value.is_initializer()}
    live = sum(value_bytes(value) for value in (*inputs.difference(kept.values()), *kept))
    last: dict[ir.Value, int] = {}
    for index, node in enumerate(grouping.nodes):
        for value in _read_by(node):
            last[value] = index
    dying: dict[int, list[ir.Value]] = {}
    for value, index in last.items():
        if value.producer() in grouping.group and value not in grouping.returned:
            dying.setdefault(index, []).append(value)
    peak = live
    for index, node in enumerate(grouping.nodes):
        made = (v for v in node.outputs if v not in kept and grouping.leaves(v))
        live += sum(value_bytes(value) for value in made)
        peak = max(peak, live)
        live -= sum(value_bytes(value) for value in dying.get(index, ()) if grouping.leaves(value))
    return peak
