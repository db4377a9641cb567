"""How long an engine on a CPU takes for the kernels of a model.

For each kernel

    nodes + (products + reading of cold weights + elementwise work) / cores

- products are padded to the vector registers, and narrow or shallow ones fill them less well;
  depthwise convolutions, which have nothing to reuse, are elementwise work;
- a small kernel is not worth another core: it is spread over them as it grows, and the first one
  that is pays for waking them;
- what engines do apart from each other (`Habits`) is theirs to say; how fast they do it is fitted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from trivium.compiler.calibration import Calibration
from trivium.compiler.kernels import Kernel
from trivium.compiler.machines.base import Context, KernelTime
from trivium.compiler.types import Target
from trivium.compiler.work import Product

START: Mapping[str, float] = {
    "call_s": 1.5e-5,
    "node_s": 1e-6,
    "wake_s": 1e-5,
    "dense": 0.7,
    "conv": 0.7,
    "vector": 0.08,
}
"""call_s, node_s, wake_s: seconds of a call, of a node, and of waking other cores once in a call;
dense, conv, vector: shares of the peak that products of matrices, convolutions and elementwise work
reach."""

BOUNDS: Mapping[str, tuple[float, float]] = {
    "call_s": (1e-7, 1e-2),
    "node_s": (1e-9, 1e-3),
    "wake_s": (1e-9, 1e-2),
    "dense": (0.003, 1.5),
    "conv": (0.003, 1.5),
    "vector": (0.0005, 1.5),
}

DEVICE = tuple(START)
"""What a calibration of one machine may change."""

LANES = 16.0
ROWS = 4.0
DEPTHWISE_BELOW = 4.0
"""Output channels of a group below which a convolution is depthwise."""

NEAR_BYTES = 2.0 * 2**20
"""A core's own cache: 1 to 2 MiB on today's servers. Models that are larger find their weights
farther away at every call."""

STEEP = 2.0
"""How suddenly kernels become worth another core as they grow."""

SATURATING = 8.0
"""Cores that together read as fast as memory can be read."""


def _once(kernel: Kernel) -> float:
    return 1.0


def _full(kernel: Kernel, product: Product) -> float:
    return 1.0


@dataclass(frozen=True)
class Habits:
    """What an engine does in its own way, whatever the machine.

    Attributes:
        pads: Whether products are done in whole registers.
        narrow, shallow: Columns, and terms of the sum, that the start and end of a product cost.
        depthwise: Operations of a depthwise convolution in the time of an elementwise one.
        bytes_per_operation: Bytes that elementwise work moves in the time of an operation.
        grain: Operations from which a kernel is worth another core.
        kernel_wake_s: Seconds of handing a kernel to the other cores.
        weight_bytes_per_s: At which one core reads weights that are near.
        packs: Whether one core rearranges the weights of a product at every call.
        patch_s: Seconds of one core for gathering a register of a window, where convolutions are
            made products that way.
        attention: Times that an attention's products take one core, of what others would; 0
            where they are as others.
        reach: Operations on a dtype in the time of one on float32, at most, whatever the machine's
            peaks are: engines leave its matrix unit idle, or cannot keep it fed.
        unpack_s: Seconds of one core for making a float32 of a weight that is stored in one byte or
            two, and in less, where that is done at every call.
        nodes: How many nodes the engine makes of a kernel.
        slow: How many times an operation its elementwise work takes.
        stall: How many times the operations of a product its loops take.
    """

    pads: bool = True
    narrow: float = 0.0
    shallow: float = 0.0
    depthwise: float = 2.0
    bytes_per_operation: float = 1.5
    grain: float = 1e5
    kernel_wake_s: float = 0.0
    weight_bytes_per_s: float = 50e9
    packs: bool = False
    patch_s: float = 0.0
    attention: float = 0.0
    reach: Mapping[str, float] = field(default_factory=lambda: {"int8": 4.0, "bfloat16": 4.0})
    unpack_s: tuple[float, float] = (0.0, 0.0)
    nodes: Callable[[Kernel], float] = _once
    slow: Callable[[Kernel], float] = _once
    stall: Callable[[Kernel, Product], float] = _full


@dataclass(frozen=True)
class CpuMachine:
    """Times kernels of one engine.

    Attributes:
        bytes_per_s: At which one core reads from memory, where the target does not state it.
    """

    calibration: Calibration
    habits: Habits = Habits()
    bytes_per_s: float | None = None

    def time(
        self, kernels: Sequence[Kernel], target: Target, context: Context
    ) -> tuple[list[KernelTime | None], tuple[str, ...]]:
        """Time one run of each kernel; ``None`` and a note where a figure is missing."""
        if target.memory_bytes_per_s is None and self.bytes_per_s is None:
            return [None] * len(kernels), (f"no memory bandwidth of {target.name}",)
        found: list[KernelTime | None] = []
        notes: dict[str, None] = {}
        spread, widest = 0.0, 0
        for index, kernel in enumerate(kernels):
            timed = self._time(kernel, target, context)
            if timed is None:
                kinds = ", ".join(kernel.dense) or "float32"
                notes[f"no published rate of {target.name} for {kinds}"] = None
                found.append(None)
                continue
            time, share = timed
            found.append(time)
            if share > spread:
                spread, widest = share, index
        first = found[widest] if found else None
        if first is not None:
            woken = first.launch + spread * self.calibration["wake_s"]
            found[widest] = replace(first, launch=woken)
        return found, tuple(notes)

    def _time(
        self, kernel: Kernel, target: Target, context: Context
    ) -> tuple[KernelTime, float] | None:
        """The time of a kernel, and how far it is spread over the cores: 0 to 1."""
        c, habits = self.calibration, self.habits
        cores = float(target.units or 1)
        peak = target.peak_ops.get("float32", 0.0) / cores
        vector = sum(kernel.vector.values()) * context.share
        moved = kernel.activation_bytes * context.share
        if not kernel.dense and not vector and not kernel.weight_bytes + moved:
            return KernelTime(0.0, 0.0, 0.0), 0.0
        if not peak:
            return None
        bandwidth = target.memory_bytes_per_s or self.bytes_per_s or 1.0
        is_far = context.held_bytes > NEAR_BYTES * cores
        copying = 8.0 / bandwidth if is_far else 0.0
        elementwise = vector * habits.slow(kernel) / (peak * c["vector"])
        copied = moved / habits.bytes_per_operation / (peak * c["vector"])
        dense = alone = 0.0
        for dtype, operations in kernel.dense.items():
            name, slower = context.arithmetic(dtype, target.peak_ops)
            if name is None:
                return None
            known = sum(one.operations for one in kernel.products)
            part = "conv" if kernel.op_types[0] in CONVOLUTIONS else "dense"
            rate = target.peak_ops[name] / cores
            if name in habits.reach:
                rate = min(rate, habits.reach[name] * peak)
            rate *= c[part] / slower
            on_floats = name != dtype or name == "float32"
            counted = context.share * min(operations / max(known, 1.0), 1.0)
            for one in kernel.products:
                dense += counted * self._product(kernel, one, rate, peak)
                alone += counted * self._unpacked(kernel, one, copying) if on_floats else 0.0
            rest = max(operations - known, 0.0) * context.share / rate
            if habits.attention:
                alone += rest * habits.attention
            else:
                dense += rest
        reading = kernel.weight_bytes / habits.weight_bytes_per_s
        farther = 0.0
        if is_far:
            far = kernel.weight_bytes / bandwidth * max(cores / SATURATING, 1.0)
            farther = max(far - reading, 0.0)
        if not kernel.dense:
            work = max(elementwise, copied)
        elif habits.packs:
            alone += reading
            work = dense + elementwise
        else:
            work = max(dense, reading) + farther + elementwise
        spread = 0.0
        if cores > 1:
            spread = 1.0 / (1.0 + (habits.grain / (peak * max(work, 1e-12))) ** STEEP)
        shared = 1.0 - spread + spread / cores
        return KernelTime(
            c["node_s"] * habits.nodes(kernel) + spread * habits.kernel_wake_s,
            alone + (dense + elementwise) * shared,
            (reading + farther if kernel.dense else copied) * shared,
            alone + work * shared,
        ), spread

    def _product(self, kernel: Kernel, product: Product, rate: float, peak: float) -> float:
        """Seconds of one core for a product at a rate."""
        c, habits = self.calibration, self.habits
        if is_depthwise(product):
            return product.operations / (peak * c["vector"] * habits.depthwise)
        operations = product.operations
        if habits.pads:
            operations = padded(product, habits.narrow, habits.shallow)
        operations *= habits.stall(kernel, product)
        gathered = 0.0
        if habits.patch_s and product.taps > 1:
            gathered = product.m * product.batch * pieces(product) * habits.patch_s
        return operations / rate + gathered

    def _unpacked(self, kernel: Kernel, product: Product, copying: float) -> float:
        """Seconds of one core for making floats of weights of a product that are stored small, each
        of them written and read in memory in ``copying`` seconds."""
        weights = product.n * product.k
        each = kernel.weight_bytes / weights
        if product.batch > 1 or not 0.1 < each < 3.0:
            return 0.0
        own = self.habits.unpack_s[0 if each >= 0.9 else 1]
        return weights * (own + copying) if own else 0.0


CONVOLUTIONS = ("Conv", "ConvInteger", "QLinearConv", "ConvTranspose", "DeformConv")


def is_depthwise(product: Product) -> bool:
    """Whether a product is a convolution of channels one by one."""
    return product.n < DEPTHWISE_BELOW and product.batch > 1


def pieces(product: Product) -> float:
    """Registers that gather one place of a window: in a row of it, channels lie side by side."""
    rows = float(round(math.sqrt(product.taps)))
    return rows * -(-product.k / rows // LANES)


def padded(product: Product, narrow: float = 0.0, shallow: float = 0.0) -> float:
    """Operations with rows and columns rounded up to the registers; one row needs no rounding."""
    wide = _up(product.n, LANES) if product.n >= DEPTHWISE_BELOW else product.n
    tall = _up(product.m, ROWS) if product.m > 1 else product.m
    return 2.0 * tall * (wide + narrow) * (product.k + shallow) * product.batch


def _up(size: float, step: float) -> float:
    return -(-size // step) * step
