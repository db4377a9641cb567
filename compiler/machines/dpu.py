"""How long AMD's deep-learning processors (DPU) take for a network of convolutions in int8.

A DPU is a fixed engine in the fabric of an FPGA, or in a Versal's AI engines: so many pixels, input
and output channels a cycle. For each kernel the longer of

- compute: whole steps of the engine's three sides, at a share of its clock; what has few input
  channels folds the window's width into them, what works channel by channel uses one side only;
- memory: weights, which all pictures of a batch share, and feature maps, at a share of the
  memory's rate. Cores that run side by side share it; one alone is bound by its own port;

sums, pools and all else pass through a slower unit, and every call has its own cost.

No backend of Trivium emits for a DPU (for AMD's FPGAs it writes HLS projects, priced by
``backends/fpga/cost.py``): ``docs/accuracy.md`` says how well published figures are predicted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trivium.compiler.kernels import Kernel

Array = np.ndarray[Any, Any]

START: Mapping[str, float] = {
    "sustained": 0.7,
    "memory": 0.6,
    "port": 0.5,
    "narrow": 0.5,
    "misc": 16.0,
    "call_s": 1e-4,
}
"""Where a fit begins. sustained: share of the engine's steps; memory: share of the memory's rate;
port: share of it that one core alone can draw; narrow: share of one side's channels and pixels
that depthwise convolutions use; misc: bytes a cycle of the other unit; call_s: of each call."""

BOUNDS: Mapping[str, tuple[float, float]] = {
    "sustained": (0.05, 1.5),
    "memory": (0.05, 1.0),
    "port": (0.05, 1.0),
    "narrow": (0.01, 2.0),
    "misc": (0.5, 1000.0),
    "call_s": (1e-6, 1e-2),
}

DEVICE = tuple(START)


@dataclass(frozen=True)
class Engine:
    """What the formula reads of a DPU.

    Attributes:
        pixels, inputs, outputs: Multiplications a cycle are the product of the three.
        cores: Engines that work side by side, each on a picture.
        shares_weights: Whether they run one batch in step, so that weights are read once.
        feature_bytes: What a core keeps of feature maps from one kernel to the next.
    """

    pixels: float
    inputs: float
    outputs: float
    clock_hz: float
    cores: int
    memory_bytes_per_s: float
    shares_weights: bool
    feature_bytes: float = 0.0


@dataclass(frozen=True)
class Layers:
    """The kernels of a network, one element each.

    Attributes:
        depthwise: Whether a group has one channel in and few out.
        moved: Bytes of feature maps.
        misc: Whether it has no product.
    """

    rows: Array
    inputs: Array
    taps: Array
    outputs: Array
    groups: Array
    depthwise: Array
    weights: Array
    moved: Array
    misc: Array


def layers_of(kernels: Sequence[Kernel]) -> Layers:
    """What of a network the formula reads; a kernel's first product stands for it."""
    found = []
    for kernel in kernels:
        product = kernel.products[0] if kernel.products else None
        sizes = (0.0, 0.0, 1.0, 0.0, 1.0)
        if product is not None:
            sizes = (product.m, product.k / product.taps, product.taps, product.n, product.batch)
        thin = product is not None and product.batch > 1 and product.n < 8
        moved = kernel.read_bytes + kernel.written_bytes
        found.append((*sizes, thin, kernel.weight_bytes, moved, product is None))
    columns = [np.array(column, float) for column in zip(*found, strict=True)]
    rows, inputs, taps, outputs, groups, depthwise, weights, maps, misc = columns
    return Layers(rows, inputs, taps, outputs, groups, depthwise > 0, weights, maps, misc > 0)


def seconds(layers: Layers, engine: Engine, c: Mapping[str, float], busy: int) -> float:
    """Seconds of a picture on one of ``busy`` cores that work at once."""
    side = np.sqrt(layers.taps)
    inputs = np.where(
        layers.inputs < engine.inputs,
        np.ceil(layers.inputs * side / engine.inputs) * side,
        np.ceil(layers.inputs / engine.inputs) * layers.taps,
    )
    steps = np.ceil(layers.rows / engine.pixels) * inputs * np.ceil(layers.outputs / engine.outputs)
    full = steps * layers.groups / c["sustained"]
    channels = layers.groups * layers.outputs
    each = layers.rows * layers.taps * np.ceil(channels / engine.inputs) / engine.pixels
    cycles = np.where(layers.depthwise, each / c["narrow"], full)
    cycles = np.where(layers.misc, layers.moved / c["misc"], cycles)
    weights = layers.weights / busy if engine.shares_weights else layers.weights
    rate = engine.memory_bytes_per_s * min(c["memory"] / busy, c["port"])
    moved = np.where(layers.moved > engine.feature_bytes, layers.moved, 0.0)
    memory = np.where(layers.misc, 0.0, (weights + moved) / rate)
    return float(c["call_s"] + np.maximum(cycles / engine.clock_hz, memory).sum())
