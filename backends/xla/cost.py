"""What a call costs when XLA compiled it.

Calibrations, by family:

- GPU: the kernel formulas of `trivium.compiler.machines`, fitted to the kernels of other libraries
  (``benchmarks/fit_calibrations.py``); what XLA adds is a prior.
- TPU: `trivium.compiler.machines.tpu`, compute from MaxText's published training utilization,
  memory from tpu-recipes' HBM copy on v6e (1360 of 1638 GB/s). No inference of XLA's was measured
  on a TPU.
- CPU: `trivium.compiler.machines.cpu`, as ``trivium calibrate cpu`` fits it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from trivium.backends.xla import spread_cost
from trivium.compiler import links
from trivium.compiler.cost import ELEMENTWISE, Profile, roofline
from trivium.compiler.machines.cpu import Habits
from trivium.compiler.machines.tpu import TpuMachine
from trivium.compiler.passing import is_op
from trivium.compiler.types import Estimate, Target, Workload
from trivium.targets import calibrations
from trivium.targets.host import with_bandwidth

if TYPE_CHECKING:
    import onnx_ir as ir

    from trivium.compiler.kernels import Kernel
    from trivium.compiler.work import Product

MELTING = (*ELEMENTWISE, "Transpose", "Slice", "Pad", "Expand", "Concat", "Split", "Gather")


def melts(node: ir.Node) -> bool:
    """XLA's loop fusion takes elementwise operators and most data movement."""
    return is_op(node, *MELTING)


STEPS = {"LayerNormalization": 6.0, "Softmax": 5.0, "Attention": 12.0, "MaxPool": 2.0}
"""Loops that XLA's CPU compiler leaves of an operator, where it is not one."""

REDUCING = frozenset(
    (
        *("Softmax", "LayerNormalization", "Attention", "GlobalAveragePool", "GlobalMaxPool"),
        *("ReduceSum", "ReduceMean", "ReduceMax"),
    )
)


def _nodes(kernel: Kernel) -> float:
    """What surrounds a product is a loop of its own."""
    steps = sum(STEPS.get(one, 0.0) for one in kernel.op_types)
    return (steps or 1.0) + (1.0 if kernel.products else 0.0)


def _slow(kernel: Kernel) -> float:
    """Its reductions go through windows, not along registers."""
    return 2.0 if REDUCING & set(kernel.op_types) else 1.0


def _stall(kernel: Kernel, product: Product) -> float:
    """A product of integers is several of floats, of few terms each."""
    return 1.4 if kernel.op_types[0] == "MatMulInteger" else 1.0


HABITS = Habits(
    pads=False,
    depthwise=1.1,
    bytes_per_operation=1.4,
    grain=4e6,
    kernel_wake_s=6e-6,
    weight_bytes_per_s=28e9,
    packs=True,
    patch_s=8.6e-9,
    attention=2.1,
    unpack_s=(2.5e-10, 1.7e-9),
    nodes=_nodes,
    slow=_slow,
    stall=_stall,
)
"""On CPUs."""

DEQUANTIZED = ("float32", "int8", "float8", "int4")
"""Q/DQ graphs are lowered literally: dequantized, then multiplied as float32."""

BF16_PASSES = 6.0
"""Passes of the TPU's bfloat16 units that make one float32 product at jax's precision "highest",
which the backend compiles with so that the device computes what was verified."""


UNMEASURED = (
    "XLA was not measured on a GPU: what it adds to a call and to a kernel is a prior, and what a "
    "kernel's launch costs is that of other libraries"
)


def profile_for(target: Target) -> Profile:
    """How XLA runs kernels on a target."""
    if target.family == "cpu":
        widened = dict.fromkeys(("float16", "bfloat16", "int8", "int4"), ("float32",))
        return calibrations.cpu_profile(
            target, "xla", habits=HABITS, fused=melts, arithmetic=widened
        )
    if target.family == "tpu":
        product = calibrations.find(target, "product")
        call = calibrations.find(target, "engine_xla")
        return Profile(
            spread=math.hypot(product.spread, call.spread),
            calibration=f"{product.basis}; {call.basis}",
            call_s=call["first_s"],
            fused=melts,
            arithmetic=dict.fromkeys(DEQUANTIZED, ("bfloat16",)),
            slowdown=dict.fromkeys(DEQUANTIZED, BF16_PASSES),
            notes=("float32 products take six bfloat16 passes",),
            machine=TpuMachine(product),
        )
    engine = calibrations.find(target, "engine_xla")
    machine = calibrations.gpu_machine(target, pace=engine["pace"])
    spread, basis = calibrations.combined(engine, machine.calibrations)
    return Profile(
        spread=spread,
        calibration=basis,
        call_s=engine["first_s"],
        fused=melts,
        arithmetic=dict.fromkeys(DEQUANTIZED, ("float32",)),
        notes=(UNMEASURED,),
        machine=machine,
    )


def estimate(model: ir.Model, target: Target, workload: Workload) -> Estimate:
    """Predict one call of a legalized model."""
    profile, devices = profile_for(target), links.devices_of(target)
    if devices > 1 and any(one.num_devices == devices for one in model.device_configurations):
        return spread_cost.estimate(model, target, workload, profile)
    if devices > 1:
        # Each device keeps what it computed of the outputs: nothing is gathered.
        one = links.per_device(target)
        target = replace(one, chips=devices, link_bytes_per_s=math.inf)
        return roofline(model, target, workload, profile)
    return roofline(model, with_bandwidth(target), workload, profile)
