"""What can be held to account of TensorRT without it: the graph, the folder, the refusals."""

from __future__ import annotations

import json
import py_compile
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

import trivium
from trivium.backends.tensorrt import legalize, operators, settings
from trivium.backends.tensorrt.backend import BUILD, README, RUN, TensorRTBackend, why_not_here
from trivium.compiler import recipe, reference, verify
from trivium.compiler.errors import BadInput, ToolchainMissing, Unsupported
from trivium.compiler.options import values_of
from trivium.compiler.types import Target, TensorInfo, Workload

H100 = Target("nvidia-h100-sxm", "gpu", ("tensorrt",), options={"arch": "sm_90"})

without_tensorrt = pytest.mark.skipif(why_not_here() is None, reason="TensorRT is installed here")


@without_tensorrt
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("cifar_resnet20", []),
        ("mlperf_kws_dscnn_fp32", ["input_1=1x49x10x1"]),
        ("mlperf_ad_autoencoder_fp32", []),
        ("mnist_cnn_cntk", []),
        ("magika_v3_3", []),
        ("lstm_bidir", []),
    ],
)
def test_folder_holds_a_graph_that_computes_the_same(
    name: str, shape: list[str], shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    source = shared_data(f"models/{name}.onnx")
    artifact = trivium.compile(source, H100, out=tmp_path / "out", shape=shape, use_cache=False)
    manifest = artifact.manifest
    assert manifest["verification"]["status"] == "not-run"
    assert "TensorRT is not installed" in manifest["verification"]["reason"]
    assert manifest["details"]["engine_built"] is False
    assert manifest["details"]["legalized_graph_max_rel_error"] < 1e-4
    assert any("no engine was built here" in note for note in manifest["notes"])

    # The graph in the folder, run by an engine that is here, on data of our own.
    info = ort.InferenceSession(source).get_inputs()[0]
    sizes = [dim if isinstance(dim, int) and dim > 0 else 1 for dim in info.shape]
    rng = np.random.default_rng(2)
    draw = rng.integers(0, 200, sizes) if "int" in info.type else rng.standard_normal(sizes)
    feed = {info.name: draw.astype(np.int32 if "int" in info.type else np.float32)}
    want = ort.InferenceSession(source).run(None, feed)
    have = ort.InferenceSession(artifact.path / settings.MODEL).run(None, feed)
    for one, other in zip(want, have, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-3, atol=1e-4 * np.abs(one).max())


@without_tensorrt
def test_loading_a_folder_says_what_is_missing(
    shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    source = shared_data("models/mnist_mlp_onnxmlir.onnx")
    artifact = trivium.compile(source, H100, out=tmp_path / "out", use_cache=False)
    with pytest.raises(ToolchainMissing, match=r"TensorRT is not installed; .*build_engine\.py"):
        trivium.load(str(artifact.path))


@without_tensorrt
def test_scripts_stand_alone(transformer: Path, tmp_path: Path) -> None:
    artifact = trivium.compile(transformer, H100, out=tmp_path / "out", use_cache=False)
    for script in (BUILD, RUN):
        text = (artifact.path / script).read_text()
        assert "trivium" not in text.replace("Trivium", "")
        py_compile.compile(str(artifact.path / script), doraise=True)
    help_text = subprocess.run(
        [sys.executable, str(artifact.path / RUN), "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "--repeat" in help_text
    readme = (artifact.path / README).read_text()
    assert "--onnx=model.onnx" in readme
    assert BUILD in readme


def test_damaged_plan_is_refused_before_anything_reads_it(tmp_path: Path) -> None:
    """The checksum comes first: with it wrong, the script stops although TensorRT is a dummy."""
    source = Path(legalize.__file__).parent / "scripts" / RUN
    (tmp_path / RUN).write_text(source.read_text())
    (tmp_path / "engine.json").write_text('{"plan": "model.plan", "flags": []}')
    (tmp_path / "model.plan").write_bytes(b"damaged")
    (tmp_path / "model.sha256").write_text("0" * 64)
    (tmp_path / "tensorrt.py").write_text("")
    np.savez(tmp_path / "x.npz", x=np.zeros(1))
    done = subprocess.run(
        [sys.executable, RUN, "--input", "x.npz", "--output", "y.npz"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "does not match its checksum" in done.stderr


def test_high_level_operators_stay_whole(transformer: Path, tmp_path: Path) -> None:
    model, _ = trivium_optimized(transformer)
    kinds = [node.op_type for node in model.graph]
    assert {"Attention", "RotaryEmbedding", "RMSNormalization", "Swish", "Gelu"} <= set(kinds)
    assert all(operators.refusal(node) is None for node in model.graph)


def trivium_optimized(path: Path) -> tuple[ir.Model, Sequence[Any]]:
    from trivium.compiler import prepare

    model, _ = prepare.optimize(path)
    return model, recipe.apply(legalize.passes(), model)


def one_node(
    op_type: str,
    inputs: Sequence[tuple[Any, ...] | None],
    attributes: dict[str, Any] | None = None,
    *,
    outputs: int = 1,
    dtype: ir.DataType = ir.DataType.FLOAT,
) -> ir.Node:
    """A node over inputs given as (dtype, shape) or as an array, which makes it a constant."""
    values: list[ir.Value | None] = []
    for index, given in enumerate(inputs):
        if given is None:
            values.append(None)
        elif isinstance(given[0], ir.DataType):
            values.append(ir.val(f"x{index}", given[0], given[1]))
        else:
            tensor = ir.tensor(given[0], name=f"c{index}")
            stored = ir.val(f"c{index}", tensor.dtype, tensor.shape.numpy())
            stored.const_value = tensor
            values.append(stored)
    node = ir.node(op_type, values, attributes or {}, num_outputs=outputs, name="n")
    for index, output in enumerate(node.outputs):
        output.name, output.dtype = f"y{index}", dtype
    graph = ir.Graph(
        [v for v in values if v is not None and v.const_value is None],
        node.outputs,
        nodes=[node],
        opset_imports={"": 24},
    )
    for value in values:
        if value is not None and value.const_value is not None:
            graph.register_initializer(value)
    return node


F, I64 = ir.DataType.FLOAT, ir.DataType.INT64
HEADS = (F, [1, 4, 6, 8])


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        (one_node("NonZero", [(I64, [3])]), "x0 is INT64, and NonZero is taken in"),
        (one_node("QLinearMatMul", [(F, [2, 2])]), "no importer for QLinearMatMul"),
        (one_node("Relu", [(ir.DataType.DOUBLE, [2])]), "x0 is DOUBLE"),
        (one_node("Attention", [(F, [1, 6, 32])] * 3), "Q has 3 dimensions, and it takes 4"),
        (one_node("Attention", [HEADS] * 3 + [(F, [6, 6])]), "attn_mask does not have 4"),
        (one_node("Attention", [HEADS] * 3, {"softcap": 2.0}), "softcap=2.0"),
        (one_node("Attention", [HEADS] * 3, outputs=3), "the output present_key"),
        (one_node("MaxPool", [(F, [1, 2, 8, 8])], outputs=2), "the output Indices"),
        (one_node("MaxPool", [(F, [1, 2, 8])]), "1-D pooling"),
        (one_node("AveragePool", [(F, [1, 2, 8, 8])], {"dilations": [2, 2]}), "dilations=[2, 2]"),
        (
            one_node("QuantizeLinear", [(F, [2]), (np.float32(0.5),), (np.int8(3),)]),
            "zero point 3: quantization has to be symmetric",
        ),
        (one_node("CumSum", [(F, [2]), (I64, [])]), "axis is computed at run time"),
        (one_node("ReduceMean", [(F, [2]), (I64, [1])]), "axes is not an initializer"),
        (one_node("Resize", [(F, [1, 1, 4, 4])], {"mode": "cubic"}), "mode=cubic"),
        (one_node("ScatterND", [(F, [2])], {"reduction": "add"}), "reduction=add"),
        (one_node("TensorScatter", [(F, [1, 4, 8])] * 2), "past_cache has 3 dimensions"),
        (
            one_node("TensorScatter", [(F, [1, 4, 8, 2])] * 2, {"axis": 1}),
            "axis=1 (it takes -2)",
        ),
        (one_node("TopK", [(F, [4000]), (np.array([3900], np.int64),)], outputs=2), "K=3900"),
        (one_node("LSTM", [(F, [1, 2, 3])], {"layout": 1}), "layout=1"),
        (one_node("LayerNormalization", [(F, [2, 4])], outputs=2), "Mean and InvStdDev"),
        (one_node("GridSample", [(F, [1, 1, 2, 2, 2])]), "5 dimensions, not 4"),
        (
            one_node("RotaryEmbedding", [HEADS] * 3 + [(ir.DataType.INT32, [1, 6])]),
            "position_ids is INT32",
        ),
    ],
    ids=lambda given: given.op_type if isinstance(given, ir.Node) else "",
)
def test_refusals_name_what_is_in_the_way(node: ir.Node, reason: str) -> None:
    refused = operators.refusal(node)
    assert refused is not None
    assert reason in refused


@pytest.mark.parametrize(
    "node",
    [
        one_node("Attention", [HEADS] * 3),
        one_node("TensorScatter", [(F, [1, 4, 8, 2])] * 2, {"axis": -2}),
        one_node("MaxPool", [(F, [1, 2, 8, 8])]),
        one_node("QuantizeLinear", [(F, [2]), (np.float32(0.5),), (np.int8(0),)]),
        one_node("TopK", [(F, [4000]), (np.array([8], np.int64),)], outputs=2),
        one_node("Resize", [(F, [1, 1, 4, 4])], {"mode": "linear"}),
    ],
    ids=lambda node: str(node.op_type),
)
def test_what_the_parser_takes_is_not_refused(node: ir.Node) -> None:
    assert operators.refusal(node) is None


def test_table_says_what_its_source_says(shared_data: Callable[[str], Path]) -> None:
    """Held to the transcription of onnx-tensorrt's table, operator by operator."""
    names = {"FLOAT": "FP32", "FLOAT16": "FP16", "BFLOAT16": "BF16", "FLOAT8E4M3FN": "FP8",
             "FLOAT4E2M1": "FP4"}  # fmt: skip
    known = operators.types_by_operator()
    seen = set()
    for line in shared_data("tensorrt/onnx_operators_11.txt").read_text().splitlines():
        if line.startswith(("#", "TRT_")):
            continue
        name, supported, types, *_ = [*line.split("\t"), "", ""]
        seen.add(name)
        assert bool(known[name]) == (supported == "Y"), name
        assert {names.get(one.name, one.name) for one in known[name]} == set(
            filter(None, types.split(","))
        ), name
    assert seen == set(known)


def test_refused_model_lists_every_node(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    source = shared_data("models/mobilenetv2_imagenet_int8.onnx")
    with pytest.raises(Unsupported, match="symmetric") as caught:
        trivium.compile(source, H100, out=tmp_path / "out", shape=["batch=1"], use_cache=False)
    assert len(caught.value.refusals) > 100


@pytest.mark.parametrize(
    ("widths", "kv_heads", "mask", "extra", "whole"),
    [
        ((32, 32, 32), 4, None, {"is_causal": 1}, True),
        ((32, 16, 16), 2, (6, 6), {"scale": 0.3}, True),
        ((32, 32, 48), 4, (4, 6, 6), {}, True),
        ((32, 32, 32), 4, (2, 1, 6, 6), {}, True),
        # What the parser lacks is opened.
        ((32, 32, 32), 4, None, {"softcap": 2.0}, False),
    ],
)
def test_attention_is_kept_whole_where_the_parser_takes_it_and_computes_the_same(
    widths: tuple[int, int, int],
    kv_heads: int,
    mask: tuple[int, ...] | None,
    extra: dict[str, Any],
    whole: bool,
) -> None:
    rng = np.random.default_rng(0)
    shapes = [(2, 6, width) for width in widths] + ([mask] if mask is not None else [])
    attributes = {"q_num_heads": 4, "kv_num_heads": kv_heads, **extra}
    node = one_node("Attention", [(F, list(shape)) for shape in shapes], attributes)
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    model = ir.Model(graph, ir_version=10)
    feed = {f"x{i}": rng.standard_normal(s).astype(np.float32) for i, s in enumerate(shapes)}
    want = reference.run_model(model, [feed])
    recipe.apply(legalize.passes(), model)
    assert ("Attention" in {node.op_type for node in model.graph}) == whole
    assert [operators.refusal(node) for node in model.graph if operators.refusal(node)] == []
    assert verify.compare(want.outputs, reference.run_model(model, [feed]).outputs).within(1e-5)


def quantized_conv(zero: int) -> ir.Model:
    """x -> uint8 Q/DQ -> Conv with a uint8 weight and an int32 bias, as quantizers write it."""
    rng = np.random.default_rng(4)
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 24}, name="g")
    x = ir.val("x", F, [1, 8, 6, 6])
    graph.inputs.append(x)

    def stored(name: str, array: Any) -> ir.Value:
        tensor = ir.tensor(np.asarray(array), name=name)
        value = ir.val(name, tensor.dtype, tensor.shape.numpy())
        value.const_value = tensor
        graph.register_initializer(value)
        return value

    def add(op_type: str, inputs: list[ir.Value], name: str, dtype: ir.DataType) -> ir.Value:
        node = ir.node(op_type, inputs, {"axis": 0} if "Linear" in op_type else {}, name=name)
        node.outputs[0].name, node.outputs[0].dtype = f"{name}_out", dtype
        graph.append(node)
        return node.outputs[0]

    scale, point = stored("s", np.float32(0.03)), stored("z", np.uint8(zero))
    codes = add("QuantizeLinear", [x, scale, point], "q", ir.DataType.UINT8)
    data = add("DequantizeLinear", [codes, scale, point], "dq", F)
    weight = stored("w", rng.integers(0, 256, (8, 8, 3, 3)).astype(np.uint8))
    weight = add("DequantizeLinear", [weight, scale, stored("wz", np.uint8(128))], "dqw", F)
    bias = stored("b", rng.integers(-999, 999, 8).astype(np.int32))
    bias = add("DequantizeLinear", [bias, stored("bs", np.float32(9e-4))], "dqb", F)
    graph.outputs.append(add("Conv", [data, weight, bias], "conv", F))
    return ir.Model(graph, ir_version=10)


def test_unsigned_grid_around_128_becomes_signed_exactly() -> None:
    model = quantized_conv(128)
    feed = {"x": np.random.default_rng(1).standard_normal((1, 8, 6, 6)).astype(np.float32)}
    want = reference.run_model(model, [feed])
    assert any(operators.refusal(node) for node in model.graph)
    recipe.apply(legalize.passes(), model)
    assert [operators.refusal(node) for node in model.graph if operators.refusal(node)] == []
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("DequantizeLinear") == 2, "the bias stays in float"
    assert verify.compare(want.outputs, reference.run_model(model, [feed]).outputs).within(1e-6)
    assert not any(row.modified for row in recipe.apply([legalize.SignQuantization()], model))


def test_asymmetric_grid_is_left_and_refused() -> None:
    model = quantized_conv(90)
    recipe.apply(legalize.passes(), model)
    refusals = {operators.refusal(node) for node in model.graph}
    assert any(reason and "zero point 90" in reason for reason in refusals)


INPUTS = (TensorInfo("ids", "int64", ("batch", "length")), TensorInfo("x", "float32", (1, 4)))


def made_of(given: dict[str, str], workload: Workload | None = None) -> dict[str, Any]:
    return settings.settings(values_of(TensorRTBackend(), given), INPUTS, workload or Workload())


def test_profiles_follow_options_and_workload() -> None:
    given = {"profile.batch": "1:8:32", "tf32": "false", "weight_streaming": "true",
             "workspace_mib": "64"}  # fmt: skip
    made = made_of(given, Workload(dims={"length": 128}))
    assert made["profiles"] == [{"ids": {"min": [1, 1], "opt": [8, 128], "max": [32, 128]}}]
    assert made["flags"] == ["WEIGHT_STREAMING"]
    assert made["workspace_bytes"] == 64 << 20
    line = settings.trtexec(made)
    for part in ("--minShapes=ids:1x1", "--optShapes=ids:8x128", "--maxShapes=ids:32x128",
                 "--noTF32", "--allowWeightStreaming", "--memPoolSize=workspace:64M"):  # fmt: skip
        assert part in line
    assert "--sparsity" not in line
    assert "--noTF32" not in settings.trtexec(made_of({}))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"fp16": "true"}, "no option 'fp16'; it has .*optimization_level, profile.NAME"),
        ({"profile.batch": "8:1:32"}, "give min:opt:max"),
        ({"profile.nothing": "1:1:1"}, "symbolic are: batch, length"),
        ({"tf32": "yes"}, "give true or false"),
        ({"optimization_level": "9"}, "give a whole number from 0 to 5"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, str], reason: str) -> None:
    with pytest.raises(BadInput, match=reason):
        made_of(options)


def test_settings_file_is_what_the_scripts_read(tmp_path: Path) -> None:
    made = json.loads(json.dumps(made_of({})))
    scripts = Path(legalize.__file__).parent / "scripts"
    text = (scripts / BUILD).read_text() + (scripts / RUN).read_text()
    read = {key for key in made if f'settings["{key}"]' in text}
    assert read == set(made)


def test_extra_and_package_data_name_what_is_here() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
    data = project["tool"]["setuptools"]["package-data"]["trivium.backends.tensorrt"]
    assert set(data) == {"operators.toml", "scripts/*.py"}
