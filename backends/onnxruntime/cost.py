"""What a call costs on ONNX Runtime's CPU provider.

Kernels are timed by `trivium.compiler.machines.cpu`. ``trivium calibrate cpu`` fits this machine;
what ships was fitted on one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trivium.compiler.cost import Profile, roofline
from trivium.compiler.passing import is_op
from trivium.compiler.types import Estimate, Target, Workload
from trivium.targets import calibrations
from trivium.targets.host import with_bandwidth

if TYPE_CHECKING:
    import onnx_ir as ir

MELTING = (
    *("Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish"),
    *("QuantizeLinear", "BatchNormalization", "Add"),
)
"""What ONNX Runtime fuses into the convolution or product before it."""


def melts(node: ir.Node) -> bool:
    """Activations and residual sums fuse, other elementwise operators are kernels."""
    return is_op(node, *MELTING)


def profile_for(target: Target) -> Profile:
    """How the engine runs kernels on a CPU."""
    arithmetic = {"float16": ("float32",), "bfloat16": ("float32",)}
    return calibrations.cpu_profile(target, "onnxruntime", fused=melts, arithmetic=arithmetic)


def estimate(model: ir.Model, target: Target, workload: Workload) -> Estimate:
    """Predict one call of a legalized model."""
    return roofline(model, with_bandwidth(target), workload, profile_for(target))
