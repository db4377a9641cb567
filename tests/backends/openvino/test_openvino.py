"""What OpenVINO runs is what the source says, int8 runs as int8, and a refusal is the engine's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import trivium
from trivium.compiler.backend import Tensors
from trivium.compiler.errors import Unsupported

pytest.importorskip("openvino", reason="openvino is not installed")

from trivium.backends.openvino import engine, legalize


def compiled(source: Path, out: Path, **how: Any) -> trivium.Artifact:
    return trivium.compile(source, "cpu", backend="openvino", out=out, use_cache=False, **how)


@pytest.mark.parametrize("name", ["cifar_resnet20", "lstm_bidir", "scan_1", "residual_block"])
def test_computes_what_the_source_says(
    name: str, shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    artifact = compiled(shared_data(f"models/{name}.onnx"), tmp_path / "out")
    found = artifact.manifest["verification"]
    assert found["status"] == "passed"
    assert "OpenVINO" in found["compared"]["where"]
    assert found["max_rel_error"] < 1e-5


def test_a_transformer_in_normal_form_and_in_bfloat16(transformer: Path, tmp_path: Path) -> None:
    plain = compiled(transformer, tmp_path / "f32")
    half = compiled(transformer, tmp_path / "bf16", recipe="bf16")
    assert plain.manifest["details"]["precision"] == "f32"
    assert plain.manifest["verification"]["max_rel_error"] < 1e-4
    assert half.manifest["details"]["precision"] == "bf16"


def test_the_batch_stays_open(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    executable = compiled(shared_data("models/cifar_resnet20.onnx"), tmp_path / "out").load()
    rng = np.random.default_rng(0)
    name = executable.inputs[0].name
    images = rng.standard_normal((3, 3, 32, 32)).astype(np.float32)
    whole = next(iter(executable.run({name: images}).values())).copy()
    single = next(iter(executable.run({name: images[1:2]}).values()))
    np.testing.assert_allclose(whole[1:2], single, rtol=1e-4, atol=1e-5)


def test_quantized_convolutions_run_as_integers(
    shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    source = shared_data("models/cifar_resnet20.onnx")
    rng = np.random.default_rng(1)
    feeds: list[Tensors] = [
        {"input": rng.standard_normal((1, 3, 32, 32)).astype(np.float32)} for _ in range(4)
    ]
    artifact = compiled(
        source, tmp_path / "out", recipe="int8-minmax", calibration=feeds, shape=["N=1"]
    )
    program = engine.compile_file(str(artifact.path / "model.onnx"), "f32")
    types = [
        str(op.get_rt_info()["runtimePrecision"].astype(str))
        for op in program.get_runtime_model().get_ops()
        if op.get_rt_info()["layerType"].astype(str) == "Convolution"
    ]
    assert types
    assert sum(one in ("u8", "i8") for one in types) >= len(types) - 1


def one_node(op_type: str, shape: list[int], domain: str = "") -> ir.Node:
    x = ir.val("x", ir.DataType.FLOAT, shape)
    node = ir.node(op_type, [x], domain=domain)
    imports = {"": 24} | ({domain: 1} if domain else {})
    ir.Graph([x], node.outputs, nodes=[node], opset_imports=imports, name="g")
    return node


def test_a_refusal_is_what_the_engine_says() -> None:
    assert legalize.refusal(one_node("Relu", [2, 3])) is None
    assert "no conversion of Det" in str(legalize.refusal(one_node("Det", [3, 3])))
    assert "com.example.Magic" in str(legalize.refusal(one_node("Magic", [3], "com.example")))


def test_all_refused_nodes_are_listed(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="Quant") as caught:
        compiled(shared_data("models/espcn_x3_qonnx.onnx"), tmp_path / "out")
    assert len(caught.value.refusals) == 8
    assert not list(tmp_path.iterdir())
