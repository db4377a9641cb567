"""What a call costs on TensorRT.

Fitted by ``benchmarks/fit_profiles.py tensorrt`` on NVIDIA's published latencies of BERT base and
large in fp16 and int8 on an A100 (80 points, host transfers included); other GPUs are predicted
from their data sheets with the efficiencies found there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from trivium.compiler.cost import ELEMENTWISE, Profile, roofline
from trivium.compiler.passing import is_op
from trivium.compiler.types import Estimate, Target, Workload

if TYPE_CHECKING:
    import onnx_ir as ir


def melts(node: ir.Node) -> bool:
    """Pointwise operators fuse into the product or convolution before them."""
    return is_op(node, *ELEMENTWISE)


PROFILE = Profile(
    compute_efficiency=0.71,
    memory_efficiency=0.8,
    spread=0.25,
    calibration="TensorRT's published BERT base and large on A100 (80 points, "
    "leave-one-model-out spread 0.17), widened for other models",
    launch_s=3e-6,
    call_s=3.24e-4,
    cache_speedup=8.35,
    fused=melts,
    arithmetic={"float32": ("tensorfloat32", "float32")},
)

CALIBRATED = "nvidia-a100"
OTHER_DEVICES_SPREAD = 0.4
"""The spread that leaving a device out of the GEMM fit shows, on top of the model's own."""


def estimate(model: ir.Model, target: Target, workload: Workload) -> Estimate:
    """Predict one call of a legalized model."""
    return roofline(model, target, workload, profile_for(target))


def profile_for(target: Target) -> Profile:
    """The profile, less certain on a device that it was not fitted on."""
    if target.name.startswith(CALIBRATED):
        return PROFILE
    calibration = f"{PROFILE.calibration} and other devices"
    return replace(PROFILE, spread=OTHER_DEVICES_SPREAD, calibration=calibration)
