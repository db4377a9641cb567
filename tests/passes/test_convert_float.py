"""Half precision: where the Casts are, what stays float32, and how close it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings

import trivium
from tests.property import graphs
from trivium.compiler import model, prepare, recipe, reference, samples
from trivium.compiler.errors import Unsupported
from trivium.compiler.passing import declining
from trivium.compiler.types import Workload
from trivium.passes.convert_float import ConvertFloat

HALF = ir.DataType.FLOAT16


def parse(text: str, **weights: np.ndarray[Any, Any]) -> ir.Model:
    proto = onnx.parser.parse_model(f'<ir_version: 11, opset_import: ["" : 24]> {text}')
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    made = ir.from_proto(proto)
    recipe.run(recipe.read("normalize"), made)
    return made


def draw(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return (np.random.default_rng(seed).standard_normal(shape) * 0.2).astype(np.float32)


def counts(made: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in made.graph)


def check(made: ir.Model) -> None:
    onnx.checker.check_model(ir.to_proto(made), full_check=True)


def mlp() -> ir.Model:
    return parse(
        """g (float[2,16] x) => (float[2,8] y) {
          h = Gemm (x, w1, b1) r = Relu (h) y = Gemm (r, w2, b2) }""",
        w1=draw(16, 32), b1=draw(32, seed=1), w2=draw(32, 8, seed=2), b2=draw(8, seed=3),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_casts_stand_at_the_borders_only(dtype: str) -> None:
    made, data = mlp(), [{"x": draw(2, 16, seed=9)}]
    before = reference.run_model(made, data).outputs[0]["y"]
    signature = model.signature(made)
    one = ConvertFloat(dtype=dtype)
    assert one(made).modified
    check(made)
    assert counts(made)["Cast"] == 2
    assert model.signature(made) == signature
    half = {"float16": HALF, "bfloat16": ir.DataType.BFLOAT16}[dtype]
    assert {value.dtype for value in made.graph.initializers.values()} == {half}
    after = reference.run_model(made, data).outputs[0]["y"]
    assert np.abs(after - before).max() < {"float16": 2e-3, "bfloat16": 2e-2}[dtype]
    assert not one(made).modified


def test_inputs_and_outputs_may_be_half_too() -> None:
    made = mlp()
    ConvertFloat(keep_io=False)(made)
    check(made)
    assert counts(made)["Cast"] == 0
    inputs, outputs = model.signature(made)
    assert inputs[0].dtype == outputs[0].dtype == "float16"


def test_kept_operators_are_cast_around_once() -> None:
    made = parse(
        """g (float[2,16] x) => (y, z) {
          a = MatMul (x, w) e = Exp (a) f = Transpose (e) l = Log (a) y = MatMul (f, a)
          z = MatMul (l, w) }""",
        w=draw(16, 16),
    )
    with declining():
        ConvertFloat()(made)
    check(made)
    by_name = {value.name: value for node in made.graph for value in node.outputs}
    # What computes nothing stays with what it follows; one Cast serves Exp and Log.
    assert by_name["f"].dtype == by_name["e"].dtype == ir.DataType.FLOAT
    casts = [node for node in made.graph if node.op_type == "Cast"]
    assert sum(by_name["a"] is node.inputs[0] for node in casts) == 1
    assert len({(node.inputs[0], node.outputs[0].dtype) for node in casts}) == len(casts)


def test_a_constant_beyond_the_range_is_named() -> None:
    wide = draw(16, 16)
    wide[0, 0] = 70000
    made = parse(
        "g (float[2,16] x) => (y) { h = MatMul (x, wide) y = MatMul (h, w) }",
        wide=wide, w=draw(16, 16, seed=1),
    )  # fmt: skip
    with declining() as declined:
        ConvertFloat()(made)
    check(made)
    (note,) = declined
    assert (note.where, note.reason) == (
        "wide", "holds 70000, beyond float16; its readers stay float32"
    )  # fmt: skip
    assert made.graph.initializers["wide"].dtype == ir.DataType.FLOAT
    with declining() as declined:
        ConvertFloat(dtype="bfloat16")(
            parse("g (float[2,16] x) => (y) { y = MatMul (x, w) }", w=wide)
        )
    assert not declined


def test_bodies_and_what_they_capture_stay_float() -> None:
    made = parse(
        """g (float[2,4] x, bool c) => (y) {
          h = MatMul (x, w)
          o = If (c) <then_branch = t () => (a) { a = Add (h, h) },
                      else_branch = e () => (b) { b = Mul (h, h) }>
          y = MatMul (o, w) }""",
        w=draw(4, 4),
    )
    data = [{"x": draw(2, 4, seed=1), "c": np.array(True)}]
    before = reference.run_model(made, data).outputs[0]["y"]
    assert ConvertFloat()(made).modified
    check(made)
    np.testing.assert_allclose(reference.run_model(made, data).outputs[0]["y"], before, atol=2e-3)


def test_quantized_graphs_take_half_precision() -> None:
    from trivium.passes.quantize_weights import QuantizeWeights

    made, data = mlp(), [{"x": draw(2, 16, seed=9)}]
    QuantizeWeights(min_elements=1, block_size=16, bits=8)(made)
    before = reference.run_model(made, data).outputs[0]["y"]
    ConvertFloat()(made)
    check(made)
    assert counts(made)["Cast"] == 2
    np.testing.assert_allclose(reference.run_model(made, data).outputs[0]["y"], before, atol=2e-3)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(made=graphs.models())
def test_random_graphs_stay_valid_and_close(made: ir.Model) -> None:
    recipe.run(recipe.read("normalize"), made)
    feed = graphs.feeds(made)
    expected = graphs.run(made, feed)
    one = ConvertFloat()
    one(made)
    check(made)
    for want, have in zip(expected, graphs.run(made, feed), strict=True):
        scale = max(1.0, float(np.abs(want).max(initial=0)))
        np.testing.assert_allclose(have, want, atol=0.05 * scale)
    after = graphs.serialized(made)
    assert not one(made).modified
    assert graphs.serialized(made) == after


def test_a_real_network(shared_data: Callable[[str], Path]) -> None:
    made = model.load(shared_data("models/cifar_resnet20.onnx"))
    data = samples.seeded(made, Workload())
    before = reference.run_model(made, data).outputs[0]
    prepare.optimize(made, "fp16")
    check(made)
    assert counts(made)["Cast"] <= 2 + 2 * counts(made)["BatchNormalization"]
    after = reference.run_model(made, data).outputs[0]
    for name, want in before.items():
        assert np.abs(after[name] - want).max() < 1e-2 * np.abs(want).max()


def test_this_cpu_refuses_bfloat16_by_name(tmp_path: Path) -> None:
    model.save(mlp(), tmp_path / "mlp.onnx")
    with pytest.raises(
        Unsupported, match=r"no CPU kernel for Gemm-13, A of type tensor\(bfloat16\)"
    ):
        trivium.compile(tmp_path / "mlp.onnx", recipe="bf16", out=tmp_path / "a")
