"""Expansions of activations, normalizations and attention, as exporters write them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from tests.passes.helpers import check, declined, feed, model, ops
from tests.property.graphs import run
from trivium.passes.fuse_bias import FuseBias
from trivium.passes.recognize_activations import RecognizeActivations
from trivium.passes.recognize_attention import RecognizeAttention
from trivium.passes.recognize_normalization import RecognizeNormalization
from trivium.passes.recognize_rotary import RecognizeRotary
from trivium.passes.widen_attention_mask import WidenAttentionMask

RNG = np.random.default_rng(0)


def number(name: str, value: float) -> str:
    return f"{name} = Constant<value=float {{{value}}}>() "


ROOT = number("r", 1.4142135) + number("o", 1.0) + number("h", 0.5)
TANH = number("a", 0.044715) + number("c", 0.7978845608) + number("o", 1.0) + number("h", 0.5)

ACTIVATIONS = {
    "torch erf": (ROOT + "d = Div(x, r) e = Erf(d) s = Add(e, o) m = Mul(x, s) y = Mul(m, "
            "h)", "Gelu"),
    "half first": (ROOT + "g = Mul(x, h) d = Div(x, r) e = Erf(d) s = Add(o, e) y = Mul(g, "
            "s)", "Gelu"),
    "half in the middle": (
        ROOT + "d = Div(x, r) e = Erf(d) s = Add(e, o) g = Mul(h, s) y = Mul(g, x)",
        "Gelu",
    ),
    "tanh with Pow": (
        TANH + number("t", 3.0) + "p = Pow(x, t) q = Mul(a, p) u = Add(x, q) v = Mul(c, u) "
        "w = Tanh(v) s = Add(w, o) g = Mul(h, x) y = Mul(g, s)",
        "Gelu",
    ),
    "tanh with squares": (
        TANH + "p = Mul(x, x) q = Mul(a, p) u = Add(o, q) k = Mul(c, x) v = Mul(k, u) "
        "w = Tanh(v) s = Add(w, o) g = Mul(h, x) y = Mul(g, s)",
        "Gelu",
    ),
    "silu": ("s = Sigmoid(x) y = Mul(x, s)", "Swish"),
    "quick gelu": (number("k", 1.702) + "t = Mul(k, x) s = Sigmoid(t) y = Mul(s, x)", "Swish"),
    "hard swish": (
        number("t", 3.0) + number("z", 0.0) + number("s", 6.0)
        + "a = Add(x, t) c = Clip(a, z, s) m = Mul(x, c) y = Div(m, s)",
        "HardSwish",
    ),
    "hard sigmoid": ("s = HardSigmoid<alpha=0.16666667, beta=0.5>(x) y = Mul(x, s)", "HardSwish"),
    "mish": ("p = Softplus(x) t = Tanh(p) y = Mul(x, t)", "Mish"),
}  # fmt: skip


@pytest.mark.parametrize("form", ACTIVATIONS)
def test_activation(form: str) -> None:
    body, expected = ACTIVATIONS[form]
    made = model(f"(float[2,5] x) => (float[2,5] y) {{ {body} }}")
    left = check(RecognizeActivations(), made)
    assert left[expected] == 1
    assert sum(left.values()) == 1


@pytest.mark.parametrize(
    "body",
    [
        ROOT + "d = Div(x, h) e = Erf(d) s = Add(e, o) m = Mul(x, s) y = Mul(m, h)",
        ROOT + "d = Div(x, r) e = Erf(d) s = Add(e, o) y = Mul(x, s)",
        "s = Sigmoid(x) t = Mul(x, s) y = Mul(t, z)",
    ],
)
def test_other_constants_or_factors_are_no_activation(body: str) -> None:
    declined(
        RecognizeActivations(), model(f"(float[2,5] x, float[5] z) => (float[2,5] y) {{ {body} }}")
    )


def test_activation_whose_gate_is_an_output() -> None:
    made = model("(float[2,5] x) => (float[2,5] s, float[2,5] y) { s = Sigmoid(x) y = Mul(x, s) }")
    assert check(RecognizeActivations(), made) == {"Swish": 1, "Sigmoid": 1}


def test_activation_in_a_body() -> None:
    made = model(
        "(bool c, float[2,5] x) => (float[2,5] y) { y = If(c) <"
        "then_branch: graph = t () => (float[2,5] a) { s = Sigmoid(x) a = Mul(x, s) },"
        "else_branch: graph = e () => (float[2,5] b) { b = Neg(x) }> }"
    )
    assert RecognizeActivations()(made).modified
    assert ops(made)["Swish"] == 1


# --- normalization --------------------------------------------------------------------------------

AXES = "n = Constant<value=int64[1] {-1}>() "
EPS = number("e", 1e-5) + number("two", 2.0)
MEAN = AXES + EPS + "m = ReduceMean(x, n) d = Sub(x, m) "
NORMALIZATIONS = {
    "torch": (MEAN + "q = Pow(d, two) v = ReduceMean(q, n) a = Add(v, e) r = Sqrt(a) z = Div(d, "
            "r) s = Mul(z, w) y = Add(s, b)", {"LayerNormalization": 1}),
    "reciprocal": (MEAN + "q = Mul(d, d) v = ReduceMean(q, n) a = Add(e, v) r = Sqrt(a) i = "
            "Reciprocal(r) z = Mul(i, d) s = Mul(w, z) y = Add(b, s)", {"LayerNormalization": 1}),
    "no bias": (MEAN + "q = Mul(d, d) v = ReduceMean(q, n) a = Add(e, v) r = Sqrt(a) z = Div(d, "
            "r) y = Mul(w, z)", {"LayerNormalization": 1}),
    "rms": (AXES + EPS + "q = Pow(x, two) v = ReduceMean(q, n) a = Add(v, e) r = Sqrt(a) i = "
            "Reciprocal(r) z = Mul(x, i) y = Mul(w, z)", {"RMSNormalization": 1}),
    "rms by division": (AXES + EPS + number("o", 1.0) + "q = Mul(x, x) v = ReduceMean(q, n) a = "
            "Add(v, e) r = Sqrt(a) i = Div(o, r) z = Mul(x, i) y = Mul(z, "
            "w)", {"RMSNormalization": 1}),
}  # fmt: skip


@pytest.mark.parametrize("form", NORMALIZATIONS)
def test_normalization(form: str) -> None:
    body, expected = NORMALIZATIONS[form]
    made = model(
        f"(float[N,3,8] x, float[8] w, float[8] b) => (float[N,3,8] y) {{ {body} }}",
        w=RNG.standard_normal(8).astype(np.float32),
        b=RNG.standard_normal(8).astype(np.float32),
    )
    left = check(RecognizeNormalization(), made)
    assert {name: left[name] for name in expected} == expected
    assert left["Sqrt"] == 0


def test_normalization_over_the_middle_stays() -> None:
    body = NORMALIZATIONS["rms"][0].replace("{-1}", "{1}")
    declined(
        RecognizeNormalization(),
        model(f"(float[2,3,8] x, float[8] w) => (float[2,3,8] y) {{ {body} }}", w=np.ones(8, "f")),
    )


def test_scale_of_unknown_shape_stays() -> None:
    body = NORMALIZATIONS["rms"][0]
    made = model(f"(float[2,3,8] x, float[K] w) => (float[2,3,8] y) {{ {body} }}")
    assert "shape" in declined(RecognizeNormalization(), made)[0].reason


def test_normalized_value_that_is_an_output_stays() -> None:
    body = NORMALIZATIONS["rms"][0]
    made = model(f"(float[2,3,8] x, float[8] w) => (float[2,3,8] y, float[2,3,8] z) {{ {body} }}")
    assert "without its scale" in declined(RecognizeNormalization(), made)[0].reason


# --- attention ------------------------------------------------------------------------------------

HEADS = "float[2,4,S,8] q, float[2,4,T,8] k, float[2,4,T,8] v"
TURN = "t = Transpose<perm=[0,1,3,2]>(k) "
SCALE = number("s", 0.25)
FORMS = {
    "scale at the scores": SCALE + TURN + "a = MatMul(q, t) b = Mul(a, s) p = "
            "Softmax<axis=-1>(b) y = MatMul(p, v)",
    "division": number("s", 4.0) + TURN + "a = MatMul(q, t) b = Div(a, s) p = "
            "Softmax<axis=3>(b) y = MatMul(p, v)",
    "scale at both": SCALE + TURN + "u = Mul(q, s) w = Mul(t, s) a = MatMul(u, w) p = "
            "Softmax<axis=-1>(a) y = MatMul(p, v)",
    "no scale": TURN + "a = MatMul(q, t) p = Softmax<axis=-1>(a) y = MatMul(p, v)",
    "added mask": SCALE + TURN + "a = MatMul(q, t) b = Mul(a, s) c = Add(b, m) p = "
            "Softmax<axis=-1>(c) y = MatMul(p, v)",
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_attention(form: str) -> None:
    masked = ", float[2,1,S,T] m" if "mask" in form else ""
    made = model(f"({HEADS}{masked}) => (float[2,4,S,8] y) {{ {FORMS[form]} }}")
    left = check(RecognizeAttention(), made)
    assert left["Attention"] == 1
    assert left["Softmax"] == left["MatMul"] == left["Transpose"] == 0


def test_attention_with_a_causal_constant() -> None:
    causal = np.tril(np.ones((1, 1, 3, 3), bool))
    body = (
        SCALE + number("f", -3.4e38) + TURN + "a = MatMul(q, t) b = Mul(a, s) "
        "c = Where(m, b, f) p = Softmax<axis=-1>(c) y = MatMul(p, v)"
    )
    text = (
        "(float[2,4,3,8] q, float[2,4,3,8] k, float[2,4,3,8] v, bool[1,1,3,3] m)"
        f" => (float[2,4,3,8] y) {{ {body} }}"
    )
    assert check(RecognizeAttention(), model(text, m=causal))["Attention"] == 1
    causal[..., 1, :] = False
    assert "all keys of a row" in declined(RecognizeAttention(), model(text, m=causal))[0].reason


def test_attention_with_repeated_heads() -> None:
    body = (
        "n = Constant<value=int64[1] {2}>() w = Constant<value=int64[5] {2,2,2,3,8}>() "
        "g = Constant<value=int64[4] {2,4,3,8}>() "
        "k1 = Unsqueeze(k, n) k2 = Expand(k1, w) k3 = Reshape(k2, g) "
        "v1 = Unsqueeze(v, n) v2 = Expand(v1, w) v3 = Reshape(v2, g) "
        "t = Transpose<perm=[0,1,3,2]>(k3) a = MatMul(q, t) p = Softmax<axis=-1>(a) y = "
        "MatMul(p, v3)"
    )
    made = model(
        f"(float[2,4,3,8] q, float[2,2,3,8] k, float[2,2,3,8] v) => (float[2,4,3,8] y){{ {body} }}"
    )
    assert check(RecognizeAttention(), made) == {"Attention": 1}


def test_mask_that_may_be_shorter_than_the_keys_stays() -> None:
    made = model(f"({HEADS}, float[2,1,S,U] m) => (float[2,4,S,8] y) {{ {FORMS['added mask']} }}")
    assert "not known to be that of the keys" in declined(RecognizeAttention(), made)[0].reason


def test_probabilities_that_are_an_output_stay() -> None:
    made = model(f"({HEADS}) => (float[2,4,S,8] y, float[2,4,S,T] p) {{ {FORMS['no scale']} }}")
    assert "probabilities" in declined(RecognizeAttention(), made)[0].reason


def test_mask_gets_the_rows_that_onnxruntime_wants() -> None:
    text = f"({HEADS}, float[2,1,1,T] m) => (float[2,4,S,8] y) {{ y = Attention(q, k, v, m) }}"
    wide = f"({HEADS}, float[2,1,1,T] m) => (float[2,4,S,8] y) {{ {FORMS['added mask']} }}"
    made, plain = model(text.replace("Attention(", "Attention<scale=0.25>(")), model(wide)
    assert WidenAttentionMask()(made).modified
    assert not WidenAttentionMask()(made).modified
    np.testing.assert_allclose(run(made, feed(made)), run(plain, feed(plain)), rtol=1e-5, atol=1e-5)


# --- rotary embedding -----------------------------------------------------------------------------

ROTARY = (
    "l = Constant<value=int64[1] {0}>() h = Constant<value=int64[1] {4}>() "
    "u = Constant<value=int64[1] {9223372036854775807}>() n = Constant<value=int64[1] {3}>() "
    "i = Constant<value=int64[1] {1}>() "
    "e = Concat<axis=-1>(f, g) c = Cos(e) s = Sin(e) cu = Unsqueeze(c, i) su = Unsqueeze(s, i) "
    "a = Slice(x, l, h, n) b = Slice(x, h, u, n) m = Neg(b) r = Concat<axis=-1>(m, a) "
    "p = Mul(x, cu) q = Mul(r, su) y = Add(p, q)"
)


def test_rotary_embedding() -> None:
    made = model(
        "(float[B,2,S,8] x, float[B,S,4] f) => (float[B,2,S,8] y)"
        f"{{ {ROTARY.replace('(f, g)', '(f, f)')} }}"
    )
    left = check(RecognizeRotary(), made)
    assert left == {"RotaryEmbedding": 1, "Cos": 1, "Sin": 1}


@pytest.mark.parametrize(
    ("angles", "reason"),
    [
        ("float[B,S,4] f, float[B,S,4] g", "angles that repeat"),
        ("float[1,S,4] f", "angles of batch 1"),
    ],
)
def test_rotary_embedding_by_other_angles_stays(angles: str, reason: str) -> None:
    body = ROTARY if "g" in angles else ROTARY.replace("(f, g)", "(f, f)")
    made = model(f"(float[B,2,S,8] x, {angles}) => (float[B,2,S,8] y) {{ {body} }}")
    assert any(reason in note.reason for note in declined(RecognizeRotary(), made))


# --- bias -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [[4], [1, 4], [2, 4], [1, 1], [1]])
def test_bias_goes_into_gemm(shape: list[int]) -> None:
    made = model(
        f"(float[2,3] x, float[3,4] w, float{shape} b) => (float[2,4] y)"
        "{ t = MatMul(x, w) y = Add(b, t) }"
    )
    assert check(FuseBias(), made) == {"Gemm": 1}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("(float[1,3] x, float[3,4] w, float[2,4] b) => (float[2,4] y) { t = MatMul(x, w) y = "
            "Add(t, b) }", "widen"),
        ("(float[2,3] x, float[3,4] w, float[4] b) => (float[2,4] t, float[2,4] y) { t = "
            "MatMul(x, w) y = Add(t, b) }", "something else reads"),
        ("(float[2,3] x, float[3,4] w) => (float[2,4] y) { t = MatMul(x, w) y = Add(t, t) }", ""),
        ("(float[1,2,3] x, float[3,4] w, float[4] b) => (float[1,2,4] y) { t = MatMul(x, w) y = "
            "Add(t, b) }", ""),
    ],
)  # fmt: skip
def test_bias_stays(text: str, reason: str) -> None:
    made: ir.Model = model(text)
    assert any(reason in note.reason for note in declined(FuseBias(), made)) or not reason
