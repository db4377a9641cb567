"""Casts, by ONNX's rules for what does not fit: saturate, wrap, or round to a power of two."""

from __future__ import annotations

from typing import Any

import numpy as np

from trivium.backends.xla.lowering.dtypes import is_float, is_integer, numpy_dtype
from trivium.backends.xla.lowering.lazy import jnp, lax
from trivium.backends.xla.lowering.registry import handles
from trivium.backends.xla.lowering.trace import Op


@handles("Cast")
def cast(op: Op, x: Any) -> Any:
    return convert(x, numpy_dtype(op.attr("to")), *_options(op))


@handles("CastLike", since=15)
def cast_like(op: Op, x: Any, like: Any) -> Any:
    return convert(x, like.dtype, *_options(op))


def _options(op: Op) -> tuple[bool, str]:
    return bool(op.attr("saturate", 1)), op.attr("round_mode", "up")


@handles("BitCast", since=26)
def bit_cast(op: Op, x: Any) -> Any:
    dtype = numpy_dtype(op.attr("to"))
    # A bool is one byte, 0 or 1; XLA's bitcast does not take it.
    x = jnp.asarray(x).astype("uint8") if x.dtype.kind == "b" else jnp.asarray(x)
    if dtype.kind == "b":
        return lax.bitcast_convert_type(x, np.dtype("uint8")) != 0
    return lax.bitcast_convert_type(x, dtype)


def convert(x: Any, dtype: Any, saturate: bool = True, round_mode: str = "up") -> Any:
    """Cast as ONNX does.

    Args:
        saturate: Whether a float too large for an 8-bit float becomes the largest one.
        round_mode: How to round to float8e8m0, which holds nothing but powers of two.
    """
    dtype = np.dtype(dtype)
    x = jnp.asarray(x)
    if dtype.kind == "b":
        return x != jnp.zeros((), x.dtype)
    if dtype.name == "float8_e8m0fnu" and is_float(x.dtype) and x.dtype != dtype:
        return _power_of_two(x, dtype, saturate, round_mode)
    if dtype.name.startswith("float8") and is_float(x.dtype) and saturate:
        largest = jnp.asarray(jnp.finfo(dtype).max, dtype).astype("float32")
        wide = jnp.clip(x.astype("float32"), -largest, largest)
        return wide.astype(dtype)
    if is_integer(dtype) and np.dtype(dtype).name in ("int4", "uint4", "int2", "uint2"):
        # Through int32: these wrap around, and XLA would saturate.
        return x.astype("int32").astype(dtype)
    return x.astype(dtype)


def _power_of_two(x: Any, dtype: Any, saturate: bool, round_mode: str) -> Any:
    """Keep the exponent of a float32, rounded by what its mantissa says."""
    bits = lax.bitcast_convert_type(x.astype("float32"), "uint32")
    exponent = (bits >> 23) & 0xFF
    mantissa = bits & 0x7FFFFF
    if round_mode == "nearest":
        tie = mantissa == 0x400000
        more = (mantissa > 0x400000) | (tie & (exponent > 0))
    elif round_mode == "up":
        more = mantissa > 0
    else:
        more = jnp.zeros(x.shape, bool)
    rounded = exponent + (more & (exponent < (0xFE if saturate else 0xFF)))
    kept = jnp.where(exponent == 0xFF, 0xFF, rounded)
    return lax.bitcast_convert_type(kept.astype("uint8"), dtype)
