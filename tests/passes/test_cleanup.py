"""The passes that bring any graph into shape: constants, names, identities, duplicates, no-ops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.passes.helpers import HEADER, check, declined, feed, model, ops
from tests.property.graphs import run
from trivium.compiler import model as models
from trivium.compiler.errors import Unsupported
from trivium.compiler.onnx_api import light_proto
from trivium.passes.convert_opset import ConvertOpset
from trivium.passes.fold_constants import FoldConstants
from trivium.passes.infer_shapes import InferShapes
from trivium.passes.lift_constants import LiftConstants
from trivium.passes.remove_identities import RemoveIdentities
from trivium.passes.remove_no_ops import RemoveNoOps
from trivium.passes.share_duplicates import ShareDuplicates
from trivium.passes.simplify import Simplify
from trivium.passes.trace_dims import TraceDims
from trivium.passes.unflatten_softmax import UnflattenSoftmax
from trivium.passes.unique_names import UniqueNames


def parsed(text: str, header: str = HEADER) -> ir.Model:
    """A model as it was written, nothing lifted."""
    return ir.from_proto(onnx.parser.parse_model(f"{header} g {text}"))


# --- identities and no-ops ------------------------------------------------------------------------


def test_identity_of_an_output_keeps_both_names() -> None:
    made = model("(float[2] x) => (float[2] a, float[2] b) { a = Relu(x) b = Identity(a) }")
    declined(RemoveIdentities(), made)
    assert [value.name for value in made.graph.outputs] == ["a", "b"]


def test_identity_before_an_output_gives_it_its_name() -> None:
    made = model("(float[2] x) => (float[2] y) { t = Relu(x) y = Identity(t) }")
    assert check(RemoveIdentities(), made) == {"Relu": 1}
    assert made.graph.outputs[0].name == "y"


def test_identity_of_an_outer_value_stays_the_output_of_a_body() -> None:
    made = model(
        "(bool c, float[2] x) => (float[2] y) { o = Relu(x) y = If(c) <"
        "then_branch: graph = t () => (float[2] a) { a = Identity(o) },"
        "else_branch: graph = e () => (float[2] b) { i = Identity(o) b = Neg(i) }> }"
    )
    assert RemoveIdentities()(made).modified
    assert ops(made)["Identity"] == 1


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("a = Dropout(x) y = Relu(a)", {"Relu": 1}),
        ("a = Cast<to=11>(x) b = Cast<to=1>(a) y = Relu(b)", {"Relu": 1}),
        ("a = Cast<to=1>(x) y = Relu(a)", {"Relu": 1}),
        ("a = Transpose<perm=[1,0]>(x) b = Transpose<perm=[1,0]>(a) y = Relu(b)", {"Relu": 1}),
        ("s = Constant<value=int64[2] {2,3}>() a = Reshape(x, s) y = Relu(a)", {"Relu": 1}),
        ("s = Constant<value=int64[2] {1,1}>() a = Expand(x, s) y = Relu(a)", {"Relu": 1}),
        ("s = Constant<value=int64[2] {1,1}>() a = Tile(x, s) y = Relu(a)", {"Relu": 1}),
        ("s = Constant<value=int64[4] {0,0,0,0}>() a = Pad(x, s) y = Relu(a)", {"Relu": 1}),
        ("s = Constant<value=int64[1] {0}>() a = Unsqueeze(x, s) b = Squeeze(a, s) y = Relu(b)",
         {"Relu": 1}),
        ("a = Concat<axis=0>(x) b = Sum(a) y = Relu(b)", {"Relu": 1}),
        ("s = Constant<value=float {1}>() a = Mul(s, x) b = Div(a, s) y = Relu(b)", {"Relu": 1}),
        ("s = Constant<value=int64[1] {0}>() e = Constant<value=int64[1] {9223372036854775807}>() "
         "a = Slice(x, s, e) y = Relu(a)", {"Relu": 1}),
        ("s = Constant<value=int64[1] {6}>() t = Constant<value=int64[2] {2,3}>() "
         "a = Reshape(x, s) b = Neg(x) c = Reshape(a, t) y = Add(b, c)", {"Neg": 1, "Add": 1}),
    ],
)  # fmt: skip
def test_no_op_goes(body: str, left: dict[str, int]) -> None:
    made = model(f"(float[2,3] x) => (float[2,3] y) {{ {body} }}")
    expected = run(made, feed(made))
    Simplify()(made)
    assert ops(made) == left
    for want, have in zip(expected, run(made, feed(made)), strict=True):
        np.testing.assert_array_equal(have, want)


@pytest.mark.parametrize(
    "text",
    [
        "(float[2,3] x) => (float[2,3] y) { a = Cast<to=10>(x) y = Cast<to=1>(a) }",
        "(float[3] x) => (float[1,3] y) { s = Constant<value=float[1,1] {1}>() y = Mul(x, s) }",
        "(float[A,B] x, int64[2] s) => (float[C,D] y) { y = Reshape(x, s) }",
        "(float[2,3] x) => (float[2,3] y) { y = Dropout(x) }",
        "(int32[2] x) => (int32[2] y) { s = Constant<value=int32 {2}>() y = Div(x, s) }",
        "(float[A,256] x) => (float[B,256] y) { s = Constant<value=int64[2] {0,0}>() "
        "e = Constant<value=int64[2] {1000000,256}>() y = Slice(x, s, e) }",
        "(float[A,4] x) => (float[A,3] y) { s = Constant<value=int64[2] {0,0}>() "
        "e = Constant<value=int64[2] {2147483647,-1}>() y = Slice(x, s, e) }",
    ],
)
def test_what_only_looks_like_a_no_op_stays(text: str) -> None:
    declined(RemoveNoOps(), model(text))


def test_slice_of_every_axis_to_its_end_or_beyond_goes() -> None:
    made = model(
        "(float[A,512,256] x) => (float[B,512,256] y) { s = Constant<value=int64[3] {0,0,0}>() "
        "e = Constant<value=int64[3] {256,1000000000,512}>() "
        "a = Constant<value=int64[3] {-1,0,1}>() "
        "c = Slice(x, s, e, a) y = Relu(c) }"
    )
    assert check(RemoveNoOps(), made) == {"Relu": 1}


# --- constants ------------------------------------------------------------------------------------


def test_constants_of_bodies_move_to_the_top() -> None:
    made = parsed(
        "(bool c, float[2] x) => (float[2] y) { y = If(c) <"
        "then_branch: graph = t () => (float[2] a) { k = Constant<value=float {2}>() a = Mul(x, "
        "k) },"
        "else_branch: graph = e () => (float[2] b) { l = Constant<value=float {3}>() b = Mul(x, "
        "l) }>}"
    )
    assert LiftConstants()(made).modified
    assert ops(made) == {"If": 1, "Mul": 2}
    assert sorted(made.graph.initializers) == ["k", "l"]
    for flag, factor in ((True, 2), (False, 3)):
        (out,) = run(made, {"c": np.array(flag), "x": np.ones(2, np.float32)})
        np.testing.assert_array_equal(out, [factor, factor])
    assert not LiftConstants()(made).modified


def test_constant_that_is_an_output_stays() -> None:
    made = parsed("(float[2] x) => (float y) { y = Constant<value=float {2}>() }")
    declined(LiftConstants(), made)


def test_default_of_an_input_becomes_a_constant() -> None:
    proto = onnx.parser.parse_model(
        f"{HEADER} g (float[1] x, float[1] w) => (float[1] y) {{ y = Mul(x, w) }}"
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.full(1, 3, "f"), "w"))
    made = ir.from_proto(proto)
    assert LiftConstants()(made).modified
    assert [value.name for value in made.graph.inputs] == ["x"]


def test_folding_leaves_quantized_weights() -> None:
    made = model(
        "(float[2] x, int8[2] q, float s) => (float[2] y) { w = DequantizeLinear(q, s) y = "
        "Mul(x, w) }",
        q=np.array([1, 2], np.int8),
        s=np.float32(0.5),
    )
    declined(FoldConstants(), made)


def test_folding_takes_the_branch_that_is_known() -> None:
    made = model(
        "(float[2] x) => (float[2] y) { c = Constant<value=bool {1}>() y = If(c) <"
        "then_branch: graph = t () => (float[2] a) { a = Neg(x) },"
        "else_branch: graph = e () => (float[2] b) { b = Relu(x) }> }"
    )
    assert check(FoldConstants(), made) == {"Neg": 1}


# --- duplicates -----------------------------------------------------------------------------------


def test_equal_subexpressions_are_computed_once() -> None:
    made = model("(float[2] x) => (float[2] y) { a = Neg(x) b = Neg(x) y = Mul(a, b) }")
    assert check(ShareDuplicates(), made) == {"Neg": 1, "Mul": 1}


@pytest.mark.parametrize(
    "text",
    [
        "(float[2] x) => (float[2] y, float[2] z) { y = Neg(x) z = Neg(x) }",
        "() => (float[2] y) { a = RandomNormal<shape=[2]>() b = RandomNormal<shape=[2]>() y = "
        "Mul(a, b) }",
        "(float[2] x) => (float[2] y) { a = LeakyRelu<alpha=0.1>(x) b = LeakyRelu<alpha=0.2>(x) "
        "y = Mul(a, b) }",
    ],
)
def test_what_has_to_differ_stays(text: str) -> None:
    declined(ShareDuplicates(), model(text))


def test_equal_weights_are_stored_once_and_not_read_whole(tmp_path: Path) -> None:
    weight = np.arange(3_000_000, dtype=np.float32)
    other = weight.copy()
    other[-1] = 0
    made = model(
        "(float[3000000] x, float[3000000] a, float[3000000] b, float[3000000] c) => "
        "(float[3000000] y)"
        "{ s = Mul(x, a) t = Mul(s, b) y = Mul(t, c) }",
        a=weight,
        b=weight.copy(),
        c=other,
    )
    models.save(made, tmp_path / "m.onnx", external=True)
    loaded = models.load(tmp_path / "m.onnx")
    assert ShareDuplicates()(loaded).modified
    assert sorted(loaded.graph.initializers) == ["a", "c"]
    for value in loaded.graph.initializers.values():
        assert isinstance(value.const_value, ir.ExternalTensor)
        assert value.const_value.raw is None


# --- names and shapes -----------------------------------------------------------------------------


def test_names_become_unique_over_bodies_and_outputs_keep_theirs() -> None:
    made = parsed(
        "(bool c, float[2] x) => (float[2] y) { y = If(c) <"
        "then_branch: graph = t () => (float[2] a) { k = Neg(x) a = Relu(k) },"
        "else_branch: graph = e () => (float[2] a) { k = Exp(x) a = Relu(k) }> }"
    )
    assert UniqueNames()(made).modified
    names = [v.name for graph in made.graphs() for node in graph for v in node.outputs]
    assert len(names) == len(set(names))
    assert made.graph.outputs[0].name == "y"
    nodes = [node.name for node in made.graph.all_nodes()]
    assert all(nodes)
    assert len(nodes) == len(set(nodes))
    assert not UniqueNames()(made).modified


def test_absent_output_stays_absent() -> None:
    x = ir.Value(name="x", shape=ir.Shape([2, 3]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("TopK", [x, x], num_outputs=2)
    node.outputs[0].name, node.outputs[1].name = "", "i"
    graph = ir.Graph([x], [node.outputs[1]], nodes=[node], opset_imports={"": 24}, name="g")
    UniqueNames()(ir.Model(graph, ir_version=10))
    assert node.outputs[0].name == ""


def test_inference_prefers_the_models_own_names() -> None:
    made = parsed(
        "(float[batch,3] x, float[3,4] w) => (float[batch,4] y) { t = MatMul(x, w) y = Relu(t) }"
    )
    assert InferShapes()(made).modified
    product = next(iter(made.graph)).outputs[0]
    assert str(product.shape) == "[batch,4]"


def test_light_copy_leaves_the_model_as_it_was() -> None:
    made = model(
        "(float[2,600] x, float[600,2] w, float[2] b) => (float[2,2] y) { y = Gemm(x, w, b) }",
        w=np.ones((600, 2), "f"),
        b=np.ones(2, "f"),
    )
    before = ir.to_proto(made).SerializeToString(deterministic=True)
    with light_proto(made) as proto:
        assert [value.name for value in proto.graph.input] == ["x", "w"]
    assert not made.graph.initializers["w"].is_graph_input()
    assert ir.to_proto(made).SerializeToString(deterministic=True) == before


# --- shape arithmetic -----------------------------------------------------------------------------


def test_dimension_of_a_product_is_asked_of_its_operand() -> None:
    made = model(
        "(float[2,A,8] q, float[2,B,8] k) => (int64 y) {"
        "t = Transpose<perm=[0,2,1]>(k) s = Constant<value=float {8}>() a = MatMul(q, t) b = "
        "Div(a, s)"
        "n = Shape(b) i = Constant<value=int64 {-1}>() y = Gather(n, i) }"
    )
    assert check(TraceDims(), made) == {"Shape": 1, "Gather": 1}
    assert next(iter(made.graph)).inputs[0] is made.graph.inputs[1]


def test_dimension_of_an_input_stays() -> None:
    declined(TraceDims(), model(
        "(float[A,8] x) => (int64 y) { n = Shape(x) i = Constant<value=int64 {0}>() y = "
            "Gather(n, i) }"
    ))  # fmt: skip


def test_softmax_of_an_old_opset_loses_its_reshapes() -> None:
    made = parsed(
        "(float[A,3,5] x) => (float[A,3,5] y) { y = Softmax<axis=2>(x) }",
        header='<ir_version: 6, opset_import: ["" : 11]>',
    )
    expected = run(made, feed(made))
    ConvertOpset()(made)
    Simplify()(made)
    assert ops(made) == {"Softmax": 1}
    np.testing.assert_allclose(run(made, feed(made))[0], expected[0], rtol=1e-6)


def test_softmax_over_two_axes_keeps_its_reshapes() -> None:
    made = parsed(
        "(float[A,3,5] x) => (float[A,3,5] y) { y = Softmax<axis=1>(x) }",
        header='<ir_version: 6, opset_import: ["" : 11]>',
    )
    ConvertOpset()(made)
    assert not UnflattenSoftmax()(made).modified


# --- opsets ---------------------------------------------------------------------------------------

OLD = {
    (1, "float[2,3] x", "float[2,3] y"): "y = LeakyRelu<alpha=0.1>(x)",
    (4, "float[2,3] x", "float[6] y"): "y = Reshape<shape=[6]>(x)",
    (7, "float[1,1,2,2] x", "float[1,1,4,4] "
            "y"): 'y = Upsample<mode="nearest", scales=[1.0,1.0,2.0,2.0]>(x)',
    (9, "float[2,3] x", "float[2,2] y"): "y = Slice<axes=[1], starts=[1], ends=[3]>(x)",
    (10, "float[2,3] x", "float[2,5] y"): "y = Pad<pads=[0,1,0,1], value=1.5>(x)",
    (11, "float[2,3] x", "float[2,3] y"): "y = Clip(x)",
    (12, "float[2,3] x", "float[2] y"): "y = ReduceSum<axes=[1], keepdims=0>(x)",
    (17, "float[2,3] x", "float[2] y"): "y = ReduceMean<axes=[1], keepdims=0>(x)",
    (18, "float[1,4,2,2] x, float[2] s, float[2] b", "float[1,4,2,2] y"): "y = "
            "GroupNormalization<num_groups=2>(x, s, b)",
    (25, "float[2,3] x", "float[2,3] y"): "y = Gelu(x)",
    (27, "float[2,3] x, float[3] s", "float[2,3] y"): "y = RMSNormalization(x, s)",
}  # fmt: skip


@pytest.mark.parametrize(("opset", "inputs", "outputs"), OLD)
def test_opset_is_converted(opset: int, inputs: str, outputs: str) -> None:
    header = f'<ir_version: 8, opset_import: ["" : {opset}]>'
    made = parsed(f"({inputs}) => ({outputs}) {{ {OLD[opset, inputs, outputs]} }}", header)
    data = feed(made)
    try:
        expected = run(made, data)
    except Exception:  # ONNX Runtime has no kernels for the oldest opsets; onnx's evaluator does
        evaluator = onnx.reference.ReferenceEvaluator(ir.to_proto(made))
        expected = list(evaluator.run(None, data))
    assert ConvertOpset()(made).modified
    assert made.opset_imports[""] == models.OPSET
    onnx.checker.check_model(ir.to_proto(made), full_check=True)
    for want, have in zip(expected, run(made, data), strict=True):
        np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-6)
    assert not ConvertOpset()(made).modified


def test_large_weights_are_not_read_to_convert(tmp_path: Path) -> None:
    made = parsed(
        "(float[2,600] x, float[600,600] w) => (float[2,600] y) { y = MatMul(x, w) }",
        header='<ir_version: 8, opset_import: ["" : 11]>',
    )
    value = made.graph.inputs.pop()
    value.const_value = ir.tensor(np.ones((600, 600), np.float32), name="w")
    made.graph.register_initializer(value)
    models.save(made, tmp_path / "m.onnx", external=True)
    loaded = models.load(tmp_path / "m.onnx")
    assert ConvertOpset()(loaded).modified
    tensor = loaded.graph.initializers["w"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    assert tensor.raw is None


def test_conversion_that_does_not_exist_is_refused() -> None:
    made = parsed(
        "(float[2,3] x, float[5] b) => (float[2,3] y) { y = Add<axis=0, broadcast=1>(x, b) }",
        header='<ir_version: 3, opset_import: ["" : 6]>',
    )
    with pytest.raises(Unsupported, match="no way from opset 6 to 24"):
        ConvertOpset()(made)
