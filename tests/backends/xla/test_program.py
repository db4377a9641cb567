"""A lowered model as a function: what is a weight, what folds, which types and inputs it takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from trivium.backends.xla.lowering import lower, precise
from trivium.compiler.errors import BadInput, Unsupported

jax = pytest.importorskip("jax", reason="the xla backend needs the extra trivium[tpu]")

HEAD = '<ir_version: 10, opset_import: ["": 21]>\n'


def parse(text: str, **constants: np.ndarray[Any, Any]) -> ir.Model:
    """A model from ONNX's text form, with initializers."""
    model = onnx.parser.parse_model(HEAD + text)
    for name, array in constants.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(model)


EXPORTED = """main (int64[batch, time] ids) => (float[a, b] y) {
   picked = Gather(table, ids)
   shape = Shape(ids)
   rows = Gather(shape, first)
   row = Unsqueeze(rows, zero)
   target = Concat<axis = 0>(row, rest)
   flat = Reshape(picked, target)
   y = Mul(flat, half)
}"""


def exported() -> ir.Model:
    """What an exporter makes of ``ids -> table[ids].reshape(len(ids), -1) * 0.5``."""
    return parse(
        EXPORTED,
        table=np.arange(40, dtype=np.float32).reshape(10, 4),
        first=np.asarray(0),
        zero=np.asarray([0]),
        rest=np.asarray([-1]),
        half=np.asarray(0.5, np.float32),
    )


def test_weights_are_arguments_and_shape_arithmetic_folds() -> None:
    lowered = lower(exported())
    assert set(lowered.weights) == {"table"}
    ids = np.asarray([[1, 2, 3], [7, 8, 9]])
    with precise():
        jitted = jax.jit(lowered.function)
        text = jitted.lower(lowered.read(), {"ids": ids}).as_text()
        y = jitted(lowered.read(), {"ids": ids})["y"]
    table = np.arange(40, dtype=np.float32).reshape(10, 4)
    np.testing.assert_array_equal(y, table[ids].reshape(2, -1) * 0.5)
    assert "stablehlo.concatenate" not in text


def test_one_lowering_serves_several_shapes() -> None:
    lowered = lower(exported())
    with precise():
        for time in (1, 5):
            y = lowered.function(lowered.read(), {"ids": np.zeros((3, time), np.int64)})["y"]
            assert y.shape == (3, 4 * time)


def test_64_bit_types_are_themselves() -> None:
    model = parse(
        "main (int64[2] a, double[2] b) => (int64[2] x, double[2] y) {x = Add(a, a) y = Exp(b)}"
    )
    feed = {"a": np.asarray([2**40, -(2**50)]), "b": np.asarray([0.1, 1e-12])}
    with precise():
        result = jax.jit(lower(model).function)({}, feed)
    np.testing.assert_array_equal(result["x"], 2 * feed["a"])
    np.testing.assert_array_equal(result["y"].dtype, np.float64)
    np.testing.assert_allclose(result["y"], np.exp(feed["b"]), rtol=1e-15)


def test_float32_model_stays_in_float32() -> None:
    model = parse("main (float[2, 3] x) => (float[2, 3] y) {z = Sigmoid(x) y = HardSwish(z)}")
    with precise():
        x = np.ones((2, 3), np.float32)
        text = jax.jit(lower(model).function).lower({}, {"x": x}).as_text()
    assert "f64" not in text


def test_missing_input_is_named() -> None:
    with pytest.raises(BadInput, match="the input 'ids' is missing"):
        lower(exported()).function(lower(exported()).read(), {"id": np.zeros((1, 1), np.int64)})


def test_operator_without_a_road_is_refused_with_its_name() -> None:
    model = parse("main (float[2] x) => (float[2] y) {y = Identity(x)}")
    model.graph[0].op_type = "Teleport"
    with pytest.raises(Unsupported, match="Teleport has neither a handler nor a function body"):
        lower(model).function({}, {"x": np.zeros(2, np.float32)})


LOOP = """main (int64 trips, float[2] x) => (float[2] y) {
   y = Loop(trips, go, x) <body = step (int64 i, bool c, float[2] s) => (bool d, float[2] t) {
      d = Identity(c)
      t = Add(s, s)
   }>
}"""


@pytest.mark.parametrize("trips", [0, 3])
def test_loop_runs_as_often_as_the_program_computes(trips: int) -> None:
    model = parse(LOOP, go=np.asarray(True))
    x = np.asarray([1.0, 2.0], np.float32)
    with precise():
        jitted = jax.jit(lower(model).function)
        np.testing.assert_array_equal(
            jitted({}, {"trips": np.asarray(trips), "x": x})["y"], x * 2**trips
        )


COUNTED = """main (float[2] x) => (float[2] y, float[r, 2] rows) {
   y, rows = Loop(trips, go, x) <body = step (int64 i, bool c, float[2] s)
   => (bool d, float[2] t, float[2] u) {
      d = Identity(c)
      t = Add(s, one)
      u = Identity(t)
   }>
}"""


@pytest.mark.parametrize(("trips", "loops"), [(3, 0), (100, 1)])
def test_loop_of_known_length_is_unrolled_only_while_it_is_short(trips: int, loops: int) -> None:
    one = np.asarray(1, np.float32)
    model = parse(COUNTED, go=np.asarray(True), trips=np.asarray(trips), one=one)
    x = np.asarray([1.0, 2.0], np.float32)
    with precise():
        jitted = jax.jit(lower(model).function)
        text, results = jitted.lower({}, {"x": x}).as_text(), jitted({}, {"x": x})
    assert text.count("stablehlo.while") == loops
    np.testing.assert_array_equal(results["y"], x + trips)
    np.testing.assert_array_equal(results["rows"], x + np.arange(1, trips + 1)[:, None])


BRANCH = """main (bool c, float[2] x) => (float[2] y) {
   y = If(c) <
      then_branch = yes () => (float[2] a) {a = Neg(x)},
      else_branch = no () => (float[2] b) {b = Add(x, x)}
   >
}"""


@pytest.mark.parametrize("taken", [True, False])
def test_branch_is_chosen_while_it_runs(taken: bool) -> None:
    model = parse(BRANCH)
    x = np.asarray([1.0, 2.0], np.float32)
    with precise():
        y = jax.jit(lower(model).function)({}, {"c": np.asarray(taken), "x": x})["y"]
    np.testing.assert_array_equal(y, -x if taken else x + x)
