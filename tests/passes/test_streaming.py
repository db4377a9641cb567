"""Weights that are quantized while they are written: the same bytes, and little memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from benchmarks import checkpoints
from trivium.compiler import model as models
from trivium.compiler.errors import BadInput
from trivium.passes import quantize_weights
from trivium.passes.quantize_weights import QuantizeWeights

CHOICES = [(4, 128, True), (4, 32, False), (8, 64, True), (8, 16, False)]


def quantized(
    source: Path, threshold: int, monkeypatch: pytest.MonkeyPatch, **how: object
) -> dict[str, bytes]:
    monkeypatch.setattr(quantize_weights, "_STREAMED_BYTES", threshold)
    model = models.load(source)
    QuantizeWeights(min_elements=16, **how).run(model)  # type: ignore[arg-type]
    return {
        name: value.const_value.tobytes()
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }


@pytest.mark.parametrize(("bits", "block_size", "symmetric"), CHOICES)
def test_the_same_codes_as_from_memory(
    bits: int, block_size: int, symmetric: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoints.write(tmp_path, "1M")
    how = {"bits": bits, "block_size": block_size, "symmetric": symmetric}
    streamed = quantized(source, 1, monkeypatch, **how)
    whole = quantized(source, 1 << 40, monkeypatch, **how)
    assert streamed == whole
    assert sum(name.endswith("_quantized") for name in streamed) == 15


@pytest.mark.parametrize("shape", [(96, 7), (50, 33)])
@pytest.mark.parametrize("transposed", [False, True])
def test_odd_shapes_and_gemm(
    shape: tuple[int, int], transposed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(3)
    stored = rng.standard_normal(shape[::-1] if transposed else shape).astype(np.float32)
    x = ir.val("x", ir.DataType.FLOAT, [2, shape[0]])
    weight = ir.Value(name="w", const_value=ir.tensor(stored, name="w"))
    node = ir.node("Gemm", [x, weight], {"transB": int(transposed)})
    y = node.outputs[0]
    y.name, y.dtype, y.shape = "y", ir.DataType.FLOAT, ir.Shape([2, shape[1]])
    graph = ir.Graph(
        [x], [y], nodes=[node], initializers=[weight], opset_imports={"": 24}, name="g"
    )
    path = tmp_path / "m.onnx"
    models.save(ir.Model(graph, ir_version=11), path, external=True, threshold=1)
    how = {"bits": 4, "block_size": 32}
    assert quantized(path, 1, monkeypatch, **how) == quantized(path, 1 << 40, monkeypatch, **how)


def test_a_weight_that_is_not_finite_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoints.write(tmp_path, "1M")
    file = source / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-2:] = b"\xc0\x7f"  # the last weight, of lm_head, becomes NaN
    file.write_bytes(data)
    with pytest.raises(BadInput, match=r"lm_head.*NaN.*exclude"):
        quantized(source, 1, monkeypatch)


_OPTIMIZE = """
import sys
from trivium.compiler.cli import main
sys.exit(main(["optimize", sys.argv[1], "--recipe", "int4", "-o", sys.argv[2]]))
"""


@pytest.mark.slow
def test_memory_does_not_follow_the_largest_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vocabulary's projection alone is 262 MB in float32."""
    shape = checkpoints.Shape(2048, 1, 16, 16, 512)
    monkeypatch.setitem(checkpoints.SHAPES, "wide", shape)
    tiny, wide = (checkpoints.write(tmp_path, name) for name in ("1M", "wide"))
    peaks = []
    for source in (tiny, wide):
        command = [sys.executable, "-c", _OPTIMIZE, str(source), str(tmp_path / "out.onnx")]
        probe = (
            "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
        )
        done = subprocess.run(
            [sys.executable, "-c", probe, *command], check=True, capture_output=True, text=True
        )
        peaks.append(int(done.stdout.split()[-1]) * 1024)
    assert peaks[1] - peaks[0] < 160e6
