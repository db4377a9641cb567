"""The quantized integer dataflow IR: integers in, integers out, every range exact.

A `Dataflow` is a list of layers in topological order over named streams. A stream carries one
feature map, row by row, pixel by pixel, channels innermost (height, width, channels); a vector is a
1x1 image. Every tensor knows the smallest and largest integer it can hold, so every wire's width
follows. Rounding happens in one place, `Requantize`, and is spelled out there.

The IR knows nothing of how far a layer is unrolled (`folding`) nor of the language that it is
emitted in (`hls`); an emitter of RTL reads the same two things.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Range:
    """The integers ``lo .. hi``, both included."""

    lo: int
    hi: int

    @property
    def signed(self) -> bool:
        return self.lo < 0

    @property
    def bits(self) -> int:
        """Bits of the narrowest integer type that holds the range."""
        if self.signed:
            return max((-self.lo - 1).bit_length(), max(self.hi, 0).bit_length()) + 1
        return max(self.hi.bit_length(), 1)

    def __contains__(self, value: int) -> bool:
        return self.lo <= value <= self.hi


@dataclass(frozen=True)
class Tensor:
    """A feature map on a stream: ``(height, width, channels)`` and its range."""

    name: str
    shape: tuple[int, int, int]
    range: Range

    @property
    def pixels(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def channels(self) -> int:
        return self.shape[2]

    @property
    def size(self) -> int:
        return self.pixels * self.channels


@dataclass(frozen=True)
class Requantize:
    """Scale an accumulator, round, move by the zero point, saturate.

    ``clip(round(acc * multiplier[c] / 2**shift) + zero_point, lo, hi)``

    ``multiplier[c] / 2**shift`` is a float32 scale, *exactly*. ``round`` is that of ONNX's
    QuantizeLinear and of ONNX Runtime's integer kernels: the product is first rounded to float32
    (24 significant bits), then to the nearest integer, ties to even. `arithmetic.requantize` does
    both in integers.

    Attributes:
        multiplier: int64, one for each output channel.
        shift: At least 1.
        lo, hi: The output's range: that of its dtype, narrowed by a Relu or Clip.
        product: Range of ``acc * multiplier``.
    """

    multiplier: Array
    shift: int
    zero_point: int
    lo: int
    hi: int
    product: Range

    @property
    def multiplier_bits(self) -> int:
        return Range(0, int(self.multiplier.max())).bits


@dataclass(frozen=True)
class Window:
    """Where a sliding window goes: ``(vertical, horizontal)`` each, pads before the first pixel."""

    kernel: tuple[int, int] = (1, 1)
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int] = (0, 0)
    dilations: tuple[int, int] = (1, 1)

    @property
    def rows(self) -> int:
        """Rows of the input that must be at hand at once."""
        return (self.kernel[0] - 1) * self.dilations[0] + 1

    def last_row(self, output_row: int, height: int) -> int:
        """The last input row that an output row reads, at most ``height - 1``."""
        last = output_row * self.strides[0] - self.pads[0] + self.rows - 1
        return max(0, min(last, height - 1))


@dataclass(frozen=True)
class Layer:
    """What all layers have: a name, the ONNX node it computes, streams that it reads and writes."""

    name: str
    origin: str
    inputs: tuple[str, ...]
    output: str
    kind: ClassVar[str]


@dataclass(frozen=True)
class Convolution(Layer):
    """A matrix-vector product at each position of a window.

    A dense layer is one whose window is the whole image.

    Attributes:
        weight: int64 ``[out, kernel_h, kernel_w, in]``.
        bias: int64 ``[out]``; the input's zero point is folded into it.
        padding: What stands outside of the image: the input's zero point.
        requantize: None where the accumulator itself is the output.
        accumulator: Range over every input, at every partial sum.
    """

    window: Window
    weight: Array
    bias: Array
    padding: int
    accumulator: Range
    requantize: Requantize | None
    kind: ClassVar[str] = "convolution"


@dataclass(frozen=True)
class Depthwise(Layer):
    """A convolution of each channel by itself; ``weight`` is ``[channels, kernel_h, kernel_w]``."""

    window: Window
    weight: Array
    bias: Array
    padding: int
    accumulator: Range
    requantize: Requantize | None
    kind: ClassVar[str] = "depthwise"


@dataclass(frozen=True)
class MaxPool(Layer):
    """The largest value in each window; outside of the image stands the smallest of the range."""

    window: Window
    padding: int
    kind: ClassVar[str] = "max_pool"


@dataclass(frozen=True)
class AveragePool(Layer):
    """The sum of each window (without padding), offset by its zero points, requantized."""

    window: Window
    offset: int
    accumulator: Range
    requantize: Requantize
    kind: ClassVar[str] = "average_pool"


@dataclass(frozen=True)
class Add(Layer):
    """``clip(round((a * multipliers[0] + b * multipliers[1] + offset) / 2**shift), lo, hi)``.

    Ties go to even; zero points are in ``offset``.

    Attributes:
        mismatches: Of all pairs of inputs, how many differ from float32 arithmetic (by one step);
            0 for nearly every pair of scales, since the lowering searches for such a shift.
    """

    multipliers: tuple[int, int]
    offset: int
    shift: int
    lo: int
    hi: int
    accumulator: Range
    mismatches: int
    kind: ClassVar[str] = "add"


@dataclass(frozen=True)
class Table(Layer):
    """Any function of one value: ``table[x - first]``."""

    table: Array
    first: int
    kind: ClassVar[str] = "table"


HostOpType = Literal["QuantizeLinear", "DequantizeLinear", "Softmax"]


@dataclass(frozen=True)
class HostOp:
    """What the host does before or after the kernel, with ONNX's meaning and in float32.

    Attributes:
        scale: One for all, or one for each value of the last axis.
        dtype: Of the result.
    """

    op_type: HostOpType
    scale: Array | None = None
    zero_point: int = 0
    dtype: str = "float32"


@dataclass(frozen=True)
class Port:
    """A model's input or output, and how the host converts between it and the stream.

    Attributes:
        name: The model's name for it.
        tensor: The stream.
        shape: The model's shape of one frame (no batch axis).
        order: Axes of the image ``channels, height, width`` as the stream sees it, in the
            model's order: ``(0, 1, 2)`` is CHW, ``(1, 2, 0)`` is HWC, the stream's own.
        host: What the host does: for an input before the kernel, for an output after it.
        dtype: The model's dtype.
        memory: numpy name of the integers in the device's memory.
    """

    name: str
    tensor: str
    shape: tuple[int, ...]
    order: tuple[int, int, int]
    host: tuple[HostOp, ...]
    dtype: str
    memory: str


@dataclass(frozen=True)
class Dataflow:
    """A model as integers: streams, layers in topological order, ports to the host."""

    name: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    tensors: dict[str, Tensor]
    layers: tuple[Layer, ...]
    notes: tuple[str, ...] = field(default=())

    def readers(self, tensor: str) -> list[str]:
        """Names of the layers and output ports that read a stream, in order."""
        found = [layer.name for layer in self.layers for name in layer.inputs if name == tensor]
        return found + [f"output {port.name}" for port in self.outputs if port.tensor == tensor]

    def input_of(self, layer: Layer) -> Tensor:
        """The (first) stream that a layer reads."""
        return self.tensors[layer.inputs[0]]

    def output_of(self, layer: Layer) -> Tensor:
        return self.tensors[layer.output]
