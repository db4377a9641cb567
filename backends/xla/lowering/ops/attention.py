"""Attention, rotary position embedding, and their kin."""

from __future__ import annotations

from typing import Any

from trivium.backends.xla.lowering.lazy import jnp
from trivium.backends.xla.lowering.registry import handles
from trivium.backends.xla.lowering.trace import Op


@handles("RotaryEmbedding", since=23)
def rotary_embedding(op: Op, x: Any, cos: Any, sin: Any, positions: Any = None) -> Any:
    """Rotate pairs of channels by the angle of their position.

    ``x`` is (batch, heads, time, size), or (batch, time, heads * size) with ``num_heads``.
    """
    flat = x.ndim == 3
    if flat:
        heads = op.attr("num_heads")
        y = x.reshape(*x.shape[:2], heads, x.shape[-1] // heads)
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
