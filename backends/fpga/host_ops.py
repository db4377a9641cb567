"""What the host does around the kernel, as ONNX defines it: quantize and dequantize in float32,
Softmax, and the order of axes. Needs numpy and nothing else: this very file goes into the project.

A port is a table: ``name``, ``shape`` (of one frame, in the model's order), ``order`` (the model's
order of the axes 0 channels, 1 height, 2 width), ``image`` (height, width, channels), ``memory``
and ``dtype`` (numpy's names), ``host`` (what to do, in order).
"""

from __future__ import annotations

from typing import Any

import numpy as np

STREAM = (1, 2, 0)


def prepare(port: dict[str, Any], x: Any) -> Any:
    """Turn a model's input ``[frames, *shape]`` into ``[frames, height, width, channels]``."""
    x = np.asarray(x)
    for op in port["host"]:
        x = apply(op, x)
    height, width, channels = port["image"]
    sizes = (channels, height, width)
    x = x.reshape(len(x), *(sizes[axis] for axis in port["order"]))
    x = x.transpose(0, *(1 + port["order"].index(axis) for axis in STREAM))
    return np.ascontiguousarray(x.astype(port["memory"]))


def finish(port: dict[str, Any], x: Any) -> Any:
    """Turn integers ``[frames, height, width, channels]`` into a model's output."""
    x = x.transpose(0, *(1 + STREAM.index(axis) for axis in port["order"]))
    x = np.ascontiguousarray(x).reshape(len(x), *port["shape"])
    for op in port["host"]:
        x = apply(op, x)
    return x.astype(port["dtype"])


def apply(op: dict[str, Any], x: Any) -> Any:
    """Compute one of ONNX's QuantizeLinear, DequantizeLinear and Softmax (over the last axis)."""
    kind = op["op_type"]
    scale: Any = np.asarray(op["scale"] if op["scale"] is not None else 1, np.float32)
    if kind == "QuantizeLinear":
        bounds = np.iinfo(op["dtype"])
        steps = np.rint(np.asarray(x, np.float32) / scale) + op["zero_point"]
        return np.clip(steps, bounds.min, bounds.max).astype(op["dtype"])
    if kind == "DequantizeLinear":
        return (x.astype(np.int64) - op["zero_point"]).astype(np.float32) * scale
    if kind == "Softmax":
        powers = np.exp(x - x.max(-1, keepdims=True))
        return powers / powers.sum(-1, keepdims=True)
    raise ValueError("no such operation: " + kind)
