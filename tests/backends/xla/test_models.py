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


def _normal(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


STATEFUL: dict[str, dict[str, Any]] = {
    "attention_past_state": {
        "input": _normal(1, 3, 768),
        "weight": _normal(768, 2304),
        "bias": _normal(2304),
        "past": _normal(2, 1, 12, 4, 64),
    },
    "genai_tiny_gpt2_past": {
        "input_ids": np.asarray([[5, 17, 900]], np.int32),
        "position_ids": np.asarray([[4, 5, 6]], np.int32),
        "attention_mask": np.ones((1, 7), np.int32),
        **{f"past_{layer}": _normal(2, 1, 4, 4, 8) for layer in range(5)},
    },
    "silero_vad_16k_op15": {
        "input": _normal(1, 576) * np.float32(0.1),
        "state": _normal(2, 1, 128),
        "sr": np.asarray(16000),
    },
}


@pytest.mark.parametrize("name", STATEFUL)
def test_model_with_state_agrees_with_onnx_runtime(
    name: str, shared_data: Callable[[str], Path]
) -> None:
    path = shared_data(f"models/{name}.onnx")
    expected, actual = reference(path, STATEFUL[name]), run(path, STATEFUL[name])
    for key, want in expected.items():
        scale = float(np.abs(want).max())
        np.testing.assert_allclose(actual[key], want, rtol=1e-3, atol=1e-5 * scale)


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
