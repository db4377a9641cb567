"""How weights are rounded: each method by what it minimizes, and in the graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tests.passes.helpers import model, ops
from tests.property.graphs import run, serialized
from trivium.compiler import model as models
from trivium.compiler import recipe, reference
from trivium.compiler.errors import BadInput
from trivium.compiler.evaluate import evaluate
from trivium.compiler.passing import declining, weight
from trivium.passes.quantization import block_sizes, blocks, gptq, moments, scaling, storing
from trivium.passes.quantization.blocks import Form
from trivium.passes.quantize_weights import QuantizeWeights

Array = np.ndarray[Any, np.dtype[Any]]

FORMS = [Form(b, s, sym) for b, s in ((2, 16), (3, 32), (4, 32), (8, 64)) for sym in (True, False)]


def draw(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def inputs(rows: int, channels: int, seed: int = 1) -> Array:
    """Activations as transformers have them: correlated, and large in a few channels."""
    mixed = draw(rows, channels, seed=seed) @ draw(channels, channels, seed=seed + 1)
    return (mixed * np.exp(draw(channels, seed=seed + 2))).astype(np.float32)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_search_never_loses_to_rounding(form: Form) -> None:
    matrix = draw(96, 24) ** 3
    nearest, searched = blocks.nearest(matrix, form), blocks.searched(matrix, form)
    assert np.linalg.norm(searched.restored() - matrix) < np.linalg.norm(
        nearest.restored() - matrix
    )
    assert nearest.codes.min() >= form.textbook.low
    assert nearest.codes.max() <= form.textbook.high
    for made in (nearest, searched):
        assert len(np.unique(made.codes)) <= 2**form.bits


@pytest.mark.parametrize("form", [form for form in FORMS if form.symmetric], ids=str)
def test_signed_scales_make_finer_steps(form: Form) -> None:
    matrix = draw(96, 24) ** 3
    made, nearest = blocks.signed(matrix, form), blocks.nearest(matrix, form)
    parts = [matrix[i : i + form.block_size] for i in range(0, 96, form.block_size)]
    for part, scale, wide in zip(parts, made.scales, nearest.scales, strict=True):
        extreme = np.take_along_axis(part, np.abs(part).argmax(axis=0)[None], axis=0)[0]
        grid = extreme / np.float32(-(2.0 ** (form.bits - 1)))
        codes = np.minimum(np.rint(part / grid), form.codes.high)
        # The scale that loses least for the codes of the grid that reaches the largest value.
        wanted = (codes * part).sum(axis=0) / np.square(codes).sum(axis=0)
        np.testing.assert_allclose(scale, wanted, rtol=1e-5)
        assert (np.abs(grid) < wide).all()
    assert np.linalg.norm(made.restored() - matrix) < np.linalg.norm(nearest.restored() - matrix)


def test_no_scale_is_negative_where_the_engine_takes_none() -> None:
    for backend, negative in (("onnxruntime", True), ("tensorrt", False)):
        made, _ = gated()
        assert QuantizeWeights(method="signed", min_elements=1, backend=backend)(made).modified
        scales = [weight(n.inputs[1]) for n in made.graph if n.op_type == "DequantizeLinear"]
        assert any((scale < 0).any() for scale in scales if scale is not None) == negative


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_hqq_lowers_its_norm(form: Form) -> None:
    matrix = draw(96, 24) ** 3

    def norm(made: blocks.Blocks) -> float:
        return float((np.abs(made.restored() - matrix) ** 0.7).sum())

    assert norm(blocks.half_quadratic(matrix, form)) < norm(blocks.nearest(matrix, form))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gptq_lowers_the_error_of_the_outputs(form: Form) -> None:
    matrix, x = draw(160, 24), inputs(500, 160)
    moment = x.T @ x

    def error(made: blocks.Blocks) -> float:
        return float(np.linalg.norm(x @ (made.restored() - matrix)))

    found = error(gptq.quantize(matrix, form, moment))
    assert found < 0.9 * error(blocks.searched(matrix, form, np.diag(moment)))


def test_gptq_of_unrelated_inputs_is_rounding() -> None:
    matrix, form = draw(64, 8), Form(4, 32, True)
    found = gptq.quantize(matrix, form, np.eye(64, dtype=np.float32))
    np.testing.assert_array_equal(found.codes, blocks.searched(matrix, form).codes)


@pytest.mark.parametrize("size", [1, 7, 128, 300])
def test_the_inverse_factor_is_numpys(size: int) -> None:
    x = inputs(2 * size, size)
    moment = x.T @ x
    damped = moment.astype(np.float64) + 0.01 * np.diag(moment).mean() * np.eye(size)
    want = np.linalg.cholesky(np.linalg.inv(damped)).T
    have = gptq.inverse_factor(moment, 0.01)
    np.testing.assert_allclose(have, want, rtol=1e-3, atol=1e-5 * np.abs(want).max())


def test_gptq_survives_inputs_that_never_occur() -> None:
    x = inputs(10, 64)
    x[:, 5:9] = 0
    found = gptq.quantize(draw(64, 8), Form(4, 32, True), x.T @ x)
    assert np.isfinite(found.restored()).all()


def test_bits_per_weight_count_scales_and_zero_points() -> None:
    assert Form(4, 128, True).bits_per_weight(256, 7) == 4.25
    assert Form(4, 128, False).bits_per_weight(256, 7) == 4 + 36 / 128
    assert Form(4, 128, True).bits_per_weight(688, 7) == pytest.approx(4 + 32 * 6 / 688)


# --- what is known of the inputs -----------------------------------------------------------------

CONVS = [
    "Conv (x, w)",
    "Conv <pads = [1,0,2,1], strides = [2,1]> (x, w)",
    'Conv <auto_pad = "SAME_UPPER", strides = [2,2]> (x, w)',
    'Conv <auto_pad = "SAME_LOWER"> (x, w)',
    "Conv <dilations = [2,1], group = 2> (x, w)",
    "Conv <group = 4, pads = [1,1,1,1]> (x, w)",
]


@pytest.mark.parametrize("text", CONVS)
def test_a_moment_gives_the_error_of_a_convolution(text: str) -> None:
    groups = int(text.partition("group = ")[2][:1] or 1)
    weight, change = draw(8, 4 // groups, 3, 2), draw(8, 4 // groups, 3, 2, seed=3) * 0.1
    made = model(
        f"(float[3,4,9,8] x, float[8,{4 // groups},3,2] w) => (y) {{ y = {text} }}", w=weight
    )
    x = draw(3, 4, 9, 8, seed=5)
    before = run(made, {"x": x})[0]
    made.graph.initializers["w"].const_value = ir.tensor(weight + change)
    off = run(made, {"x": x})[0] - before
    moment = moments.Moment()
    moment.update(made.graph[0], x)
    assert moment.total is not None
    each = change.reshape(groups, 8 // groups, -1)
    found = np.einsum("goi,gij,goj->", each, moment.total, each)
    assert found == pytest.approx(np.square(off).sum(), rel=1e-3)
    assert moment.rows == before[0, 0].size * 3


# --- moving factors ------------------------------------------------------------------------------

SITES = {
    "norm": "(float[2,8] x, float[8] a, float[8] b, float[8,5] w) => (y) "
    "{ h = LayerNormalization (x, a, b) y = MatMul (h, w) }",
    "rms, two readers": "(float[2,8] x, float[8] a, float[8,5] w, float[8,3] v) => (y, z) "
    "{ h = RMSNormalization (x, a) y = MatMul (h, w) z = MatMul (h, v) }",
    "gated": "(float[2,8] x, float[8,6] a, float[8,6] b, float[6,4] w) => (y) "
    "{ g = MatMul (x, a) s = Sigmoid (g) u = MatMul (x, b) m = Mul (s, u) y = MatMul (m, w) }",
    "bias": "(float[2,8] x, float[8,6] a, float[6] b, float[6,4] w) => (y) "
    "{ g = MatMul (x, a) s = Add (g, b) r = Relu (s) y = MatMul (r, w) }",
    "gemm": "(float[2,8] x, float[6,8] a, float[6] b, float[4,6] w) => (y) "
    "{ g = Gemm <transB = 1> (x, a, b) r = Relu (g) y = Gemm <transB = 1> (r, w) }",
    "conv": "(float[1,3,6,6] x, float[4,3,3,3] a, float[4] b, float[6,4,1,1] w) => (y) "
    "{ g = Conv (x, a, b) r = Relu (g) p = MaxPool <kernel_shape = [2,2]> (r) y = Conv (p, w) }",
    "depthwise": "(float[1,3,6,6] x, float[4,3,3,3] a, float[4,1,3,3] w) => (y) "
    "{ g = Conv (x, a) y = Conv <group = 4> (g, w) }",
    "grouped": "(float[1,3,6,6] x, float[4,3,3,3] a, float[6,2,3,3] w) => (y) "
    "{ g = Conv (x, a) y = Conv <group = 2> (g, w) }",
}


def stored_model(text: str) -> ir.Model:
    """A model whose inputs other than x are constants."""
    import onnx.parser

    from tests.passes.helpers import HEADER

    proto = onnx.parser.parse_model(f"{HEADER} g {text}")
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in proto.graph.input[1:]
    }
    return model(text, **{n: draw(*s, seed=i) + 0.5 for i, (n, s) in enumerate(shapes.items())})


@pytest.mark.parametrize("name", SITES)
def test_a_scaled_site_computes_the_same(name: str) -> None:
    made = stored_model(SITES[name])
    x = {"x": draw(*[int(size) for size in made.graph.inputs[0].shape or ()], seed=9)}  # type: ignore[arg-type]  # all known
    before = run(made, x)
    found = list(scaling.sites(made.graph))
    assert len(found) == 1
    found[0].scale(made.graph, np.exp(draw(found[0].channels, seed=4)))
    for want, have in zip(before, run(made, x), strict=True):
        np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-5)
    assert all(value.uses() for value in made.graph.initializers.values())


@pytest.mark.parametrize(
    "text",
    [
        # Read by something else; not homogeneous; made by two; fed by the caller.
        "(float[2,8] x, float[8,6] a, float[6,4] w) => (y, h) "
        "{ h = MatMul (x, a) y = MatMul (h, w) }",
        "(float[2,8] x, float[8,6] a, float[6,4] w) => (y) "
        "{ h = MatMul (x, a) s = Sigmoid (h) y = MatMul (s, w) }",
        "(float[2,6] x, float[6,6] a, float[6,4] w) => (y) "
        "{ h = MatMul (x, a) s = Add (h, x) y = MatMul (s, w) }",
        "(float[2,6] x, float[6,4] w) => (y) { y = MatMul (x, w) }",
    ],
)
def test_what_cannot_be_scaled_is_no_site(text: str) -> None:
    assert not list(scaling.sites(stored_model(text).graph))


# --- block sizes ---------------------------------------------------------------------------------


def test_block_sizes_keep_the_error_of_the_reference() -> None:
    smooth = np.ones((512, 64), np.float32) * draw(1, 64)
    rough = draw(512, 64) * np.exp(2 * draw(512, 1, seed=2))
    errors = [
        {size: block_sizes.error(one, Form(4, size, True)) for size in block_sizes.TIME}
        for one in (smooth, rough)
    ]
    sizes = block_sizes.choose(errors, [smooth.size, rough.size])
    assert sizes[0] == 256
    assert sizes[1] < 256
    assert sum(e[s] for e, s in zip(errors, sizes, strict=True)) <= sum(
        e[block_sizes.REFERENCE] for e in errors
    ) * (1 + 1e-9)


# --- in a graph ----------------------------------------------------------------------------------


def gated() -> tuple[ir.Model, list[dict[str, Array]]]:
    """A gated block behind a norm whose gains differ, as AWQ likes them."""
    made = model(
        """(float[N,64] x, float[64] s, float[64,128] g, float[64,128] u, float[128,64] d)
        => (float[N,64] y) {
          h = RMSNormalization (x, s)
          a = MatMul (h, g) b = Sigmoid (a) c = MatMul (h, u) m = Mul (b, c) y = MatMul (m, d)
        }""",
        s=np.exp(1.5 * draw(64, seed=5)), g=draw(64, 128) / 8, u=draw(64, 128, seed=1) / 8,
        d=draw(128, 64, seed=2),
    )  # fmt: skip
    data = [{"x": inputs(64, 64, seed=20 + i)} for i in range(3)]
    return made, data


def drift(before: Any, after: Any) -> float:
    want = np.concatenate([sample["y"] for sample in before.outputs])
    have = np.concatenate([sample["y"] for sample in after.outputs])
    return float(np.linalg.norm(have - want) / np.linalg.norm(want))


@pytest.mark.parametrize("bits", [3, 4])
def test_methods_with_data_are_nearer(bits: int) -> None:
    errors = {}
    for method in ("rtn", "awq", "gptq"):
        made, data = gated()
        before = reference.run_model(made, data)
        one = QuantizeWeights(
            method=method, bits=bits, block_size=32, min_elements=1, calibration=iter(data)
        )
        assert one(made).modified
        assert ops(made)["DequantizeLinear"] == 3
        errors[method] = drift(before, reference.run_model(made, data))
        after = serialized(made)
        again = QuantizeWeights(
            method=method, bits=bits, block_size=32, min_elements=1, calibration=data
        )
        assert not again(made).modified
        assert serialized(made) == after
    assert errors["gptq"] < errors["awq"] < errors["rtn"]


def test_data_is_asked_for_and_nan_is_survived() -> None:
    made, data = gated()
    with pytest.raises(BadInput, match="gptq needs representative inputs"):
        QuantizeWeights(method="gptq")(made)
    data[0]["x"][:] = np.nan
    assert QuantizeWeights(method="gptq", block_size=32, calibration=data)(made).modified
    assert ops(made)["DequantizeLinear"] == 3


def test_random_tokens_stand_in_for_missing_data() -> None:
    errors = {}
    for method in ("rtn", "gptq"):
        made = model(
            "(int64[batch, sequence] ids, float[50,128] table, float[128,64] w) => (y) "
            "{ h = Gather (table, ids) y = MatMul (h, w) }",
            table=inputs(50, 128), w=draw(128, 64, seed=9),
        )  # fmt: skip
        data = [{"ids": np.random.default_rng(0).integers(0, 50, (1, 32))}]
        before = reference.run_model(made, data)
        one = QuantizeWeights(method=method, bits=3, block_size=32, min_elements=4000)
        with declining() as notes:
            assert one(made).modified
        assert any("random tokens" in str(note) for note in notes) == (method == "gptq")
        errors[method] = drift(before, reference.run_model(made, data))
    assert errors["gptq"] < 0.8 * errors["rtn"]


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_large_models_are_written_the_same(
    method: str, symmetric: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = []
    source, data = gated()
    models.save(source, tmp_path / "source.onnx", external=True)
    for kept in (1 << 30, 0):
        monkeypatch.setattr(storing, "KEPT", kept)
        made = models.load(tmp_path / "source.onnx")
        one = QuantizeWeights(method=method, block_size=32, symmetric=symmetric, calibration=data)
        assert one(made).modified
        lazy = [isinstance(v.const_value, (ir.LazyTensor, ir.ExternalTensor))
                for name, v in made.graph.initializers.items() if "quantized" in name]  # fmt: skip
        assert lazy == [kept == 0] * 3
        models.save(made, tmp_path / f"{kept}.onnx", external=False)
        files.append((tmp_path / f"{kept}.onnx").read_bytes())
    assert files[0] == files[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "bits", "loss"), [("gptq", 4, 0.005), ("awq", 4, 0.01), ("gptq", 3, 0.02)]
)
def test_perplexity_of_a_trained_decoder(
    method: str, bits: int, loss: float, shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    from tokenizers import Tokenizer

    folder = shared_data("llm-shakespeare")
    text = shared_data("text/tinyshakespeare.txt").read_text()[:500_000]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = np.array(tokenizer.encode(text).ids[: 32 * 256], np.int64).reshape(32, 256)
    made = models.load(folder)
    recipe.run(recipe.read("normalize"), made)
    data = [{"input_ids": ids, "attention_mask": np.ones_like(ids)}]
    QuantizeWeights(method=method, bits=bits, calibration=data)(made)
    models.save(made, tmp_path / "m.onnx")
    found = evaluate(tmp_path / "m.onnx", folder / "val_ids.npy", metric="perplexity")
    assert found.value < 32.3728 * (1 + loss)
