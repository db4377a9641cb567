"""Normalizations: statistics over some axes, then scale and shift."""

from __future__ import annotations

from typing import Any

from trivium.backends.xla.lowering.dtypes import numpy_dtype
from trivium.backends.xla.lowering.lazy import jnp, lax
from trivium.backends.xla.lowering.ops.convolution import per_channel
from trivium.backends.xla.lowering.registry import handles
from trivium.backends.xla.lowering.trace import Op


@handles("BatchNormalization")
def batch_normalization(op: Op, x: Any, scale: Any, bias: Any, mean: Any, variance: Any) -> Any:
    epsilon = op.attr("epsilon", 1e-5)
    if not op.attr("training_mode", 0):
        factor = scale * lax.rsqrt(variance + jnp.asarray(epsilon, variance.dtype))
        shift = bias - mean * factor
        y = x * per_channel(factor, x.ndim) + per_channel(shift, x.ndim)
        return y.astype(x.dtype)
    axes = (0, *range(2, x.ndim))
    own_mean, own_variance = jnp.mean(x, axes), jnp.var(x, axes)
    keep = jnp.asarray(op.attr("momentum", 0.9), mean.dtype)
    factor = scale * lax.rsqrt(own_variance + jnp.asarray(epsilon, own_variance.dtype))
    y = (x - per_channel(own_mean, x.ndim)) * per_channel(factor, x.ndim)
    y = (y + per_channel(bias, x.ndim)).astype(x.dtype)
    return (
        y,
        mean * keep + own_mean.astype(mean.dtype) * (1 - keep),
        variance * keep + own_variance.astype(variance.dtype) * (1 - keep),
    )


@handles("InstanceNormalization")
def instance_normalization(op: Op, x: Any, scale: Any, bias: Any) -> Any:
    y = standardized(x, tuple(range(2, x.ndim)), op.attr("epsilon", 1e-5))[0]
    return y * per_channel(scale, x.ndim) + per_channel(bias, x.ndim)


def standardized(x: Any, axes: tuple[int, ...], epsilon: float) -> tuple[Any, Any, Any]:
    """Return ``(x - mean) / sqrt(variance + epsilon)``, the mean, and one over the deviation."""
    mean = jnp.mean(x, axes, keepdims=True)
    centred = x - mean
    variance = jnp.mean(centred * centred, axes, keepdims=True)
    inverse = lax.rsqrt(variance + jnp.asarray(epsilon, variance.dtype))
    return centred * inverse, mean, inverse


def _stash(op: Op, x: Any) -> Any:
    """The dtype to compute statistics in: what the model asks for, or a wider input's own."""
    return jnp.promote_types(x.dtype, numpy_dtype(op.attr("stash_type", 1)))


@handles("LayerNormalization", since=17)
def layer_normalization(op: Op, x: Any, scale: Any, bias: Any = None) -> Any:
    axes = tuple(range(op.attr("axis", -1) % x.ndim, x.ndim))
    wide = jnp.asarray(x, _stash(op, x))
    y, mean, inverse = standardized(wide, axes, op.attr("epsilon", 1e-5))
    y = y.astype(x.dtype) * scale
    return (y if bias is None else y + bias), mean, inverse


@handles("RMSNormalization", since=23)
def rms_normalization(op: Op, x: Any, scale: Any) -> Any:
    axes = tuple(range(op.attr("axis", -1) % x.ndim, x.ndim))
    return rms_normalized(x, axes, op.attr("epsilon", 1e-5), _stash(op, x)) * scale


def rms_normalized(x: Any, axes: tuple[int, ...], epsilon: float, dtype: Any) -> Any:
    """``x`` over its root mean square, computed in ``dtype``, in the dtype of ``x``."""
    wide = jnp.asarray(x, dtype)
    square = jnp.mean(wide * wide, axes, keepdims=True)
    return (wide * lax.rsqrt(square + jnp.asarray(epsilon, dtype))).astype(x.dtype)


@handles("GroupNormalization", since=18)
def group_normalization_by_group(op: Op, x: Any, scale: Any, bias: Any) -> Any:
    """Until opset 20 scale and bias had one value for each group."""
    groups = op.attr("num_groups")
    each = x.shape[1] // groups
    return _group_normalize(op, x, jnp.repeat(scale, each), jnp.repeat(bias, each))


@handles("GroupNormalization", since=21)
def group_normalization(op: Op, x: Any, scale: Any, bias: Any) -> Any:
    return _group_normalize(op, x, scale, bias)


def _group_normalize(op: Op, x: Any, scale: Any, bias: Any) -> Any:
    groups = op.attr("num_groups")
    wide = jnp.asarray(x, _stash(op, x)).reshape(x.shape[0], groups, -1)
    y = standardized(wide, (2,), op.attr("epsilon", 1e-5))[0]
    y = y.reshape(x.shape).astype(x.dtype)
    return y * per_channel(scale, x.ndim) + per_channel(bias, x.ndim)


@handles("LpNormalization")
def lp_normalization(op: Op, x: Any) -> Any:
    axis, p = op.attr("axis", -1), op.attr("p", 2)
    if p == 1:
        norm = jnp.sum(jnp.abs(x), axis, keepdims=True)
    else:
        norm = jnp.sqrt(jnp.sum(x * x, axis, keepdims=True))
    zero = norm == 0
    return jnp.where(zero, jnp.zeros((), x.dtype), x / jnp.where(zero, 1, norm).astype(x.dtype))


@handles("MeanVarianceNormalization", since=9)
def mean_variance_normalization(op: Op, x: Any) -> Any:
    axes = tuple(op.attr("axes", [0, 2, 3]))
    centred = x - jnp.mean(x, axes, keepdims=True)
    deviation = jnp.sqrt(jnp.mean(centred * centred, axes, keepdims=True))
    return centred / (deviation + jnp.asarray(1e-9, x.dtype))


@handles("LRN")
def local_response_normalization(op: Op, x: Any) -> Any:
    size = op.attr("size")
    before = (size - 1) // 2
    padding = [(0, 0), (before, size - 1 - before)] + [(0, 0)] * (x.ndim - 2)
    padded = jnp.pad(x * x, padding)
    # Not reduce_window: libtpu 0.0.52 fails to compile a window over channels beside a division.
    channels = x.shape[1]
    square = sum(lax.slice_in_dim(padded, shift, shift + channels, axis=1) for shift in range(size))
    alpha = jnp.asarray(op.attr("alpha", 1e-4) / size, x.dtype)
    beta = jnp.asarray(op.attr("beta", 0.75), x.dtype)
    return x / jnp.power(jnp.asarray(op.attr("bias", 1.0), x.dtype) + alpha * square, beta)


@handles("Dropout")
def dropout_at_inference(op: Op, x: Any) -> Any:
    """Until opset 11 there was no training mode."""
    return x, jnp.ones(x.shape, bool)
