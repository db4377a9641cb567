"""What is done before and around int8 so that it costs less, and other 8-bit forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import trivium
from tests.passes.helpers import model, ops
from tests.passes.test_quantize_static import (
    counts,
    digits_cnn,
    draw,
    error,
    feeds,
    optimized_ops,
    parse,
)
from trivium.compiler import model as models
from trivium.compiler import recipe, reference
from trivium.compiler.errors import BadInput
from trivium.compiler.passing import constant
from trivium.passes.adaround import AdaRound, learnt
from trivium.passes.equalize import Equalize
from trivium.passes.quantization import linear, sharing
from trivium.passes.quantize_dynamic import QuantizeDynamic
from trivium.passes.quantize_static import QuantizeStatic
from trivium.passes.smooth_quant import SmoothQuant


def outlying() -> tuple[ir.Model, list[dict[str, Any]]]:
    """A norm with a few large gains in front of products, as transformers have it."""
    gains = np.ones(64, np.float32)
    gains[[3, 40]] = 60.0
    made = model(
        """(float[N,64] x, float[64] g, float[64,32] w, float[64,16] v) => (float[N,32] y, z)
        { h = RMSNormalization (x, g) y = MatMul (h, w) z = MatMul (h, v) }""",
        g=gains, w=draw(64, 32), v=draw(64, 16, seed=1),
    )  # fmt: skip
    return made, feeds(32, 64)


def static_error(made: ir.Model, data: list[dict[str, Any]], before: Any, **options: Any) -> float:
    QuantizeStatic(method="minmax", calibration=data, **options)(made)
    return error(before, reference.run_model(made, data))


def test_smoothing_takes_outliers_off_the_activations() -> None:
    (plain, data), (smooth, _) = outlying(), outlying()
    before = reference.run_model(plain, data)
    assert SmoothQuant(calibration=iter(data))(smooth).modified
    assert error(before, reference.run_model(smooth, data)) < 1e-5
    assert not SmoothQuant(calibration=data)(smooth).modified
    assert static_error(smooth, data, before) < 0.5 * static_error(plain, data, before)


def test_smoothing_asks_for_data_and_leaves_what_is_excluded() -> None:
    made, data = outlying()
    with pytest.raises(BadInput, match="representative inputs"):
        SmoothQuant()(made)
    assert not SmoothQuant(exclude=("v",), calibration=data)(made).modified
    with pytest.raises(BadInput, match="share is 2"):
        recipe.instantiate(recipe.Step("smooth-quant", {"share": 2.0}), recipe.Context())


def residual() -> tuple[ir.Model, list[dict[str, Any]]]:
    """As where a norm comes last in its block: a sum reads it too, and a function lies between."""
    gains = np.ones(64, np.float32)
    gains[[3, 40]] = 60.0
    lift = draw(64, 96)
    lift[:, [5, 50]] *= 40
    made = model(
        """(float[N,64] x, float[64] g, float[64,96] w, float[96,64] v) => (float[N,64] y)
        { h = RMSNormalization (x, g) u = MatMul (h, w) a = Gelu (u) d = MatMul (a, v)
          y = Add (h, d) }""",
        g=gains, w=lift, v=draw(96, 64, seed=1),
    )  # fmt: skip
    return made, feeds(32, 64)


def test_smoothing_puts_a_multiplication_where_nothing_takes_the_factor() -> None:
    (plain, data), (smooth, _) = residual(), residual()
    before = reference.run_model(plain, data)
    assert not SmoothQuant(calibration=data)(residual()[0]).modified
    found = SmoothQuant(search=True, insert=True, calibration=data)
    assert found(smooth).modified
    assert ops(smooth)["Mul"] == 2
    assert error(before, reference.run_model(smooth, data)) < 1e-5
    assert not found(smooth).modified
    assert static_error(smooth, data, before) < 0.5 * static_error(plain, data, before)


@pytest.mark.parametrize("share", [0.0, 0.35, 0.8, 1.0])
def test_no_share_is_expected_to_lose_less_than_the_best(share: float) -> None:
    rng = np.random.default_rng(3)
    spread = np.geomspace(0.05, 20, 64)
    high = (rng.uniform(0.5, 1, 64) * spread).astype(np.float32)
    weights = [draw(64, 32), draw(64, 48, seed=1)]
    expected = sharing.Expected(sharing.Inputs(-high, high, np.square(high) / 3), weights)
    chosen = expected.error(expected.factor(expected.best()))
    assert chosen <= 1.01 * expected.error(expected.factor(share))
    assert chosen < expected.error(1.0)


def test_the_expected_error_is_the_error_of_the_products() -> None:
    spread = np.geomspace(0.05, 20, 64, dtype=np.float32)
    x = np.random.default_rng(0).uniform(-1, 1, (4096, 64)).astype(np.float32) * spread
    w = draw(64, 32)
    inputs = sharing.Inputs(x.min(axis=0), x.max(axis=0), np.square(x).mean(axis=0))
    expected = sharing.Expected(inputs, [w])
    for scale in (np.ones(64), expected.factor(0.6), expected.factor(1.0)):
        wide = scale.astype(np.float32)
        coarse = []
        for array, axis, symmetric in ((x / wide, None, False), (w * wide[:, None], 1, True)):
            grid = linear.grid("int8") if symmetric else linear.grid("uint8")
            step, zero = linear.fit(*linear.extremes(array, axis), grid, symmetric=symmetric)
            coarse.append(linear.dequantize(linear.quantize(array, step, zero, grid), step, zero))
        found = float(np.square(coarse[0] @ coarse[1] - x @ w).sum(axis=1).mean())
        assert found == pytest.approx(expected.error(scale), rel=0.15)


@pytest.mark.parametrize("heads", [4, 2])
def test_attention_hands_a_factor_on_only_if_its_channels_stay(heads: int) -> None:
    spread = np.geomspace(0.1, 10, heads * 8, dtype=np.float32)
    made = model(
        f"""(float[N,4,32] x, float[32,{heads * 8}] k, float[32,{heads * 8}] v, float[32,16] o)
        => (float[N,4,16] y)
        {{ a = MatMul (x, k) b = MatMul (x, v)
          c = Attention <q_num_heads = 4, kv_num_heads = {heads}> (x, a, b) y = MatMul (c, o) }}""",
        k=draw(32, heads * 8), v=draw(32, heads * 8, seed=1) * spread, o=draw(32, 16, seed=2),
    )  # fmt: skip
    data = [{"x": draw(1, 4, 32, seed=i)} for i in range(8)]
    before = reference.run_model(made, data)
    assert SmoothQuant(calibration=data, share=0.5)(made).modified == (heads == 4)
    assert error(before, reference.run_model(made, data)) < 1e-5


def uneven() -> ir.Model:
    """Two convolutions whose channels differ by orders of magnitude, to no effect."""
    spread = np.geomspace(0.01, 100, 16, dtype=np.float32)
    return parse(
        """g (float[N,3,8,8] x) => (float[N,8,6,6] y) {
          c = Conv <pads = [1,1,1,1]> (x, w, b) r = Relu (c) y = Conv (r, v)
        }""",
        w=draw(16, 3, 3, 3) * spread[:, None, None, None], b=draw(16, seed=1) * spread,
        v=draw(8, 16, 3, 3, seed=2) / spread[:, None, None],
    )  # fmt: skip


def test_equalization_saves_scales_for_whole_tensors() -> None:
    plain, equal, data = uneven(), uneven(), feeds(4, 3, 8, 8)
    before = reference.run_model(plain, data)
    assert Equalize()(equal).modified
    assert error(before, reference.run_model(equal, data)) < 1e-5
    assert not Equalize()(equal).modified
    found = static_error(equal, data, before, per_channel=False)
    assert found < 0.2 * static_error(plain, data, before, per_channel=False)


@pytest.mark.parametrize("text", ["Conv", "Gemm", "MatMul"])
def test_learnt_rounding_keeps_outputs_and_is_stored_as_it_is(text: str) -> None:
    def made() -> ir.Model:
        if text == "Conv":
            return parse(
                "g (float[N,8,6,6] x) => (y) { y = Conv <group = 2> (x, w, b) }",
                w=draw(8, 4, 3, 3), b=draw(8, seed=1),
            )  # fmt: skip
        if text == "Gemm":
            return parse(
                "g (float[N,48] x) => (y) { y = Gemm <transB = 1> (x, w, b) }",
                w=draw(24, 48), b=draw(24, seed=1),
            )  # fmt: skip
        return parse("g (float[N,48] x) => (y) { y = MatMul (x, w) }", w=draw(48, 24))

    shape = (8, 8, 6, 6) if text == "Conv" else (64, 48)
    # Neighbours that are alike, as in images: their errors add up, or cancel.
    data = [{"x": np.cumsum(one["x"], axis=-1, dtype=np.float32)} for one in feeds(*shape)]
    before = reference.run_model(made(), data)
    rounded = made()
    one = AdaRound(bits=4, steps=150, calibration=iter(data))
    assert one(rounded).modified
    assert not AdaRound(bits=4, calibration=data)(rounded).modified
    learned = error(before, reference.run_model(rounded, data))
    nearest = made()
    QuantizeStatic(policy="xla", weight_bits=4, method="minmax", calibration=data)(nearest)
    assert learned < 0.9 * error(before, reference.run_model(nearest, data))
    values = next(v for n, v in rounded.graph.initializers.items() if "rounded" in n)
    wanted = constant(values)
    QuantizeStatic(policy="xla", weight_bits=4, method="minmax", calibration=data)(rounded)
    restore = next(n for n in rounded.graph if n.op_type == "DequantizeLinear"
                   and n.inputs[0].is_initializer())  # type: ignore[union-attr]  # has inputs  # fmt: skip
    codes, scale = (constant(value) for value in restore.inputs[:2])
    assert codes is not None
    assert scale is not None
    assert wanted is not None
    axis = restore.attributes["axis"].as_int()
    wide = scale.reshape([-1 if i == axis else 1 for i in range(codes.ndim)])
    np.testing.assert_allclose(codes * wide, wanted, rtol=1e-5, atol=1e-7)


def test_rounding_up_or_down_is_all_that_is_learnt() -> None:
    rng = np.random.default_rng(0)
    steps, x = rng.uniform(-7, 7, (1, 6, 32)), rng.standard_normal((50, 32))
    found = learnt(steps, np.ones((1, 6, 1)), (x.T @ x)[None], 100)
    assert (np.abs(found - steps) < 1).all()
    np.testing.assert_array_equal(found, np.rint(found))


@pytest.mark.parametrize("policy", ["xla", "onnxruntime"])
def test_biases_make_up_for_the_mean(policy: str) -> None:
    data = [{"x": np.abs(one["x"]) + 1} for one in feeds(16, 1, 8, 8)]
    shifts = []
    for correction in (False, True):
        made = parse(
            "g (float[N,1,8,8] x) => (y) { y = Conv <pads = [0,0,0,0]> (x, w, b) }",
            w=draw(16, 1, 3, 3), b=draw(16, seed=1),
        )  # fmt: skip
        before = np.concatenate([o["y"] for o in reference.run_model(made, data).outputs])
        QuantizeStatic(
            policy=policy, method="minmax", weight_bits=3, bias_correction=correction,
            calibration=data,
        )(made)  # fmt: skip
        after = np.concatenate([o["y"] for o in reference.run_model(made, data).outputs])
        shifts.append(np.abs((after - before).mean(axis=(0, 2, 3))).max())
    assert shifts[1] < 0.3 * shifts[0]


@pytest.mark.parametrize("text", ["y = MatMul (x, w)", "y = Gemm <transB = 1> (x, w, b)"])
def test_dynamic_products_are_fused_and_near(text: str, tmp_path: Path) -> None:
    shape, data = (48, 64) if "transB" in text else (64, 48), feeds(5, 64)
    made = parse(
        f"g (float[N,64] x) => (float[N,48] y) {{ {text} }}", w=draw(*shape), b=draw(48, seed=2)
    )
    before = reference.run_model(made, data)
    assert QuantizeDynamic()(made).modified
    assert not QuantizeDynamic()(made).modified
    assert error(before, reference.run_model(made, data)) < 0.02
    assert optimized_ops(made, tmp_path)["DynamicQuantizeMatMul"] == 1


def test_dynamic_products_share_their_input() -> None:
    made, data = outlying()
    before = reference.run_model(made, data)
    assert QuantizeDynamic()(made).modified
    assert ops(made)["DynamicQuantizeLinear"] == 1
    assert ops(made)["MatMulInteger"] == 2
    assert error(before, reference.run_model(made, data)) < 0.2


@pytest.mark.parametrize(("name", "most"), [("float8e4m3fn", 448), ("float8e5m2", 57344)])
def test_eight_bit_floats_reach_the_top_of_their_range(name: str, most: float) -> None:
    made, data = digits_cnn(), feeds(8, 1, 8, 8)
    before = reference.run_model(made, data)
    one = QuantizeStatic(method="minmax", activation=name, policy="xla", calibration=data)
    assert one(made).modified
    assert not one(made).modified
    assert counts(made)["DequantizeLinear"] > 4
    assert error(before, reference.run_model(made, data)) < {448: 0.1, 57344: 0.2}[int(most)]
    for node in made.graph:
        if node.op_type == "DequantizeLinear" and node.inputs[0].is_initializer():  # type: ignore[union-attr]  # has inputs
            codes = constant(node.inputs[0])
            assert codes is not None
            assert np.abs(codes.astype(np.float32)).max() == most


def test_onnxruntime_keeps_relu_before_eight_bit_floats(tmp_path: Path) -> None:
    models.save(digits_cnn(), tmp_path / "m.onnx")
    artifact = trivium.compile(
        tmp_path / "m.onnx", recipe="fp8", calibration=feeds(8, 1, 8, 8), out=tmp_path / "out"
    )
    assert artifact.manifest["verification"]["status"] == "passed"
    assert artifact.manifest["verification"]["max_rel_error"] < 0.2


@pytest.mark.parametrize(
    "options",
    [
        {"symmetric": "no", "method": "minmax"},
        {"weight_bits": 4, "method": "minmax"},
        {"method": "entropy"},
        {"method": "minmax", "precision": ["a=int4"]},
    ],
)
def test_contradictory_options_are_named(options: dict[str, Any]) -> None:
    step = recipe.Step("quantize-static", {"activation": "float8e4m3fn", **options})
    with pytest.raises(BadInput, match="contradicts activation = 'float8e4m3fn'"):
        recipe.instantiate(step, recipe.Context())
