"""What a call costs when XLA compiled it.

Calibrations, by family (``benchmarks/fit_profiles.py`` prints the GPU figures):

- GPU: efficiencies from published bf16 GEMMs on A100, H100 and L40S; a family prior for others.
- TPU: compute from MaxText's published training utilization (v4 and v5e, 50 to 67%), memory from
  tpu-recipes' HBM copy on v6e (1360 of 1638 GB/s). An inference call of XLA's own was not measured.
- CPU: ONNX Runtime's figures on one machine times the 1.03 to 1.31 by which XLA was slower on
  MiniLM there.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from trivium.backends.xla import spread_cost
from trivium.compiler import links
from trivium.compiler.cost import ELEMENTWISE, Profile, roofline
from trivium.compiler.passing import is_op
from trivium.compiler.types import Estimate, Family, Target, Workload
from trivium.targets.host import with_bandwidth

if TYPE_CHECKING:
    import onnx_ir as ir

MELTING = (*ELEMENTWISE, "Transpose", "Slice", "Pad", "Expand", "Concat", "Split", "Gather")


def melts(node: ir.Node) -> bool:
    """XLA's loop fusion takes elementwise operators and most data movement."""
    return is_op(node, *MELTING)


DEQUANTIZED = ("float32", "int8", "float8", "int4")
"""Q/DQ graphs are lowered literally: dequantized, then multiplied as float32."""

BF16_PASSES = 6.0
"""Passes of the TPU's bfloat16 units that make one float32 product at jax's precision "highest",
which the backend compiles with so that the device computes what was verified."""

CALL_S = 3.24e-4
"""One call and its transfers: TensorRT's fitted figure on an A100, for want of one of XLA's own."""

CALL_NOTE = "call overhead of 0.32 ms is TensorRT's on an A100; XLA's own was not measured"

PROFILES: dict[Family, Profile] = {
    "gpu": Profile(
        compute_efficiency=0.688,
        memory_efficiency=0.752,
        spread=0.5,
        calibration="published bf16 GEMMs on A100, H100, L40S (leave-one-out spread 0.31); "
        "widened, since XLA's own kernels were not measured",
        launch_s=2.2e-6,
        call_s=CALL_S,
        fused=melts,
        arithmetic=dict.fromkeys(DEQUANTIZED, ("float32",)),
        notes=(CALL_NOTE,),
    ),
    "tpu": Profile(
        compute_efficiency=0.57,
        memory_efficiency=0.83,
        spread=0.7,
        calibration="MaxText training utilization (v4, v5e) and an HBM copy on v6e; "
        "no measured inference on a TPU",
        launch_s=0.0,
        call_s=CALL_S,
        fused=melts,
        arithmetic=dict.fromkeys(DEQUANTIZED, ("bfloat16",)),
        slowdown=dict.fromkeys(DEQUANTIZED, BF16_PASSES),
        notes=(CALL_NOTE, "float32 products take six bfloat16 passes"),
    ),
    "cpu": Profile(
        compute_efficiency=0.824 / 1.15,
        memory_efficiency=0.9,
        spread=0.7,
        calibration="ONNX Runtime's fit on one Xeon core, times 1.15 as XLA was 1.03 to 1.31 times "
        "slower on MiniLM there; widened",
        launch_s=3.9e-8,
        call_s=2e-5,
        cache_speedup=7.17,
        fused=melts,
        arithmetic=dict.fromkeys(("float16", "bfloat16", "int8", "int4"), ("float32",)),
    ),
}


def estimate(model: ir.Model, target: Target, workload: Workload) -> Estimate:
    """Predict one call of a legalized model."""
    profile, devices = PROFILES[target.family], links.devices_of(target)
    if devices > 1 and any(one.num_devices == devices for one in model.device_configurations):
        return spread_cost.estimate(model, target, workload, profile)
    if devices > 1:
        # Each device keeps what it computed of the outputs: nothing is gathered.
        one = links.per_device(target)
        target = replace(one, chips=devices, link_bytes_per_s=math.inf)
        return roofline(model, target, workload, profile)
    estimate = roofline(model, with_bandwidth(target), workload, profile)
    return spread_cost.with_donated_caches(estimate, model)
