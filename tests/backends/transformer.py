"""A small transformer block of the standard's own high-level operators, for every engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

HIDDEN, HEADS, LENGTH = 32, 4, 6


def write_transformer(path: Path) -> Path:
    """Write ``y = x + Attention(RoPE(RMSNorm(x)))``, then a Swish feed-forward and a Gelu."""
    rng = np.random.default_rng(3)
    head = HIDDEN // HEADS
    angles = np.outer(np.arange(LENGTH), 1.0 / 10 ** np.arange(head // 2)).astype(np.float32)
    weights = {
        "gain": np.ones(HIDDEN, np.float32),
        "wq": rng.standard_normal((HIDDEN, HIDDEN)).astype(np.float32) * 0.2,
        "wk": rng.standard_normal((HIDDEN, HIDDEN)).astype(np.float32) * 0.2,
        "wv": rng.standard_normal((HIDDEN, HIDDEN)).astype(np.float32) * 0.2,
        "up": rng.standard_normal((HIDDEN, 64)).astype(np.float32) * 0.2,
        "down": rng.standard_normal((64, HIDDEN)).astype(np.float32) * 0.2,
        "cos": np.cos(angles),
        "sin": np.sin(angles),
        "positions": np.arange(LENGTH, dtype=np.int64)[None],
        "split": np.array([1, LENGTH, HEADS, head], np.int64),
        "merge": np.array([1, LENGTH, HIDDEN], np.int64),
    }
    nodes = [
        helper.make_node("RMSNormalization", ["x", "gain"], ["n"], name="norm"),
        *[
            node
            for letter in "qkv"
            for node in (
                helper.make_node("MatMul", ["n", f"w{letter}"], [f"{letter}0"]),
                helper.make_node("Reshape", [f"{letter}0", "split"], [f"{letter}1"]),
                helper.make_node("Transpose", [f"{letter}1"], [f"{letter}2"], perm=[0, 2, 1, 3]),
            )
        ],
        helper.make_node("RotaryEmbedding", ["q2", "cos", "sin", "positions"], ["q3"]),
        helper.make_node("RotaryEmbedding", ["k2", "cos", "sin", "positions"], ["k3"]),
        helper.make_node("Attention", ["q3", "k3", "v2"], ["a"], name="attend", is_causal=1),
        helper.make_node("Transpose", ["a"], ["a1"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["a1", "merge"], ["a2"]),
        helper.make_node("Add", ["x", "a2"], ["r"]),
        helper.make_node("MatMul", ["r", "up"], ["u"]),
        helper.make_node("Swish", ["u"], ["s"], name="swish"),
        helper.make_node("MatMul", ["s", "down"], ["d"]),
        helper.make_node("Gelu", ["d"], ["y"], approximate="tanh"),
    ]
    shape = [1, LENGTH, HIDDEN]
    graph = helper.make_graph(
        nodes,
        "transformer",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path
