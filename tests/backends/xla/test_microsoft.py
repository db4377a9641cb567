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
    op_type: str,
    operands: list[np.ndarray[Any, Any] | None],
    outputs: int = 1,
    known: tuple[str, ...] = (),
    **attributes: Any,
) -> None:
    """Run one operator on both engines, every operand an input, and compare.

    Args:
        known: Operands whose values are known while tracing.
    """
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
        fixed = {name: feed.pop(name) for name in known}
        actual = jax.jit(lambda f: lowered.function({}, {**f, **fixed}))(feed)
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
        known=("x6",),  # how long the cache is: a shape
        num_heads=4,
        kv_num_heads=2,
        do_rotary=1,
    )


def test_group_query_attention_of_rows_with_ends_of_their_own() -> None:
    """Two new tokens a row, after three and five in buffers of seven slots."""
    past_key, past_value = normal(2, 2, 7, 16, seed=4), normal(2, 2, 7, 16, seed=5)
    for past in (past_key, past_value):  # what lies beyond a row's end, ONNX Runtime clears
        past[0, :, 3:], past[1, :, 5:] = 0, 0
    agree(
        "GroupQueryAttention",
        [
            normal(2, 2, 4 * 16, seed=1),
            normal(2, 2, 2 * 16, seed=2),
            normal(2, 2, 2 * 16, seed=3),
            past_key,
            past_value,
            np.asarray([4, 6], np.int32),
            np.asarray(7, np.int32),
            *[None] * 9,
            np.asarray([2, 2], np.int32),
        ],
        outputs=3,
        known=("x6",),
        num_heads=4,
        kv_num_heads=2,
    )


@pytest.mark.parametrize("op_type", ["QLinearAdd", "QLinearMul"])
def test_quantized_arithmetic(op_type: str) -> None:
    rng = np.random.default_rng(2)
    a, b = (rng.integers(0, 256, (3, 8)).astype(np.uint8) for _ in range(2))
    scale, zero = np.asarray(0.1, np.float32), np.asarray(120, np.uint8)
    wide = np.asarray(0.6, np.float32)
    agree(op_type, [a, scale, zero, b, scale, zero, wide, zero])


def integers(*shape: int, seed: int = 0, dtype: type = np.uint8) -> np.ndarray[Any, Any]:
    limits = np.iinfo(dtype)
    rng = np.random.default_rng(seed)
    return rng.integers(limits.min, limits.max + 1, shape).astype(dtype)


def scalar(value: float, dtype: type = np.float32) -> np.ndarray[Any, Any]:
    return np.asarray(value, dtype)


@pytest.mark.parametrize("mask", [None, "lengths", "keys", "pairs"])
def test_multi_head_attention(mask: str | None) -> None:
    masks = {
        "lengths": np.asarray([3, 5], np.int32),
        "keys": np.asarray([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1]], np.int32),
        "pairs": np.tril(np.ones((2, 4, 5), np.int32), 1),
    }
    agree(
        "MultiHeadAttention",
        [
            normal(2, 4, 24, seed=1), normal(2, 5, 24, seed=2), normal(2, 5, 32, seed=3),
            normal(80, seed=4), None if mask is None else masks[mask],
            normal(1, 4, 4, 5, seed=5),
        ],
        num_heads=4,
    )  # fmt: skip


def test_causal_multi_head_attention() -> None:
    parts = [normal(2, 4, 16, seed=seed) for seed in (1, 2, 3)]
    agree("MultiHeadAttention", [*parts, normal(48)], num_heads=2, unidirectional=1)


def test_multi_head_attention_appends_to_a_cache() -> None:
    projections = [normal(2, 1, 16, seed=seed) for seed in (1, 2, 3)]
    caches = [normal(2, 2, 5, 8, seed=seed) for seed in (4, 5)]
    agree("MultiHeadAttention", [*projections, None, None, None, *caches], 3, num_heads=2)


def test_multi_head_attention_on_keys_and_values_that_are_ready() -> None:
    ready = [normal(2, 2, 6, 8, seed=seed) for seed in (2, 3)]
    agree("MultiHeadAttention", [normal(2, 3, 16, seed=1), *ready], num_heads=2, scale=0.3)


