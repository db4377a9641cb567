"""How long a TPU takes for the kernels of a model.

A product is padded to whole tiles of the matrix unit (128 or 256 wide, rows to eight) and runs at a
share of the peak; what shares a kernel with it runs on the vector unit. What fits in the vector
memory, the activations of a kernel or a small model altogether, is fed faster than from memory.
Kernels are not launched one by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trivium.compiler.calibration import Calibration
from trivium.compiler.kernels import Kernel
from trivium.compiler.machines.base import Context, KernelTime
from trivium.compiler.types import Target
from trivium.compiler.work import Product

MATRIX_UNIT: Mapping[str, float] = {"v6e": 256.0, "7x": 256.0}
"""Rows and columns by generation; 128 before (https://docs.cloud.google.com/tpu/docs/v6e)."""

ROWS = 8.0
NARROW_GROUP = 8.0
"""Channels of a group below which a convolution leaves the matrix unit idle."""

FED = 0.5
"""Share of the on-chip memory that holds operands; the rest is buffers of the pipeline."""


@dataclass(frozen=True)
class TpuMachine:
    """Times kernels with a calibration of ``product``, ``memory``, ``vector``, ``on_chip``.

    ``product`` and ``memory`` are shares of the published peaks, ``vector`` that of the peak of
    bfloat16 that the vector unit reaches, ``on_chip`` how much faster than memory its own is.
    """

    calibration: Calibration

    def time(
        self, kernels: Sequence[Kernel], target: Target, context: Context
    ) -> tuple[list[KernelTime | None], tuple[str, ...]]:
        """Time one run of each kernel; ``None`` and a note where a figure is missing."""
        if target.memory_bytes_per_s is None:
            return [None] * len(kernels), (f"no published memory bandwidth of {target.name}",)
        found: list[KernelTime | None] = []
        notes: dict[str, None] = {}
        for kernel in kernels:
            time = self._time(kernel, target, context, target.memory_bytes_per_s)
            if time is None:
                notes[f"no published {' or '.join(kernel.dense)} rate of {target.name}"] = None
            found.append(time)
        return found, tuple(notes)

    def _time(
        self, kernel: Kernel, target: Target, context: Context, bandwidth: float
    ) -> KernelTime | None:
        c = self.calibration.coefficients
        side = MATRIX_UNIT.get(target.options.get("generation", ""), 128.0)
        reference = target.peak_ops.get("bfloat16", max(target.peak_ops.values(), default=0.0))
        vector_rate = reference * c["vector"]
        compute = 0.0
        for dtype, operations in kernel.dense.items():
            name, slower = context.arithmetic(dtype, target.peak_ops)
            if name is None:
                return None
            rate = target.peak_ops[name] * c["product"]
            known = sum(one.operations for one in kernel.products)
            for product in kernel.products:
                if product.n < NARROW_GROUP and product.batch > 1:
                    compute += product.operations * context.share * slower / vector_rate
                    continue
                compute += padded(product, side, context.share) * slower / rate
            compute += max(operations - known, 0.0) * context.share * slower / rate
        elementwise = sum(kernel.vector.values()) * context.share / vector_rate
        room = (target.on_chip_bytes or 0.0) * FED
        activations = kernel.activation_bytes * context.share
        quick = c["on_chip"]
        moved = kernel.weight_bytes / (quick if context.held_bytes <= room else 1.0)
        moved += activations / (quick if activations <= room else 1.0)
        memory = moved / (bandwidth * c["memory"])
        # The units work side by side within a kernel.
        compute = max(compute, elementwise)
        return KernelTime(0.0, compute, memory)


def padded(product: Product, side: float, share: float = 1.0) -> float:
    """Operations of a product in whole tiles: rows to eight, the others to the unit's side."""
    rows, batch = product.m, product.batch
    if batch > 1:
        batch = max(batch * share, 1.0)
    else:
        rows = max(rows * share, 1.0)
    return 2.0 * _up(rows, ROWS) * _up(product.n, side) * _up(product.k, side) * batch


def _up(size: float, step: float) -> float:
    return -(-size // step) * step
