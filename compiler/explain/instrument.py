"""Models made to be asked: one that measures all noise in one run, one of switchable layers.

`measuring` puts the graphs before and after side by side, with a copy of every changed layer that
reads the values of the one before, and sums squares inside the graph: however many layers there
are, what comes out is a few scalars for each, and no tensor is kept.

`switchable` makes every changed layer an If between what it was and what each recipe made of it.
One session then answers for any choice of layers and recipes, at the price of one run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from trivium.compiler import model as models
from trivium.compiler import prepare
from trivium.compiler import targets as target_names
from trivium.compiler.errors import BackendFailed
from trivium.compiler.explain.diff import FLOATS, Copier, Difference, Layer, Twins, cast
from trivium.compiler.onnx_api import one_line
from trivium.compiler.passing import attribute, dims, is_constant

SWITCHES = "trivium/switches"
"""The name of the input that says for each layer which recipe it follows (0 = none)."""

Run = Callable[[Mapping[str, Any]], list[np.ndarray[Any, Any]]]


def session(model: ir.Model) -> Run:
    """Open a model with ONNX Runtime, its weights mapped from a file, its arithmetic as written.

    Raises:
        BackendFailed: ONNX Runtime cannot run it.
    """
    import onnxruntime as ort

    cpu = target_names.find("cpu")
    for legalizing in prepare.choose_backend(cpu, None).legalize(cpu):
        legalizing(model)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.enable_cpu_mem_arena = False
    names = [output.name for output in model.graph.outputs]
    with tempfile.TemporaryDirectory(prefix="trivium-explain-") as folder:
        path = Path(folder) / "model.onnx"
        models.save(model, path, external=True)
        try:
            made = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises a dozen kinds without a common base
            raise BackendFailed(one_line(error), about="explain") from error

    def run(feeds: Mapping[str, Any]) -> list[np.ndarray[Any, Any]]:
        try:
            return list(made.run(names, dict(feeds)))
        except Exception as error:  # as above
            raise BackendFailed(one_line(error), about="explain") from error

    return run


# --- measuring -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """What a pair of outputs of the measuring model says.

    Attributes:
        kind: ``local`` (a layer's output, what it reads in float), ``cumulative`` (a value, all
            that comes before lossy too), ``tensor`` (what a layer reads).
        layer: The node's name.
        value: The name of the value that is compared.
        stored: How a tensor is stored after the recipe: its dtype.
        weight: Whether it is a constant.
    """

    kind: str
    layer: str
    value: str
    stored: str = ""
    weight: bool = False


def measuring(before: ir.Model, after: ir.Model, found: Difference) -> tuple[ir.Model, list[Probe]]:
    """The measuring model; its outputs are (signal, noise) sums of squares for each probe."""
    model = before.clone()
    here = Twins(model)
    copier = Copier(model.graph, here, found.origin, "local/")
    meter = _Meter(model.graph)
    probes: list[Probe] = []

    def probe(made: bool, what: Probe) -> None:
        if made:
            probes.append(what)

    tensors: set[tuple[str, str]] = set()
    for layer in found.layers:
        nodes, outputs, reads = copier.layer(layer)
        model.graph.extend(nodes)
        for theirs, ours in zip(layer.before.outputs, outputs, strict=True):
            made = meter.compare(here(theirs), ours)
            probe(made, Probe("local", layer.name, theirs.name or ""))
        for index, (theirs_in, ours_in) in enumerate(zip(layer.before.inputs, reads, strict=True)):
            if theirs_in is None or ours_in is None or here(theirs_in) is ours_in:
                continue
            stored = _stored(layer, index)
            key = (theirs_in.name or "", stored)
            if key in tensors:
                continue
            turned = _turned(layer, index)
            made = meter.compare(here(theirs_in), ours_in, turned=turned)
            constant = is_constant(theirs_in)
            probe(made, Probe("tensor", layer.name, theirs_in.name or "", stored, constant))
            tensors.add(key)
    lossy = _absorb(model, after, "lossy/")
    for theirs, ours in found.pairs:
        made = meter.compare(here(theirs), lossy(ours))
        node = theirs.producer()
        probe(made, Probe("cumulative", (node.name if node else "") or "", theirs.name or ""))
    model.graph.outputs[:] = meter.outputs
    return model, probes


def _stored(layer: Layer, index: int) -> str:
    """The narrowest dtype on the way to what a layer reads."""
    value = layer.after.inputs[index]
    widths: list[tuple[float, int, str]] = []
    while value is not None:
        if value.dtype is not None:
            widths.append((value.dtype.bitwidth, -len(widths), value.dtype.name.lower()))
        maker = value.producer()
        value = maker.inputs[0] if maker in layer.inserted and maker.inputs else None
    return min(widths, default=(0, 0, ""))[2]


def _turned(layer: Layer, index: int) -> bool:
    """Whether a recipe stored a weight of Gemm the other way round."""
    if layer.op_type != "Gemm" or index != 1:
        return False
    return bool(attribute(layer.before, "transB", 0) != attribute(layer.after, "transB", 0))


def _absorb(model: ir.Model, other: ir.Model, prefix: str) -> Callable[[ir.Value], ir.Value]:
    """Move a clone of another model's nodes into a model, reading the same inputs."""
    clone = other.clone()
    find = Twins(clone)
    pairs = {value: find(value) for node in other.graph for value in node.outputs if value.name}
    inputs = {value.name: value for value in model.graph.inputs}
    for value in clone.graph.inputs:
        if value.name in inputs:
            value.replace_all_uses_with(inputs[value.name])
    for graph in clone.graphs():
        for node in graph:
            node.name = f"{prefix}{node.name}"
            for value in node.outputs:
                if value.name:
                    value.name = f"{prefix}{value.name}"
    for name, value in list(clone.graph.initializers.items()):
        clone.graph.initializers.pop(name)
        value.name = f"{prefix}{name}"
        model.graph.initializers[value.name] = value
    nodes = list(clone.graph)
    clone.graph.outputs[:] = []
    clone.graph.remove(nodes)
    model.graph.extend(nodes)
    return pairs.__getitem__


