"""The textbook's formulas for every number of bits: a scale for a tensor, a channel, a block."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.passes.helpers import model
from trivium.compiler.passing import weight
from trivium.passes.quantization import blocks, linear
from trivium.passes.quantization.blocks import Form
from trivium.passes.quantize_static import QuantizeStatic

Array = np.ndarray[Any, np.dtype[Any]]

BITS = range(2, 9)
BLOCK = 16
GRAINS = {"tensor": (1, 96 * 6), "channel": (6, 96), "block": (6 * 96 // BLOCK, BLOCK)}
"""How a [96, 6] matrix splits into [groups, values of a scale], its columns one after another."""


def skewed(seed: int) -> Array:
    """A matrix whose columns have other ranges, not centred on zero."""
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((96, 6)) * np.exp(rng.standard_normal(6))
    return np.asarray(matrix + rng.standard_normal(6), np.float32)


def textbook(x: Array, bits: int, symmetric: bool) -> tuple[Array, Array, Array]:
    """Codes, scales and zero points of [groups, values], in float64."""
    x = x.astype(np.float64)
    if symmetric:
        top = 2 ** (bits - 1) - 1
        scale = np.abs(x).max(axis=1, keepdims=True) / top
        zero = np.zeros_like(scale)
        return np.clip(np.rint(x / scale), -top, top), scale, zero
    low = np.minimum(x.min(axis=1, keepdims=True), 0)
    high = np.maximum(x.max(axis=1, keepdims=True), 0)
    scale = (high - low) / (2**bits - 1)
    zero = np.rint(-low / scale)
    return np.clip(np.rint(x / scale) + zero, 0, 2**bits - 1), scale, zero


def quantized(x: Array, bits: int, symmetric: bool, grain: str) -> tuple[Array, Array, Array]:
    """What the project computes, as [groups, values] and [groups, 1]."""
    if grain == "block":
        made = blocks.nearest(x, Form(bits, BLOCK, symmetric))
        parts = made.codes.T.reshape(-1, BLOCK), made.scales.T, made.zeros.T
        return parts[0], parts[1].reshape(-1, 1), parts[2].reshape(-1, 1)
    axis = 1 if grain == "channel" else None
    grid = linear.grid("int8" if symmetric else "uint8", bits)
    scale, zero = linear.fit(*linear.extremes(x, axis), grid, symmetric=symmetric)
    wide = linear.along(scale, axis, 2), linear.along(zero, axis, 2)
    codes = linear.quantize(x, *wide, grid)
    return codes.T.reshape(GRAINS[grain]), scale.reshape(-1, 1), zero.reshape(-1, 1)


@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", BITS)
def test_scales_zero_points_and_codes_are_the_textbooks(
    bits: int, symmetric: bool, grain: str
) -> None:
    x = skewed(bits)
    rows = x.T.reshape(GRAINS[grain])
    want_codes, want_scale, want_zero = textbook(rows, bits, symmetric)
    codes, scale, zero = quantized(x, bits, symmetric, grain)
    np.testing.assert_allclose(scale, want_scale, rtol=1e-6)
    np.testing.assert_array_equal(zero, want_zero)
    # Halfway between two codes float32 may round the other way than float64.
    exact = rows / want_scale
    clear = np.abs(exact - np.floor(exact) - 0.5) > 1e-4
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(codes[clear], want_codes[clear])
    back = (codes.astype(np.float64) - zero) * scale
    assert (np.abs(back - rows) <= scale * (0.5 if symmetric else 1.0) * (1 + 1e-4)).all()


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_static_quantization_stores_them(bits: int, per_channel: bool) -> None:
    w = skewed(bits)
    made = model("(float[n,96] x, float[96,6] w) => (y) { y = MatMul (x, w) }", w=w)
    feeds = [{"x": np.linspace(-1, 3, 96, dtype=np.float32)[None]}]
    one = QuantizeStatic(
        method="minmax", weight_bits=bits, per_channel=per_channel, calibration=feeds
    )
    assert one(made).modified
    (product,) = [node for node in made.graph if node.op_type == "MatMul"]
    activation, stored = (value.producer() for value in product.inputs if value is not None)
    assert activation is not None
    assert stored is not None
    codes, scale, zero = (weight(value) for value in stored.inputs)
    assert codes is not None
    assert scale is not None
    assert zero is not None
    grain = GRAINS["channel" if per_channel else "tensor"]
    want_codes, want_scale, _ = textbook(w.T.reshape(grain), bits, symmetric=True)
    np.testing.assert_allclose(np.reshape(scale, (-1, 1)), want_scale, rtol=1e-6)
    assert not zero.any()
    assert (np.abs(codes.T.reshape(grain) - want_codes) <= 1).all()
    assert (codes.T.reshape(grain) == want_codes).mean() > 0.99
    x_scale, x_zero = (weight(value) for value in activation.inputs[1:])
    assert x_scale is not None
    np.testing.assert_allclose(x_scale, 4 / 255, rtol=1e-6)
    assert x_zero == 64
