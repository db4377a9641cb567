"""Find out how to drive a decoder that has caches, from its graph alone.

A cache is a pair: an input and the output that it comes back as, with only moves of data between
them, or the operator that appends to it. The input of tokens is the one that looks up rows of the
table that is as long as the logits are wide.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from trivium.compiler.generator import CacheInfo, Form, Generator, Role

if TYPE_CHECKING:
    import onnx_ir as ir

    from trivium.compiler.types import TensorInfo

MOVES = frozenset(
    {
        "Cast", "Concat", "Gather", "Identity", "Reshape", "ScatterElements", "ScatterND", "Slice",
        "Split", "Squeeze", "TensorScatter", "Transpose", "Unsqueeze",
    }
)  # fmt: skip
"""Operators that a cache may pass through: they move entries and compute none."""

APPENDING: dict[tuple[str, str], dict[int, int]] = {
    ("", "Attention"): {1: 4, 2: 5},
    ("com.microsoft", "Attention"): {1: 4},
    ("com.microsoft", "GroupQueryAttention"): {1: 3, 2: 4},
    ("com.microsoft", "MultiHeadAttention"): {1: 6, 2: 7},
}
"""Operators that append to caches: which output is which input with the new entries."""

_LOOK_UPS: dict[tuple[str, str], dict[int, tuple[int, ...]]] = {
    ("", "Gather"): {1: (0,)},
    ("com.microsoft", "EmbedLayerNormalization"): {0: (2,), 8: (3,)},
}
"""Operators that look up rows of a table: which input holds the rows, which the table."""

_SMALL = (
    *("Cast", "Unsqueeze", "Squeeze", "Reshape", "Identity", "Expand", "Add", "Sub", "Slice"),
)
"""What ids and positions pass through on their way to a table."""


def recognize(model: ir.Model, beside: Sequence[str] = ()) -> Generator | None:
    """Describe how a graph with caches is driven; None if it has none, or they are not understood.

    Inputs in ``beside`` have nothing to do with its tokens.
    ``context`` is 0 where no table of the graph says how many positions there are, ``vocabulary``
    where the output is not as wide as the table of tokens is long (hidden states, not logits).
    """
    from trivium.compiler.model import signature

    infos = {info.name: info for info in signature(model)[0]}
    caches = tuple(_caches(model.graph, infos))
    if not caches:
        return None
    known = {*infos}.difference(beside)
    others = [v for v in model.graph.inputs if v.name in known and not _holds(caches, v.name)]
    tables = {v.name or "": list(_tables(v)) for v in others if _is_integer(infos[v.name or ""])}
    results = [v for v in model.graph.outputs if not any(v.name == c.present for c in caches)]
    logits = next((v for v in results if v.shape is not None and len(v.shape) == 3), None)
    embedded = next((v for v in others if _is_embedded(infos[v.name or ""])), None)
    tokens = _tokens(tables, logits) or (embedded.name if embedded is not None else None)
    if tokens is None or logits is None or logits.shape is None:
        return None
    width = logits.shape[2]
    looked_up = tables.get(tokens, [])
    rows = {_shape(table)[0] for table in looked_up if _shape(table)} or {width}
    positions = next((n for n, found in tables.items() if found and n != tokens), None)
    rest = [v.name or "" for v in others if v.name not in (tokens, positions)]
    mask = next((n for n in rest if len(infos[n].shape) in (2, 4)), None)
    single = [v for v in others if v.name in rest and len(infos[v.name or ""].shape) == 1]
    chosen = next((v.name for v in single if _chooses(v)), None)
    start = next((v.name for v in single if v.name != chosen), None)
    if len(rest) > sum(name is not None for name in (mask, chosen, start)):
        return None
    new = infos[tokens].shape[1]
    middle = logits.shape[1]
    return Generator(
        form=_form(model.graph, caches),
        tokens=tokens,
        logits=logits.name or "",
        vocabulary=width if isinstance(width, int) and width in rows else 0,
        caches=caches,
        # With an encoder, positions are distances, and their tables bound nothing.
        context=0 if beside else _context(model.graph, looked_up),
        mask=mask,
        positions=positions,
        start=start,
        chosen=chosen,
        kept="last" if chosen is None and middle == 1 and new != 1 else "all",
        programs=(Role("main", new if isinstance(new, int) else None),),
    )


def _holds(caches: Iterable[CacheInfo], name: str | None) -> bool:
    return any(cache.past == name for cache in caches)


def _is_integer(info: TensorInfo) -> bool:
    return info.dtype in ("int64", "int32")


def _is_embedded(info: TensorInfo) -> bool:
    """Whether an input may hold the embeddings of tokens, [rows, new, width]."""
    return len(info.shape) == 3 and isinstance(info.shape[2], int) and "float" in info.dtype


def _caches(graph: ir.Graph, infos: dict[str, TensorInfo]) -> Iterator[CacheInfo]:
    for output in graph.outputs:
        past = _origin(output)
        info = infos.get(past.name or "") if past is not None else None
        if past is None or info is None or len(info.shape) < 4 or past.shape is None:
            continue
        first = len(info.shape) - 4
        yield CacheInfo(
            info.name,
            output.name or "",
            info.dtype,
            info.shape,
            batch_axis=first,
            length_axis=first + 2,
        )


def _origin(output: ir.Value) -> ir.Value | None:
    """The one graph input with four axes or more whose entries an output holds."""
    found: dict[ir.Value, None] = {}
    front: list[ir.Value] = [output]
    seen: set[ir.Value] = set()
    while front:
        value = front.pop()
        if value in seen:
            continue
        seen.add(value)
        node = value.producer()
        if node is None:
            if value.is_graph_input() and value.shape is not None and len(value.shape) >= 4:
                found[value] = None
            continue
        appended = APPENDING.get((node.domain, node.op_type), {}).get(value.index() or 0)
        if appended is not None and len(node.inputs) > appended:
            front += [v for v in (node.inputs[appended],) if v is not None]
        elif node.domain == "" and node.op_type in MOVES:
            front += [v for v in node.inputs if v is not None]
    return next(iter(found)) if len(found) == 1 else None


def _tables(value: ir.Value) -> Iterator[ir.Value]:
    """The constant tables that an input looks up rows of."""
    front: list[ir.Value] = [value]
    seen: set[ir.Value] = set()
    while front:
        current = front.pop()
        if current in seen:
            continue
        seen.add(current)
        for node, index in current.uses():
            looked_up = _LOOK_UPS.get((node.domain, node.op_type), {}).get(index, ())
            for place in looked_up:
                table = node.inputs[place]
                if table is not None and _is_table(table):
                    yield table
            if node.op_type == "RotaryEmbedding" and len(node.inputs) > 1:
                table = node.inputs[1] if node.domain == "" else node.inputs[2]
                if index == (3 if node.domain == "" else 1) and table is not None:
                    yield table
            if node.domain == "" and node.op_type in _SMALL:
                front += node.outputs


def _tokens(tables: dict[str, list[ir.Value]], logits: ir.Value | None) -> str | None:
    width = logits.shape[2] if logits is not None and logits.shape is not None else None
    looking = {name: found for name, found in tables.items() if found}
    for name, found in looking.items():
        if any(table.shape is not None and table.shape[0] == width for table in found):
            return name
    return next(iter(looking), None)


def _is_table(value: ir.Value | None) -> bool:
    """Whether a value is a constant, stored as it is or quantized."""
    from trivium.compiler.passing import is_constant, producer

    scaled = producer(value, "DequantizeLinear", "Cast")
    return is_constant(value if scaled is None else scaled.inputs[0])


def _chooses(value: ir.Value) -> bool:
    """Whether an input picks entries of something that was computed."""
    return any(
        node.op_type == "Gather" and index == 1 and not _is_table(node.inputs[0])
        for node, index in value.uses()
    )


def _form(graph: ir.Graph, caches: Iterable[CacheInfo]) -> Form:
    outputs = {value.name: value for value in graph.outputs}
    for cache in caches:
        after = outputs[cache.present].shape
        if after is None or str(after[cache.length_axis]) != str(cache.shape[cache.length_axis]):
            return "growing"
    return "static"


def _context(graph: ir.Graph, vocabulary: Sequence[ir.Value]) -> int:
    """How many positions the tables of a graph have: learned ones, or rotations."""
    from trivium.compiler.passing import is_op

    tables = []
    for node in graph:
        if node.op_type == "RotaryEmbedding":
            tables.append(node.inputs[1 if node.domain == "" else 2])
        elif is_op(node, "Gather") and _is_table(node.inputs[0]):
            tables += [v for v in node.inputs[:1] if v not in vocabulary and len(_shape(v)) == 2]
        elif node.op_type == "EmbedLayerNormalization":
            tables.append(node.inputs[3])
    rows = [_shape(table)[0] for table in tables if _shape(table)]
    return min((size for size in rows if isinstance(size, int)), default=0)


def _shape(value: ir.Value | None) -> tuple[object, ...]:
    return tuple(value.shape) if value is not None and value.shape is not None else ()
