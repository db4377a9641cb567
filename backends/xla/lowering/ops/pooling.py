"""Pooling windows, local and global."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from trivium.backends.xla.lowering.cpu import pooled
from trivium.backends.xla.lowering.lazy import jnp, lax
from trivium.backends.xla.lowering.ops.convolution import window_padding
from trivium.backends.xla.lowering.registry import handles
from trivium.backends.xla.lowering.trace import Op


class _Window:
    """The window of a pooling operator: what reduce_window wants, with the batch and channels."""

    def __init__(self, op: Op, x: Any) -> None:
        rank = x.ndim - 2
        self.platform = op.frame.platform
        self.kernel: list[int] = op.attr("kernel_shape")
        self.strides: list[int] = op.attr("strides") or [1] * rank
        self.dilations: list[int] = op.attr("dilations") or [1] * rank
        self.padding = window_padding(op, x.shape[2:], self.kernel, self.strides, self.dilations)
        self.reach = [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True)]
        self.overhang = [0] * rank
        if op.attr("ceil_mode", 0):
            self.overhang = [self._over(axis, x.shape[axis + 2]) for axis in range(rank)]

    def _over(self, axis: int, size: int) -> int:
        """Elements past the end that rounding up reads; a window must begin inside."""
        begin, end = self.padding[axis]
        stride, room = self.strides[axis], size + begin + end - self.reach[axis]
        count = -(-room // stride) + 1
        if (count - 1) * stride >= size + begin:
            count -= 1
        return int(max((count - 1) * stride - room, 0))

    def reduce(self, x: Any, initial: Any, function: Any) -> Any:
        """Reduce ``x`` over each window, padded with ``initial``."""
        padded = [
            (begin, end + over)
            for (begin, end), over in zip(self.padding, self.overhang, strict=True)
        ]
        if self.platform == "cpu" and not isinstance(x, tuple):
            y = pooled(x, self.kernel, self.strides, padded, self.dilations, initial, function)
            if y is not None:
                return y
        return lax.reduce_window(
            x,
            initial,
            function,
            (1, 1, *self.kernel),
            (1, 1, *self.strides),
            ((0, 0), (0, 0), *padded),
            window_dilation=(1, 1, *self.dilations),
        )

    def counts(self, sizes: Sequence[int], with_padding: bool) -> np.ndarray[Any, Any]:
        """How many elements each window averages over; broadcasts over batch and channels."""
        total = np.ones((), np.int64)
        for axis, size in enumerate(sizes):
            begin, end = self.padding[axis]
            length = size + begin + end + self.overhang[axis]
            real = np.zeros(length, np.int64)
            real[slice(0, size + begin + end) if with_padding else slice(begin, begin + size)] = 1
            firsts = range(0, length - self.reach[axis] + 1, self.strides[axis])
            taps = range(0, self.reach[axis], self.dilations[axis])
            counted = np.array([sum(real[first + tap] for tap in taps) for first in firsts])
            total = total[..., None] * counted
        return total


def lowest(dtype: Any) -> Any:
    """The identity of max in a dtype."""
    if jnp.issubdtype(dtype, jnp.floating):
        return np.asarray(-np.inf, dtype)
    return np.asarray(jnp.iinfo(dtype).min, dtype)


@handles("MaxPool")
def max_pool(op: Op, x: Any) -> Any:
    window = _Window(op, x)
    x = jnp.asarray(x)
    if not op.wants(1):
        return window.reduce(x, lowest(x.dtype), lax.max)
    return _max_pool_with_indices(op, x, window)


def _max_pool_with_indices(op: Op, x: Any, window: _Window) -> Any:
    shape = x.shape
    flat = jnp.arange(int(np.prod(shape)), dtype="int64").reshape(shape)
    if op.attr("storage_order", 0):
        spatial = tuple(reversed(range(2, x.ndim)))
        flat = jnp.arange(int(np.prod(shape)), dtype="int64")
        flat = flat.reshape(*shape[:2], *(shape[axis] for axis in spatial))
        flat = jnp.transpose(flat, (0, 1, *spatial))

    def larger(a: Any, b: Any) -> Any:
        # The first of equals wins, as in a sequential scan.
        better = (b[0] > a[0]) | ((b[0] == a[0]) & (b[1] < a[1]))
        return jnp.where(better, b[0], a[0]), jnp.where(better, b[1], a[1])

    last = np.asarray(np.iinfo(np.int64).max)
    return window.reduce((x, flat), (lowest(x.dtype), last), larger)


@handles("AveragePool")
def average_pool(op: Op, x: Any) -> Any:
    window = _Window(op, x)
    x = jnp.asarray(x)
    total = window.reduce(x, np.zeros((), x.dtype), lax.add)
    return total / window.counts(x.shape[2:], bool(op.attr("count_include_pad", 0))).astype(x.dtype)


@handles("LpPool")
def lp_pool(op: Op, x: Any) -> Any:
    p = jnp.asarray(op.attr("p", 2), x.dtype)
    powers = jnp.power(jnp.abs(x), p)
    total = _Window(op, x).reduce(powers, np.zeros((), x.dtype), lax.add)
    return jnp.power(total, 1 / p)


@handles("MaxUnpool", since=9, constants=(2,))
def max_unpool(op: Op, x: Any, indices: Any, shape: Any = None) -> Any:
    """Put each value where MaxPool took it from; the rest is zero."""
    kernel = op.attr("kernel_shape")
    rank = len(kernel)
    strides = op.attr("strides") or [1] * rank
    pads = op.attr("pads") or [0] * (2 * rank)
    inferred = [
        (x.shape[axis + 2] - 1) * strides[axis] - pads[axis] - pads[axis + rank] + kernel[axis]
        for axis in range(rank)
    ]
    inner = (*x.shape[:2], *inferred)
    if shape is None:
        full: tuple[int, ...] = inner
    elif op.known(shape):
        full = tuple(op.ints(2, shape))
    elif (promised := op.shape()) is not None:
        full = promised
    else:
        raise op.needs(2)
    flat = jnp.zeros((int(np.prod(inner)),), x.dtype)
    y = flat.at[jnp.reshape(indices, -1)].set(jnp.reshape(x, -1)).reshape(inner)
    return jnp.pad(y, [(0, size - old) for size, old in zip(full, inner, strict=True)])


def _spatial(x: Any) -> tuple[int, ...]:
    return tuple(range(2, x.ndim))


@handles("GlobalAveragePool")
def global_average_pool(op: Op, x: Any) -> Any:
    return jnp.mean(x, axis=_spatial(x), keepdims=True)


@handles("GlobalMaxPool")
def global_max_pool(op: Op, x: Any) -> Any:
    return jnp.max(x, axis=_spatial(x), keepdims=True)


@handles("GlobalLpPool")
def global_lp_pool(op: Op, x: Any) -> Any:
    p = jnp.asarray(op.attr("p", 2), x.dtype)
    total = jnp.sum(jnp.power(jnp.abs(x), p), axis=_spatial(x), keepdims=True)
    return jnp.power(total, 1 / p)
