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
