"""Operators that move, cut and fill: nothing here computes on elements.

Where an operator takes a shape as an operand that is not known while tracing, the shape that the
model promises for its output stands in (`Op.shape`).
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from trivium.backends.xla.lowering.dimensions import as_tensor, has_symbols, is_symbolic, traced
from trivium.backends.xla.lowering.dtypes import numpy_dtype
from trivium.backends.xla.lowering.lazy import jax, jnp, lax
from trivium.backends.xla.lowering.registry import handles
from trivium.backends.xla.lowering.trace import Op


@handles("Constant")
def constant(op: Op) -> Any:
    if (tensor := op.attr("value")) is not None:
        return tensor.numpy()
    for name, dtype in (("value_float", "float32"), ("value_floats", "float32"),
                        ("value_int", "int64"), ("value_ints", "int64"),
                        ("value_string", object), ("value_strings", object)):  # fmt: skip
        if (value := op.attr(name)) is not None:
            return np.asarray(value, dtype)
    raise op.refuse("holds a sparse tensor")


@handles("Shape")
def shape(op: Op, x: Any) -> Any:
    return as_tensor(x.shape[slice(op.attr("start", 0), op.attr("end"))])


@handles("Size")
def size(op: Op, x: Any) -> Any:
    return as_tensor(x.size)


@handles("Reshape")
def reshape_by_attribute(op: Op, x: Any) -> Any:
    return jnp.reshape(x, _target(x, op.attr("shape"), keep_zero=False))


@handles("Reshape", since=5, constants=(1,))
def reshape(op: Op, x: Any, target: Any) -> Any:
    if not op.known(target):
        promised = op.shape()
        if promised is None:
            raise op.needs(1)
        return jnp.reshape(x, promised)
    return jnp.reshape(x, _target(x, op.sizes(1, target), bool(op.attr("allowzero", 0))))


def _target(x: Any, sizes: list[int], keep_zero: bool) -> list[int]:
    if keep_zero:
        return sizes
    return [x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]


@handles("Flatten")
def flatten(op: Op, x: Any) -> Any:
    axis = op.attr("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return jnp.reshape(x, (prod(x.shape[:axis]), prod(x.shape[axis:])))


@handles("Transpose")
def transpose(op: Op, x: Any) -> Any:
    return jnp.transpose(x, op.attr("perm"))


@handles("Squeeze", constants=(1,))
def squeeze(op: Op, x: Any, axes: Any = None) -> Any:
    given = op.attr("axes")
    if axes is not None:
        if not op.known(axes):
            promised = op.shape()
            if promised is None:
                raise op.needs(1)
            return jnp.reshape(x, promised)
        given = op.ints(1, axes)
    return jnp.squeeze(x, None if given is None else tuple(given))


@handles("Unsqueeze", constants=(1,))
def unsqueeze(op: Op, x: Any, axes: Any = None) -> Any:
    if axes is not None and not op.known(axes):
        promised = op.shape()
        if promised is None:
            raise op.needs(1)
        return jnp.reshape(x, promised)
    return jnp.expand_dims(x, tuple(op.attr("axes") if axes is None else op.ints(1, axes)))


@handles("Expand", since=8, constants=(1,))
def expand(op: Op, x: Any, target: Any) -> Any:
    if not op.known(target):
        promised = op.shape()
        if promised is None:
            raise op.needs(1)
        return jnp.broadcast_to(x, promised)
    return jnp.broadcast_to(x, jnp.broadcast_shapes(x.shape, tuple(op.sizes(1, target))))


@handles("Concat")
def concat(op: Op, *values: Any) -> Any:
    return jnp.concatenate(values, axis=op.attr("axis", 1))


@handles("Tile", since=6, constants=(1,))
def tile(op: Op, x: Any, repeats: Any) -> Any:
    if op.known(repeats):
        return jnp.tile(x, op.sizes(1, repeats))
    promised = op.shape()
    if promised is None:
        raise op.needs(1)
    return jnp.tile(x, [size // old for size, old in zip(promised, x.shape, strict=True)])


@handles("Split", constants=(1,))
def split(op: Op, x: Any, sizes: Any = None) -> Any:
    axis = op.attr("axis", 0)
    count = op.attr("num_outputs", op.outputs)
    if sizes is not None and not op.known(sizes):
        promised = [op.shape(index) for index in range(op.outputs)]
        if any(shape is None for shape in promised):
            raise op.needs(1)
        parts = [shape[axis] for shape in promised if shape is not None]
    elif sizes is not None:
        parts = op.ints(1, sizes)
    elif op.attr("split") is not None:
        parts = op.attr("split")
    else:
        # Equal parts; the last is smaller where the size does not divide.
        whole = -(-x.shape[axis] // count)
        parts = [min(whole, x.shape[axis] - whole * index) for index in range(count)]
    return tuple(jnp.split(x, np.cumsum(parts)[:-1].tolist(), axis=axis))


@handles("Slice")
def slice_by_attributes(op: Op, x: Any) -> Any:
    starts, ends = op.attr("starts"), op.attr("ends")
    axes = op.attr("axes", list(range(len(starts))))
    return _slice(x, starts, ends, axes, [1] * len(starts))


@handles("Slice", since=10, constants=(1, 2, 3, 4))
def slice_by_inputs(
    op: Op, x: Any, starts: Any, ends: Any, axes: Any = None, steps: Any = None
) -> Any:
    if not all(op.known(value) for value in (starts, ends, axes, steps)):
        return _slice_at_run_time(op, x, starts, ends, axes, steps)
    first, last = op.sizes(1, starts), op.sizes(2, ends)
    along = list(range(len(first))) if axes is None else op.ints(3, axes)
    by = [1] * len(first) if steps is None else op.ints(4, steps)
    return _slice(x, first, last, along, by)


def _slice(x: Any, starts: Any, ends: Any, axes: Any, steps: Any) -> Any:
    where = [slice(None)] * x.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = x.shape[axis]
        # A negative end below the array means "through the first", which Python writes None.
        low = None if step < 0 and end < -size else end
        if step > 0 and is_symbolic(size) and not is_symbolic(end) and end >= _FAR:
            low = None
        where[axis] = slice(start, low, step)
    if any(is_symbolic(size) for size in x.shape):
        return jnp.asarray(x)[tuple(where)]
    if all(part.step in (None, 1) for part in where):
        bounds = [part.indices(size) for part, size in zip(where, x.shape, strict=True)]
        return lax.slice(jnp.asarray(x), [b[0] for b in bounds], [max(b[0], b[1]) for b in bounds])
    return x[tuple(where)]


_FAR = 2**31 - 1
"""An end from which a slice goes through the last element of any axis."""


def _slice_at_run_time(op: Op, x: Any, starts: Any, ends: Any, axes: Any, steps: Any) -> Any:
    """Slice to a promised shape from a start that the program computes."""
    promised = op.shape()
    if promised is None:
        given = (starts, ends, axes, steps)
        raise op.needs(next(slot for slot, one in enumerate(given, 1) if not op.known(one)))
    count = starts.shape[0]
    along = jnp.arange(count) if axes is None else jnp.asarray(axes) % x.ndim
    by = jnp.ones((count,), "int64") if steps is None else jnp.asarray(steps)
    for axis in range(x.ndim):
        size = x.shape[axis]
        given = along == axis
        step = jnp.where(given, by, 0).sum() + jnp.where(given.any(), 0, 1)
        start = jnp.where(given, starts, 0).sum()
        start = jnp.where(start < 0, start + size, start)
        start = jnp.clip(start, 0, jnp.where(step < 0, size - 1, size))
        x = jnp.take(x, start + step * jnp.arange(promised[axis]), axis=axis, mode="clip")
    return x


@handles("ConstantOfShape", since=9, constants=(0,))
def constant_of_shape(op: Op, target: Any) -> Any:
    value = op.attr("value")
    fill = np.zeros((), np.float32) if value is None else value.numpy().reshape(())
    sizes: Any = op.sizes(0, target) if op.known(target) else op.shape()
    if sizes is None:
        raise op.needs(0)
    filled = jnp.full(sizes, fill)
    if is_symbolic(filled.size) or filled.size < _BARRIER:
        return filled
    # As the kernel of a convolution, a broadcast constant makes XLA's CPU compiler (jax 0.10.2)
    # now and then emit a program that computes NaN; behind a barrier it is a buffer like others.
    return lax.optimization_barrier(filled)


_BARRIER = 1024
"""Elements from which a filled tensor is kept from XLA's constant propagation."""


