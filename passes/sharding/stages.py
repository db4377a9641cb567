"""Cutting a graph into pipeline stages, and taking one of them out as a model of its own.

A stage is a run of nodes in the graph's order. Stages are to hold equal parts of the weights, and
little is to be handed from one to the next: near each ideal place, the cut goes where the fewest
bytes are live, which in a network of layers is between two of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import onnx_ir as ir

from trivium.compiler.errors import BadInput
from trivium.compiler.passing import decline

WINDOW = 0.5
"""How far from its ideal place a cut may be, in stages."""

NARROW = 1.25
"""How much more than the least a cut may hand over to lie nearer to its ideal place."""

_BODIES = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def assign(graph: ir.Graph, count: int) -> dict[ir.Node, int]:
    """Decide to which of ``count`` stages each node belongs.

    Raises:
        BadInput: The graph has no place to cut where one is needed, or bodies of control flow.
    """
    nodes = list(graph)
    for node in nodes:
        if any(isinstance(a, ir.Attr) and a.type in _BODIES for a in node.attributes.values()):
            raise BadInput(
                f"a graph with control flow ({node.op_type}) is not cut into stages",
                about=node.name or node.op_type,
                remedy="use a mesh without pp",
            )
    live = _live(nodes)
    held = list(accumulate(_costs(nodes)))
    cuts: list[int] = []
    for index in range(1, count):
        ideal = held[-1] * index / count
        reach = held[-1] * WINDOW / count
        first = cuts[-1] + 1 if cuts else 1
        # A cut at i lies before node i.
        near = [i for i in range(first, len(nodes)) if abs(held[i - 1] - ideal) < reach]
        if not near:
            raise BadInput(
                f"it cannot be cut into {count} stages: there is no place for cut {index}",
                about=_heaviest(nodes, held, ideal),
                remedy="give fewer stages; a single node cannot be cut, only split with tp",
            )
        least = min(live[i] for i in near)
        narrow = [i for i in near if live[i] <= NARROW * least]
        cuts.append(min(narrow, key=lambda i: abs(held[i - 1] - ideal)))
    edges = [0, *cuts, len(nodes)]
    return {
        node: stage for stage in range(count) for node in nodes[edges[stage] : edges[stage + 1]]
    }


def _live(nodes: Sequence[ir.Node]) -> list[float]:
    """For each place, the bytes of what is made before it and read behind it."""
    position = {node: index for index, node in enumerate(nodes)}
    change = [0.0] * (len(nodes) + 2)
    for node in nodes:
        for value in node.outputs:
            last = max((position[user] for user, _ in value.uses()), default=position[node])
            change[position[node] + 1] += _size(value)
            change[last + 1] -= _size(value)
    return list(accumulate(change))


def _size(value: ir.Value) -> float:
    """Bytes of a value; a symbolic dimension counts as one, as it does wherever it occurs."""
    count = 1.0
    for dim in value.shape or ():
        count *= dim if isinstance(dim, int) else 1
    return count * (value.dtype.bitwidth / 8 if value.dtype is not None else 4)


def _costs(nodes: Sequence[ir.Node]) -> list[float]:
    """Bytes of weights by the node that reads each first, and a little for the node itself."""
    seen: set[ir.Value] = set()
    costs = []
    for node in nodes:
        cost = 1.0
        for value in node.inputs:
            if value is not None and value.is_initializer() and value not in seen:
                seen.add(value)
                # The rows of a table that are looked up are few; its bytes still have to lie here.
                cost += value.const_value.nbytes if value.const_value is not None else 0.0
        costs.append(cost)
    return costs


def _heaviest(nodes: Sequence[ir.Node], held: Sequence[float], ideal: float) -> str:
    """The node across which an ideal cut lies."""
    index = next(i for i, total in enumerate(held) if total >= ideal)
    share = (held[index] - (held[index - 1] if index else 0.0)) / held[-1]
    return f"{nodes[index].name or nodes[index].op_type}, with {share:.0%} of the weights"


def note_shared(graph: ir.Graph, stages: dict[ir.Node, int]) -> None:
    """Say which weights several stages hold."""
    for value in graph.initializers.values():
        of = sorted({stages[node] for node, _ in value.uses() if node in stages})
        if len(of) > 1 and _size(value) > 1 << 20:
            decline(value, f"the stages {', '.join(map(str, of))} each hold it")


@dataclass(frozen=True)
class Stage:
    """One stage as a model.

    Attributes:
        model: Its inputs are those of the whole that it reads and what earlier stages hand over.
        received, sent: Names of what it gets from earlier stages and makes for later ones.
    """

    model: ir.Model
    received: tuple[str, ...]
    sent: tuple[str, ...]


def extract(model: ir.Model, stage: int, configuration: str) -> Stage:
    """Return one stage of an annotated model; weights are shared with it, nothing is copied."""
    own = model.clone()
    graph = own.graph
    of = {node: stage_of(node, configuration) for node in graph}
    received, sent = [], []
    outputs = []
    for node in graph:
        for value in node.outputs:
            readers = {of[user] for user, _ in value.uses()}
            if of[node] == stage:
                later = any(reader > stage for reader in readers)
                if later:
                    sent.append(value.name or "")
                if later or value.is_graph_output():
                    outputs.append(value)
            elif of[node] < stage and stage in readers:
                received.append(value)
    for value in received:
        stand_in = ir.Value(name=value.name, shape=value.shape, type=value.type)
        value.replace_all_uses_with(stand_in, replace_graph_outputs=True)
        graph.inputs.append(stand_in)
    graph.outputs.clear()
    graph.outputs.extend(outputs)
    graph.remove([node for node in graph if of[node] != stage], safe=True)
    for value in [v for v in graph.inputs if not v.uses()]:
        graph.inputs.remove(value)
    for name in [n for n, v in graph.initializers.items() if not v.uses()]:
        del graph.initializers[name]
    return Stage(own, tuple(v.name or "" for v in received), tuple(sent))


def stage_of(node: ir.Node, configuration: str) -> int:
    """The stage that a node's annotation for a configuration names; the first if it names none."""
    for entry in node.device_configurations:
        if entry.configuration is not None and entry.configuration.name == configuration:
            return entry.pipeline_stage or 0
    return 0
