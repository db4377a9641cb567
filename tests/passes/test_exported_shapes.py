"""What exporters write around shapes: sizes computed in the graph, flattened transposes, guards."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from tests.property.graphs import run
from trivium.passes.fill_shapes import FillShapes
from trivium.passes.infer_symbolic_shapes import InferSymbolicShapes
from trivium.passes.recognize_attention import RecognizeAttention
from trivium.passes.trace_dims import TraceDims
from trivium.passes.unflatten_transpose import UnflattenTranspose

from .helpers import check, declined, feed, model, ops

VIEW = (
    "s = Shape(x) one = Constant<value=int64 {1}>() l = Gather<axis=0>(s, one) "
    "z = Constant<value=int64[1] {0}>() u = Unsqueeze(l, z) m = Constant<value=int64[1] {-1}>() "
    "w = Concat<axis=0>(m, u) y = Reshape(x, w)"
)


def test_sizes_are_followed_through_arithmetic() -> None:
    made = model(f"(float[B,S] x) => (float[P,Q] y) {{ {VIEW} }}")
    made.graph.outputs[0].shape = None
    assert InferSymbolicShapes()(made).modified
    assert str(made.graph.outputs[0].shape) == "[B,S]"
    assert not InferSymbolicShapes()(made).modified


@pytest.mark.parametrize(
    ("shape", "target", "found"),
    [
        ("N,64,1,1", "{-1,64}", "[N,64]"),
        ("unk__7,6,4", "{0,-1}", "[unk__7,24]"),
        ("N,6,M", "{0,6,-1}", "[N,6,M]"),
    ],
)
def test_what_a_reshape_to_constants_leaves_over_is_named_without_the_library(
    monkeypatch: pytest.MonkeyPatch, shape: str, target: str, found: str
) -> None:
    monkeypatch.setitem(sys.modules, "onnx_shape_inference", None)
    rank = target.count(",") + 1
    made = model(
        f"(float[{shape}] x) => (float[{','.join('PQR'[:rank])}] z) {{ "
        f"t = Constant<value=int64[{rank}] {target}>() y = Reshape(x, t) z = Relu(y) }}"
    )
    for node in made.graph:
        node.outputs[0].shape = None
    assert InferSymbolicShapes()(made).modified
    assert [str(node.outputs[0].shape) for node in made.graph] == [found, found]
    assert not InferSymbolicShapes()(made).modified


@pytest.mark.parametrize(
    ("shape", "target"), [("N,64", "{-1,32}"), ("N,M,64", "{-1,64}"), ("N,M", "{-1,0}")]
)
def test_what_a_reshape_mixes_gets_no_name_of_an_input(shape: str, target: str) -> None:
    made = model(
        f"(float[{shape}] x) => (float[P,Q] y) {{ t = Constant<value=int64[2] {target}>() "
        "y = Reshape(x, t) }"
    )
    made.graph.outputs[0].shape = None
    InferSymbolicShapes()(made)
    found = made.graph.outputs[0].shape
    assert found is None or found[0] not in ("N", "M") or str(found) == "[N,M]"


def test_a_known_size_becomes_a_constant() -> None:
    text = (
        "s = Shape(x) i = Constant<value=int64 {1}>() l = Gather<axis=0>(s, i) "
        "z = Constant<value=int64[1] {0}>() u = Unsqueeze(l, z) y = Expand(v, u)"
    )
    made = model(f"(float[B,4] x, float[1] v) => (float[4] y) {{ {text} }}")
    assert "Shape" not in check(TraceDims(), made)


def test_flattened_transpose() -> None:
    text = (
        "a = Constant<value=int64[3] {-1,3,5}>() f = Reshape(x, a) "
        "t = Transpose<perm=[0,2,1]>(f) b = Constant<value=int64[4] {2,4,5,3}>() y = Reshape(t, b)"
    )
    made = model(f"(float[2,4,3,5] x) => (float[2,4,5,3] y) {{ {text} }}")
    assert check(UnflattenTranspose(), made) == {"Transpose": 1}


def test_transpose_across_what_was_flattened_stays() -> None:
    text = (
        "a = Constant<value=int64[3] {2,12,5}>() f = Reshape(x, a) "
        "t = Transpose<perm=[0,2,1]>(f) b = Constant<value=int64[4] {2,5,4,3}>() y = Reshape(t, b)"
    )
    made = model(f"(float[2,4,3,5] x) => (float[2,5,4,3] y) {{ {text} }}")
    assert not UnflattenTranspose()(made).modified


def test_expand_that_keeps_a_dimension() -> None:
    text = (
        "s = Shape<start=0,end=1>(x) m = Constant<value=int64[1] {-1}>() "
        "c = Concat<axis=0>(s, m) n = Constant<value=int64[1] {2}>() "
        "ones = ConstantOfShape<value=int64[1] {1}>(n) k = Constant<value=int64 {-1}>() "
        "minus = Mul(ones, k) e = Equal(c, minus) w = Where(e, ones, c) y = Expand(v, w)"
    )
    made = model(f"(float[B,4] x, float[1,7] v) => (float[B,7] y) {{ {text} }}")
    assert "Where" not in check(FillShapes(), made)


GUARDED = (
    "t = Transpose<perm=[0,1,3,2]>(k) a = MatMul(q, t) zero = Constant<value=float {0}>() "
    "low = Constant<value=float {-inf}>() c = Where(m, a, low) p = Softmax<axis=-1>(c) "
    "n = IsNaN(p) g = Where(n, zero, p) y = MatMul(g, v)"
)
OPERANDS = "float[2,4,3,8] q, float[2,4,3,8] k, float[2,4,3,8] v"


def test_guarded_attention_may_mask_a_whole_row() -> None:
    mask = np.tril(np.ones((1, 1, 3, 3), bool), -1)
    text = f"({OPERANDS}, bool[1,1,3,3] m) => (float[2,4,3,8] y) {{ {GUARDED} }}"
    made = model(text, m=mask)
    assert check(RecognizeAttention(), made) == {"Attention": 1}
    assert not run(made, feed(made))[0][:, :, 0].any()
    bare = GUARDED.replace("n = IsNaN(p) g = Where(n, zero, p) ", "").replace("(g, v)", "(p, v)")
    unguarded = model(f"({OPERANDS}, bool[1,1,3,3] m) => (float[2,4,3,8] y) {{ {bare} }}", m=mask)
    assert "all keys of a row" in declined(RecognizeAttention(), unguarded)[0].reason


def test_guard_that_something_else_reads_stays() -> None:
    text = f"({OPERANDS}, bool[2,4,3,3] m) => (float[2,4,3,8] y, bool[2,4,3,3] n) {{ {GUARDED} }}"
    made = model(text)
    assert not RecognizeAttention()(made).modified
    assert ops(made)["Softmax"] == 1


def test_a_cut_of_an_axis_of_any_length_stays_open() -> None:
    text = (
        "a = Constant<value=int64[1] {0}>() b = Constant<value=int64[1] {1000}>() "
        "h = Slice(x, a, b, a) s = Shape(h) y = Expand(one, s)"
    )
    made = model(f"(float[B,4] x, float[1] one) => (float[P,4] y) {{ {text} }}")
    cut = next(node.outputs[0] for node in made.graph if node.op_type == "Slice")
    InferSymbolicShapes()(made)
    assert cut.shape is not None
    assert not isinstance(cut.shape[0], int)
