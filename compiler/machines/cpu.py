"""How long an engine on a CPU takes for the kernels of a model.

For each kernel

    node + max(products / share of the peak, bytes / bandwidth) + elementwise work

- products are padded to the vector registers, and depthwise convolutions, which have nothing to
  reuse, have a share of their own; so have products of int8;
- a small kernel is not worth waking all cores for: it is spread over more of them as it grows;
- what was written a moment ago, and weights that fit, come out of the caches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trivium.compiler.calibration import Calibration
from trivium.compiler.kernels import Kernel
from trivium.compiler.machines.base import Context, KernelTime
from trivium.compiler.types import Target
from trivium.compiler.work import Product

START: Mapping[str, float] = {
    "call_s": 1e-5,
    "node_s": 1e-6,
    "dense": 0.7,
    "depthwise": 0.1,
    "vector": 0.1,
    "integer": 0.3,
    "cache": 4.0,
    "grain": 2e6,
}
"""call_s, node_s: seconds of a call and of a kernel; dense, depthwise, integer, vector: shares of
the peak that products, depthwise convolutions, products of int8 (of their own peak) and elementwise
work reach; cache: how much faster than memory the caches are; grain: operations that a core must
get for it to be woken."""

BOUNDS: Mapping[str, tuple[float, float]] = {
    "call_s": (1e-7, 1e-2),
    "node_s": (1e-9, 1e-3),
    "dense": (0.003, 1.5),
    "depthwise": (0.0005, 1.5),
    "vector": (0.0005, 1.5),
    "integer": (0.0005, 1.5),
    "cache": (0.5, 40.0),
    "grain": (1e3, 1e8),
}

DEVICE = ("call_s", "node_s", "dense", "depthwise", "vector", "integer")
"""What a calibration of one machine may change."""

LANES = 16.0
ROWS = 4.0
DEPTHWISE_BELOW = 4.0
"""Output channels of a group below which a convolution is depthwise."""


@dataclass(frozen=True)
class CpuMachine:
    """Times kernels of one engine.

    Attributes:
        bytes_per_s: Of memory, where the target does not state it: it was measured.
    """

    calibration: Calibration
    bytes_per_s: float | None = None

    def time(
        self, kernels: Sequence[Kernel], target: Target, context: Context
    ) -> tuple[list[KernelTime | None], tuple[str, ...]]:
        """Time one run of each kernel; ``None`` and a note where a figure is missing."""
        if target.memory_bytes_per_s is None and self.bytes_per_s is None:
            return [None] * len(kernels), (f"no memory bandwidth of {target.name}",)
        found: list[KernelTime | None] = []
        notes: dict[str, None] = {}
        for kernel in kernels:
            time = self._time(kernel, target, context)
            if time is None:
                notes[f"no published rate of {target.name} for {', '.join(kernel.dense)}"] = None
            found.append(time)
        return found, tuple(notes)

    def _time(self, kernel: Kernel, target: Target, context: Context) -> KernelTime | None:
        c = self.calibration.coefficients
        share = context.share
        cores = float(target.units or 1)
        vector = sum(kernel.vector.values()) * share
        if not kernel.dense and not vector and not kernel.weight_bytes + kernel.activation_bytes:
            return KernelTime(0.0, 0.0, 0.0)
        compute = 0.0
        for dtype, operations in kernel.dense.items():
            name, slower = context.arithmetic(dtype, target.peak_ops)
            if name is None:
                return None
            known = min(sum(one.operations for one in kernel.products), operations)
            peak = target.peak_ops[name] / cores
            for product in kernel.products:
                part = "integer" if name == "int8" else "dense"
                if product.n < DEPTHWISE_BELOW and product.batch > 1:
                    part = "depthwise"
                work = padded(product) * slower * share * known / max(_sum(kernel), 1.0)
                compute += work / (peak * c[part] * _cores(work, c["grain"], cores))
            rest = (operations - known) * slower * share
            compute += rest / (peak * c["dense"] * _cores(rest, c["grain"], cores))
        rate = target.peak_ops.get("float32", 0.0) / cores
        elementwise = 0.0
        if rate:
            moved = (kernel.read_bytes + kernel.written_bytes) / 4.0 * share
            work = max(vector, moved if not kernel.dense else 0.0)
            elementwise = work / (rate * c["vector"] * _cores(work, c["grain"] / 8, cores))
        cached = context.held_bytes <= (target.on_chip_bytes or 0.0) / 2
        bandwidth = target.memory_bytes_per_s or self.bytes_per_s or 1.0
        memory = kernel.weight_bytes / (bandwidth * (c["cache"] if cached else 1.0))
        memory += kernel.activation_bytes * share / (bandwidth * c["cache"])
        body = max(compute, memory) + elementwise
        return KernelTime(c["node_s"], compute + elementwise, memory, body)


def padded(product: Product) -> float:
    """Operations with rows and columns rounded up to the registers; one row needs no rounding."""
    wide = _up(product.n, LANES) if product.n >= DEPTHWISE_BELOW else product.n
    tall = _up(product.m, ROWS) if product.m > 1 else product.m
    return 2.0 * tall * wide * product.k * product.batch


def _up(size: float, step: float) -> float:
    return -(-size // step) * step


def _sum(kernel: Kernel) -> float:
    return sum(one.operations for one in kernel.products)


def _cores(work: float, grain: float, cores: float) -> float:
    """How many cores share some work."""
    return 1.0 + (cores - 1.0) * min(work / (grain * cores), 1.0)
