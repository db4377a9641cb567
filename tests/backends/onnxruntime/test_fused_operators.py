"""Operators that ONNX Runtime has whole compute what their pieces do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from trivium.backends.onnxruntime.fused_operators import FuseResidualNorm, FuseSwish
from trivium.compiler import model as models

Array = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


def block(
    shape: list[int | str], other: list[int | str] | None = None, scale: int = 16, **norm: float
) -> ir.Model:
    """``swish(norm(a + b)) + (a + b)``."""
    a = ir.val("a", ir.DataType.FLOAT, shape)
    b = ir.val("b", ir.DataType.FLOAT, other or shape)
    weights = np.random.default_rng(0).standard_normal(scale).astype(np.float32)
    weight = ir.val("w", const_value=ir.tensor(weights, name="w"))
    add = ir.node("Add", [a, b], name="residual")
    normed = ir.node("RMSNormalization", [*add.outputs, weight], {"axis": -1, **norm}, name="norm")
    swish = ir.node("Swish", normed.outputs, {"alpha": 1.5}, name="swish")
    out = ir.node("Add", [*swish.outputs, *add.outputs])
    for node in (add, normed, swish, out):
        node.outputs[0].dtype, node.outputs[0].shape = ir.DataType.FLOAT, ir.Shape(shape)
    out.outputs[0].name = "y"
    graph = ir.Graph(
        [a, b], out.outputs, nodes=[add, normed, swish, out], initializers=[weight],
        opset_imports={"": 24}, name="g",
    )  # fmt: skip
    return ir.Model(graph, ir_version=11)


def run(model: ir.Model, path: Path, feeds: dict[str, Array]) -> Array:
    models.save(model, path)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    result: Array = ort.InferenceSession(path, options).run(None, feeds)[0]
    return result


@pytest.mark.parametrize("shape", [["batch", "seq", 16], [2, 3, 16], ["rows", 16]])
def test_fused_operators_compute_the_same(shape: list[int | str], tmp_path: Path) -> None:
    model = block(shape, epsilon=1e-3)
    rng = np.random.default_rng(1)
    sizes = [dim if isinstance(dim, int) else 4 for dim in shape]
    feeds = {n: (3 * rng.standard_normal(sizes)).astype(np.float32) for n in "ab"}
    want = run(model, tmp_path / "plain.onnx", feeds)
    assert FuseSwish()(model).modified
    assert FuseResidualNorm()(model).modified
    kinds = [node.op_type for node in model.graph]
    assert kinds == ["SkipSimplifiedLayerNormalization", "QuickGelu", "Add"]
    np.testing.assert_allclose(run(model, tmp_path / "fused.onnx", feeds), want, atol=2e-6)
    assert not FuseSwish()(model).modified
    assert not FuseResidualNorm()(model).modified


@pytest.mark.parametrize(
    ("shape", "other", "scale"),
    [
        ([2, 3, 16], [1, 3, 16], 16),
        (["batch", "seq", 16], ["other", "seq", 16], 16),
        ([2, 3, 4, 16], None, 16),
        ([None, 3, 16], None, 16),
    ],
)
def test_sums_of_other_shapes_are_left_alone(
    shape: list[int | str], other: list[int | str] | None, scale: int
) -> None:
    model = block(shape, other, scale)
    assert not FuseResidualNorm()(model).modified


def test_feature_maps_are_left_alone() -> None:
    model = block([2, 3, 4, 16])
    assert not FuseSwish()(model).modified


def test_a_sum_that_is_normalized_twice_is_left_alone() -> None:
    model = block([2, 3, 16])
    norm = next(node for node in model.graph if node.op_type == "RMSNormalization")
    second = ir.node("RMSNormalization", norm.inputs, {"axis": -1})
    second.outputs[0].name = "z"
    second.outputs[0].dtype, second.outputs[0].shape = ir.DataType.FLOAT, ir.Shape([2, 3, 16])
    model.graph.append(second)
    model.graph.outputs.append(second.outputs[0])
    assert not FuseResidualNorm()(model).modified
