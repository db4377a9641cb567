"""What a call costs on ONNX Runtime's CPU provider.

The efficiencies were fitted by ``benchmarks/fit_profiles.py cpu`` on one machine. Memory bandwidth
cannot be read off a CPU, so it is measured once in a process (some 50 ms).
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

from trivium.compiler.cost import Profile, roofline
from trivium.compiler.passing import is_op
from trivium.compiler.types import Estimate, Target, Workload

if TYPE_CHECKING:
    import onnx_ir as ir

MELTING = (
    *("Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish"),
    *("QuantizeLinear", "BatchNormalization", "Add"),
)
"""What ONNX Runtime fuses into the convolution or product before it."""

PROFILE = Profile(
    compute_efficiency=0.5,
    memory_efficiency=0.7,
    spread=0.5,
    calibration="",
    launch_s=3e-6,
    call_s=1e-5,
    fused=lambda node: is_op(node, *MELTING),
    arithmetic={"float16": ("float32",), "bfloat16": ("float32",)},
)


def estimate(model: ir.Model, target: Target, workload: Workload) -> Estimate:
    """Predict one call of a legalized model."""
    return roofline(model, with_bandwidth(target), workload, PROFILE)


def with_bandwidth(target: Target) -> Target:
    """The host with its memory bandwidth measured."""
    if target.memory_bytes_per_s is not None:
        return target
    return replace(target, memory_bytes_per_s=copy_bytes_per_s())


@cache
def copy_bytes_per_s(size: int = 64 << 20, rounds: int = 5) -> float:
    """Bytes read and written in a second by the best of a few copies between two arrays."""
    import numpy as np

    source = np.ones(size, np.uint8)
    destination = np.empty_like(source)
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        np.copyto(destination, source)
        best = min(best, time.perf_counter() - started)
    return 2.0 * size / best
