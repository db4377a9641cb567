"""Take whole residual layers out of a graph: what is added to a stream that goes on without it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir as ir

from trivium.compiler.passing import (
    Pass,
    decline,
    dims,
    from_context,
    is_constant,
    is_op,
    option,
    replace,
    weight,
)
from trivium.compiler.types import Preserves
from trivium.passes.moments import powers
from trivium.passes.quantization import layers
from trivium.passes.remove_dead_code import RemoveDeadCode

if TYPE_CHECKING:
    from trivium.compiler.backend import Tensors

DONE = "trivium.prune-layers"
"""Property of a model that says with which options it was pruned."""


@dataclass(frozen=True)
class Layer:
    """``total = stream + f(stream)``.

    Attributes:
        total: The Add.
        stream: What goes on without the layer.
        branch: What the layer adds.
        nodes: The layer's own nodes.
    """

    total: ir.Node
    stream: ir.Value
    branch: ir.Value
    nodes: tuple[ir.Node, ...]


@dataclass(frozen=True)
class PruneLayers(Pass):
    """Remove the residual layers that change their stream the least.

    A layer is what lies between a value and an Add that the value goes past: an attention or a
    feed-forward block of a transformer, a block of a residual network. By ``activation`` a layer is
    worth the power of what it adds in units of the power of the stream; by ``magnitude`` the mean
    square of its weights.

    Left alone: layers whose inside something else reads, that change the shape of the stream, or
    that lie within one another (the innermost are taken); and a model that was pruned with the same
    options before.
    """

    name: ClassVar[str] = "prune-layers"
    preserves: ClassVar[Preserves] = "lossy"

    count: int = option(0, "Layers to remove; 0 goes by the ratio")
    ratio: float = option(0.25, "Share of the layers to remove, 0 to 1")
    rank: str = option(
        "activation",
        "What layers are ranked by: what they add, or their weights",
        choices=("activation", "magnitude"),
    )
    exclude: tuple[str, ...] = option((), layers.EXCLUDE)

    calibration: Iterable[Tensors] | None = from_context("calibration")

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"ratio is {self.ratio:g}: give a share from 0 to 1")
        if self.count < 0:
            raise ValueError(f"count is {self.count}: give 0 or more")

    def run(self, model: ir.Model) -> bool:
        signature = ", ".join(
            f"{f.name}={getattr(self, f.name)}" for f in fields(self) if "help" in f.metadata
        )
        if signature in model.metadata_props.get(DONE, "").split("; "):
            return False
        found = [
            layer
            for layer in residual_layers(model.graph)
            if not any(layers.excluded(node, self.exclude) for node in layer.nodes)
        ]
        count = min(self.count or int(self.ratio * len(found)), len(found))
        if not count:
            return False
        scores = self._scores(model, found)
        for index in np.argsort(scores, kind="stable")[:count]:
            remove(found[int(index)])
        RemoveDeadCode()(model)
        before = model.metadata_props.get(DONE)
        model.metadata_props[DONE] = f"{before}; {signature}" if before else signature
        return True

    def _scores(self, model: ir.Model, found: list[Layer]) -> list[float]:
        if self.rank == "magnitude":
            return [_magnitude(layer) for layer in found]
        values = {value: -1 for layer in found for value in (layer.stream, layer.branch)}
        seen = powers(model, list(values.items()), self.calibration, about=self.name)
        scores = []
        for layer in found:
            stream, branch = seen.get(layer.stream), seen.get(layer.branch)
            if stream is None or branch is None:
                decline(layer.total, "the calibration data says nothing of it")
                scores.append(math.inf)
            else:
                scores.append(float(branch.mean() / max(float(stream.mean()), 1e-30)))
        return scores


def remove(layer: Layer) -> None:
    """Let a stream go on without a layer."""
    # As it is now: the layer before may be gone already.
    stream = next(v for v in layer.total.inputs if v is not layer.branch)
    assert stream is not None
    replace(layer.total.outputs[0], stream)


def _magnitude(layer: Layer) -> float:
    squares = count = 0.0
    for value in {v for node in layer.nodes for v in node.inputs if is_constant(v)}:
        array = weight(value)
        if array is not None and array.ndim > 1 and array.dtype.kind == "f":
            squares += float(np.square(array, dtype=np.float64).sum())
            count += array.size
    return squares / count if count else 0.0


def residual_layers(graph: ir.Graph) -> list[Layer]:
    """The innermost layers of a graph, in its order."""
    order = {node: index for index, node in enumerate(graph)}
    found: list[Layer] = []
    for node in graph:
        if not is_op(node, "Add") or any(v is None or is_constant(v) for v in node.inputs):
            continue
        for branch, stream in (node.inputs, node.inputs[::-1]):
            assert branch is not None
            assert stream is not None
            layer = _layer(node, branch, stream, order)
            if layer is not None:
                found.append(layer)
                break
    inner = [
        layer
        for layer in found
        if not any(other is not layer and other.total in layer.nodes for other in found)
    ]
    for layer in found:
        if layer not in inner:
            decline(layer.total, "other layers lie within it")
    return inner


def _layer(
    total: ir.Node, branch: ir.Value, stream: ir.Value, order: dict[ir.Node, int]
) -> Layer | None:
    """The layer that a branch is, if all of it comes of the stream and nothing else reads it."""
    if dims(branch) != dims(stream) or branch.producer() is None or branch is stream:
        return None
    start = stream.producer()
    first = order.get(start, -1) if start is not None else -1
    behind: set[ir.Node] = set()
    front = [branch]
    while front:
        value = front.pop()
        maker = value.producer()
        if value is stream or maker is None or maker in behind or order.get(maker, -1) < first:
            continue
        behind.add(maker)
        front += [v for v in maker.inputs if v is not None]
    # A mask or a position is behind the branch too, but does not come of the stream.
    inside: dict[ir.Node, None] = {}
    for node in sorted(behind, key=lambda node: order.get(node, -1)):
        if any(v is stream or (v is not None and v.producer() in inside) for v in node.inputs):
            inside[node] = None
    if not any(is_op(n, "MatMul", "Gemm", "Conv") for n in inside):
        return None
    for node in inside:
        for value in node.outputs:
            if value.is_graph_output() or any(
                user is not total and user not in inside for user, _ in value.uses()
            ):
                return None
    return Layer(total, stream, branch, tuple(inside))
