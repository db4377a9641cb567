"""What a call costs on OpenVINO's CPU plugin.

The efficiencies were fitted by ``benchmarks/fit_profiles.py openvino`` on one machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trivium.compiler.cost import ELEMENTWISE, Profile, roofline
from trivium.compiler.passing import is_op
from trivium.compiler.types import Estimate, Target, Workload
from trivium.targets.host import with_bandwidth

if TYPE_CHECKING:
    import onnx_ir as ir

PROFILE = Profile(
    compute_efficiency=0.955,
    memory_efficiency=0.9,
    spread=0.25,
    calibration="OpenVINO 2026.4 on one Zen 4 core, 13 real models (leave-one-model-out spread "
    "0.13, one of them at a factor of 2), widened; more cores are assumed to share the work evenly",
    call_s=4.49e-5,
    cache_speedup=14.7,
    fused=lambda node: is_op(node, *ELEMENTWISE),
    arithmetic={"float16": ("float32",)},
    slowdown={"int8": 2.04},
)


def estimate(model: ir.Model, target: Target, workload: Workload) -> Estimate:
    """Predict one call of a legalized model."""
    return roofline(model, with_bandwidth(target), workload, PROFILE)
