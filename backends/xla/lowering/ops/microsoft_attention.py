"""The attention operators of ``com.microsoft``."""

from __future__ import annotations

from typing import Any

from trivium.backends.xla.lowering.lazy import jax, jnp
from trivium.backends.xla.lowering.ops.attention import (
    grouped_mix,
    grouped_scores,
    masked_softmax,
    rotate,
)
from trivium.backends.xla.lowering.ops.linear import scaled
from trivium.backends.xla.lowering.ops.microsoft_quantized import dequantized
from trivium.backends.xla.lowering.registry import handles
from trivium.backends.xla.lowering.trace import Op

DOMAIN = "com.microsoft"


@handles("Attention", domain=DOMAIN)
def attention(
    op: Op, x: Any, weights: Any, bias: Any, mask: Any = None, past: Any = None,
    attention_bias: Any = None, past_length: Any = None,
) -> Any:  # fmt: skip
    """Self-attention, the three projections packed; ``past`` is (2, batch, heads, time, size)."""
    if past_length is not None:
        raise op.refuse("with a past buffer shared with the present is not lowered")
    if op.attr("do_rotary", 0):
        raise op.refuse("that rotates by position is not lowered")
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
    y = _attended(op, q, k, v, mask, attention_bias, k.shape[2] - length)
    return (y, jnp.stack([k, v])) if op.wants(1) else y


def _attended(op: Op, q: Any, k: Any, v: Any, mask: Any, attention_bias: Any, before: int) -> Any:
    """Attention over (batch, heads, time, size), its heads side by side again; ``before`` is how
    many keys precede the first query."""
    batch, length, total = q.shape[0], q.shape[2], k.shape[2]
    scale = op.attr("scale", 0.0) or q.shape[-1] ** -0.5
    scores = scaled(q @ jnp.swapaxes(k, -1, -2), scale)
    if attention_bias is not None:
        scores = scores + attention_bias
    fill = jnp.asarray(op.attr("mask_filter_value", -10000.0), scores.dtype)
    if mask is not None:
        scores = scores + jnp.where(_visible(op, mask, total), jnp.zeros((), fill.dtype), fill)
    if op.attr("unidirectional", 0):
        rows = jnp.arange(length)[:, None] + before
        causal = jnp.arange(total)[None, :] <= rows
        scores = jnp.where(causal, scores, jnp.finfo(scores.dtype).min)
    y = jax.nn.softmax(scores, axis=-1) @ v
    return y.transpose(0, 2, 1, 3).reshape(batch, length, -1)


@handles("MultiHeadAttention", domain=DOMAIN)
def multi_head_attention(
    op: Op, query: Any, key: Any = None, value: Any = None, bias: Any = None, mask: Any = None,
    attention_bias: Any = None, past_key: Any = None, past_value: Any = None,
    past_length: Any = None, indirection: Any = None,
) -> Any:  # fmt: skip
    """Attention on projections: apart as (batch, time, width), packed with an axis of three (or of
    keys and values two) behind the heads, or keys and values of (batch, heads, time, size).
    """
    if past_length is not None or indirection is not None:
        raise op.refuse("with a past buffer shared with the present is not lowered")
    if op.wants(3):
        raise op.refuse("that returns its scores is not lowered")
    heads = op.attr("num_heads")
    if query.ndim == 5:
        query, key, value = (query[..., index, :] for index in range(3))
    elif key is not None and key.ndim == 5:
        key, value = key[..., 0, :], key[..., 1, :]
    if key is None:
        raise op.refuse("without keys is not lowered")
    parts = [query, key, value]
    if bias is not None:
        width = query.size // (query.shape[0] * query.shape[1]) if query.ndim == 4 else 0
        width = width or query.shape[-1]
        shares = jnp.split(jnp.asarray(bias), [width, 2 * width])
        parts = [_biased(part, own, heads) for part, own in zip(parts, shares, strict=True)]
    # Only keys and values that come as (batch, heads, time, size) have their heads second.
    ready = query.ndim == 3 and key.ndim == 4
    q, k, v = (_heads_second(part, heads, index > 0 and ready) for index, part in enumerate(parts))
    before = 0
    if past_key is not None:
        before = past_key.shape[2]
        k = jnp.concatenate([past_key, k], axis=2)
        v = jnp.concatenate([past_value, v], axis=2)
    return _attended(op, q, k, v, mask, attention_bias, before), k, v


def _biased(x: Any, bias: Any, heads: int) -> Any:
    """A projection plus its bias, heads apart or not."""
    return x + (jnp.reshape(bias, (heads, -1)) if x.ndim == 4 else bias)


