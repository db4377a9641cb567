"""What a call costs on OpenVINO's CPU plugin.

Kernels are timed by `trivium.compiler.machines.cpu`. ``trivium calibrate cpu`` fits this machine;
what ships was fitted on one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trivium.compiler.cost import ELEMENTWISE, Profile, roofline
from trivium.compiler.machines.cpu import Habits
from trivium.compiler.passing import is_op
from trivium.compiler.types import Estimate, Target, Workload
from trivium.targets import calibrations
from trivium.targets.host import with_bandwidth

if TYPE_CHECKING:
    import onnx_ir as ir

    from trivium.compiler.kernels import Kernel
    from trivium.compiler.work import Product


def melts(node: ir.Node) -> bool:
    """Elementwise operators fuse into the kernel before them."""
    return is_op(node, *ELEMENTWISE)


INTEGER = 4.5
"""Operations on int8 in the time of one on float32."""


def _stall(kernel: Kernel, product: Product) -> float:
    """A product of integers that the model spells out is made of floats, converted at each call."""
    return 2.0 * INTEGER if kernel.op_types[0] in ("MatMulInteger", "ConvInteger") else 1.0


HABITS = Habits(
    narrow=8.0,
    shallow=20.0,
    depthwise=1.6,
    bytes_per_operation=1.7,
    grain=6e4,
    kernel_wake_s=1e-6,
    reach={"int8": INTEGER, "bfloat16": 3.3},
    unpack_s=(3.3e-10, 0.0),
    stall=_stall,
)


def profile_for(target: Target) -> Profile:
    """How the engine runs kernels on a CPU."""
    arithmetic = {"float16": ("float32",)}
    return calibrations.cpu_profile(
        target, "openvino", habits=HABITS, fused=melts, arithmetic=arithmetic
    )


def estimate(model: ir.Model, target: Target, workload: Workload) -> Estimate:
    """Predict one call of a legalized model."""
    return roofline(model, with_bandwidth(target), workload, profile_for(target))
