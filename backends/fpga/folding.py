"""How far each layer is unrolled: PE output channels by SIMD input channels in each clock cycle.

A folding is data, apart from the lowering and from any emitter: it says how many cycles and how
much of the fabric a `Dataflow` takes, and every emitter has to honour it. It is legal if PE divides
the output channels and SIMD the input channels, so that no lane ever idles or crosses a pixel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import singledispatch

from trivium.backends.fpga import ir
from trivium.compiler.errors import Unsupported

MAX_UNROLL = 1024
"""Products in one cycle of one layer: HLS tools refuse to partition arrays further."""

MAX_INPUT_LANES = 8
"""Channels of the model's input that are read from memory in a cycle (64 bits of int8)."""


LOOP_ENTRY = 4
"""Cycles to enter a pipelined loop that only moves data."""

PIPELINE_DEPTH = 12
"""Cycles from a product to its rounded result; a usual depth of these loops."""


@dataclass(frozen=True)
class Fold:
    """Of one layer; for a model's input, ``pe`` is the number of channels read in a cycle."""

    pe: int = 1
    simd: int = 1

    @property
    def products(self) -> int:
        return self.pe * self.simd


Folding = Mapping[str, Fold]
"""A fold for each stream: by the name of the layer, or of the model's input, that writes it."""


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


@singledispatch
def choices(layer: ir.Layer, flow: ir.Dataflow) -> list[Fold]:
    """The legal folds of a layer, the smallest first."""
    channels = flow.output_of(layer).channels
    return [Fold(pe) for pe in divisors(channels) if pe <= MAX_UNROLL]


@choices.register(ir.Convolution)
def _(layer: ir.Convolution, flow: ir.Dataflow) -> list[Fold]:
    folds = [
        Fold(pe, simd)
        for pe in divisors(flow.output_of(layer).channels)
        for simd in divisors(flow.input_of(layer).channels)
        if pe * simd <= MAX_UNROLL
    ]
    return sorted(folds, key=lambda fold: (fold.products, fold.pe))


def check(flow: ir.Dataflow, folding: Folding) -> None:
    """Raise ``Unsupported`` unless every stream has a legal fold."""
    for layer in flow.layers:
        fold = folding.get(layer.name)
        if fold not in choices(layer, flow):
            raise Unsupported(
                f"PE and SIMD {fold} do not divide its channels",
                about=layer.name,
                remedy=f"legal: {', '.join(f'{f.pe}x{f.simd}' for f in choices(layer, flow)[:12])}",
            )
    for port in flow.inputs:
        fold = folding.get(port.tensor)
        if fold is None or flow.tensors[port.tensor].channels % fold.pe or fold.simd != 1:
            raise Unsupported(f"{fold} does not divide its channels", about=port.name)


# --- cycles ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cycles:
    """Clock cycles: reading one input row, computing one output row, and for a frame in all.

    Attributes:
        products: Of ``compute_row``, the trips of the loop, without filling its pipeline.
    """

    fetch_row: int
    compute_row: int
    frame: int
    products: int


