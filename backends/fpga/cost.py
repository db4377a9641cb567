"""Fabric and time of a folded `Dataflow`, before any tool has seen it.

Cycles are the trip counts of the emitted loops and the filling of their pipelines. Resources follow
from widths: a product of more than 4 by 4 bits takes DSP slices of 27 x 18 bits, an adder a LUT for
each bit, a memory the block RAM shape that wastes least. Nothing here was calibrated on a Vitis
run: the intervals are wide.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import singledispatch

from trivium.backends.fpga import folding as folds
from trivium.backends.fpga import ir
from trivium.backends.fpga.folding import Fold, Folding
from trivium.compiler.errors import Unsupported
from trivium.compiler.types import Estimate, OpCost, Target, Work

BRAM_SHAPES = ((36, 512), (18, 1024), (9, 2048), (4, 4096), (2, 8192), (1, 16384))
"""Width and depth of one 18 Kb block (AMD UG573)."""

LUTRAM_DEPTH = 64
"""A memory this shallow goes into LUTs, 64 bits each."""

USABLE: Mapping[str, float] = {"lut": 0.7, "ff": 0.7, "dsp": 0.9, "bram_18k": 0.9, "uram": 0.9}
"""Share of a device beyond which placement and timing fail in practice."""

DEFAULT_CLOCK_HZ = 100e6
MEMORY_LATENCY = 150
"""Cycles until the first word of a burst comes from external memory."""

CALIBRATION = (
    "trip counts of the emitted loops, with usual pipeline depths, at the clock asked for; no "
    "Vitis run was measured, and the interval allows for a clock missed by half"
)

Resources = dict[str, float]


@dataclass(frozen=True)
class Fifo:
    """A queue between two layers: elements of ``bits``."""

    depth: int
    bits: int


def block_rams(width: int, depth: int) -> int:
    """18 Kb blocks for a memory of ``depth`` words of ``width`` bits."""
    return min(-(-width // w) * -(-depth // d) for w, d in BRAM_SHAPES)


def memory(width: int, depth: int) -> Resources:
    """The fabric of a memory."""
    if depth <= 1:
        return {"lut": width}
    if depth <= LUTRAM_DEPTH:
        return {"lut": width}
    return {"bram_18k": block_rams(width, depth)}


def multipliers(a: int, b: int, count: int) -> Resources:
    """The fabric of ``count`` products of ``a`` by ``b`` bits, signed."""
    if min(a, b) <= 1:
        return {"lut": count * max(a, b)}
    if max(a, b) <= 4:
        return {"lut": count * a * b}
    slices = min(-(-(x - 1) // 26) * -(-(y - 1) // 17) for x, y in ((a, b), (b, a)))
    return {"dsp": count * max(slices, 1)}


def total(*parts: Mapping[str, float]) -> Resources:
    """The sum of several parts."""
    result: Resources = {}
    for part in parts:
        for name, amount in part.items():
            result[name] = result.get(name, 0) + amount
    return result


def resources(flow: ir.Dataflow, folding: Folding) -> Resources:
    """The fabric of a whole kernel: layers, queues, memory ports."""
    parts = [layer_resources(layer, flow, folding) for layer in flow.layers]
    parts += [memory(fifo.bits, fifo.depth) for fifo in fifos(flow, folding).values()]
    # An AXI master with its burst buffers, and the control registers.
    parts += [{"lut": 900, "ff": 1200, "bram_18k": 2} for _ in (*flow.inputs, *flow.outputs)]
    parts.append({"lut": 400, "ff": 500})
    used = total(*parts)
    # Pipelines register about every signal once, and products twice.
    used["ff"] = used.get("ff", 0) + 1.5 * used.get("lut", 0) + 40 * used.get("dsp", 0)
    return {name: float(amount) for name, amount in sorted(used.items())}


@singledispatch
def layer_resources(layer: ir.Layer, flow: ir.Dataflow, folding: Folding) -> Resources:
    """The fabric of one layer."""
    raise NotImplementedError(layer.kind)


def _control(layer: ir.Layer, flow: ir.Dataflow, folding: Folding) -> Resources:
    """Counters, and the line buffer."""
    source, fold = flow.input_of(layer), folding[layer.name]
    window = getattr(layer, "window", ir.Window())
    read = fold.simd if isinstance(layer, ir.Convolution) else fold.pe
    banks = max(read, folding[layer.inputs[0]].pe)
    depth = slots(window) * source.shape[1] * -(-source.channels // banks)
    buffer = memory(source.range.bits, depth)
    return total({"lut": 250}, {name: amount * banks for name, amount in buffer.items()})


def slots(window: ir.Window) -> int:
    """Rows of a line buffer: a power of two, so that a row's slot is the low bits of its number."""
    return 1 << (window.rows - 1).bit_length()


