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
class Experts:
    """A mixture of experts (Mixtral): ``per_token`` of ``count`` feed-forwards mix for each token.

    Names are relative to the layer; the experts are numbered below ``names``.
    """

    count: int
    per_token: int
    router: str = "block_sparse_moe.gate"
    names: str = "block_sparse_moe.experts"
    gate: str = "w1"
    up: str = "w3"
    down: str = "w2"


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
        image_token: The id whose embeddings are the rows of ``images``, one after the other.
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
    experts: Experts | None = None
    image_token: int | None = None


def build(spec: Decoder, checkpoint: Checkpoint) -> ir.Model:
    """Build a decoder; see the module's docstring for its inputs and outputs.

    Raises:
        BadInput: The checkpoint lacks a tensor, or its shape is not what the options imply.
    """
    return build_onto(Builder(spec.name, checkpoint), spec)


def build_onto(builder: Builder, spec: Decoder, images: ir.Value | None = None) -> ir.Model:
    """Build a decoder into a graph that has something before it.

    Args:
        images: float [images, patches, hidden_size], for ``spec.image_token``; the embeddings
            with these in their places are then an output too, ``inputs_embeds``.

    Raises:
        BadInput: The checkpoint lacks a tensor, or its shape is not what the options imply.
    """
    if spec.heads % spec.kv_heads:
        raise BadInput(
            f"{spec.heads} attention heads cannot share {spec.kv_heads} key/value heads",
            about=builder.checkpoint.config.about,
        )
    return _Build(spec, builder, images).model()


