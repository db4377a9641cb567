"""The reference run of a model that is larger than the memory should have to be: piece by piece.

A graph is cut along its order into pieces whose weights stay below a bound. Each is a model of its
own that is written, run on every feed and forgotten; what later pieces read is kept. The kernels
and the numbers are those of a run of the whole.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from trivium.compiler import model as models

if TYPE_CHECKING:
    import numpy as np

    Feed = dict[str, np.ndarray[Any, Any]]

MOST_BYTES = 128 << 20
"""Bytes of the weights of a piece, as floats where they are stored in fewer bits; a single node may
need more."""

_FLOAT = 4


@dataclass
class Piece:
    """Nodes that follow each other, with those that make constants of weights before them.

    Attributes:
        weights: What it reads of the model's weights, and what that takes in all.
    """

    nodes: list[ir.Node] = field(default_factory=list)
    weights: dict[ir.Value, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """What its weights take, as they are stored and as they are restored."""
        return sum(self.weights.values())


def weights_bytes(model: ir.Model) -> int:
    """What a run of a model needs for its weights: as they are stored, and as they are restored."""
    return sum(piece.bytes for piece in cut(model))


def can_be_cut(model: ir.Model) -> bool:
    """Whether no node has a body, which could read anything around it."""
    return not model.functions and not any(
        isinstance(attr, ir.Attr) and attr.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
        for node in model.graph
        for attr in node.attributes.values()
    )


def cut(model: ir.Model, most: int = MOST_BYTES) -> list[Piece]:
    """Cut a graph along its order into pieces with weights of at most so many bytes."""
    stored: dict[ir.Value, list[ir.Node]] = {}
    pieces = [Piece()]
    for node in model.graph:
        read = [value for value in node.inputs if value is not None]
        if read and all(_is_weight(value) or value in stored for value in read):
            # What restores a weight goes wherever that is read, for it is no smaller than it.
            before = [made for value in read for made in stored.get(value, ())]
            for output in node.outputs:
                stored[output] = [*dict.fromkeys(before), node]
            continue
        restoring = dict.fromkeys(made for value in read for made in stored.get(value, ()))
        needed = {v: _bytes(v) for v in read if _is_weight(v)}
        for made in restoring:
            needed |= {v: _bytes(v) for v in made.inputs if v is not None and _is_weight(v)}
            needed |= {v: _bytes(v) for v in made.outputs}
        new = sum(size for value, size in needed.items() if value not in pieces[-1].weights)
        if pieces[-1].nodes and pieces[-1].bytes + new > most:
            pieces.append(Piece())
        piece = pieces[-1]
        piece.nodes += [made for made in restoring if made not in piece.nodes]
        piece.nodes.append(node)
        piece.weights |= needed
    outputs = [value for value in model.graph.outputs if value in stored]
    for value in outputs:
        pieces[-1].nodes += [made for made in stored[value] if made not in pieces[-1].nodes]
    return pieces


def _is_weight(value: ir.Value) -> bool:
    return value.is_initializer() and not value.is_graph_input()


def _bytes(value: ir.Value) -> int:
    if value.const_value is not None:
        return value.const_value.nbytes
    sizes = [] if value.shape is None else [d for d in value.shape if isinstance(d, int)]
    total = _FLOAT if value.shape is not None else 0
    for size in sizes:
        total *= size
    return total


def run(
    model: ir.Model,
    feeds: Sequence[Mapping[str, Any]],
    run_file: Callable[[Path, Sequence[Mapping[str, Any]]], Sequence[Mapping[str, Any]]],
    most: int = MOST_BYTES,
) -> tuple[list[Feed], int]:
    """Run a model on every feed, piece by piece; return its outputs, and how many pieces it was.

    Args:
        run_file: Runs an ``.onnx`` file on feeds.
        most: Bytes of the weights of a piece.
    """
    pieces = cut(model, most)
    wanted = {str(value.name): len(pieces) for value in model.graph.outputs}
    last_read = dict(wanted)
    for index, piece in enumerate(pieces):
        for node in piece.nodes:
            for value in node.inputs:
                if value is not None:
                    name = str(value.name)
                    last_read[name] = max(last_read.get(name, index), index)
    known = [dict(feed) for feed in feeds]
    for index, piece in enumerate(pieces):
        part = _model_of(model, piece, index, last_read, known[0])
        inputs = [str(value.name) for value in part.graph.inputs]
        with tempfile.TemporaryDirectory(prefix="trivium-") as folder:
            path = Path(folder) / "piece.onnx"
            models.save(part, path)
            found = run_file(path, [{name: feed[name] for name in inputs} for feed in known])
        for feed, outputs in zip(known, found, strict=True):
            feed |= outputs
            for name in [n for n in feed if last_read.get(n, -1) <= index]:
                del feed[name]
    return [{name: feed[name] for name in wanted} for feed in known], len(pieces)


def _model_of(
    model: ir.Model,
    piece: Piece,
    index: int,
    last_read: Mapping[str, int],
    known: Mapping[str, Any],
) -> ir.Model:
    """A piece as a model: its inputs are what is known, its outputs what is read after it."""
    mapped: dict[ir.Value, ir.Value] = {}
    inputs, weights, nodes, outputs = [], [], [], []
    for node in piece.nodes:
        for value in node.inputs:
            if value is None or value in mapped:
                continue
            if _is_weight(value):
                copy = ir.Value(
                    name=value.name,
                    type=value.type,
                    shape=value.shape,
                    const_value=value.const_value,
                )
                weights.append(copy)
            else:
                dtype = ir.DataType.from_numpy(known[str(value.name)].dtype)
                copy = ir.Value(name=value.name, type=ir.TensorType(dtype), shape=value.shape)
                inputs.append(copy)
            mapped[value] = copy
        read = [mapped[value] if value is not None else None for value in node.inputs]
        made = ir.Node(
            node.domain,
            node.op_type,
            read,
            node.attributes.values(),
            num_outputs=len(node.outputs),
            name=node.name,
        )
        for before, after in zip(node.outputs, made.outputs, strict=True):
            after.name, after.type, after.shape = before.name, before.type, before.shape
            mapped[before] = after
            if last_read.get(str(before.name), -1) > index:
                outputs.append(after)
        nodes.append(made)
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=nodes,
        initializers=weights,
        opset_imports=model.graph.opset_imports,
        name=f"piece{index}",
    )
    return ir.Model(graph, ir_version=model.ir_version)