def _heads_second(x: Any, heads: int, ready: bool) -> Any:
    if ready:
        return x
    apart = x if x.ndim == 4 else jnp.reshape(x, (*x.shape[:2], heads, x.shape[-1] // heads))
    return jnp.swapaxes(apart, 1, 2)


@handles("QAttention", domain=DOMAIN)
def quantized_attention(
    op: Op, x: Any, weights: Any, bias: Any, x_scale: Any, w_scale: Any, mask: Any = None,
    x_zero: Any = None, w_zero: Any = None, past: Any = None,
) -> Any:  # fmt: skip
    """`attention` of dequantized input and weights; their scales may be by column."""
    return attention(
        op, dequantized(x, x_scale, x_zero), dequantized(weights, w_scale, w_zero), bias, mask, past
    )


def _visible(op: Op, mask: Any, total: int) -> Any:
    """ONNX Runtime's masks as booleans that broadcast over (batch, heads, query, key)."""
    if mask.ndim == 1:
        return (jnp.arange(total) < mask[:, None])[:, None, None, :]
    if mask.ndim == 2:
        return (mask != 0)[:, None, None, :]
    if mask.ndim == 3:
        return (mask != 0)[:, None]
    raise op.refuse(f"with a mask of {mask.ndim} dimensions is not lowered")


@handles("RotaryEmbedding", domain=DOMAIN)
def rotary_embedding(op: Op, x: Any, positions: Any, cos: Any, sin: Any) -> Any:
    """Rotation by position; ``x`` is (batch, time, width) or (batch, heads, time, size).

    ``positions`` is (batch, time), or (1,): the first position of every batch entry.
    """
    flat = x.ndim == 3
    width = op.attr("rotary_embedding_dim", 0) or 2 * cos.shape[1]
    if flat:
        heads = op.attr("num_heads", 0)
        size = x.shape[-1] // heads if heads else 2 * cos.shape[1]
        y = jnp.reshape(x, (*x.shape[:2], x.shape[-1] // size, size))
    else:
        y = jnp.swapaxes(x, 1, 2)
    if positions.size == 1 and y.shape[:2] != (1, 1):
        positions = jnp.reshape(positions, (1, 1)) + jnp.arange(y.shape[1])[None, :]
    cos, sin = (jnp.take(table, positions, axis=0, mode="clip") for table in (cos, sin))
    y = _rotated(y, cos, sin, width, bool(op.attr("interleaved", 0)))
    return y.reshape(x.shape) if flat else jnp.swapaxes(y, 1, 2)


def _rotated(x: Any, cos: Any, sin: Any, width: int, interleaved: bool) -> Any:
    turned = rotate(x[..., :width], cos, sin, interleaved)
    return jnp.concatenate([turned, x[..., width:]], axis=-1)


@handles("GroupQueryAttention", domain=DOMAIN)
def group_query_attention(
    op: Op, query: Any, key: Any, value: Any, past_key: Any, past_value: Any, last: Any,
    total: Any, cos: Any = None, sin: Any = None, positions: Any = None, bias: Any = None,
    sink: Any = None, k_scale: Any = None, v_scale: Any = None, q_norm: Any = None,
    k_norm: Any = None, new: Any = None,
) -> Any:  # fmt: skip
    """Causal attention with a KV cache, heads grouped, positions rotated inside.

    ``last`` (batch,) is the index of the last valid key, ``new`` (batch,) how many of the queries
    count. A cache as long as the result is written in place (``past`` and ``present`` share a
    buffer); a shorter one grows.
    """
    if any(extra is not None for extra in (sink, k_scale, v_scale, q_norm, k_norm)):
        raise op.refuse("with sinks, quantized caches or norms inside is not lowered")
    heads, groups = op.attr("num_heads"), op.attr("kv_num_heads")
    batch, time = query.shape[:2]
    if key is None:
        size = query.shape[2] // (heads + 2 * groups)
        query, key, value = jnp.split(query, [heads * size, (heads + groups) * size], axis=-1)
    size = query.shape[2] // heads
    q = jnp.reshape(query, (batch, time, heads, size))
    k = jnp.reshape(key, (batch, time, groups, size))
    v = jnp.reshape(value, (batch, time, groups, size))
    valid = jnp.reshape(last, (-1,)).astype("int64") + 1
    # A prompt is as long as its longest row; shorter rows are padded at the end.
    count = time if new is None else jnp.reshape(new, (-1,)).astype("int64")
    first = jnp.maximum(valid - count, 0) if past_key is not None else jnp.zeros_like(valid)
    place = first[:, None] + jnp.arange(time)
    if op.attr("do_rotary", 0):
        where = place if positions is None else positions
        width, interleaved = 2 * cos.shape[1], bool(op.attr("rotary_interleaved", 0))
        cos, sin = (jnp.take(table, where, axis=0, mode="clip") for table in (cos, sin))
        q, k = (_rotated(x, cos, sin, width, interleaved) for x in (q, k))
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    if past_key is not None:
        k, v = (
            _appended(op, past, new, place, total) for past, new in ((past_key, k), (past_value, v))
        )
    column = jnp.arange(k.shape[2])
    allowed = column <= place[:, None, :, None]
    window = op.attr("local_window_size", -1)
    if window > 0:
        allowed &= column > place[:, None, :, None] - window
    mask = jnp.where(allowed, jnp.zeros((), q.dtype), jnp.asarray(-jnp.inf, q.dtype))
    scale = op.attr("scale", 0.0) or size**-0.5
    scores = scaled(grouped_scores(jnp.swapaxes(q, 1, 2), k), scale)
    cap = op.attr("softcap", 0.0)
    scores = jnp.tanh(scores / cap) * cap if cap else scores
    scores = scores if bias is None else scores + bias
    weights = masked_softmax((scores + mask).astype("float32"), mask).astype(q.dtype)
    y = jnp.swapaxes(grouped_mix(weights, v), 1, 2).reshape(batch, time, -1)
    return y, k, v


def _appended(op: Op, past: Any, new: Any, place: Any, total: Any) -> Any:
    """A cache (batch, groups, keys, size) with new keys at their places."""
    promised = op.shape(1)
    if op.known(total):
        room = max(op.ints(6, total)[0], past.shape[2])
    elif promised is not None:
        room = promised[2]
    else:
        room = past.shape[2]
    grown = jnp.pad(past, [(0, 0), (0, 0), (0, room - past.shape[2]), (0, 0)])
    rows = jnp.arange(past.shape[0])[:, None]
    by_place = jnp.swapaxes(grown, 1, 2).at[rows, place].set(jnp.swapaxes(new, 1, 2))
    return jnp.swapaxes(by_place, 1, 2)
