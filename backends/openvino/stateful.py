"""From a decoder whose caches are inputs and outputs to one whose caches are OpenVINO's variables.

Attention with a cache is taken out of the graph before OpenVINO's frontend reads it, and put back
as what the CPU plugin fuses with the variable that holds the cache (ReadValue, Gather by
``beam_idx``, Concat, Assign, ScaledDotProductAttention): it then appends in place, where the
frontend's own form is pulled apart and copies the cache at every step.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from trivium.backends.openvino import engine
from trivium.compiler import model as models
from trivium.compiler.generator import CacheInfo, Generator
from trivium.compiler.passing import attribute, dims, graph_of, is_op

BEAMS = "beam_idx"
"""The input of the rows that each row goes on from, int32 [rows]; only where attention is fused."""


@dataclass(frozen=True)
class _Attention:
    """One that was taken out, by the names of what it reads and gives.

    Attributes:
        result: The input that stands for its result.
        heads, width: Of the queries: how many, and how wide one is.
        joined: Whether queries, keys and values have their heads side by side ([rows, new,
            heads x width]) and not as an axis of their own.
    """

    query: str
    key: str
    value: str
    mask: str | None
    result: str
    caches: tuple[CacheInfo, CacheInfo]
    heads: int
    width: int
    value_width: int
    scale: float | None
    causal: bool
    joined: bool


def convert(model: ir.Model, generator: Generator) -> Any:
    """Return the `openvino.Model` of a generator, with a variable for each cache, called after it.

    The model that is given is left as it is; its weights pass through a temporary file.
    """
    cut, attentions = _cut(model, generator)
    with tempfile.TemporaryDirectory(prefix="trivium-") as folder:
        path = Path(folder) / "model.onnx"
        models.save(cut, path)
        read = engine.core().read_model(str(path))
        return _Join(read, generator).run(attentions)


def _cut(model: ir.Model, generator: Generator) -> tuple[ir.Model, list[_Attention]]:
    """Take every Attention that can be fused out of a copy of the model.

    What it reads becomes outputs, what it gives an input; its caches are inputs still only where
    something asks for their shape.
    """
    cut = model.clone()
    graph = cut.graph
    pasts = {cache.past: cache for cache in generator.caches}
    shown: dict[ir.Value, str] = {}
    found = [_take_out(node, pasts, shown) for node in list(graph) if _fits(node, pasts)]
    common.RemoveUnusedNodesPass()(cut)
    gone = {cache.past for one in found for cache in one.caches}
    graph.inputs[:] = [v for v in graph.inputs if v.name not in gone or v.uses()]
    return cut, found


def _fits(node: ir.Node, pasts: Mapping[str, CacheInfo]) -> bool:
    """Whether a node is an Attention that OpenVINO has a fused form of, alone with its caches."""
    if not is_op(node, "Attention"):
        return False
    query, _, _, mask, past_key, past_value, held = [*node.inputs, *[None] * 7][:7]
    shape, widths = dims(query), [_width(past_key), _width(past_value)]
    if past_key is None or past_value is None or shape is None or len(node.outputs) != 3:
        return False
    return (
        {past_key.name, past_value.name} <= set(pasts)
        and held is None
        and not attribute(node, "softcap", 0.0)
        and attribute(node, "qk_matmul_output_mode", 0) == 0
        and (mask is None or (mask.dtype == ir.DataType.BOOL and dims(mask) is not None))
        and (len(shape) == 3 or shape[1] is not None)
        and None not in widths
        and all(_only_reader(node, past) for past in (past_key, past_value))
        and not any(present.uses() for present in node.outputs[1:])
    )


def _width(past: ir.Value | None) -> int | None:
    """How wide a head is in a cache [rows, heads, tokens, width]."""
    shape = dims(past)
    return shape[3] if shape is not None and len(shape) == 4 and shape[1] is not None else None


def _only_reader(node: ir.Node, past: ir.Value) -> bool:
    return all(user is node or is_op(user, "Shape") for user, _ in past.uses())


def _take_out(
    node: ir.Node, pasts: Mapping[str, CacheInfo], shown: dict[ir.Value, str]
) -> _Attention:
    query, key, value, mask, past_key, past_value = node.inputs[:6]
    assert query is not None
    assert key is not None
    assert value is not None
    assert past_key is not None
    assert past_value is not None
    graph, (result, *presents) = graph_of(node), node.outputs
    width, value_width, shape = _width(past_key), _width(past_value), dims(query)
    assert width is not None
    assert value_width is not None
    assert shape is not None
    joined = len(shape) == 3
    scale = attribute(node, "scale", 0.0)
    given = ir.Value(name=f"{result.name}.attended", type=result.type, shape=result.shape)
    taken = _Attention(
        query=_show(node, query, shown),
        key=_show(node, key, shown),
        value=_show(node, value, shown),
        mask=_show(node, mask, shown) if mask is not None else None,
        result=given.name or "",
        caches=(pasts[past_key.name or ""], pasts[past_value.name or ""]),
        heads=attribute(node, "q_num_heads") if joined else shape[1] or 0,
        width=width,
        value_width=value_width,
        scale=float(scale) or None,
        causal=attribute(node, "is_causal", 0) == 1,
        joined=joined,
    )
    graph.inputs.append(given)
    for present in presents:
        graph.outputs.remove(present)
    result.replace_all_uses_with(given, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    return taken


def _show(node: ir.Node, value: ir.Value, shown: dict[ir.Value, str]) -> str:
    """Make a value an output of the graph, once; return its name there."""
    if value not in shown:
        copy = ir.node("Identity", [value]).outputs[0]
        copy.name, copy.type, copy.shape = f"{value.name}.shown", value.type, value.shape
        made = copy.producer()
        assert made is not None
        graph = graph_of(node)
        graph.insert_before(node, made)
        graph.outputs.append(copy)
        shown[value] = f"{value.name}.shown"
    return shown[value]


class _Join:
    """Puts attention and its caches back, in OpenVINO's own operators.

    Attributes:
        inputs, results: Those of the graph as it was read, by name.
        rows, new: How many rows and new tokens there are; int64 [1].
    """

    def __init__(self, read: Any, generator: Generator) -> None:
        from openvino import opset15 as op

        self.op, self.read, self.generator = op, read, generator
        self.inputs = {n: p for p in read.get_parameters() for n in p.output(0).get_names()}
        self.results = {n: r for r in read.get_results() for n in r.output(0).get_names()}
        self.sinks: list[Any] = []
        self.beams = op.parameter([-1], np.int32, name=BEAMS)
        self.beams.output(0).set_names({BEAMS})
        tokens = op.shape_of(self.inputs[generator.tokens])
        self.rows, self.new = self._entry(tokens, 0), self._entry(tokens, 1)
        self._biases: dict[tuple[str | None, bool], Any] = {}

    def run(self, attentions: Sequence[_Attention]) -> Any:
        import openvino

        fused = [cache.past for one in attentions for cache in one.caches]
        self.variables = {cache.past: self._variable(cache) for cache in self.generator.caches}
        for name, variable in self.variables.items():
            if name in self.inputs:
                self._replace(self.inputs.pop(name), variable)
        for one in attentions:
            self._replace(self.inputs.pop(one.result), self._attend(one))
        for cache in self.generator.caches:
            if cache.past not in fused:
                # Assign takes a node, and what is to be kept may be one of several outputs.
                after = self.op.convert(self._shown(cache.present), _TYPES[cache.dtype])
                self.sinks.append(self.op.assign(after, cache.past))
        parameters = list(dict.fromkeys(self.inputs.values()))
        if attentions:
            parameters.append(self.beams)
        logits = [self.results[self.generator.logits]]
        model = openvino.Model(logits, self.sinks, parameters, self.read.get_friendly_name())
        model.validate_nodes_and_infer_types()
        return model

    def _constant(self, value: Any) -> Any:
        return self.op.constant(np.array(value, np.int64))

    def _entry(self, shape: Any, index: int) -> Any:
        return self.op.gather(shape, self._constant([index]), self._constant(0))

    @staticmethod
    def _replace(node: Any, after: Any) -> None:
        for reader in node.output(0).get_target_inputs():
            reader.replace_source_output(after.output(0))

    def _variable(self, cache: CacheInfo) -> Any:
        """What a cache holds at the begin of a call; at first nothing, of as many rows as fed."""
        import openvino

        sizes = dict(enumerate(cache.shape)) | {cache.length_axis: 0}
        kind = getattr(openvino.Type, _TYPES[cache.dtype])
        shape = self.op.concat(
            [
                self.rows if axis == cache.batch_axis else self._constant([size])
                for axis, size in sizes.items()
            ],
            0,
        )
        empty = self.op.broadcast(self.op.constant(0, dtype=kind), shape)
        own = (cache.batch_axis, cache.length_axis)
        bounds = [-1 if axis in own else size for axis, size in enumerate(cache.shape)]
        return self.op.read_value(empty, cache.past, kind, openvino.PartialShape(bounds))

    def _attend(self, one: _Attention) -> Any:
        op, (key_cache, value_cache) = self.op, one.caches
        kind = self._shown(one.query).get_element_type()
        query = self._by_head(self._shown(one.query), one.heads, one.width, one.joined)
        key = self._appended(key_cache, one.key, one.width, one)
        value = self._appended(value_cache, one.value, one.value_width, one)
        scale = [] if one.scale is None else [op.constant(one.scale, dtype=kind)]
        bias = self._bias(one, kind)
        attended = op.scaled_dot_product_attention(query, key, value, bias, *scale)
        if not one.joined:
            return attended
        turned = op.transpose(attended, self._constant([0, 2, 1, 3]))
        return op.reshape(turned, self._constant([0, 0, one.heads * one.value_width]), True)

    def _shown(self, name: str) -> Any:
        return self.results[name].input_value(0)

    def _by_head(self, value: Any, heads: int, width: int, joined: bool) -> Any:
        """A query, key or value as [rows, heads, new, width]."""
        if not joined:
            return value
        split = self.op.reshape(value, self._constant([0, 0, heads, width]), True)
        return self.op.transpose(split, self._constant([0, 2, 1, 3]))

    def _appended(self, cache: CacheInfo, name: str, width: int, one: _Attention) -> Any:
        """Keys or values of all tokens, for each of the queries' heads."""
        op, heads = self.op, int(cache.shape[1])
        past = op.gather(self.variables[cache.past], self.beams, self._constant(0))
        new = self._by_head(self._shown(name), heads, width, one.joined)
        whole = op.concat([past, new], 2)
        self.sinks.append(op.assign(whole, cache.past))
        if heads == one.heads:
            return whole
        groups = self._constant([1, 1, one.heads // heads, 1, 1])
        alone = op.unsqueeze(whole, self._constant(2))
        repeated = op.broadcast(alone, groups, broadcast_spec="BIDIRECTIONAL")
        return op.reshape(repeated, self._constant([0, one.heads, -1, width]), True)

    def _bias(self, one: _Attention, kind: Any) -> Any:
        """What is added to scores: nothing where a token counts, very little where it does not."""
        known = (one.mask, one.causal)
        if known not in self._biases:
            op = self.op
            first = self.generator.caches[0]
            past = self._entry(op.shape_of(self.variables[first.past]), first.length_axis)
            total = op.squeeze(op.add(past, self.new))
            columns = op.range(self._constant(0), total, self._constant(1), "i64")
            rows = op.range(op.squeeze(past), total, self._constant(1), "i64")
            seen = op.less_equal(columns, op.unsqueeze(rows, self._constant(1)))
            if not one.causal:
                seen = op.greater_equal(columns, self._constant(0))
            if one.mask is not None:
                seen = op.logical_and(self._shown(one.mask), seen)
            least = _LEAST_HALF if kind.to_string() == "f16" else _LEAST
            zero, masked = op.constant(0, dtype=kind), op.constant(least, dtype=kind)
            self._biases[known] = op.select(seen, zero, masked)
        return self._biases[known]


_LEAST, _LEAST_HALF = -3e38, -65504.0
"""What stands for minus infinity among scores in float32 and bfloat16, and in float16."""

_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
