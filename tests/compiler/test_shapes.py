"""Binding dimensions: one size, whole inputs, several sizes."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from trivium.compiler import shapes
from trivium.compiler.errors import BadInput
from trivium.compiler.types import TensorInfo, Workload

INPUTS = (
    TensorInfo("ids", "int64", ("batch", "seq")),
    TensorInfo("mask", "int64", ("batch", "seq")),
)


def test_several_sizes_are_one_case_each_the_largest_last() -> None:
    workload = shapes.parse(["seq=64,16,16", "batch=2"], INPUTS)
    assert workload.buckets == {"seq": (16, 64)}
    assert [case.dims for case in shapes.each(workload)] == [
        {"batch": 2, "seq": 16},
        {"batch": 2, "seq": 64},
    ]
    both = shapes.parse(["seq=16,64", "batch=1,8"], INPUTS)
    assert len(shapes.each(both)) == 4
    assert shapes.each(both)[-1].dims == {"seq": 64, "batch": 8}


def test_without_several_sizes_there_is_one_case() -> None:
    workload = shapes.parse(["ids=2x16"], INPUTS)
    assert shapes.each(workload) == [workload]
    assert workload.dims == {"batch": 2, "seq": 16}


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["ids=1x16,2x32"], "not of the form"),
        (["ids=1,16"], "no input or symbolic dimension"),
        (["seq=16,0"], "must be at least 1"),
        (["seq=8", "seq=16,32"], "'seq' is bound to both 8 and several sizes"),
        (["depth=?"], "no symbolic dimension 'depth'"),
        (["seq=8", "seq=?"], "'seq' is bound to both 8 and none"),
        (["seq=8,16", "seq=?"], "'seq' is bound to both several sizes and none"),
        (["depth=1,2"], "no input or symbolic dimension 'depth'"),
    ],
)
def test_what_is_wrong_is_said(items: list[str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        shapes.parse(items, INPUTS)


def test_a_dimension_that_stays_symbolic_is_tried_at_two_sizes() -> None:
    workload = shapes.parse(["batch=?", "seq=16,64"], INPUTS)
    assert workload.symbolic == ("batch",)
    assert [case.dims for case in shapes.trials(workload)] == [
        {"seq": 16},
        {"seq": 16, "batch": 3},
        {"seq": 64},
        {"seq": 64, "batch": 3},
    ]
    bound = shapes.parse(["seq=16"], INPUTS)
    assert shapes.trials(bound) == [bound]


def test_an_output_that_is_stored_keeps_its_size() -> None:
    stored = ir.tensor([[1.0, 2.0], [3.0, 4.0]])
    output = ir.Value(name="y", shape=ir.Shape(["batch", 2]), const_value=stored)
    graph = ir.Graph([], [output], nodes=[], initializers=[output], opset_imports={"": 24})
    shapes.bind(ir.Model(graph, ir_version=10), Workload(dims={"batch": 1}))
    assert output.shape == (2, 2)
