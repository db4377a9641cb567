"""BERT and its sentence encoders (MiniLM, ...): https://arxiv.org/abs/1810.04805.

Besides ``last_hidden_state``, the graph returns what the checkpoint's head computes: the logits of
a masked-language or classification head, or, for a folder of sentence-transformers (modules.json),
the pooled ``sentence_embedding``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from trivium.compiler import files
from trivium.compiler.errors import BadInput, Unsupported
from trivium.models.builder import ACTIVATIONS, Builder
from trivium.models.checkpoint import Checkpoint, Config, read_json

HEADS = ("BertModel", "BertForMaskedLM", "BertForSequenceClassification")


@dataclass(frozen=True)
class BertConfig:
    """The sizes and options of a BERT encoder, under their names in config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    type_vocab_size: int
    hidden_act: str
    layer_norm_eps: float


def build(folder: Path) -> ir.Model:
    """Build a BERT checkpoint.

    Inputs: input_ids, attention_mask, token_type_ids, int64 [batch, seq]. Outputs:
    last_hidden_state [batch, seq, hidden], and by head logits [batch, seq, vocab] or
    [batch, labels], or sentence_embedding [batch, hidden].

    Raises:
        BadInput: Config and tensors do not make a BERT.
        Unsupported: An option or a head that is not known.
    """
    checkpoint = Checkpoint(folder)
    head = _head(checkpoint.config)
    config = _config(checkpoint.config)
    pooling = _pooling(folder)
    b = Builder("bert", checkpoint)
    shape = ("batch", "seq")
    ids = b.input("input_ids", ir.DataType.INT64, shape)
    mask = b.input("attention_mask", ir.DataType.INT64, shape)
    types = b.input("token_type_ids", ir.DataType.INT64, shape)

    root = "" if checkpoint.has("embeddings.word_embeddings.weight") else "bert."
    hidden = _embeddings(b, f"{root}embeddings", config, ids, types)
    allowed = _attend_to(b, ids, mask)
    for index in range(config.num_hidden_layers):
        with b.scope(f"layer.{index}"):
            hidden = _layer(b, f"{root}encoder.layer.{index}", config, hidden, allowed)
    b.output("last_hidden_state", hidden, (*shape, config.hidden_size))
    if pooling is not None:
        with b.scope("pooling"):
            embedding = _sentence(b, hidden, mask, pooling)
        b.output("sentence_embedding", embedding, ("batch", config.hidden_size))
    if head == "BertForMaskedLM":
        logits = _masked_lm(b, root, config, hidden)
        b.output("logits", logits, (*shape, config.vocab_size))
    if head == "BertForSequenceClassification":
        labels = (
            checkpoint.entries["classifier.weight"].shape[0]
            if checkpoint.has("classifier.weight")
            else 2
        )
        pooled = _first_token(b, root, config, hidden)
        b.output(
            "logits", b.linear(pooled, "classifier", config.hidden_size, labels), ("batch", labels)
        )
    return b.model()


def _head(config: Config) -> str:
    names = config.sizes("architectures") or ("BertModel",)
    if len(names) != 1 or names[0] not in HEADS:
        raise Unsupported(
            f"architectures is {list(names)}",
            about=config.about,
            remedy=f"known: {', '.join(HEADS)}",
        )
    return str(names[0])


def _config(config: Config) -> BertConfig:
    config.choose("position_embedding_type", "absolute", ("absolute",))
    config.ignore("classifier_dropout", "layer_norm_type", "tie_word_embeddings")
    made = BertConfig(
        vocab_size=config.size("vocab_size"),
        hidden_size=config.size("hidden_size"),
        intermediate_size=config.size("intermediate_size"),
        num_hidden_layers=config.size("num_hidden_layers"),
        num_attention_heads=config.size("num_attention_heads"),
        max_position_embeddings=config.size("max_position_embeddings"),
        type_vocab_size=config.size("type_vocab_size", 2),
        hidden_act=config.choose("hidden_act", "gelu", ACTIVATIONS),
        layer_norm_eps=config.get("layer_norm_eps", 1e-12),
    )
    config.finish()
    if made.hidden_size % made.num_attention_heads:
        raise BadInput(
            f"hidden_size {made.hidden_size} is not a multiple of num_attention_heads "
            f"{made.num_attention_heads}",
            about=config.about,
        )
    return made


def _embeddings(
    b: Builder, name: str, config: BertConfig, ids: ir.Value, types: ir.Value
) -> ir.Value:
    size = config.hidden_size
    with b.scope("embeddings"):
        words = b.weight(f"{name}.word_embeddings.weight", config.vocab_size, size)
        places = b.weight(
            f"{name}.position_embeddings.weight", config.max_position_embeddings, size
        )
        kinds = b.weight(f"{name}.token_type_embeddings.weight", config.type_vocab_size, size)
        # Gather, not Slice: a sequence longer than the table must fail, not be cut short.
        length = b.op("Squeeze", b.op("Shape", ids, start=1, end=2))
        positions = b.op("Range", b.constant(0), length, b.constant(1))
        b.typed(positions, ir.DataType.INT64, ["seq"])
        total = b.op("Add", b.op("Gather", words, ids), b.op("Gather", kinds, types))
        total = b.op("Add", total, b.op("Gather", places, positions))
        return b.layer_norm(total, f"{name}.LayerNorm", size, config.layer_norm_eps)


