"""What a call costs when TVM compiled it.

Nothing of TVM was measured for these figures: they are a prior (generic schedules, untuned), and
the interval says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trivium.compiler.cost import Profile, roofline
from trivium.compiler.types import Estimate, Family, Target, Workload
from trivium.targets import calibrations
from trivium.targets.host import with_bandwidth

if TYPE_CHECKING:
    import onnx_ir as ir

_CALIBRATION = "a prior for untuned schedules; nothing of TVM was measured"

PROFILES: dict[Family, Profile] = {
    "cpu": Profile(
        compute_efficiency=0.1,
        memory_efficiency=0.7,
        spread=1.2,
        calibration=_CALIBRATION,
        launch_s=2e-6,
        call_s=2e-5,
        cache_speedup=7.17,  # as ONNX Runtime's on a Xeon
        arithmetic=dict.fromkeys(("float16", "bfloat16", "int8", "int4"), ("float32",)),
    ),
}


def estimate(model: ir.Model, target: Target, workload: Workload) -> Estimate:
    """Predict one call of a legalized model."""
    return roofline(model, with_bandwidth(target), workload, profile_for(target))


def profile_for(target: Target) -> Profile:
    """How TVM's kernels run on a target."""
    if target.family != "gpu":
        return PROFILES[target.family]
    engine = calibrations.find(target, "engine_tvm")
    machine = calibrations.gpu_machine(target, pace=engine["pace"])
    spread, basis = calibrations.combined(engine, machine.calibrations)
    # Without tensor-core schedules everything runs in float32.
    narrow = ("float32", "float16", "bfloat16", "int8", "int4")
    return Profile(
        spread=spread,
        calibration=basis,
        call_s=engine["first_s"],
        arithmetic=dict.fromkeys(narrow, ("float32",)),
        machine=machine,
    )
