"""The quantized operators of ``com.microsoft``: packed weights, and arithmetic between tensors that
each have a scale and a zero point.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from trivium.backends.xla.lowering.lazy import jax, jnp
from trivium.backends.xla.lowering.ops.quantization import saturated
from trivium.backends.xla.lowering.registry import handles
from trivium.backends.xla.lowering.trace import Op

DOMAIN = "com.microsoft"


def _unpacked(packed: Any, bits: int) -> Any:
    """Bytes as the unsigned numbers that they hold, the low ones first."""
    each = 8 // bits
    shifts = jnp.arange(each, dtype="uint8") * bits
    values = (packed[..., None] >> shifts) & np.uint8(2**bits - 1)
    return values.reshape(*packed.shape[:-1], packed.shape[-1] * each)


@handles("MatMulNBits", domain=DOMAIN)
def matmul_nbits(
    op: Op, x: Any, packed: Any, scales: Any, zeros: Any = None, groups: Any = None,
    bias: Any = None,
) -> Any:  # fmt: skip
    """``x @ w.T``, ``w`` (N, K) in blocks along K: each block a product, scaled, then summed."""
    if groups is not None:
        raise op.refuse("with g_idx is not lowered", remedy="export without activation order")
    bits, block = op.attr("bits", 4), op.attr("block_size")
    outputs, inputs = op.attr("N"), op.attr("K")
    if 8 % bits:
        raise op.refuse(f"of {bits} bits is not lowered: numbers that cross bytes")
    count = -(-inputs // block)
    weights = _unpacked(jnp.reshape(packed, (outputs, count, -1)), bits)
    scale = jnp.reshape(scales, (outputs, count)).astype(x.dtype)
    if zeros is None:
        zero: Any = jnp.asarray(2 ** (bits - 1), x.dtype)
    elif zeros.dtype == "uint8":
        zero = _unpacked(jnp.reshape(zeros, (outputs, -1)), bits)[:, :count].astype(x.dtype)
    else:
        zero = jnp.reshape(zeros, (outputs, count)).astype(x.dtype)
    rows = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, count * block - inputs)])
    rows = rows.reshape(*x.shape[:-1], count, block)
    partial = jnp.einsum("...gk,ngk->...ng", rows, weights.astype(x.dtype))
    partial = partial - jnp.sum(rows, axis=-1)[..., None, :] * zero
    y = jnp.sum(partial * scale, axis=-1)
    return y if bias is None else y + bias


def _dequantized(x: Any, scale: Any, zero: Any) -> Any:
    wide = jnp.asarray(x).astype("int32")
    wide = wide if zero is None else wide - jnp.asarray(zero).astype("int32")
    return wide.astype("float32") * scale


def _requantized(y: Any, scale: Any, zero: Any, dtype: Any) -> Any:
    offset = None if zero is None else jnp.asarray(zero)
    return saturated(jnp.round(y / scale), offset, np.dtype(dtype))


def _binary(name: str, function: Callable[[Any, Any], Any]) -> None:
    @handles(name, domain=DOMAIN)
    def lowered(
        op: Op, a: Any, a_scale: Any, a_zero: Any, b: Any, b_scale: Any, b_zero: Any,
        y_scale: Any, y_zero: Any = None,
    ) -> Any:  # fmt: skip
        y = function(_dequantized(a, a_scale, a_zero), _dequantized(b, b_scale, b_zero))
        return _requantized(y, y_scale, y_zero, a.dtype)


_binary("QLinearAdd", lambda a, b: a + b)
_binary("QLinearMul", lambda a, b: a * b)


def _unary(name: str, function: Callable[[Op, Any], Any]) -> None:
    @handles(name, domain=DOMAIN)
    def lowered(op: Op, x: Any, x_scale: Any, x_zero: Any, y_scale: Any, y_zero: Any = None) -> Any:
        y = function(op, _dequantized(x, x_scale, x_zero))
        return _requantized(y, y_scale, y_zero, x.dtype)


def _leaky(op: Op, x: Any) -> Any:
    return jnp.where(x < 0, op.attr("alpha", 0.01) * x, x)


def _average(op: Op, x: Any) -> Any:
    axes = range(1, x.ndim - 1) if op.attr("channels_last", 0) else range(2, x.ndim)
    return jnp.mean(x, axis=tuple(axes), keepdims=True)


_unary("QLinearSigmoid", lambda op, x: jax.nn.sigmoid(x))
_unary("QLinearLeakyRelu", _leaky)
_unary("QLinearGlobalAveragePool", _average)


@handles("QLinearSoftmax", domain=DOMAIN)
def qlinear_softmax(
    op: Op, x: Any, x_scale: Any, x_zero: Any, y_scale: Any, y_zero: Any = None
) -> Any:
    y = jax.nn.softmax(_dequantized(x, x_scale, x_zero), axis=op.attr("axis", -1))
    return _requantized(y, y_scale, y_zero, x.dtype)


@handles("QLinearConcat", domain=DOMAIN)
def qlinear_concat(op: Op, y_scale: Any, y_zero: Any, *parts: Any) -> Any:
    """Concatenate tensors that come as (values, scale, zero point)."""
    rows = [parts[index : index + 3] for index in range(0, len(parts), 3)]
    y = jnp.concatenate([_dequantized(*row) for row in rows], axis=op.attr("axis"))
    return _requantized(y, y_scale, y_zero, y_zero.dtype)


@handles("DynamicQuantizeMatMul", domain=DOMAIN)
def dynamic_quantize_matmul(
    op: Op, x: Any, w: Any, w_scale: Any, w_zero: Any = None, bias: Any = None
) -> Any:
    """Quantize ``x`` to its own range, multiply integers, and scale the result."""
    low, high = jnp.minimum(jnp.min(x), 0), jnp.maximum(jnp.max(x), 0)
    scale = jnp.where(high == low, 1, (high - low) / 255).astype(x.dtype)
    zero = jnp.clip(jnp.round(-low / scale), 0, 255).astype("int32")
    quantized = jnp.clip(jnp.round(x / scale) + zero, 0, 255).astype("int32") - zero
    wide = jnp.asarray(w).astype("int32")
    wide = wide if w_zero is None else wide - jnp.asarray(w_zero).astype("int32")
    y = jnp.matmul(quantized, wide, preferred_element_type="int32").astype(x.dtype)
    y = y * (scale * w_scale)
    return y if bias is None else y + bias
