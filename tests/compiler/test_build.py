"""A compile from a real model to a verified artifact, on the default backend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

import trivium


@pytest.mark.parametrize("name", ["cifar_resnet20", "mlperf_kws_dscnn_fp32", "magika_v3_3"])
def test_compiled_model_computes_what_the_source_does(
    name: str, shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    source = shared_data(f"models/{name}.onnx")
    artifact = trivium.compile(source, "cpu", out=tmp_path / "out")
    assert artifact.manifest["verification"]["status"] == "passed"

    executable = trivium.load(str(artifact.path))
    rng = np.random.default_rng(7)
    info = executable.inputs[0]
    shape = [dim if isinstance(dim, int) else 1 for dim in info.shape]
    feed = {
        info.name: (
            rng.integers(0, 256, shape).astype(np.int32)
            if info.dtype == "int32"
            else rng.standard_normal(shape).astype(np.float32)
        )
    }
    expected = ort.InferenceSession(source).run(None, feed)
    actual = executable.run(feed)
    for want, have in zip(expected, actual.values(), strict=True):
        np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-5)
