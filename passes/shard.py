"""Spread a model over a mesh of devices, in ONNX's own multi-device annotations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import onnx_ir as ir

from trivium.compiler.errors import BadInput
from trivium.compiler.passing import (
    Pass,
    attribute,
    decline,
    from_context,
    is_constant,
    is_op,
    option,
)
from trivium.compiler.types import Preserves, Target
from trivium.passes.sharding import mesh as meshes
from trivium.passes.sharding import planner, stages
from trivium.passes.sharding.axes import Axes, Axis, rank, size, values_of
from trivium.passes.sharding.mesh import DATA, TENSOR, Mesh
from trivium.passes.sharding.rules import apply

AUTO = "auto"

Split = dict[ir.Value, dict[int, str]]
"""Value -> which of its axes goes along which axis of the mesh."""


@dataclass(frozen=True)
class Shard(Pass):
    """Say for every value how it is split over the devices of a mesh; compute nothing differently.

    ``dp`` splits the batch: the first axis of the first input, and all that runs along it. ``tp``
    splits weights as Megatron-LM does, found by following the graph and not by names: the columns
    of one product and the rows of the product that sums over them (query, key, value and output
    projections with whole heads and their caches; gate, up and down projections), so that each
    half of a block ends in one all-reduce; the vocabulary of the table that token ids are looked
    up in, and that of the logits.

    Left whole on every device: weights whose columns something needs at once and whose rows
    nothing sums over; a projection that packs queries, keys and values, since equal parts of it
    are not heads (run ``split-projections`` first); key and value projections with fewer heads
    than devices; what an operator without a rule touches; bodies of control flow. Each reason is
    given with the value.

    ``pp`` cuts the layers into stages, one after the other, near equal parts of the weights and
    where little is handed over. ``auto`` has the backend's cost model price every mesh of the
    target's devices and takes the fastest that fits; why the others lost is noted. It does
    nothing for one device, and where the backend's own way is as fast.

    A model may be annotated for several meshes; running the pass again with the same one changes
    nothing. Sources: Shoeybi et al., "Megatron-LM" (2019); Xu et al., "GSPMD" (2021).
    """

    name: ClassVar[str] = "shard"
    preserves: ClassVar[Preserves] = "exact"
    sees_caches: ClassVar[bool] = True

    mesh: str = option(
        AUTO, "How many devices along which axis: dp=2,tp=4,pp=1; auto picks; empty does nothing"
    )
    target: Target | None = from_context("target")
    backend: str | None = from_context("backend")

    def run(self, model: ir.Model) -> bool:
        if not self.mesh:
            return False
        if self.mesh != AUTO:
            return annotate(model, meshes.parse(self.mesh))
        mesh = planner.choose(model, self.target, self.backend, annotate)
        return mesh is not None and annotate(model, mesh)

    def decide(self, model: ir.Model) -> Shard:
        """The pass with the mesh that it would pick; the same one for targets that pick alike."""
        if self.mesh != AUTO:
            return self
        mesh = planner.choose(model, self.target, self.backend, annotate)
        return Shard(mesh="" if mesh is None else str(mesh))


def annotate(model: ir.Model, mesh: Mesh) -> bool:
    """Decide how a model is spread over a mesh and write it down; return whether that is new.

    Raises:
        BadInput: The batch, heads or widths do not divide by the mesh, or it has too many stages.
    """
    split, whole = plan(model.graph, mesh)
    of = stages.assign(model.graph, mesh.stages) if mesh.stages > 1 else {}
    stages.note_shared(model.graph, of)
    return _annotate(model, mesh, split, whole, of)


def plan(graph: ir.Graph, mesh: Mesh) -> tuple[Split, set[ir.Value]]:
    """Decide how every value of a graph is split.

    Returns:
        The split values; and those that are whole along ``tp`` by intent, such as sums over a
        split axis.

    Raises:
        BadInput: The batch, heads or widths do not divide by the mesh.
    """
    try:
        return _plan(graph, mesh)
    except _DoesNotDivide as error:
        tried = [replace(mesh, tensor=number) for number in meshes.divisors(error.largest)]
        works = [one.tensor for one in tried if _works(graph, one)]
        raise BadInput(
            f"{error.cause} do not divide by {TENSOR}={mesh.tensor}",
            about=error.value,
            remedy=f"{TENSOR} may be {_list(works)}",
        ) from None


class _DoesNotDivide(Exception):
    """What a pair of products is split over does not divide by the mesh."""

    def __init__(self, cause: str, value: str, largest: int) -> None:
        super().__init__(cause)
        self.cause, self.value, self.largest = cause, value, largest


def _works(graph: ir.Graph, mesh: Mesh) -> bool:
    try:
        _plan(graph, mesh)
    except _DoesNotDivide:
        return False
    return True


def _plan(graph: ir.Graph, mesh: Mesh) -> tuple[Split, set[ir.Value]]:
    axes = Axes(mesh.tensor)
    not_understood = {node: reason for node in graph if (reason := apply(axes, node)) is not None}
    split: Split = {}
    whole = set(axes.whole)
    batch = _batch(graph, axes) if mesh.data > 1 else None
    if batch is not None:
        _split_batch(axes, batch, mesh, split)
        _note_gathers(axes, batch, not_understood)
    if mesh.tensor > 1:
        for axis in _candidates(graph):
            if batch is None or axes.root(axis) != axes.root(batch):
                _split_weights(axes, axis, mesh, split, whole)
        _note_whole_weights(graph, axes, split)
    return split, whole


def _batch(graph: ir.Graph, axes: Axes) -> Axis | None:
    """The first axis of the first input that has one; inputs with an axis of that name join it."""
    given = [
        value
        for value in graph.inputs
        if value.shape is not None and rank(value) and value.name not in graph.initializers
    ]
    if not given:
        return None
    first = given[0].shape[0]  # type: ignore[index]  # the inputs without a shape are left out
    for value in given[1:]:
        length = value.shape[0]  # type: ignore[index]
        if isinstance(first, ir.SymbolicDim) and first.value is not None and length == first:
            axes.tie((given[0], 0), (value, 0))
    return given[0], 0


def _split_batch(axes: Axes, batch: Axis, mesh: Mesh, split: Split) -> None:
    length = size(batch)
    if length is not None and length % mesh.data:
        raise BadInput(
            f"a batch of {length} does not divide by {DATA}={mesh.data}",
            about=f"{batch[0].name}, axis 0",
            remedy=f"{DATA} may be {_list(meshes.divisors(length))}",
        )
    for value, number in axes.members(batch):
        length = size((value, number))
        if length is None or not length % mesh.data:
            split.setdefault(value, {number: DATA})


def _note_gathers(axes: Axes, batch: Axis, not_understood: dict[ir.Node, str]) -> None:
    """Say which nodes the batch has to be gathered for."""
    for node, reason in not_understood.items():
        for value in node.inputs:
            if value is None or value.shape is None or not rank(value):
                continue
            if axes.root((value, 0)) == axes.root(batch):
                decline(value, f"the batch is gathered: {reason}")


def _candidates(graph: ir.Graph) -> Iterator[Axis]:
    """The axes of weights that may be split, the columns of each before its rows."""
    for node in graph:
        if is_op(node, "Gather") and _is_vocabulary(node):
            yield node.inputs[0], 0  # type: ignore[misc]  # a vocabulary is there
        if not is_op(node, "MatMul", "Gemm"):
            continue
        weight = node.inputs[1]
        if weight is not None and weight.shape is not None and rank(weight) == 2:
            columns = 0 if node.op_type == "Gemm" and attribute(node, "transB", 0) else 1
            if stored(weight):
                yield weight, columns
                # An input comes whole; to cut it would only make an all-reduce of the product.
                if node.inputs[0] is not None and not node.inputs[0].is_graph_input():
                    yield weight, 1 - columns


def _is_vocabulary(node: ir.Node) -> bool:
    """Whether a Gather looks up token ids: inputs, in a table with more rows than columns."""
    table, ids = node.inputs[0], node.inputs[1]
    if table is None or ids is None or not is_constant(table) or table.shape is None:
        return False
    if rank(table) != 2 or attribute(node, "axis", 0) != 0 or not ids.is_graph_input():
        return False
    rows, columns = size((table, 0)), size((table, 1))
    return rows is not None and columns is not None and rows > columns


def stored(value: ir.Value) -> bool:
    """Whether a value is a constant, or one that is transposed, cast or dequantized."""
    node = value.producer()
    while is_op(node, "Transpose", "Cast", "DequantizeLinear", "Identity") and node is not None:
        source = node.inputs[0]
        if source is None:
            return False
        value, node = source, source.producer()
    return is_constant(value)


def _split_weights(axes: Axes, axis: Axis, mesh: Mesh, split: Split, whole: set[ir.Value]) -> None:
    """Split the class of a weight's axis, unless something needs it whole or is split already."""
    if axes.blocked(axis) is not None:
        return
    members = axes.members(axis)
    values = [value for value, _ in members]
    if len(set(values)) < len(values) or any(TENSOR in split.get(v, {}).values() for v in values):
        return
    if any(number in split.get(value, {}) for value, number in members):
        return
    results = axes.results(axis)
    counts = list(axes.counts(axis))
    wrong = next((f"{n} {what}" for what, n in counts if n % mesh.tensor), None)
    if wrong is not None:
        if any(is_op(result.producer(), "MatMul", "Gemm") for result in results):
            raise _DoesNotDivide(wrong, axis[0].name or "", max(n for _, n in counts))
        decline(axis[0], f"{wrong} do not divide by {TENSOR}={mesh.tensor}")
        return
    for value, number in members:
        split.setdefault(value, {})[number] = TENSOR
    whole.update(results)


