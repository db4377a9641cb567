"""T5 and Flan-T5, an encoder and a decoder: https://arxiv.org/abs/1910.10683.

The graph is the whole forward pass: the source text into the encoder, the target so far into the
decoder, logits for every target position out. A folder whose architecture is ``T5EncoderModel``
becomes the encoder alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from trivium.compiler.errors import BadInput, Unsupported
from trivium.compiler.generation import sourced
from trivium.compiler.generator import Source
from trivium.models.builder import ACTIVATIONS, Builder
from trivium.models.checkpoint import Checkpoint, Config

HEADS = ("T5ForConditionalGeneration", "T5EncoderModel")


@dataclass(frozen=True)
class T5Config:
    """The sizes and options of a T5, under their names in config.json."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_decoder_layers: int
    num_heads: int
    relative_attention_num_buckets: int
    relative_attention_max_distance: int
    layer_norm_epsilon: float
    activation: str
    gated: bool
    scale_decoder_outputs: bool


def build(folder: Path) -> ir.Model:
    """Build a T5 checkpoint.

    Inputs: input_ids and attention_mask, int64 [batch, seq], and decoder_input_ids, int64
    [batch, target]. Output: logits [batch, target, vocab]. The encoder alone takes the first two
    and returns last_hidden_state [batch, seq, d_model].

    Raises:
        BadInput: Config and tensors do not make a T5.
        Unsupported: An option or a head that is not known.
    """
    checkpoint = Checkpoint(folder)
    heads = checkpoint.config.sizes("architectures") or HEADS[:1]
    if len(heads) != 1 or heads[0] not in HEADS:
        raise Unsupported(
            f"architectures is {list(heads)}",
            about=checkpoint.config.about,
            remedy=f"known: {', '.join(HEADS)}",
        )
    config = _config(checkpoint.config)
    b = Builder("t5", checkpoint)
    ids = b.input("input_ids", ir.DataType.INT64, ("batch", "seq"))
    mask = b.input("attention_mask", ir.DataType.INT64, ("batch", "seq"))
    build = _Build(config, b)
    kept = b.op("Unsqueeze", b.op("Cast", mask, to=ir.DataType.BOOL), b.constant([1, 2]))
    memory = build.encode(ids, kept)
    if heads[0] == "T5EncoderModel":
        b.output("last_hidden_state", memory, ("batch", "seq", config.d_model))
        return b.model()
    target = b.input("decoder_input_ids", ir.DataType.INT64, ("batch", "target"))
    logits = build.decode(target, memory, kept)
    b.output("logits", logits, ("batch", "target", config.vocab_size))
    model = b.model()
    start = checkpoint.config.get("decoder_start_token_id", 0)
    source = Source("input_ids", "attention_mask", "decoder_input_ids", start)
    sourced.declare(model, source)
    return model


def _config(config: Config) -> T5Config:
    kind = config.choose("feed_forward_proj", "relu", _FEED_FORWARDS)
    activation, gated = _FEED_FORWARDS[kind]
    # Derived by transformers from feed_forward_proj, and stored beside it.
    config.ignore(
        "dense_act_fn", "is_gated_act", "is_decoder", "task_specific_params", "n_positions"
    )
    layers = config.size("num_layers")
    # T5 1.1 has a head of its own and does not scale; its config says so by untying.
    tied = config.get("tie_word_embeddings", True)
    made = T5Config(
        vocab_size=config.size("vocab_size"),
        d_model=config.size("d_model"),
        d_kv=config.size("d_kv"),
        d_ff=config.size("d_ff"),
        num_layers=layers,
        num_decoder_layers=config.size("num_decoder_layers", layers),
        num_heads=config.size("num_heads"),
        relative_attention_num_buckets=config.size("relative_attention_num_buckets", 32),
        relative_attention_max_distance=config.size("relative_attention_max_distance", 128),
        layer_norm_epsilon=config.get("layer_norm_epsilon", 1e-6),
        activation=activation,
        gated=gated,
        scale_decoder_outputs=config.get("scale_decoder_outputs", tied),
    )
    config.finish()
    if made.relative_attention_num_buckets < 4:
        raise BadInput(
            f"relative_attention_num_buckets is {made.relative_attention_num_buckets}",
            about=config.about,
            remedy="give at least 4",
        )
    return made


