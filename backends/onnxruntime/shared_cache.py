"""From caches that grow by a copy at every step to buffers that the engine writes in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from trivium.backends.onnxruntime import ragged_cache
from trivium.compiler.generator import Generator
from trivium.compiler.passing import attribute, dims, initializer, is_op
from trivium.compiler.passing import replace as replace_value

DOMAIN = "com.microsoft"
CAPACITY = "capacity"
BIAS = 10
"""The input of GroupQueryAttention that is added to its scores."""

_MASKED = float(np.finfo(np.float32).min) / 2
"""Added to the scores of slots that do not count; a sum of two of them would be infinite."""

_WIDTH = 8
"""What the width of a head has to be a multiple of."""


def share_caches(model: ir.Model, generator: Generator) -> Generator:
    """Rewrite Attention with a growing cache to GroupQueryAttention over shared buffers, in place.

    Its caches have room for all tokens and are both input and output, so that a step writes one
    token where Attention copies everything before it. Where masks tell padding alone, rows have
    ends of their own (the form ``ragged``); otherwise they share their slots, and masks stay what
    they are, as a bias.

    Returns:
        How to drive the result; the generator as it is where the caches are used in a way that
        GroupQueryAttention lacks.
    """
    graph = model.graph
    inputs = {value.name: value for value in graph.inputs}
    pasts = [inputs[cache.past] for cache in generator.caches]
    nodes = _attentions(pasts)
    widths = [cache.shape[-1] for cache in generator.caches]
    if generator.form != "growing" or generator.mask is None or nodes is None:
        return generator
    if any(not isinstance(width, int) or width % _WIDTH for width in widths):
        return generator
    # `RaggedDecoder` feeds tokens and nothing else.
    plain = generator.sight is None and generator.source is None
    places = ragged_cache.places(graph, generator, nodes) if plain else None
    if places is not None:
        own = ragged_cache.Counts(graph, generator, places)
        for node in nodes:
            _group(graph, node, own.last, own.total, {ragged_cache.QUERY_LENGTHS: own.new})
        RemoveUnusedNodesPass()(model)
        return _with_room(model, replace(generator, form="ragged", counts=ragged_cache.COUNTS))
    counts = _Counts(graph, inputs[generator.tokens], inputs[generator.mask])
    for past in pasts:
        for node, _ in list(past.uses()):
            if is_op(node, "Shape"):
                replace_value(node.outputs[0], counts.held)
                graph.remove(node, safe=True)
    biases: dict[ir.Value, ir.Value] = {}
    for node in nodes:
        mask = node.inputs[3]
        assert mask is not None
        if mask not in biases:
            biases[mask] = _bias(graph, node, mask)
        _group(graph, node, counts.last, counts.total, {BIAS: biases[mask]})
    return _with_room(model, replace(generator, form="shared"))


def _with_room(model: ir.Model, generator: Generator) -> Generator:
    """Let the caches have a capacity of their own."""
    model.opset_imports[DOMAIN] = 1
    values = {value.name: value for value in (*model.graph.inputs, *model.graph.outputs)}
    for cache in generator.caches:
        for value in (values[cache.past], values[cache.present]):
            assert value.shape is not None
            sizes: list[int | ir.SymbolicDim] = list(value.shape)
            sizes[cache.length_axis] = ir.SymbolicDim(CAPACITY)
            value.shape = ir.Shape(sizes)
    caches = tuple(
        replace(
            cache,
            shape=tuple(
                CAPACITY if i == cache.length_axis else d for i, d in enumerate(cache.shape)
            ),
        )
        for cache in generator.caches
    )
    return replace(generator, caches=caches)


def _attentions(pasts: list[ir.Value]) -> list[ir.Node] | None:
    """The nodes that read the caches, if all of them can be rewritten."""
    found: dict[ir.Node, None] = {}
    for past in pasts:
        for node, index in past.uses():
            if is_op(node, "Shape"):
                if (attribute(node, "start", 0), attribute(node, "end")) != (2, 3):
                    return None
            elif is_op(node, "Attention") and index in (4, 5) and _fits(node):
                found[node] = None
            else:
                return None
    return list(found)


def _fits(node: ir.Node) -> bool:
    q, mask = node.inputs[0], node.inputs[3]
    shape, query = dims(mask), dims(q)
    return (
        attribute(node, "is_causal", 0) == 1
        and attribute(node, "qk_matmul_output_mode", 0) == 0
        and len(node.outputs) == 3
        and not any(value is not None for value in node.inputs[6:])
        and mask is not None
        and mask.dtype == ir.DataType.BOOL
        and shape is not None
        and len(shape) == 4
        and shape[1] == 1
        and query is not None
        and len(query) == 3
        and q is not None
        and q.dtype == ir.DataType.FLOAT
    )


class _Counts:
    """How many tokens there are, from the shapes of the inputs: made once, before all else."""

    def __init__(self, graph: ir.Graph, tokens: ir.Value, mask: ir.Value) -> None:
        def make(op_type: str, inputs: list[ir.Value], **attributes: int) -> ir.Value:
            node = ir.node(op_type, inputs, attributes)
            node.outputs[0].name = f"cache.shared.{len(self._made)}"
            self._made.append(node)
            return node.outputs[0]

        def stored(value: int, dtype: type[np.signedinteger]) -> ir.Value:
            return initializer(graph, np.array([value], dtype), f"cache.{value}.{dtype.__name__}")

        self._made: list[ir.Node] = []
        rows = make("Shape", [tokens], start=0, end=1)
        new = make("Shape", [tokens], start=1, end=2)
        total = make("Shape", [mask], start=1, end=2)
        self.held = make("Sub", [total, new])
        narrow = make("Cast", [total], to=ir.DataType.INT32.value)
        self.total = make("Squeeze", [narrow])
        last = make("Sub", [narrow, stored(1, np.int32)])
        self.last = make("Expand", [last, rows])
        for value, dtype, shape in (
            (self.held, ir.DataType.INT64, [1]),
            (self.total, ir.DataType.INT32, []),
            (self.last, ir.DataType.INT32, [tokens.shape[0] if tokens.shape else None]),
        ):
            value.dtype, value.shape = dtype, ir.Shape(shape)
        graph.insert_before(graph[0], self._made)


def _bias(graph: ir.Graph, node: ir.Node, mask: ir.Value) -> ir.Value:
    zero = initializer(graph, np.array(0, np.float32), "cache.counts")
    masked = initializer(graph, np.array(_MASKED, np.float32), "cache.masked")
    where = ir.node("Where", [mask, zero, masked])
    value = where.outputs[0]
    value.name, value.dtype, value.shape = f"{mask.name}.bias", ir.DataType.FLOAT, mask.shape
    graph.insert_before(node, [where])
    return value


def _group(
    graph: ir.Graph,
    node: ir.Node,
    last: ir.Value,
    total: ir.Value,
    others: Mapping[int, ir.Value],
) -> None:
    q, k, v, _, past_key, past_value = node.inputs[:6]
    options = {
        "num_heads": attribute(node, "q_num_heads"),
        "kv_num_heads": attribute(node, "kv_num_heads"),
    }
    for name in ("scale", "softcap"):
        if attribute(node, name):
            options[name] = float(attribute(node, name))
    inputs = [q, k, v, past_key, past_value, last, total]
    inputs += [others.get(place) for place in range(len(inputs), max(others) + 1)]
    made = ir.node(
        "GroupQueryAttention", inputs, options, domain=DOMAIN, num_outputs=3, name=node.name
    )
    graph.insert_before(node, [made])
    for before, after in zip(node.outputs, made.outputs, strict=True):
        replace_value(before, after)
    graph.remove(node, safe=True)
