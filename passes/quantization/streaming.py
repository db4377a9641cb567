"""Blocks of a weight, quantized when they are written: the matrix is never in memory as floats.

A `BlockedWeight` makes codes, scales and zero points of one matrix when the first of them is asked
for, and forgets each as it is handed out: what writes a model asks for them one after another, so
the memory holds one weight's packed codes at most. Stored weights are read in stripes along the
axis in which they lie in the file, each small enough for the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir

from trivium.compiler.errors import BadInput
from trivium.compiler.passing import stripes_of
from trivium.passes.quantization import linear

Array = np.ndarray[Any, np.dtype[Any]]

TILE = 1 << 17
"""Elements quantized at a time: a few times this many bytes stay in the cache."""

_PACKED = 32 << 20
"""Bytes of packed codes made in one go; of a larger matrix the stripes are read several times."""


class BlockedWeight:
    """A [K, N] matrix as blocks of ``block_size`` along K, symmetric or not.

    Args:
        tensor: Float; [N, K] if ``transposed``.
        grid: Of the codes. If symmetric and with its lowest code, scales may be negative.
    """

    def __init__(
        self,
        tensor: ir.TensorProtocol,
        *,
        transposed: bool,
        grid: linear.Grid,
        block_size: int,
        symmetric: bool,
        name: str,
    ) -> None:
        self._tensor = tensor
        self._transposed = transposed
        self._grid = grid
        self._block = block_size
        self._symmetric = symmetric
        self._name = name
        shape = tensor.shape.numpy()
        self.rows, self.columns = (int(s) for s in (reversed(shape) if transposed else shape))
        self._small: dict[str, Array] = {}
        self._held: dict[type[Any], Array] = {}

    @property
    def blocks(self) -> int:
        return -(-self.rows // self._block)

    def tensors(self) -> list[ir.TensorProtocol]:
        """Codes, scales and, if asymmetric, zero points, none of them computed yet."""
        codes = ir.DataType[self._grid.dtype.upper()]
        kinds = [("codes", codes, self.rows), ("scale", ir.DataType.FLOAT, self.blocks)]
        if not self._symmetric:
            kinds.append(("zero_point", codes, self.blocks))
        return [
            _Part(self, what, dtype, ir.Shape((rows, self.columns))) for what, dtype, rows in kinds
        ]

    def codes(self) -> Iterator[Array]:
        """Packed codes in the order in which they are stored, a range of rows at a time."""
        per_row = self._bytes(self.columns)
        step = max(1, _PACKED // (per_row * self._block)) * self._block
        if self._two_to_a_byte and self.columns % 2:
            step = self.rows  # a row may end inside of a byte
        for top in range(0, self.rows, step):
            yield self._range(top, min(top + step, self.rows))
        self._held.clear()

    def small(self, what: str) -> Array:
        """Scales or zero points; computed again if they were handed out before."""
        if what not in self._small:
            for _ in self.codes():
                pass
        return self._small.pop(what)

    @property
    def _two_to_a_byte(self) -> bool:
        return self._grid.dtype.endswith("int4")

    def _bytes(self, count: int) -> int:
        return -(-count // 2) if self._two_to_a_byte else count

    def _range(self, top: int, bottom: int) -> Array:
        """Quantize some rows; their scales and zero points are kept."""
        if top == 0:
            self._small["scale"] = np.empty((self.blocks, self.columns), np.float32)
            if not self._symmetric:
                self._small["zero_point"] = np.empty((self.blocks, self.columns), self._container)
        # Packed at once where every row begins a byte of its own.
        aligned = self._two_to_a_byte and self.columns % 2 == 0
        made = np.empty((bottom - top, self.columns // (2 if aligned else 1)), np.uint8)
        for left, right, part in self._parts(top, bottom):
            codes = self._quantize(part, top, left, right).view(np.uint8)
            if aligned:
                low, high = codes[0::2], codes[1::2]
                low &= np.uint8(0xF)
                high <<= np.uint8(4)
                low |= high
                made[:, left // 2 : right // 2] = low.T
            else:
                made[:, left:right] = codes.T
        return _pack(made.reshape(-1)) if self._two_to_a_byte and not aligned else made

    @property
    def _container(self) -> type[Any]:
        return np.int8 if self._grid.signed else np.uint8

    def _parts(self, top: int, bottom: int) -> Iterator[tuple[int, int, Array]]:
        """Columns ``left`` to ``right`` of some rows, transposed: [right - left, bottom - top]."""
        source = stripes_of(self._tensor)
        along_columns = (source.lies_along == 1) != self._transposed
        if along_columns:
            step = max(2, TILE // self.rows // 2 * 2)
            for left in range(0, self.columns, step):
                right = min(left + step, self.columns)
                yield left, right, source.stripe(left, right)[:, top:bottom]
            return
        whole = source.stripe(top, bottom)
        step = max(2, TILE // (bottom - top) // 2 * 2)
        for left in range(0, self.columns, step):
            right = min(left + step, self.columns)
            yield left, right, np.ascontiguousarray(whole[:, left:right].T)

    def _quantize(self, part: Array, top: int, left: int, right: int) -> Array:
        """Codes of a transposed part; its scales and zero points go where they belong."""
        count, length = part.shape
        missing = -length % self._block
        if missing:
            part = np.pad(part, ((0, 0), (0, missing)))
        blocks = part.reshape(count, -1, self._block)
        if self._symmetric and self._grid.low == -self._grid.high - 1:
            codes, scale = self._by_all_codes(blocks)
        else:
            codes, scale = self._by_textbook(blocks, top, left, right)
        first = top // self._block
        self._small["scale"][first : first + scale.shape[1], left:right] = scale.T
        return codes.reshape(count, -1)[:, :length]

    def _by_textbook(self, blocks: Array, top: int, left: int, right: int) -> tuple[Array, Array]:
        """Codes and scales by `linear.fit`; zero points go where they belong."""
        if self._symmetric and self._grid.signed:
            high = _reduce(np.maximum, np.abs(blocks))
            low = -high
        else:
            low, high = _reduce(np.minimum, blocks), _reduce(np.maximum, blocks)
        self._refuse_nonfinite(low, high)
        scale, zero = linear.fit(low, high, self._grid, symmetric=self._symmetric)
        if not self._symmetric:
            first = top // self._block
            self._small["zero_point"][first : first + zero.shape[1], left:right] = zero.T
        return linear.quantize(blocks, scale[:, :, None], zero[:, :, None], self._grid), scale

    def _by_all_codes(self, blocks: Array) -> tuple[Array, Array]:
        """What `blocks.signed` computes, in memory that stays in the cache from part to part."""
        ratio, rounded = self._scratch(blocks.shape, np.float32, 2)
        largest = _largest(blocks, ratio.view(np.uint32), rounded.view(np.uint32))
        self._refuse_nonfinite(largest)
        scale = linear.fit_signed(largest, self._grid)
        np.divide(blocks, scale[:, :, None], out=ratio)
        np.rint(ratio, out=rounded)
        # Of two that are as large, the negative one has the lowest code.
        np.minimum(rounded, np.float32(self._grid.high), out=rounded)
        scale = linear.refitted(scale, np.vecdot(ratio, rounded), np.vecdot(rounded, rounded))
        (codes,) = self._scratch(blocks.shape, np.int8, 1)
        np.copyto(codes, rounded, casting="unsafe")
        return codes, scale

    def _refuse_nonfinite(self, *extremes: Array) -> None:
        if not all(np.isfinite(array).all() for array in extremes):
            raise BadInput(
                "holds NaN or infinity, which no block of integers can",
                about=f"weight {self._name!r}",
                remedy="repair the checkpoint, or name the layer in the pass's option exclude",
            )

    def _scratch(self, shape: tuple[int, ...], dtype: type[Any], count: int) -> Array:
        """``count`` arrays to write to, the same memory for every part."""
        size = count * math.prod(shape)
        held = self._held.get(dtype)
        if held is None or held.size < size:
            held = self._held[dtype] = np.empty(size, dtype)
        return held[:size].reshape(count, *shape)


def _largest(blocks: Array, keys: Array, signs: Array) -> Array:
    """The value of each block with the largest magnitude, of two the negative one.

    One search instead of two: with the sign in the lowest bit, floats are in the order of their
    magnitudes as integers.

    Args:
        keys, signs: Memory to work in, of the size of the blocks.
    """
    bits = blocks.view(np.uint32)
    np.left_shift(bits, np.uint32(1), out=keys)
    np.right_shift(bits, np.uint32(31), out=signs)
    np.bitwise_or(keys, signs, out=keys)
    top = _reduce(np.maximum, keys)
    return ((top >> np.uint32(1)) | (top << np.uint32(31))).view(np.float32)


def _reduce(extreme: np.ufunc, blocks: Array) -> Array:
    """The extreme of each block; ``reduceat`` has the fastest loop that numpy has for short rows,
    of integers above all."""
    edges = np.arange(0, blocks.size, blocks.shape[2])
    return extreme.reduceat(blocks.reshape(-1), edges).reshape(blocks.shape[:2])


def _pack(flat: Array) -> Array:
    """Codes two to a byte, the first in the low half."""
    packed: Array = flat[0::2] & np.uint8(0xF)
    packed[: flat.size // 2] |= flat[1::2] << np.uint8(4)
    return packed


class _Part(ir.LazyTensor):
    """Codes, scales or zero points of a `BlockedWeight`, made when they are asked for."""

    __slots__ = ("_weight", "_what")

    def __init__(
        self, weight: BlockedWeight, what: str, dtype: ir.DataType, shape: ir.Shape
    ) -> None:
        super().__init__(self._read, dtype, shape)
        self._weight = weight
        self._what = what

    def _read(self) -> ir.TensorProtocol:
        shape = ir.Shape(self.shape.numpy())
        if self._what == "scale":
            return ir.tensor(self._weight.small("scale"))
        if self._what == "codes":
            data = np.concatenate([piece.reshape(-1) for piece in self._weight.codes()])
        else:
            data = self._weight.small("zero_point").view(np.uint8).reshape(-1)
            if self.dtype.bitwidth == 4:
                data = _pack(data)
        if self.dtype.bitwidth == 4:
            return ir.PackedTensor(data, self.dtype, shape=shape)
        return ir.tensor(data.view(self.dtype.numpy()).reshape(shape.numpy()))

    def tofile(self, file: BinaryIO) -> None:
        if self._what != "codes":
            file.write(self._read().tobytes())
            return
        for piece in self._weight.codes():
            file.write(piece.data.cast("B"))
