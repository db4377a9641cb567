"""The arithmetic of the grid, held to the textbook's formulas and to ONNX's own operator."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx.parser
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from trivium.passes.quantization import linear

LIMIT = float(np.float32(1e6))
FINITE = st.floats(-LIMIT, LIMIT, width=32)
BITS = st.integers(2, 8)


@given(BITS, st.lists(FINITE, min_size=2, max_size=50))
def test_asymmetric_is_the_textbook_formula(bits: int, numbers: list[float]) -> None:
    x = np.array(numbers, np.float32)
    grid = linear.grid("uint8", bits)
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale, zero = linear.fit(np.asarray(low), np.asarray(high), grid, symmetric=False)
    codes = linear.quantize(x, scale, zero, grid)
    if high - low < 1e-30:
        return
    # x_q = round((x - min) / (max - min) * (2^b - 1)); the zero point is rounded first, which
    # moves a code by at most one.
    textbook = np.round((x.astype(np.float64) - low) / (high - low) * (2**bits - 1))
    assert np.abs(codes.astype(int) - textbook).max() <= 1
    shift = low / (high - low) * (2**bits - 1)
    if abs(shift - round(shift)) < 1e-9:
        exact = (x.astype(np.float64) - low) / (high - low) * (2**bits - 1)
        clear = np.abs(exact - np.floor(exact) - 0.5) > 1e-3
        assert (codes[clear] == textbook[clear]).all()


@given(BITS, st.lists(FINITE, min_size=1, max_size=50))
def test_symmetric_is_the_textbook_formula(bits: int, numbers: list[float]) -> None:
    x = np.array(numbers, np.float32)
    grid = linear.grid("int8", bits)
    scale, zero = linear.fit(x.min(), x.max(), grid, symmetric=True)
    reach = float(np.abs(x).max())
    assert zero == 0
    if reach < 1e-30:
        return
    exact = x.astype(np.float64) / reach * (2 ** (bits - 1) - 1)
    clear = np.abs(exact - np.floor(exact) - 0.5) > 1e-3
    codes = linear.quantize(x, scale, zero, grid)
    assert (codes[clear] == np.round(exact)[clear]).all()


@given(BITS, st.booleans(), st.booleans(), st.lists(FINITE, min_size=1, max_size=50))
def test_error_is_half_a_step_and_zero_is_exact(
    bits: int, symmetric: bool, signed: bool, numbers: list[float]
) -> None:
    x = np.array([*numbers, 0.0], np.float32)
    grid = linear.grid("int8" if signed else "uint8", bits)
    scale, zero = linear.fit(x.min(), x.max(), grid, symmetric=symmetric)
    back = linear.dequantize(linear.quantize(x, scale, zero, grid), scale, zero)
    assert back[-1] == 0
    # The zero point is rounded, so the ends of an asymmetric range may miss by half a step more.
    slack = 0.5 if symmetric else 1.0
    assert np.abs(back - x).max() <= float(scale) * (slack + 1e-4) + 1e-30


@given(st.lists(FINITE, min_size=1, max_size=20), st.floats(2.0**-10, 1e3, width=32))
def test_codes_are_those_of_onnx(numbers: list[float], step: float) -> None:
    x, scale = np.array(numbers, np.float32), np.array(step, np.float32)
    for dtype, zero in (("uint8", 128), ("int8", 0)):
        codes = linear.quantize(x, scale, zero, linear.full(dtype))
        (expected,) = _quantize_linear(dtype).run(
            None, {"x": x, "s": scale, "z": np.array(zero, dtype)}
        )
        assert (codes == expected).all()


@cache
def _quantize_linear(dtype: str) -> ReferenceEvaluator:
    return ReferenceEvaluator(
        onnx.parser.parse_model(
            f"""<ir_version: 11, opset_import: ["" : 24]>
            g (float[N] x, float s, {dtype} z) => ({dtype}[N] y) {{
              y = QuantizeLinear(x, s, z)
            }}"""
        )
    )


def test_ranges_of_nothing_and_dust_have_a_scale() -> None:
    low = np.array([0.0, 0.0, -1e-45])
    scale, zero = linear.fit(low, -low, linear.grid("int8"), symmetric=True)
    assert scale == pytest.approx(1 / 254)
    assert (zero == 0).all()


def test_a_nonnegative_range_uses_every_unsigned_code() -> None:
    grid = linear.grid("uint8")
    for symmetric in (False, True):
        scale, zero = linear.fit(np.array(0.0), np.array(2.55), grid, symmetric=symmetric)
        assert zero == 0
        assert scale == pytest.approx(0.01)
    scale, zero = linear.fit(np.array(-1.27), np.array(1.0), grid, symmetric=True)
    assert zero == 128
    assert scale == pytest.approx(0.01)


def test_widths_outside_of_the_dtype_are_refused() -> None:
    with pytest.raises(ValueError, match="9 bits in int8"):
        linear.grid("int8", 9)
    with pytest.raises(ValueError, match="float32"):
        linear.grid("float32")