def _rounding(how: ir.Requantize | None, accumulator: ir.Range, lanes: int) -> Resources:
    if how is None:
        return {}
    product = multipliers(accumulator.bits, how.multiplier_bits + 1, lanes)
    return total(product, {"lut": lanes * 3 * how.product.bits})


@layer_resources.register(ir.Convolution)
def _(layer: ir.Convolution, flow: ir.Dataflow, folding: Folding) -> Resources:
    source, result, fold = flow.input_of(layer), flow.output_of(layer), folding[layer.name]
    bits = weight_bits(layer)
    groups = result.channels // fold.pe
    depth = layer.weight.size // fold.products
    return total(
        _control(layer, flow, folding),
        multipliers(source.range.bits, bits, fold.products),
        {"lut": fold.products * (source.range.bits + bits) + fold.pe * layer.accumulator.bits},
        memory(fold.products * bits, depth),
        memory(fold.pe * layer.accumulator.bits, groups),
        memory(fold.pe * (layer.requantize.multiplier_bits if layer.requantize else 0), groups),
        _rounding(layer.requantize, layer.accumulator, fold.pe),
    )


@layer_resources.register(ir.Depthwise)
def _(layer: ir.Depthwise, flow: ir.Dataflow, folding: Folding) -> Resources:
    source, fold = flow.input_of(layer), folding[layer.name]
    bits = weight_bits(layer)
    groups = source.channels // fold.pe
    return total(
        _control(layer, flow, folding),
        multipliers(source.range.bits, bits, fold.pe),
        {"lut": fold.pe * layer.accumulator.bits},
        memory(fold.pe * bits, layer.weight.size // fold.pe),
        memory(fold.pe * layer.accumulator.bits, groups),
        memory(fold.pe * (layer.requantize.multiplier_bits if layer.requantize else 0), groups),
        _rounding(layer.requantize, layer.accumulator, fold.pe),
    )


@layer_resources.register(ir.MaxPool)
def _(layer: ir.MaxPool, flow: ir.Dataflow, folding: Folding) -> Resources:
    lanes = folding[layer.name].pe
    compare = {"lut": 2 * lanes * flow.input_of(layer).range.bits}
    return total(_control(layer, flow, folding), compare)


@layer_resources.register(ir.AveragePool)
def _(layer: ir.AveragePool, flow: ir.Dataflow, folding: Folding) -> Resources:
    lanes = folding[layer.name].pe
    return total(
        _control(layer, flow, folding),
        {"lut": lanes * layer.accumulator.bits},
        _rounding(layer.requantize, layer.accumulator, lanes),
    )


@layer_resources.register(ir.Add)
def _(layer: ir.Add, flow: ir.Dataflow, folding: Folding) -> Resources:
    lanes = folding[layer.name].pe
    products = [
        multipliers(flow.tensors[name].range.bits, multiplier.bit_length() + 1, lanes)
        for name, multiplier in zip(layer.inputs, layer.multipliers, strict=True)
    ]
    changes = [
        {"lut": 2 * flow.tensors[name].channels * flow.tensors[name].range.bits}
        for one, name in folds.relanes(flow, folding)
        if one is layer
    ]
    return total(*products, *changes, {"lut": 100 + lanes * 3 * layer.accumulator.bits})


@layer_resources.register(ir.Table)
def _(layer: ir.Table, flow: ir.Dataflow, folding: Folding) -> Resources:
    lanes = folding[layer.name].pe
    # 64 entries to a LUT and bit, and the multiplexer over them.
    lookups = lanes * flow.output_of(layer).range.bits * (len(layer.table) / 64 + 1)
    return {"lut": 50 + lookups}


def weight_bits(layer: ir.Convolution | ir.Depthwise) -> int:
    """Bits of a layer's weights, signed."""
    return ir.Range(min(int(layer.weight.min()), -1), int(layer.weight.max())).bits


def fifos(flow: ir.Dataflow, folding: Folding) -> dict[tuple[str, int], Fifo]:
    """The queue of each edge, by stream and reader's position.

    One row of the image keeps a layer that reads row by row from stalling the one before. Where a
    stream forks, each branch holds a whole frame: the branch that is read last can then never block
    the one that is read first, whatever lies between the fork and the addition that joins them.
    """
    result = {}
    for name, tensor in flow.tensors.items():
        readers = flow.readers(name)
        words = tensor.channels // folding[name].pe
        depth = words * (tensor.shape[1] if len(readers) == 1 else tensor.pixels)
        for position in range(len(readers)):
            result[name, position] = Fifo(max(depth, 2), tensor.range.bits * folding[name].pe)
    return result


# --- time -----------------------------------------------------------------------------------------


def latency(flow: ir.Dataflow, folding: Folding) -> int:
    """Cycles from the start of a frame to its last result, by following every row.

    A layer makes an output row once the input rows under its window have been made and read.
    """
    done: dict[str, list[int]] = {}
    for port in flow.inputs:
        tensor = flow.tensors[port.tensor]
        row = tensor.shape[1] * tensor.channels // folding[port.tensor].pe
        done[port.tensor] = [MEMORY_LATENCY + row * (y + 1) for y in range(tensor.shape[0])]
    for layer in flow.layers:
        done[layer.output] = _rows_done(layer, flow, folding, [done[name] for name in layer.inputs])
    last = 0
    for port in flow.outputs:
        tensor = flow.tensors[port.tensor]
        row = tensor.shape[1] * tensor.channels // folding[port.tensor].pe
        last = max(last, done[port.tensor][-1] + row + MEMORY_LATENCY)
    return last


def _rows_done(
    layer: ir.Layer, flow: ir.Dataflow, folding: Folding, ready: list[list[int]]
) -> list[int]:
    spent = folds.cycles(layer, flow, folding)
    height = flow.output_of(layer).shape[0]
    window = getattr(layer, "window", None)
    now, taken, rows = 0, 0, []
    for y in range(height):
        if window is None:
            now = max(now, *(times[y] for times in ready))
        else:
            last = window.last_row(y, flow.input_of(layer).shape[0])
            while taken <= last:
                now = max(now, ready[0][taken]) + spent.fetch_row
                taken += 1
        now += spent.compute_row
        rows.append(now)
    return rows


# --- the estimate ---------------------------------------------------------------------------------


def clock(target: Target) -> float:
    """The clock asked for, in hertz."""
    return target.clock_hz or DEFAULT_CLOCK_HZ


def over(used: Mapping[str, float], target: Target) -> list[str]:
    """What exceeds the usable share of a device, in words; what it does not state is not held
    against it."""
    return [
        f"{name} {amount:,.0f} of {target.resources[name]:,.0f}"
        for name, amount in used.items()
        if name in target.resources and amount > USABLE.get(name, 1) * target.resources[name]
    ]


def fold(flow: ir.Dataflow, target: Target, interval_us: float | None = None) -> dict[str, Fold]:
    """Choose the folding for a device.

    Args:
        interval_us: Between frames, to unroll for; by default as short as fits.

    Raises:
        Unsupported: Not even the smallest folding fits; with the figures.
    """
    cycles = max(1, int(interval_us * 1e-6 * clock(target))) if interval_us is not None else None
    found = folds.search(flow, lambda one: not over(resources(flow, one), target), cycles)
    excess = over(resources(flow, found), target)
    if excess:
        share = "; ".join(excess)
        raise Unsupported(
            f"the smallest folding does not fit (usable shares {_shares()}): {share}",
            about=target.name,
            remedy="take a larger device, fewer bits, or a smaller model",
            refusals=[f"{flow.name}: needs {one}" for one in excess],
        )
    return found


def _shares() -> str:
    return ", ".join(f"{name} {share:.0%}" for name, share in USABLE.items())


def estimate(flow: ir.Dataflow, folding: Folding, target: Target, frames: int = 1) -> Estimate:
    """Predict a call of so many frames, and the period when calls follow one another."""
    hertz = clock(target)
    launch = target.launch_s or 0.0
    period = folds.interval(flow, folding) / hertz
    seconds = latency(flow, folding) / hertz + (frames - 1) * period + launch
    rows = []
    for layer in flow.layers:
        macs = _macs(layer, flow)
        spent = folds.cycles(layer, flow, folding).frame / hertz * frames
        work = Work({"int8": 2.0 * macs * frames})
        rows.append(OpCost(layer.origin, layer.kind, spent, work, "compute"))
    notes = list(flow.notes)
    if target.clock_hz is None:
        notes.append(f"the target states no clock: {DEFAULT_CLOCK_HZ / 1e6:.0f} MHz is asked for")
    if target.launch_s is None:
        notes.append("the target states no launch time: the host's share is left out")
    weights = sum(
        layer.weight.size * weight_bits(layer) / 8
        for layer in flow.layers
        if isinstance(layer, (ir.Convolution, ir.Depthwise))
    )
    return Estimate(
        seconds,
        lo=0.9 * seconds,
        hi=2.0 * seconds,
        period_s=period * frames,
        bytes_peak=weights,
        bound="compute",
        resources=resources(flow, folding),
        by_op=tuple(rows),
        joules=target.watts * seconds if target.watts is not None else None,
        calibration=CALIBRATION,
        notes=tuple(notes),
    )


def _macs(layer: ir.Layer, flow: ir.Dataflow) -> int:
    result = flow.output_of(layer)
    if isinstance(layer, ir.Convolution):
        return int(layer.weight.size) * result.pixels
    if isinstance(layer, (ir.Depthwise, ir.AveragePool, ir.MaxPool)):
        return layer.window.kernel[0] * layer.window.kernel[1] * result.size
    return result.size
