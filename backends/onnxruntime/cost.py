"""What a call costs on ONNX Runtime's CPU provider.

The efficiencies were fitted by ``benchmarks/fit_profiles.py cpu`` on one machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trivium.compiler.cost import Profile, roofline
from trivium.compiler.passing import is_op
from trivium.compiler.types import Estimate, Target, Workload
from trivium.targets.host import with_bandwidth

if TYPE_CHECKING:
    import onnx_ir as ir

MELTING = (
    *("Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish"),
    *("QuantizeLinear", "BatchNormalization", "Add"),
)
"""What ONNX Runtime fuses into the convolution or product before it."""

PROFILE = Profile(
    compute_efficiency=0.824,
    memory_efficiency=0.9,
    spread=0.51,
    calibration="ONNX Runtime 1.32 on one Xeon core (AVX-512), 13 real models, "
    "leave-one-model-out spread 0.51; more cores are assumed to share the work evenly",
    launch_s=3.9e-8,
    call_s=9.24e-6,
    cache_speedup=7.17,
    fused=lambda node: is_op(node, *MELTING),
    arithmetic={"float16": ("float32",), "bfloat16": ("float32",)},
    slowdown={"int8": 4.22},
)


def estimate(model: ir.Model, target: Target, workload: Workload) -> Estimate:
    """Predict one call of a legalized model."""
    return roofline(model, with_bandwidth(target), workload, PROFILE)
