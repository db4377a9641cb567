"""Refusals of the ONNX Runtime backend are what ONNX Runtime itself would say, only earlier."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

import trivium
from trivium.backends.onnxruntime.kernels import refusal
from trivium.compiler.errors import Unsupported


def one_node(op_type: str, dtype: ir.DataType, domain: str = "") -> tuple[ir.Model, ir.Node]:
    x = ir.val("x", dtype, [2, 3])
    node = ir.node(op_type, [x], domain=domain)
    y = node.outputs[0]
    y.name, y.dtype, y.shape = "y", dtype, ir.Shape([2, 3])
    imports = {"": 24} | ({domain: 1} if domain else {})
    graph = ir.Graph([x], [y], nodes=[node], opset_imports=imports, name="g")
    return ir.Model(graph, ir_version=11), node


def runs(model: ir.Model) -> bool:
    """Whether ONNX Runtime takes the model, by trying."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    except Exception:
        return False
    return True


@pytest.mark.parametrize("op_type", ["Relu", "Sin", "Erf", "Gelu", "Swish", "Mish", "Softplus",
                                     "Det", "IsNaN", "Round", "HardSwish"])  # fmt: skip
@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16])
def test_refuses_exactly_what_the_engine_refuses(op_type: str, dtype: ir.DataType) -> None:
    model, node = one_node(op_type, dtype)
    if op_type in ("Det", "IsNaN"):
        node.outputs[0].dtype = ir.DataType.BOOL if op_type == "IsNaN" else dtype
        node.outputs[0].shape = ir.Shape([2, 3]) if op_type == "IsNaN" else ir.Shape([])
        if op_type == "Det":
            node.inputs[0].shape = ir.Shape([3, 3])  # type: ignore[union-attr]
    assert (refusal(node) is None) == runs(model)


def test_an_unknown_domain_is_refused_with_its_name() -> None:
    _, node = one_node("Magic", ir.DataType.FLOAT, domain="com.example")
    assert "com.example::Magic" in str(refusal(node))


def test_all_refused_nodes_are_listed_at_once(
    shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    source = shared_data("models/espcn_x3_qonnx.onnx")
    with pytest.raises(Unsupported) as caught:
        trivium.compile(source, "cpu", out=tmp_path / "out")
    assert len(caught.value.refusals) == 8
    assert not list(tmp_path.iterdir())


def test_a_missing_or_misshapen_feed_is_one_line(
    shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    artifact = trivium.compile(shared_data("models/mnist_cnn_cntk.onnx"), "cpu", out=tmp_path / "o")
    executable = artifact.load()
    with pytest.raises(trivium.TriviumError, match="missing"):
        executable.run({})
    with pytest.raises(trivium.TriviumError, match="shape"):
        executable.run({"Input3": np.zeros((1, 28, 28), np.float32)})


def test_products_with_a_bias_run_as_integers(tmp_path: Path) -> None:
    """ONNX Runtime makes a float Gemm of them unless it is told not to."""
    rng = np.random.default_rng(0)
    x = ir.val("x", ir.DataType.FLOAT, [2, 4, 64])
    weight = ir.tensor(rng.standard_normal((64, 64)).astype(np.float32), name="w")
    bias = ir.tensor(rng.standard_normal(64).astype(np.float32), name="b")
    product = ir.node("MatMul", [x, ir.Value(name="w", const_value=weight)])
    total = ir.node("Add", [product.outputs[0], ir.Value(name="b", const_value=bias)])
    y = total.outputs[0]
    y.name, y.dtype, y.shape = "y", ir.DataType.FLOAT, ir.Shape([2, 4, 64])
    graph = ir.Graph(
        [x],
        [y],
        nodes=[product, total],
        initializers=[product.inputs[1], total.inputs[1]],  # type: ignore[list-item]
        opset_imports={"": 24},
        name="g",
    )
    ir.save(ir.Model(graph, ir_version=11), tmp_path / "m.onnx")
    feeds = [{"x": rng.standard_normal((2, 4, 64)).astype(np.float32)} for _ in range(4)]
    artifact = trivium.compile(
        tmp_path / "m.onnx", "cpu", recipe="int8-minmax", calibration=feeds, out=tmp_path / "out"
    )
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(
        artifact.path / "model.onnx",
        options,
        disabled_optimizers=artifact.manifest["details"]["disabled_optimizers"],
    )
    ran = [node.op_type for node in ir.load(tmp_path / "optimized.onnx").graph]
    assert "MatMulIntegerToFloat" in ran
    assert "Gemm" not in ran
