"""Whole transformers as the kernels of one layer, repeated: what end-to-end tables are scored on.

The layer is an ONNX graph without weights' content, so that the kernels come out of the same code
as for a model that is compiled. `Shape` says what is in a layer, `kernels` how often it runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto
from onnx import helper as oh

from trivium.compiler.kernels import Fused, Kernel, kernels_of

DTYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "int8": TensorProto.FLOAT16,
    "float8": TensorProto.FLOAT16,
}
NARROW = {"int8": TensorProto.INT8, "float8": TensorProto.FLOAT8E4M3FN}


@dataclass(frozen=True)
class Shape:
    """A transformer.

    Attributes:
        gated: Whether the feed-forward part has a gate (SwiGLU).
        parallel: Whether attention and feed-forward read the same norm (GPT-J, Falcon).
        vocabulary: Columns of the last product; 0 without one.
        flash: Whether attention is one kernel; else products, softmax and their elementwise parts.
        gelu: Elementwise operators of the activation when they are not fused into one.
        split: Chips that share each layer's weights (tensor parallelism).
    """

    layers: int
    width: int
    heads: int
    inner: int
    kv_heads: int | None = None
    gated: bool = False
    parallel: bool = False
    vocabulary: int = 0
    causal: bool = True
    flash: bool = True
    gelu: int = 1
    split: int = 1

    @property
    def parameters(self) -> float:
        """Of all layers and the last product."""
        head = self.width // self.heads
        attention = 2.0 * self.width * head * (self.heads + (self.kv_heads or self.heads))
        feed = (3.0 if self.gated else 2.0) * self.width * self.inner
        return self.layers * (attention + feed) + self.width * self.vocabulary

    def cache_bytes(self, width: float = 2.0) -> float:
        """Of one token in one sequence."""
        kv_heads = self.kv_heads or self.heads
        return 2.0 * self.layers * kv_heads * (self.width // self.heads) * width


class _Builder:
    """Nodes of a layer; weights are inputs until the graph is done."""

    def __init__(self, dtype: str) -> None:
        self.dtype, self.narrow = DTYPES[dtype], NARROW.get(dtype)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, tuple[int, list[int]]] = {}
        self.quantized: dict[str, str] = {}
        if self.narrow is not None:
            self.weights["scale"] = (self.dtype, [])
            self.weights["zero"] = (self.narrow, [])

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(oh.make_node(kind, list(inputs), [name], **attributes))
        return name

    def _narrowed(self, x: str) -> str:
        if x not in self.quantized:
            q = self.op("QuantizeLinear", x, "scale", "zero")
            self.quantized[x] = self.op("DequantizeLinear", q, "scale", "zero")
        return self.quantized[x]

    def linear(self, x: str, inside: int, outside: int, bias: bool = True) -> str:
        weight = f"w{len(self.weights)}"
        self.weights[weight] = (self.narrow or self.dtype, [inside, outside])
        right = weight
        if self.narrow is not None:
            x, right = self._narrowed(x), self.op("DequantizeLinear", weight, "scale", "zero")
        product = self.op("MatMul", x, right)
        return self.op("Add", product, self.vector(outside)) if bias else product

    def vector(self, size: int) -> str:
        name = f"w{len(self.weights)}"
        self.weights[name] = (self.dtype, [size])
        return name

    def norm(self, x: str, width: int) -> str:
        return self.op("LayerNormalization", x, self.vector(width), self.vector(width))


def _attention(b: _Builder, s: Shape, q: str, k: str, v: str, batch: int, queries: int) -> str:
    heads, kv = s.heads // s.split, max((s.kv_heads or s.heads) // s.split, 1)
    if s.flash:
        attributes: dict[str, Any] = {
            "q_num_heads": heads,
            "kv_num_heads": kv,
            "is_causal": int(s.causal),
        }
        inputs = [q, k, v, "", "past_key", "past_value"] if queries == 1 else [q, k, v]
        outputs = [f"v{len(b.nodes)}"]
        if queries == 1:
            outputs += ["present_key", "present_value"]
        b.nodes.append(oh.make_node("Attention", inputs, outputs, **attributes))
        return outputs[0]
    split = [
        b.op("Transpose", f"{name}_4d", perm=perm)
        for name, perm in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3]))
    ]
    scores = b.op("Mul", b.op("MatMul", split[0], split[1]), "scalar")
    if s.causal:
        scores = b.op("Where", "mask", scores, "scalar")
    scores = b.op("Add", scores, "bias")
    mixed = b.op("MatMul", b.op("Softmax", scores, axis=-1), split[2])
    return b.op("Transpose", mixed, perm=[0, 2, 1, 3])


@cache
def layer(s: Shape, batch: int, queries: int, past: int, dtype: str) -> ir.Model:
    """One layer as a graph: [batch, queries, width] to the same."""
    b = _Builder(dtype)
    head = s.width // s.heads
    wide = s.width // s.split
    kv_wide = max((s.kv_heads or s.heads) // s.split, 1) * head
    x = "x"
    normed = b.norm(x, s.width)
    q, k, v = (b.linear(normed, s.width, size) for size in (wide, kv_wide, kv_wide))
    inputs = [oh.make_tensor_value_info("x", b.dtype, [batch, queries, s.width])]
    outputs: list[str] = []
    if not s.flash:
        # Views of what the projections made: reshaping moves nothing.
        four = [batch, queries, s.heads // s.split, head]
        scores = [batch, s.heads // s.split, queries, queries]
        inputs += [oh.make_tensor_value_info(f"{name}_4d", b.dtype, four) for name in "qkv"]
        inputs.append(oh.make_tensor_value_info("scalar", b.dtype, []))
        inputs.append(oh.make_tensor_value_info("bias", b.dtype, [batch, 1, 1, queries]))
        inputs.append(oh.make_tensor_value_info("mask", TensorProto.BOOL, [1, 1, *scores[2:]]))
        outputs += [q, k, v]
    elif queries == 1:
        cached = [batch, kv_wide // head, past, head]
        for name in ("past_key", "past_value"):
            inputs.append(oh.make_tensor_value_info(name, b.dtype, cached))
    mixed = _attention(b, s, q, k, v, batch, queries)
    if not s.flash:
        flat = [batch, queries, wide]
        inputs.append(oh.make_tensor_value_info("mixed", b.dtype, flat))
        outputs.append(mixed)
        mixed = "mixed"
    attended = b.linear(mixed, wide, s.width)
    residual = x if s.parallel else b.op("Add", attended, x)
    fed = normed if s.parallel else b.norm(residual, s.width)
    inner = s.inner // s.split
    up = b.linear(fed, s.width, inner, bias=not s.gated)
    if s.gated:
        gate = b.op("Sigmoid", b.linear(fed, s.width, inner, bias=False))
        up = b.op("Mul", gate, up)
    else:
        for _ in range(s.gelu - 1):
            up = b.op("Mul", up, up)
        up = b.op("Gelu", up)
    down = b.op("Add", b.linear(up, inner, s.width, bias=not s.gated), residual)
    result = b.op("Add", down, attended) if s.parallel else down
    return _finished(b, inputs, [result, *outputs])


def _finished(b: _Builder, inputs: list[onnx.ValueInfoProto], outputs: list[str]) -> ir.Model:
    infos = [oh.make_tensor_value_info(n, kind, dims) for n, (kind, dims) in b.weights.items()]
    results = [oh.make_empty_tensor_value_info(name) for name in outputs]
    graph = oh.make_graph(b.nodes, "layer", [*inputs, *infos], results)
    proto = oh.make_model(graph, opset_imports=[oh.make_opsetid("", 24)])
    model = ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(proto, strict_mode=True))
    for value in list(model.graph.inputs):
        if value.name in b.weights:
            shape = tuple(int(dim) for dim in value.shape or () if isinstance(dim, int))
            assert value.dtype is not None
            zero = np.zeros((), value.dtype.numpy())
            value.const_value = ir.Tensor(np.broadcast_to(zero, shape), dtype=value.dtype)
            model.graph.inputs.remove(value)
            model.graph.initializers.add(value)
    return model


@cache
def head(s: Shape, rows: int, dtype: str) -> ir.Model:
    """The last product."""
    b = _Builder(dtype)
    inputs = [oh.make_tensor_value_info("x", b.dtype, [rows, s.width])]
    return _finished(b, inputs, [b.linear("x", s.width, s.vocabulary // s.split, bias=False)])


def kernels(
    s: Shape, fused: Fused, *, batch: int, queries: int, past: int = 0, dtype: str = "float16"
) -> list[Kernel]:
    """All kernels of one call."""
    found = _times(kernels_of(layer(s, batch, queries, past, dtype).graph, fused), s.layers)
    if s.vocabulary:
        narrow = "float16" if dtype in NARROW else dtype
        rows = batch * queries if not s.flash else batch
        found += kernels_of(head(s, rows, narrow).graph, fused)
    return found


def _times(found: Iterable[Kernel], count: int) -> list[Kernel]:
    return [replace(kernel, times=kernel.times * count) for kernel in found]
