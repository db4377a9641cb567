"""A graph in which some layers follow one recipe, some another, and the rest stay as they were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from trivium.compiler.explain.diff import Copier, Difference, Layer, Twins


def mixed(before: ir.Model, found: Sequence[Difference], chosen: Mapping[str, int]) -> ir.Model:
    """Put chosen layers of the graphs after into a clone of the one before; no weight is read.

    Args:
        found: What each recipe did; the first one is number 1.
        chosen: Layer -> number of its recipe; absent or 0 stays as it was.
    """
    model = before.clone()
    graph = model.graph
    here = Twins(model)
    copiers = {
        number: Copier(graph, here, one.origin, f"recipe{number}/", shared=True)
        for number, one in enumerate(found, start=1)
    }
    for number, one in enumerate(found, start=1):
        for layer in one.layers:
            if chosen.get(layer.name, 0) == number:
                _put(graph, here, layer, copiers[number])
    graph.sort()
    unread = [
        name
        for name, value in graph.initializers.items()
        if not value.uses() and not value.is_graph_output() and not value.is_graph_input()
    ]
    for name in unread:
        graph.initializers.pop(name)
    return model


def _put(graph: ir.Graph, here: Twins, layer: Layer, copier: Copier) -> None:
    old = [here(value) for value in layer.before.outputs if value.name]
    node = old[0].producer()
    assert node is not None
    nodes, made, _ = copier.layer(layer)
    graph.insert_before(node, nodes)
    new = [v for v, was in zip(made, layer.before.outputs, strict=True) if was.name]
    for value, replacement in zip(old, new, strict=True):
        name = value.name or ""
        positions = [i for i, output in enumerate(graph.outputs) if output is value]
        value.name = f"{name}/replaced"
        value.replace_all_uses_with(replacement, replace_graph_outputs=True)
        replacement.name = name
        here.move(name, replacement)
        for position in positions:
            if position in layer.tails:
                there, last = copier.tail(layer, position, replacement)
                graph.extend(there)
                graph.outputs[position] = last
                replacement.name, last.name = f"{name}/inner", name
    graph.remove(node, safe=True)
    copy = next(n for n in reversed(nodes) if n.op_type == layer.op_type)
    copy.name = layer.name
