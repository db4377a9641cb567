"""Turn a decoder that takes whole sequences into one that continues them from a KV cache."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from trivium.compiler.passing import Pass, attribute, decline, initializer, option
from trivium.compiler.types import Preserves
from trivium.passes.analyse_sequence import analyse
from trivium.passes.infer_shapes import InferShapes
from trivium.passes.positionwise import ELEMENTWISE
from trivium.passes.sequence import Kind, NotUnderstood, Sequence, rank

GROWING, STATIC = "growing", "static"
LAST, ALL, CHOSEN = "last", "all", "chosen"

POSITIONS = "logits_positions"
"""The input that says which of the new positions are wanted."""


@dataclass(frozen=True)
class InsertKVCache(Pass):
    """Give every causal Attention a cache, so that only new tokens need to be fed.

    The graph then serves prefill (an empty cache) and decode (one token at a time) alike. Its
    token inputs hold the new tokens; an attention mask spans cache and new tokens together. For
    each Attention there are inputs ``past_key.<i>`` and ``past_value.<i>``, float
    [batch, kv_heads, past, head_dim], and outputs ``present_key.<i>`` and ``present_value.<i>``:

    - ``growing``: the cache holds what has been seen, and the new entries are appended;
    - ``static``: buffers of a fixed ``capacity`` in which TensorScatter writes the new entries
      from ``cache_position`` (int64 [1]) on. The mask has ``capacity`` columns, zero from the
      last new token on.

    Outputs that have an entry for each token keep those of the last one, of all, or of the
    positions among the new ones that ``logits_positions`` (int64 [chosen]) names; the vocabulary
    projection is computed for those alone.

    Left alone: a graph with a node that mixes positions in a way that is not understood, or that
    has a cache; attention that is not causal.
    """

    name: ClassVar[str] = "insert-kv-cache"
    preserves: ClassVar[Preserves] = "numeric"

    form: str = option(
        GROWING, "Caches that grow by concatenation, or static buffers", choices=(GROWING, STATIC)
    )
    outputs: str = option(
        LAST,
        "Positions of the outputs: the last one, all new ones, or those that an input chooses",
        choices=(LAST, ALL, CHOSEN),
    )

    def run(self, model: ir.Model) -> bool:
        try:
            sequence = analyse(model.graph)
        except NotUnderstood as problem:
            return decline(problem.node, problem.reason)
        if sequence is None:
            return False
        results = list(model.graph.outputs)
        rewrite = _Rewrite(model.graph, sequence, static=self.form == STATIC)
        rewrite.run()
        if self.outputs != ALL:
            rewrite.choose(self.outputs)
            for value in results:
                rewrite.keep_chosen(value)
        common.RemoveUnusedNodesPass()(model)
        model.graph.sort()
        InferShapes()(model)
        return True


class _Rewrite:
    """One rewriting: the graph, its analysis, and the values that the caches share.

    Attributes:
        start, new, total: Tokens before the new ones, new ones, and in all; int64 [1].
        slots: Places of the new tokens in the whole sequence; int64 [seq].
    """

    def __init__(self, graph: ir.Graph, sequence: Sequence, *, static: bool) -> None:
        self.graph, self.sequence, self.static = graph, sequence, static
        self.past = "capacity" if static else "past"
        self.whole = "capacity" if static else "total"
        self.tokens = next(v for v in graph.inputs if sequence.kind(v) is Kind.TOKEN)
        self.count: int | str = 1
        self._totals: dict[ir.Value, ir.Value] = {}
        self._rows: dict[tuple[ir.Value, int], ir.Value] = {}
        self._lengths_of_new: dict[ir.Value, ir.Value] = {}
        self._names = {value.name or "" for value in graph.inputs} | set(graph.initializers)
        for node in graph:
            self._names |= {node.name or ""} | {value.name or "" for value in node.outputs}

    def run(self) -> None:
        nodes = list(self.graph)
        caches = [self._caches(index, node) for index, node in enumerate(self.sequence.attentions)]
        self._lengths(caches[0][0])
        cached = set(self.sequence.attentions)
        for node in nodes:
            if self.sequence.kind(node.outputs[0]) is Kind.TOKEN and node not in cached:
                self._take_rows(node)
        for index, (node, (key, value)) in enumerate(
            zip(self.sequence.attentions, caches, strict=True)
        ):
            self._attend(index, node, key, value)
        for value in self.sequence.total_inputs:  # last: their axes are read until here
            value.shape = self._shape(value, self.whole)

    # New inputs, and how many tokens there are.

    def _input(self, name: str, dtype: ir.DataType, shape: Iterable[Any]) -> ir.Value:
        value = ir.Value(name=self._unique(name), type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.graph.inputs.append(value)
        return value

    def _caches(self, index: int, node: ir.Node) -> tuple[ir.Value, ir.Value]:
        batch, _, _ = _heads(node, 0)
        made = []
        for place, name in ((1, "past_key"), (2, "past_value")):
            _, heads, size = _heads(node, place)
            dtype = self.sequence.dtype(node.inputs[place])
            made.append(self._input(f"{name}.{index}", dtype, [batch, heads, self.past, size]))
        return made[0], made[1]

    def _lengths(self, cache: ir.Value) -> None:
        axis = self.sequence.axes(self.tokens)[0]
        held = self._op("Shape", [cache], "cache.held", start=2, end=3)
        self.new = self._op("Shape", [self.tokens], "cache.new", start=axis, end=axis + 1)
        if self.static:
            self.start = self._input("cache_position", ir.DataType.INT64, [1])
            self.total = held
        else:
            self.start = held
            self.total = self._op("Add", [held, self.new], "cache.total")
        count = self._op("Squeeze", [self.new], "cache.count")
        ahead = self._op("Range", [self._constant(0), count, self._constant(1)], "cache.ahead")
        ahead.type = ir.TensorType(ir.DataType.INT64)
        ahead.shape = ir.Shape([self.sequence.symbol])
        self.slots = self._op("Add", [ahead, self.start], "cache.slots")
        self.batch = self._op("Shape", [self.tokens], "cache.batch", start=0, end=1)

    # Values of the whole sequence, and their rows for the new tokens.

    def _total(self, value: ir.Value) -> ir.Value:
        """The value as it is for the whole sequence, cached tokens included."""
        node = value.producer()
        if self.sequence.kind(value) is Kind.STATIC or node is None:
            return value
        if value not in self._totals:
            if node.op_type == "Shape":
                self._totals[value] = self._sized(node, self.total, "total")
            else:
                inputs = [self._total(v) if v is not None else None for v in node.inputs]
                for before, after in self._copy(node, inputs, "total"):
                    after.shape, after.type = self._shape(before, self.whole), before.type
                    self._totals[before] = after
        return self._totals[value]

    def _length(self, value: ir.Value) -> ir.Value:
        """A length as it is for the new tokens alone."""
        node = value.producer()
        if self.sequence.kind(value) is not Kind.LENGTH or node is None:
            return value
        if value not in self._lengths_of_new:
            if node.op_type == "Shape":
                self._lengths_of_new[value] = self._sized(node, self.new, "new")
            else:
                inputs = [self._length(v) if v is not None else None for v in node.inputs]
                for before, after in self._copy(node, inputs, "new"):
                    after.shape, after.type = before.shape, before.type
                    self._lengths_of_new[before] = after
        return self._lengths_of_new[value]

    def _sized(self, node: ir.Node, length: ir.Value, suffix: str) -> ir.Value:
        """What a Shape says when its sequence axes are as long as ``length``."""
        x, name = node.inputs[0], f"{node.name}.{suffix}"
        along, axes = self.sequence.axes(x), range(rank(x))
        start, end = attribute(node, "start", 0), attribute(node, "end", rank(x))
        source = self._total(x) if x is not None and self.sequence.kind(x) is Kind.TOTAL else x
        parts = [
            length if axis in along else self._op("Shape", [source], name, start=axis, end=axis + 1)
            for axis in axes[start:end]
        ]
        return parts[0] if len(parts) == 1 else self._op("Concat", parts, name, axis=0)

    def _rows_of(self, value: ir.Value, axis: int) -> ir.Value:
        """The entries of a total value along ``axis`` that belong to the new tokens."""
        key = (value, axis)
        if key not in self._rows:
            node = value.producer()
            if node is not None and self._follows_by_rows(node, axis):
                inputs = [self._rows_or_total(v) for v in node.inputs]
                ((_, rows),) = self._copy(node, inputs, "rows")
            else:
                name = f"{value.name}.rows"
                rows = self._op("Gather", [self._total(value), self.slots], name, axis=axis)
            rows.shape, rows.type = self._shape(value, self.whole, keep=axis), value.type
            self._rows[key] = rows
        return self._rows[key]

    def _follows_by_rows(self, node: ir.Node, axis: int) -> bool:
        """Whether the rows of a node's output can be computed from the rows of its inputs."""
        output, sequence = node.outputs[0], self.sequence
        if len(node.outputs) > 1 or sequence.axes(output) != [axis]:
            return False
        if node.op_type == "Gather":
            table, places = node.inputs
            return sequence.kind(table) is Kind.STATIC and sequence.axes(places) == [axis]
        return node.op_type in ELEMENTWISE and all(
            not sequence.axes(v) or (sequence.axes(v) == [axis] and rank(v) == rank(output))
            for v in node.inputs
        )

    def _rows_or_total(self, value: ir.Value | None) -> ir.Value | None:
        if value is None or self.sequence.kind(value) is Kind.STATIC:
            return value
        axis = self.sequence.axis(value)
        return self._total(value) if axis is None else self._rows_of(value, axis)

    def _take_rows(self, node: ir.Node) -> None:
        """Let a node of the new tokens read the new rows of what spans the whole sequence."""
        for index, value in enumerate(node.inputs):
            if value is not None and self.sequence.kind(value) is Kind.TOTAL:
                node.replace_input_with(index, self._rows_or_total(value))
            elif value is not None and self.sequence.kind(value) is Kind.LENGTH:
                node.replace_input_with(index, self._length(value))

    # Attention.

    def _attend(self, index: int, node: ir.Node, past_key: ir.Value, past_value: ir.Value) -> None:
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        if mask is not None and self.sequence.kind(mask) is Kind.TOTAL:
            query_axis = rank(mask) - 2
            by_query = query_axis in self.sequence.axes(mask)
            mask = self._rows_of(mask, query_axis) if by_query else self._total(mask)
        attend = self._attend_static if self.static else self._attend_growing
        for name, present, past in zip(
            ("key", "value"),
            attend(node, mask, past_key, past_value),
            (past_key, past_value),
            strict=True,
        ):
            present.name = self._unique(f"present_{name}.{index}")
            dims = list(past.shape or ())
            present.shape, present.type = ir.Shape([*dims[:2], self.whole, dims[3]]), past.type
            self.graph.outputs.append(present)

    def _attend_growing(
        self, node: ir.Node, mask: ir.Value | None, past_key: ir.Value, past_value: ir.Value
    ) -> tuple[ir.Value, ir.Value]:
        inputs = [*node.inputs[:3], mask, past_key, past_value]
        cached = ir.Node(
            "", "Attention", inputs, node.attributes.values(), num_outputs=3, name=node.name
        )
        self._replace(node, cached)
        return cached.outputs[1], cached.outputs[2]

    def _attend_static(
        self, node: ir.Node, mask: ir.Value | None, past_key: ir.Value, past_value: ir.Value
    ) -> tuple[ir.Value, ir.Value]:
        name = node.name or "Attention"
        query, key, value = (self._by_head(node, place) for place in range(3))
        where = self._op("Expand", [self.start, self.batch], f"{name}.write")
        keys = self._op("TensorScatter", [past_key, key, where], f"{name}.keys", axis=2)
        values = self._op("TensorScatter", [past_value, value, where], f"{name}.values", axis=2)
        end = self._op("Add", [self.start, self.new], f"{name}.end")
        held = self._op("Expand", [end, self.batch], f"{name}.held")
        kept = [a for n, a in node.attributes.items() if n not in ("q_num_heads", "kv_num_heads")]
        inputs = [query, keys, values, mask, None, None, held]
        cached = ir.Node("", "Attention", inputs, kept, name=name)
        if rank(node.outputs[0]) == 4:
            self._replace(node, cached)
            return keys, values
        cached.outputs[0].name = self._unique(f"{name}.by_head")
        self.graph.append(cached)
        rows = self._op("Transpose", [cached.outputs[0]], f"{name}.by_token", perm=[0, 2, 1, 3])
        merged = [rows, self._constant([0, 0, -1])]
        self._replace(node, ir.Node("", "Reshape", merged, name=self._unique(f"{name}.merged")))
        return keys, values

    def _by_head(self, node: ir.Node, place: int) -> ir.Value | None:
        """A query, key or value as [batch, heads, seq, size]."""
        value = node.inputs[place]
        if rank(value) == 4:
            return value
        name = f"{node.name}.{('query', 'key', 'value')[place]}"
        _, heads, _ = _heads(node, place)
        split = self._op("Reshape", [value, self._constant([0, 0, heads, -1])], f"{name}.split")
        return self._op("Transpose", [split], f"{name}.by_head", perm=[0, 2, 1, 3])

    # Outputs.

    def choose(self, which: str) -> None:
        """Decide which positions the outputs keep; the last one, or those an input names."""
        if which == LAST:
            self.chosen, self.count = self._constant([-1]), 1
        else:
            self.chosen = self._input(POSITIONS, ir.DataType.INT64, ["chosen"])
            self.count = "chosen"

    def keep_chosen(self, output: ir.Value) -> None:
        """Compute a graph output for the chosen positions only, from as early as possible on."""
        sequence = self.sequence
        if sequence.kind(output) is not Kind.TOKEN or not sequence.axes(output):
            return
        if output.producer() is None:
            return
        chain = [output]
        while (before := _only_token(sequence, chain[-1])) is not None:
            chain.append(before)
        source = chain[-1]
        axis = sequence.axes(source)[0]
        last = self._op("Gather", [source, self.chosen], "last", axis=axis)
        last.type, last.shape = source.type, self._cut(source)
        if source is output:
            last.name, source.name = source.name, self._unique(f"{source.name}.all")
            self.graph.outputs[self.graph.outputs.index(source)] = last
            return
        reader = chain[-2].producer()
        assert reader is not None
        reader.replace_input_with(list(reader.inputs).index(source), last)
        for value in chain[:-1]:
            value.shape = self._cut(value)

    def _cut(self, value: ir.Value) -> ir.Shape:
        axes = self.sequence.axes(value)
        dims = enumerate(value.shape or ())
        return ir.Shape([self.count if axis in axes else dim for axis, dim in dims])

    # Graph edits.

    def _op(
        self, op_type: str, inputs: Iterable[ir.Value | None], name: str, **attributes: Any
    ) -> ir.Value:
        node = ir.node(op_type, list(inputs), attributes, name=self._unique(name))
        node.outputs[0].name = self._unique(f"{name}.out")
        self.graph.append(node)
        return node.outputs[0]

    def _copy(
        self, node: ir.Node, inputs: Iterable[ir.Value | None], suffix: str
    ) -> list[tuple[ir.Value, ir.Value]]:
        """Add a copy of a node that reads ``inputs``; return (old, new) outputs."""
        copy = ir.Node(
            node.domain,
            node.op_type,
            list(inputs),
            node.attributes.values(),
            num_outputs=len(node.outputs),
            name=self._unique(f"{node.name}.{suffix}"),
        )
        for before, after in zip(node.outputs, copy.outputs, strict=True):
            after.name = self._unique(f"{before.name}.{suffix}")
        self.graph.append(copy)
        return list(zip(node.outputs, copy.outputs, strict=True))

    def _replace(self, node: ir.Node, new: ir.Node) -> None:
        """Let the readers of a node's first output read that of a new node, name and all."""
        before, after = node.outputs[0], new.outputs[0]
        after.shape, after.type, after.name = before.shape, before.type, before.name
        before.name = None
        for extra in new.outputs[1:]:
            extra.name = self._unique(f"{after.name}.cache")
        self.graph.append(new)
        before.replace_all_uses_with(after, replace_graph_outputs=True)
        self.sequence.kinds[after] = Kind.TOKEN

    def _constant(self, content: list[Any] | int) -> ir.Value:
        name = f"int64({content})".replace(" ", "")
        found = self.graph.initializers.get(name)
        return found or initializer(self.graph, np.array(content, np.int64), name)

    def _unique(self, name: str) -> str:
        unique, index = name, 1
        while unique in self._names:
            unique, index = f"{name}_{index}", index + 1
        self._names.add(unique)
        return unique

    def _shape(self, value: ir.Value, length: str, keep: int | None = None) -> ir.Shape | None:
        """The shape of a total value, its sequence axes renamed but for ``keep``."""
        if value.shape is None:
            return None
        axes = [axis for axis in self.sequence.axes(value) if axis != keep]
        return ir.Shape([length if axis in axes else dim for axis, dim in enumerate(value.shape)])


def _heads(node: ir.Node, place: int) -> tuple[Any, Any, Any]:
    """Batch, heads and size of a head of the queries, keys or values of an Attention."""
    value = node.inputs[place]
    dims = list(value.shape or ()) if value is not None else []
    if len(dims) == 4:
        return dims[0], dims[1], dims[3]
    heads = attribute(node, "q_num_heads" if place == 0 else "kv_num_heads")
    return dims[0], heads, dims[2] // heads if isinstance(dims[2], int) else None


def _only_token(sequence: Sequence, value: ir.Value) -> ir.Value | None:
    """The value of the tokens that alone makes ``value``, if that has one reader."""
    node = value.producer()
    readers = len(value.uses()) + value.is_graph_output()
    if node is None or readers > 1 or len(node.outputs) > 1:
        return None
    if node.op_type in ("Attention", "Reshape"):  # whose other inputs hold the length
        return None
    along = [v for v in node.inputs if v is not None and sequence.axes(v)]
    if len(along) != 1 or sequence.kind(along[0]) is not Kind.TOKEN:
        return None
    return along[0] if along[0].producer() is not None else None
