"""What each operator of a Q/DQ graph becomes: quantization, data layout, activations, the host's
part. The operators with an accumulator are in `product_operators`, `pool_operators` and
`sum_operators`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from trivium.backends.fpga import ir as fpga
from trivium.backends.fpga.lower import Lowering, lowers
from trivium.backends.fpga.values import (
    Hosted,
    HostInput,
    Integers,
    Pending,
    Quantization,
    Reals,
    Rounding,
    Value,
    Weights,
    dtype_range,
)
from trivium.compiler import passing
from trivium.compiler.errors import Unsupported

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    Array = np.ndarray[Any, Any]

UNARY = (
    "Celu",
    "Elu",
    "Erf",
    "Gelu",
    "HardSigmoid",
    "HardSwish",
    "LeakyRelu",
    "Mish",
    "Selu",
    "Sigmoid",
    "Softplus",
    "Softsign",
    "Swish",
    "Tanh",
    "ThresholdedRelu",
)
"""Functions of one value: between Q and DQ each is a table of at most 256 entries."""


def parameters(node: ir.Node) -> Quantization:
    """The scale, zero point and dtype of a per-tensor QuantizeLinear or DequantizeLinear."""
    scale = passing.constant(node.inputs[1])
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    if scale is None or scale.size != 1:
        raise Unsupported("its scale is not one constant: activations are quantized per tensor")
    zero_point = passing.constant(zero) if zero is not None else None
    if zero is not None and (zero_point is None or zero_point.size != 1):
        raise Unsupported("its zero point is not one constant")
    dtype = "uint8"
    if zero is not None and zero.dtype is not None:
        dtype = zero.dtype.name.lower()
    elif node.op_type == "DequantizeLinear" and node.inputs[0] is not None:
        given = node.inputs[0].dtype
        dtype = given.name.lower() if given is not None else dtype
    elif passing.attribute(node, "output_dtype", 0):
        import onnx_ir as ir

        dtype = ir.DataType(passing.attribute(node, "output_dtype")).name.lower()
    try:
        dtype_range(dtype)
    except KeyError:
        raise Unsupported(f"quantized to {dtype}, not to an integer of at most 16 bits") from None
    point = int(zero_point.reshape(())) if zero_point is not None else 0
    return Quantization(float(scale.reshape(())), point, dtype)


@lowers("QuantizeLinear")
def _quantize(lowering: Lowering, node: ir.Node) -> Value:
    import numpy as np

    to = parameters(node)
    x = lowering.read(node.inputs[0])
    if isinstance(x, HostInput):
        return lowering.quantized_input(x, to)
    if isinstance(x, Pending):
        return lowering.finish(x, rounding(to, x.clamp))
    if isinstance(x, Hosted):
        op = fpga.HostOp("QuantizeLinear", np.array(np.float32(to.scale)), to.zero_point, to.dtype)
        return replace(x, ops=(*x.ops, op))
    if isinstance(x, Reals):
        return _through_table(lowering, node, x, to)
    raise Unsupported("it quantizes what is not float")


def rounding(to: Quantization, clamp: tuple[float, float]) -> Rounding:
    """The rounding to a quantization after a clamp, which is exact: rounding is monotone."""
    import numpy as np

    steps = np.rint(np.array(clamp, np.float32) / np.float32(to.scale)) + to.zero_point
    lo, hi = (int(bound) for bound in np.clip(steps, to.range.lo, to.range.hi))
    return Rounding(to, lo, hi)


def _through_table(lowering: Lowering, node: ir.Node, x: Reals, to: Quantization) -> Value:
    """Quantize a function of integers: nothing if they stay the same, else a table."""
    import numpy as np

    range = lowering.range_of(x.tensor)
    table = _codes(x.values, to)
    same = np.array_equal(table, np.arange(range.lo, range.hi + 1))
    if same:
        return Integers(x.tensor, x.index)
    tensor = lowering.image(x) if x.index.ndim == 3 else lowering.vector(x)
    name = lowering.unique("table")
    layer = fpga.Table(name, node.name or "QuantizeLinear", (x.tensor,), name, table, range.lo)
    bounds = Rounding(to, int(table.min()), int(table.max())).range
    lowering.emit(layer, tensor.shape, bounds)
    return Integers(name, lowering.positions(x))


def _codes(values: Array, to: Quantization) -> Array:
    import numpy as np

    steps = np.rint(values.astype(np.float32) / np.float32(to.scale)) + to.zero_point
    codes: Array = np.clip(steps, to.range.lo, to.range.hi).astype(np.int64)
    return codes


@lowers("DequantizeLinear")
def _dequantize(lowering: Lowering, node: ir.Node) -> Value:
    import numpy as np

    source = node.inputs[0]
    if passing.is_constant(source):
        return _weights(node)
    x = lowering.read(source)
    quantization = parameters(node)
    if isinstance(x, Hosted):
        raise Unsupported("it continues what the host computes after the kernel")
    if not isinstance(x, Integers):
        raise Unsupported("it dequantizes what is not an integer")
    bounds = lowering.range_of(x.tensor)
    codes = np.arange(bounds.lo, bounds.hi + 1) - quantization.zero_point
    values = codes.astype(np.float32) * np.float32(quantization.scale)
    return Reals(x.tensor, x.index, quantization, values)


def _weights(node: ir.Node) -> Weights:
    import numpy as np

    if passing.attribute(node, "block_size", 0):
        raise Unsupported("weights quantized in blocks have no single scale for each output")
    scale = passing.constant(node.inputs[1])
    if scale is None:
        raise Unsupported("its scale is not constant")
    rank = len(passing.dims(node.inputs[0]) or ())
    axis = passing.attribute(node, "axis", 1) % max(rank, 1)
    return Weights(lambda: _integers(node, axis), np.asarray(scale, np.float32), axis)


def _integers(node: ir.Node, axis: int) -> Array:
    import numpy as np

    stored = passing.constant(node.inputs[0], limit=None)
    assert stored is not None
    integers: Array = stored.astype(np.int64)
    zero = passing.constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] else None
    if zero is not None:
        point = zero.astype(np.int64)
        if point.size > 1:
            point = point.reshape([-1 if i == axis else 1 for i in range(integers.ndim)])
        integers = integers - point
    return integers


# --- data layout: operations on the index ---------------------------------------------------------


def moved(value: Value, index: Array) -> Value:
    """The same value with another index."""
    if isinstance(value, Weights):
        raise Unsupported("it rearranges a stored tensor; fold constants first")
    return replace(value, index=index)


@lowers("Identity", "Dropout")
def _identity(lowering: Lowering, node: ir.Node) -> Value:
    return lowering.read(node.inputs[0])


@lowers("Transpose")
def _transpose(lowering: Lowering, node: ir.Node) -> Value:
    x = lowering.read(node.inputs[0])
    if isinstance(x, Weights):
        perm = passing.attribute(node, "perm") or tuple(reversed(range(x.integers.ndim)))
        axis = list(perm).index(x.axis) if x.scale.size > 1 else 0
        return Weights(lambda: x.integers.transpose(perm), x.scale, axis)
    perm = passing.attribute(node, "perm") or tuple(reversed(range(x.index.ndim + 1)))
    if perm[0] != 0:
        raise Unsupported("it moves the batch axis")
    return moved(x, x.index.transpose([axis - 1 for axis in perm[1:]]))


@lowers("Reshape")
def _reshape(lowering: Lowering, node: ir.Node) -> Value:
    x = lowering.read(node.inputs[0])
    target = passing.constant(node.inputs[1])
    if isinstance(x, Weights):
        raise Unsupported("it reshapes a stored tensor; fold constants first")
    if target is None:
        raise Unsupported("its target shape is not constant; bind the batch with --shape")
    shape = [int(dim) for dim in target.ravel()]
    if not passing.attribute(node, "allowzero", 0):
        shape = [
            x.index.shape[i - 1] if dim == 0 and 0 < i <= x.index.ndim else dim
            for i, dim in enumerate(shape)
        ]
    batch = passing.dims(node.inputs[0])
    if not shape or shape[0] not in (-1, 0, batch[0] if batch else 1, 1):
        raise Unsupported(f"it reshapes to {shape}, which mixes the batch with the rest")
    try:
        return moved(x, x.index.reshape(shape[1:]))
    except ValueError:
        raise Unsupported(f"it reshapes to {shape}, which mixes the batch with the rest") from None


@lowers("Flatten")
def _flatten(lowering: Lowering, node: ir.Node) -> Value:
    x = lowering.read(node.inputs[0])
    if passing.attribute(node, "axis", 1) != 1 or isinstance(x, Weights):
        raise Unsupported("it flattens the batch with the rest")
    return moved(x, x.index.reshape(-1))


@lowers("Squeeze", "Unsqueeze")
def _squeeze(lowering: Lowering, node: ir.Node) -> Value:
    x = lowering.read(node.inputs[0])
    shape = passing.dims(node.outputs[0])
    if shape is None or None in shape[1:] or isinstance(x, Weights):
        raise Unsupported("the shape of its result is unknown")
    sizes = [dim for dim in shape[1:] if dim is not None]
    try:
        return moved(x, x.index.reshape(sizes))
    except ValueError:
        raise Unsupported("it changes the batch axis") from None


# --- activations ----------------------------------------------------------------------------------


@lowers("Relu", "Clip")
def _clamp(lowering: Lowering, node: ir.Node) -> Value:
    import numpy as np

    x = lowering.read(node.inputs[0])
    lo, hi = 0.0, float("inf")
    if node.op_type == "Clip":
        lo, hi = _bound(node, 1, float("-inf")), _bound(node, 2, float("inf"))
    if isinstance(x, Pending):
        return replace(x, clamp=(max(x.clamp[0], lo), min(max(x.clamp[1], lo), hi)))
    if isinstance(x, Reals):
        values = np.clip(x.values, np.float32(lo), np.float32(hi))
        return replace(x, quantization=None, values=values)
    raise Unsupported("its operand is not quantized")


def _bound(node: ir.Node, index: int, default: float) -> float:
    if len(node.inputs) <= index or node.inputs[index] is None:
        return default
    bound = passing.scalar(node.inputs[index])
    if bound is None:
        raise Unsupported("its bounds are not constant")
    return bound


@lowers(*UNARY)
def _unary(lowering: Lowering, node: ir.Node) -> Value:
    x = lowering.read(node.inputs[0])
    if not isinstance(x, Reals):
        raise Unsupported("it needs a quantized operand, so that it becomes a table")
    return replace(x, quantization=None, values=_evaluate(node, x.values))


def _evaluate(node: ir.Node, values: Array) -> Array:
    """Run one elementwise node on an array, with the reference engine."""
    import numpy as np
    import onnx_ir as ir

    from trivium.compiler import reference
    from trivium.compiler.model import OPSET

    x = ir.Value(name="x", shape=ir.Shape(values.shape), type=ir.TensorType(ir.DataType.FLOAT))
    copy = ir.node(node.op_type, [x], {a.name: a.value for a in node.attributes.values()})
    y = copy.outputs[0]
    y.name, y.shape, y.type = "y", x.shape, x.type
    graph = ir.Graph([x], [y], nodes=[copy], opset_imports={"": OPSET}, name="unary")
    found = reference.run_model(ir.Model(graph, ir_version=11), [{"x": values}])
    return np.asarray(found.outputs[0]["y"], np.float32)


# --- the host's part ------------------------------------------------------------------------------


def dequantize_op(x: Reals) -> fpga.HostOp:
    """The host's DequantizeLinear of a stream."""
    import numpy as np

    if x.quantization is None:
        raise Unsupported("the graph returns floats after an activation; quantize its output")
    scale = np.array(np.float32(x.quantization.scale))
    return fpga.HostOp("DequantizeLinear", scale, x.quantization.zero_point)


