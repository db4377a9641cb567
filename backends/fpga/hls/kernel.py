"""A folded `ir.Dataflow` as C++: the kernel's source, its weights, its golden data.

The layers themselves are C++ templates in ``templates/layers.h``; what is written here is a struct
of constants for each, the streams between them, and one call each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import singledispatch
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING, Any

from trivium.backends.fpga import cost, ir
from trivium.backends.fpga.folding import Folding
from trivium.backends.fpga.hls.streams import Wiring, cpp_type, identifier, wire

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

TOP = "trivium_top"
VALUES_PER_LINE = 16
CPP_TYPES = {"int8": "int8_t", "uint8": "uint8_t", "int16": "int16_t", "int32": "int32_t"}


def render(template: str, **values: object) -> str:
    """Fill in one of the files in ``templates/``."""
    text = (files("trivium.backends.fpga") / "templates" / template).read_text(encoding="utf-8")
    return Template(text).substitute({name: str(value) for name, value in values.items()})


@dataclass(frozen=True)
class Code:
    """What the emitter writes for one layer.

    Attributes:
        function: The template in ``layers.h``.
        types, constants: Members of its struct.
        arrays: Constant arrays that it reads: C++ type, dimensions, values in that order.
        requantize: Whether it rounds by ``requantize`` (else its accumulator is its result).
    """

    function: str
    types: Mapping[str, str]
    constants: Mapping[str, int]
    arrays: Mapping[str, tuple[str, tuple[int, ...], Array]]
    requantize: bool | None = None


@dataclass(frozen=True)
class Kernel:
    """The sources, by the placeholders of ``kernel.cpp``, ``kernel.h`` and ``weights.h``."""

    signature: str
    arguments: tuple[str, ...]
    configurations: str
    interfaces: str
    streams: str
    calls: str
    weights: str
    ports_doc: str


def emit(flow: ir.Dataflow, folding: Folding) -> Kernel:
    """Write a folded program as C++."""
    codes = {layer.name: code(layer, flow, folding) for layer in flow.layers}
    wiring = wire(flow, folding)
    ports = [*flow.inputs, *flow.outputs]
    arguments = argument_names(flow)
    signature = ", ".join(
        f"{'const ' if port in flow.inputs else ''}{CPP_TYPES[port.memory]}* {name}"
        for port, name in zip(ports, arguments, strict=True)
    )
    return Kernel(
        signature=f"{signature}, int frames",
        arguments=arguments,
        configurations="\n".join(_configuration(n, c) for n, c in codes.items()),
        interfaces="\n".join(
            f"#pragma HLS INTERFACE m_axi port = {name} bundle = gmem{i} offset = slave"
            for i, name in enumerate(arguments)
        ),
        streams="\n".join(wiring.streams),
        calls="\n".join(_calls(flow, folding, codes, wiring, arguments)),
        weights="\n".join(
            _array(f"{name}_{array}", *content)
            for name, one in codes.items()
            for array, content in one.arrays.items()
        ),
        ports_doc="\n".join(
            f"// {name}: {port.name}, {'x'.join(map(str, flow.tensors[port.tensor].shape))} "
            "(height, width, channels) for each frame."
            for port, name in zip(ports, arguments, strict=True)
        ),
    )


def argument_names(flow: ir.Dataflow) -> tuple[str, ...]:
    """The kernel's pointers, inputs first."""
    return (
        *(f"in{i}" for i in range(len(flow.inputs))),
        *(f"out{i}" for i in range(len(flow.outputs))),
    )


def _calls(
    flow: ir.Dataflow,
    folding: Folding,
    codes: Mapping[str, Code],
    wiring: Wiring,
    arguments: Sequence[str],
) -> Iterable[str]:
    for port, argument in zip(flow.inputs, arguments, strict=False):
        count = flow.tensors[port.tensor].size // folding[port.tensor].pe
        stream = f"{identifier(flow, port.tensor)}_stream"
        yield f"    load({argument}, {stream}, frames * {count});"
        yield from wiring.forks.get(port.tensor, [])
    for layer in flow.layers:
        yield from wiring.relanes.get(layer.name, [])
        one = codes[layer.name]
        operands = [wiring.reader[layer.name, name] for name in layer.inputs]
        if len(layer.inputs) == 2 and layer.inputs[0] == layer.inputs[1]:
            operands[1] = wiring.reader[layer.name, f"{layer.inputs[1]}+"]
        arrays = [f"{layer.name}_{array}" for array in one.arrays]
        operands += [f"{layer.output}_stream", *arrays, "frames"]
        yield f"    {one.function}<{layer.name}_layer>({', '.join(operands)});"
        yield from wiring.forks.get(layer.output, [])
    for port, argument in zip(flow.outputs, arguments[len(flow.inputs) :], strict=True):
        count = flow.tensors[port.tensor].size // folding[port.tensor].pe
        stream = wiring.reader[f"output {port.name}", port.tensor]
        yield f"    store({stream}, {argument}, frames * {count});"


