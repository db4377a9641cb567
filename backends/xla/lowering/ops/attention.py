"""Attention and rotary position embedding."""

from __future__ import annotations

from typing import Any

from trivium.backends.xla.lowering.dtypes import numpy_dtype
from trivium.backends.xla.lowering.lazy import jnp
from trivium.backends.xla.lowering.registry import handles
from trivium.backends.xla.lowering.trace import Op

_SCORES, _SOFTCAPPED, _BIASED, _PROBABILITIES = range(4)


@handles("Attention", since=23)
def attention(
    op: Op, q: Any, k: Any, v: Any, mask: Any = None, past_key: Any = None, past_value: Any = None,
    valid: Any = None,
) -> Any:  # fmt: skip
    """Scaled dot-product attention with grouped heads, caches, softcap and windows.

    Heads are (batch, heads, time, size), or packed as (batch, time, heads * size). ``valid`` is
    how many keys of an external cache each batch entry has.
    """
    packed = q.ndim == 3
    if packed:
        q = _split_heads(q, op.attr("q_num_heads"))
        k, v = (_split_heads(x, op.attr("kv_num_heads")) for x in (k, v))
    if past_key is not None:
        k = jnp.concatenate([past_key, k], axis=2)
        v = jnp.concatenate([past_value, v], axis=2)
    scale = op.attr("scale")
    factor = jnp.asarray((q.shape[-1] ** -0.5 if scale is None else scale) ** 0.5, q.dtype)
    offset = _offset(q, past_key, valid)
    bias = _bias(op, q, k, mask, valid, offset)
    scores = grouped_scores(q * factor, k * factor)
    shown = scores
    softcap = op.attr("softcap", 0.0)
    if softcap:
        cap = jnp.asarray(softcap, scores.dtype)
        scores = jnp.tanh(scores / cap) * cap
    mode = op.attr("qk_matmul_output_mode", 0)
    shown = scores if mode == _SOFTCAPPED else shown
    scores = scores if bias is None else scores + bias
    shown = scores if mode == _BIASED else shown
    precision = op.attr("softmax_precision")
    wide = scores if precision is None else scores.astype(numpy_dtype(precision))
    weights = masked_softmax(wide, bias)
    shown = weights if mode == _PROBABILITIES else shown
    y = grouped_mix(weights.astype(q.dtype), v)
    if packed:
        y = jnp.swapaxes(y, 1, 2).reshape(y.shape[0], y.shape[2], -1)
    return y, k, v, shown.astype(q.dtype)


