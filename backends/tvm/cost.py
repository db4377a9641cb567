"""What a call costs when TVM compiled it.

On a CPU ``trivium calibrate cpu`` fits this machine. Nothing of TVM was measured on a GPU: there
the figures are a prior (generic schedules, untuned), and the interval says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trivium.compiler.cost import Profile, roofline
from trivium.compiler.types import Estimate, Target, Workload
from trivium.targets import calibrations
from trivium.targets.host import with_bandwidth

if TYPE_CHECKING:
    import onnx_ir as ir


def estimate(model: ir.Model, target: Target, workload: Workload) -> Estimate:
    """Predict one call of a legalized model."""
    return roofline(model, with_bandwidth(target), workload, profile_for(target))


def profile_for(target: Target) -> Profile:
    """How TVM's kernels run on a target."""
    if target.family == "cpu":
        widened = dict.fromkeys(("float16", "bfloat16", "int8", "int4"), ("float32",))
        return calibrations.cpu_profile(target, "tvm", arithmetic=widened)
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
