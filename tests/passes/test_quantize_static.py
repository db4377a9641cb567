"""Static quantization: where Q/DQ go, what ONNX Runtime makes of them, what is left alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest

import trivium
from tests.passes.helpers import model as parsed
from trivium.compiler import model, prepare, recipe, reference
from trivium.compiler.errors import BadInput
from trivium.compiler.passing import Declined, constant, declining
from trivium.passes.quantization.placement import PLACEMENTS
from trivium.passes.quantize_static import QuantizeStatic

Feeds = list[dict[str, np.ndarray[Any, Any]]]


def parse(text: str, **weights: np.ndarray[Any, Any]) -> ir.Model:
    """A model in normal form from onnx's text, with weights by name."""
    proto = onnx.parser.parse_model(f'<ir_version: 11, opset_import: ["" : 24]> {text}')
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    made = ir.from_proto(proto)
    recipe.run(recipe.read("normalize"), made)
    return made


def draw(*shape: int, seed: int = 0, spread: float = 0.3) -> np.ndarray[Any, Any]:
    return (np.random.default_rng(seed).standard_normal(shape) * spread).astype(np.float32)


def feeds(*shape: int, count: int = 4, name: str = "x") -> Feeds:
    return [{name: draw(*shape, seed=10 + i, spread=1.0)} for i in range(count)]


def digits_cnn() -> ir.Model:
    """The shape of a small CNN for 8x8 digits: every pattern of a residual network once."""
    return parse(
        """g (float[N,1,8,8] x) => (float[N,10] y) {
          c1 = Conv <pads = [1,1,1,1]> (x, w1, b1)
          r1 = Relu(c1)
          c2 = Conv <pads = [1,1,1,1]> (r1, w2, b2)
          s = Add(c2, r1)
          r2 = Relu(s)
          p = MaxPool <kernel_shape = [2,2], strides = [2,2]> (r2)
          a = GlobalAveragePool(p)
          f = Flatten(a)
          h = Gemm <transB = 1> (f, w3, b3)
          hr = Relu(h)
          y = Gemm(hr, w4, b4)
        }""",
        w1=draw(16, 1, 3, 3),
        b1=draw(16, seed=1),
        w2=draw(16, 16, 3, 3, seed=2),
        b2=draw(16, seed=3),
        w3=draw(32, 16, seed=4),
        b3=draw(32, seed=5),
        w4=draw(32, 10, seed=6),
        b4=draw(10, seed=7),
    )


def digits_mlp() -> ir.Model:
    return parse(
        """g (float[N,64] x) => (float[N,10] y) {
          h = Gemm(x, w1, b1)
          r = Relu(h)
          y = Gemm <transB = 1> (r, w2, b2)
        }""",
        w1=draw(64, 32),
        b1=draw(32, seed=1),
        w2=draw(10, 32, seed=2),
        b2=draw(10, seed=3),
    )


def optimized_ops(made: ir.Model, folder: Path) -> Counter[str]:
    """The operators that ONNX Runtime really runs."""
    path = folder / "model.onnx"
    model.save(made, path)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(folder / "optimized.onnx").graph.node
    return Counter(node.op_type for node in nodes)


def counts(made: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in made.graph)


def error(before: reference.Reference, after: reference.Reference) -> float:
    """Root mean square error relative to the signal."""
    want = np.concatenate([np.ravel(a) for sample in before.outputs for a in sample.values()])
    have = np.concatenate([np.ravel(a) for sample in after.outputs for a in sample.values()])
    return float(np.linalg.norm(want - have) / np.linalg.norm(want))


