"""Operators, one at a time, on onnx's own conformance data: right, or refused with the reason."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from trivium.backends.tvm import operators
from trivium.backends.tvm.backend import BACKEND, _compile, _host
from trivium.backends.tvm.importer import to_relax
from trivium.compiler import recipe, verify
from trivium.compiler.types import Target

tvm = pytest.importorskip("tvm", reason="apache-tvm is not installed")

CPU = Target("cpu", "cpu", ("tvm",))

# Among them what needed help: other forms opened, booleans kept out of vectors.
COMPUTED = [
    "test_argmax_keepdims_example",
    "test_attention_4d_gqa",
    "test_averagepool_2d_precomputed_pads",
    "test_basic_conv_with_padding",
    "test_celu",
    "test_convtranspose",
    "test_gather_2d_indices",
    "test_gelu_tanh_1",
    "test_group_normalization_epsilon",
    "test_rms_normalization_4d_axis0",
    "test_rotary_embedding_3d_input",
    "test_scatternd_add",
    "test_softmax_axis_0",
    "test_swish",
    "test_triu_neg",
    "test_where_long_example",
    "test_xor4d",
]

REFUSED = [
    ("test_affine_grid_2d", "size is computed at run time"),
    ("test_cosh", "TVM does not compile cosh for LLVM"),
    ("test_cumsum_1d", "axis is computed at run time"),
    ("test_expand_dim_changed", "shape is computed at run time"),
    ("test_eyelike_with_dtype", "it makes DOUBLE from INT32"),
    ("test_isinf_positive", "detect_negative=0 is ignored by the importer"),
    ("test_layer_normalization_4d_axis1", "the outputs Mean and InvStdDev"),
    ("test_maxpool_with_argmax_2d_precomputed_pads", "the output Indices is not imported"),
    ("test_nonmaxsuppression_suppress_by_IOU", "the shape of its result depends on the data"),
    ("test_reduce_l1_keep_dims_example", "axes is computed at run time"),
    ("test_roialign_mode_max", "mode=max is computed differently from the standard"),
    ("test_sequence_insert_at_back", "sequences and optionals"),
    ("test_det_2d", "TVM's ONNX importer has no converter for Det"),
]


@cache
def conformance() -> dict[str, Any]:
    from onnx.backend.test.loader import load_model_tests

    return {case.name: case for case in load_model_tests(kind="node")}


def legalized(name: str) -> tuple[ir.Model, Any]:
    case = conformance()[name]
    model = ir.from_proto(case.model)
    recipe.run(recipe.read("normalize"), model)
    recipe.apply(BACKEND.legalize(CPU), model)
    return model, case


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPUTED)
def test_operator_is_computed_as_the_standard_says(name: str) -> None:
    model, case = legalized(name)
    assert [operators.refusal(node) for node in model.graph if operators.refusal(node)] == []
    machine = tvm.relax.VirtualMachine(_compile(to_relax(model), _host()), tvm.cpu())
    inputs, outputs = case.data_sets[0]
    feed = dict(zip([info.name for info in case.model.graph.input], inputs, strict=True))
    arguments = [tvm.runtime.tensor(np.asarray(feed[v.name])) for v in model.graph.inputs]
    results = machine["main"](*arguments)
    listed = [results] if hasattr(results, "numpy") else list(results)
    want = {str(index): np.asarray(array) for index, array in enumerate(outputs)}
    have = {str(index): result.numpy() for index, result in enumerate(listed)}
    assert verify.compare([want], [have]).within(1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "reason"), REFUSED)
def test_operator_is_refused_before_anything_is_built(name: str, reason: str) -> None:
    model, _ = legalized(name)
    reasons = [operators.refusal(node) for node in model.graph.all_nodes()]
    assert any(one and reason in one for one in reasons)
