"""Weight-only quantization: the blocks, the packing, what ONNX Runtime makes of it, and memory."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trivium.compiler import model, recipe, reference
from trivium.compiler.passing import constant, declining
from trivium.passes.quantize_weights import QuantizeWeights


def product(text: str, **weights: np.ndarray[Any, Any]) -> ir.Model:
    proto = onnx.parser.parse_model(
        f'<ir_version: 11, opset_import: ["" : 24]> g (float[3,K] x) => (y) {{ {text} }}'
    )
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    made = ir.from_proto(proto)
    recipe.run(recipe.read("normalize"), made)
    return made


def draw(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def stored(made: ir.Model) -> list[np.ndarray[Any, Any]]:
    (restore,) = [node for node in made.graph if node.op_type == "DequantizeLinear"]
    arrays = [constant(value, limit=None) for value in restore.inputs]
    return [array for array in arrays if array is not None]


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 9),
    block=st.sampled_from([16, 32, 64]),
    bits=st.sampled_from([4, 8]),
    symmetric=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_block_is_the_textbook_formula(
    rows: int, columns: int, block: int, bits: int, symmetric: bool, seed: int
) -> None:
    weight = draw(rows, columns, seed=seed)
    made = product("y = MatMul (x, w)", w=weight)
    one = QuantizeWeights(bits=bits, block_size=block, symmetric=symmetric, min_elements=1)
    assert one(made).modified
    codes, scales, *zeros = (array.astype(np.float64) for array in stored(made))
    assert codes.shape == weight.shape
    for start in range(0, rows, block):
        part, scale = weight[start : start + block].astype(np.float64), scales[start // block]
        if symmetric:
            zero = np.zeros(columns)
            expected = np.abs(part).max(axis=0) / (2 ** (bits - 1) - 1)
        else:
            zero = zeros[0][start // block]
            low, high = np.minimum(part.min(axis=0), 0), np.maximum(part.max(axis=0), 0)
            expected = (high - low) / (2**bits - 1)
        np.testing.assert_allclose(scale, expected, rtol=1e-6)
        back = (codes[start : start + block] - zero) * scale
        assert (np.abs(back - part) <= scale * (0.5 if symmetric else 1.0) * (1 + 1e-4)).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("text", ["y = MatMul (x, w)", "y = Gemm <transB = 1> (x, w, b)"])
def test_onnxruntime_fuses_and_agrees(
    text: str, symmetric: bool, bits: int, tmp_path: Path
) -> None:
    shape, data = ((96, 200) if "transB" in text else (200, 96)), [{"x": draw(3, 200, seed=1)}]
    made = product(text, w=draw(*shape), b=draw(96, seed=2))
    before = reference.run_model(made, data).outputs[0]["y"]
    one = QuantizeWeights(bits=bits, block_size=32, symmetric=symmetric)
    assert one(made).modified
    assert not one(made).modified
    exact = reference.run_model(made, data).outputs[0]["y"]
    bound = {4: 0.12, 8: 0.01}[bits]
    assert np.linalg.norm(exact - before) < bound * np.linalg.norm(before)
    model.save(made, tmp_path / "m.onnx")
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "o.onnx")
    session = ort.InferenceSession(tmp_path / "m.onnx", options)
    assert "MatMulNBits" in Counter(n.op_type for n in onnx.load(tmp_path / "o.onnx").graph.node)
    (fused,) = session.run(None, data[0])
    assert np.linalg.norm(fused - exact) < 0.01 * np.linalg.norm(exact)


def test_four_bits_are_packed_as_onnx_packs_them() -> None:
    made = product("y = MatMul (x, w)", w=draw(17, 5))
    QuantizeWeights(block_size=16, min_elements=1)(made)
    (restore,) = [node for node in made.graph if node.op_type == "DequantizeLinear"]
    tensor = ir.convenience.get_const_tensor(restore.inputs[0])  # type: ignore[arg-type]  # it has inputs
    assert tensor is not None
    assert tensor.dtype == ir.DataType.INT4
    assert tensor.nbytes == (17 * 5 + 1) // 2
    proto = onnx.helper.make_tensor(
        "w", onnx.TensorProto.INT4, [17, 5], tensor.numpy().astype(np.int8).ravel()
    )
    assert onnx.numpy_helper.to_array(proto).dtype == ml_dtypes.int4
    assert bytes(proto.raw_data or bytes(proto.int32_data)) == tensor.tobytes()


def test_what_is_left_alone() -> None:
    small = product("y = MatMul (x, w)", w=draw(8, 8))
    assert not QuantizeWeights()(small).modified
    bad = draw(64, 64)
    bad[0, 0] = np.inf
    with declining() as declined:
        assert not QuantizeWeights()(product("y = MatMul (x, w)", w=bad)).modified
    assert [note.reason for note in declined] == ["1 of 4096 values are NaN or infinite"]
    twice = product("h = MatMul (x, w) s = MatMul (w, h) y = Identity (s)", w=draw(64, 64))
    with declining() as declined:
        assert not QuantizeWeights()(twice).modified
    assert [note.reason for note in declined] == ["something besides the products reads it"]


@pytest.mark.slow
def test_memory_follows_the_largest_weight(tmp_path: Path) -> None:
    """Eight weights of 16 MiB: at most two of them, with what a stripe needs, at a time."""
    made = product(
        " ".join(f"h{i + 1} = MatMul (h{i}, w{i})" for i in range(7)).replace("h0", "x", 1)
        + " y = MatMul (h7, w7)",
        **{f"w{i}": draw(2048, 2048, seed=i) for i in range(8)},
    )
    model.save(made, tmp_path / "m.onnx", external=True)
    code = """
import resource, sys
from trivium.compiler import model
from trivium.passes.quantize_weights import QuantizeWeights
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
made = model.load(sys.argv[1])
before = peak()
assert QuantizeWeights()(made).modified
model.save(made, sys.argv[2], external=True)
print(peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "m.onnx"), str(tmp_path / "q.onnx")],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    # The packed result of all eight is 17 MiB; the largest weight 16 MiB.
    assert int(done.stdout) < 90 << 20
    assert (tmp_path / "q.onnx.data").stat().st_size < 20 << 20
