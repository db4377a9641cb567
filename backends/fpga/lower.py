"""Normal-form Q/DQ graph -> `ir.Dataflow`, with a reason for every node that cannot go.

This is the walk: it keeps what each ONNX value has become (`values`), the streams and layers made
so far, and the refusals. What an operator means is in `OPERATOR_MODULES`, one function each.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from trivium.backends.fpga import ir as fpga
from trivium.backends.fpga.arithmetic import FLOAT32_INTEGERS
from trivium.backends.fpga.values import (
    Hosted,
    HostInput,
    Integers,
    Pending,
    Quantization,
    Reals,
    Rounding,
    Value,
    dtype_range,
)
from trivium.compiler import passing
from trivium.compiler.errors import Unsupported
from trivium.compiler.model import tensor_info
from trivium.compiler.passing import entering

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    Array = np.ndarray[Any, Any]

Handler = Callable[["Lowering", "ir.Node"], Value]

OPERATORS: dict[str, Handler] = {}
"""ONNX operator -> what it becomes; filled by `lowers`."""


OPERATOR_MODULES = ("operators", "product_operators", "pool_operators", "sum_operators")
"""Where the operators are, by group; importing one fills the table."""


lowers = entering(OPERATORS)
"""Register how operators are lowered."""


@dataclass(frozen=True)
class Lowered:
    """A lowered graph, or why it could not be: one of the two is empty."""

    flow: fpga.Dataflow | None
    refusals: dict[ir.Node, str]


_lowered: WeakKeyDictionary[ir.Graph, Lowered] = WeakKeyDictionary()


def lowered(graph: ir.Graph) -> Lowered:
    """The lowering of a graph, computed once until `forget` is told that the graph has changed."""
    if graph not in _lowered:
        _lowered[graph] = lower(graph)
    return _lowered[graph]


def forget(graph: ir.Graph) -> None:
    """Drop what `lowered` remembers of a graph."""
    _lowered.pop(graph, None)


def lower(graph: ir.Graph) -> Lowered:
    """Lower a graph. Never raises for what the graph holds: that is in the refusals."""
    for group in OPERATOR_MODULES:
        importlib.import_module(f"trivium.backends.fpga.{group}")
    lowering = Lowering(graph)
    for node in graph:
        lowering.visit(node)
    for value in graph.outputs:
        lowering.visit_output(value)
    if lowering.refusals:
        return Lowered(None, lowering.refusals)
    return Lowered(lowering.flow(graph.name or "model"), {})


@dataclass
class Source:
    """A model input on its way to a stream; the first layer that reads it settles its shape."""

    value: ir.Value
    shape: tuple[int, ...]
    quantization: Quantization | None
    range: fpga.Range
    dtype: str
    order: tuple[int, int, int] | None = None
    position: Array | None = None


@dataclass
class Lowering:
    """The state of one walk."""

    graph: ir.Graph
    values: dict[ir.Value, Value] = field(default_factory=dict)
    sources: dict[str, Source] = field(default_factory=dict)
    tensors: dict[str, fpga.Tensor] = field(default_factory=dict)
    layers: list[fpga.Layer] = field(default_factory=list)
    outputs: list[fpga.Port] = field(default_factory=list)
    refusals: dict[ir.Node, str] = field(default_factory=dict)
    notes: dict[str, None] = field(default_factory=dict)
    _poisoned: set[ir.Value] = field(default_factory=set)

    # --- the walk ---

    def visit(self, node: ir.Node) -> None:
        """Lower a node, or note why not; what depends on a refused node is passed over."""
        if any(value in self._poisoned for value in node.inputs if value is not None):
            self._poisoned.update(node.outputs)
            return
        handler = OPERATORS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        try:
            if handler is None:
                raise Unsupported("no integer form of this operator is known")
            self.values[node.outputs[0]] = handler(self, node)
        except Unsupported as error:
            self.refusals[node] = error.cause
            self._poisoned.update(node.outputs)

    def visit_output(self, value: ir.Value) -> None:
        if value in self._poisoned:
            return
        node = value.producer()
        try:
            self.outputs.append(self._output(value))
        except Unsupported as error:
            if node is None:
                node = next(iter(self.graph), None)
            if node is None:
                raise Unsupported(
                    "the model computes nothing", about=f"output {value.name!r}"
                ) from error
            self.refusals[node] = error.cause

    def read(self, value: ir.Value | None) -> Value:
        """What an operand has become; graph inputs come into being here."""
        if value is None:
            raise Unsupported("an operand is missing")
        if value not in self.values:
            if not value.is_graph_input():
                raise Unsupported(f"the operand {value.name!r} is float, not quantized")
            self.values[value] = self._input(value)
        return self.values[value]

    def _input(self, value: ir.Value) -> Value:
        import numpy as np

        info = tensor_info(value)
        shape = tuple(dim for dim in info.shape[1:] if isinstance(dim, int))
        if not info.shape or len(shape) != len(info.shape) - 1:
            raise Unsupported(
                f"the input {info.name!r} has the shape {list(info.shape)}: all but the first "
                "dimension must be fixed"
            )
        index = np.arange(int(np.prod(shape, dtype=np.int64))).reshape(shape)
        if info.dtype == "float32":
            return HostInput(info.name, index)
        if info.dtype not in ("int8", "uint8"):
            raise Unsupported(f"the input {info.name!r} is {info.dtype}")
        self.sources[info.name] = Source(value, shape, None, dtype_range(info.dtype), info.dtype)
        return Integers(info.name, index)

    def quantized_input(self, given: HostInput, quantization: Quantization) -> Integers:
        """The stream of a float input that the host quantizes."""
        if quantization.dtype not in ("int8", "uint8", "int16"):
            raise Unsupported(f"the input {given.name!r} is quantized to {quantization.dtype}")
        found = self.sources.get(given.name)
        if found is None:
            value = next(v for v in self.graph.inputs if v.name == given.name)
            found = self.sources[given.name] = Source(
                value, given_shape(value), quantization, quantization.range, quantization.dtype
            )
        elif found.quantization != quantization:
            raise Unsupported(f"the input {given.name!r} is quantized in two ways")
        return Integers(given.name, given.index)

    # --- streams ---

    def range_of(self, tensor: str) -> fpga.Range:
        source = self.sources.get(tensor)
        return source.range if source is not None else self.tensors[tensor].range

    def image(self, operand: Integers | Reals) -> fpga.Tensor:
        """The stream of an operand that is read as ``[channels, height, width]``."""
        import numpy as np

        if operand.index.ndim != 3:
            raise Unsupported(f"an image of rank {operand.index.ndim + 1}, not 4")
        channels, height, width = operand.index.shape
        self._settle(operand, operand.index)
        tensor = self.tensors[operand.tensor]
        straight = np.arange(operand.index.size).reshape(height, width, channels)
        wanted = self.positions(operand).transpose(1, 2, 0)
        if tensor.shape != (height, width, channels) or not np.array_equal(wanted, straight):
            raise Unsupported(
                "its input reaches it in another order than pixel by pixel, which would need a "
                "buffer for the whole image"
            )
        return tensor

    def vector(self, operand: Integers | Reals) -> fpga.Tensor:
        """The stream of an operand that is read whole, in any order."""
        self._settle(operand, operand.index.reshape(-1, 1, 1))
        return self.tensors[operand.tensor]

    def positions(self, operand: Integers | Reals | Hosted) -> Array:
        """``operand.index`` as positions on its (settled) stream."""
        source = self.sources.get(operand.tensor)
        if source is None or source.position is None:
            return operand.index
        taken: Array = source.position[operand.index]
        return taken

    def _settle(self, operand: Integers | Reals, image: Array) -> None:
        """Let the first reader of a model input decide how it is streamed."""
        import numpy as np

        source = self.sources.get(operand.tensor)
        if source is None or source.order is not None:
            return
        source.order = _axes(image, np.arange(image.size))
        if source.order is None:
            raise Unsupported("its input is neither in channels-first nor in channels-last order")
        channels, height, width = image.shape
        source.position = np.empty(image.size, np.int64)
        source.position[image.transpose(1, 2, 0).ravel()] = np.arange(image.size)
        shape = (height, width, channels)
        self.tensors[operand.tensor] = fpga.Tensor(operand.tensor, shape, source.range)

    def unique(self, kind: str) -> str:
        """A new layer's name, an identifier in C++ and Verilog."""
        count = sum(layer.kind == kind for layer in self.layers)
        return f"{kind}{count}"

    def emit(self, layer: fpga.Layer, shape: tuple[int, int, int], range: fpga.Range) -> Integers:
        """Append a layer; returns its output in stream order, as ``[channels, height, width]``."""
        self.layers.append(layer)
        self.tensors[layer.output] = fpga.Tensor(layer.output, shape, range)
        return Integers(layer.output, channels_first(shape))

    def finish(self, pending: Pending, rounding: Rounding | None) -> Integers:
        """Make the layer that waited for its rounding."""
        kind = "layer"
        layer, range = pending.finish(kind, rounding)
        name = self.unique(layer.kind)
        layer = replace(layer, name=name, output=name)
        done = self.emit(layer, pending.shape, range)
        self._note_exactness(layer)
        return Integers(done.tensor, pending.index)

    def _note_exactness(self, layer: fpga.Layer) -> None:
        accumulator = getattr(layer, "accumulator", None)
        if isinstance(layer, fpga.Add) and layer.mismatches:
            self.notes[
                f"{layer.origin}: {layer.mismatches} of all pairs of inputs round one step away "
                "from float32"
            ] = None
        elif (
            accumulator is not None
            and max(-accumulator.lo, accumulator.hi) > FLOAT32_INTEGERS
            and not isinstance(layer, fpga.Add)
        ):
            self.notes[
                f"{layer.origin}: its accumulator can exceed 2**24, where float32 engines round"
            ] = None

    # --- the ends ---

    def _output(self, value: ir.Value) -> fpga.Port:
        from trivium.backends.fpga.operators import dequantize_op, hosted

        found = self.read(value)
        if isinstance(found, Integers):
            found = Hosted(found.tensor, found.index, ())
        elif isinstance(found, Reals):
            found = Hosted(found.tensor, found.index, (dequantize_op(found),))
        elif isinstance(found, Pending):
            found = hosted(self, found)
        if not isinstance(found, Hosted) or found.tensor not in self.tensors:
            raise Unsupported("the graph returns what no layer computes")
        tensor = self.tensors[found.tensor]
        order = _axes(channels_first(tensor.shape), self.positions(found).ravel())
        if order is None:
            raise Unsupported("the output is neither in channels-first nor in channels-last order")
        info = tensor_info(value)
        return fpga.Port(
            info.name,
            found.tensor,
            found.index.shape,
            order,
            found.ops,
            info.dtype,
            memory_dtype(tensor.range),
        )

    def flow(self, name: str) -> fpga.Dataflow:
        """Put the pieces together, without layers that no output needs."""
        needed = {port.tensor for port in self.outputs}
        layers: list[fpga.Layer] = []
        for layer in reversed(self.layers):
            if layer.output in needed:
                needed.update(layer.inputs)
                layers.append(layer)
        inputs = tuple(
            self._port(name, source) for name, source in self.sources.items() if name in needed
        )
        tensors = {name: t for name, t in self.tensors.items() if name in needed}
        return fpga.Dataflow(
            name, inputs, tuple(self.outputs), tensors, tuple(reversed(layers)), tuple(self.notes)
        )

    def _port(self, name: str, source: Source) -> fpga.Port:
        import numpy as np

        assert source.order is not None
        host: tuple[fpga.HostOp, ...] = ()
        dtype = source.dtype
        if source.quantization is not None:
            scale = np.float32(source.quantization.scale)
            host = (
                fpga.HostOp(
                    "QuantizeLinear", np.array(scale), source.quantization.zero_point, dtype
                ),
            )
            dtype = "float32"
        memory = memory_dtype(source.range)
        return fpga.Port(name, name, source.shape, source.order, host, dtype, memory)


def given_shape(value: ir.Value) -> tuple[int, ...]:
    """The shape of one frame of a graph input (its other dimensions are known to be fixed)."""
    return tuple(int(dim) for dim in (passing.dims(value) or ())[1:] if dim is not None)


def channels_first(shape: tuple[int, int, int]) -> Array:
    """Positions on a stream of that shape, as ``[channels, height, width]``."""
    import numpy as np

    size = shape[0] * shape[1] * shape[2]
    return np.arange(size).reshape(shape).transpose(2, 0, 1)


def memory_dtype(range: fpga.Range) -> str:
    """The numpy integer that holds a stream's values in the device's memory."""
    if range.bits <= 8:
        return "int8" if range.signed else "uint8"
    return "int16" if range.bits <= 16 and range.signed else "int32"


def _axes(image: Array, flat: Array) -> tuple[int, int, int] | None:
    """The order of axes in which a ``[channels, height, width]`` index reads ``flat``."""
    import numpy as np

    for order in itertools.permutations(range(3)):
        if np.array_equal(image.transpose(order).ravel(), flat):
            return order[0], order[1], order[2]
    return None
