"""Operators of ``com.microsoft`` that exporters and ONNX Runtime's own optimizer write."""

from __future__ import annotations

from typing import Any

import numpy as np

from trivium.backends.xla.lowering.lazy import jax, jnp
from trivium.backends.xla.lowering.ops.linear import scaled
from trivium.backends.xla.lowering.ops.normalization import rms_normalized, standardized
from trivium.backends.xla.lowering.registry import handles
from trivium.backends.xla.lowering.trace import Op

DOMAIN = "com.microsoft"


@handles("FastGelu", domain=DOMAIN)
def fast_gelu(op: Op, x: Any, bias: Any = None) -> Any:
    return jax.nn.gelu(x if bias is None else x + bias, approximate=True)


@handles("Gelu", domain=DOMAIN)
def gelu(op: Op, x: Any) -> Any:
    return jax.nn.gelu(x, approximate=False)


@handles("BiasGelu", domain=DOMAIN)
def bias_gelu(op: Op, x: Any, bias: Any) -> Any:
    return jax.nn.gelu(x + bias, approximate=False)


@handles("QuickGelu", domain=DOMAIN)
def quick_gelu(op: Op, x: Any) -> Any:
    return x * jax.nn.sigmoid(jnp.asarray(op.attr("alpha", 1.702), x.dtype) * x)


@handles("FusedMatMul", "TransposeMatMul", domain=DOMAIN)
def fused_matmul(op: Op, a: Any, b: Any) -> Any:
    for name, batch in (("transA", "transBatchA"), ("transB", "transBatchB")):
        value = a if name == "transA" else b
        if op.attr(batch, 0):
            value = jnp.moveaxis(value, 0, -2)
        if op.attr(name, 0):
            value = jnp.swapaxes(value, -1, -2)
        a, b = (value, b) if name == "transA" else (a, value)
    return scaled(jnp.matmul(a, b), op.attr("alpha", 1.0))


def _layer_norm(x: Any, gamma: Any, beta: Any, epsilon: float) -> Any:
    y = standardized(x.astype("float32"), (-1,), epsilon)[0].astype(x.dtype) * gamma
    return y if beta is None else y + beta


@handles("SkipLayerNormalization", domain=DOMAIN)
def skip_layer_normalization(
    op: Op, x: Any, skip: Any, gamma: Any, beta: Any = None, bias: Any = None
) -> Any:
    total = x + skip if bias is None else x + skip + bias
    return _layer_norm(total, gamma, beta, op.attr("epsilon", 1e-12)), None, None, total


@handles("SimplifiedLayerNormalization", domain=DOMAIN)
@handles("SimplifiedLayerNormalization")
def simplified_layer_normalization(op: Op, x: Any, gamma: Any) -> Any:
    axes = tuple(range(op.attr("axis", -1) % x.ndim, x.ndim))
    return rms_normalized(x, axes, op.attr("epsilon", 1e-5), np.dtype("float32")) * gamma


@handles("SkipSimplifiedLayerNormalization", domain=DOMAIN)
def skip_simplified_layer_normalization(
    op: Op, x: Any, skip: Any, gamma: Any, bias: Any = None
) -> Any:
    total = x + skip if bias is None else x + skip + bias
    y = rms_normalized(total, (-1,), op.attr("epsilon", 1e-12), np.dtype("float32")) * gamma
    return y, None, None, total


@handles("EmbedLayerNormalization", domain=DOMAIN)
def embed_layer_normalization(
    op: Op, ids: Any, segments: Any, words: Any, positions: Any, segment_table: Any = None,
    gamma: Any = None, beta: Any = None, mask: Any = None, position_ids: Any = None,
) -> Any:  # fmt: skip
    embedded = jnp.take(words, ids, axis=0, mode="clip")
    if position_ids is None:
        embedded = embedded + positions[: ids.shape[1]]
    else:
        embedded = embedded + jnp.take(positions, position_ids, axis=0, mode="clip")
    if segment_table is not None and segments is not None:
        embedded = embedded + jnp.take(segment_table, segments, axis=0, mode="clip")
    y = _layer_norm(embedded, gamma, beta, op.attr("epsilon", 1e-12))
    if mask is None or op.attr("mask_index_type", 1) == 0:
        length = jnp.zeros((ids.shape[0],), "int32")
    else:
        length = jnp.sum(mask, axis=1, dtype="int32")
    return y, length, embedded


@handles("Attention", domain=DOMAIN)
def attention(
    op: Op, x: Any, weights: Any, bias: Any, mask: Any = None, past: Any = None,
    attention_bias: Any = None, past_length: Any = None,
) -> Any:  # fmt: skip
    """Self-attention, the three projections packed; ``past`` is (2, batch, heads, time, size)."""
    if past_length is not None:
        raise op.refuse("with a past buffer shared with the present is not lowered")
    heads = op.attr("num_heads")
    sizes = op.attr("qkv_hidden_sizes") or [weights.shape[1] // 3] * 3
    packed = x @ weights if bias is None else x @ weights + bias
    split = jnp.split(packed, [sizes[0], sizes[0] + sizes[1]], axis=-1)
    batch, length = x.shape[:2]
    q, k, v = (
        part.reshape(batch, length, heads, part.shape[-1] // heads).transpose(0, 2, 1, 3)
        for part in split
    )
    if past is not None:
        k = jnp.concatenate([past[0], k], axis=2)
        v = jnp.concatenate([past[1], v], axis=2)
    total = k.shape[2]
    scale = op.attr("scale", 0.0) or q.shape[-1] ** -0.5
    scores = scaled(q @ jnp.swapaxes(k, -1, -2), scale)
    if attention_bias is not None:
        scores = scores + attention_bias
    fill = jnp.asarray(op.attr("mask_filter_value", -10000.0), scores.dtype)
    if mask is not None:
        scores = scores + jnp.where(_visible(op, mask, total), jnp.zeros((), fill.dtype), fill)
    if op.attr("unidirectional", 0):
        rows = jnp.arange(length)[:, None] + (total - length)
        causal = jnp.arange(total)[None, :] <= rows
        scores = jnp.where(causal, scores, jnp.finfo(scores.dtype).min)
    y = jax.nn.softmax(scores, axis=-1) @ v
    y = y.transpose(0, 2, 1, 3).reshape(batch, length, -1)
    return (y, jnp.stack([k, v])) if op.wants(1) else y


def _visible(op: Op, mask: Any, total: int) -> Any:
    """ONNX Runtime's masks as booleans that broadcast over (batch, heads, query, key)."""
    if mask.ndim == 1:
        return (jnp.arange(total) < mask[:, None])[:, None, None, :]
    if mask.ndim == 2:
        return (mask != 0)[:, None, None, :]
    if mask.ndim == 3:
        return (mask != 0)[:, None]
    raise op.refuse(f"with a mask of {mask.ndim} dimensions is not lowered")
