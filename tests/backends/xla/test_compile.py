"""Real models through the real compilers: libtpu, the CUDA plug-in and XLA on the CPU."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import helper

import trivium
from trivium.backends.xla import hlo, platforms
from trivium.backends.xla.backend import BACKEND
from trivium.compiler.artifact import Artifact
from trivium.compiler.backend import BuildRequest
from trivium.compiler.errors import BackendFailed, BadInput, Unsupported
from trivium.compiler.types import Target, Workload

SharedData = Callable[[str], Path]

CPU = Target("cpu", "cpu", ("xla",))
V5E = Target(
    "tpu-v5e:2x2",
    "tpu",
    ("xla",),
    memory_bytes=16 * 2**30,
    chips=4,
    topology="2x2",
    options={"generation": "v5e"},
)
V4 = Target("tpu-v4", "tpu", ("xla",), memory_bytes=32 * 2**30, options={"generation": "v4"})
H100 = Target("nvidia-h100-sxm", "gpu", ("xla",), memory_bytes=80e9)

needs_cpu = pytest.mark.skipif(platforms.missing() is not None, reason=str(platforms.missing()))
needs_tpu = pytest.mark.skipif(
    platforms.missing("tpu") is not None, reason=str(platforms.missing("tpu"))
)
needs_cuda = pytest.mark.skipif(
    platforms.missing("cuda") is not None, reason=str(platforms.missing("cuda"))
)


def small_model(rows: int = 8, width: int = 16) -> ir.Model:
    """relu(x @ w) with its rows as the batch."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((width, 4)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["p"]),
            helper.make_node("Relu", ["p"], ["y"]),
        ],
        "small",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [rows, width])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [rows, 4])],
        [onnx.numpy_helper.from_array(w, "w")],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)]))


def saved(model: ir.Model, folder: Path) -> Path:
    path = folder / "small.onnx"
    ir.save(model, path)
    return path


def compiled(source: Path, target: Target, folder: Path, *shape: str, **options: str) -> Artifact:
    return trivium.compile(source, target, out=folder / "out", shape=shape, options=options)


def assert_computes_what_the_source_does(artifact: Artifact, source: Path) -> None:
    """Run the artifact on inputs that its compile has not seen."""
    executable = trivium.load(str(artifact.path))
    rng = np.random.default_rng(11)
    feed = {
        info.name: rng.standard_normal(info.shape).astype(info.dtype) for info in executable.inputs
    }
    want = ort.InferenceSession(source).run(None, feed)
    have = executable.run(feed)
    for expected, actual in zip(want, have.values(), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-4)


@needs_cpu
@pytest.mark.slow
def test_cpu_runs_a_real_model(shared_data: SharedData, tmp_path: Path) -> None:
    source = shared_data("models/mlperf_kws_dscnn_fp32.onnx")
    artifact = compiled(source, CPU, tmp_path, "N=2")
    manifest = artifact.manifest
    assert manifest["verification"]["status"] == "passed"
    assert manifest["memory"]["per_device_bytes"] > manifest["memory"]["weights_bytes"] > 0
    # DS-CNN is 2.66 million multiply-accumulates (MLPerf Tiny) for each of the batch of two.
    counted = manifest["details"]["xla"]["programs"]["main"]["compiler_flops"]
    assert counted == pytest.approx(2 * 2 * 2.66e6, rel=0.1)
    assert trivium.load(str(artifact.path)).measures_target
    assert_computes_what_the_source_does(artifact, source)


@needs_tpu
@pytest.mark.slow
def test_a_tpu_slice_shares_the_batch(shared_data: SharedData, tmp_path: Path) -> None:
    source = shared_data("models/mlperf_ic_resnet8_fp32.onnx")
    artifact = compiled(source, V5E, tmp_path, "N=8")
    manifest = artifact.manifest
    assert manifest["verification"]["status"] == "passed"
    assert "in place of tpu-v5e:2x2" in manifest["verification"]["compared"]["where"]
    details = manifest["details"]["xla"]
    assert 100e6 < details["peak_rss_bytes"] < 3e9
    assert (details["device_kind"], details["devices"]) == ("TPU v5 lite", 4)
    assert details["programs"]["main"]["partition"]["kind"] == "batch"
    assert details["programs"]["main"]["compile_seconds"] > 0
    assert all(manifest["memory"][key] > 0 for key in ("weights_bytes", "peak_bytes"))
    assert manifest["notes"] == ["data parallel: each of 4 devices computes 2 of the batch of 8"]

    text = (artifact.path / "main.hlo.txt").read_text()
    assert "is_scheduled=true" in text
    assert "num_partitions=4" in text
    # Tiled layouts are a TPU's; two of the batch of eight are what each chip gets.
    assert re.search(r"f32\[2,32,32,3\]\{[\d,]+:T\(", text)
    assert "operand_precision={highest,highest}" in text
    assert hlo.collectives(text) == details["programs"]["main"]["collectives"] == {}

    executable = trivium.load(str(artifact.path))
    assert not executable.measures_target
    assert_computes_what_the_source_does(artifact, source)