@pytest.mark.parametrize("method", ["minmax", "entropy"])
@pytest.mark.parametrize("policy", sorted(PLACEMENTS))
@pytest.mark.parametrize(
    ("make", "shape"), [(digits_cnn, (8, 1, 8, 8)), (digits_mlp, (8, 64))], ids=["cnn", "mlp"]
)
def test_quantized_models_stay_close_and_rest(
    make: Callable[[], ir.Model], shape: tuple[int, ...], policy: str, method: str
) -> None:
    made, data = make(), feeds(*shape)
    before = reference.run_model(made, data)
    one = QuantizeStatic(method=method, policy=policy, calibration=data)
    assert one(made).modified
    assert counts(made)["QuantizeLinear"] >= 1
    # Entropy clips tails on purpose, and noise has nothing but tails.
    assert error(before, reference.run_model(made, data)) < (0.05 if method == "minmax" else 0.15)
    again = counts(made)
    assert not one(made).modified
    assert counts(made) == again


def test_onnxruntime_runs_integers(tmp_path: Path) -> None:
    made = digits_cnn()
    QuantizeStatic(policy="onnxruntime", calibration=feeds(8, 1, 8, 8))(made)
    ops = optimized_ops(made, tmp_path)
    assert ops["QLinearConv"] == 2
    assert ops["QLinearAdd"] == 1
    assert ops["QLinearGlobalAveragePool"] == 1
    assert ops["QGemm"] == 2
    assert not {"Conv", "FusedConv", "Gemm", "FusedGemm", "Relu", "Add", "DequantizeLinear"} & set(
        ops
    )


def test_fpga_is_integer_from_first_to_last(tmp_path: Path) -> None:
    made = digits_cnn()
    QuantizeStatic(policy="fpga", calibration=feeds(8, 1, 8, 8))(made)
    for node in made.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            continue
        for value in node.inputs:
            maker = value.producer() if value is not None else None
            # Only the activation that folds into an operator reads what is not dequantized.
            assert node.op_type == "Relu" or (maker and maker.op_type == "DequantizeLinear"), node
    for node in made.graph:
        if node.op_type == "QuantizeLinear":
            zero = constant(node.inputs[2])
            assert zero is not None
            assert zero.dtype == np.uint8
            assert zero in (0, 128)
    output = made.graph.outputs[0]
    assert output.name == "y"
    assert output.producer().op_type == "DequantizeLinear"  # type: ignore[union-attr]  # it has one
    ops = optimized_ops(made, tmp_path)
    assert ops["QuantizeLinear"] == ops["DequantizeLinear"] == 1


def test_tensorrt_rules() -> None:
    made = digits_cnn()
    with declining() as declined:
        QuantizeStatic(policy="tensorrt", calibration=feeds(8, 1, 8, 8))(made)
    # One input channel; a product of ten columns.
    assert sum("too small" in note.reason for note in declined) == 2
    by_name = {value.name: value for node in made.graph for value in node.outputs}
    for node in made.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero = constant(node.inputs[2])
            scale = constant(node.inputs[1])
            assert zero is not None
            assert scale is not None
            assert zero.dtype == np.int8
            assert not zero.any()
            assert (scale > 0).all()
        if node.op_type in ("Conv", "Gemm"):
            assert node.inputs[2].is_initializer()  # type: ignore[union-attr]  # the bias is float
    residual = by_name["s"].producer()
    assert residual is not None
    kinds = [value.producer().op_type for value in residual.inputs]  # type: ignore[union-attr]  # computed
    assert kinds == ["Conv", "DequantizeLinear"]
    # One pair serves every reader of a tensor.
    quantized = [node.inputs[0] for node in made.graph if node.op_type == "QuantizeLinear"]
    assert len(set(quantized)) == len(quantized)


