"""GPU formulas: what grows with what, what quantizes, and agreement with published kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trivium.compiler import targets
from trivium.compiler.kernels import Kernel
from trivium.compiler.machines import gpu, gpu_attention
from trivium.compiler.machines.base import Context
from trivium.compiler.types import Target
from trivium.compiler.work import AttentionSize, Product
from trivium.targets import calibrations

H100 = targets.find("nvidia-h100-sxm")


def seconds(target: Target, m: float, n: float, k: float, **more: float) -> float:
    chip = gpu.Chip.of(target, target.peak_ops["bfloat16"])
    c = calibrations.find(target, "product").coefficients
    return float(gpu.product(m, n, k, chip, c, **more).seconds[0])


@pytest.mark.parametrize(
    ("target", "size", "published"),
    [
        # https://github.com/PrincetonUniversity/LLMCompass/tree/2e015fd: not fitted on
        ("nvidia-a100-80-sxm", (2048, 12288, 12288), 2.3586e-3),
        ("nvidia-a100-80-sxm", (64, 12288, 12288), 0.19e-3),
        ("nvidia-a100-80-sxm", (8192, 1024, 1024), 0.0927e-3),
    ],
)
def test_a_product_takes_about_what_was_published(
    target: str, size: tuple[int, int, int], published: float
) -> None:
    assert seconds(targets.find(target), *size) == pytest.approx(published, rel=0.25)


def test_one_tile_more_than_the_multiprocessors_hold_starts_a_wave() -> None:
    """132 tiles of 128 x 256 fit at once; the next row of tiles needs a second wave."""
    fitting = seconds(H100, 128 * 66, 512, 8192)
    spilling = seconds(H100, 128 * 66 + 128, 512, 8192)
    assert spilling / fitting > 1.15


def test_splitting_the_sum_fills_an_idle_machine() -> None:
    """A single tile over a long sum is not left to one multiprocessor."""
    chip = gpu.Chip.of(H100, H100.peak_ops["bfloat16"])
    alone = 2.0 * 128 * 128 * 65536 / (chip.peak / chip.units)
    assert seconds(H100, 128, 128, 65536) < 0.2 * alone


def test_a_weight_that_stays_in_the_cache_is_not_read_again() -> None:
    cold = seconds(targets.find("nvidia-l40s"), 1, 2048, 2048)
    warm = seconds(targets.find("nvidia-l40s"), 1, 2048, 2048, left_span=1e6, right_span=1e7)
    assert warm < 0.75 * cold


def test_a_power_cap_slows_a_card_whose_base_clock_is_low() -> None:
    l4 = targets.find("nvidia-l4")
    free = replace(l4, base_clock_hz=None)
    assert seconds(l4, 4096, 4096, 4096) > 1.4 * seconds(free, 4096, 4096, 4096)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.integers(1, 8192), st.integers(16, 8192), st.integers(16, 8192), st.sampled_from([1.5, 4.0])
)
def test_a_better_gpu_is_never_slower(m: int, n: int, k: int, factor: float) -> None:
    peaks = {name: rate * factor for name, rate in H100.peak_ops.items()}
    bandwidth = (H100.memory_bytes_per_s or 0.0) * factor
    better = replace(H100, peak_ops=peaks, memory_bytes_per_s=bandwidth)
    assert seconds(better, m, n, k) <= seconds(H100, m, n, k) * (1 + 1e-9)


def test_all_products_of_a_call_are_timed_as_each_is_alone() -> None:
    chip = gpu.Chip.of(H100, H100.peak_ops["bfloat16"])
    c = calibrations.find(H100, "product").coefficients
    sizes = np.array([[1, 4096, 4096], [128, 768, 3072], [4096, 4096, 4096]], float)
    together = gpu.product(sizes[:, 0], sizes[:, 1], sizes[:, 2], chip, c).seconds
    assert together == pytest.approx([seconds(H100, *size) for size in sizes])


def test_attention_grows_with_what_a_query_sees() -> None:
    chip = gpu.Chip.of(H100, H100.peak_ops["bfloat16"])
    prefill = calibrations.find(H100, "prefill").coefficients
    decode = calibrations.find(H100, "decode").coefficients
    sizes = (8, 32, 8, 4096, 4096, 128)
    half = gpu_attention.prefill(*sizes, chip, prefill, causal=True)
    whole = gpu_attention.prefill(*sizes, chip, prefill, causal=False)
    assert 1.5 < whole / half < 2.2
    short, long = (
        gpu_attention.decode(64, 32, 8, 1, keys, 128, chip, decode) for keys in (1024, 8192)
    )
    assert 5.0 < long / short < 9.0
    # Eight query heads read the same keys once.
    apart = gpu_attention.decode(64, 32, 32, 1, 8192, 128, chip, decode)
    assert apart / long > 3.0


def test_kernels_without_arithmetic_take_their_bytes_over_the_bandwidth() -> None:
    machine = calibrations.gpu_machine(H100)
    copy = Kernel("copy", ("Transpose",), read_bytes=1e9, written_bytes=1e9)
    times, notes = machine.time([copy], H100, Context(held_bytes=2e9))
    assert notes == ()
    assert times[0] is not None
    assert times[0].bound == "memory"
    assert times[0].seconds == pytest.approx(2e9 / 3.35e12, rel=0.4)


def test_an_unknown_rate_is_said_and_the_rest_is_timed() -> None:
    machine = calibrations.gpu_machine(H100)
    odd = Kernel("odd", ("MatMul",), {"int3": 1e9}, products=(Product(1000, 1000, 500),))
    good = Kernel("good", ("MatMul",), {"bfloat16": 1e9}, products=(Product(1000, 1000, 500),))
    times, notes = machine.time([odd, good], H100, Context())
    assert times[0] is None
    assert times[1] is not None
    assert notes == ("no published int3 rate of nvidia-h100-sxm",)


def test_a_slower_engine_takes_longer_by_its_pace() -> None:
    size = AttentionSize(1, 16, 16, 512, 512, 64)
    kernel = Kernel("attention", ("Attention",), {"float16": 1e9}, attentions=(size,))
    plain, _ = calibrations.gpu_machine(H100).time([kernel], H100, Context())
    slow, _ = calibrations.gpu_machine(H100, pace=1.5).time([kernel], H100, Context())
    assert plain[0] is not None
    assert slow[0] is not None
    assert slow[0].seconds == pytest.approx(1.5 * plain[0].seconds)


@pytest.mark.parametrize("name", [n for n in targets.names() if n.startswith("nvidia-")])
def test_every_gpu_is_predicted_or_says_why(name: str, shared_data: Callable[[str], Path]) -> None:
    from trivium.backends.tensorrt import cost
    from trivium.compiler import prepare
    from trivium.compiler.types import Workload

    model, _ = prepare.optimize(shared_data("models/mlperf_ic_resnet8_fp32.onnx"), shape=["N=8"])
    estimate = cost.estimate(model, targets.find(name), Workload())
    if estimate.seconds is None:
        assert any("no published" in note for note in estimate.notes)
    else:
        assert estimate.lo is not None
        assert 1e-6 < estimate.lo < estimate.seconds < 0.1
        assert "other devices" in estimate.calibration or name in estimate.calibration


def test_a_matrix_times_a_vector_is_bound_by_its_bytes() -> None:
    """No tile is filled in vain, in float32 either: within three of reading the matrix once."""
    chip = gpu.Chip.of(H100, H100.peak_ops["float32"])
    c = calibrations.find(H100, "product_float32").coefficients
    parts = gpu.product(1, 8192, 8192, chip, c, width=4.0, out_width=4.0)
    assert float(parts.compute[0]) == 0.0
    assert float(parts.body[0]) < 3.0 * 4.0 * 8192 * 8192 / chip.bandwidth


def test_what_was_just_written_is_read_from_the_cache() -> None:
    """A layer whose maps fit in one part of the L2 is quicker a row than one ten times as large."""
    machine = calibrations.gpu_machine(H100)

    def rate(rows: float) -> float:
        product = Product(rows, 256.0, 64.0)
        kernel = Kernel(
            "",
            ("Conv",),
            {"int8": product.operations},
            weight_bytes=64.0 * 256.0,
            read_bytes=rows * 64.0,
            written_bytes=rows * 256.0,
            products=(product,),
        )
        (time,), _ = machine.time([kernel], H100, Context(1.0, 1e9))
        assert time is not None
        return time.busy / rows

    fits = 0.5 * (H100.on_chip_bytes or 0.0) / H100.on_chip_parts / 320.0
    assert rate(fits) < 0.8 * rate(10 * fits)


def test_a_long_model_in_float32_runs_at_a_lower_clock() -> None:
    """The power cap acts on all its products together, not on each."""
    machine = calibrations.gpu_machine(H100)
    product = Product(4096.0, 4096.0, 4096.0)

    def one(times: float) -> float:
        kernel = Kernel("", ("MatMul",), {"float32": product.operations}, weight_bytes=6.7e7)
        kernel = replace(kernel, read_bytes=6.7e7, written_bytes=6.7e7)
        kernel = replace(kernel, times=times, products=(product,))
        (time,), _ = machine.time([kernel], H100, Context(1.0, 1e9))
        assert time is not None
        return time.busy

    assert one(50.0) > 1.01 * one(1.0)


def test_reading_a_cache_is_bound_by_memory() -> None:
    machine = calibrations.gpu_machine(H100)
    size = AttentionSize(64, 32, 8, 1, 4096, 128, False)
    kernel = Kernel("", ("Attention",), {"bfloat16": 1e9}, read_bytes=1e9, attentions=(size,))
    (time,), _ = machine.time([kernel], H100, Context(1.0, 1e9))
    assert time is not None
    assert time.bound == "memory"
