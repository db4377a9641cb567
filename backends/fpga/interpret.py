"""The IR's meaning, in numpy: what every emitter has to reproduce bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from functools import singledispatch
from typing import TYPE_CHECKING, Any

from trivium.backends.fpga import ir
from trivium.backends.fpga.arithmetic import requantize, round_half_even
from trivium.compiler.errors import BackendFailed

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


def run(flow: ir.Dataflow, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Run one frame.

    Args:
        flow: The program.
        inputs: Integers ``[height, width, channels]`` by stream name.

    Returns:
        Every stream's content, int64.

    Raises:
        BackendFailed: A value leaves the range that the IR promises: a bug in the lowering.
    """
    import numpy as np

    values = {name: np.asarray(array, np.int64) for name, array in inputs.items()}
    for layer in flow.layers:
        tensor = flow.output_of(layer)
        result = evaluate(layer, [values[name] for name in layer.inputs], tensor)
        lo, hi = int(result.min()), int(result.max())
        if lo not in tensor.range or hi not in tensor.range or result.shape != tensor.shape:
            raise BackendFailed(
                f"{list(result.shape)} in {lo}..{hi} on a stream of {list(tensor.shape)} in "
                f"{tensor.range.lo}..{tensor.range.hi}",
                about=layer.name,
                remedy="this is a bug in the lowering; please report it",
            )
        values[layer.output] = result
    return values


@singledispatch
def evaluate(layer: ir.Layer, inputs: list[Array], output: ir.Tensor) -> Array:
    """Compute one layer on ``[height, width, channels]`` arrays of int64."""
    raise NotImplementedError(layer.kind)


def patches(x: Array, window: ir.Window, padding: int, height: int, width: int) -> Array:
    """Every window of an image: ``[height, width, kernel_h, kernel_w, channels]``."""
    import numpy as np

    (kh, kw), (sy, sx), (top, left), (dy, dx) = (
        window.kernel,
        window.strides,
        window.pads,
        window.dilations,
    )
    bottom = max(0, (height - 1) * sy + (kh - 1) * dy + 1 - top - x.shape[0])
    right = max(0, (width - 1) * sx + (kw - 1) * dx + 1 - left - x.shape[1])
    x = np.pad(x, ((top, bottom), (left, right), (0, 0)), constant_values=padding)
    rows = (np.arange(height) * sy)[:, None] + np.arange(kh) * dy
    columns = (np.arange(width) * sx)[:, None] + np.arange(kw) * dx
    found: Array = x[rows[:, None, :, None], columns[None, :, None, :]]
    return found


def _finish(accumulator: Array, how: ir.Requantize | None) -> Array:
    return accumulator if how is None else requantize(accumulator, how)


@evaluate.register(ir.Convolution)
def _(layer: ir.Convolution, inputs: list[Array], output: ir.Tensor) -> Array:
    import numpy as np

    height, width, _ = output.shape
    windows = patches(inputs[0], layer.window, layer.padding, height, width)
    # Sums below 2**53 are exact in float64, whose matrix product is many times faster.
    flat = windows.reshape(height * width, -1).astype(np.float64)
    weight = layer.weight.reshape(len(layer.weight), -1).astype(np.float64)
    sums = (flat @ weight.T).astype(np.int64).reshape(height, width, -1) + layer.bias
    return _finish(sums, layer.requantize)


@evaluate.register(ir.Depthwise)
def _(layer: ir.Depthwise, inputs: list[Array], output: ir.Tensor) -> Array:
    height, width, _ = output.shape
    windows = patches(inputs[0], layer.window, layer.padding, height, width)
    sums = (windows * layer.weight.transpose(1, 2, 0)).sum((2, 3)) + layer.bias
    return _finish(sums, layer.requantize)


@evaluate.register(ir.MaxPool)
def _(layer: ir.MaxPool, inputs: list[Array], output: ir.Tensor) -> Array:
    height, width, _ = output.shape
    windows = patches(inputs[0], layer.window, layer.padding, height, width)
    largest: Array = windows.max((2, 3))
    return largest


@evaluate.register(ir.AveragePool)
def _(layer: ir.AveragePool, inputs: list[Array], output: ir.Tensor) -> Array:
    height, width, _ = output.shape
    windows = patches(inputs[0], layer.window, 0, height, width)
    return requantize(windows.sum((2, 3)) + layer.offset, layer.requantize)


@evaluate.register(ir.Add)
def _(layer: ir.Add, inputs: list[Array], output: ir.Tensor) -> Array:
    import numpy as np

    total = inputs[0] * layer.multipliers[0] + inputs[1] * layer.multipliers[1] + layer.offset
    return np.clip(round_half_even(total, layer.shift), layer.lo, layer.hi)


@evaluate.register(ir.Table)
def _(layer: ir.Table, inputs: list[Array], output: ir.Tensor) -> Array:
    taken: Array = layer.table[inputs[0] - layer.first]
    return taken