@pytest.mark.parametrize(
    ("text", "shape", "axis", "channels"),
    [
        ("y = Conv (x, w)", (6, 4, 3, 3), 0, 6),
        ("y = ConvTranspose (x, w)", (4, 6, 3, 3), 1, 6),
        ("f = Flatten(x) y = Gemm <transB = 1> (f, w)", (6, 256), 0, 6),
        ("f = Flatten(x) y = Gemm (f, w)", (256, 6), 1, 6),
        ("y = MatMul (x, w)", (8, 6), 1, 6),
    ],
)
def test_weights_have_one_scale_for_each_output_channel(
    text: str, shape: tuple[int, ...], axis: int, channels: int
) -> None:
    weight = draw(*shape)
    # Channels of very different size show a wrong axis at once.
    ramp = np.geomspace(1, 1e3, channels, dtype=np.float32)
    weight *= ramp.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    made = parse(f"g (float[1,4,8,8] x) => (y) {{ {text} }}", w=weight)
    QuantizeStatic(policy="xla", calibration=feeds(1, 4, 8, 8))(made)
    (restore,) = [
        node for node in made.graph
        if node.op_type == "DequantizeLinear" and node.inputs[0].is_initializer()  # type: ignore[union-attr]  # has inputs
    ]  # fmt: skip
    assert restore.attributes["axis"].as_int() == axis
    codes, scale = constant(restore.inputs[0]), constant(restore.inputs[1])
    assert codes is not None
    assert scale is not None
    others = tuple(i for i in range(len(shape)) if i != axis)
    assert scale == pytest.approx(np.abs(weight).max(axis=others) / 127)
    assert (np.abs(codes).max(axis=others) == 127).all()


def test_what_cannot_be_quantized_is_named() -> None:
    weight = draw(8, 8)
    weight[3, 3] = np.nan
    made = parse("g (float[2,8] x) => (y) { y = MatMul (x, bad) }", bad=weight)
    with declining() as declined:
        assert not QuantizeStatic(calibration=feeds(2, 8))(made).modified
    assert any("1 of 64 values of 'bad'" in note.reason for note in declined)


def test_constant_zero_and_dead_channels() -> None:
    weight, bias = draw(4, 4, 1, 1), draw(4, seed=1)
    weight[1] = 0
    weight[2] = 1e-12
    made = parse("g (float[1,4,4,4] x) => (y) { y = Conv (x, w, b) }", w=weight, b=bias)
    data = feeds(1, 4, 4, 4)
    before = reference.run_model(made, data)
    QuantizeStatic(policy="fpga", method="minmax", calibration=data)(made)
    assert error(before, reference.run_model(made, data)) < 0.02
    silent = parse("g (float[1,4,4,4] x) => (y) { y = Conv (x, w, b) }", w=weight, b=bias)
    zeros: Feeds = [{"x": np.zeros((1, 4, 4, 4), np.float32)}] * 2
    quiet = reference.run_model(silent, zeros)
    QuantizeStatic(policy="fpga", calibration=zeros)(silent)
    assert error(quiet, reference.run_model(silent, zeros)) < 0.02


def test_one_sample_is_warned_about_and_none_is_an_error() -> None:
    with declining() as declined:
        QuantizeStatic(calibration=feeds(1, 64, count=1))(digits_mlp())
    assert any("single sample" in note.reason for note in declined)
    with pytest.raises(BadInput, match="representative inputs"):
        QuantizeStatic()(digits_mlp())
    with pytest.raises(BadInput, match="empty"):
        QuantizeStatic(calibration=[])(digits_mlp())


def test_nan_in_the_data_is_named() -> None:
    data = feeds(2, 64)
    data[1]["x"][0, 0] = np.nan
    with declining() as declined:
        assert not QuantizeStatic(calibration=data)(digits_mlp()).modified
    assert Declined("x", "holds NaN or infinity on the calibration data") in declined


def test_excluded_nodes_and_other_operators_stay_float() -> None:
    made = digits_cnn()
    for index, node in enumerate(made.graph):
        node.name = f"layer{index}.{node.op_type}"
    QuantizeStatic(policy="xla", exclude=("layer0.*",), calibration=feeds(8, 1, 8, 8))(made)
    conv = made.graph[0]
    assert conv.op_type == "Conv"
    assert conv.inputs[1].is_initializer()  # type: ignore[union-attr]  # a weight
    only = digits_cnn()
    QuantizeStatic(policy="xla", op_types=("Gemm",), calibration=feeds(8, 1, 8, 8))(only)
    assert counts(only)["QuantizeLinear"] == 2


