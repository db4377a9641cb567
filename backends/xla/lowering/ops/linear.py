"""Matrix products."""

from __future__ import annotations

from typing import Any

from trivium.backends.xla.lowering.dtypes import is_integer
from trivium.backends.xla.lowering.lazy import jnp
from trivium.backends.xla.lowering.registry import handles
from trivium.backends.xla.lowering.trace import Op


@handles("MatMul")
def matmul(op: Op, a: Any, b: Any) -> Any:
    return jnp.matmul(a, b)


@handles("Gemm")
def gemm(op: Op, a: Any, b: Any, c: Any = None) -> Any:
    a = jnp.transpose(a) if op.attr("transA", 0) else a
    b = jnp.transpose(b) if op.attr("transB", 0) else b
    y = scaled(jnp.matmul(a, b), op.attr("alpha", 1.0))
    return y if c is None else y + scaled(jnp.asarray(c), op.attr("beta", 1.0))


def scaled(x: Any, factor: float) -> Any:
    """``x * factor`` in the dtype of ``x``."""
    if factor == 1.0:
        return x
    if is_integer(x.dtype):
        return (x * jnp.asarray(factor, "float32")).astype(x.dtype)
    return x * jnp.asarray(factor, x.dtype)


@handles("Einsum", since=12)
def einsum(op: Op, *operands: Any) -> Any:
    return jnp.einsum(op.attr("equation").replace(" ", ""), *operands)


@handles("Det", since=11)
def det(op: Op, x: Any) -> Any:
    return jnp.linalg.det(x)