def _attend_to(b: Builder, ids: ir.Value, mask: ir.Value) -> ir.Value:
    """Which keys each query may see: bool [batch, 1, seq, seq].

    Expanded over the queries, since ONNX Runtime's Attention does not broadcast that axis.
    """
    with b.scope("mask"):
        keys = b.op("Unsqueeze", b.op("Cast", mask, to=ir.DataType.BOOL), b.constant([1, 2]))
        batch = b.op("Shape", ids, end=1)
        length = b.op("Shape", ids, start=1)
        shape = b.op("Concat", batch, b.constant([1]), length, length, axis=0)
        return b.op("Expand", keys, shape)


def _layer(b: Builder, name: str, config: BertConfig, x: ir.Value, allowed: ir.Value) -> ir.Value:
    size, eps = config.hidden_size, config.layer_norm_eps
    with b.scope("attention"):
        query, key, value = (
            b.linear(x, f"{name}.attention.self.{part}", size, size)
            for part in ("query", "key", "value")
        )
        heads = config.num_attention_heads
        mixed = b.op("Attention", query, key, value, allowed, q_num_heads=heads, kv_num_heads=heads)
        mixed = b.linear(mixed, f"{name}.attention.output.dense", size, size)
        x = b.layer_norm(b.op("Add", mixed, x), f"{name}.attention.output.LayerNorm", size, eps)
    with b.scope("mlp"):
        wide = b.linear(x, f"{name}.intermediate.dense", size, config.intermediate_size)
        wide = b.activation(wide, config.hidden_act)
        narrow = b.linear(wide, f"{name}.output.dense", config.intermediate_size, size)
        return b.layer_norm(b.op("Add", narrow, x), f"{name}.output.LayerNorm", size, eps)


def _first_token(b: Builder, root: str, config: BertConfig, hidden: ir.Value) -> ir.Value:
    size = config.hidden_size
    with b.scope("pooler"):
        first = b.op("Gather", hidden, b.constant(0), axis=1)
        return b.op("Tanh", b.linear(first, f"{root}pooler.dense", size, size))


def _masked_lm(b: Builder, root: str, config: BertConfig, hidden: ir.Value) -> ir.Value:
    """The decoder of a masked-language head is the word table, unless it is stored apart."""
    size, name = config.hidden_size, "cls.predictions"
    with b.scope("head"):
        x = b.linear(hidden, f"{name}.transform.dense", size, size)
        x = b.activation(x, config.hidden_act)
        x = b.layer_norm(x, f"{name}.transform.LayerNorm", size, config.layer_norm_eps)
        if b.checkpoint.has(f"{name}.decoder.weight"):
            table = b.weight(f"{name}.decoder.weight", size, config.vocab_size, transpose=True)
        else:
            words = b.weight(f"{root}embeddings.word_embeddings.weight", config.vocab_size, size)
            table = b.op("Transpose", words, perm=[1, 0])
        return b.op("Add", b.op("MatMul", x, table), b.weight(f"{name}.bias", config.vocab_size))


@dataclass(frozen=True)
class Pooling:
    """How sentence-transformers makes one vector of a sentence: ``mean`` or ``cls``."""

    mode: str
    normalize: bool


def _pooling(folder: Path) -> Pooling | None:
    """Read the modules of a sentence-transformers folder, or return None for a plain one."""
    path = folder / "modules.json"
    if not path.is_file():
        return None
    try:
        modules = files.read_json(path)
        kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
        places = [str(module["path"]) for module in modules]
    except (KeyError, TypeError) as error:
        raise BadInput(f"not a list of modules ({error})", about=str(path)) from error
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise Unsupported(
            f"the modules {', '.join(kinds)}",
            about=str(path),
            remedy="known: Transformer, Pooling and optionally Normalize",
        )
    options = read_json(folder / Path(places[1]).name / "config.json")
    chosen = [key for key, on in options.items() if key.startswith("pooling_mode") and on is True]
    known = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    if len(chosen) != 1 or chosen[0] not in known:
        raise Unsupported(
            f"the pooling {chosen}", about=str(path), remedy=f"known: {', '.join(known)}"
        )
    return Pooling(known[chosen[0]], len(kinds) == 3)


def _sentence(b: Builder, hidden: ir.Value, mask: ir.Value, pooling: Pooling) -> ir.Value:
    """Pool as sentence-transformers does, down to the bounds that keep it from dividing by 0."""
    if pooling.mode == "cls":
        pooled = b.op("Gather", hidden, b.constant(0), axis=1)
    else:
        weights = b.op("Unsqueeze", b.op("Cast", mask, to=ir.DataType.FLOAT), b.constant([2]))
        total = b.op("ReduceSum", b.op("Mul", hidden, weights), b.constant([1]), keepdims=0)
        count = b.op("ReduceSum", weights, b.constant([1]), keepdims=0)
        pooled = b.op("Div", total, b.op("Max", count, b.constant(1e-9, np.float32)))
    if not pooling.normalize:
        return pooled
    norm = b.op("ReduceL2", pooled, b.constant([-1]), keepdims=1)
    return b.op("Div", pooled, b.op("Max", norm, b.constant(1e-12, np.float32)))
