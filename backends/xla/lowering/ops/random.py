"""Random numbers, drawn from jax's generator: of ONNX's distribution, never its exact numbers.

A program draws the same numbers each time it runs, from the node's ``seed`` (or its name): what is
compiled has no state.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from trivium.backends.xla.lowering.dtypes import numpy_dtype
from trivium.backends.xla.lowering.lazy import jax, jnp
from trivium.backends.xla.lowering.registry import handles
from trivium.backends.xla.lowering.trace import Op


def key(op: Op) -> Any:
    """The generator's state for a node."""
    seed = op.attr("seed")
    text = op.label if seed is None else f"seed {seed}"
    return jax.random.key(zlib.crc32(text.encode()))


def _drawn(op: Op, shape: Any, dtype: Any) -> Any:
    if op.node.op_type.startswith("RandomNormal"):
        unit, scale, shift = jax.random.normal, op.attr("scale", 1.0), op.attr("mean", 0.0)
    else:
        low, high = op.attr("low", 0.0), op.attr("high", 1.0)
        unit, scale, shift = jax.random.uniform, high - low, low
    wide = jnp.promote_types(dtype, "float32")
    return (unit(key(op), tuple(shape), wide) * scale + shift).astype(dtype)


@handles("RandomNormal", "RandomUniform")
def random(op: Op) -> Any:
    return _drawn(op, op.attr("shape"), numpy_dtype(op.attr("dtype", 1)))


@handles("RandomNormalLike", "RandomUniformLike")
def random_like(op: Op, x: Any) -> Any:
    dtype = op.attr("dtype")
    return _drawn(op, x.shape, numpy_dtype(dtype) if dtype else x.dtype)


@handles("Bernoulli", since=15)
def bernoulli(op: Op, x: Any) -> Any:
    dtype = op.attr("dtype")
    drawn = jax.random.bernoulli(key(op), x)
    return drawn.astype(numpy_dtype(dtype) if dtype else x.dtype)


@handles("Multinomial", since=7)
def multinomial(op: Op, x: Any) -> Any:
    count = op.attr("sample_size", 1)
    drawn = jax.random.categorical(key(op), x[:, None, :], shape=(x.shape[0], count))
    return drawn.astype(numpy_dtype(op.attr("dtype", 6)))


@handles("Dropout", since=12, constants=(1, 2))
def dropout(op: Op, x: Any, ratio: Any = None, training: Any = None) -> Any:
    """Drop in training mode only; the mask is drawn here, so no two engines agree on it."""
    off = training is None or (op.known(training) and not np.asarray(training).any())
    if off:
        return x, jnp.ones(x.shape, bool)
    rate = jnp.asarray(0.5, x.dtype) if ratio is None else jnp.reshape(ratio, ()).astype(x.dtype)
    drop = jax.random.uniform(key(op), x.shape, "float32") < rate
    keep = ~(drop & jnp.reshape(training, ()))
    factor = jnp.where(jnp.reshape(training, ()), 1 / (1 - rate), jnp.ones((), x.dtype))
    return jnp.where(keep, x * factor, jnp.zeros((), x.dtype)), keep
