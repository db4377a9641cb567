"""Function bodies in place of operators compute the same, on onnx's own conformance data."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from trivium.compiler import recipe, reference, verify
from trivium.passes.decompose_functions import DecomposeFunctions
from trivium.passes.drop_empty_operands import DropEmptyOperands

CASES = [
    "test_attention_4d",
    "test_attention_4d_causal",
    "test_attention_4d_gqa_attn_mask",
    "test_attention_3d_with_past_and_present",
    "test_celu",
    "test_gelu_tanh_1",
    "test_layer_normalization_3d_axis1_epsilon",
    "test_rms_normalization_4d_axis_negative_2",
    "test_rotary_embedding_with_interleaved_rotary_dim",
    "test_swish",
]


@cache
def conformance() -> dict[str, Any]:
    from onnx.backend.test.loader import load_model_tests

    return {case.name: case for case in load_model_tests(kind="node")}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_body_computes_what_the_operator_does(name: str) -> None:
    case = conformance()[name]
    model = ir.from_proto(case.model)
    model.opset_imports[""] = 24
    op_type = model.graph[0].op_type
    applied = recipe.apply([DecomposeFunctions((op_type,))], model)
    assert applied[0].modified
    assert op_type not in {node.op_type for node in model.graph.all_nodes()}
    assert all(node.domain == "" for node in model.graph.all_nodes())
    assert not recipe.apply([DecomposeFunctions((op_type,))], model)[0].modified

    inputs, outputs = case.data_sets[0]
    feed = {
        info.name: np.asarray(array)
        for info, array in zip(case.model.graph.input, inputs, strict=True)
    }
    want = {info.name: a for info, a in zip(case.model.graph.output, outputs, strict=True)}
    assert verify.compare([want], reference.run_model(model, [feed]).outputs).within(1e-5)


def test_operator_without_a_body_is_declined() -> None:
    x = ir.val("x", ir.DataType.FLOAT, [2, 2])
    node = ir.node("Det", [x], name="det")
    node.outputs[0].name = "y"
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 24})
    model = ir.Model(graph, ir_version=10)
    applied = recipe.apply([DecomposeFunctions(("Det",))], model)[0]
    assert not applied.modified
    assert applied.declined == ("det: ONNX defines no function body for this Det",)


def test_empty_operands_of_concat_are_dropped() -> None:
    x, nothing = ir.val("x", ir.DataType.FLOAT, [2, 3]), ir.val("e", ir.DataType.FLOAT, [2, 0])
    node = ir.node("Concat", [nothing, x, nothing], {"axis": 1})
    node.outputs[0].name = "y"
    graph = ir.Graph([x, nothing], node.outputs, nodes=[node], opset_imports={"": 24})
    model = ir.Model(graph, ir_version=10)
    assert DropEmptyOperands().run(model)
    assert list(node.inputs) == [x]
    assert not DropEmptyOperands().run(model)