@handles("Range", since=11, constants=(0, 1, 2))
def range_(op: Op, start: Any, limit: Any, delta: Any) -> Any:
    if all(op.known(value) for value in (start, limit, delta)):
        count = _count(op, start, limit, delta)
    else:
        promised = op.shape()
        if promised is None:
            raise op.needs(1)
        (count,) = promised
    dtype = op.dtype() or start.dtype
    start, delta = (jnp.reshape(traced(value), ()) for value in (start, delta))
    return (start + jnp.arange(count).astype(dtype) * delta).astype(dtype)


def _count(op: Op, start: Any, limit: Any, delta: Any) -> Any:
    """How many elements a range has."""
    if any(has_symbols(value) for value in (start, limit)):
        (low,), (high,), (by,) = op.sizes(0, start), op.sizes(1, limit), op.ints(2, delta)
        return jax.core.max_dim(-((low - high) // by), 0)
    first, last, step = (np.asarray(v).reshape(()) for v in (start, limit, delta))
    return max(int(np.ceil((last - first) / step)), 0)


@handles("EyeLike", since=9)
def eye_like(op: Op, x: Any) -> Any:
    dtype = op.attr("dtype")
    rows, columns = x.shape
    return jnp.eye(rows, columns, op.attr("k", 0), dtype=numpy_dtype(dtype) if dtype else x.dtype)


@handles("Trilu", since=14, constants=(1,))
def trilu(op: Op, x: Any, k: Any = None) -> Any:
    rows = jnp.arange(x.shape[-2])[:, None]
    columns = jnp.arange(x.shape[-1])[None, :]
    offset = 0 if k is None else jnp.reshape(k, ())
    keep = columns - rows >= offset if op.attr("upper", 1) else columns - rows <= offset
    return jnp.where(keep, x, jnp.zeros((), x.dtype))


@handles("DepthToSpace")
def depth_to_space(op: Op, x: Any) -> Any:
    n, c, h, w = x.shape
    b = op.attr("blocksize")
    if op.attr("mode", "DCR") == "DCR":
        y = jnp.reshape(x, (n, b, b, c // (b * b), h, w)).transpose(0, 3, 4, 1, 5, 2)
    else:
        y = jnp.reshape(x, (n, c // (b * b), b, b, h, w)).transpose(0, 1, 4, 2, 5, 3)
    return y.reshape(n, c // (b * b), h * b, w * b)


@handles("SpaceToDepth")
def space_to_depth(op: Op, x: Any) -> Any:
    n, c, h, w = x.shape
    b = op.attr("blocksize")
    y = jnp.reshape(x, (n, c, h // b, b, w // b, b))
    depth_first = op.attr("mode", "DCR") == "DCR"
    y = y.transpose(0, 3, 5, 1, 2, 4) if depth_first else y.transpose(0, 1, 3, 5, 2, 4)
    return y.reshape(n, c * b * b, h // b, w // b)


@handles("Pad")
def pad_by_attributes(op: Op, x: Any) -> Any:
    pads = op.attr("pads", op.attr("paddings"))
    value = np.asarray(op.attr("value", 0.0), x.dtype)
    return _pad(x, pads, list(range(x.ndim)), op.attr("mode", "constant"), value)


@handles("Pad", since=11, constants=(1, 3))
def pad(op: Op, x: Any, pads: Any, value: Any = None, axes: Any = None) -> Any:
    fill = np.zeros((), x.dtype) if value is None else jnp.reshape(value, ())
    if not (op.known(pads) and op.known(axes)):
        return _pad_at_run_time(op, x, pads, axes, fill)
    along = list(range(x.ndim)) if axes is None else op.ints(3, axes)
    return _pad(x, op.ints(1, pads), along, op.attr("mode", "constant"), fill)


def _pad_at_run_time(op: Op, x: Any, pads: Any, axes: Any, value: Any) -> Any:
    """Pad to a promised shape by widths that the program computes."""
    promised, mode = op.shape(), op.attr("mode", "constant")
    if promised is None:
        raise op.needs(1)
    count = pads.shape[0] // 2
    along = jnp.arange(count) if axes is None else jnp.asarray(axes) % x.ndim
    inside = jnp.ones((), bool)
    for axis, size in enumerate(x.shape):
        begin = jnp.where(along == axis, pads[:count], 0).sum()
        position = jnp.arange(promised[axis]) - begin
        if mode == "constant":
            spread = [-1 if other == axis else 1 for other in range(x.ndim)]
            inside = inside & jnp.reshape((position >= 0) & (position < size), spread)
        elif mode == "reflect" and size > 1:
            period = 2 * (size - 1)
            position = position % period
            position = jnp.where(position >= size, period - position, position)
        elif mode == "wrap":
            position = position % size
        x = jnp.take(x, jnp.clip(position, 0, size - 1), axis=axis)
    return jnp.where(inside, x, value) if mode == "constant" else x


_MODES = {"reflect": "reflect", "edge": "edge", "wrap": "wrap"}


def _pad(x: Any, pads: list[int], axes: list[int], mode: str, value: Any) -> Any:
    widths = [(0, 0)] * x.ndim
    for index, axis in enumerate(axes):
        widths[axis] = (pads[index], pads[index + len(axes)])
    if mode == "constant":
        return lax.pad(jnp.asarray(x), jnp.asarray(value, x.dtype), [(*w, 0) for w in widths])
    cut = [
        slice(max(0, -a), size - max(0, -b)) for (a, b), size in zip(widths, x.shape, strict=True)
    ]
    x = jnp.asarray(x)[tuple(cut)]
    return jnp.pad(x, [(max(0, a), max(0, b)) for a, b in widths], mode=_MODES[mode])
