"""BatchNormalization, constants and pads into the linear operator next to them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.passes.helpers import check, declined, model
from trivium.passes.fold_affine import FoldAffine
from trivium.passes.fold_batchnorm import FoldBatchNorm
from trivium.passes.fold_pad import FoldPad

RNG = np.random.default_rng(0)
CONV = "(float[1,2,5,5] x, float[4,2,3,3] w, {more}) => (float[1,4,H,W] y) {{ {body} }}"


def weights(*shape: int) -> Any:
    return RNG.standard_normal(shape).astype(np.float32)


def normalization(width: int) -> dict[str, Any]:
    positive = RNG.random(width).astype(np.float32) + 0.5
    return {"s": weights(width), "b": weights(width), "m": weights(width), "v": positive}


@pytest.mark.parametrize("biased", [False, True])
def test_batchnorm_goes_into_conv(biased: bool) -> None:
    text = CONV.format(
        more="float[4] c, float[4] s, float[4] b, float[4] m, float[4] v",
        body=f"t = Conv(x, w{', c' if biased else ''}) y = BatchNormalization(t, s, b, m, v)",
    )
    made = model(text, w=weights(4, 2, 3, 3), c=weights(4), **normalization(4))
    assert check(FoldBatchNorm(), made) == {"Conv": 1}


@pytest.mark.parametrize("group", [1, 2])
def test_batchnorm_goes_into_grouped_transposed_conv(group: int) -> None:
    text = (
        "(float[1,4,5,5] x, float[4,3,3,3] w, float[N] s, float[N] b, float[N] m, float[N] v)"
        " => (float[1,M,H,W] y)"
        f"{{ t = ConvTranspose<group={group}>(x, w) y = BatchNormalization(t, s, b, m, v) }}"
    )
    made = model(text, w=weights(4, 3, 3, 3), **normalization(3 * group))
    assert check(FoldBatchNorm(), made) == {"ConvTranspose": 1}


@pytest.mark.parametrize("turned", [0, 1])
def test_batchnorm_goes_into_gemm_with_alpha_and_beta(turned: int) -> None:
    shape = (4, 3) if turned else (3, 4)
    text = (
        f"(float[2,3] x, float[{shape[0]},{shape[1]}] w, float[4] c,"
        " float[4] s, float[4] b, float[4] m, float[4] v) => (float[2,4] y)"
        f"{{ t = Gemm<transB={turned}, alpha=0.5, beta=2.0>(x, w, c)"
        " y = BatchNormalization(t, s, b, m, v) }"
    )
    made = model(text, w=weights(*shape), c=weights(4), **normalization(4))
    assert check(FoldBatchNorm(), made) == {"Gemm": 1}


def test_convolution_that_is_an_output_stays() -> None:
    text = (
        "(float[1,2,5,5] x, float[4,2,3,3] w, float[4] s, float[4] b, float[4] m, float[4] v)"
        " => (float[1,4,3,3] t, float[1,4,3,3] y)"
        "{ t = Conv(x, w) y = BatchNormalization(t, s, b, m, v) }"
    )
    made = model(text, w=weights(4, 2, 3, 3), **normalization(4))
    notes = declined(FoldBatchNorm(), made)
    assert [(note.where, note.reason) for note in notes] == [("t", "something else reads it")]


def test_shared_weight_stays() -> None:
    text = (
        "(float[1,2,5,5] x, float[4,2,3,3] w, float[4] s, float[4] b, float[4] m, float[4] v)"
        " => (float[1,4,3,3] y, float[1,4,3,3] z)"
        "{ t = Conv(x, w) y = BatchNormalization(t, s, b, m, v) z0 = Conv(x, w) z = Relu(z0) }"
    )
    made = model(text, w=weights(4, 2, 3, 3), **normalization(4))
    assert "share" in declined(FoldBatchNorm(), made)[0].reason


@pytest.mark.parametrize(
    "body",
    [
        "t = Conv(x, w) y = Mul(t, k)",
        "t = Conv(x, w) y = Add(k, t)",
        "t = Conv(x, w) y = Sub(t, k)",
        "t = Conv(x, w) y = Sub(k, t)",
        "t = Conv(x, w) y = Div(t, k)",
        "t = Conv(x, w) u = Mul(t, k) y = Add(u, k)",
    ],
)
def test_constants_go_into_conv(body: str) -> None:
    made = model(
        CONV.format(more="float[4,1,1] k", body=body),
        w=weights(4, 2, 3, 3),
        k=weights(4, 1, 1) + 3,
    )
    assert check(FoldAffine(), made) == {"Conv": 1}


def test_constant_along_the_width_stays() -> None:
    text = CONV.format(more="float[3] k", body="t = Conv(x, w) y = Mul(t, k)")
    made = model(text, w=weights(4, 2, 3, 3), k=weights(3))
    assert "not one for each channel" in declined(FoldAffine(), made)[0].reason


def test_constant_that_widens_a_product_stays() -> None:
    text = (
        "(float[1,3] x, float[3,1] w, float[4] k) => (float[1,4] y){ t = Gemm(x, w) y = Mul(t, k) }"
    )
    assert declined(FoldAffine(), model(text, w=weights(3, 1), k=weights(4)))


def test_scale_goes_into_matmul_and_shift_does_not() -> None:
    text = (
        "(float[2,5,3] x, float[3,4] w, float[4] k) => (float[2,5,4] y)"
        "{ t = MatMul(x, w) u = Mul(k, t) y = Add(u, k) }"
    )
    made = model(text, w=weights(3, 4), k=weights(4))
    assert check(FoldAffine(), made) == {"MatMul": 1, "Add": 1}


def test_division_of_a_constant_by_a_convolution_stays() -> None:
    text = CONV.format(more="float[1] k", body="t = Conv(x, w) y = Div(k, t)")
    declined(FoldAffine(), model(text, w=weights(4, 2, 3, 3), k=weights(1)))


def test_large_weight_is_scaled_when_it_is_read() -> None:
    text = (
        "(float[1,600] x, float[600,600] w, float[600] k) => (float[1,600] y)"
        "{ t = MatMul(x, w) y = Mul(t, k) }"
    )
    made = model(text, w=weights(600, 600) / 25, k=weights(600))
    assert check(FoldAffine(), made) == {"MatMul": 1}
    tensor = next(iter(made.graph)).inputs[1].const_value  # type: ignore[union-attr]  # there is one
    assert type(tensor).__name__ == "LazyTensor"


PAD = "(float[1,2,5,5] x, int64[8] p, float[4,2,3,3] w) => (float[1,4,H,W] y) {{ {body} }}"


@pytest.mark.parametrize("pads", ["", "<pads=[1,0,1,0]>"])
def test_pad_goes_into_conv(pads: str) -> None:
    text = PAD.format(body=f"t = Pad(x, p) y = Conv{pads}(t, w)")
    made = model(text, p=np.array([0, 0, 1, 2, 0, 0, 0, 1]), w=weights(4, 2, 3, 3))
    assert check(FoldPad(), made) == {"Conv": 1}


def test_pad_with_two_readers_stays_for_the_other() -> None:
    text = (
        "(float[1,2,5,5] x, int64[8] p, float[4,2,3,3] w) => (float[1,4,H,W] y, float[1,2,A,B] t)"
        "{ t = Pad(x, p) y = Conv(t, w) }"
    )
    made = model(text, p=np.array([0, 0, 1, 1, 0, 0, 1, 1]), w=weights(4, 2, 3, 3))
    assert check(FoldPad(), made) == {"Conv": 1, "Pad": 1}


@pytest.mark.parametrize(
    ("attributes", "pads"),
    [('<mode="reflect">', [0, 0, 1, 1, 0, 0, 1, 1]), ("", [0, 0, -1, 0, 0, 0, 0, 0])],
)
def test_pad_of_another_kind_stays(attributes: str, pads: list[int]) -> None:
    text = PAD.format(body=f"t = Pad{attributes}(x, p) y = Conv(t, w)")
    assert declined(FoldPad(), model(text, p=np.array(pads), w=weights(4, 2, 3, 3)))
