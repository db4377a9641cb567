"""What an ONNX value can be while a graph is lowered.

A quantized graph computes on floats that are, each of them, a scaled integer; the lowering follows
the integer behind every float. `index` maps a value, in the model's shape without the batch axis,
to positions on its stream, so that Reshape, Flatten and Transpose are operations on an index and
cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from trivium.backends.fpga.ir import HostOp, Layer, Range

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Quantization:
    """Parameters of one QuantizeLinear or DequantizeLinear, per tensor."""

    scale: float
    zero_point: int
    dtype: str

    @property
    def range(self) -> Range:
        return dtype_range(self.dtype)


_BITS = {"int8": 8, "uint8": 8, "int4": 4, "uint4": 4, "int2": 2, "uint2": 2, "int16": 16}


def dtype_range(dtype: str) -> Range:
    """The integers of an ONNX dtype. Raises ``KeyError`` for one that is not an activation's."""
    bits = _BITS[dtype]
    if dtype.startswith("u"):
        return Range(0, (1 << bits) - 1)
    return Range(-(1 << bits - 1), (1 << bits - 1) - 1)


@dataclass(frozen=True)
class Integers:
    """The integers of a stream (between a QuantizeLinear and a DequantizeLinear)."""

    tensor: str
    index: Array


@dataclass(frozen=True)
class Reals:
    """Floats that are a function of a stream's integers.

    Attributes:
        quantization: Of the plain DequantizeLinear; None once another function was applied.
        values: float32, the value of each integer of the stream's range, the lowest first.
    """

    tensor: str
    index: Array
    quantization: Quantization | None
    values: Array


@dataclass(frozen=True)
class Pending:
    """Floats of a layer that waits for its QuantizeLinear.

    Attributes:
        finish: Makes the layer, given the stream's name and how to round; ``None`` leaves the
            accumulator as it is.
        shape: ``(height, width, channels)``.
        scales: float32 value of one step of the accumulator, for each channel; None where the
            layer has no accumulator of its own to give.
        clamp: What a Relu or Clip left of the real line.
        with_bias: Makes the same with a bias (real, for each channel) added.
    """

    origin: str
    shape: tuple[int, int, int]
    index: Array
    finish: Callable[[str, Rounding | None], tuple[Layer, Range]]
    scales: Array | None = None
    clamp: tuple[float, float] = (float("-inf"), float("inf"))
    with_bias: Callable[[Array], Pending] | None = None


@dataclass(frozen=True)
class Rounding:
    """Where a layer's result goes: the quantization, and the range left by activations."""

    quantization: Quantization
    lo: int
    hi: int

    @property
    def range(self) -> Range:
        """Of the stream: it holds the zero point, which is what padding is made of."""
        zero_point = self.quantization.zero_point
        return Range(min(self.lo, zero_point), max(self.hi, zero_point))


@dataclass(frozen=True)
class Hosted:
    """Floats or integers that the host computes from an output of the kernel."""

    tensor: str
    index: Array
    ops: tuple[HostOp, ...]


@dataclass(frozen=True)
class Weights:
    """A stored tensor behind a DequantizeLinear: ``(integers - zero_point) * scale``.

    Attributes:
        read: Gives the integers. Until a layer asks for them, the walk has read no weights: a
            graph with much that is refused may hold more of them than memory.
        scale: float32, a scalar or one for each index of ``axis``.
    """

    read: Callable[[], Array]
    scale: Array
    axis: int

    @cached_property
    def integers(self) -> Array:
        """int64, zero point already taken off."""
        return self.read()


@dataclass(frozen=True)
class HostInput:
    """A model input in floats, before its QuantizeLinear."""

    name: str
    index: Array


Value = Integers | Reals | Pending | Hosted | Weights | HostInput
