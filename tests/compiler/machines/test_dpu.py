"""The DPU's formula: whole steps of the engine, shared weights, what passes through its sides."""

from __future__ import annotations

from dataclasses import replace

import pytest

from trivium.compiler.kernels import Kernel
from trivium.compiler.machines import dpu
from trivium.compiler.work import Product

ENGINE = dpu.Engine(8, 16, 16, 3e8, 3, 1.9e10, shares_weights=False)
C = {**dpu.START, "call_s": 1e-6}


def conv(
    rows: float, inputs: float, outputs: float, taps: float = 9.0, groups: float = 1
) -> Kernel:
    product = Product(rows, outputs, inputs * taps, groups, 0.0, taps)
    return Kernel(
        "",
        ("Conv",),
        {"int8": product.operations},
        weight_bytes=inputs * outputs * taps * groups,
        read_bytes=rows * inputs * groups,
        written_bytes=rows * outputs * groups,
        products=(product,),
    )


def seconds(*kernels: Kernel, engine: dpu.Engine = ENGINE, busy: int = 1) -> float:
    return dpu.seconds(dpu.layers_of(kernels), engine, C, busy)


def test_a_convolution_runs_at_the_share_of_the_peak() -> None:
    """Where all three sides are filled and operands are few, steps over the clock."""
    steps = (3136 / 8) * 9 * (256 / 16) * (256 / 16)
    expected = steps / C["sustained"] / ENGINE.clock_hz
    assert seconds(conv(3136, 256, 256)) == pytest.approx(expected, rel=0.02)


def test_one_channel_more_takes_another_step() -> None:
    assert seconds(conv(3136, 64, 65)) > 1.2 * seconds(conv(3136, 64, 64))


def test_few_input_channels_fold_the_window() -> None:
    """Three channels of a 7 x 7 window are 2 x 7 steps, not 49."""
    assert seconds(conv(12544, 3, 64, 49.0)) < 0.4 * seconds(conv(12544, 16, 64, 49.0))


def test_depthwise_convolutions_reach_far_less_than_full_ones() -> None:
    full, thin = conv(3136, 256, 256), conv(3136, 1, 1, groups=256)
    rate = sum(full.dense.values()) / seconds(full)
    assert sum(thin.dense.values()) / seconds(thin) < 0.2 * rate


def test_cores_share_the_memory_but_weights_only_where_they_run_in_step() -> None:
    """A layer of weights alone, as VGG's first dense one."""
    dense = conv(1, 25088, 4096, 1.0)
    apart = seconds(dense, busy=3)
    in_step = seconds(dense, engine=replace(ENGINE, shares_weights=True), busy=3)
    assert apart > 1.5 * seconds(dense)
    assert in_step == pytest.approx(apart / 3, rel=0.05)


def test_feature_maps_that_stay_are_not_moved() -> None:
    wide = conv(12544, 64, 64, 1.0)
    kept = replace(ENGINE, feature_bytes=4e6)
    assert seconds(wide, engine=kept, busy=3) < seconds(wide, busy=3)


def test_a_pool_passes_through_the_slower_unit() -> None:
    pool = Kernel("", ("MaxPool",), read_bytes=8e5, written_bytes=2e5)
    assert seconds(pool) == pytest.approx(1e6 / C["misc"] / ENGINE.clock_hz, rel=0.01)
