"""Gathers, scatters, and what selects elements by index or by value."""

from __future__ import annotations

from typing import Any

import numpy as np

from trivium.backends.xla.lowering.lazy import jax, jnp
from trivium.backends.xla.lowering.registry import handles
from trivium.backends.xla.lowering.trace import Op


def _wrapped(indices: Any, size: int) -> Any:
    """Indices with negative ones counted from the end."""
    return jnp.where(indices < 0, indices + size, indices)


@handles("Gather")
def gather(op: Op, x: Any, indices: Any) -> Any:
    axis = op.attr("axis", 0) % x.ndim
    if isinstance(indices, np.ndarray) and indices.ndim == 0:
        return jnp.asarray(x)[(slice(None),) * axis + (int(indices),)]
    return jnp.take(x, _wrapped(jnp.asarray(indices), x.shape[axis]), axis=axis, mode="clip")


@handles("GatherElements", since=11)
def gather_elements(op: Op, x: Any, indices: Any) -> Any:
    x, indices = jnp.asarray(x), jnp.asarray(indices)
    return x[_elements(x, indices, op.attr("axis", 0))]


def _elements(x: Any, indices: Any, axis: int) -> tuple[Any, ...]:
    """Advanced indices that pick along ``axis`` and keep the other coordinates."""
    axis = axis % x.ndim
    grid = list(jnp.indices(indices.shape, sparse=True))
    grid[axis] = _wrapped(indices, x.shape[axis])
    return tuple(grid)


@handles("GatherND", since=11)
def gather_nd(op: Op, x: Any, indices: Any) -> Any:
    x, indices = jnp.asarray(x), jnp.asarray(indices)
    batch = op.attr("batch_dims", 0)
    lead = [
        jnp.arange(size).reshape((size, *(1,) * (indices.ndim - 2 - axis)))
        for axis, size in enumerate(indices.shape[:batch])
    ]
    parts = jnp.moveaxis(indices, -1, 0)
    picked = [_wrapped(parts[i], x.shape[batch + i]) for i in range(indices.shape[-1])]
    return x[(*lead, *picked)]


def scatter_into(target: Any, where: Any, updates: Any, reduction: str) -> Any:
    """``target`` with ``updates`` written, added, multiplied, or compared in at ``where``."""
    at = target.at[where]
    updates = jnp.asarray(updates, target.dtype)
    if reduction == "none":
        return at.set(updates)
    return getattr(at, {"add": "add", "mul": "multiply", "min": "min", "max": "max"}[reduction])(
        updates
    )


@handles("Scatter", "ScatterElements", since=9)
def scatter_elements(op: Op, x: Any, indices: Any, updates: Any) -> Any:
    x, indices = jnp.asarray(x), jnp.asarray(indices)
    where = _elements(x, indices, op.attr("axis", 0))
    return scatter_into(x, where, updates, op.attr("reduction", "none"))


@handles("ScatterND", since=11)
def scatter_nd(op: Op, x: Any, indices: Any, updates: Any) -> Any:
    x = jnp.asarray(x)
    parts = jnp.moveaxis(jnp.asarray(indices), -1, 0)
    where = tuple(_wrapped(part, x.shape[axis]) for axis, part in enumerate(parts))
    return scatter_into(x, where, updates, op.attr("reduction", "none"))


@handles("TensorScatter", since=24)
def tensor_scatter(op: Op, cache: Any, update: Any, indices: Any = None) -> Any:
    """Write a stretch of a KV cache, each batch entry at its own place; circular wraps around."""
    axis = op.attr("axis", -2) % cache.ndim
    rows = jnp.moveaxis(jnp.asarray(cache), axis, 1)
    new = jnp.moveaxis(jnp.asarray(update), axis, 1)
    batch, length = new.shape[:2]
    first = jnp.zeros((batch,), "int64") if indices is None else jnp.asarray(indices)
    position = first[:, None] + jnp.arange(length)
    if op.attr("mode", "linear") == "circular":
        position = position % rows.shape[1]
    # The batch as an axis of the scatter, not as indices: only so can XLA spread it over devices.
    rows = jax.vmap(lambda cache, places, row: cache.at[places].set(row))(rows, position, new)
    return jnp.moveaxis(rows, 1, axis)


@handles("OneHot", since=9, constants=(1,))
def one_hot(op: Op, indices: Any, depth: Any, values: Any) -> Any:
    if op.known(depth):
        (count,) = op.ints(1, depth)
    elif (promised := op.shape()) is not None:
        count = promised[op.attr("axis", -1)]
    else:
        raise op.needs(1)
    indices = jnp.asarray(indices)
    axis = op.attr("axis", -1) % (indices.ndim + 1)
    indices = _wrapped(indices, count)
    slots = jnp.arange(count).reshape((count, *(1,) * (indices.ndim - axis)))
    hot = jnp.expand_dims(indices, axis) == slots
    return jnp.where(hot, values[1], values[0])


@handles("Compress", since=9, constants=(1,))
def compress(op: Op, x: Any, condition: Any) -> Any:
    axis = op.attr("axis")
    x = jnp.reshape(x, -1) if axis is None else jnp.asarray(x)
    axis = 0 if axis is None else axis
    if op.known(condition):
        indices: Any = np.flatnonzero(np.asarray(condition))
    elif (promised := op.shape()) is not None:
        indices = jnp.nonzero(condition, size=promised[axis])[0]
    else:
        raise op.needs(1)
    return jnp.take(x, indices, axis=axis)


@handles("NonZero", since=9)
def non_zero(op: Op, x: Any) -> Any:
    promised = op.shape()
    if promised is None:
        raise op.needs(0)
    return jnp.stack(jnp.nonzero(x, size=promised[1])).astype("int64")


@handles("ReverseSequence", since=10)
def reverse_sequence(op: Op, x: Any, lengths: Any) -> Any:
    time, batch = op.attr("time_axis", 0), op.attr("batch_axis", 1)
    rows = jnp.moveaxis(jnp.asarray(x), (batch, time), (0, 1))
    step = jnp.arange(rows.shape[1])[None, :]
    lengths = jnp.asarray(lengths)[:, None]
    order = jnp.where(step < lengths, lengths - 1 - step, step)
    rows = rows[jnp.arange(rows.shape[0])[:, None], order]
    return jnp.moveaxis(rows, (0, 1), (batch, time))
