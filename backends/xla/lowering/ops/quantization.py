"""Quantize, dequantize, and the operators that compute on integers."""

from __future__ import annotations

from typing import Any

import numpy as np

from trivium.backends.xla.lowering.cpu import integer_matmul
from trivium.backends.xla.lowering.dtypes import is_float, is_integer, numpy_dtype
from trivium.backends.xla.lowering.lazy import jnp, lax
from trivium.backends.xla.lowering.ops.casting import convert
from trivium.backends.xla.lowering.ops.convolution import convolve, per_channel
from trivium.backends.xla.lowering.registry import handles
from trivium.backends.xla.lowering.trace import Op


def aligned(parameter: Any, x: Any, axis: int, block: int = 0) -> Any:
    """A scale or zero point shaped to broadcast over ``x``: per tensor, per axis, or blocked."""
    if parameter.ndim == 0 or parameter.size == 1:
        return jnp.reshape(parameter, ())
    axis = axis % x.ndim
    if parameter.ndim == 1 and not block:
        return jnp.reshape(parameter, [-1 if i == axis else 1 for i in range(x.ndim)])
    each = block or -(-x.shape[axis] // parameter.shape[axis])
    repeated = jnp.repeat(parameter, each, axis=axis)
    return lax.slice_in_dim(repeated, 0, x.shape[axis], axis=axis)


@handles("DequantizeLinear", since=10, constants=(2,))
def dequantize_linear(op: Op, x: Any, scale: Any, zero: Any = None) -> Any:
    axis, block = op.attr("axis", 1), op.attr("block_size", 0)
    wanted = op.attr("output_dtype", 0)
    dtype = numpy_dtype(wanted) if wanted else scale.dtype
    compute = jnp.promote_types(scale.dtype, "float32")
    x = jnp.asarray(x)
    if is_float(x.dtype):
        y = x.astype(compute)
        offset = None if zero is None else jnp.asarray(zero).astype(compute)
    else:
        y = x.astype("int32")
        offset = None if zero is None else jnp.asarray(zero).astype("int32")
    if offset is not None and not (op.known(zero) and not np.asarray(zero).astype("float32").any()):
        y = y - aligned(offset, x, axis, block)
    factor = aligned(jnp.asarray(scale).astype(compute), x, axis, block)
    return (y.astype(compute) * factor).astype(dtype)


@handles("QuantizeLinear", since=10)
def quantize_linear(op: Op, x: Any, scale: Any, zero: Any = None) -> Any:
    axis, block = op.attr("axis", 1), op.attr("block_size", 0)
    wanted = op.attr("output_dtype", 0)
    if zero is not None:
        dtype = np.dtype(zero.dtype)
    else:
        dtype = numpy_dtype(wanted) if wanted else np.dtype("uint8")
    precision = op.attr("precision", 0)
    compute = numpy_dtype(precision) if precision else jnp.promote_types(x.dtype, scale.dtype)
    compute = jnp.promote_types(compute, "float32")
    factor = aligned(jnp.asarray(scale).astype(compute), x, axis, block)
    y = jnp.asarray(x).astype(compute) / factor
    offset = None if zero is None else aligned(jnp.asarray(zero), x, axis, block)
    if not is_integer(dtype):
        y = y if offset is None else y + offset.astype(compute)
        return convert(y, dtype, bool(op.attr("saturate", 1)))
    return saturated(jnp.round(y), offset, dtype)


def saturated(rounded: Any, offset: Any, dtype: Any) -> Any:
    """Rounded floats plus a zero point, cut to the range of an integer type."""
    limits = jnp.iinfo(dtype)
    low = jnp.asarray(int(limits.min), rounded.dtype)
    high = jnp.asarray(int(limits.max), rounded.dtype)
    if offset is not None:
        rounded = rounded + offset.astype(rounded.dtype)
    return jnp.clip(rounded, low, high).astype("int32").astype(dtype)


@handles("DynamicQuantizeLinear", since=11)
def dynamic_quantize_linear(op: Op, x: Any) -> Any:
    zero = jnp.zeros((), x.dtype)
    low = jnp.minimum(jnp.min(x), zero)
    high = jnp.maximum(jnp.max(x), zero)
    scale = (high - low) / jnp.asarray(255, x.dtype)
    scale = jnp.where(scale == 0, jnp.ones((), x.dtype), scale)
    point = jnp.clip(jnp.round(-low / scale), 0, 255).astype("uint8")
    return saturated(jnp.round(x / scale), point, np.dtype("uint8")), scale, point


def centred(x: Any, zero: Any, axis: int) -> Any:
    """``x - zero`` as int32; ``zero`` may have one value for each row or column."""
    wide = jnp.asarray(x).astype("int32")
    if zero is None:
        return wide
    zero = jnp.asarray(zero).astype("int32")
    if zero.ndim == 1 and zero.size > 1:
        zero = jnp.expand_dims(zero, axis) if axis == -1 else zero
    return wide - zero


@handles("MatMulInteger", since=10)
def matmul_integer(op: Op, a: Any, b: Any, a_zero: Any = None, b_zero: Any = None) -> Any:
    return centred_product(op, a, a_zero, b, b_zero)


def centred_product(op: Op, a: Any, a_zero: Any, b: Any, b_zero: Any) -> Any:
    """The int32 product of two tensors of integers less their zero points."""
    a, b = centred(a, a_zero, -1), centred(b, b_zero, -2)
    if op.frame.platform == "cpu":
        exact = integer_matmul(a, b)
        if exact is not None:
            return exact
    return jnp.matmul(a, b, preferred_element_type="int32")


@handles("QLinearMatMul", since=10)
def qlinear_matmul(
    op: Op, a: Any, a_scale: Any, a_zero: Any, b: Any, b_scale: Any, b_zero: Any, y_scale: Any,
    y_zero: Any,
) -> Any:  # fmt: skip
    total = centred_product(op, a, a_zero, b, b_zero)
    left = jnp.asarray(a_scale).astype("float32")
    left = left[..., None] if left.ndim and left.size > 1 else left
    factor = left * jnp.asarray(b_scale).astype("float32") / jnp.asarray(y_scale).astype("float32")
    return saturated(jnp.round(total * factor), jnp.asarray(y_zero), np.dtype(y_zero.dtype))


def _filters_centred(w: Any, zero: Any) -> Any:
    wide = jnp.asarray(w).astype("int32")
    if zero is None:
        return wide
    zero = jnp.asarray(zero).astype("int32")
    return wide - (jnp.reshape(zero, (-1, *(1,) * (w.ndim - 1))) if zero.ndim else zero)


@handles("ConvInteger", since=10)
def conv_integer(op: Op, x: Any, w: Any, x_zero: Any = None, w_zero: Any = None) -> Any:
    return convolve(
        op, centred(x, x_zero, -1), _filters_centred(w, w_zero), preferred_element_type="int32"
    )


@handles("QLinearConv", since=10)
def qlinear_conv(
    op: Op, x: Any, x_scale: Any, x_zero: Any, w: Any, w_scale: Any, w_zero: Any, y_scale: Any,
    y_zero: Any, bias: Any = None,
) -> Any:  # fmt: skip
    total = convolve(
        op, centred(x, x_zero, -1), _filters_centred(w, w_zero), preferred_element_type="int32"
    )
    if bias is not None:
        total = total + per_channel(bias, total.ndim)
    factor = jnp.asarray(x_scale) * jnp.asarray(w_scale) / jnp.asarray(y_scale)
    factor = per_channel(factor, total.ndim) if factor.ndim and factor.size > 1 else factor
    return saturated(jnp.round(total * factor), jnp.asarray(y_zero), np.dtype(y_zero.dtype))
