"""Operators of ``com.microsoft`` against ONNX Runtime, which defines them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import helper

from trivium.backends.xla.lowering import lower, precise

jax = pytest.importorskip("jax", reason="the xla backend needs the extra trivium[tpu]")

Arrays = dict[str, np.ndarray[Any, Any]]


def agree(
    op_type: str, operands: list[np.ndarray[Any, Any] | None], outputs: int = 1, **attributes: Any
) -> None:
    """Run one operator on both engines, every operand an input, and compare."""
    names = [f"x{index}" if x is not None else "" for index, x in enumerate(operands)]
    results = [f"y{index}" for index in range(outputs)]
    node = helper.make_node(op_type, names, results, domain="com.microsoft", **attributes)
    feed = {name: x for name, x in zip(names, operands, strict=True) if x is not None}
    inputs = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
        for n, x in feed.items()
    ]
    # ONNX Runtime infers types of outputs that are declared without one.
    graph = helper.make_graph([node], "one", inputs, [onnx.ValueInfoProto(name=n) for n in results])
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    proto = helper.make_model(graph, opset_imports=domains, ir_version=10)
    expected = ort.InferenceSession(proto.SerializeToString()).run(None, feed)
    lowered = lower(ir.from_proto(proto))
    with precise():
        if "x6" in feed:  # how long the cache is: a shape
            fixed = {"x6": feed.pop("x6")}
            actual = jax.jit(lambda f: lowered.function({}, {**f, **fixed}))(feed)
        else:
            actual = jax.jit(lowered.function)({}, feed)
    for name, want in zip(results, expected, strict=True):
        have = np.asarray(actual[name])
        assert have.dtype == want.dtype
        tolerance = {"atol": 1} if want.dtype.kind in "iu" else {"rtol": 1e-3, "atol": 1e-4}
        np.testing.assert_allclose(have.astype(np.float64), want.astype(np.float64), **tolerance)


def normal(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("inputs", [64, 80])
def test_matmul_nbits(zeros: bool, inputs: int) -> None:
    rng = np.random.default_rng(1)
    blocks = -(-inputs // 32)
    packed = rng.integers(0, 256, (24, blocks, 16)).astype(np.uint8)
    scales = rng.uniform(0.01, 0.1, 24 * blocks).astype(np.float32)
    points = rng.integers(0, 256, 24 * -(-blocks // 2)).astype(np.uint8) if zeros else None
    agree(
        "MatMulNBits", [normal(3, inputs), packed, scales, points],
        K=inputs, N=24, bits=4, block_size=32,
    )  # fmt: skip


@pytest.mark.parametrize("op_type", ["Gelu", "FastGelu", "QuickGelu"])
def test_activation(op_type: str) -> None:
    agree(op_type, [normal(3, 8)])


def test_bias_gelu() -> None:
    agree("BiasGelu", [normal(3, 8), normal(8, seed=1)])


def test_fused_matmul() -> None:
    agree("FusedMatMul", [normal(2, 5, 3), normal(2, 4, 5)], transA=1, transB=1, alpha=0.5)


def test_skip_layer_normalization() -> None:
    operands = [normal(2, 3, 8, seed=s) for s in (0, 1)] + [normal(8, seed=s) for s in (2, 3, 4)]
    agree("SkipLayerNormalization", [*operands], epsilon=1e-5)


def test_skip_simplified_layer_normalization() -> None:
    operands = [normal(2, 3, 8, seed=0), normal(2, 3, 8, seed=1), normal(8, seed=2)]
    agree("SkipSimplifiedLayerNormalization", [*operands], epsilon=1e-5)


@pytest.mark.parametrize("interleaved", [0, 1])
def test_rotary_embedding(interleaved: int) -> None:
    positions = np.asarray([[2, 3, 4]], np.int64)
    angles = normal(8, 4)
    agree(
        "RotaryEmbedding", [normal(1, 2, 3, 8), positions, np.cos(angles), np.sin(angles)],
        interleaved=interleaved,
    )  # fmt: skip


@pytest.mark.parametrize("past", [0, 5])
def test_group_query_attention(past: int) -> None:
    time, total = (1, past + 1) if past else (4, 4)
    angles = normal(16, 8)
    agree(
        "GroupQueryAttention",
        [
            normal(1, time, 4 * 16, seed=1),
            normal(1, time, 2 * 16, seed=2),
            normal(1, time, 2 * 16, seed=3),
            normal(1, 2, past, 16, seed=4),
            normal(1, 2, past, 16, seed=5),
            np.asarray([total - 1], np.int32),
            np.asarray(total, np.int32),
            np.cos(angles),
            np.sin(angles),
        ],
        outputs=3,
        num_heads=4,
        kv_num_heads=2,
        do_rotary=1,
    )


@pytest.mark.parametrize("op_type", ["QLinearAdd", "QLinearMul"])
def test_quantized_arithmetic(op_type: str) -> None:
    rng = np.random.default_rng(2)
    a, b = (rng.integers(0, 256, (3, 8)).astype(np.uint8) for _ in range(2))
    scale, zero = np.asarray(0.1, np.float32), np.asarray(120, np.uint8)
    wide = np.asarray(0.6, np.float32)
    agree(op_type, [a, scale, zero, b, scale, zero, wide, zero])