@needs_tpu
@pytest.mark.slow
def test_another_generation_and_a_batch_that_does_not_divide(
    shared_data: SharedData, tmp_path: Path
) -> None:
    source = shared_data("models/mlperf_kws_dscnn_fp32.onnx")
    two = replace(V4, name="tpu-v4:2x1x1", chips=2, topology="2x1x1")
    artifact = compiled(source, two, tmp_path, "N=1")
    details = artifact.manifest["details"]["xla"]
    # One device a chip: its two cores are fused, as on a v4 host.
    assert (details["device_kind"], details["devices"]) == ("TPU v4", 2)
    assert details["programs"]["main"]["partition"]["kind"] == "replicated"
    assert "a batch of 1 does not divide by 2" in artifact.manifest["notes"][0]
    assert artifact.manifest["verification"]["status"] == "passed"


@needs_cuda
@pytest.mark.slow
def test_an_h100_gets_machine_code(shared_data: SharedData, tmp_path: Path) -> None:
    source = shared_data("models/cifar_resnet20.onnx")
    artifact = compiled(source, H100, tmp_path, "N=4")
    manifest = artifact.manifest
    assert manifest["verification"]["status"] == "passed"
    code = manifest["details"]["xla"]["programs"]["main"]["machine_code"]
    images = [path.read_bytes() for path in sorted((artifact.path / "main.cubin").iterdir())]
    assert len(images) == code["cubins"] > 0
    assert all(image.startswith(b"\x7fELF") for image in images)
    assert {hlo.compute_capability(image) for image in images} == {90}
    assert b"wrapped_transpose" in b"".join(images)
    assert "__cudnn$convBiasActivationForward" in (artifact.path / "main.hlo.txt").read_text()
    assert_computes_what_the_source_does(artifact, source)


@needs_cuda
@pytest.mark.slow
def test_a_quantized_network_on_a_gpu(shared_data: SharedData, tmp_path: Path) -> None:
    source = shared_data("models/mlperf_kws_dscnn_int8_qdq.onnx")
    manifest = compiled(source, H100, tmp_path, "N=2").manifest
    assert manifest["verification"]["status"] == "passed"
    assert any("no convolution of integers" in note for note in manifest["notes"])
    # The weights stay as small as they are quantized.
    assert manifest["memory"]["weights_bytes"] < 40_000


@needs_tpu
@pytest.mark.slow
def test_two_tpu_compiles_at_once(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    sources = []
    for folder in folders:
        folder.mkdir()
        sources.append(saved(small_model(), folder))
    with ThreadPoolExecutor(2) as pool:
        artifacts = list(pool.map(compiled, sources, [V5E, V4], folders))
    for artifact in artifacts:
        assert artifact.manifest["verification"]["status"] == "passed"
    kinds = [artifact.manifest["details"]["xla"]["device_kind"] for artifact in artifacts]
    assert kinds == ["TPU v5 lite", "TPU v4"]


@needs_cpu
@pytest.mark.slow
@pytest.mark.parametrize(("bytes_", "part"), [(200, "weights 256"), (800, "arguments 768")])
def test_a_device_that_is_too_small(bytes_: int, part: str, tmp_path: Path) -> None:
    tiny = replace(CPU, memory_bytes=float(bytes_))
    with pytest.raises(Unsupported, match=rf"cpu: it needs .*{part}.* and a device has {bytes_}"):
        compiled(saved(small_model(), tmp_path), tiny, tmp_path)
    assert not (tmp_path / "out").exists()


TENSOR_PARALLEL = """
import jax, json, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from trivium.backends.xla import hlo, compiling
from trivium.backends.xla.platforms import Device

mesh = Mesh(np.array(compiling.compile_devices(Device("tpu", 4, "v5e:2x2"))), ("chips",))
on = lambda *axes: NamedSharding(mesh, P(*axes))
of = lambda *shape: jax.ShapeDtypeStruct(shape, np.float16)
block = jax.jit(
    lambda x, up, down: jax.nn.relu(x @ up) @ down,
    in_shardings=(on("chips"), on(None, "chips"), on("chips", None)),
    out_shardings=on(),
)
lowered = block.lower(of(64, 512), of(512, 2048), of(2048, 512))

def again(dump):
    options = {"xla_dump_to": str(dump), "xla_dump_hlo_as_text": True}
    return lowered.compile(compiler_options=options)

class Unreadable:
    def as_text(self):
        raise jax.errors.JaxRuntimeError("async-update instruction should have 1 operands")

compiled = lowered.compile()
texts = compiling.text_of(compiled, again), compiling.text_of(Unreadable(), again)
print(json.dumps([hlo.collectives(text) for text in texts]))
"""


@needs_tpu
@pytest.mark.slow
def test_the_collectives_of_a_tensor_parallel_block() -> None:
    """Its activations (64 x 512 halves) are gathered once and its partial sums added once; so say
    what jaxlib reads and what the compiler dumps where jaxlib cannot read."""
    environment = platforms.environment(platforms.device_of(V5E))
    output = subprocess.run(
        [sys.executable, "-P", "-c", TENSOR_PARALLEL],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    ).stdout
    found, dumped = json.loads(output)
    assert dumped == found
    assert found.keys() == {"all-gather", "all-reduce"}
    assert all(one["count"] == 1 for one in found.values())
    assert found["all-gather"]["bytes"] == 64 * 512 * 2


@needs_tpu
@pytest.mark.slow
def test_what_the_tpu_compiler_itself_finds_too_large(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["a", "b"], ["c"]),
            helper.make_node("ReduceMax", ["c"], ["m"], keepdims=0),
            helper.make_node("Sub", ["c", "m"], ["y"]),
        ],
        "large",
        [
            helper.make_tensor_value_info("a", onnx.TensorProto.FLOAT, [70000, 1]),
            helper.make_tensor_value_info("b", onnx.TensorProto.FLOAT, [1, 70000]),
        ],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [70000, 70000])],
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)]))
    one = replace(V5E, name="tpu-v5e", chips=1, topology=None)
    with pytest.raises(Unsupported, match=r"does not fit into the device's memory.*exceeds"):
        BACKEND.build(model, BuildRequest(one, Workload(), tmp_path))


