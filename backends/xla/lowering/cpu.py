"""Operators that XLA's CPU has no fast kernel for, made of what it is fast at.

It has one for a plain convolution (Eigen's, channels last). A grouped one and a pooling window go
through a general loop: a depthwise 3x3 over 16 channels of 120x120 took 11.9 ms that way and takes
0.16 ms as nine shifted products (`benchmarks/xla_cpu.py` measures the models). A product of
integers is a plain loop there, one of floats a library's: int8 took four times as long as float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from itertools import product
from math import prod
from typing import Any

import numpy as np

from trivium.backends.xla.lowering.dimensions import is_symbolic
from trivium.backends.xla.lowering.lazy import jnp, lax

Padding = Sequence[tuple[int, int]]

_EXACT, _MOST_SUMS = 256, 32
"""Terms that a sum of products of centred 8-bit numbers may have in float32, which holds 255 * 255
so often without rounding; and how many such sums a product may be made of."""

_MOST_TAPS = 64
"""Window positions up to which each is an operation of its own."""

_MOST_SPLITS = 8
"""Groups up to which each is a convolution of its own."""

_NARROW, _MOST_PIXELS = 16, 1 << 13
"""Channels from and to which, and padded pixels up to which, a 3x3 convolution is one product: so
ResNet-20 on CIFAR takes 8% less time. With 32 channels it took more."""


def grouped_convolution(
    x: Any, w: Any, strides: Sequence[int], padding: Padding, dilations: Sequence[int], groups: int
) -> Any | None:
    """A grouped convolution in ONNX's layout; None where XLA's own is as good."""
    channels, outputs = x.shape[1], w.shape[0]
    if groups == channels > 1 and prod(w.shape[2:]) <= _MOST_TAPS:
        # Half precision is summed in single, as XLA's own convolution does.
        wide = jnp.promote_types(x.dtype, "float32")
        weights = jnp.moveaxis(w[:, 0], 0, -1).astype(wide)
        x = jnp.repeat(x, outputs // channels, axis=1).astype(wide)
        parts = _shifted(x, np.zeros((), wide), w.shape[2:], strides, padding, dilations)
        y = reduce(lax.add, (part * weights[tap] for tap, part in parts))
        return _channels_second(y).astype(w.dtype)
    if 1 < groups <= _MOST_SPLITS:
        letters = "DHWXYZ"[: x.ndim - 2]
        layouts = (f"NC{letters}", f"OI{letters}", f"NC{letters}")
        each = [
            lax.conv_general_dilated(
                a, b, strides, padding, rhs_dilation=dilations, dimension_numbers=layouts
            )
            for a, b in zip(jnp.split(x, groups, 1), jnp.split(w, groups, 0), strict=True)
        ]
        return jnp.concatenate(each, 1)
    return None


def narrow_convolution(
    x: Any, w: Any, strides: Sequence[int], padding: Padding, dilations: Sequence[int]
) -> Any | None:
    """A convolution to few channels in ONNX's layout; None where XLA's own is as good.

    With as many columns as there are channels the product behind a convolution has too few to be
    fast. So all positions of the window are columns of one product over the pixels, and what each
    of them adds to which output is a shifted slice of it.
    """
    outputs, taps = w.shape[0], prod(w.shape[2:])
    plain = x.ndim == 4 and taps == 9 and max(strides) == 1 and x.dtype == w.dtype == np.float32
    if not plain or not outputs == x.shape[1] == _NARROW:
        return None
    sizes = [
        size + before + after for size, (before, after) in zip(x.shape[2:], padding, strict=True)
    ]
    if any(is_symbolic(size) for size in sizes) or prod(sizes) > _MOST_PIXELS:
        return None
    zero = np.zeros((), x.dtype)
    edges = [(0, 0, 0), *((before, after, 0) for before, after in padding), (0, 0, 0)]
    x = lax.pad(jnp.moveaxis(x, 1, -1), zero, edges)
    weights = jnp.transpose(w, (1, 2, 3, 0)).reshape(w.shape[1], taps * outputs)
    parts = jnp.reshape(x @ weights, (*x.shape[:-1], taps, outputs))
    counts = [
        size - (window - 1) * dilation
        for size, window, dilation in zip(sizes, w.shape[2:], dilations, strict=True)
    ]
    shifted = []
    for index, (row, column) in enumerate(product(*map(range, w.shape[2:]))):
        first = (0, row * dilations[0], column * dilations[1], index, 0)
        last = (x.shape[0], first[1] + counts[0], first[2] + counts[1], index + 1, outputs)
        shifted.append(lax.squeeze(lax.slice(parts, first, last), (3,)))
    return _channels_second(reduce(lax.add, shifted))


def pooled(
    x: Any,
    kernel: Sequence[int],
    strides: Sequence[int],
    padding: Padding,
    dilations: Sequence[int],
    initial: Any,
    function: Callable[[Any, Any], Any],
) -> Any | None:
    """``x`` (N, C, spatial) reduced over each window; None where XLA's own is as good."""
    if prod(kernel) > _MOST_TAPS:
        return None
    parts = _shifted(x, initial, kernel, strides, padding, dilations)
    return _channels_second(reduce(function, (part for _, part in parts)))


def _shifted(
    x: Any,
    fill: Any,
    kernel: Sequence[int],
    strides: Sequence[int],
    padding: Padding,
    dilations: Sequence[int],
) -> Iterator[tuple[tuple[int, ...], Any]]:
    """Each position in the window, and what lies there of all windows, channels last.

    Channels come last so that one loop over all of it runs along contiguous memory.
    """
    x = jnp.moveaxis(x, 1, -1)
    x = lax.pad(x, fill, [(0, 0, 0), *((a, b, 0) for a, b in padding), (0, 0, 0)])
    # Padding inside of the loop would be a branch at every element.
    x = lax.optimization_barrier(x)
    steps = (1, *strides, 1)
    counts = [
        (size - (window - 1) * dilation - 1) // stride + 1
        for size, window, dilation, stride in zip(
            x.shape[1:-1], kernel, dilations, strides, strict=True
        )
    ]
    for tap in product(*map(range, kernel)):
        first = [place * dilation for place, dilation in zip(tap, dilations, strict=True)]
        last = [f + (n - 1) * s + 1 for f, n, s in zip(first, counts, strides, strict=True)]
        yield tap, lax.slice(x, (0, *first, 0), (x.shape[0], *last, x.shape[-1]), steps)


def _channels_second(y: Any) -> Any:
    return jnp.moveaxis(y, -1, 1)


def integer_matmul(a: Any, b: Any) -> Any | None:
    """The int32 product of 8-bit integers less their zero points, to the last bit: by products of
    floats, each of so few terms that nothing is rounded. None where it would be too many."""
    if a.ndim < 2 or b.ndim < 2 or is_symbolic(a.shape[-1]):
        return None
    terms = a.shape[-1]
    if not 0 < terms <= _EXACT * _MOST_SUMS:
        return None
    a, b = a.astype("float32"), b.astype("float32")
    parts = []
    for begin in range(0, terms, _EXACT):
        part = slice(begin, begin + _EXACT)
        parts.append(jnp.matmul(a[..., part], b[..., part, :]).astype("int32"))
    return reduce(lax.add, parts)