@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize("by_column", [False, True])
def test_quantized_attention(by_column: bool, past: bool) -> None:
    columns = (48,) if by_column else ()
    scales = np.random.default_rng(3).uniform(0.005, 0.01, columns).astype(np.float32)
    zeros: Any = integers(*columns, seed=8, dtype=np.int8) // 8 if by_column else scalar(3, np.int8)
    agree(
        "QAttention",
        [
            integers(2, 4, 16), integers(16, 48, seed=1, dtype=np.int8), normal(48, seed=2),
            scalar(0.02), scales, np.asarray([4, 2], np.int32), scalar(128, np.uint8), zeros,
            normal(2, 2, 2, 3, 8, seed=4) if past else None,
        ],
        2 if past else 1, num_heads=2, unidirectional=int(past),
    )  # fmt: skip


@pytest.mark.parametrize("quantized", [False, True])
def test_quantized_gemm(quantized: bool) -> None:
    scales = np.random.default_rng(3).uniform(0.005, 0.01, 6).astype(np.float32)
    zeros = integers(6, seed=8, dtype=np.int8)
    rest = [scalar(0.5), scalar(110, np.uint8)] if quantized else []
    bias = np.arange(6, dtype=np.int32) * 1000
    agree(
        "QGemm",
        [
            integers(4, 5), scalar(0.02), scalar(100, np.uint8),
            integers(6, 5, seed=1, dtype=np.int8), scales, zeros, bias, *rest,
        ],
        transB=1, alpha=0.5,
    )  # fmt: skip


def test_matmul_integer_to_float() -> None:
    scales = np.random.default_rng(3).uniform(0.005, 0.01, 6).astype(np.float32)
    agree(
        "MatMulIntegerToFloat",
        [
            integers(2, 4, 5), integers(5, 6, seed=1), scalar(0.02), scales,
            scalar(100, np.uint8), integers(6, seed=8), normal(6),
        ],
    )  # fmt: skip


def test_quantized_where() -> None:
    choice = np.asarray([[True, False, True], [False, False, True]])
    agree(
        "QLinearWhere",
        [
            choice, integers(2, 3), scalar(0.02), scalar(100, np.uint8), integers(1, 3, seed=1),
            scalar(0.05), scalar(3, np.uint8), scalar(0.04), scalar(90, np.uint8),
        ],
    )  # fmt: skip


@pytest.mark.parametrize("last", [0, 1])
def test_quantized_average_pool(last: int) -> None:
    shape = (1, 7, 6, 3) if last else (1, 3, 7, 6)
    agree(
        "QLinearAveragePool",
        [integers(*shape), scalar(0.02), scalar(100, np.uint8), scalar(0.01), scalar(9, np.uint8)],
        kernel_shape=[3, 2], strides=[2, 2], pads=[1, 0, 1, 0], channels_last=last,
    )  # fmt: skip