def _configuration(name: str, one: Code) -> str:
    lines = [f"struct {name}_layer {{"]
    lines += [f"    using {key} = {value};" for key, value in one.types.items()]
    lines += [
        f"    static constexpr {'int' if abs(value) < 1 << 31 else 'long long'} {key} = {value};"
        for key, value in one.constants.items()
    ]
    if one.requantize is not None:
        body = f"requantize<{name}_layer>(sum, multiplier)" if one.requantize else "Out(sum)"
        second = "Multiplier multiplier" if one.requantize else "Multiplier"
        lines += [
            f"    static Out finish(Accumulator sum, {second}) {{",
            f"        return {body};",
            "    }",
        ]
    return "\n".join([*lines, "};", ""])


def _array(name: str, type: str, shape: tuple[int, ...], values: Array) -> str:
    dims = "".join(f"[{size}]" for size in shape)
    flat = [str(int(value)) for value in values.ravel()]
    rows = [
        "    " + ", ".join(flat[i : i + VALUES_PER_LINE]) + ","
        for i in range(0, len(flat), VALUES_PER_LINE)
    ]
    return "\n".join([f"static const {type} {name}{dims} = {{", *rows, "};", ""])


# --- layers ---------------------------------------------------------------------------------------


@singledispatch
def code(layer: ir.Layer, flow: ir.Dataflow, folding: Folding) -> Code:
    """What to write for a layer."""
    raise NotImplementedError(layer.kind)


def _window_constants(
    layer: ir.Convolution | ir.Depthwise | ir.MaxPool | ir.AveragePool,
    flow: ir.Dataflow,
    folding: Folding,
    padding: int,
) -> dict[str, int]:
    source, result, window = flow.input_of(layer), flow.output_of(layer), layer.window
    fold, lanes = folding[layer.name], folding[layer.inputs[0]].pe
    read = fold.simd if isinstance(layer, ir.Convolution) else fold.pe
    return {
        "IN_HEIGHT": source.shape[0],
        "IN_WIDTH": source.shape[1],
        "IN_CHANNELS": source.channels,
        "IN_LANES": lanes,
        "OUT_HEIGHT": result.shape[0],
        "OUT_WIDTH": result.shape[1],
        "KERNEL_Y": window.kernel[0],
        "KERNEL_X": window.kernel[1],
        "STRIDE_Y": window.strides[0],
        "STRIDE_X": window.strides[1],
        "PAD_TOP": window.pads[0],
        "PAD_LEFT": window.pads[1],
        "DILATION_Y": window.dilations[0],
        "DILATION_X": window.dilations[1],
        "SPAN_Y": window.rows,
        "SLOTS": cost.slots(window),
        "BANKS": max(read, lanes),
        "PADDING": padding,
        "PE": fold.pe,
        "FOLDS": result.channels // fold.pe,
    }


def _rounding(how: ir.Requantize | None) -> tuple[dict[str, str], dict[str, int]]:
    """Types and constants of a requantization."""
    if how is None:
        return {"Multiplier": "ap_uint<1>", "Product": "ap_int<1>"}, {}
    # Wide enough for the sum with half a step, and for one step above every output.
    bits = max(how.product.bits + 1, how.shift + 12)
    types = {"Multiplier": f"ap_uint<{how.multiplier_bits}>", "Product": f"ap_int<{bits}>"}
    constants = {"SHIFT": how.shift, "ZERO_POINT": how.zero_point, "LO": how.lo, "HI": how.hi}
    return types, constants


def _multiplier(how: ir.Requantize | None, channels: int) -> Array:
    import numpy as np

    if how is None:
        return np.zeros(channels, np.int64)
    return np.broadcast_to(how.multiplier, (channels,))


