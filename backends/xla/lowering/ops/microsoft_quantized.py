"""The quantized operators of ``com.microsoft``: packed weights, and arithmetic between tensors that
each have a scale and a zero point.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from trivium.backends.xla.lowering.lazy import jax, jnp
from trivium.backends.xla.lowering.ops.indexing import gather
from trivium.backends.xla.lowering.ops.microsoft import embed_layer_normalization
from trivium.backends.xla.lowering.ops.pooling import average_pool
from trivium.backends.xla.lowering.ops.quantization import (
    aligned,
    centred_product,
    dequantize_linear,
    qlinear_conv,
    quantize_linear,
    saturated,
)
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


def dequantized(x: Any, scale: Any, zero: Any) -> Any:
    """Integers as the float32 that they stand for; scale and zero point broadcast."""
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
        y = function(dequantized(a, a_scale, a_zero), dequantized(b, b_scale, b_zero))
        return _requantized(y, y_scale, y_zero, a.dtype)


_binary("QLinearAdd", lambda a, b: a + b)
_binary("QLinearMul", lambda a, b: a * b)


def _unary(name: str, function: Callable[[Op, Any], Any]) -> None:
    @handles(name, domain=DOMAIN)
    def lowered(op: Op, x: Any, x_scale: Any, x_zero: Any, y_scale: Any, y_zero: Any = None) -> Any:
        y = function(op, dequantized(x, x_scale, x_zero))
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
    y = jax.nn.softmax(dequantized(x, x_scale, x_zero), axis=op.attr("axis", -1))
    return _requantized(y, y_scale, y_zero, x.dtype)


@handles("QLinearConcat", domain=DOMAIN)
def qlinear_concat(op: Op, y_scale: Any, y_zero: Any, *parts: Any) -> Any:
    """Concatenate tensors that come as (values, scale, zero point)."""
    rows = [parts[index : index + 3] for index in range(0, len(parts), 3)]
    y = jnp.concatenate([dequantized(*row) for row in rows], axis=op.attr("axis"))
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
    y = centred_product(op, quantized, None, w, w_zero).astype(x.dtype) * (scale * w_scale)
    return y if bias is None else y + bias


# The standard's own, with 16 and 4 bits before it had them.
handles("DequantizeLinear", domain=DOMAIN, constants=(2,))(dequantize_linear)
handles("QuantizeLinear", domain=DOMAIN)(quantize_linear)


@handles("QLinearConv", domain=DOMAIN)
def qlinear_conv_of_any_layout(
    op: Op, x: Any, x_scale: Any, x_zero: Any, w: Any, *others: Any
) -> Any:
    if not op.attr("channels_last", 0):
        return qlinear_conv(op, x, x_scale, x_zero, w, *others)
    y = qlinear_conv(op, jnp.moveaxis(jnp.asarray(x), -1, 1), x_scale, x_zero, w, *others)
    return jnp.moveaxis(y, 1, -1)


@handles("QGemm", domain=DOMAIN)
def qgemm(
    op: Op, a: Any, a_scale: Any, a_zero: Any, b: Any, b_scale: Any, b_zero: Any, c: Any = None,
    y_scale: Any = None, y_zero: Any = None,
) -> Any:  # fmt: skip
    """Integers multiplied, ``c`` (int32) added, scaled; a float unless ``y_scale`` is given."""
    a = jnp.transpose(a) if op.attr("transA", 0) else a
    b = jnp.transpose(b) if op.attr("transB", 0) else b
    total = centred_product(op, a, a_zero, b, b_zero)
    total = total if c is None else total + c
    factor = jnp.asarray(op.attr("alpha", 1.0), "float32") * a_scale * b_scale
    y = total.astype("float32") * factor
    return y if y_scale is None else _requantized(y, y_scale, y_zero, y_zero.dtype)


@handles("MatMulIntegerToFloat", domain=DOMAIN)
def matmul_integer_to_float(
    op: Op, a: Any, b: Any, a_scale: Any, b_scale: Any, a_zero: Any = None, b_zero: Any = None,
    bias: Any = None,
) -> Any:  # fmt: skip
    total = centred_product(op, a, a_zero, b, b_zero)
    y = total.astype(a_scale.dtype) * (jnp.asarray(a_scale) * b_scale)
    return y if bias is None else y + bias


@handles("QLinearWhere", domain=DOMAIN)
def qlinear_where(
    op: Op, condition: Any, x: Any, x_scale: Any, x_zero: Any, y: Any, y_scale: Any, y_zero: Any,
    z_scale: Any, z_zero: Any,
) -> Any:  # fmt: skip
    z = jnp.where(condition, dequantized(x, x_scale, x_zero), dequantized(y, y_scale, y_zero))
    return _requantized(z, z_scale, z_zero, x.dtype)


@handles("QLinearAveragePool", domain=DOMAIN)
def qlinear_average_pool(
    op: Op, x: Any, x_scale: Any, x_zero: Any, y_scale: Any, y_zero: Any = None
) -> Any:
    wide = dequantized(x, x_scale, x_zero)
    if op.attr("channels_last", 0):
        y = jnp.moveaxis(average_pool(op, jnp.moveaxis(wide, -1, 1)), 1, -1)
    else:
        y = average_pool(op, wide)
    return _requantized(y, y_scale, y_zero, x.dtype)


@handles("QEmbedLayerNormalization", domain=DOMAIN)
def quantized_embed_layer_normalization(
    op: Op, ids: Any, segments: Any, words: Any, positions: Any, segment_table: Any, gamma: Any,
    beta: Any, mask: Any, *parameters: Any,
) -> Any:  # fmt: skip
    """The scales of the five tables in their order, then their zero points."""
    tables = (words, positions, segment_table, gamma, beta)
    pairs = zip(tables, parameters[:5], parameters[5:], strict=True)
    floats = [None if row[0] is None else dequantized(*row) for row in pairs]
    return embed_layer_normalization(op, ids, segments, *floats, mask)[:2]


@handles("GatherBlockQuantized", domain=DOMAIN)
def gather_block_quantized(op: Op, data: Any, indices: Any, scales: Any, zeros: Any = None) -> Any:
    """Rows of a table that is quantized in blocks; bytes hold numbers of 8, 4 or 2 bits."""
    block = op.attr("block_size", 128)
    gathered = op.attr("gather_axis", 0) % data.ndim
    quantized = op.attr("quantize_axis", 1) % data.ndim
    if gathered == quantized or not block:
        raise op.refuse("that gathers along its blocks, or has none, is not lowered")
    bits = op.attr("bits", 4) if data.dtype == "uint8" else 0
    if bits not in (0, 2, 4, 8) or (bits % 8 and quantized != data.ndim - 1):
        raise op.refuse(f"of {bits} bits along axis {quantized} is not lowered")
    along: Any = _Along(op, gathered)
    x, scale = gather(along, data, indices), gather(along, scales, indices)
    zero = None if zeros is None else gather(along, zeros, indices)
    axis = quantized + (indices.ndim - 1 if quantized > gathered else 0)
    if bits:
        x = _unpacked(x, bits)
        zero = None if zero is None else _unpacked(zero, bits)[..., : scale.shape[-1]]
    wide = x.astype("int32")
    if zero is not None:
        wide = wide - aligned(zero.astype("int32"), wide, axis, block)
    elif bits:
        wide = wide - 2 ** (bits - 1)
    return wide.astype(scale.dtype) * aligned(scale, wide, axis, block)


class _Along:
    """The attributes of a Gather along an axis."""

    def __init__(self, op: Op, axis: int) -> None:
        self.op, self.axis = op, axis

    def attr(self, name: str, default: Any = None) -> Any:
        return self.axis if name == "axis" else self.op.attr(name, default)


_FP4 = (0.0, 5.208333333e-03, 2 / 3, 1.0, 1 / 3, 0.5, 1 / 6, 0.25)
_BITSANDBYTES = (
    (*_FP4, *(-x for x in _FP4)),
    (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
     -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
     0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
     0.7229568362236023, 1.0),
)  # fmt: skip
"""What the 16 codes of bitsandbytes' FP4 and NF4 stand for, in shares of a block's largest."""


@handles("MatMulBnb4", domain=DOMAIN)
def matmul_bitsandbytes(op: Op, x: Any, packed: Any, largest: Any) -> Any:
    """``x @ w.T``, ``w`` (N, K) flat in blocks, two codes in a byte, the first one high."""
    outputs, inputs, block = op.attr("N"), op.attr("K"), op.attr("block_size")
    if not op.attr("transB", 1):
        raise op.refuse("with transB=0 is not lowered")
    table = jnp.asarray(np.asarray(_BITSANDBYTES[op.attr("quant_type")]), x.dtype)
    packed = jnp.reshape(packed, -1)
    codes = jnp.stack([packed >> 4, packed & np.uint8(15)], axis=-1).reshape(-1)
    codes = codes[: outputs * inputs]
    scale = jnp.repeat(jnp.reshape(largest, -1), block)[: outputs * inputs]
    weights = (table[codes] * scale.astype(x.dtype)).reshape(outputs, inputs)
    return jnp.matmul(x, weights.T)
