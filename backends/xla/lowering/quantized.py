"""What a product does when its operands come out of DequantizeLinear, instead of computing on the
floats: legalization while tracing, kept apart from the handlers.

- Both operands quantized: the integers themselves are multiplied, accumulated in int32, and the
  scales are applied to the result: ``(a - za) sa @ (b - zb) sb``. Not in a program for CPUs only.
- Only the weights quantized: they stay packed until inside the product, which is scaled by
  channel or by block afterwards.

For training, a QuantizeLinear and DequantizeLinear pair passes gradients straight through.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx_ir as ir

from trivium.backends.xla.lowering.cpu import grouped_convolution
from trivium.backends.xla.lowering.fold import is_known
from trivium.backends.xla.lowering.lazy import jnp, lax

if TYPE_CHECKING:
    from trivium.backends.xla.lowering.trace import Op

Mode = Literal["integer", "float", "straight-through"]
"""How quantized products are lowered: on integers, on floats, or on floats with gradients."""

_INTEGERS = frozenset({"int8", "uint8", "int4", "uint4", "int2", "uint2"})


@dataclass(frozen=True)
class Quantized:
    """An operand as it is stored: integers, and what turns them into numbers.

    Attributes:
        scale, zero: Scalars, or one value for each place along ``axis``, or one for each block.
        block: Elements of a block along ``axis``; 0 if not blocked.
    """

    data: Any
    scale: Any
    zero: Any
    axis: int
    block: int

    @property
    def per_tensor(self) -> bool:
        return bool(self.scale.size == 1) and not self.block

    @property
    def has_zero(self) -> bool:
        """Whether there is a zero point that is not known to be zero."""
        if self.zero is None:
            return False
        return not (is_known(self.zero) and not np.asarray(self.zero).astype(np.int32).any())

    def signed(self) -> tuple[Any, Any]:
        """The data as int8 and the zero point (or None) shifted with it, as int32."""
        data = jnp.asarray(self.data)
        shift = 0
        if data.dtype == "uint8":
            data, shift = lax.bitcast_convert_type(data ^ np.uint8(128), np.int8), 128
        else:
            data = data.astype("int8")
        if not self.has_zero and not shift:
            return data, None
        zero = jnp.zeros((), "int32") if self.zero is None else jnp.asarray(self.zero, "int32")
        return data, zero - shift


def integer_product(op: Op) -> Any | None:
    """Lower a product on its quantized operands; None where that does not apply."""
    lower = _PRODUCTS.get(op.node.op_type) if op.node.domain == "" else None
    if lower is None:
        return None
    left, right = (_quantized(op, value) for value in op.node.inputs[:2])
    if right is None:
        return None
    if left is not None and op.frame.platform == "cpu":
        # XLA has plain loops for products of integers there: four times what floats take.
        return None
    return lower(op, left, right)


def _quantized(op: Op, value: ir.Value | None) -> Quantized | None:
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "DequantizeLinear" or node.domain != "":
        return None
    env = op.frame.env
    operands = [None if v is None else env.get(v) for v in node.inputs]
    data, scale = operands[:2]
    if data is None or scale is None or np.dtype(data.dtype).name not in _INTEGERS:
        return None
    axis = node.attributes.get_int("axis", 1) or 0
    block = node.attributes.get_int("block_size", 0) or 0
    zero = operands[2] if len(operands) > 2 else None
    return Quantized(data, jnp.asarray(scale), zero, axis % max(data.ndim, 1), block)


def _matmul(op: Op, a: Quantized | None, b: Quantized) -> Any | None:
    if b.data.ndim != 2:
        return None
    if a is None:
        left = op.node.inputs[0]
        assert left is not None
        return _weight_only(op.frame.env[left], b)
    return _integer_matmul(a, b)


def _integer_matmul(a: Quantized, b: Quantized) -> Any | None:
    """``a @ b``, ``a`` by tensor and ``b`` by tensor or by column."""
    by_column = b.axis == 1 and b.scale.ndim == 1 and not b.block
    if not a.per_tensor or not (b.per_tensor or by_column) or a.data.ndim < 1:
        return None
    left, left_zero = a.signed()
    right, right_zero = b.signed()
    total = lax.dot_general(
        left, right, (((left.ndim - 1,), (0,)), ((), ())), preferred_element_type=np.int32
    )
    if left_zero is not None:
        left_zero = jnp.reshape(left_zero, ())
        total = total - left_zero * jnp.sum(right, axis=0, dtype="int32")
    if right_zero is not None:
        rows = jnp.sum(left, axis=-1, keepdims=True, dtype="int32")
        total = total - right_zero * rows
        if left_zero is not None:
            total = total + left_zero * right_zero * left.shape[-1]
    return total.astype(a.scale.dtype) * (jnp.reshape(a.scale, ()) * jnp.squeeze(b.scale))


def _weight_only(x: Any, w: Quantized) -> Any | None:
    """``x @ w`` for floats and packed weights (inputs, outputs)."""
    x = jnp.asarray(x)
    if w.block and w.axis == 0:
        return _blocked(x, w)
    if w.block or not (w.per_tensor or (w.axis == 1 and w.scale.ndim == 1)):
        return None
    y = jnp.matmul(x, jnp.asarray(w.data).astype(x.dtype))
    if w.has_zero:
        zero = jnp.squeeze(jnp.asarray(w.zero)).astype(x.dtype)
        y = y - jnp.sum(x, axis=-1, keepdims=True) * zero
    return y * jnp.squeeze(w.scale).astype(x.dtype)


def _blocked(x: Any, w: Quantized) -> Any | None:
    """Each block of inputs is a product of its own, scaled before the blocks are summed."""
    inputs, outputs = w.data.shape
    if inputs % w.block:
        return None
    count = inputs // w.block
    rows = jnp.reshape(x, (*x.shape[:-1], count, w.block))
    packed = jnp.reshape(jnp.asarray(w.data), (count, w.block, outputs)).astype(x.dtype)
    partial = jnp.einsum("...gk,gkn->...gn", rows, packed)
    if w.has_zero:
        zero = jnp.asarray(w.zero).astype(x.dtype)
        partial = partial - jnp.sum(rows, axis=-1)[..., None] * zero
    return jnp.sum(partial * w.scale.astype(x.dtype), axis=-2)


def _gemm(op: Op, a: Quantized | None, b: Quantized) -> Any | None:
    if op.attr("transA", 0) or op.attr("alpha", 1.0) != 1.0 or op.attr("beta", 1.0) != 1.0:
        return None
    if op.attr("transB", 0):
        b = Quantized(jnp.transpose(jnp.asarray(b.data)), b.scale, b.zero, 1 - b.axis, b.block)
        if b.block:
            return None
    y = _matmul(op, a, b)
    if y is None or len(op.node.inputs) < 3 or op.node.inputs[2] is None:
        return y
    return y + op.frame.env[op.node.inputs[2]]


def _conv(op: Op, x: Quantized | None, w: Quantized) -> Any | None:
    """Convolution of integers: padded with the zero point, which stands for zero."""
    from trivium.backends.xla.lowering.ops.convolution import (
        per_channel,
        spatial_letters,
        window_padding,
    )

    if x is None or not x.per_tensor or w.block:
        return None
    if w.has_zero or not (w.per_tensor or (w.axis == 0 and w.scale.ndim == 1)):
        return None
    data, zero = x.signed()
    filters = w.signed()[0]
    if np.dtype(w.data.dtype).name == "uint8":
        return None
    rank = data.ndim - 2
    strides = op.attr("strides") or [1] * rank
    dilations = op.attr("dilations") or [1] * rank
    padding = window_padding(op, data.shape[2:], filters.shape[2:], strides, dilations)
    fill = jnp.zeros((), "int8") if zero is None else jnp.reshape(zero, ()).astype("int8")
    data = lax.pad(data, fill, [(0, 0, 0), (0, 0, 0), *((a, b, 0) for a, b in padding)])
    letters = spatial_letters(rank)
    groups = op.attr("group", 1)

    def convolve(data: Any, filters: Any, accumulator: Any) -> Any:
        return lax.conv_general_dilated(
            data,
            filters,
            strides,
            [(0, 0)] * rank,
            rhs_dilation=dilations,
            dimension_numbers=letters,
            feature_group_count=groups,
            preferred_element_type=accumulator,
        ).astype("int32")

    def convolve_on_cpu(data: Any, filters: Any) -> Any:
        data, filters = data.astype(exact), filters.astype(exact)
        y = grouped_convolution(data, filters, strides, [(0, 0)] * rank, dilations, groups)
        return convolve(data, filters, exact) if y is None else y.astype("int32")

    # XLA's CPU has no fast convolution of integers. Floats that hold each partial sum exactly
    # give the same int32.
    exact = np.float32 if math.prod(filters.shape[1:]) * 128 * 128 <= 1 << 24 else np.float64
    total = lax.platform_dependent(
        data,
        filters,
        cpu=convolve_on_cpu,
        default=lambda data, filters: convolve(data, filters, np.int32),
    )
    if zero is not None:
        sums = jnp.sum(filters, axis=tuple(range(1, filters.ndim)), dtype="int32")
        total = total - per_channel(sums * jnp.reshape(zero, ()), total.ndim)
    scale = jnp.reshape(x.scale, ()) * jnp.squeeze(w.scale)
    scale = per_channel(scale, total.ndim) if scale.ndim else scale
    y = total.astype(x.scale.dtype) * scale
    if len(op.node.inputs) < 3 or op.node.inputs[2] is None:
        return y
    return y + per_channel(op.frame.env[op.node.inputs[2]], y.ndim)


_PRODUCTS: dict[str, Callable[[Op, Quantized | None, Quantized], Any | None]] = {
    "Conv": _conv,
    "Gemm": _gemm,
    "MatMul": _matmul,
}


def straight_through(op: Op, results: tuple[Any, ...]) -> tuple[Any, ...]:
    """The value of DequantizeLinear(QuantizeLinear(x)) with the gradient of clipping ``x``, and for
    the scale that of LSQ (Esser et al., 2020).
    """
    node = op.node
    if node.op_type != "DequantizeLinear" or node.inputs[0] is None:
        return results
    maker = node.inputs[0].producer()
    if maker is None or maker.op_type != "QuantizeLinear" or maker.inputs[0] is None:
        return results
    (y,) = results
    x = op.frame.env[maker.inputs[0]]
    env = op.frame.env
    scale, zero = (None if v is None else env[v] for v in (*maker.inputs[1:3], None)[:2])
    data = env[node.inputs[0]]
    from trivium.backends.xla.lowering.ops.quantization import aligned

    axis = maker.attributes.get_int("axis", 1) or 0
    block = maker.attributes.get_int("block_size", 0) or 0
    limits = (
        jnp.finfo(data.dtype) if data.dtype.name.startswith("float") else (jnp.iinfo(data.dtype))
    )
    factor = aligned(jnp.asarray(scale), x, axis, block)
    offset: Any = 0 if zero is None else aligned(jnp.asarray(zero), x, axis, block).astype(x.dtype)
    low, high = (jnp.asarray(float(end) - offset, x.dtype) for end in (limits.min, limits.max))
    ratio = jnp.clip(x / factor.astype(x.dtype), low, high)
    wide = factor.astype(y.dtype)
    made = (ratio.astype(y.dtype) + lax.stop_gradient(y / wide - ratio.astype(y.dtype))) * wide
    return (made + lax.stop_gradient(y - made),)