def cycles(layer: ir.Layer, flow: ir.Dataflow, folding: Folding) -> Cycles:
    """The trip counts of the emitted loops, and what it takes to fill their pipelines."""
    source, result = flow.input_of(layer), flow.output_of(layer)
    fold = folding[layer.name]
    if isinstance(layer, (ir.Add, ir.Table)):
        row = result.shape[1] * result.channels // fold.pe
        return Cycles(0, row, row * result.shape[0] + PIPELINE_DEPTH, row)
    fetch = LOOP_ENTRY + source.shape[1] * source.channels // folding[layer.inputs[0]].pe
    window = getattr(layer, "window", ir.Window())
    steps = window.kernel[0] * window.kernel[1] * (result.channels // fold.pe)
    if isinstance(layer, ir.Convolution):
        steps *= source.channels // fold.simd
    products = result.shape[1] * steps
    compute = PIPELINE_DEPTH + products
    return Cycles(fetch, compute, fetch * source.shape[0] + compute * result.shape[0], products)


def relanes(flow: ir.Dataflow, folding: Folding) -> list[tuple[ir.Add, str]]:
    """Operands of additions that arrive in other lanes than the addition works in."""
    return [
        (layer, name)
        for layer in flow.layers
        if isinstance(layer, ir.Add)
        for name in layer.inputs
        if folding[name].pe != folding[layer.name].pe
    ]


def relane_cycles(tensor: ir.Tensor, source: int, result: int) -> int:
    """Cycles to change the lanes of a whole frame."""
    loops = tensor.channels // source + tensor.channels // result
    return tensor.pixels * (loops + 2 * LOOP_ENTRY)


def interval(flow: ir.Dataflow, folding: Folding) -> int:
    """Cycles between frames: those of the slowest layer."""
    slowest = max(
        (cycles(layer, flow, folding).frame for layer in flow.layers),
        default=1,
    )
    ports = [flow.tensors[port.tensor].size // folding[port.tensor].pe for port in flow.inputs]
    ports += [flow.tensors[port.tensor].size // folding[port.tensor].pe for port in flow.outputs]
    changes = [
        relane_cycles(flow.tensors[name], folding[name].pe, folding[layer.name].pe)
        for layer, name in relanes(flow, folding)
    ]
    return max([slowest, *ports, *changes])


# --- the search -----------------------------------------------------------------------------------


def smallest(flow: ir.Dataflow) -> dict[str, Fold]:
    """One product in a cycle in each layer; the model's input as wide as it usefully gets."""
    folding = {layer.name: Fold() for layer in flow.layers}
    for port in flow.inputs:
        channels = flow.tensors[port.tensor].channels
        folding[port.tensor] = Fold(max(d for d in divisors(channels) if d <= MAX_INPUT_LANES))
    return folding


def search(
    flow: ir.Dataflow, fits: Callable[[Folding], bool], target_cycles: int | None = None
) -> dict[str, Fold]:
    """Unroll the slowest layer step by step until the interval is met or nothing more fits.

    Args:
        flow: The program.
        fits: Whether a folding fits the device.
        target_cycles: Stop at this many cycles between frames; by default at those that reading the
            model's input takes, below which no kernel gets.

    Returns:
        The folding; the smallest one even if that does not fit, for the caller to report.
    """
    folding = smallest(flow)
    floor = max(
        (flow.tensors[port.tensor].size // folding[port.tensor].pe for port in flow.inputs),
        default=1,
    )
    goal = target_cycles if target_cycles is not None else floor
    layers = {layer.name: layer for layer in flow.layers}
    legal = {name: choices(layer, flow) for name, layer in layers.items()}
    stuck: set[str] = set()
    while interval(flow, folding) > goal:
        timed = {name: cycles(layer, flow, folding) for name, layer in layers.items()}
        slowest = max(timed, key=lambda name: timed[name].frame)
        layer = layers[slowest]
        # A layer that mostly waits for its input needs a wider producer.
        reading = timed[slowest].fetch_row * flow.input_of(layer).shape[0]
        turn = [slowest, layer.inputs[0]]
        if 2 * reading > timed[slowest].frame:
            turn.reverse()
        step = next(
            (
                wider
                for name in turn
                if name in layers and name not in stuck
                if (wider := _widen(flow, folding, name, legal[name], fits)) is not None
            ),
            None,
        )
        if step is None:
            break
        folding = step
        _follow(flow, folding)
    return folding


def _widen(
    flow: ir.Dataflow,
    folding: dict[str, Fold],
    name: str,
    legal: list[Fold],
    fits: Callable[[Folding], bool],
) -> dict[str, Fold] | None:
    """The next larger fold of one layer that is faster and fits."""
    layer = next(one for one in flow.layers if one.name == name)
    now, before = folding[name], cycles(layer, flow, folding)
    for fold in legal:
        if fold.products <= now.products:
            continue
        trial = {**folding, name: fold}
        _follow(flow, trial)
        if cycles(layer, flow, trial).compute_row < before.compute_row:
            return trial if fits(trial) else None
    return None


def _follow(flow: ir.Dataflow, folding: dict[str, Fold]) -> None:
    """Elementwise layers work in the lanes in which their (widest) input arrives."""
    for layer in flow.layers:
        if isinstance(layer, (ir.Add, ir.Table)):
            folding[layer.name] = Fold(max(folding[name].pe for name in layer.inputs))
