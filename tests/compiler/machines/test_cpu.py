"""The formula for CPUs: what makes a kernel slower, and what a call pays once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from trivium.compiler import calibrate, fitting
from trivium.compiler.calibration import Calibration
from trivium.compiler.cost import Profile
from trivium.compiler.kernels import Kernel
from trivium.compiler.machines import cpu
from trivium.compiler.machines.base import Context
from trivium.compiler.types import Target
from trivium.compiler.work import Product

PEAK = 3e11
TARGET = Target(
    name="cpu",
    family="cpu",
    backends=(),
    peak_ops={"float32": PEAK, "int8": 4 * PEAK},
    memory_bytes_per_s=2e10,
    units=2,
)
MACHINE = cpu.CpuMachine(Calibration({**cpu.START, "wake_s": 5e-5}))


def kernel(product: Product, op_type: str = "MatMul", dtype: str = "float32") -> Kernel:
    weights = 4.0 * product.n * product.k * product.batch
    dense = {dtype: product.operations}
    return Kernel("k", (op_type,), dense, {}, weights, products=(product,))


def seconds(*kernels: Kernel, machine: cpu.CpuMachine = MACHINE, held: float = 0.0) -> float:
    times, notes = machine.time(kernels, TARGET, Context(held_bytes=held))
    assert not notes
    return sum(one.seconds for one in times if one is not None)


def test_waking_other_cores_is_paid_once() -> None:
    large = kernel(Product(512, 512, 512))
    once, twice = seconds(large), seconds(large, large)
    assert 2 * once - twice == pytest.approx(5e-5, rel=0.01)
    small = kernel(Product(4, 8, 8))
    assert 2 * seconds(small) - seconds(small, small) < 1e-6


def test_large_kernels_are_shared_and_small_ones_are_not() -> None:
    still = replace(MACHINE, calibration=Calibration({**cpu.START, "wake_s": 0.0, "node_s": 0.0}))
    alone = replace(TARGET, units=1, peak_ops={"float32": PEAK / 2})
    for product, gain in ((Product(512, 512, 512), 2.0), (Product(4, 16, 16), 1.0)):
        (one,), _ = still.time([kernel(product)], alone, Context())
        assert one is not None
        ratio = one.seconds / seconds(kernel(product), machine=still)
        assert ratio == pytest.approx(gain, rel=0.01)


def test_narrow_products_fill_registers_less_well() -> None:
    machine = replace(MACHINE, habits=cpu.Habits(narrow=16.0))
    wide = seconds(kernel(Product(1024, 256, 256)), machine=machine)
    narrow = seconds(*[kernel(Product(1024, 16, 256))] * 16, machine=machine)
    assert narrow > 1.6 * wide
    assert cpu.padded(Product(5, 6, 7)) == 2 * 8 * 16 * 7


def test_a_row_waits_for_weights_and_longer_for_far_ones() -> None:
    row = kernel(Product(1, 1024, 1024))
    near, far = seconds(row), seconds(row, held=1e8)
    assert far > near > row.weight_bytes / (2 * MACHINE.habits.weight_bytes_per_s)
    (time,), _ = MACHINE.time([row], TARGET, Context(held_bytes=1e8))
    assert time is not None
    assert time.bound == "memory"


def test_depthwise_convolutions_are_elementwise_work() -> None:
    machine = replace(MACHINE, calibration=Calibration({**cpu.START, "vector": 0.02}))
    depthwise = kernel(Product(1024, 1, 9, 64, taps=9), "Conv")
    assert seconds(depthwise, machine=machine) > 1.3 * seconds(depthwise)


def test_a_dtype_without_a_rate_is_told() -> None:
    times, notes = MACHINE.time(
        [kernel(Product(64, 64, 64), dtype="float8")], TARGET, Context(dtypes={})
    )
    assert times == [None]
    assert notes == ("no published rate of cpu for float8",)


def test_a_fit_recovers_the_coefficients_that_made_the_points() -> None:
    truth = {
        **{"call_s": 2e-5, "node_s": 2e-6, "wake_s": 3e-5},
        **{"dense": 0.5, "conv": 0.3, "vector": 0.05},
    }
    random = np.random.default_rng(0)
    points = []
    for index in range(30):
        kernels = [Kernel("e", ("Relu",), {}, {"float32": 10.0 ** random.uniform(2, 7)})]
        for _ in range(index % 4 * 3):
            m, n, k = (2.0 ** random.integers(3, 9, 3)).tolist()
            op_type = "Conv" if index % 2 else "MatMul"
            kernels.append(kernel(Product(m, n, k), op_type))
        points.append(calibrate.Point("p", tuple(kernels), 0.0, 1.0))
    profile = Profile(machine=MACHINE)
    made = calibrate.predict(points, TARGET, profile, truth)
    found = fitting.fit(
        lambda c: calibrate.predict(points, TARGET, profile, c),
        made,
        cpu.START,
        cpu.DEVICE,
        cpu.BOUNDS,
    )
    for name, value in truth.items():
        assert found[name] == pytest.approx(value, rel=0.2), name


def test_a_window_is_gathered_by_its_rows() -> None:
    # One channel: five rows of five; of 64 channels a row of three is twelve registers.
    assert cpu.pieces(Product(784, 8, 25, taps=25)) == 5
    assert cpu.pieces(Product(100, 8, 64 * 9, taps=9)) == 36
    assert cpu.pieces(Product(100, 8, 16 * 9, taps=9)) == 9


def test_an_engine_reaches_what_its_habits_say_of_a_matrix_unit() -> None:
    still = Calibration({**cpu.START, "wake_s": 0.0, "node_s": 0.0})
    fed = replace(TARGET, peak_ops={"float32": PEAK, "int8": 64 * PEAK})
    one = kernel(Product(512, 512, 512), dtype="int8")
    float32 = kernel(Product(512, 512, 512))
    for reach, gain in ((3.0, 3.0), (100.0, 64.0)):
        machine = cpu.CpuMachine(still, cpu.Habits(reach={"int8": reach}, grain=1.0))
        (slow, quick), _ = machine.time([float32, one], fed, Context())
        assert slow is not None
        assert quick is not None
        assert slow.compute / quick.compute == pytest.approx(gain, rel=0.01)


@pytest.mark.parametrize(
    ("bytes_each", "dtype", "extra"),
    [(1.0, "float16", 2e-10), (2.0, "float16", 2e-10), (0.53, "float32", 1e-9),
     (4.0, "float32", 0.0), (1.0, "int8", 0.0)],
)  # fmt: skip
def test_weights_that_are_made_floats_at_every_call_cost(
    bytes_each: float, dtype: str, extra: float
) -> None:
    alone = replace(TARGET, units=1)
    context = Context(dtypes={"float16": ("float32",)})
    product = Product(64, 256, 256)
    one = replace(kernel(product, dtype=dtype), weight_bytes=bytes_each * 256 * 256)
    habits = cpu.Habits(unpack_s=(2e-10, 1e-9))
    times = []
    for habit in (habits, replace(habits, unpack_s=(0.0, 0.0))):
        (time,), _ = replace(MACHINE, habits=habit).time([one], alone, context)
        assert time is not None
        times.append(time.compute)
    assert times[0] - times[1] == pytest.approx(extra * 256 * 256)