def _product_code(
    layer: ir.Convolution | ir.Depthwise,
    flow: ir.Dataflow,
    folding: Folding,
    function: str,
    weight: Array,
    extra: Mapping[str, int],
) -> Code:
    source, result, fold = flow.input_of(layer), flow.output_of(layer), folding[layer.name]
    types, constants = _rounding(layer.requantize)
    groups = (result.channels // fold.pe, fold.pe)
    bias = ir.Range(min(int(layer.bias.min()), -1), int(layer.bias.max()))
    types = {
        "In": cpp_type(source.range),
        "Out": cpp_type(result.range),
        "Weight": _weight_type(cost.weight_bits(layer)),
        "Bias": f"ap_int<{bias.bits}>",
        "Accumulator": f"ap_int<{signed_bits(layer.accumulator)}>",
        **types,
    }
    multiplier = _multiplier(layer.requantize, result.channels)
    return Code(
        function,
        types,
        {**_window_constants(layer, flow, folding, layer.padding), **extra, **constants},
        {
            "weight": (types["Weight"], weight.shape, weight),
            "bias": (types["Bias"], groups, layer.bias),
            "multiplier": (types["Multiplier"], groups, multiplier),
        },
        requantize=layer.requantize is not None,
    )


def _weight_type(bits: int) -> str:
    """C++'s own 8-bit integer where it wastes little: millions of objects of a class would cost a
    compiler gigabytes."""
    return "int8_t" if 5 <= bits <= 8 else f"ap_int<{bits}>"


def signed_bits(range: ir.Range) -> int:
    """Bits of the narrowest signed type."""
    return ir.Range(min(range.lo, -1), range.hi).bits


@code.register(ir.Convolution)
def _(layer: ir.Convolution, flow: ir.Dataflow, folding: Folding) -> Code:
    fold = folding[layer.name]
    outputs, height, width, inputs = layer.weight.shape
    steps = inputs // fold.simd
    weight = layer.weight.reshape(
        outputs // fold.pe, fold.pe, height, width, steps, fold.simd
    ).transpose(0, 2, 3, 4, 1, 5)
    extra = {"SIMD": fold.simd, "STEPS": steps}
    return _product_code(layer, flow, folding, "convolution", weight, extra)


@code.register(ir.Depthwise)
def _(layer: ir.Depthwise, flow: ir.Dataflow, folding: Folding) -> Code:
    fold = folding[layer.name]
    channels, height, width = layer.weight.shape
    weight = layer.weight.reshape(channels // fold.pe, fold.pe, height, width)
    return _product_code(layer, flow, folding, "depthwise", weight.transpose(0, 2, 3, 1), {})


@code.register(ir.MaxPool)
def _(layer: ir.MaxPool, flow: ir.Dataflow, folding: Folding) -> Code:
    types = {
        "In": cpp_type(flow.input_of(layer).range),
        "Out": cpp_type(flow.output_of(layer).range),
    }
    return Code("max_pool", types, _window_constants(layer, flow, folding, layer.padding), {})


@code.register(ir.AveragePool)
def _(layer: ir.AveragePool, flow: ir.Dataflow, folding: Folding) -> Code:
    types, constants = _rounding(layer.requantize)
    types = {
        "In": cpp_type(flow.input_of(layer).range),
        "Out": cpp_type(flow.output_of(layer).range),
        "Accumulator": f"ap_int<{signed_bits(layer.accumulator)}>",
        **types,
    }
    constants = {
        **_window_constants(layer, flow, folding, 0),
        "OFFSET": layer.offset,
        "MULTIPLIER": int(layer.requantize.multiplier.reshape(-1)[0]),
        **constants,
    }
    return Code("average_pool", types, constants, {}, requantize=True)


@code.register(ir.Add)
def _(layer: ir.Add, flow: ir.Dataflow, folding: Folding) -> Code:
    result, lanes = flow.output_of(layer), folding[layer.name].pe
    bits = max(signed_bits(layer.accumulator) + 1, layer.shift + 2)
    types = {
        "InA": cpp_type(flow.tensors[layer.inputs[0]].range),
        "InB": cpp_type(flow.tensors[layer.inputs[1]].range),
        "Out": cpp_type(result.range),
        "Accumulator": f"ap_int<{bits}>",
    }
    constants = {
        "LANES": lanes,
        "COUNT": result.size // lanes,
        "MULTIPLIER_A": layer.multipliers[0],
        "MULTIPLIER_B": layer.multipliers[1],
        "OFFSET": layer.offset,
        "SHIFT": layer.shift,
        "LO": layer.lo,
        "HI": layer.hi,
    }
    return Code("add", types, constants, {})


@code.register(ir.Table)
def _(layer: ir.Table, flow: ir.Dataflow, folding: Folding) -> Code:
    result, lanes = flow.output_of(layer), folding[layer.name].pe
    types = {"In": cpp_type(flow.input_of(layer).range), "Out": cpp_type(result.range)}
    constants = {
        "LANES": lanes,
        "COUNT": result.size // lanes,
        "ENTRIES": len(layer.table),
        "FIRST": layer.first,
    }
    table = (types["Out"], (len(layer.table),), layer.table)
    return Code("lookup", types, constants, {"table": table})
