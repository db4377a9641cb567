"""What ONNX Runtime's graph optimizer, and its optimizer for diffusers, fuse into one operator of
``com.microsoft``.
"""

from __future__ import annotations

from typing import Any

from trivium.backends.xla.lowering.lazy import jax, jnp
from trivium.backends.xla.lowering.ops.convolution import conv
from trivium.backends.xla.lowering.ops.linear import gemm
from trivium.backends.xla.lowering.ops.normalization import standardized
from trivium.backends.xla.lowering.ops.pooling import max_pool
from trivium.backends.xla.lowering.ops.shape import pad
from trivium.backends.xla.lowering.registry import handles
from trivium.backends.xla.lowering.trace import Op

DOMAIN = "com.microsoft"

handles("Pad", domain=DOMAIN, constants=(1,))(pad)


def _activated(op: Op, y: Any, name: str | None, parameters: list[float]) -> Any:
    """An activation by its name in ONNX; parameters that are missing have their default there."""

    def parameter(index: int, default: float) -> Any:
        given = parameters[index] if index < len(parameters) else default
        return jnp.asarray(given, y.dtype)

    zero = jnp.zeros((), y.dtype)
    match name:
        case None | "":
            return y
        case "Relu":
            return jnp.maximum(y, zero)
        case "Tanh":
            return jnp.tanh(y)
        case "Sigmoid":
            return jax.nn.sigmoid(y)
        case "LeakyRelu":
            return jnp.where(y < zero, parameter(0, 0.01) * y, y)
        case "Clip":
            return jnp.clip(y, parameter(0, -jnp.inf), parameter(1, jnp.inf))
        case "HardSigmoid":
            return jnp.clip(parameter(0, 0.2) * y + parameter(1, 0.5), zero, zero + 1)
    raise op.refuse(f"with the activation {name!r} is not lowered")


@handles("FusedConv", domain=DOMAIN)
def fused_conv(op: Op, x: Any, w: Any, bias: Any = None, residual: Any = None) -> Any:
    y = conv(op, x, w, bias)
    y = y if residual is None else y + residual
    return _activated(op, y, op.attr("activation"), op.attr("activation_params", []))


@handles("FusedGemm", domain=DOMAIN)
def fused_gemm(op: Op, a: Any, b: Any, c: Any = None) -> Any:
    given = [op.attr(f"activation_{name}") for name in ("alpha", "beta")]
    parameters = given[: given.index(None)] if None in given else given
    return _activated(op, gemm(op, a, b, c), op.attr("activation"), parameters)


@handles("GemmFastGelu", domain=DOMAIN)
def gemm_fast_gelu(op: Op, x: Any, w: Any, bias: Any = None) -> Any:
    y = jnp.matmul(x, w)
    return jax.nn.gelu(y if bias is None else y + bias, approximate=True)


@handles("BiasAdd", domain=DOMAIN)
def bias_add(op: Op, x: Any, bias: Any, skip: Any) -> Any:
    return x + bias + skip


@handles("BiasSplitGelu", domain=DOMAIN)
def bias_split_gelu(op: Op, x: Any, bias: Any) -> Any:
    left, right = jnp.split(x + bias, 2, axis=-1)
    return left * jax.nn.gelu(right, approximate=False)


@handles("NhwcMaxPool", domain=DOMAIN)
def max_pool_channels_last(op: Op, x: Any) -> Any:
    return jnp.moveaxis(max_pool(op, jnp.moveaxis(jnp.asarray(x), -1, 1)), 1, -1)


@handles("GroupNorm", domain=DOMAIN)
def group_norm(op: Op, x: Any, gamma: Any, beta: Any) -> Any:
    """Channels last unless it says otherwise; ``activation`` 1 is SiLU."""
    last = bool(op.attr("channels_last", 1))
    wide = jnp.asarray(x, "float32")
    wide = wide if last else jnp.moveaxis(wide, 1, -1)
    groups, channels = op.attr("groups"), wide.shape[-1]
    apart = jnp.reshape(wide, (wide.shape[0], -1, groups, channels // groups))
    y = standardized(apart, (1, 3), op.attr("epsilon", 1e-5))[0].reshape(wide.shape)
    y = y * gamma + beta
    y = y * jax.nn.sigmoid(y) if op.attr("activation", 0) else y
    return (y if last else jnp.moveaxis(y, -1, 1)).astype(x.dtype)
