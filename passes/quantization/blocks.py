"""A matrix as blocks of small integers: round-to-nearest, a search for better scales, and HQQ.

A block is ``block_size`` values along axis 0, which a product sums over, with a scale of its own
and, if it is asymmetric, a zero point: ``w = (code - zero) * scale``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from trivium.passes.quantization import linear

Array = np.ndarray[Any, np.dtype[Any]]

_STRIPE = 1 << 22
"""Elements quantized at a time: temporaries stay small beside the largest weight."""

_SHARES = tuple(np.linspace(1.1, 0.4, 29))
"""Of the scale that covers a whole block, what a search tries."""


@dataclass(frozen=True)
class Form:
    """How a matrix is stored.

    Attributes:
        bits: Of a code.
        block_size: Values that share a scale.
        symmetric: Whether there are no zero points.
    """

    bits: int
    block_size: int
    symmetric: bool

    @property
    def textbook(self) -> linear.Grid:
        """The codes of round-to-nearest: symmetric about zero, or all."""
        if self.symmetric:
            return linear.grid(f"int{self._stored}", self.bits)
        return linear.grid(f"uint{self._stored}", self.bits)

    @property
    def codes(self) -> linear.Grid:
        """All codes that there are, the lowest of a signed grid included."""
        grid = self.textbook
        return linear.Grid(grid.dtype, grid.low - grid.signed, grid.high)

    @property
    def _stored(self) -> int:
        return 4 if self.bits <= 4 else 8

    def bits_per_weight(self, rows: int, columns: int) -> float:
        """Bits of codes, scales (32 each) and zero points for each weight."""
        blocks = -(-rows // self.block_size)
        each = 32 + (0 if self.symmetric else self.bits)
        return self.bits + each * blocks / rows


@dataclass(frozen=True)
class Blocks:
    """A quantized [K, N] matrix.

    Attributes:
        codes: [K, N].
        scales, zeros: [K / block, N].
    """

    codes: Array
    scales: Array
    zeros: Array
    form: Form

    def restored(self) -> Array:
        """The matrix that the codes stand for, in float32."""
        rows, size = len(self.codes), self.form.block_size
        scales, zeros = (np.repeat(a, size, axis=0)[:rows] for a in (self.scales, self.zeros))
        return linear.dequantize(self.codes, scales, zeros)


def nearest(matrix: Array, form: Form) -> Blocks:
    """Round to the nearest code of the grid that covers each block exactly."""
    grid = form.textbook
    made = _empty(matrix, form)
    for rows, blocks in _stripes(matrix, form):
        part = matrix[rows]
        edges = np.arange(0, len(part), form.block_size)
        low, high = np.minimum.reduceat(part, edges), np.maximum.reduceat(part, edges)
        scale, zero = linear.fit(low, high, grid, symmetric=form.symmetric)
        _fill(made, part, rows, blocks, scale, zero, grid)
    return made


def signed(matrix: Array, form: Form) -> Blocks:
    """Round to the nearest of all codes, by scales that may be negative (`linear.fit_signed`).

    The scales are then those that have the least squared error for these codes. Asymmetric blocks
    use all codes anyway.
    """
    if not form.symmetric:
        return nearest(matrix, form)
    made = _empty(matrix, form)
    for rows, blocks in _stripes(matrix, form):
        part = matrix[rows]
        edges = np.arange(0, len(part), form.block_size)
        low, high = np.minimum.reduceat(part, edges), np.maximum.reduceat(part, edges)
        scale = linear.fit_signed(np.where(high > -low, high, low), form.codes)
        _fill(made, part, rows, blocks, scale, np.zeros(scale.shape, np.int64), form.codes)
        # What follows overwrites its arguments: they are as large as the stripe.
        ratio = part / np.repeat(scale, form.block_size, axis=0)[: len(part)]
        codes = made.codes[rows].astype(np.float32)
        ratio *= codes
        np.square(codes, out=codes)
        sums = (np.add.reduceat(array, edges) for array in (ratio, codes))
        made.scales[blocks] = linear.refitted(scale, *sums)
    return made


def searched(matrix: Array, form: Form, importance: Array | None = None) -> Blocks:
    """Round to the nearest code of the grid that has the least squared error in each block.

    Args:
        matrix: [K, N].
        form: How it is stored.
        importance: [K], what a squared error in a row counts; by default all count the same.
    """
    made = _empty(matrix, form)
    for start in range(0, len(matrix), form.block_size):
        rows = slice(start, min(start + form.block_size, len(matrix)))
        weights = importance[rows] if importance is not None else None
        scale, zero = fit(matrix[rows], form, weights)
        at = start // form.block_size
        _fill(made, matrix[rows], rows, slice(at, at + 1), scale[None], zero[None], form.codes)
    return made


def fit(part: Array, form: Form, importance: Array | None = None) -> tuple[Array, Array]:
    """The scale and zero point of one block, for each column, with the least squared error.

    Args:
        part: [block, N].
        importance: [block], what a squared error in a row counts.
    """
    grid = form.codes
    low, high = part.min(axis=0), part.max(axis=0)
    wide, zero = linear.fit(low, high, form.textbook, symmetric=form.symmetric)
    weights = np.ones(len(part), np.float32) if importance is None else importance
    best = np.full(part.shape[1], np.inf, np.float32)
    scales, zeros = wide.copy(), zero.copy()
    for share in _SHARES:
        scale = wide * np.float32(share)
        at = zero
        if not form.symmetric:
            at = np.clip(np.rint(grid.low - low * share / scale), grid.low, grid.high)
        codes = linear.quantize(part, scale, at, grid)
        off = linear.dequantize(codes, scale, at) - part
        error = weights @ np.square(off)
        better = error < best
        best = np.where(better, error, best)
        scales = np.where(better, scale, scales)
        zeros = np.where(better, at, zeros)
    return scales.astype(np.float32), zeros.astype(np.int64)


def half_quadratic(matrix: Array, form: Form, *, power: float = 0.7, rounds: int = 20) -> Blocks:
    """HQQ (Badri and Shaji, 2023): the grid of each block that has the least ``|error| ** power``.

    Large errors, which few outliers make, count less than in a sum of squares. By turns the errors
    are split into what counts as outliers (a shrinkage) and the rest, and the grid is fitted to the
    rest: its scale and, of an asymmetric block, by turns its zero point.
    """
    grid = form.codes
    made = nearest(matrix, form)
    for start in range(0, len(matrix), form.block_size):
        rows = slice(start, min(start + form.block_size, len(matrix)))
        part, at = matrix[rows], start // form.block_size
        scale = made.scales[at].copy()
        zero = made.zeros[at].astype(np.float32)
        best = np.full(part.shape[1], np.inf, np.float32)
        strength = np.float32(10.0)
        for turn in range(rounds):
            codes = linear.quantize(part, scale, np.rint(zero), grid)
            off = part - linear.dequantize(codes, scale, np.rint(zero).astype(np.int64))
            error = (np.abs(off) ** power).sum(axis=0)
            better = error < best
            best = np.where(better, error, best)
            made.codes[rows] = np.where(better, codes, made.codes[rows])
            made.scales[at] = np.where(better, scale, made.scales[at])
            made.zeros[at] = np.where(better, np.rint(zero), made.zeros[at])
            rest = part - _shrunk(off, strength / np.maximum(scale, 1e-12), power)
            numbers = codes.astype(np.float32)
            if form.symmetric or turn % 2:
                numbers -= np.rint(zero)
                top = (rest * numbers).sum(axis=0)
                bottom = np.square(numbers).sum(axis=0)
                scale = np.where((bottom > 0) & (top > 0), top / np.maximum(bottom, 1), scale)
                scale = scale.astype(np.float32)
            else:
                zero = np.clip((numbers - rest / scale).mean(axis=0), grid.low, grid.high)
            strength *= np.float32(1.01)
    return made


def _shrunk(off: Array, strength: Array, power: float) -> Array:
    """The generalized soft threshold that minimizes |e|^power + strength / 2 (e - off)^2."""
    size = np.abs(off)
    threshold = np.maximum(size, 1e-12) ** (power - 1) / strength
    return np.sign(off) * np.maximum(size - threshold, 0)


def _empty(matrix: Array, form: Form) -> Blocks:
    rows, columns = matrix.shape
    blocks = -(-rows // form.block_size)
    dtype = np.int8 if form.codes.signed else np.uint8
    return Blocks(
        np.empty((rows, columns), dtype),
        np.empty((blocks, columns), np.float32),
        np.zeros((blocks, columns), dtype),
        form,
    )


def _stripes(matrix: Array, form: Form) -> list[tuple[slice, slice]]:
    """Rows, and the blocks that they are, to be quantized at a time."""
    rows, columns = matrix.shape
    blocks = -(-rows // form.block_size)
    step = max(1, _STRIPE // max(1, columns * form.block_size))
    found = []
    for start in range(0, blocks, step):
        end = min(start + step, blocks)
        top, bottom = start * form.block_size, min(end * form.block_size, rows)
        found.append((slice(top, bottom), slice(start, end)))
    return found


def _fill(
    made: Blocks,
    part: Array,
    rows: slice,
    blocks: slice,
    scale: Array,
    zero: Array,
    grid: linear.Grid,
) -> None:
    made.scales[blocks], made.zeros[blocks] = scale, zero
    size = made.form.block_size
    wide_scale, wide_zero = (np.repeat(a, size, axis=0)[: len(part)] for a in (scale, zero))
    made.codes[rows] = linear.quantize(part, wide_scale, wide_zero, grid)
