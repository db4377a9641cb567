"""TVM builds real models, and what it builds computes what they do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

import trivium
from trivium.backends.tvm import cuda, operators, weights
from trivium.compiler.backend import Executable, Tensors
from trivium.compiler.errors import BackendFailed, BadInput, ToolchainMissing, Unsupported
from trivium.compiler.types import Target

pytest.importorskip("tvm", reason="apache-tvm is not installed")

CPU = Target("cpu", "cpu", ("tvm",))
H100 = Target("nvidia-h100-sxm", "gpu", ("tvm",), options={"arch": "sm_90"})

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


def agree(executable: Executable, source: Path, feed: Tensors) -> None:
    actual = executable.run(feed)
    session = ort.InferenceSession(source)
    names = [output.name for output in session.get_outputs()]
    for name, want in zip(names, session.run(names, feed), strict=True):
        np.testing.assert_allclose(actual[name], want, rtol=1e-3, atol=1e-4 * np.abs(want).max())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("cifar_resnet20", "1x3x32x32"),
        ("mlperf_kws_dscnn_fp32", "1x49x10x1"),
        ("mlperf_ad_autoencoder_fp32", "2x640"),
        ("mnist_cnn_cntk", "1x1x28x28"),
        ("magika_v3_3", "1x2048"),
        ("mlperf_ic_resnet8_int8_qdq", "1x32x32x3"),
    ],
)
def test_real_models_compute_what_onnx_runtime_does(
    name: str, shape: str, shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    source = shared_data(f"models/{name}.onnx")
    info = ort.InferenceSession(source).get_inputs()[0]
    artifact = trivium.compile(
        source, CPU, out=tmp_path / "out", shape=[f"{info.name}={shape}"], use_cache=False
    )
    assert artifact.manifest["verification"]["status"] == "passed"
    executable = artifact.load()
    assert executable.measures_target
    rng = np.random.default_rng(11)
    sizes = [int(size) for size in shape.split("x")]
    dtype = {"tensor(int32)": np.int32, "tensor(int8)": np.int8}.get(info.type, np.float32)
    draw = rng.standard_normal(sizes) if dtype is np.float32 else rng.integers(0, 100, sizes)
    agree(executable, source, {info.name: draw.astype(dtype)})


@pytest.mark.slow
def test_transformer_of_high_level_operators(transformer: Path, tmp_path: Path) -> None:
    artifact = trivium.compile(transformer, CPU, out=tmp_path / "out", use_cache=False)
    assert artifact.manifest["verification"]["status"] == "passed"
    feed = {"x": np.random.default_rng(5).standard_normal((1, 6, 32)).astype(np.float32)}
    agree(artifact.load(), transformer, feed)


@pytest.mark.slow
def test_weights_are_stored_once_and_outside_of_the_library(
    transformer: Path, tmp_path: Path
) -> None:
    artifact = trivium.compile(transformer, CPU, out=tmp_path / "out", use_cache=False)
    index = artifact.manifest["details"]["weights"]
    source = ir.load(transformer)
    stored = (artifact.path / weights.FILE).read_bytes()
    library = (artifact.path / "model.so").read_bytes()
    assert {entry["name"] for entry in index} >= {"wq", "wk", "wv", "up", "down"}
    for entry in index:
        tensor = source.graph.initializers[entry["name"]].const_value
        assert tensor is not None
        content = tensor.tobytes()
        assert entry["offset"] % weights.ALIGNMENT == 0
        assert stored[entry["offset"] : entry["offset"] + len(content)] == content
        assert stored.count(content) == 1
        assert content not in library


@needs_nvcc
@pytest.mark.slow
def test_cuda_target_gets_a_cubin_for_its_architecture(transformer: Path, tmp_path: Path) -> None:
    artifact = trivium.compile(transformer, H100, out=tmp_path / "out", use_cache=False)
    data = (artifact.path / cuda.CUBIN).read_bytes()
    assert data.startswith(b"\x7fELF")
    made = cuda.read_cubin(data)
    assert made.sm == 90
    assert list(made.kernels) == artifact.manifest["details"]["cuda"]["kernels"]
    assert any("softmax" in kernel for kernel in made.kernels)
    assert any("matmul" in kernel for kernel in made.kernels)
    source = (artifact.path / cuda.SOURCE).read_text()
    assert all(f"{kernel}(" in source for kernel in made.kernels)

    assert artifact.manifest["verification"]["status"] == "passed"
    executable = artifact.load()
    assert not executable.measures_target
    assert "in place of nvidia-h100-sxm" in executable.where


@needs_nvcc
def test_cubin_of_another_architecture_is_told_apart(tmp_path: Path) -> None:
    source = tmp_path / "k.cu"
    source.write_text('extern "C" __global__ void twice(float* x) { x[threadIdx.x] *= 2.f; }\n')
    for arch, sm in (("sm_80", 80), ("sm_90", 90)):
        made = cuda.compile_cubin(source, tmp_path / "k.cubin", arch)
        assert made == cuda.Cubin(sm, ("twice",))


@needs_nvcc
def test_nvcc_rejecting_its_input_is_reported(tmp_path: Path) -> None:
    source = tmp_path / "k.cu"
    source.write_text("__global__ void k(float* x) { x[0] = no_such_name; }\n")
    with pytest.raises(BackendFailed, match="no_such_name"):
        cuda.compile_cubin(source, tmp_path / "k.cubin", "sm_90")
    with pytest.raises(ToolchainMissing, match="sm_1"):
        cuda.compile_cubin(source, tmp_path / "k.cubin", "sm_1")


def test_what_is_no_cubin_is_rejected() -> None:
    with pytest.raises(BackendFailed, match="not a cubin"):
        cuda.read_cubin(Path("/proc/self/exe").read_bytes()[:4096])
    with pytest.raises(BackendFailed, match="not a cubin"):
        cuda.read_cubin(b"__global__ void source(float*)")


def test_missing_nvcc_is_named_before_anything_is_built(
    transformer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(ToolchainMissing, match=r"nvcc is not on this machine.*CUDA toolkit"):
        trivium.compile(transformer, H100, out=tmp_path / "out", use_cache=False)
    assert not (tmp_path / "out").exists()


def test_table_of_operators_is_the_importers_own() -> None:
    import onnx.defs
    from tvm.relax.frontend.onnx.onnx_frontend import _get_convert_map

    standard = {
        schema.name
        for schema in onnx.defs.get_all_schemas()
        if schema.domain == "" and schema.name != "Attention"
    }
    assert standard & set(_get_convert_map()) == set(operators.IMPORTED)
    assert not operators.IMPORTED & set(operators.OPENED)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("lstm_bidir", "TVM's ONNX importer has no converter for LSTM"),
        ("conv_int4_qdq", "is INT4, and TVM's tensors are bytes at least"),
        ("espcn_x3_qonnx", "takes the standard domain only, not 'onnx.brevitas'"),
    ],
)
def test_refusals_name_the_node_and_the_reason(
    model: str, reason: str, shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    source = shared_data(f"models/{model}.onnx")
    shape = ["Input3=2x1x2"] if model == "lstm_bidir" else []
    with pytest.raises(Unsupported) as caught:
        trivium.compile(source, CPU, out=tmp_path / "out", shape=shape, use_cache=False)
    assert caught.value.refusals
    assert all(reason in line for line in caught.value.refusals)


def test_symbolic_dimensions_are_asked_for(
    shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    source = shared_data("models/mlperf_ad_autoencoder_fp32.onnx")
    with pytest.raises(BadInput, match="--shape input_1=1x640"):
        trivium.compile(source, CPU, out=tmp_path / "out", use_cache=False)


@pytest.mark.slow
def test_library_for_another_cpu_is_not_run(transformer: Path, tmp_path: Path) -> None:
    artifact = trivium.compile(transformer, CPU, out=tmp_path / "out", use_cache=False)
    manifest = json.loads((artifact.path / "manifest.json").read_text())
    manifest["details"]["host"] = "power9"
    (artifact.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ToolchainMissing, match="compiled for a power9"):
        trivium.load(str(artifact.path))