class _Meter:
    """Adds sums of squares to a graph."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.outputs: list[ir.Value] = []

    def compare(self, reference: ir.Value, other: ir.Value, *, turned: bool = False) -> bool:
        """Sum the squares of a value and of its difference to another; False if that cannot be."""
        if reference.dtype not in FLOATS or other.dtype not in FLOATS:
            return False
        shape = dims(other)
        if shape is not None and turned:
            shape = shape[::-1]
        known = dims(reference)
        if known is not None and shape is not None and len(known) != len(shape):
            return False
        if known is not None and shape is not None:
            pairs = zip(known, shape, strict=True)
            if any(a is not None and b is not None and a != b for a, b in pairs):
                return False
        nodes: list[ir.Node] = []
        name = f"meter/{len(self.outputs)}"
        values = []
        for index, value in enumerate((reference, other)):
            if value.dtype != ir.DataType.FLOAT:
                value = cast(value, ir.DataType.FLOAT, nodes, f"{name}/cast_{index}")
            values.append(value)
        if turned:
            nodes.append(ir.node("Transpose", [values[1]], {"perm": [1, 0]}, name=f"{name}/turn"))
            values[1] = nodes[-1].outputs[0]
        nodes.append(ir.node("Sub", values, name=f"{name}/difference"))
        for what, value in (("signal", values[0]), ("noise", nodes[-1].outputs[0])):
            sums = ir.node("ReduceSumSquare", [value], {"keepdims": 0}, name=f"{name}/{what}")
            result = sums.outputs[0]
            result.name, result.type = f"{name}/{what}", ir.TensorType(ir.DataType.FLOAT)
            result.shape = ir.Shape(())
            nodes.append(sums)
            self.outputs.append(result)
        for node in nodes:
            for value in node.outputs:
                value.name = value.name or f"{node.name}_value"
        self.graph.extend(nodes)
        return True


# --- switching -----------------------------------------------------------------------------------


def switchable(
    before: ir.Model, found: Sequence[Difference]
) -> tuple[ir.Model, list[tuple[str, tuple[int, ...]]]]:
    """A model with an input of one number for each layer: which recipe it follows.

    Args:
        found: What each recipe did; the first one is number 1.

    Returns:
        The model, and its layers in the order of the switches: name, and the recipes (numbers)
        that change it.
    """
    model = before.clone()
    graph = model.graph
    here = Twins(model)
    by_layer: dict[str, dict[int, Layer]] = {}
    for number, one in enumerate(found, start=1):
        for layer in one.layers:
            by_layer.setdefault(layer.name, {})[number] = layer
    order = {node.name: index for index, node in enumerate(before.graph)}
    names = sorted(by_layer, key=lambda name: order[name])
    copiers = {
        number: Copier(graph, here, one.origin, f"recipe{number}/")
        for number, one in enumerate(found, start=1)
    }
    switches = ir.Value(
        name=SWITCHES, shape=ir.Shape((len(names),)), type=ir.TensorType(ir.DataType.INT64)
    )
    graph.inputs.append(switches)
    for index, name in enumerate(names):
        _switch(graph, here, by_layer[name], copiers, switches, index)
    return model, [(name, tuple(by_layer[name])) for name in names]


def _switch(
    graph: ir.Graph,
    here: Twins,
    layers: Mapping[int, Layer],
    copiers: Mapping[int, Copier],
    switches: ir.Value,
    index: int,
) -> None:
    """Put Ifs around one layer, the recipes inside one another, and around what they put behind."""
    first = next(iter(layers.values()))
    old = [here(value) for value in first.before.outputs if value.name]
    node = old[0].producer()
    assert node is not None
    tests = {number: _test(graph, switches, index, number, node) for number in layers}

    def plain() -> tuple[list[ir.Node], list[ir.Value]]:
        copy = ir.Node(
            node.domain, node.op_type, node.inputs, node.attributes,
            num_outputs=len(node.outputs), version=node.version, name=f"{node.name}/plain",
        )  # fmt: skip
        for value, new in zip(node.outputs, copy.outputs, strict=True):
            new.name = f"{value.name}/plain" if value.name else ""
            new.shape, new.type = value.shape, value.type
        return [copy], [value for value in copy.outputs if value.name]

    nodes, outputs = plain()
    for number, layer in layers.items():
        there, made, _ = copiers[number].layer(layer)
        lossy = [value for value, was in zip(made, layer.before.outputs, strict=True) if was.name]
        nodes, outputs = _if(
            tests[number], (there, lossy), (nodes, outputs), f"{node.name}/{number}"
        )
    graph.insert_before(node, nodes)
    positions = {position: value for position, value in enumerate(graph.outputs) if value in old}
    for value, new in zip(old, outputs, strict=True):
        name = value.name
        value.name = f"{name}/replaced"
        value.replace_all_uses_with(new, replace_graph_outputs=True)
        new.name = name
        here.move(name or "", new)
    graph.remove(node, safe=True)
    for position in positions:
        _switch_tail(graph, layers, copiers, tests, position)


def _switch_tail(
    graph: ir.Graph,
    layers: Mapping[int, Layer],
    copiers: Mapping[int, Copier],
    tests: Mapping[int, ir.Value],
    position: int,
) -> None:
    value = graph.outputs[position]
    for number, layer in layers.items():
        if position not in layer.tails:
            continue
        there, lossy = copiers[number].tail(layer, position, value)
        name = value.name or ""
        same = ir.node("Identity", [value], name=f"{name}/{number}/same")
        kept = same.outputs[0]
        kept.name, kept.shape, kept.type = f"{name}/{number}/kept", value.shape, value.type
        nodes, outputs = _if(
            tests[number], (there, [lossy]), ([same], [kept]), f"{name}/{number}/tail"
        )
        graph.extend(nodes)
        value.name = f"{name}/{number}/inner"
        graph.outputs[position] = outputs[0]
        outputs[0].name = name
        value = outputs[0]


def _test(
    graph: ir.Graph, switches: ir.Value, index: int, number: int, before: ir.Node
) -> ir.Value:
    """Whether a layer follows a recipe."""
    name = f"trivium/switch_{index}_{number}"
    at = ir.Value(name=f"{name}/at", const_value=ir.tensor(np.array(index, np.int64)))
    wanted = ir.Value(name=f"{name}/wanted", const_value=ir.tensor(np.array(number, np.int64)))
    for value in (at, wanted):
        value.shape, value.type = ir.Shape(()), ir.TensorType(ir.DataType.INT64)
        graph.initializers[value.name or ""] = value
    gather = ir.node("Gather", [switches, at], {"axis": 0}, name=f"{name}/gather")
    gather.outputs[0].name = f"{name}/given"
    gather.outputs[0].type = ir.TensorType(ir.DataType.INT64)
    equal = ir.node("Equal", [gather.outputs[0], wanted], name=f"{name}/equal")
    equal.outputs[0].name, equal.outputs[0].shape = name, ir.Shape(())
    equal.outputs[0].type = ir.TensorType(ir.DataType.BOOL)
    graph.insert_before(before, [gather, equal])
    return equal.outputs[0]


Branch = tuple[list[ir.Node], list[ir.Value]]


def _if(test: ir.Value, then: Branch, otherwise: Branch, name: str) -> Branch:
    """An If between two lists of nodes with the same number of outputs."""
    graphs = [
        ir.Graph([], outputs, nodes=nodes, name=f"{name}/{which}")
        for which, (nodes, outputs) in (("then", then), ("else", otherwise))
    ]
    node = ir.Node(
        "", "If", [test],
        [ir.AttrGraph("then_branch", graphs[0]), ir.AttrGraph("else_branch", graphs[1])],
        num_outputs=len(otherwise[1]), name=f"{name}/if",
    )  # fmt: skip
    for value, result in zip(otherwise[1], node.outputs, strict=True):
        result.name, result.shape, result.type = f"{value.name}/{name}", value.shape, value.type
    return [node], list(node.outputs)