def hosted(lowering: Lowering, pending: Pending) -> Hosted:
    """Let the host dequantize a layer's accumulators."""
    if pending.scales is None or pending.clamp != (float("-inf"), float("inf")):
        raise Unsupported("the graph returns floats that no QuantizeLinear rounds")
    if pending.index.ndim != 1 and pending.scales.size > 1:
        raise Unsupported("the graph returns an image with a scale for each channel")
    done = lowering.finish(pending, None)
    op = fpga.HostOp("DequantizeLinear", pending.scales)
    return Hosted(done.tensor, done.index, (op,))


@lowers("Softmax")
def _softmax(lowering: Lowering, node: ir.Node) -> Value:
    x = lowering.read(node.inputs[0])
    if isinstance(x, Reals):
        x = Hosted(x.tensor, x.index, (dequantize_op(x),))
    elif isinstance(x, Pending):
        x = hosted(lowering, x)
    if not isinstance(x, Hosted):
        raise Unsupported("its operand is not quantized")
    if x.index.ndim != 1 or passing.attribute(node, "axis", -1) not in (-1, 1):
        raise Unsupported("only a Softmax over the classes, at the end, is left to the host")
    lowering.notes[f"{node.name or 'Softmax'}: the host computes it, after the kernel"] = None
    return replace(x, ops=(*x.ops, fpga.HostOp("Softmax")))
