"""What a call costs on TensorRT.

Kernels are timed by the formulas of `trivium.compiler.machines`; what TensorRT adds (seconds of a
call, the pace of its kernels) was fitted to NVIDIA's published latencies of BERT, see
``benchmarks/fit_calibrations.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trivium.compiler.cost import ELEMENTWISE, Profile, roofline
from trivium.compiler.passing import is_op
from trivium.compiler.types import Estimate, Target, Workload
from trivium.targets import calibrations

if TYPE_CHECKING:
    import onnx_ir as ir

TABLE = "engine_tensorrt"


def melts(node: ir.Node) -> bool:
    """Pointwise operators and moves of heads fuse into the product or convolution before them."""
    return is_op(node, *ELEMENTWISE, "Transpose")


def estimate(model: ir.Model, target: Target, workload: Workload) -> Estimate:
    """Predict one call of a legalized model."""
    return roofline(model, target, workload, profile_for(target))


def profile_for(target: Target) -> Profile:
    """How TensorRT runs kernels on a GPU."""
    engine = calibrations.find(target, TABLE)
    machine = calibrations.gpu_machine(
        target, pace=engine["pace"], narrow_pace=engine["narrow_pace"]
    )
    spread, basis = calibrations.combined(engine, machine.calibrations)
    return Profile(
        spread=spread,
        calibration=basis,
        call_s=engine["first_s"],
        fused=melts,
        arithmetic={"float32": ("tensorfloat32", "float32")},
        machine=machine,
    )
