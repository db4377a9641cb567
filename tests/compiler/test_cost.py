"""The roofline: what it computes by hand, what grows with what, and what stays unknown."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivium.backends.onnxruntime import cost as onnxruntime_cost
from trivium.backends.tensorrt import cost as tensorrt_cost
from trivium.backends.tvm import cost as tvm_cost
from trivium.backends.xla import cost as xla_cost
from trivium.compiler import prepare, targets
from trivium.compiler.calibration import Z80
from trivium.compiler.cost import Profile, does_not_fit, roofline
from trivium.compiler.kernels import Kernel, kernels_of, peak_activation_bytes
from trivium.compiler.machines import tpu
from trivium.compiler.machines.base import Context
from trivium.compiler.types import Estimate, Target, Workload
from trivium.compiler.work import Product

PERFECT = Profile(1.0, 1.0, 0.0, "by hand")

DEVICE = Target(
    name="round-numbers",
    family="gpu",
    backends=("xla",),
    peak_ops={"float32": 1e12, "int8": 4e12},
    memory_bytes=1e9,
    memory_bytes_per_s=1e11,
    launch_s=1e-6,
    watts=100.0,
    usd_per_hour=3.6,
)


def parsed(text: str) -> ir.Model:
    proto = onnx.parser.parse_model('<ir_version: 10, opset_import: ["" : 21]>\n' + text)
    return ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(proto))


PRODUCT = """
agraph (float[1024, 1024] a, float[1024, 1024] b) => (float[1024, 1024] y)
{ p = MatMul(a, b)  y = Relu(p) }
"""


def test_a_product_by_hand() -> None:
    estimate = roofline(parsed(PRODUCT), DEVICE, Workload(), PERFECT)
    compute = (2 * 1024**3 + 1024**2) / 1e12
    assert estimate.seconds == pytest.approx(1e-6 + compute)
    assert estimate.bound == "compute"
    assert [op.op_type for op in estimate.by_op] == ["MatMul+Relu"]
    assert estimate.by_op[0].work.bytes_moved == 3 * 4 * 1024**2
    assert estimate.bytes_peak == 3 * 4 * 1024**2
    assert estimate.dollars == pytest.approx((1e-6 + compute) * 1e-3)


def test_slow_memory_makes_it_memory_bound() -> None:
    slow = replace(DEVICE, memory_bytes_per_s=1e9)
    estimate = roofline(parsed(PRODUCT), slow, Workload(), PERFECT)
    assert estimate.seconds == pytest.approx(1e-6 + 3 * 4 * 1024**2 / 1e9)
    assert estimate.bound == "memory"


def test_a_call_that_mostly_waits_is_launch_bound() -> None:
    estimate = roofline(parsed(PRODUCT), DEVICE, Workload(), replace(PERFECT, call_s=1.0))
    assert estimate.bound == "launch"


def test_the_interval_holds_80_percent_of_a_log_normal() -> None:
    estimate = roofline(parsed(PRODUCT), DEVICE, Workload(), replace(PERFECT, spread=0.3))
    assert estimate.seconds is not None
    assert estimate.lo is not None
    assert estimate.hi is not None
    assert math.log(estimate.hi / estimate.seconds) == pytest.approx(0.3 * Z80)
    assert estimate.lo * estimate.hi == pytest.approx(estimate.seconds**2)
    assert set(estimate.intervals) == {"bytes_peak", "joules", "dollars"}
    for name, (low, high) in estimate.intervals.items():
        assert low <= getattr(estimate, name) <= high


def test_energy_uses_idle_power_where_it_is_known() -> None:
    busy = roofline(parsed(PRODUCT), DEVICE, Workload(), PERFECT)
    assert busy.seconds is not None
    assert busy.joules == pytest.approx(100.0 * busy.seconds)
    assert any("idle power unknown" in note for note in busy.notes)
    known = roofline(
        parsed(PRODUCT), replace(DEVICE, idle_watts=20.0), Workload(), replace(PERFECT, call_s=1.0)
    )
    assert known.seconds is not None
    assert known.joules == pytest.approx(20.0 * known.seconds, rel=0.02)


# --- kernels -------------------------------------------------------------------------------------


def test_a_value_that_two_nodes_read_is_written() -> None:
    model = parsed("""
    agraph (float[64] x) => (float[64] y)
    { a = Exp(x)  b = Relu(a)  c = Neg(a)  y = Add(b, c) }
    """)
    kernels = kernels_of(model.graph, lambda node: True)
    assert [kernel.op_types for kernel in kernels] == [("Exp",), ("Relu", "Add"), ("Neg",)]
    assert kernels[0].written_bytes == 256


def test_reshape_and_dequantize_vanish_into_their_readers() -> None:
    model = parsed("""
    agraph (float[4, 8] x) => (float[2, 16] y)
      <float s = {0.1}, int8 z = {0}, int64[2] shape = {2, 16}>
    {
      q = QuantizeLinear(x, s, z)
      r = Reshape(q, shape)
      d = DequantizeLinear(r, s, z)
      y = Exp(d)
    }
    """)
    first, second = kernels_of(model.graph, lambda node: False)
    assert first.op_types == ("QuantizeLinear",)
    assert first.written_bytes == 32
    assert second.op_types == ("Exp",)
    assert second.read_bytes == 32


def test_memory_is_what_is_live_at_the_worst_moment() -> None:
    model = parsed("""
    agraph (float[100] x) => (float[1, 1] y) <int64[2] big = {10, 100}>
    { a = Expand(x, big)  b = Exp(a)  y = ReduceMax<keepdims = 1>(b) }
    """)
    assert peak_activation_bytes(model.graph, lambda node: False) == 4 * (100 + 1000 + 1000)
    assert peak_activation_bytes(model.graph, lambda node: node.op_type == "Exp") == 4 * 1101


# --- several chips -------------------------------------------------------------------------------


def batched(batch: int) -> ir.Model:
    return parsed(f"""
    agraph (float[{batch}, 1024] x) => (float[{batch}, 1024] y) {{ y = Exp(x) }}
    """)


def test_a_batch_is_split_over_chips_and_its_results_are_gathered() -> None:
    slice_ = replace(DEVICE, chips=4, link_bytes_per_s=1e10)
    one = roofline(batched(256), DEVICE, Workload(), PERFECT)
    four = roofline(batched(256), slice_, Workload(), PERFECT)
    assert one.seconds is not None
    assert four.seconds is not None
    gathered = 256 * 1024 * 4 * 3 / 4 / 1e10
    assert four.seconds - gathered - 1e-6 == pytest.approx((one.seconds - 1e-6) / 4)
    assert four.bytes_peak == pytest.approx((one.bytes_peak or 0) / 4)


def test_a_batch_that_does_not_divide_runs_on_one_chip_and_says_so() -> None:
    slice_ = replace(DEVICE, chips=4, link_bytes_per_s=1e10)
    one = roofline(batched(3), DEVICE, Workload(), PERFECT)
    four = roofline(batched(3), slice_, Workload(), PERFECT)
    assert four.seconds == one.seconds
    assert any("cannot be split over 4 chips" in note for note in four.notes)


def test_an_unknown_link_leaves_the_latency_unknown() -> None:
    estimate = roofline(batched(256), replace(DEVICE, chips=4), Workload(), PERFECT)
    assert estimate.seconds is None
    assert any("no published link rate" in note for note in estimate.notes)


# --- the unknown ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"memory_bytes_per_s": None}, "no published memory bandwidth of round-numbers"),
        ({"peak_ops": {"int8": 4e12}}, "no published float32 rate of round-numbers"),
    ],
)
def test_an_unknown_rate_leaves_the_latency_unknown(change: dict[str, object], reason: str) -> None:
    unknown = replace(DEVICE, **change)  # type: ignore[arg-type]  # fields of several types
    estimate = roofline(parsed(PRODUCT), unknown, Workload(), PERFECT)
    assert (estimate.seconds, estimate.lo, estimate.joules, estimate.dollars) == (None,) * 4
    assert reason in estimate.notes
    assert estimate.bytes_peak is not None


def test_unknown_power_and_price_are_said() -> None:
    bare = replace(DEVICE, watts=None, usd_per_hour=None)
    estimate = roofline(parsed(PRODUCT), bare, Workload(), PERFECT)
    assert (estimate.joules, estimate.dollars) == (None, None)
    assert "no published power of round-numbers" in estimate.notes
    assert "no published price of round-numbers" in estimate.notes


def test_a_symbolic_model_is_not_predicted_and_names_the_dimension() -> None:
    model = parsed("agraph (float[batch, 4] x) => (float[batch, 4] y) { y = Exp(x) }")
    estimate = roofline(model, DEVICE, Workload(), PERFECT)
    assert estimate.seconds is None
    assert "x[batch]" in estimate.notes[0]
    assert "--shape" in estimate.notes[0]


def test_what_exceeds_the_memory_does_not_fit() -> None:
    assert does_not_fit(Estimate(1.0, bytes_peak=2e9), DEVICE) is not None
    assert does_not_fit(Estimate(1.0, bytes_peak=5e8), DEVICE) is None
    assert does_not_fit(Estimate(None, bytes_peak=None), DEVICE) is None
    board = replace(DEVICE, memory_bytes=None, resources={"dsp": 220})
    assert "221 dsp" in str(does_not_fit(Estimate(1.0, resources={"dsp": 221}), board))
    assert does_not_fit(Estimate(1.0, resources={"lut": 1e9}), board) is None


# --- properties ----------------------------------------------------------------------------------


@given(st.integers(1, 512), st.floats(1e9, 1e13), st.floats(1e8, 1e13))
def test_a_better_machine_is_never_slower(batch: int, rate: float, bandwidth: float) -> None:
    model = batched(batch)
    device = replace(DEVICE, peak_ops={"float32": rate}, memory_bytes_per_s=bandwidth)
    better = replace(device, peak_ops={"float32": 2 * rate}, memory_bytes_per_s=2 * bandwidth)
    slow = roofline(model, device, Workload(), PERFECT).seconds
    fast = roofline(model, better, Workload(), PERFECT).seconds
    assert slow is not None
    assert fast is not None
    assert fast <= slow


# --- the backends' profiles ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "target"),
    [
        (onnxruntime_cost, "cpu"),
        (xla_cost, "cpu"),
        (xla_cost, "nvidia-h100-sxm"),
        (xla_cost, "tpu-v5e"),
        (tensorrt_cost, "nvidia-t4"),
        (tensorrt_cost, "nvidia-a100-80-sxm"),
        (tvm_cost, "cpu"),
        (tvm_cost, "nvidia-h100-sxm"),
    ],
)
def test_each_backend_predicts_a_real_model(
    module: object, target: str, shared_data: Callable[[str], Path]
) -> None:
    model, _ = prepare.optimize(shared_data("models/cifar_resnet20.onnx"), shape=["N=1"])
    estimate: Estimate = module.estimate(model, targets.find(target), Workload())  # type: ignore[attr-defined]  # a module
    if targets.find(target).peak_ops == {}:
        pytest.skip("no peak rates are derived for this CPU")
    assert estimate.seconds is not None
    assert estimate.lo is not None
    assert estimate.hi is not None
    assert 1e-6 < estimate.lo < estimate.seconds < estimate.hi < 1.0
    assert estimate.calibration
    assert estimate.bytes_peak is not None
    assert 1.0e6 < estimate.bytes_peak < 3e6


def test_float32_on_a_tpu_takes_six_passes_of_bfloat16() -> None:
    target = targets.find("tpu-v6e")
    profile = xla_cost.profile_for(target)
    assert profile.machine is not None
    context = Context(dtypes=profile.arithmetic, slowdown=profile.slowdown)
    product = Product(8192, 8192, 8192)
    kernels = [
        Kernel("k", ("MatMul",), {dtype: product.operations}, products=(product,))
        for dtype in ("float32", "bfloat16")
    ]
    (full, once), _ = profile.machine.time(kernels, target, context)
    assert full is not None
    assert once is not None
    assert full.compute == pytest.approx(6 * once.compute)


def test_a_tpu_computes_whole_tiles() -> None:
    """8 x 100 x 100 takes as long as 8 x 128 x 128 on a v5e, or 8 x 256 x 256 on a v6e."""
    small, v5e, v6e = Product(8, 100, 100), Product(8, 128, 128), Product(8, 256, 256)
    assert tpu.padded(small, 128.0) == v5e.operations
    assert tpu.padded(small, 256.0) == v6e.operations
    assert tpu.padded(Product(1, 128, 128), 128.0) == v5e.operations


def test_int8_is_faster_where_the_engine_multiplies_integers(
    shared_data: Callable[[str], Path],
) -> None:
    """TensorRT takes Q/DQ products as int8; a T4 does those at twice its float16 rate."""
    seconds = {}
    for kind in ("fp32", "int8_qdq"):
        path = shared_data(f"models/mlperf_ic_resnet8_{kind}.onnx")
        model, _ = prepare.optimize(path, shape=["N=256"])
        seconds[kind] = tensorrt_cost.estimate(model, targets.find("nvidia-t4"), Workload()).seconds
    assert seconds["fp32"] is not None
    assert seconds["int8_qdq"] is not None
    assert seconds["int8_qdq"] < seconds["fp32"]