def test_a_prequantized_model_is_left_alone(shared_data: Callable[[str], Path]) -> None:
    made = model.load(shared_data("models/mlperf_ic_resnet8_int8_qdq.onnx"))
    prepare.optimize(made)
    before = counts(made)
    name = model.signature(made)[0][0].name
    data: Feeds = [{name: np.zeros((2, 32, 32, 3), np.int8)}]
    assert not QuantizeStatic(calibration=data)(made).modified
    assert counts(made) == before


def test_the_placement_is_that_of_the_target() -> None:
    from trivium.compiler.types import Target

    target = Target("board", "fpga", ("fpga",))
    made = digits_mlp()
    prepare.optimize(made, "int8", calibration=feeds(8, 64), target=target)
    assert made.graph.outputs[0].producer().op_type == "DequantizeLinear"  # type: ignore[union-attr]  # it has one


@pytest.mark.parametrize("name", ["int8", "int8-minmax"])
def test_recipe_compiles_for_this_cpu(
    name: str, shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    source = shared_data("models/mlperf_ic_resnet8_fp32.onnx")
    with np.load(shared_data("samples/cifar10_test500.npz")) as archive:
        images = archive["x"][:64].astype(np.float32)
    artifact = trivium.compile(
        source, recipe=name, calibration=[{"input_1": images}], out=tmp_path / "a"
    )
    verification: Mapping[str, Any] = artifact.manifest["verification"]
    assert verification["status"] == "passed"
    assert 0 < verification["max_abs_error"] < 0.2


@pytest.mark.parametrize("tail", [0.0, 30.0])
def test_auto_keeps_the_outputs_as_well_as_the_better_way(tail: float) -> None:
    """A rare large value counts in one model, and is a nuisance in the other."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((16, 8)).astype(np.float32)
    rare = rng.standard_normal((64, 16)).astype(np.float32)
    rare[7] *= 1 + tail
    feeds = [{"x": row[None]} for row in rare]
    errors = {}
    for method in ("minmax", "mse", "percentile", "auto"):
        made = parsed(
            "(float[n,16] x, float[16,16] v, float[16,8] w) => (y) "
            "{ h = MatMul (x, v) r = Relu (h) y = MatMul (r, w) }",
            v=np.eye(16, dtype=np.float32), w=w,
        )  # fmt: skip
        want = reference.run_model(made, feeds).outputs
        assert QuantizeStatic(method=method, calibration=feeds)(made).modified
        have = reference.run_model(made, feeds).outputs
        errors[method] = sum(
            float(np.square(a["y"] - b["y"]).sum()) for a, b in zip(want, have, strict=True)
        )
    assert errors["auto"] <= min(errors.values())


def test_auto_takes_data_that_can_be_read_only_once() -> None:
    made = parsed(
        "(float[n,16] x, float[16,8] w) => (y) { y = MatMul (x, w) }",
        w=np.ones((16, 8), np.float32),
    )
    feeds = iter([{"x": np.ones((1, 16), np.float32)}, {"x": np.zeros((1, 16), np.float32)}])
    assert QuantizeStatic(method="auto", calibration=feeds)(made).modified


def test_a_chain_that_quantizes_all_twice_is_refused() -> None:
    with pytest.raises(BadInput, match=r"quantize-static twice \(.*float8e4m3fn.*method=entropy"):
        recipe.read("fp8+int8-entropy")


def test_a_chain_that_leaves_something_to_the_second_is_not() -> None:
    text = """
        [[pass]]
        name = "quantize-static"
        op_types = ["Conv"]
        [[pass]]
        name = "quantize-static"
        activation = "float8e4m3fn"
        method = "minmax"
    """
    assert len(recipe.parse(text).steps) == 2
    assert len(recipe.read("prune-2:4+int8").steps) > 2
