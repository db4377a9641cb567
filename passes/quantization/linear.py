"""Linear quantization: the grid ``x = (q - zero_point) * scale`` and how it is fitted to a range.

Asymmetric: ``scale = (max - min) / (2^b - 1)``, the zero point lands on an integer, so zero is
exact. Symmetric: ``scale = max|x| / (2^(b-1) - 1)``, the zero point is 0 for signed grids; on
unsigned ones it is the middle (128 for uint8), or 0 for a range without negative values.
Rounding is half to even, as QuantizeLinear rounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

FLOATS = {"float8e4m3fn": 448.0, "float8e5m2": 57344.0}
"""Types of 8-bit floats and the largest value of each; infinities are never used."""

SIGNED = {"int8": 8, "int4": 4, "int2": 2}
UNSIGNED = {"uint8": 8, "uint4": 4, "uint2": 2}


@dataclass(frozen=True)
class Grid:
    """The integers ``low`` to ``high`` of a stored dtype, or its floats between them.

    Attributes:
        dtype: ONNX's lower-case name of the type that holds them.
    """

    dtype: str
    low: float
    high: float

    @property
    def count(self) -> int:
        """How many codes there are."""
        return 256 if self.floating else round(self.high - self.low) + 1

    @property
    def floating(self) -> bool:
        return self.dtype in FLOATS

    @property
    def stored(self) -> np.dtype[Any]:
        """numpy's type of a code."""
        if self.floating:
            import ml_dtypes

            kind: np.dtype[Any] = np.dtype(
                getattr(ml_dtypes, "float8_" + self.dtype.removeprefix("float8"))
            )
            return kind
        return np.dtype(np.int8 if self.signed else np.uint8)

    @property
    def signed(self) -> bool:
        return self.low < 0


def grid(dtype: str, bits: int | None = None) -> Grid:
    """Return the grid of ``bits`` (by default all) in a dtype; 8-bit floats are taken whole.

    Signed grids leave out the lowest code, so that they are symmetric about zero.
    """
    if dtype in FLOATS:
        return Grid(dtype, -FLOATS[dtype], FLOATS[dtype])
    width = SIGNED.get(dtype) or UNSIGNED.get(dtype)
    if width is None:
        raise ValueError(f"{dtype} is no integer type to quantize to")
    bits = width if bits is None else bits
    if not 2 <= bits <= width:
        raise ValueError(f"{bits} bits in {dtype}: give 2 to {width}")
    if dtype in SIGNED:
        return Grid(dtype, -(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1)
    return Grid(dtype, 0, 2**bits - 1)


def full(dtype: str) -> Grid:
    """Return the grid of every code of a dtype, the lowest of a signed one included."""
    whole = grid(dtype)
    lowest = whole.signed and not whole.floating
    return Grid(dtype, whole.low - 1, whole.high) if lowest else whole


def fit(low: Array, high: Array, to: Grid, *, symmetric: bool) -> tuple[Array, Array]:
    """Fit a grid to ranges.

    Args:
        low, high: Least and largest value, elementwise; zero is always included.
        to: The grid.
        symmetric: Whether zero stays where the grid has its middle.

    Returns:
        Scales (float32, positive; that of a range of 1 where it is only zero) and zero points
        (int64).
    """
    low = np.minimum(np.asarray(low, np.float64), 0.0)
    high = np.maximum(np.asarray(high, np.float64), 0.0)
    if symmetric:
        middle = 0.0 if to.signed else (to.low + to.high + 1) // 2
        nonnegative = (low >= 0) & (not to.signed)
        zero = np.where(nonnegative, to.low, middle)
        scale = np.where(nonnegative, high / (to.high - to.low), 0.0)
        reach = np.maximum(-low, high) / (to.high - middle)
        scale = np.where(nonnegative, scale, reach)
    else:
        scale = (high - low) / (to.high - to.low)
        safe = np.where(scale > 0, scale, 1.0)
        zero = np.clip(np.rint(to.low - low / safe), to.low, to.high)
    # Below the least normal float32 a scale would be flushed to zero by some engines.
    scale = np.where(scale >= np.finfo(np.float32).tiny, scale, 1.0 / (to.high - to.low))
    return scale.astype(np.float32), zero.astype(np.int64)


def fit_signed(largest: Array, to: Grid) -> Array:
    """Fit all codes of a signed grid to ranges: the largest value becomes the lowest code.

    ``scale = max|x| / 2^(b-1)``, negative where the largest value is positive: a step is smaller
    than the textbook's by 1 / 2^(b-1). ONNX Runtime and llama.cpp (Q4_0) do so too.

    Args:
        largest: The value with the largest magnitude, elementwise (float32).
        to: The grid, its lowest code included; the zero point is 0.

    Returns:
        Scales (float32, never 0).
    """
    scale = largest / np.float32(to.low)  # a power of two: nothing is lost
    small = np.abs(scale) < np.finfo(np.float32).tiny
    if small.any():
        scale = np.where(small, np.float32(1.0 / (to.high - to.low)), scale)
    return np.asarray(scale, np.float32)


def refitted(scale: Array, products: Array, squares: Array) -> Array:
    """The scales with the least squared error for codes that were rounded with others.

    Args:
        scale: What the codes were rounded with.
        products: Sum over each block of the codes by the values in units of ``scale``.
        squares: Sum over each block of the squared codes.

    Returns:
        Scales (float32); those given where all codes are 0.
    """
    share = np.where(squares > 0, products / np.maximum(squares, 1), 1.0)
    return (scale * share).astype(np.float32)


def quantize(values: Array, scale: Array, zero: Array | int, to: Grid) -> Array:
    """Return the codes of ``values`` as QuantizeLinear computes them; arguments broadcast."""
    # An array even for a scalar, which numpy would not write back into.
    codes = np.asarray(np.asarray(values, np.float32) / np.asarray(scale, np.float32))
    if to.floating:
        return np.clip(codes, to.low, to.high).astype(to.stored)
    np.rint(codes, out=codes)
    codes += np.asarray(zero, np.float32)
    np.clip(codes, to.low, to.high, out=codes)
    return codes.astype(to.stored)


def dequantize(codes: Array, scale: Array, zero: Array | int) -> Array:
    """Return the values of codes; arguments broadcast."""
    if codes.dtype.kind not in "iu":
        return codes.astype(np.float32) * np.asarray(scale, np.float32)
    shifted = codes.astype(np.int32) - np.asarray(zero, np.int32)
    return shifted.astype(np.float32) * np.asarray(scale, np.float32)


def along(array: Array, axis: int | None, rank: int) -> Array:
    """Shape a vector so that it broadcasts along one axis of a tensor (scalars pass through)."""
    if axis is None or array.ndim == 0:
        return array
    return array.reshape([-1 if i == axis else 1 for i in range(rank)])


def extremes(values: Array, axis: int | None) -> tuple[Array, Array]:
    """Return least and largest value, over everything or for each index of one axis."""
    if axis is None:
        return np.asarray(values.min()), np.asarray(values.max())
    others = tuple(i for i in range(values.ndim) if i != axis)
    return np.asarray(values.min(axis=others)), np.asarray(values.max(axis=others))
