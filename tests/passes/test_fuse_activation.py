"""Activations folded into convolutions."""

from __future__ import annotations

import numpy as np
import pytest

from tests.passes import helpers
from tests.property.graphs import run
from trivium.compiler.passing import declining
from trivium.passes.fuse_activation import FuseActivation

WEIGHT = np.random.default_rng(1).standard_normal((4, 3, 3, 3)).astype(np.float32)
SIGNATURE = "(float[1, 3, 8, 8] x, float[4, 3, 3, 3] w) => (float[1, 4, 6, 6] y)"


@pytest.mark.parametrize(
    "activation",
    [
        "Relu(c)",
        "Sigmoid(c)",
        "Tanh(c)",
        "LeakyRelu <alpha = 0.3> (c)",
        "HardSigmoid (c)",
        "Clip (c, low, high)",
        "Clip (c, low)",
    ],
)
def test_fused_convolution_computes_the_same(activation: str) -> None:
    bounds = "low = Constant <value_float = -0.5> () high = Constant <value_float = 1.5> ()"
    made = helpers.model(f"{SIGNATURE} {{ {bounds} c = Conv (x, w) y = {activation} }}", w=WEIGHT)
    feed = helpers.feed(made)
    expected = run(made, feed)
    assert FuseActivation()(made).modified
    assert helpers.ops(made)["FusedConv"] == 1
    assert helpers.ops(made)["Conv"] == 0
    for want, have in zip(expected, run(made, feed), strict=True):
        np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-5)
    assert not FuseActivation()(made).modified


def test_a_convolution_that_is_read_twice_stays() -> None:
    made = helpers.model(f"{SIGNATURE} {{ c = Conv (x, w) r = Relu (c) y = Add (r, c) }}", w=WEIGHT)
    with declining() as notes:
        assert not FuseActivation()(made).modified
    assert [note.reason for note in notes] == ["something else reads the convolution"]


def test_a_bound_that_is_computed_stays() -> None:
    made = helpers.model(
        "(float[1, 3, 8, 8] x, float[4, 3, 3, 3] w, float low) => (float[1, 4, 6, 6] y)"
        "{ c = Conv (x, w) y = Clip (c, low) }",
        w=WEIGHT,
    )
    with declining() as notes:
        assert not FuseActivation()(made).modified
    assert [note.reason for note in notes] == ["its bounds are not constant"]
