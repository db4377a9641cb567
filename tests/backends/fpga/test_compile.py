"""Real models: quantized, compiled, simulated, and compared value by value."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trivium
from tests.backends.fpga import qdq
from tests.backends.fpga.test_layers import onnx_runtime_s_own
from trivium.backends.fpga import host_ops, interpret, ir, lower
from trivium.backends.fpga.hls import project
from trivium.compiler import prepare
from trivium.models import digits


@pytest.mark.slow
@pytest.mark.parametrize(("network", "at_least"), [(digits.mlp, 0.96), (digits.cnn, 0.97)])
def test_digits_from_float_to_kernel(
    network: Callable[[], Path], at_least: float, tmp_path: Path
) -> None:
    pytest.importorskip("sklearn")
    train, _, x, y = digits.split()
    calibration = [{"image": image[None]} for image in train[:100]]
    artifact = trivium.compile(
        network(), qdq.ZCU104, recipe="int8", calibration=calibration, out=tmp_path / "out"
    )
    assert artifact.manifest["verification"]["status"] == "passed"
    logits = artifact.load().run({"image": x})["logits"]
    assert (logits.argmax(1) == y).mean() >= at_least

    model, _ = prepare.optimize(network(), "int8", calibration=calibration, target=qdq.ZCU104)
    flow = lower.lower(model.graph).flow
    assert flow is not None
    ports = project.ports(flow)
    streams = host_ops.prepare(ports["inputs"][0], x)
    raw = [_integers(flow, frame)[flow.outputs[0].tensor] for frame in streams]
    np.testing.assert_array_equal(logits, host_ops.finish(ports["outputs"][0], np.stack(raw)))


def _integers(flow: ir.Dataflow, frame: Any) -> dict[str, Any]:
    return interpret.run(flow, {flow.inputs[0].tensor: frame})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlperf_ic_resnet8_int8_qdq", "mlperf_kws_dscnn_int8_qdq"])
def test_mlperf_tiny_bit_for_bit(
    name: str, shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    """C++ == interpreter == ONNX Runtime's integer kernels, on every value of every layer.

    The outputs of the whole graph in ONNX Runtime agree only nearly: it runs some convolutions of
    these graphs in float32, whose sums land on the other side of a tie a few times in a million.
    """
    source = shared_data(f"models/{name}.onnx")
    artifact = trivium.compile(source, qdq.ZCU104, out=tmp_path / "out", use_cache=False)
    assert artifact.manifest["verification"]["status"] == "passed"
    executable = artifact.load()
    info = executable.inputs[0]
    if "resnet8" in name:
        images = np.load(shared_data("samples/cifar10_test500.npz"))["x"][:4]
        x = (images.astype(np.int16) - 128).astype(np.int8)
    else:
        x = np.random.default_rng(0).integers(-128, 128, (4, 49, 10, 1)).astype(np.int8)
    (actual,) = executable.run({info.name: x}).values()

    model, _ = prepare.optimize(source)
    flow = lower.lower(model.graph).flow
    assert flow is not None
    ports = project.ports(flow)
    streams = host_ops.prepare(ports["inputs"][0], x)
    values = [_integers(flow, frame) for frame in streams]
    raw = np.stack([one[flow.outputs[0].tensor] for one in values])
    np.testing.assert_array_equal(actual, host_ops.finish(ports["outputs"][0], raw))

    for layer in flow.layers:
        if isinstance(layer, (ir.Convolution, ir.Depthwise)):
            given = values[0][layer.inputs[0]]
            expected = onnx_runtime_s_own(layer, flow, given, np.int8)
            np.testing.assert_array_equal(values[0][layer.output], expected)