class _Build:
    """One build: the specification, the graph so far, and what its layers share."""

    def __init__(self, spec: Decoder, builder: Builder, images: ir.Value | None) -> None:
        self.spec, self.names, self.b, self.images = spec, spec.names, builder, images
        self.ids = builder.input("input_ids", ir.DataType.INT64, ("batch", "seq"))
        self.fed = self.ids
        self.mask = builder.input("attention_mask", ir.DataType.INT64, ("batch", "seq"))
        self.positions = self._positions()
        self._allowed: dict[int | None, ir.Value] = {}
        self._long_rows: dict[Rope, ir.Value] = {}

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
            if self.images is not None:
                x = self._with_images(x, self.images)
                b.output("inputs_embeds", x, ("batch", "seq", spec.hidden_size))
                # From here on the sizes are those of the embeddings: a part that takes them has
                # no ids.
                self.fed = x
            return x

    def _with_images(self, x: ir.Value, images: ir.Value) -> ir.Value:
        """Put the rows of the images, in order, where the ids are the image token."""
        b, spec = self.b, self.spec
        size = spec.hidden_size
        rows = b.op("Reshape", images, b.constant([-1, size]))
        b.typed(rows, ir.DataType.FLOAT, ("rows", size))
        # A row for those before the first image token, so that there is one without any image.
        none = b.constant(np.zeros((1, size)), np.float32)
        rows = b.typed(b.op("Concat", none, rows, axis=0), ir.DataType.FLOAT, ("1+rows", size))
        here = b.op("Equal", self.ids, b.constant(spec.image_token))
        flat = b.op("Reshape", b.op("Cast", here, to=ir.DataType.INT64), b.constant([-1]))
        count = b.op("CumSum", b.typed(flat, ir.DataType.INT64, ("tokens",)), b.constant(0))
        row = b.op("Reshape", count, b.op("Shape", self.ids))
        b.typed(row, ir.DataType.INT64, ("batch", "seq"))
        seen = b.op("Gather", rows, b.op("Where", here, row, b.constant(0)))
        return b.op("Where", b.op("Unsqueeze", here, b.constant([2])), seen, x)

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
            self._rows(rope),
            num_heads=heads,
            rotary_embedding_dim=partial,
        )

    def _rows(self, rope: Rope) -> ir.Value:
        """The rows of the rotary tables: positions, or for a long sequence those after them."""
        if rope.long_frequencies is None:
            return self.positions
        if rope not in self._long_rows:
            b = self.b
            with b.absolute_scope("positions"):
                last = b.op("ReduceMax", self.positions, keepdims=0)
                long = b.op("GreaterOrEqual", last, b.constant(rope.trained))
                skip = b.op("Where", long, b.constant(rope.trained), b.constant(0))
                self._long_rows[rope] = b.op("Add", self.positions, skip)
        return self._long_rows[rope]

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
                batch = b.op("Shape", self.fed, end=1)
                length = b.op("Shape", self.fed, start=1, end=2)
                full = b.op("Concat", batch, b.constant([1]), length, length, axis=0)
                allowed = b.op("Expand", keys, full)
            else:
                length = b.op("Squeeze", b.op("Shape", self.fed, start=1, end=2))
                places = b.op("Range", b.constant(0), length, b.constant(1))
                b.typed(places, ir.DataType.INT64, ("seq",))
                back = b.op("Sub", b.op("Unsqueeze", places, b.constant([1])), places)
                near = b.op("Less", back, b.constant(window))
                allowed = b.op("And", self._allow(None), near)
            b.typed(allowed, ir.DataType.BOOL, shape)
        self._allowed[window] = allowed
        return allowed

    def _feed(self, x: ir.Value, prefix: str) -> ir.Value:
        names = self.names
        if self.spec.experts is not None:
            return self._mix_experts(x, prefix, self.spec.experts)
        if names.gate_up is not None:
            return self._feed_packed(x, prefix, names.gate_up)
        gate = f"{prefix}.{names.gate}" if names.gate is not None else None
        return self._feed_through(x, gate, f"{prefix}.{names.up}", f"{prefix}.{names.down}")

    def _feed_through(self, x: ir.Value, gate: str | None, up: str, down: str) -> ir.Value:
        b, spec = self.b, self.spec
        size, wide, bias = spec.hidden_size, spec.intermediate_size, spec.mlp_bias
        y = self._linear(x, up, size, wide, bias)
        if gate is None:
            y = b.activation(y, spec.activation)
        else:
            opened = b.activation(self._linear(x, gate, size, wide, bias), spec.activation)
            y = b.op("Mul", opened, y)
        return self._linear(y, down, wide, size, bias)

    def _feed_packed(self, x: ir.Value, prefix: str, gate_up: str) -> ir.Value:
        b, spec = self.b, self.spec
        size, wide, bias = spec.hidden_size, spec.intermediate_size, spec.mlp_bias
        packed = self._linear(x, f"{prefix}.{gate_up}", size, 2 * wide, bias)
        gate, up = b.ops("Split", 2, packed, axis=-1, num_outputs=2)
        y = b.op("Mul", b.activation(gate, spec.activation), up)
        return self._linear(y, f"{prefix}.{self.names.down}", wide, size, bias)

    def _mix_experts(self, x: ir.Value, prefix: str, experts: Experts) -> ir.Value:
        """Every expert on every token, weighted by the router: zero for those not chosen.

        ONNX has no operator that runs an expert only where it is needed; this is its meaning.
        """
        b, router = self.b, f"{prefix}.{experts.router}"
        chances = self._linear(x, router, self.spec.hidden_size, experts.count, False)
        chances = b.op("Softmax", chances, axis=-1)
        best, which = b.ops("TopK", 2, chances, b.constant([experts.per_token]), axis=-1)
        shares = b.op("Div", best, b.op("ReduceSum", best, b.constant([-1]), keepdims=1))
        none = b.op("Expand", b.constant(0, np.float32), b.op("Shape", chances))
        weights = b.op("ScatterElements", none, which, shares, axis=-1)
        parts = b.ops("Split", experts.count, weights, axis=-1, num_outputs=experts.count)
        total: ir.Value | None = None
        for index, weight in enumerate(parts):
            name = f"{prefix}.{experts.names}.{index}"
            gate, up, down = (f"{name}.{n}" for n in (experts.gate, experts.up, experts.down))
            with b.scope(f"expert.{index}"):
                y = b.op("Mul", self._feed_through(x, gate, up, down), weight)
                total = y if total is None else b.op("Add", total, y)
        assert total is not None
        return total

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
