"""Compute and store equal things once."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_ir as ir

from trivium.compiler.passing import InPieces, Pass, graph_of, stripes_of, unread
from trivium.compiler.reference import RANDOM
from trivium.compiler.types import Preserves

_CHUNK = 4 << 20
_PROBE = 4096


@dataclass(frozen=True)
class ShareDuplicates(Pass):
    """Merge equal initializers and equal subexpressions.

    Weights are compared by dtype, shape and their first bytes; only where those agree are they read
    in full, a chunk at a time. What a checkpoint stores turned is compared as it lies there.

    Left alone: what a graph returns, nodes with bodies, random numbers, and a matrix whose equal is
    stored turned.
    """

    name: ClassVar[str] = "share-duplicates"
    preserves: ClassVar[Preserves] = "exact"

    def run(self, model: ir.Model) -> bool:
        modified = False
        for graph in list(model.graphs()):
            modified |= _share_initializers(graph)
            modified |= _share_nodes(graph)
        return modified


# --- initializers ---------------------------------------------------------------------------------


def _share_initializers(graph: ir.Graph) -> bool:
    groups: dict[Hashable, list[ir.Value]] = {}
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is None or value.is_graph_input() or value.is_graph_output():
            continue
        shape = tuple(tensor.shape.numpy())
        key = (tensor.dtype, shape, _turned(tensor), next(_bytes(tensor, _PROBE), b""))
        groups.setdefault(key, []).append(value)
    modified = False
    for group in groups.values():
        if len(group) > 1:
            modified |= _merge(graph, group)
    return modified


def _merge(graph: ir.Graph, group: list[ir.Value]) -> bool:
    first: dict[Hashable, ir.Value] = {}
    modified = False
    for value in group:
        assert value.const_value is not None
        kept = first.setdefault(_content(value.const_value), value)
        if kept is not value:
            value.replace_all_uses_with(kept)
            del graph.initializers[value.name or ""]
            modified = True
    return modified


def _content(tensor: ir.TensorProtocol) -> Hashable:
    digest = hashlib.sha256()
    for chunk in _bytes(tensor, _CHUNK):
        digest.update(chunk)
    return digest.digest()


def _bytes(tensor: ir.TensorProtocol, size: int) -> Iterator[bytes]:
    """The content of a tensor in pieces; of an external one only what is asked for is read."""
    if isinstance(tensor, ir.ExternalTensor):
        with open(tensor.path, "rb") as stream:
            stream.seek(tensor.offset or 0)
            left = tensor.nbytes
            while left and (chunk := stream.read(min(size, left))):
                left -= len(chunk)
                yield chunk
        return
    if isinstance(tensor, InPieces):
        yield from _columns(tensor, size) if _turned(tensor) else tensor.pieces(size)
        return
    if tensor.dtype == ir.DataType.STRING:
        strings = tensor.numpy().reshape(-1)
        yield b"".join(len(item).to_bytes(8, "little") + item for item in map(_encode, strings))
        return
    data = memoryview(tensor.tobytes())
    for start in range(0, len(data), size):
        yield bytes(data[start : start + size])


def _turned(tensor: ir.TensorProtocol) -> bool:
    """Whether a matrix lies in its file column by column: its first row is then all over it."""
    return hasattr(tensor, "stripes") and stripes_of(tensor).lies_along == 1


def _columns(tensor: ir.TensorProtocol, size: int) -> Iterator[bytes]:
    """The content of a turned matrix as it lies in its file."""
    stripes, (length, count) = stripes_of(tensor), tensor.shape.numpy()
    step = max(1, size // max(4 * length, 1))
    for first in range(0, count, step):
        yield stripes.stripe(first, min(first + step, count)).tobytes()


def _encode(item: Any) -> bytes:
    return item if isinstance(item, bytes) else str(item).encode()


# --- nodes ----------------------------------------------------------------------------------------


def _share_nodes(graph: ir.Graph) -> bool:
    first: dict[Hashable, ir.Node] = {}
    modified = False
    for node in graph:
        key = _expression(node)
        if key is None:
            continue
        kept = first.setdefault(key, node)
        if kept is node or any(value.is_graph_output() for value in node.outputs):
            continue
        for mine, theirs in zip(node.outputs, kept.outputs, strict=True):
            mine.replace_all_uses_with(theirs)
        if all(unread(value) for value in node.outputs):
            graph_of(node).remove(node, safe=True)
            modified = True
    return modified


def _expression(node: ir.Node) -> Hashable | None:
    """What a node computes, or None if two such nodes need not agree."""
    if node.domain == "" and (node.op_type in RANDOM or node.op_type == "Dropout"):
        return None
    attributes = []
    for name, attr in sorted(node.attributes.items()):
        value = attr.value
        if attr.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            return None
        if attr.type == ir.AttributeType.TENSOR:
            if value.nbytes > _PROBE:
                return None
            value = (value.dtype, tuple(value.shape.numpy()), b"".join(_bytes(value, _PROBE)))
        elif isinstance(value, (list, tuple)):
            value = tuple(value)
        if not isinstance(value, Hashable):
            return None
        attributes.append((name, attr.type, value))
    present = tuple(bool(value.name) or not unread(value) for value in node.outputs)
    return (
        node.op_identifier(),
        tuple(id(value) for value in node.inputs),
        tuple(attributes),
        present,
    )