def _note_whole_weights(graph: ir.Graph, axes: Axes, split: Split) -> None:
    """Say why weights stayed whole that could have been split."""
    for axis in dict.fromkeys(_candidates(graph)):
        weight = axis[0]
        blocked = axes.blocked(axis)
        if TENSOR not in split.get(weight, {}).values() and blocked is not None:
            decline(weight, f"axis {axis[1]}: {blocked.reason} ({blocked.value.name})")


def _list(numbers: list[int], most: int = 12) -> str:
    shown = ", ".join(map(str, numbers[:most]))
    return shown if len(numbers) <= most else f"{shown}, ..."


def _annotate(
    model: ir.Model, mesh: Mesh, split: Split, whole: set[ir.Value], of: Mapping[ir.Node, int]
) -> bool:
    """Write the plan down; return whether the model did not say so already."""
    name = str(mesh)
    known = next((one for one in model.device_configurations if one.name == name), None)
    if known is not None and known.num_devices != mesh.devices:
        raise BadInput(
            f"the model says that the mesh {name} has {known.num_devices} devices",
            about=name,
            remedy="remove that device configuration from the model",
        )
    configuration = known or model.add_device_configuration(name, num_devices=mesh.devices)
    specs: dict[tuple[ir.Value, int], ir.ShardingSpec] = {}
    modified = known is None
    for node in model.graph:
        stage = of.get(node, 0)
        for value in values_of(node):
            if value.name and (value in split or value in whole) and (value, stage) not in specs:
                specs[value, stage] = meshes.spec(mesh, value, split.get(value, {}), stage)
        ours = tuple(specs[v, stage] for v in dict.fromkeys(values_of(node)) if (v, stage) in specs)
        entry = ir.NodeDeviceConfiguration(configuration, ours, of.get(node))
        before = [c for c in node.device_configurations if c.configuration is configuration]
        wanted = [entry] if ours or node in of else []
        if before == wanted:
            continue
        others = [c for c in node.device_configurations if c.configuration is not configuration]
        node.device_configurations = (*others, *wanted)
        modified = True
    return modified
