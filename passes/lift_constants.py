"""Keep every constant in one place: the initializers of the main graph."""

from __future__ import annotations

from collections import Counter
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


def _names(model: ir.Model) -> Counter[str]:
    """Every name in every graph: a lifted constant must be hidden by none."""
    names: Counter[str] = Counter()
    for graph in model.graphs():
        names.update(value.name or "" for value in graph.inputs)
        names.update(graph.initializers.keys())
        names.update(value.name or "" for node in graph for value in node.outputs)
    return names


def _lift_initializers(graph: ir.Graph, top: ir.Graph, taken: Counter[str]) -> bool:
    inputs = set(graph.inputs)
    modified = False
    for name, value in list(graph.initializers.items()):
        if value.const_value is None or value in inputs or value.is_graph_output():
            continue
        del graph.initializers[name]
        _store(value, value.const_value, top, taken)
        modified = True
    return modified


def _lift_node(node: ir.Node, top: ir.Graph, taken: Counter[str]) -> bool:
    result = node.outputs[0]
    if result.is_graph_output():
        return False
    tensor = ir.convenience.get_const_tensor(result)
    if tensor is None:
        return False
    _store(result, tensor, top, taken)
    graph_of(node).remove(node, safe=True)
    return True


def _store(value: ir.Value, tensor: ir.TensorProtocol, top: ir.Graph, taken: Counter[str]) -> None:
    """Let an initializer of the main graph stand for a value, under its name if that is free."""
    name = value.name or "constant"
    taken[name] -= 1
    value.name = None
    unique, index = name, 1
    while taken[unique] > 0:
        unique, index = f"{name}_{index}", index + 1
    taken[unique] += 1
    value.replace_all_uses_with(initializer(top, tensor, unique))
