"""What int8 costs real networks on labelled samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from trivium.compiler import model, prepare

Find = Callable[[str], Path]


def cifar(find: Find) -> tuple[Any, Any]:
    with np.load(find("samples/cifar10_test500.npz")) as archive:
        return archive["x"].astype(np.float32), archive["y"]


def normalized_cifar(find: Find) -> tuple[Any, Any]:
    x, y = cifar(find)
    mean = np.array([0.485, 0.456, 0.406], np.float32)
    deviation = np.array([0.229, 0.224, 0.225], np.float32)
    return ((x / 255 - mean) / deviation).transpose(0, 3, 1, 2), y


def mnist(find: Find) -> tuple[Any, Any]:
    with np.load(find("samples/mnist_test1000.npz")) as archive:
        return archive["x"][:, None].astype(np.float32), archive["y"]


def normalized_mnist(find: Find) -> tuple[Any, Any]:
    x, y = mnist(find)
    return ((x / 255 - 0.1307) / 0.3081).astype(np.float32), y


MODELS = {
    "mlperf_ic_resnet8_fp32": cifar,
    "cifar_resnet20": normalized_cifar,
    "cifar_resnet32": normalized_cifar,
    "mnist_cnn_cntk": mnist,
    "mnist_mlp_onnxmlir": normalized_mnist,
}


def accuracy(path: Path, x: Any, y: Any) -> float:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    size = entry.shape[0] if isinstance(entry.shape[0], int) else 100
    scores = [session.run(None, {entry.name: x[i : i + size]})[0] for i in range(0, len(x), size)]
    return float((np.concatenate(scores).argmax(axis=-1) == y).mean())


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["int8", "int8-minmax"])
@pytest.mark.parametrize("name", MODELS)
def test_int8_costs_less_than_a_point(
    name: str, recipe: str, shared_data: Find, tmp_path: Path
) -> None:
    x, y = MODELS[name](shared_data)
    source = shared_data(f"models/{name}.onnx")
    made = model.load(source)
    key = model.signature(made)[0][0].name
    calibration = [{key: x[i : i + 1]} for i in range(0, len(x), 4)]
    prepare.optimize(made, recipe, calibration=calibration)
    model.save(made, tmp_path / "int8.onnx")
    # Every sample counts 0.1 or 0.2 points.
    assert accuracy(tmp_path / "int8.onnx", x, y) >= accuracy(source, x, y) - 0.01