def _split_heads(x: Any, heads: int) -> Any:
    batch, time, width = x.shape
    return jnp.swapaxes(jnp.reshape(x, (batch, time, heads, width // heads)), 1, 2)


def grouped_scores(q: Any, k: Any) -> Any:
    """Scores (batch, heads, queries, keys) where several heads of ``q`` share one of ``k``.

    The keys are not repeated: the group is an axis of the product.
    """
    batch, heads, time, size = q.shape
    groups = k.shape[1]
    grouped = jnp.reshape(q, (batch, groups, heads // groups, time, size))
    scores = jnp.einsum("bghqd,bgkd->bghqk", grouped, k)
    return scores.reshape(batch, heads, time, k.shape[2])


def grouped_mix(weights: Any, v: Any) -> Any:
    """The values (batch, heads, queries, size) that attention weights mix, heads grouped."""
    batch, heads, time, keys = weights.shape
    groups = v.shape[1]
    grouped = jnp.reshape(weights, (batch, groups, heads // groups, time, keys))
    mixed = jnp.einsum("bghqk,bgkd->bghqd", grouped, v)
    return mixed.reshape(batch, heads, time, v.shape[-1])


def masked_softmax(scores: Any, bias: Any) -> Any:
    """Softmax over keys; a query that may look at none gets zeros, not NaN."""
    top = jnp.max(scores, axis=-1, keepdims=True)
    top = jnp.where(jnp.isneginf(top), jnp.zeros((), top.dtype), top)
    powers = jnp.exp(scores - top)
    total = jnp.sum(powers, axis=-1, keepdims=True)
    weights = powers / jnp.where(total == 0, jnp.ones((), total.dtype), total)
    if bias is None:
        return weights
    blind = jnp.isneginf(jnp.max(bias, axis=-1, keepdims=True))
    return jnp.where(blind, jnp.zeros((), weights.dtype), weights)


def _offset(q: Any, past: Any, valid: Any) -> Any:
    """How many keys precede the first query: a number, or (batch, 1, 1, 1)."""
    if past is not None:
        return past.shape[2]
    return 0 if valid is None else jnp.reshape(valid, (-1, 1, 1, 1)) - q.shape[2]


def _bias(op: Op, q: Any, k: Any, mask: Any, valid: Any, offset: Any) -> Any:
    """What is added to the scores, or None: the caller's mask, and minus infinity where the
    causal order, the window or the length of the cache forbids a key.
    """
    queries, keys = q.shape[2], k.shape[2]
    never = jnp.asarray(-jnp.inf, q.dtype)
    allowed = None
    rows = jnp.arange(queries)[:, None] + offset
    columns = jnp.arange(keys)[None, :]
    left, right = op.attr("left_window_size", -1), op.attr("right_window_size", -1)
    limits = []
    if op.attr("is_causal", 0):
        limits.append(columns <= rows)
    if left >= 0:
        limits.append(rows - columns <= left)
    if right >= 0:
        limits.append(columns - rows <= right)
    if valid is not None:
        limits.append(columns < jnp.reshape(valid, (-1, 1, 1, 1)))
    for limit in limits:
        allowed = limit if allowed is None else allowed & limit
    bias = None if allowed is None else jnp.where(allowed, jnp.zeros((), q.dtype), never)
    if mask is None:
        return bias
    short = keys - mask.shape[-1]
    boolean = mask.dtype == bool
    if short > 0:
        widths = [(0, 0)] * (mask.ndim - 1) + [(0, short)]
        mask = jnp.pad(mask, widths, constant_values=False if boolean else -jnp.inf)
    given = jnp.where(mask, jnp.zeros((), q.dtype), never) if boolean else mask
    given = jnp.broadcast_to(given, jnp.broadcast_shapes(given.shape, (queries, keys)))
    return given if bias is None else given + bias


@handles("RotaryEmbedding", since=23)
def rotary_embedding(op: Op, x: Any, cos: Any, sin: Any, positions: Any = None) -> Any:
    """Rotate pairs of channels by the angle of their position.

    ``x`` is (batch, heads, time, size), or (batch, time, heads * size) with ``num_heads``.
    """
    flat = x.ndim == 3
    if flat:
        heads = op.attr("num_heads")
        y = jnp.reshape(x, (*x.shape[:2], heads, x.shape[-1] // heads))
    else:
        y = jnp.swapaxes(x, 1, 2)
    if positions is not None:
        cos, sin = (jnp.take(table, positions, axis=0, mode="clip") for table in (cos, sin))
    width = op.attr("rotary_embedding_dim", 0) or y.shape[-1]
    rotated = rotate(y[..., :width], cos, sin, bool(op.attr("interleaved", 0)))
    y = jnp.concatenate([rotated, y[..., width:]], axis=-1) if width < y.shape[-1] else rotated
    return y.reshape(x.shape) if flat else jnp.swapaxes(y, 1, 2)


def rotate(x: Any, cos: Any, sin: Any, interleaved: bool) -> Any:
    """Rotate the channels of (batch, time, heads, width) by tables of (batch, time, width / 2)."""
    half = x.shape[-1] // 2
    cos, sin = cos[..., None, :half].astype(x.dtype), sin[..., None, :half].astype(x.dtype)
    if interleaved:
        first, second = x[..., 0::2], x[..., 1::2]
    else:
        first, second = x[..., :half], x[..., half:]
    real, imaginary = cos * first - sin * second, sin * first + cos * second
    if interleaved:
        return jnp.stack([real, imaginary], axis=-1).reshape(x.shape)
    return jnp.concatenate([real, imaginary], axis=-1)