def test_quantized_embedding() -> None:
    ids, segments = np.asarray([[1, 4, 2], [0, 3, 3]], np.int32), np.zeros((2, 3), np.int32)
    tables = [integers(5, 8), integers(3, 8, seed=1), integers(2, 8, seed=2)]
    norms = [integers(8, seed=3), integers(8, seed=4)]
    mask = np.asarray([[1, 1, 0], [1, 1, 1]], np.int32)
    scales = [scalar(0.01 * index) for index in range(1, 6)]
    zeros = [scalar(100 + index, np.uint8) for index in range(5)]
    agree(
        "QEmbedLayerNormalization", [ids, segments, *tables, *norms, mask, *scales, *zeros], 2,
        epsilon=1e-5,
    )  # fmt: skip


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_gather_of_blocks(bits: int, zeros: bool) -> None:
    packed = integers(7, 64 * bits // 8)
    scales = np.random.default_rng(1).uniform(0.01, 0.1, (7, 4)).astype(np.float32)
    points = integers(7, 4 * bits // 8, seed=2) if zeros else None
    indices = np.asarray([[0, 6, 2], [3, 3, 1]])
    agree(
        "GatherBlockQuantized", [packed, indices, scales, points],
        bits=bits, block_size=16, gather_axis=0, quantize_axis=1,
    )  # fmt: skip


@pytest.mark.parametrize("kind", [0, 1])
def test_matmul_of_bitsandbytes(kind: int) -> None:
    largest = np.random.default_rng(1).uniform(0.5, 2, 24 * 32 // 16).astype(np.float32)
    agree(
        "MatMulBnb4", [normal(3, 32), integers(24 * 32 // 2), largest],
        K=32, N=24, block_size=16, quant_type=kind,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [np.uint16, np.int8])
def test_quantize_and_dequantize(dtype: type) -> None:
    scales = np.asarray([0.01, 0.5, 0.1], np.float32)
    zeros: np.ndarray[Any, Any] = np.asarray([3, 0, 9], dtype)
    agree("QuantizeLinear", [normal(2, 3, 4), scales, zeros], axis=1)
    agree("DequantizeLinear", [integers(2, 3, 4, dtype=dtype), scales, zeros], axis=1)
    scale, zero = scalar(0.5), scalar(3, dtype)
    agree("DequantizeLinear", [integers(2, 3, dtype=dtype), scale, zero])


@pytest.mark.parametrize(
    ("activation", "parameters"),
    [("Tanh", [0.0]), ("LeakyRelu", [0.2]), ("Clip", [-0.5, 0.5]), ("HardSigmoid", [0.3, 0.4])],
)
def test_fused_conv(activation: str, parameters: list[float]) -> None:
    agree(
        "FusedConv", [normal(1, 3, 5, 5), normal(4, 3, 3, 3, seed=1), normal(4, seed=2)],
        kernel_shape=[3, 3], pads=[1, 1, 1, 1], activation=activation,
        activation_params=parameters,
    )  # fmt: skip


def test_fused_conv_adds_a_residual() -> None:
    agree(
        "FusedConv",
        [normal(1, 3, 5, 5), normal(4, 3, 1, 1, seed=1), normal(4), normal(1, 4, 5, 5, seed=3)],
        kernel_shape=[1, 1], activation="Relu",
    )  # fmt: skip


def test_fused_gemm() -> None:
    operands: list[np.ndarray[Any, Any] | None] = [normal(4, 5), normal(6, 5, seed=1), normal(6)]
    agree("FusedGemm", operands, transB=1, activation="Relu")
    agree("FusedGemm", operands, transB=1, activation="LeakyRelu", activation_alpha=0.3)


def test_max_pool_with_channels_last() -> None:
    agree(
        "NhwcMaxPool", [integers(1, 7, 6, 3, dtype=np.int8)], kernel_shape=[3, 2],
        strides=[2, 2], pads=[1, 0, 1, 0],
    )  # fmt: skip


def alone(op_type: str, operands: list[np.ndarray[Any, Any]], **attributes: Any) -> Any:
    """The result of one operator that ONNX Runtime has for GPUs only."""
    names = [f"x{index}" for index in range(len(operands))]
    node = helper.make_node(op_type, names, ["y"], domain="com.microsoft", **attributes)
    feed = dict(zip(names, operands, strict=True))
    inputs = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, x.shape)
              for n, x in feed.items()]  # fmt: skip
    graph = helper.make_graph([node], "one", inputs, [onnx.ValueInfoProto(name="y")])
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    lowered = lower(ir.from_proto(helper.make_model(graph, opset_imports=domains)))
    with precise():
        return np.asarray(jax.jit(lowered.function)({}, feed)["y"])


def gelu(x: np.ndarray[Any, Any]) -> Any:
    from math import erf

    return x * 0.5 * (1 + np.vectorize(erf)(x / 2**0.5))


def test_what_is_fused_for_diffusers() -> None:
    """Against the formulas of the schemas: the CPU has no kernel of these."""
    x, skip, bias = normal(2, 3, 8), normal(2, 3, 8, seed=1), normal(8, seed=2)
    np.testing.assert_allclose(alone("BiasAdd", [x, bias, skip]), x + bias + skip, rtol=1e-6)
    total = x + bias
    want = total[..., :4] * gelu(total[..., 4:])
    np.testing.assert_allclose(alone("BiasSplitGelu", [x, bias]), want, rtol=1e-4, atol=1e-6)
    w = normal(8, 4, seed=3)
    product = x @ w
    want = 0.5 * product * (1 + np.tanh(0.7978845608 * (product + 0.044715 * product**3)))
    np.testing.assert_allclose(alone("GemmFastGelu", [x, w]), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("last", [0, 1])
def test_group_norm(last: int) -> None:
    x, gamma, beta = normal(2, 6, 4, 5), normal(6, seed=1), normal(6, seed=2)
    apart = x.reshape(2, 3, -1)
    y = (apart - apart.mean(-1, keepdims=True)) / np.sqrt(apart.var(-1, keepdims=True) + 1e-5)
    y = y.reshape(x.shape) * gamma[:, None, None] + beta[:, None, None]
    want = y / (1 + np.exp(-y))
    given = x.transpose(0, 2, 3, 1) if last else x
    have = alone("GroupNorm", [given, gamma, beta], groups=3, activation=1, channels_last=last)
    have = have.transpose(0, 3, 1, 2) if last else have
    np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-5)
