"""What a recipe did to each layer of a graph, found by comparing it before and after.

A layer is a node that both graphs have (passes keep names) and that reads something else than it
did: a constant with other content, or a value through nodes that the recipe put between (Q/DQ,
Cast). Nothing here knows which passes ran, so it holds for quantizing, pruning and casting alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from trivium.compiler.passing import dims, is_constant

FLOATS = frozenset(
    {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}
)


@dataclass(frozen=True)
class Layer:
    """A node before and after, and what the recipe put around it.

    Attributes:
        name: Of the node: what ``exclude`` of a pass takes.
        inserted: Nodes between it and what both graphs have, in graph order.
        tails: For an output of the model that the node makes: its position, and the nodes that the
            recipe put between the node and it.
    """

    name: str
    op_type: str
    before: ir.Node
    after: ir.Node
    inserted: tuple[ir.Node, ...]
    tails: Mapping[int, tuple[ir.Node, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """All changed layers, in graph order.

    Attributes:
        origin: Value after -> the value before that it stands for.
        pairs: The outputs of nodes that both graphs have, before and after, in graph order.
        notes: What changed and cannot be looked at alone.
    """

    layers: tuple[Layer, ...]
    origin: Mapping[ir.Value, ir.Value]
    pairs: tuple[tuple[ir.Value, ir.Value], ...]
    notes: tuple[str, ...]


def difference(before: ir.Model, after: ir.Model) -> Difference:
    """Compare a model in normal form with what a recipe made of a clone of it."""
    known = {node.name: node for node in before.graph if node.name}
    matched: dict[ir.Node, ir.Node] = {}
    for node in after.graph:
        twin = known.get(node.name or "")
        if twin is not None and _same_kind(node, twin):
            matched[node] = twin
    origin = _origins(before, after, matched)
    tails = _tails(before, after, matched, origin)
    order = {node: index for index, node in enumerate(after.graph)}
    layers, notes = [], []
    for node, twin in matched.items():
        inserted = tuple(sorted(_inserted(node, origin), key=order.__getitem__))
        if not (inserted or node in tails or _changed(node, twin, origin)):
            continue
        problem = _inseparable(node, twin)
        if problem:
            notes.append(f"{node.name} ({node.op_type}) cannot be looked at alone: {problem}")
            continue
        layers.append(
            Layer(node.name or "", node.op_type, twin, node, inserted, tails.get(node, {}))
        )
    gone = len(known) - len(matched)
    if gone:
        notes.append(f"{gone} nodes are no longer there, and cannot be looked at alone")
    pairs = tuple(
        (theirs, ours)
        for node, twin in matched.items()
        for theirs, ours in zip(twin.outputs, node.outputs, strict=True)
    )
    return Difference(tuple(layers), origin, pairs, tuple(notes))


def _same_kind(node: ir.Node, twin: ir.Node) -> bool:
    kind, other = (node.domain, node.op_type), (twin.domain, twin.op_type)
    counts = len(node.inputs), len(node.outputs)
    return kind == other and counts == (len(twin.inputs), len(twin.outputs))


def _origins(
    before: ir.Model, after: ir.Model, matched: Mapping[ir.Node, ir.Node]
) -> dict[ir.Value, ir.Value]:
    origin: dict[ir.Value, ir.Value] = {}
    for node, twin in matched.items():
        origin.update(zip(node.outputs, twin.outputs, strict=True))
    inputs = {value.name: value for value in before.graph.inputs}
    for value in after.graph.inputs:
        if value.name in inputs:
            origin[value] = inputs[value.name]
    for name, value in after.graph.initializers.items():
        twin_value = before.graph.initializers.get(name)
        if twin_value is not None and twin_value.const_value is value.const_value:
            origin[value] = twin_value
    return origin


def _inserted(node: ir.Node, origin: Mapping[ir.Value, ir.Value]) -> set[ir.Node]:
    """The nodes between a node and values that both graphs have."""
    found: set[ir.Node] = set()
    front = [value for value in node.inputs if value is not None]
    while front:
        value = front.pop()
        maker = value.producer()
        if value in origin or maker is None or maker in found:
            continue
        found.add(maker)
        front += [v for v in maker.inputs if v is not None]
    return found


def _tails(
    before: ir.Model,
    after: ir.Model,
    matched: Mapping[ir.Node, ir.Node],
    origin: Mapping[ir.Value, ir.Value],
) -> dict[ir.Node, dict[int, tuple[ir.Node, ...]]]:
    """What the recipe put behind the last nodes, by the node that it follows."""
    tails: dict[ir.Node, dict[int, tuple[ir.Node, ...]]] = {}
    for position, output in enumerate(after.graph.outputs):
        chain: list[ir.Node] = []
        value: ir.Value | None = output
        while value is not None and value not in origin and value.producer() is not None:
            maker = value.producer()
            assert maker is not None
            chain.insert(0, maker)
            value = maker.inputs[0] if maker.inputs else None
        maker = value.producer() if value is not None else None
        same = value is not None and origin.get(value) is before.graph.outputs[position]
        if chain and same and maker is not None and maker in matched:
            tails.setdefault(maker, {})[position] = tuple(chain)
    return tails


def _changed(node: ir.Node, twin: ir.Node, origin: Mapping[ir.Value, ir.Value]) -> bool:
    pairs = zip(node.inputs, twin.inputs, strict=True)
    if any((ours is None) != (theirs is None) for ours, theirs in pairs):
        return True
    if any(is_constant(value) and value not in origin for value in node.inputs if value):
        return True
    if _attributes(node) != _attributes(twin):
        return True
    both = zip(node.outputs, twin.outputs, strict=True)
    return any(ours.dtype != theirs.dtype for ours, theirs in both)


def _attributes(node: ir.Node) -> dict[str, str]:
    return {
        name: repr(attr.value)
        for name, attr in node.attributes.items()
        if isinstance(attr, ir.Attr) and attr.type not in _BODIES
    }


_BODIES = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def _inseparable(node: ir.Node, twin: ir.Node) -> str:
    if any(isinstance(a, ir.Attr) and a.type in _BODIES for a in node.attributes.values()):
        return "it has a body"
    for ours, theirs in zip(node.outputs, twin.outputs, strict=True):
        one, other = dims(ours), dims(theirs)
        if one is not None and other is not None and one != other:
            return f"its shape went from {list(other)} to {list(one)}"
    return ""


# --- putting the layers into another graph ------------------------------------------------------


@dataclass
class Copier:
    """Puts copies of changed layers into a graph that holds the values of the one before.

    Attributes:
        into: The clone of the model before; weights that it lacks are added to it.
        here: Value before -> its twin in the clone.
        prefix: Of all names that are added.
        shared: Whether layers share what the recipe put before several of them.
    """

    into: ir.Graph
    here: Callable[[ir.Value], ir.Value]
    origin: Mapping[ir.Value, ir.Value]
    prefix: str
    shared: bool = False
    _casts: int = 0
    _made: dict[ir.Value, ir.Value] = field(default_factory=dict)
    _stored: dict[ir.Value, ir.Value] = field(default_factory=dict)

    def layer(self, layer: Layer) -> tuple[list[ir.Node], list[ir.Value], list[ir.Value | None]]:
        """Nodes, the layer's outputs in the types they had before, and what its node reads."""
        nodes: list[ir.Node] = []
        made: dict[ir.Value, ir.Value] = self._made if self.shared else {}
        scope = self.prefix if self.shared else f"{self.prefix}{layer.name}/"
        for node in layer.inserted:
            if node.outputs[0] not in made:
                nodes.append(self._copy(node, made, nodes, scope))
        copy = self._copy(layer.after, dict(made), nodes, scope)
        nodes.append(copy)
        outputs = []
        for ours, theirs in zip(copy.outputs, layer.before.outputs, strict=True):
            outputs.append(self._cast(ours, theirs.dtype, nodes))
        return nodes, outputs, list(copy.inputs)

    def tail(self, layer: Layer, position: int, value: ir.Value) -> tuple[list[ir.Node], ir.Value]:
        """The nodes behind a layer up to an output of the model, reading ``value``."""
        nodes: list[ir.Node] = []
        chain = layer.tails[position]
        start = chain[0].inputs[0]
        assert start is not None
        made = {start: self._cast(value, start.dtype, nodes)}
        for node in chain:
            nodes.append(self._copy(node, made, nodes, f"{self.prefix}{layer.name}/tail/"))
        return nodes, nodes[-1].outputs[0]

    def _copy(
        self, node: ir.Node, made: dict[ir.Value, ir.Value], nodes: list[ir.Node], scope: str
    ) -> ir.Node:
        inputs = [self._value(value, made, nodes) if value else None for value in node.inputs]
        copy = ir.Node(
            node.domain,
            node.op_type,
            inputs,
            node.attributes,
            num_outputs=len(node.outputs),
            version=node.version,
            name=f"{scope}{node.name or node.op_type}",
        )
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.name = f"{scope}{old.name}" if old.name else ""
            new.shape, new.type = old.shape, old.type
            made[old] = new
        return copy

    def _value(
        self, value: ir.Value, made: dict[ir.Value, ir.Value], nodes: list[ir.Node]
    ) -> ir.Value:
        if value in made:
            return made[value]
        if value in self.origin:
            twin = self.here(self.origin[value])
            return self._cast(twin, value.dtype, nodes)
        return self.store(value)

    def store(self, value: ir.Value) -> ir.Value:
        """The twin of a weight that only the graph after has."""
        if value not in self._stored:
            tensor = ir.convenience.get_const_tensor(value)
            assert tensor is not None
            new = ir.Value(
                name=f"{self.prefix}{value.name}",
                shape=ir.Shape(tensor.shape.numpy()),
                type=ir.TensorType(tensor.dtype),
                const_value=tensor,
            )
            self.into.initializers[new.name or ""] = new
            self._stored[value] = new
        return self._stored[value]

    def _cast(self, value: ir.Value, dtype: ir.DataType | None, nodes: list[ir.Node]) -> ir.Value:
        if dtype is None or value.dtype == dtype:
            return value
        self._casts += 1
        return cast(value, dtype, nodes, f"{self.prefix}{value.name}/cast_{self._casts}")


def cast(value: ir.Value, dtype: ir.DataType, nodes: list[ir.Node], name: str) -> ir.Value:
    """Append a Cast to ``nodes``; its result."""
    node = ir.node("Cast", [value], {"to": int(dtype)}, name=name)
    result = node.outputs[0]
    result.name, result.shape, result.type = f"{name}_value", value.shape, ir.TensorType(dtype)
    nodes.append(node)
    return result


class Twins:
    """Value of a model -> the value of that name in a clone of it, also after it was replaced."""

    def __init__(self, clone: ir.Model) -> None:
        self._found = dict(ir.convenience.create_value_mapping(clone.graph))

    def __call__(self, value: ir.Value) -> ir.Value:
        return self._found[value.name or ""]

    def move(self, name: str, new: ir.Value) -> None:
        """Let another value stand for a name."""
        self._found[name] = new