def _children(of: int) -> list[int]:
    return [
        int(child)
        for task in Path(f"/proc/{of}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]


@needs_cpu
@pytest.mark.slow
def test_a_killed_compiler_is_an_error_and_no_hang(tmp_path: Path) -> None:
    request = BuildRequest(CPU, Workload(), tmp_path)
    before = set(_children(os.getpid()))
    with ThreadPoolExecutor(1) as pool:
        building = pool.submit(BACKEND.build, small_model(), request)
        while not (started := set(_children(os.getpid())) - before):
            assert not building.done()
            time.sleep(0.01)
        os.kill(started.pop(), signal.SIGKILL)
        with pytest.raises(BackendFailed, match="the compiler was ended by SIGKILL"):
            building.result(timeout=60)


def _running(pid: int) -> bool:
    """Whether a process exists and is no zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@needs_cpu
@pytest.mark.slow
def test_the_compiler_ends_with_its_caller(tmp_path: Path) -> None:
    source = saved(small_model(), tmp_path)
    code = (
        "import sys, trivium; from trivium.compiler.types import Target; "
        "trivium.compile(sys.argv[1], Target('cpu', 'cpu', ('xla',)), out=sys.argv[2])"
    )
    caller = subprocess.Popen(
        [sys.executable, "-P", "-c", code, str(source), str(tmp_path / "out")],
        stderr=subprocess.DEVNULL,
    )
    while not (children := _children(caller.pid)):
        assert caller.poll() is None
        time.sleep(0.01)
    caller.kill()
    caller.wait()
    # It notices when it has started Python, which takes a while on a busy machine.
    for _ in range(3000):
        if not _running(children[0]):
            break
        time.sleep(0.01)
    assert not _running(children[0])
    assert not (tmp_path / "out").exists()


@needs_cpu
def test_the_deadline_ends_the_compiler(tmp_path: Path) -> None:
    before = set(_children(os.getpid()))
    request = BuildRequest(CPU, Workload(), tmp_path, options={"deadline": "0.2"})
    with pytest.raises(BackendFailed, match=r"did not finish within 0.2 s.*--option deadline="):
        BACKEND.build(small_model(), request)
    assert set(_children(os.getpid())) == before


@needs_cpu
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speed": "11"}, "no option 'speed'"),
        ({"deadline": "soon"}, "deadline: 'soon'.*give seconds, above 0"),
        ({"precision": "exact"}, "give highest, high or default"),
    ],
)
def test_bad_options(options: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=message):
        BACKEND.build(small_model(), BuildRequest(CPU, Workload(), tmp_path, options=options))


@needs_cpu
def test_open_dimensions_are_named(shared_data: SharedData, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"input\[N\] is symbolic.*--shape input=1x3x32x32"):
        compiled(shared_data("models/cifar_resnet20.onnx"), CPU, tmp_path)


RUN_ON_FOUR = """
import json, sys
import numpy as np
import trivium

executable = trivium.load(sys.argv[1])
x = np.random.default_rng(5).standard_normal((8, 16)).astype(np.float32)
(y,) = executable.run({"x": x}).values()
print(json.dumps([executable.where, executable.measures_target, y.tolist()]))
"""


@needs_cpu
@pytest.mark.slow
def test_a_partitioned_program_runs_on_several_devices(tmp_path: Path) -> None:
    """The road that a real slice takes, on four devices that XLA makes of this CPU."""
    source = saved(small_model(), tmp_path)
    artifact = compiled(source, replace(CPU, name="cpu:4", chips=4), tmp_path)
    assert artifact.manifest["details"]["xla"]["devices"] == 4
    assert artifact.manifest["details"]["xla"]["programs"]["main"]["partition"]["kind"] == "batch"
    x = np.random.default_rng(5).standard_normal((8, 16)).astype(np.float32)
    (want,) = ort.InferenceSession(source).run(None, {"x": x})
    for count, measures in ((4, True), (1, False)):
        output = subprocess.run(
            [sys.executable, "-P", "-c", RUN_ON_FOUR, str(artifact.path)],
            env={**os.environ, "JAX_NUM_CPU_DEVICES": str(count)},
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
        ).stdout
        where, measures_target, have = json.loads(output)
        assert measures_target is measures
        assert ("in place of cpu:4" in where) is not measures
        np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-6)


@needs_cpu
@pytest.mark.slow
def test_a_shape_that_only_the_run_knows_is_unsupported(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["x", "shape"], ["y"])],
        "reshape",
        [
            helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [6]),
            helper.make_tensor_value_info("shape", onnx.TensorProto.INT64, [2]),
        ],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["a", "b"])],
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)]))
    with pytest.raises(Unsupported, match="the value of 'shape', which is not known before"):
        BACKEND.build(model, BuildRequest(CPU, Workload(), tmp_path))


@needs_cpu
@pytest.mark.slow
def test_one_artifact_holds_a_program_for_each_size(
    shared_data: SharedData, tmp_path: Path
) -> None:
    source = shared_data("models/mlperf_ad_autoencoder_fp32.onnx")
    artifact = compiled(source, CPU, tmp_path, "N=1,4")
    assert [program.name for program in artifact.programs] == ["N1", "N4"]
    assert [program.outputs[0].shape for program in artifact.programs] == [(1, 640), (4, 640)]
    compared = artifact.manifest["verification"]
    assert (compared["status"], compared["compared"]["samples"]) == ("passed", 2)
    stored = (artifact.path / "weights.safetensors").stat().st_size
    assert stored < 1.01 * artifact.manifest["memory"]["weights_bytes"] + 8192

    executable = trivium.load(str(artifact.path))
    rng = np.random.default_rng(0)
    name = executable.inputs[0].name
    for rows in (1, 4):
        x = rng.standard_normal((rows, 640)).astype(np.float32)
        want = ort.InferenceSession(source).run(None, {name: x})[0]
        (have,) = executable.run({name: x}).values()
        np.testing.assert_allclose(have, want, rtol=1e-3, atol=1e-4)
    with pytest.raises(BadInput, match=r"shape \[2, 640\].*built are the shapes \[1, 640\], \[4"):
        executable.run({name: np.zeros((2, 640), np.float32)})


@needs_cpu
@pytest.mark.slow
def test_weights_are_stored_once_and_damage_is_noticed(tmp_path: Path) -> None:
    artifact = compiled(saved(small_model(width=4096), tmp_path), CPU, tmp_path)
    sizes = {path.name: path.stat().st_size for path in artifact.path.iterdir()}
    assert sizes["weights.safetensors"] < 4096 * 4 * 4 + 500
    assert sizes["model.onnx"] + sizes["main.stablehlo"] < 8000

    executable = trivium.load(str(artifact.path))
    with pytest.raises(BadInput, match="the input 'x' is missing"):
        executable.run({"y": np.zeros(1)})
    with pytest.raises(BadInput, match=r"'x' has shape \[1, 4096\], the model takes"):
        executable.run({"x": np.zeros((1, 4096), np.float32)})

    without = Artifact(artifact.path, {**artifact.manifest, "details": {}})
    with pytest.raises(BadInput, match="its manifest lacks 'xla'; compile the model again"):
        BACKEND.load(without)
    (artifact.path / "main.stablehlo").write_bytes(b"not an export")
    with pytest.raises(BadInput, match="not a jax export"):
        BACKEND.load(artifact)
