"""Rounding in integers is ONNX's rounding in float32, everywhere."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from tests.backends.fpga import qdq
from trivium.backends.fpga.arithmetic import (
    FLOAT32_INTEGERS,
    fixed_point,
    fixed_point_add,
    requantize,
    requantizer,
    round_half_even,
    round_like_float32,
)
from trivium.backends.fpga.ir import Range

SCALES = st.floats(2.0**-26, 2.0, width=32)
SETTINGS = settings(max_examples=200, deadline=None, derandomize=True)


@SETTINGS
@given(scales=st.lists(st.floats(2.0**-22, 1.0, width=32), min_size=1, max_size=8))
def test_fixed_point_is_the_scale_itself(scales: list[float]) -> None:
    multipliers, shift = fixed_point(np.array(scales, np.float32))
    for scale, multiplier in zip(scales, multipliers, strict=True):
        assert Fraction(int(multiplier), 1 << shift) == Fraction(scale)


@SETTINGS
@given(scale=SCALES, seed=st.integers(0, 2**32 - 1))
def test_requantize_is_float32_arithmetic(scale: float, seed: int) -> None:
    """Against numpy's float32, on accumulators next to ties, where rounding twice shows."""
    rng = np.random.default_rng(seed)
    ties = (np.arange(-300, 300) + 0.5) / scale
    near = np.rint(ties[:, None] + np.arange(-2, 3)).ravel()
    drawn = rng.integers(-FLOAT32_INTEGERS, FLOAT32_INTEGERS, 1000)
    accumulators = np.concatenate([near[np.abs(near) <= FLOAT32_INTEGERS], drawn]).astype(np.int64)
    how = requantizer(np.array([scale]), 3, -128, 127, Range(-FLOAT32_INTEGERS, FLOAT32_INTEGERS))
    steps = np.rint(accumulators.astype(np.float32) * np.float32(scale)) + 3
    np.testing.assert_array_equal(
        requantize(accumulators, how), np.clip(steps, -128, 127).astype(np.int64)
    )


def test_a_dead_channel_does_not_widen_the_others() -> None:
    """A pruned channel's scale may be anything; what always rounds to zero is multiplied by it."""
    scales = np.array([0.004, 1e-30, 0.003], np.float32)
    how = requantizer(scales, 5, -128, 127, Range(-(1 << 20), 1 << 20))
    assert how.multiplier[1] == 0
    assert how.multiplier_bits <= 25
    accumulators = np.array([[1 << 20, 1 << 20, -(1 << 20)], [100, 100, 100]])
    steps = np.rint(accumulators.astype(np.float32) * scales) + 5
    np.testing.assert_array_equal(requantize(accumulators, how), np.clip(steps, -128, 127))


def test_rounding_twice_does_show() -> None:
    """A case that one exact rounding gets wrong: float32 lands on the tie, and goes to even."""
    scale = np.float32(0.001)
    multipliers, shift = fixed_point(np.array([scale]))
    inside = np.arange(-200_000, 200_000, dtype=np.int64)
    products = inside * int(multipliers[0])
    once = round_half_even(products, shift)
    twice = round_like_float32(products, shift)
    np.testing.assert_array_equal(twice, np.rint(inside.astype(np.float32) * scale))
    assert (once != twice).any()


@SETTINGS
@given(numerator=st.integers(-(2**40), 2**40), shift=st.integers(1, 20))
def test_round_half_even_is_python_s(numerator: int, shift: int) -> None:
    expected = round(Fraction(numerator, 1 << shift))
    assert int(round_half_even(np.int64(numerator)[None], shift)[0]) == expected  # type: ignore[index]  # a scalar becomes an array


@pytest.mark.parametrize("seed", range(6))
def test_addition_agrees_with_onnx_runtime_on_every_pair(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scales = [float(np.float32(s)) for s in np.exp(rng.uniform(-4, -2, 3))]
    points = [int(p) for p in rng.integers(-128, 128, 3)]
    graph = qdq.Graph(rng, (256, 256))
    a, b, to = (graph.parameters(s, p) for s, p in zip(scales, points, strict=True))
    codes = np.arange(-128, 128)
    integers = [np.repeat(codes[:, None], 256, 1), np.repeat(codes[None], 256, 0)]
    left, right = (
        graph.op("DequantizeLinear", graph.store(i.astype(np.int8)), *p)
        for i, p in zip(integers, (a, b), strict=True)
    )
    total = graph.op("QuantizeLinear", graph.op("Add", left, right), *to)
    y = graph.op("Add", graph.op("DequantizeLinear", total, *to), "x")
    model = graph.model(y)
    model.graph.output.append(helper.make_tensor_value_info(total, TensorProto.INT8, None))
    _, expected = qdq.run(model, np.zeros((1, 256, 256), np.float32))

    full = Range(-128, 127)
    multipliers, offset, shift, accumulator, mismatches = fixed_point_add(
        (full, full),
        (scales[0], scales[1]),
        (points[0], points[1]),
        scales[2],
        points[2],
        -128,
        127,
    )
    sums = integers[0] * multipliers[0] + integers[1] * multipliers[1] + offset
    actual = np.clip(round_half_even(sums, shift), -128, 127)
    assert int((actual != expected).sum()) == mismatches <= 2
    assert int(sums.min()) == accumulator.lo
    assert int(sums.max()) == accumulator.hi


@given(lo=st.integers(-(2**40), 2**40), span=st.integers(0, 2**40))
def test_bits_are_just_enough(lo: int, span: int) -> None:
    found = Range(lo, lo + span)
    if found.signed:
        bounds = (-(1 << found.bits - 1), (1 << found.bits - 1) - 1)
        narrower = (-(1 << max(found.bits - 2, 0)), (1 << max(found.bits - 2, 0)) - 1)
    else:
        bounds, narrower = (0, (1 << found.bits) - 1), (0, (1 << found.bits - 1) - 1)
    assert bounds[0] <= found.lo <= found.hi <= bounds[1]
    assert found.bits == 1 or not (narrower[0] <= found.lo and found.hi <= narrower[1])
