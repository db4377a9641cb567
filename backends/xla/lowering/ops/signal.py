"""Fourier transforms, windows and filter banks."""

from __future__ import annotations

from typing import Any

import numpy as np

from trivium.backends.xla.lowering.dtypes import numpy_dtype
from trivium.backends.xla.lowering.lazy import jnp, lax
from trivium.backends.xla.lowering.registry import handles
from trivium.backends.xla.lowering.trace import Op


def _complex(x: Any) -> Any:
    """(..., 1) real or (..., 2) real and imaginary, as complex numbers without the last axis."""
    return x[..., 0] if x.shape[-1] == 1 else x[..., 0] + 1j * x[..., 1]


def _parts(x: Any, dtype: Any) -> Any:
    return jnp.stack([jnp.real(x), jnp.imag(x)], axis=-1).astype(dtype)


def _length(op: Op, x: Any, axis: int, length: Any, mirrored: bool) -> int:
    if length is None:
        return 2 * (int(x.shape[axis]) - 1) if mirrored else int(x.shape[axis])
    if op.known(length):
        return op.ints(1, length)[0]
    promised = op.shape()
    if promised is None or (op.attr("onesided", 0) and not mirrored):
        raise op.needs(1)
    return promised[axis]


@handles("DFT", since=17, constants=(1,))
def dft_by_attribute(op: Op, x: Any, length: Any = None) -> Any:
    return _dft(op, x, length, op.attr("axis", 1))


@handles("DFT", since=20, constants=(1, 2))
def dft(op: Op, x: Any, length: Any = None, axis: Any = None) -> Any:
    if axis is None or op.known(axis):
        return _dft(op, x, length, -2 if axis is None else op.ints(2, axis)[0])
    # Axes that lead to the promised shape are possible; the right one is selected.
    promised, wanted = op.shape(), jnp.reshape(axis, ()) % x.ndim
    mirrored = bool(op.attr("inverse", 0)) and bool(op.attr("onesided", 0))
    axes = [a for a in range(x.ndim - 1) if _length(op, x, a, length, mirrored) > 0]
    results = [(other, _dft(op, x, length, other)) for other in axes]
    if promised is not None:
        results = [(other, y) for other, y in results if y.shape == promised]
    if not results or len({y.shape for _, y in results}) > 1:
        raise op.needs(2)
    y = results[0][1]
    for other, result in results[1:]:
        y = jnp.where(wanted == other, result, y)
    return y


def _dft(op: Op, x: Any, length: Any, axis: int) -> Any:
    axis = axis % x.ndim
    inverse, onesided = bool(op.attr("inverse", 0)), bool(op.attr("onesided", 0))
    count = _length(op, x, axis, length, inverse and onesided)
    if inverse and not onesided:
        return _parts(jnp.fft.ifft(_complex(jnp.asarray(x)), n=count, axis=axis), x.dtype)

    def transform(signal: Any) -> Any:
        if inverse and onesided:
            return jnp.fft.irfft(signal, n=count, axis=axis)[..., None].astype(x.dtype)
        y = jnp.fft.fft(signal, n=count, axis=axis)
        if onesided:
            y = jnp.take(y, np.arange(count // 2 + 1), axis=axis)
        return _parts(y, x.dtype)

    return _precisely(transform, jnp.asarray(x))


def _precisely(transform: Any, x: Any) -> Any:
    """Transform in double precision on a CPU, where ONNX's tolerances ask for it and it is cheap,
    and in the precision of ``x`` elsewhere: a TPU has no double-precision FFT.
    """
    return lax.platform_dependent(
        x,
        cpu=lambda value: transform(_complex(value.astype("float64"))),
        default=lambda value: transform(_complex(value)),
    )


@handles("STFT", since=17, constants=(1, 3))
def stft(op: Op, x: Any, step: Any, window: Any = None, length: Any = None) -> Any:
    if length is not None and op.known(length):
        (size,) = op.ints(3, length)
    elif window is not None:
        size = window.shape[0]
    elif (promised := op.shape()) is not None and not op.attr("onesided", 1):
        size = promised[2]
    else:
        raise op.needs(3)
    if op.known(step):
        (hop,) = op.ints(1, step)
        frames, begin = 1 + (x.shape[1] - size) // hop, np.arange
        starts: Any = begin(frames) * hop
    elif (promised := op.shape()) is not None:
        starts = jnp.arange(promised[1]) * jnp.reshape(step, ())
    else:
        raise op.needs(1)

    def transform(signal: Any) -> Any:
        framed = jnp.take(signal, starts[:, None] + np.arange(size)[None, :], axis=1, mode="clip")
        framed = framed if window is None else framed * window
        y = jnp.fft.fft(framed, axis=-1)
        return _parts(y[..., : size // 2 + 1] if op.attr("onesided", 1) else y, x.dtype)

    return _precisely(transform, jnp.asarray(x))


_COSINES = {
    "HannWindow": (0.5, 0.5, 0.0),
    "HammingWindow": (25 / 46, 21 / 46, 0.0),
    "BlackmanWindow": (0.42, 0.5, 0.08),
}


@handles(*_COSINES, since=17, constants=(0,))
def window(op: Op, size: Any) -> Any:
    """A sum of cosines; periodic, or symmetric if asked."""
    promised = op.shape()
    if op.known(size):
        (count,) = op.ints(0, size)
    elif promised is not None:
        (count,) = promised
    else:
        raise op.needs(0)
    a, b, c = _COSINES[op.node.op_type]
    period = max(count if op.attr("periodic", 1) else count - 1, 1)
    angle = 2 * np.pi * np.arange(count) / period
    values = a - b * np.cos(angle) + c * np.cos(2 * angle)
    return jnp.asarray(values, numpy_dtype(op.attr("output_datatype", 1)))


@handles("MelWeightMatrix", since=17, constants=(0, 1, 2, 3, 4))
def mel_weight_matrix(op: Op, bins: Any, length: Any, rate: Any, low: Any, high: Any) -> Any:
    """Triangles that are even on the mel scale, (frequencies, bins)."""
    promised = op.shape()
    if op.known(bins):
        (count,) = op.ints(0, bins)
    elif promised is not None:
        count = promised[1]
    else:
        raise op.needs(0)
    if op.known(length):
        frequencies = op.ints(1, length)[0] // 2 + 1
    elif promised is not None:
        frequencies = promised[0]
    else:
        raise op.needs(1)

    def mel(hertz: Any) -> Any:
        return 2595 * jnp.log1p(jnp.reshape(hertz, ()).astype("float64") / 700) / np.log(10)

    bottom = mel(low)
    edges = jnp.arange(count + 2) * ((mel(high) - bottom) / (count + 2)) + bottom
    hertz = 700 * jnp.expm1(edges / 2595 * np.log(10))
    edges = jnp.floor((jnp.reshape(length, ()) + 1) * hertz / jnp.reshape(rate, ()))
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    row = jnp.arange(frequencies, dtype="float64")[:, None]
    rise, fall = centre - left, right - centre
    rising = jnp.where(rise == 0, 1.0, (row - left) / jnp.where(rise == 0, 1, rise))
    falling = (right - row) / jnp.where(fall == 0, 1, fall)
    y = jnp.where((row >= left) & (row <= centre), rising, 0.0)
    y = jnp.where((row >= centre) & (row < right) & (fall > 0), falling, y)
    return y.astype(numpy_dtype(op.attr("output_datatype", 1)))
