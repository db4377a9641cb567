"""Sharding rules of attention, rotary embedding and the cache of keys and values."""

from __future__ import annotations

import onnx_ir as ir

from trivium.compiler.passing import attribute
from trivium.passes.sharding.axes import Axes, Axis, rank, size
from trivium.passes.sharding.table import (
    block_axes,
    operands,
    rule,
    tie_all_but,
    tie_unless_one,
)


@rule("RotaryEmbedding")
def _rotary(axes: Axes, node: ir.Node) -> None:
    x, y = operands(node, 1)[0], node.outputs[0]
    time = rank(x) - 2
    for axis in range(rank(x)):
        axes.tie((x, axis), (y, axis))
    if rank(x) == 3:
        axes.count((x, 2), "attention heads", attribute(node, "num_heads"))
    else:
        block_axes(axes, x, [3], "its halves are rotated together")
    places = node.inputs[3] if len(node.inputs) > 3 else None
    for value in [places] if places is not None else node.inputs[1:3]:
        if value is not None:
            tie_unless_one(axes, (value, 0), (x, 0))
            tie_unless_one(axes, (value, 1), (x, time))


@rule("TensorScatter")
def _tensor_scatter(axes: Axes, node: ir.Node) -> None:
    (cache, update), y = operands(node, 2), node.outputs[0]
    along = attribute(node, "axis", -2) % rank(cache)
    for value in (cache, update):
        tie_all_but(axes, value, y, [along], "TensorScatter writes along it")
    where = node.inputs[2] if len(node.inputs) > 2 else None
    if where is not None:
        tie_unless_one(axes, (where, 0), (cache, 0))


@rule("Attention")
def _attention(axes: Axes, node: ir.Node) -> None:
    """Heads split, each with its keys and values; times and the inside of a head do not.

    Fewer key/value heads than devices stay whole on each of them, if each device's query heads
    share one.
    """
    query, key, value = operands(node, 3)
    y = node.outputs[0]
    packed = rank(query) == 3
    heads_axis = 2 if packed else 1
    optional = [*node.inputs[3:7], *[None] * (7 - len(node.inputs))]
    mask, past_key, past_value, lengths = optional[:4]
    presents = [one for one in node.outputs[1:3] if one.name]
    heads = _heads(node, query, "q_num_heads")
    groups = _heads(node, key, "kv_num_heads")
    keys: list[ir.Value] = [key, value]
    caches = [one for one in (past_key, past_value, *presents) if one is not None]
    for one in (query, y, *keys, *caches):
        axes.tie((query, 0), (one, 0))
    axes.tie((query, heads_axis), (y, heads_axis))
    sides: list[Axis] = [(one, heads_axis) for one in keys] + [(one, 1) for one in caches]
    if heads is not None:
        axes.count((query, heads_axis), "attention heads", heads)
    tensor = axes.tensor
    if heads is not None and groups is not None and groups < tensor and not tensor % groups:
        for axis in sides:
            axes.block(axis, f"{groups} key/value heads are fewer than the {tensor} devices")
        axes.whole += [one for one, _ in sides]
    else:
        axes.tie((query, heads_axis), *sides)
        if groups is not None:
            axes.count((query, heads_axis), "key/value heads", groups)
    times = [(one, 1 if packed else 2) for one in (query, *keys)] + [(one, 2) for one in caches]
    inside = [(one, 3) for one in (*([] if packed else [query, *keys]), *caches)]
    for axis in times:
        axes.block(axis, "each query meets each key")
    for axis in inside:
        axes.block(axis, "the scores sum over it")
    axes.tie((query, 1 if packed else 2), (y, 1 if packed else 2))
    if lengths is not None:
        axes.tie((lengths, 0), (query, 0))
    if mask is not None and rank(mask) == 4:
        tie_unless_one(axes, (mask, 0), (query, 0))
        if not packed:
            tie_unless_one(axes, (mask, 1), (query, 1))


def _heads(node: ir.Node, value: ir.Value, name: str) -> int | None:
    return attribute(node, name) if rank(value) == 3 else size((value, 1))
