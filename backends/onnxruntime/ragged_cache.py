"""Buffers in which every row is written from its own end on: GroupQueryAttention as it was meant,
without a bias, for a graph whose mask says no more than which tokens are padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from trivium.compiler.generator import Generator
from trivium.compiler.passing import initializer, is_constant, producer
from trivium.compiler.passing import replace as replace_value

COUNTS = "token_counts"
"""The input of how many of the new tokens of each row count; int32 [batch]."""

QUERY_LENGTHS = 16
"""The input of GroupQueryAttention that takes them."""


def places(graph: ir.Graph, generator: Generator, nodes: Sequence[ir.Node]) -> set[ir.Value] | None:
    """The values that are the places of the new tokens in their rows, if rows can go apart.

    They can where every Attention masks padding alone, and nothing else asks how long a cache is.
    """
    inputs = {value.name: value for value in graph.inputs}
    mask = inputs[generator.mask]
    pasts = {inputs[cache.past] for cache in generator.caches}
    if generator.kept != "all" or not _takes_query_lengths():
        return None
    if not all(_is_padding(node.inputs[3], mask) for node in nodes):
        return None
    found: set[ir.Value] = set()
    seen: set[ir.Value] = set()
    front = [value for value in graph.outputs if value.producer() not in nodes]
    for node in nodes:
        front += [value for value in node.inputs[:3] if value is not None]
    while front:
        value = front.pop()
        if value in seen:
            continue
        seen.add(value)
        if value in pasts:
            return None
        if _are_places(value, mask):
            found.add(value)
            continue
        maker = value.producer()
        if maker is not None and maker not in nodes:
            front += [v for v in maker.inputs if v is not None]
    return found


def _takes_query_lengths() -> bool:
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    if not hasattr(state, "get_all_operator_schema"):
        return False
    schemas = state.get_all_operator_schema()
    return any(s.name == "GroupQueryAttention" and len(s.inputs) > QUERY_LENGTHS for s in schemas)


def _is_padding(value: ir.Value | None, mask: ir.Value) -> bool:
    """Whether a mask of Attention is that of the padding, spread out over the queries."""
    if value is None or value is mask:
        return value is mask
    node = producer(value, "Cast", "Expand", "Gather", "Identity", "Unsqueeze")
    return node is not None and _is_padding(node.inputs[0], mask)


def _are_places(value: ir.Value, mask: ir.Value) -> bool:
    """Whether a value counts the tokens of each row before every new one."""
    floor = producer(value, "Max")
    less = producer(floor.inputs[0], "Sub") if floor is not None else None
    rows = producer(less.inputs[0], "Gather") if less is not None else None
    count = producer(rows.inputs[0], "CumSum") if rows is not None else None
    return (
        floor is not None
        and _is(floor.inputs[1], 0)
        and less is not None
        and _is(less.inputs[1], 1)
        and rows is not None
        and rows.attributes.get_int("axis", 0) == 1
        and count is not None
        and count.inputs[0] is mask
        and _is(count.inputs[1], 1)
        and not count.attributes.get_int("exclusive", 0)
        and not count.attributes.get_int("reverse", 0)
    )


def _is(value: ir.Value | None, number: int) -> bool:
    if value is None or not is_constant(value) or value.const_value is None:
        return False
    return value.const_value.size == 1 and int(value.const_value.numpy().item()) == number


class Counts:
    """How many tokens there are in each row, from the mask and `COUNTS`: made before all else.

    Attributes:
        last: The place of the last token of each row; int32 [batch].
        total: Tokens of the longest row; int32.
        new: `COUNTS` itself.
    """

    def __init__(self, graph: ir.Graph, generator: Generator, places: set[ir.Value]) -> None:
        inputs = {value.name: value for value in graph.inputs}
        tokens, mask = inputs[generator.tokens], inputs[generator.mask]
        batch, seq = list(tokens.shape or (None, None))
        self._graph = graph
        self._made: list[ir.Node] = []
        self.new = ir.Value(
            name=COUNTS, type=ir.TensorType(ir.DataType.INT32), shape=ir.Shape([batch])
        )
        graph.inputs.append(self.new)
        held = self._op("ReduceSum", [mask, self._stored(1)], [batch], keepdims=0)
        self.last = self._narrow(self._op("Sub", [held, self._stored(1)], [batch]))
        longest = self._op("Shape", [mask], [1], start=1, end=2)
        self.total = self._narrow(self._op("Squeeze", [longest], []))
        if places:
            new = self._op("Cast", [self.new], [batch], to=ir.DataType.INT64.value)
            before = self._op("Sub", [held, new], [batch])
            before = self._op("Unsqueeze", [before, self._stored(1)], [batch, 1])
            width = self._op("Shape", [tokens], [1], start=1, end=2)
            width = self._op("Squeeze", [width], [])
            zero, one = self._stored(0, scalar=True), self._stored(1, scalar=True)
            ahead = self._op("Range", [zero, width, one], [seq])
            own = self._op("Add", [before, ahead], [batch, seq])
            # Padding at the right may lie beyond the last place; any will do.
            own = self._op("Min", [own, self._stored(generator.context - 1)], [batch, seq])
        graph.insert_before(graph[0], self._made)
        for value in places:
            replace_value(value, own)

    def _op(
        self, op_type: str, inputs: list[ir.Value], shape: list[Any], **attributes: int
    ) -> ir.Value:
        node = ir.node(op_type, inputs, attributes)
        value = node.outputs[0]
        value.name = f"cache.ragged.{len(self._made)}"
        value.dtype, value.shape = ir.DataType.INT64, ir.Shape(shape)
        self._made.append(node)
        return value

    def _narrow(self, value: ir.Value) -> ir.Value:
        made = self._op("Cast", [value], list(value.shape or ()), to=ir.DataType.INT32.value)
        made.dtype = ir.DataType.INT32
        return made

    def _stored(self, number: int, *, scalar: bool = False) -> ir.Value:
        content = np.array(number if scalar else [number], np.int64)
        name = f"cache.int64({number})" if scalar else f"cache.int64([{number}])"
        return self._graph.initializers.get(name) or initializer(self._graph, content, name)
