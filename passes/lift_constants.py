"""Keep every constant in one place: the initializers of the main graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from trivium.compiler.passing import Pass, graph_of, initializer
from trivium.compiler.types import Preserves


@dataclass(frozen=True)
class LiftConstants(Pass):
    """Turn Constant nodes, and the initializers of bodies, into initializers of the main graph.

    An initializer that is also an input stops being one: its stored value was a default, which a
    caller could replace and a compiler could therefore not use. The model's signature never counted
    it.

    Left alone: a constant that a graph returns, whose place and name matter.
    """

    name: ClassVar[str] = "lift-constants"
    preserves: ClassVar[Preserves] = "exact"

    def run(self, model: ir.Model) -> bool:
        modified = _drop_defaults(model.graph)
        taken = _names(model)
        for graph in list(model.graphs()):
            if graph is not model.graph:
                modified |= _lift_initializers(graph, model.graph, taken)
            for node in graph:
                if node.op_type == "Constant" and node.domain == "":
                    modified |= _lift_node(node, model.graph, taken)
        return modified


def _drop_defaults(graph: ir.Graph) -> bool:
    kept = [value for value in graph.inputs if value.name not in graph.initializers]
    if len(kept) == len(graph.inputs):
        return False
    graph.inputs.clear()
    graph.inputs.extend(kept)
    return True


def _names(model: ir.Model) -> set[str]:
    """Every name in every graph: a lifted constant must be hidden by none."""
    names: set[str] = set()
    for graph in model.graphs():
        names.update(value.name or "" for value in graph.inputs)
        names.update(graph.initializers)
        names.update(value.name or "" for node in graph for value in node.outputs)
    return names


def _lift_initializers(graph: ir.Graph, top: ir.Graph, taken: set[str]) -> bool:
    inputs = set(graph.inputs)
    modified = False
    for name, value in list(graph.initializers.items()):
        if value.const_value is None or value in inputs or value.is_graph_output():
            continue
        lifted = initializer(top, value.const_value, _unique(name, taken))
        value.replace_all_uses_with(lifted)
        del graph.initializers[name]
        modified = True
    return modified


def _lift_node(node: ir.Node, top: ir.Graph, taken: set[str]) -> bool:
    result = node.outputs[0]
    tensor = ir.convenience.get_const_tensor(result)
    if tensor is None or result.is_graph_output():
        return False
    name = result.name or "constant"
    if node.graph is top:
        result.name = None
        taken.discard(name)
    lifted = initializer(top, tensor, _unique(name, taken))
    result.replace_all_uses_with(lifted)
    graph_of(node).remove(node, safe=True)
    return True


def _unique(name: str, taken: set[str]) -> str:
    unique, index = name, 1
    while unique in taken:
        unique, index = f"{name}_{index}", index + 1
    taken.add(unique)
    return unique
