"""The skeleton that decoder-only language models share: embed, (norm, attend, norm, feed) x layers,
norm, project. An architecture is a `Decoder` value: sizes, options, and the names of its tensors.

The graph takes whole sequences: int64 ``input_ids`` and ``attention_mask`` [batch, seq] to
``logits`` [batch, seq, vocab]. Padding may be on either side: positions count the tokens that the
mask keeps, and a padded key is seen by no query.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx_ir as ir

from trivium.compiler.errors import BadInput
from trivium.models.builder import Builder
from trivium.models.checkpoint import Checkpoint
from trivium.models.rope import Rope


@dataclass(frozen=True)
class Names:
    """What the checkpoint calls its tensors (as in Llama, unless told); ``None``: it has none.

    Those after ``layer`` are relative to it.
    """

    embedding: str = "model.embed_tokens"
    positions: str | None = None
    final_norm: str = "model.norm"
    head: str = "lm_head"
    layer: str = "model.layers"
    attention_norm: str = "input_layernorm"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    query_key_value: str | None = None
    output: str = "self_attn.o_proj"
    after_attention_norm: str | None = None
    mlp_norm: str = "post_attention_layernorm"
    gate: str | None = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    gate_up: str | None = None
    down: str = "mlp.down_proj"
    after_mlp_norm: str | None = None


@dataclass(frozen=True)
class Layer:
    """What may differ from layer to layer.

    Attributes:
        rope: How queries and keys are rotated; None where positions are embedded or absent.
        window: How many keys a query sees, itself the last; None for all before it.
        scale: On the scores, instead of 1 / sqrt(head_dim).
    """

    rope: Rope | None = None
    window: int | None = None
    scale: float | None = None


@dataclass(frozen=True)
class Decoder:
    """A decoder-only architecture.

    Attributes:
        norm: ``rms``; ``rms+1``, whose weight is stored less one (Gemma); or ``layer``.
        linear: Whether weights are stored as [out, in] (Linear) or [in, out] (GPT-2's Conv1D).
        max_positions: Rows of a table of learned positions.
        query_key_norm: Whether queries and keys are normalized head by head (Qwen 3, Gemma 3).
        tied: Whether the output projection is the embedding table.
        softcap, logits_softcap: Bounds c of c * tanh(x / c) on scores and logits.
    """

    name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: tuple[Layer, ...]
    activation: str
    norm_epsilon: float
    names: Names = field(default_factory=Names)
    norm: Literal["rms", "rms+1", "layer"] = "rms"
    linear: bool = True
    max_positions: int = 0
    query_key_value_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    query_key_norm: bool = False
    tied: bool = False
    softcap: float | None = None
    logits_softcap: float | None = None
    embedding_scale: float | None = None


def build(spec: Decoder, checkpoint: Checkpoint) -> ir.Model:
    """Build a decoder; see the module's docstring for its inputs and outputs.

    Raises:
        BadInput: The checkpoint lacks a tensor, or its shape is not what the options imply.
    """
    if spec.heads % spec.kv_heads:
        raise BadInput(
            f"{spec.heads} attention heads cannot share {spec.kv_heads} key/value heads",
            about=checkpoint.config.about,
        )
    return _Build(spec, Builder(spec.name, checkpoint)).model()


class _Build:
    """One build: the specification, the graph so far, and what its layers share."""

    def __init__(self, spec: Decoder, builder: Builder) -> None:
        self.spec, self.names, self.b = spec, spec.names, builder
        self.ids = builder.input("input_ids", ir.DataType.INT64, ("batch", "seq"))
        self.mask = builder.input("attention_mask", ir.DataType.INT64, ("batch", "seq"))
        self.positions = self._positions()
        self._allowed: dict[int | None, ir.Value] = {}

    def model(self) -> ir.Model:
        b, spec, names = self.b, self.spec, self.names
        x = self._embed()
        for index, layer in enumerate(spec.layers):
            prefix = f"{names.layer}.{index}"
            with b.scope(f"layer.{index}.attention"):
                y = self._norm(x, f"{prefix}.{names.attention_norm}")
                y = self._attend(y, prefix, layer)
                if names.after_attention_norm is not None:
                    y = self._norm(y, f"{prefix}.{names.after_attention_norm}")
                x = b.op("Add", x, y)
            with b.scope(f"layer.{index}.mlp"):
                y = self._norm(x, f"{prefix}.{names.mlp_norm}")
                y = self._feed(y, prefix)
                if names.after_mlp_norm is not None:
                    y = self._norm(y, f"{prefix}.{names.after_mlp_norm}")
                x = b.op("Add", x, y)
        with b.scope("head"):
            logits = self._project(self._norm(x, names.final_norm))
        b.output("logits", logits, ("batch", "seq", spec.vocab_size))
        return b.model()

    def _positions(self) -> ir.Value:
        """Each token's place among those that the mask keeps: int64 [batch, seq]."""
        b = self.b
        with b.scope("positions"):
            count = b.op("CumSum", self.mask, b.constant(1))
            place = b.op("Sub", count, b.constant(1))
            # A padded token before the first kept one has no place; any will do.
            return b.op("Max", place, b.constant(0))

    def _embed(self) -> ir.Value:
        b, spec = self.b, self.spec
        with b.scope("embedding"):
            x = b.op("Gather", self._table(), self.ids)
            if spec.embedding_scale is not None:
                x = b.op("Mul", x, b.constant(spec.embedding_scale, np.float32))
            if self.names.positions is not None:
                name = f"{self.names.positions}.weight"
                places = b.weight(name, spec.max_positions, spec.hidden_size)
                x = b.op("Add", x, b.op("Gather", places, self.positions))
            return x

    def _table(self) -> ir.Value:
        spec = self.spec
        return self.b.weight(f"{self.names.embedding}.weight", spec.vocab_size, spec.hidden_size)

    def _norm(self, x: ir.Value, name: str, size: int | None = None) -> ir.Value:
        b, size, epsilon = self.b, size or self.spec.hidden_size, self.spec.norm_epsilon
        if self.spec.norm == "layer":
            return b.layer_norm(x, name, size, epsilon)
        if self.spec.norm == "rms":
            return b.rms_norm(x, name, size, epsilon)
        one_less = b.weight(f"{name}.weight", size)
        scale = b.op("Add", one_less, b.constant(1, np.float32))
        return b.op("RMSNormalization", x, scale, epsilon=epsilon)

    def _linear(self, x: ir.Value, name: str, inputs: int, outputs: int, bias: bool) -> ir.Value:
        return self.b.linear(x, name, inputs, outputs, bias=bias, transpose=self.spec.linear)

    def _attend(self, x: ir.Value, prefix: str, layer: Layer) -> ir.Value:
        b, spec = self.b, self.spec
        width = spec.heads * spec.head_dim
        query, key, value = self._query_key_value(x, prefix)
        if spec.query_key_norm:
            query = self._norm_heads(query, f"{prefix}.self_attn.q_norm", spec.heads)
            key = self._norm_heads(key, f"{prefix}.self_attn.k_norm", spec.kv_heads)
        if layer.rope is not None:
            query = self._rotate(query, layer.rope, spec.heads)
            key = self._rotate(key, layer.rope, spec.kv_heads)
        mixed = b.op(
            "Attention",
            query,
            key,
            value,
            self._allow(layer.window),
            is_causal=1,
            q_num_heads=spec.heads,
            kv_num_heads=spec.kv_heads,
            scale=layer.scale,
            softcap=spec.softcap,
        )
        name = f"{prefix}.{self.names.output}"
        return self._linear(mixed, name, width, spec.hidden_size, spec.output_bias)

    def _query_key_value(self, x: ir.Value, prefix: str) -> tuple[ir.Value, ir.Value, ir.Value]:
        b, spec, names = self.b, self.spec, self.names
        size, bias = spec.hidden_size, spec.query_key_value_bias
        width, kv_width = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        if names.query_key_value is not None:
            name = f"{prefix}.{names.query_key_value}"
            packed = self._linear(x, name, size, width + 2 * kv_width, bias)
            sizes = b.constant([width, kv_width, kv_width])
            query, key, value = b.ops("Split", 3, packed, sizes, axis=-1)
            return query, key, value
        return (
            self._linear(x, f"{prefix}.{names.query}", size, width, bias),
            self._linear(x, f"{prefix}.{names.key}", size, kv_width, bias),
            self._linear(x, f"{prefix}.{names.value}", size, kv_width, bias),
        )

    def _norm_heads(self, x: ir.Value, name: str, heads: int) -> ir.Value:
        """Normalize [batch, seq, heads * head_dim] head by head."""
        b, size = self.b, self.spec.head_dim
        x = b.op("Reshape", x, b.constant([0, 0, heads, size]))
        return b.op("Reshape", self._norm(x, name, size), b.constant([0, 0, heads * size]))

    def _rotate(self, x: ir.Value, rope: Rope, heads: int) -> ir.Value:
        b, spec = self.b, self.spec
        ropes = list(dict.fromkeys(layer.rope for layer in spec.layers if layer.rope))
        name = "rope" if len(ropes) == 1 else f"rope.{ropes.index(rope)}"
        cos, sin = (b.store(table) for table in rope.tables(name))
        partial = rope.dim if rope.dim != spec.head_dim else None
        return b.op(
            "RotaryEmbedding",
            x,
            cos,
            sin,
            self.positions,
            num_heads=heads,
            rotary_embedding_dim=partial,
        )

    def _allow(self, window: int | None) -> ir.Value:
        """Which keys a query may see, besides being causal: bool [batch, 1, seq, seq].

        Expanded over the queries, since ONNX Runtime's Attention does not broadcast that axis.
        """
        if window in self._allowed:
            return self._allowed[window]
        b, shape = self.b, ("batch", 1, "seq", "seq")
        with b.absolute_scope("mask" if window is None else f"mask.window{window}"):
            if window is None:
                keys = b.op("Cast", self.mask, to=ir.DataType.BOOL)
                keys = b.op("Unsqueeze", keys, b.constant([1, 2]))
                batch, length = b.op("Shape", self.ids, end=1), b.op("Shape", self.ids, start=1)
                full = b.op("Concat", batch, b.constant([1]), length, length, axis=0)
                allowed = b.op("Expand", keys, full)
            else:
                length = b.op("Squeeze", b.op("Shape", self.ids, start=1))
                places = b.op("Range", b.constant(0), length, b.constant(1))
                b.typed(places, ir.DataType.INT64, ("seq",))
                back = b.op("Sub", b.op("Unsqueeze", places, b.constant([1])), places)
                near = b.op("Less", back, b.constant(window))
                allowed = b.op("And", self._allow(None), near)
            b.typed(allowed, ir.DataType.BOOL, shape)
        self._allowed[window] = allowed
        return allowed

    def _feed(self, x: ir.Value, prefix: str) -> ir.Value:
        b, spec, names = self.b, self.spec, self.names
        size, wide, bias = spec.hidden_size, spec.intermediate_size, spec.mlp_bias
        if names.gate_up is not None:
            packed = self._linear(x, f"{prefix}.{names.gate_up}", size, 2 * wide, bias)
            gate, up = b.ops("Split", 2, packed, axis=-1, num_outputs=2)
            y = b.op("Mul", b.activation(gate, spec.activation), up)
        elif names.gate is not None:
            gate = self._linear(x, f"{prefix}.{names.gate}", size, wide, bias)
            up = self._linear(x, f"{prefix}.{names.up}", size, wide, bias)
            y = b.op("Mul", b.activation(gate, spec.activation), up)
        else:
            up = self._linear(x, f"{prefix}.{names.up}", size, wide, bias)
            y = b.activation(up, spec.activation)
        return self._linear(y, f"{prefix}.{names.down}", wide, size, bias)

    def _project(self, x: ir.Value) -> ir.Value:
        b, spec = self.b, self.spec
        if spec.tied:
            # One table for both ends: engines read a transposed weight in place.
            weight = b.op("Transpose", self._table(), perm=[1, 0])
        else:
            name = f"{self.names.head}.weight"
            weight = b.weight(name, spec.hidden_size, spec.vocab_size, transpose=True)
        logits = b.op("MatMul", x, weight)
        if spec.logits_softcap is None:
            return logits
        cap = b.constant(spec.logits_softcap, np.float32)
        return b.op("Mul", b.op("Tanh", b.op("Div", logits, cap)), cap)