_FEED_FORWARDS: dict[str, tuple[str, bool]] = {
    **{name: (name, False) for name in ACTIVATIONS},
    **{f"gated-{name}": (name, True) for name in ACTIVATIONS},
    "gated-gelu": ("gelu_new", True),
}
"""feed_forward_proj in config.json -> activation, and whether a gate multiplies it."""


def buckets(count: int, furthest: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The bucket of each distance from 0 to ``furthest``; larger ones share the last.

    The first half of the ``count`` buckets holds one distance each, the others grow by a factor.
    """
    exact = count // 2
    distance = np.arange(furthest + 1)
    # In float32 as where it was trained: another rounding moves a distance to its neighbour.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    steps = ratio / np.float32(np.log(furthest / exact)) * np.float32(count - exact)
    far = np.minimum(exact + steps.astype(np.int64), count - 1)
    return np.where(distance < exact, distance, far).astype(np.int64)


class _Build:
    """One build: the sizes, the graph so far."""

    def __init__(self, config: T5Config, builder: Builder) -> None:
        self.config, self.b = config, builder

    def encode(self, ids: ir.Value, kept: ir.Value) -> ir.Value:
        """Run the encoder over [batch, seq] ids, of which ``kept`` [batch, 1, 1, seq] are real."""
        b = self.b
        x = self._embed(ids)
        with b.scope("encoder.bias"):
            bias = self._position_bias("encoder", ids, bidirectional=True)
            bias = self._masked(bias, kept)
        for index in range(self.config.num_layers):
            name = f"encoder.block.{index}.layer"
            with b.scope(f"encoder.{index}"):
                y = self._norm(x, f"{name}.0.layer_norm")
                x = b.op("Add", x, self._attend(y, y, f"{name}.0.SelfAttention", bias))
                x = b.op("Add", x, self._feed(x, f"{name}.1"))
        return self._norm(x, "encoder.final_layer_norm")

    def decode(self, ids: ir.Value, memory: ir.Value, kept: ir.Value) -> ir.Value:
        """Run the decoder over [batch, target] ids and project onto the vocabulary."""
        b, config = self.b, self.config
        x = self._embed(ids)
        with b.scope("decoder.bias"):
            bias = self._position_bias("decoder", ids, bidirectional=False)
            places = self._places(ids)
            past = b.op("LessOrEqual", places, b.op("Unsqueeze", places, b.constant([1])))
            bias = self._masked(bias, past)
        with b.scope("decoder.memory"):
            # Expanded over the queries: ONNX Runtime's Attention does not broadcast that axis.
            shape = b.op(
                "Concat", b.op("Shape", ids, end=1), b.constant([1]),
                b.op("Shape", ids, start=1), b.op("Shape", kept, start=3), axis=0,
            )  # fmt: skip
            visible = b.op("Expand", kept, shape)
        for index in range(config.num_decoder_layers):
            name = f"decoder.block.{index}.layer"
            with b.scope(f"decoder.{index}"):
                y = self._norm(x, f"{name}.0.layer_norm")
                x = b.op("Add", x, self._attend(y, y, f"{name}.0.SelfAttention", bias))
                y = self._norm(x, f"{name}.1.layer_norm")
                x = b.op("Add", x, self._attend(y, memory, f"{name}.1.EncDecAttention", visible))
                x = b.op("Add", x, self._feed(x, f"{name}.2"))
        with b.scope("head"):
            x = self._norm(x, "decoder.final_layer_norm")
            if config.scale_decoder_outputs:
                x = b.op("Mul", x, b.constant(config.d_model**-0.5, np.float32))
            return b.op("MatMul", x, self._head())

    def _head(self) -> ir.Value:
        b, config = self.b, self.config
        if b.checkpoint.has("lm_head.weight"):
            return b.weight("lm_head.weight", config.d_model, config.vocab_size, transpose=True)
        return b.op("Transpose", self._table(), perm=[1, 0])

    def _table(self) -> ir.Value:
        return self.b.weight("shared.weight", self.config.vocab_size, self.config.d_model)

    def _embed(self, ids: ir.Value) -> ir.Value:
        return self.b.op("Gather", self._table(), ids)

    def _norm(self, x: ir.Value, name: str) -> ir.Value:
        return self.b.rms_norm(x, name, self.config.d_model, self.config.layer_norm_epsilon)

    def _places(self, ids: ir.Value) -> ir.Value:
        """The index of each position: int64, as many as ``ids`` [batch, positions] has."""
        b = self.b
        length = b.op("Squeeze", b.op("Shape", ids, start=1))
        places = b.op("Range", b.constant(0), length, b.constant(1))
        assert ids.shape is not None
        return b.typed(places, ir.DataType.INT64, [str(ids.shape[1])])

    def _position_bias(self, stack: str, ids: ir.Value, *, bidirectional: bool) -> ir.Value:
        """What each head adds to the score of a key at each distance: [1, heads, seq, seq].

        Distances look up their bucket in a table, so that no engine's logarithm decides it.
        """
        b, config = self.b, self.config
        count = config.relative_attention_num_buckets
        furthest = config.relative_attention_max_distance
        places = self._places(ids)
        ahead = b.op("Sub", places, b.op("Unsqueeze", places, b.constant([1])))
        half = count // 2 if bidirectional else count
        back = (
            b.op("Abs", ahead) if bidirectional else b.op("Max", b.op("Neg", ahead), b.constant(0))
        )
        table = b.constant(buckets(half, furthest))
        bucket = b.op("Gather", table, b.op("Min", back, b.constant(furthest)))
        if bidirectional:
            later = b.op("Greater", ahead, b.constant(0))
            bucket = b.op("Add", bucket, b.op("Where", later, b.constant(half), b.constant(0)))
        name = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        bias = b.op("Gather", b.weight(name, count, config.num_heads), bucket)
        return b.op("Unsqueeze", b.op("Transpose", bias, perm=[2, 0, 1]), b.constant([0]))

    def _masked(self, bias: ir.Value, visible: ir.Value) -> ir.Value:
        """The bias where a key is visible, the lowest score where it is not."""
        lowest = self.b.constant(np.finfo(np.float32).min, np.float32)
        return self.b.op("Where", visible, bias, lowest)

    def _attend(self, x: ir.Value, memory: ir.Value, name: str, mask: ir.Value) -> ir.Value:
        b, config = self.b, self.config
        width = config.num_heads * config.d_kv
        query = b.linear(x, f"{name}.q", config.d_model, width, bias=False)
        key = b.linear(memory, f"{name}.k", config.d_model, width, bias=False)
        value = b.linear(memory, f"{name}.v", config.d_model, width, bias=False)
        heads = config.num_heads
        mixed = b.op(
            "Attention", query, key, value, mask,
            q_num_heads=heads, kv_num_heads=heads, scale=1.0,
        )  # fmt: skip
        return b.linear(mixed, f"{name}.o", width, config.d_model, bias=False)

    def _feed(self, x: ir.Value, name: str) -> ir.Value:
        b, config = self.b, self.config
        size, wide, dense = config.d_model, config.d_ff, f"{name}.DenseReluDense"
        x = self._norm(x, f"{name}.layer_norm")
        if config.gated:
            gate = b.activation(
                b.linear(x, f"{dense}.wi_0", size, wide, bias=False), config.activation
            )
            y = b.op("Mul", gate, b.linear(x, f"{dense}.wi_1", size, wide, bias=False))
        else:
            y = b.activation(b.linear(x, f"{dense}.wi", size, wide, bias=False), config.activation)
        return b.linear(y, f"{dense}.wo", wide, size, bias=False)
