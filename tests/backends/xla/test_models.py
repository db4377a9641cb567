"""Real models, lowered and jitted on the CPU, against ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from trivium.backends.xla.lowering import lower, precise
from trivium.compiler import model as models
from trivium.compiler.samples import seeded
from trivium.compiler.types import Workload

jax = pytest.importorskip("jax", reason="the xla backend needs the extra trivium[tpu]")

FLOAT = (
    "cifar_resnet20",
    "espcn_x3_float",
    "lstm_bidir",
    "magika_v3_3",
    "mlperf_ad_autoencoder_fp32",
    "mlperf_ic_resnet8_fp32",
    "mlperf_kws_dscnn_fp32",
    "mnist_cnn_cntk",
    "mnist_mlp_onnxmlir",
    "pytorch_superres_x3",
    "scan_1",
)


def run(path: Path, feed: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Run a model through the lowering, jitted, on the CPU."""
    lowered = lower(models.load(path))
    with precise():
        outputs = jax.jit(lowered.function)(lowered.read(), feed)
        return {name: np.asarray(value) for name, value in outputs.items()}


def reference(path: Path, feed: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Run a model on ONNX Runtime without its optimizations."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(path, options)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


@pytest.mark.parametrize("name", FLOAT)
def test_float_model_agrees_with_onnx_runtime(
    name: str, shared_data: Callable[[str], Path]
) -> None:
    path = shared_data(f"models/{name}.onnx")
    (feed,) = seeded(models.load(path), Workload(), count=1, seed=3)
    expected = reference(path, feed)
    actual = run(path, feed)
    assert set(actual) == set(expected)
    for key, want in expected.items():
        assert actual[key].dtype == want.dtype
        np.testing.assert_allclose(
            actual[key], want, rtol=1e-3, atol=1e-5 * float(np.abs(want).max())
        )
