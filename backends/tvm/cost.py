"""What a call costs when TVM compiled it.

On a CPU ``trivium calibrate cpu`` fits this machine. Nothing of TVM was measured on a GPU: there
the figures are a prior (generic schedules, untuned), and the interval says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trivium.compiler.cost import Profile, roofline
from trivium.compiler.machines.cpu import NEAR_BYTES, Habits
from trivium.compiler.types import Estimate, Target, Workload
from trivium.targets import calibrations
from trivium.targets.host import with_bandwidth

if TYPE_CHECKING:
    import onnx_ir as ir

    from trivium.compiler.kernels import Kernel
    from trivium.compiler.work import Product


TRANSCENDENTAL = frozenset(("Exp", "Erf", "Tanh", "Sigmoid", "Gelu", "Softmax", "Attention"))


def _slow(kernel: Kernel) -> float:
    """Transcendentals are calls, not vectors."""
    return 2.0 if TRANSCENDENTAL & set(kernel.op_types) else 1.0


def _stall(kernel: Kernel, product: Product) -> float:
    """The innermost loop runs along a row of the result: in whole registers only where the row
    divides (`trivium.backends.tvm.schedule`). Each row of a product reads all weights again."""
    row = int(product.row or product.n)
    whole = next((lanes for lanes in (16, 8) if row % lanes == 0), 4)
    lanes = row if 4 < row < 16 and row % 4 else whole
    far = product.taps == 1 and product.n * product.k * 4.0 > NEAR_BYTES
    return 16.0 / lanes * (2.0 if far else 1.0)


HABITS = Habits(
    pads=False,
    depthwise=4.2,
    bytes_per_operation=2.2,
    grain=3e4,
    weight_bytes_per_s=70e9,
    slow=_slow,
    stall=_stall,
)
"""On CPUs."""


def estimate(model: ir.Model, target: Target, workload: Workload) -> Estimate:
    """Predict one call of a legalized model."""
    return roofline(model, with_bandwidth(target), workload, profile_for(target))


def profile_for(target: Target) -> Profile:
    """How TVM's kernels run on a target."""
    if target.family == "cpu":
        widened = dict.fromkeys(("float16", "bfloat16", "int8", "int4"), ("float32",))
        return calibrations.cpu_profile(target, "tvm", habits=HABITS, arithmetic=widened)
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
